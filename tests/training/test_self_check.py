"""Before its first step a run compares that step with the reference: nothing that rounds is refused, faults are."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import pytest

from mmfree_jax.config import ConfigError
from mmfree_jax.training import loop, self_check, step
from mmfree_jax.training.step import make_program, program_key
from tests.conftest import tiny_run
from tests.models.families import CONFIGS, FAMILIES

CHECK = self_check.self_check


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Programs of a test hold its faults: none of them outlives it, and no outcome is found or kept."""
    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setattr(self_check.verification, "outcome_file", lambda *_: None)
    make_program.cache_clear()
    yield
    make_program.cache_clear()


def run_of(name: str, token_set, **changes):
    run = tiny_run("matmul-free", token_set.path)
    return dataclasses.replace(run, model=dataclasses.replace(CONFIGS[name], vocab=257), **changes)


def check(run) -> None:
    CHECK(program_key(run, 0), run.data.batch, run.data.sequence, run.model.vocab)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes_in_float32(token_set, name):
    check(run_of(name, token_set, precision="float32"))


@pytest.mark.parametrize("name", ["transformer++", "matmul-free"])
def test_rounding_to_bfloat16_is_explained(token_set, name):
    run = run_of(name, token_set, precision="bfloat16", remat="full")
    check(dataclasses.replace(run, optim=dataclasses.replace(run.optim, accumulate=2)))


def scaled(by, only=lambda role: True):
    """The step's gradients of a batch in one piece, some of them off by a factor."""
    right = step._accumulated

    def wrong(loss_and_grad, params, tokens_BT, steps):
        loss, grads = right(loss_and_grad, params, tokens_BT, steps)
        if steps > 1:  # the reference goes row by row
            return loss, grads
        names = jax.tree_util.tree_map_with_path(lambda path, g: g * (by if only(str(path)) else 1), grads)
        return loss, names

    return wrong


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_wrong_gradient_is_named(token_set, monkeypatch, precision):
    monkeypatch.setattr(step, "_accumulated", scaled(1.6, lambda path: "down" in path))
    with pytest.raises(ConfigError, match=r"self-check: the gradient to .*down.* deviates by 0\.6.*--no-self-check"):
        check(run_of("matmul-free", token_set, precision=precision))


def test_a_gradient_that_is_no_number_is_refused(token_set, monkeypatch):
    monkeypatch.setattr(step, "_accumulated", scaled(jnp.nan))
    with pytest.raises(self_check.SelfCheckError):
        check(run_of("transformer++", token_set, precision="float32"))


def test_the_outcome_is_kept_beside_compiled_programs(token_set, tmp_path, monkeypatch):
    place = lambda group, depends: tmp_path / group / f"{zlib.crc32(repr(depends).encode())}.json"
    monkeypatch.setattr(self_check.verification, "outcome_file", place)
    run = run_of("hgrn", token_set, precision="float32")
    check(run)
    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setattr(self_check, "compare", lambda *a: pytest.fail("compared again"))
    check(dataclasses.replace(run, seed=1, steps=20))  # of the same shape
    with pytest.raises(pytest.fail.Exception):
        check(dataclasses.replace(run, data=dataclasses.replace(run.data, sequence=16)))


def test_a_run_tells_which_kernels_served_and_which_were_refused(token_set, tmp_path, monkeypatch):
    served, refused = ["int8_matmul 256x128x128 False"], ["row_codes 4x128 bfloat16 False: codes deviates by 85 times"]
    monkeypatch.setattr(loop.verification, "record", lambda: {"served": served, "refused": refused})
    row = loop.train(run_of("transformer++", token_set, steps=6), tmp_path, token_set)
    assert (row["kernels"], row["kernels_refused"]) == (served[0], refused[0])
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert f"kernel refused, XLA serves: {refused[0]}" in log
    assert f"kernel serves: {served[0]}" in log


def test_a_run_that_fails_trains_nothing(token_set, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "self_check", CHECK)
    monkeypatch.setattr(step, "_accumulated", scaled(1.5))
    run = run_of("transformer++", token_set, precision="float32")
    with pytest.raises(self_check.SelfCheckError):
        loop.train(run, tmp_path / "run", token_set)
    assert not (tmp_path / "run" / "result.json").exists()
    loop.train(dataclasses.replace(run, steps=6), tmp_path / "trusted", token_set, check_first=False)
