"""Loss curves of all families against those that golden.py measured and golden.json holds."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from mmfree_jax.config import FAMILIES
from mmfree_jax.training import optim, step
from tests.training.golden import FILE, STEPS, corpus, curve, distance, run_of, tolerance

GOLDEN = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def token_set(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("golden") / "corpus")


def apart(family: str, token_set, **changes) -> float:
    """How far a family's curve is from the one held, as a multiple of the tolerance."""
    run = run_of(family, token_set.path)
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, **changes))
    return distance(curve(run, token_set), GOLDEN["families"][family]["curve"]) / tolerance(GOLDEN, family)


@pytest.fixture
def anew():
    """Programs that are made with what a test has changed are nobody else's."""
    step.make_program.cache_clear()
    yield
    step.make_program.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_has_the_curve_that_is_held(family, token_set):
    assert len(GOLDEN["families"][family]["curve"]) == STEPS
    assert apart(family, token_set) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rate_that_is_two_percent_higher_is_seen(family, token_set):
    assert apart(family, token_set, lr=1.02 * run_of(family, token_set.path).optim.lr) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_that_is_off_by_one_is_seen(family, token_set, anew, monkeypatch):
    """Documents that begin one position later."""
    ids = step.document_ids
    monkeypatch.setattr(step, "document_ids", lambda tokens_BT, end: ids(jnp.roll(tokens_BT, 1, axis=1), end))
    assert apart(family, token_set) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_of_weight_decay_that_is_changed_is_seen(family, token_set, anew, monkeypatch):
    """Gains decay too."""
    monkeypatch.setattr(optim, "DECAYED", (*optim.DECAYED, "gain"))
    assert apart(family, token_set) > 1
