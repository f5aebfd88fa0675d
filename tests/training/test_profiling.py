import pytest

import launch
from mmfree_jax.config import ConfigError
from mmfree_jax.training.loop import train
from mmfree_jax.training.profiling import step_range
from tests.conftest import MAIN_FAMILIES, tiny_run
from tests.in_process import called


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_a_trace_of_some_steps_changes_no_number(family, token_set, tmp_path):
    config = tiny_run(family, token_set.path)
    plain = train(config, tmp_path / "plain", token_set)
    traced = train(config, tmp_path / "traced", token_set, range(4, 6))
    assert traced["loss"] == plain["loss"]
    assert list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_range_that_ends_after_the_run_is_still_written(token_set, tmp_path):
    train(tiny_run("matmul-free", token_set.path, steps=8), tmp_path, token_set, range(6, 100))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_range_that_begins_after_the_run_is_refused(token_set, tmp_path):
    with pytest.raises(ConfigError, match="profile=8:9: the run has 8 steps"):
        train(tiny_run("matmul-free", token_set.path, steps=8), tmp_path / "x", token_set, range(8, 9))
    assert not (tmp_path / "x").exists()


def test_a_wrong_range_fails_before_anything_is_written(tmp_path):
    assert step_range("") == range(0)
    assert step_range("10:12") == range(10, 12)
    for wrong in ("10", "5:5", "a:b", "7:3"):
        with pytest.raises(ConfigError, match="profile="):
            step_range(wrong)
    done = called(launch.main, "train", "matmul-free-tiny", "--out", tmp_path / "x", "--profile", "9")
    assert done.returncode == 1
    assert "must be FROM:TO" in done.stderr
    assert not (tmp_path / "x").exists()
