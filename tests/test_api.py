"""The Python interface: what the documentation promises of `import mmfree_jax`."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import mmfree_jax
from mmfree_jax.config import ConfigError
from mmfree_jax.files import read_json
from tests.conftest import tiny_run

TINY = {"model.vocab": 257, "model.depth": 1, "data.vocab": 257, "data.sequence": 32, "data.batch": 4, "steps": 4}
SHORT = {"optim.warmup_steps": 1, "optim.decay_steps": 1, "diagnose_every": 0, "checkpoint_every": 2}


def test_importing_the_package_imports_no_jax_and_shows_its_functions():
    code = (
        "import mmfree_jax, sys; print('jax' in sys.modules, [n for n in dir(mmfree_jax) if n in mmfree_jax.__all__])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "False ['evaluate', 'export', 'load', 'preset', 'train']\n"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        mmfree_jax.trian  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optim.lrr": 1.0}, r"optim\.lrr: no such field \(did you mean lr\?\)"),
        ({"optim": 1.0}, "optim: names a group of fields"),
        ({"steps.x": 1}, r"steps\.x: names a group of fields, or goes past a field"),
        ({"steps": "many"}, "steps='many': must be of type int"),
        ({"steps": 0}, "steps=0: must be at least 1"),
    ],
)
def test_a_preset_takes_changes_by_dotted_name_and_refuses_what_cannot_be(changes, says):
    run = mmfree_jax.preset("matmul-free-tiny", {"optim.lr": 1, "model.width": 64, "model.glu_width": 192})
    assert (run.optim.lr, run.model.width, run.optim.warmup_steps) == (1, 64, 20)
    with pytest.raises(ConfigError, match=says):
        mmfree_jax.preset("matmul-free-tiny", changes)


def test_a_run_is_trained_resumed_loaded_evaluated_and_exported(token_set, tmp_path):
    run = mmfree_jax.preset("matmul-free-tiny", {**TINY, **SHORT, "data.corpus": str(token_set.path)})
    row = mmfree_jax.train(run, tmp_path / "run")
    assert row == mmfree_jax.train(run, tmp_path / "run") == read_json(tmp_path / "run" / "result.json")
    assert row["attempts"] == 1
    scores = mmfree_jax.evaluate(tmp_path / "run")
    assert scores["loss"] == pytest.approx(row["loss"], rel=1e-5)

    mmfree_jax.export(tmp_path / "run", tmp_path / "exported")
    tokens = jnp.arange(8)[None]
    ours, exported = (mmfree_jax.load(tmp_path / name)(tokens) for name in ("run", "exported"))
    assert ours.shape == (1, 8, 257)
    np.testing.assert_array_equal(ours, exported)
    with pytest.raises(ConfigError, match="was not trained here: give the corpus"):
        mmfree_jax.evaluate(tmp_path / "exported")
    again = mmfree_jax.evaluate(tmp_path / "exported", str(token_set.path), sequence=32)
    assert again["loss"] == pytest.approx(row["loss"], rel=1e-5)


def test_another_run_in_the_folder_is_refused(token_set, tmp_path):
    run = tiny_run("matmul-free", token_set.path, steps=6, evaluate=False)
    mmfree_jax.train(run, tmp_path / "run")
    other = tiny_run("matmul-free", token_set.path, steps=7, evaluate=False)
    with pytest.raises(ConfigError, match="holds another run"):
        mmfree_jax.train(other, tmp_path / "run")


def test_a_model_is_exported_to_a_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is a URL: give a path"):
        mmfree_jax.export(tmp_path, "s3:/bucket/model")
    assert not list(tmp_path.iterdir())
