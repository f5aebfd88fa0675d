"""Scores of probes: literal intervals, rows as observations, chance for a guess, one for an oracle."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.evaluation.probes import PROBES, Draw, draw, score
from mmfree_jax.evaluation.probes.scoring import accuracy, predictions, wilson
from tests.evaluation.probes.reading import SMALL


def oracle(probe, reader):
    """A model that reads the rows by the rule. It sees no token after the present one."""

    def logits(tokens):
        out = np.zeros((*tokens.shape, len(probe.words)))
        for row, line in enumerate(tokens):
            words = [probe.words[token] for token in line]
            for at in range(1, len(words) + 1):
                # The reader is asked about the text so far with any word after it: it uses none.
                found = {place: answer for place, answer, _ in reader([*words[:at], *words[:1]])}
                if at in found:
                    out[row, at - 1, probe.words.index(found[at])] = 1
        return out

    return logits


@pytest.mark.parametrize("name", [name for name in PROBES if name != "induction"])
def test_a_model_that_follows_the_rule_is_right_everywhere(name):
    probe, reader = SMALL[name]
    found = score(oracle(probe, reader), draw(probe, 1, 62), batch=16)
    assert all(part.accuracy == 1 and part.low > 0.5 for part in found)
    assert found[0].targets == sum(part.targets for part in found[1:])


@pytest.mark.parametrize("name", list(PROBES))
def test_a_constant_answer_is_right_by_chance(name):
    probe = PROBES[name]
    one = jnp.eye(len(probe.words))[probe.answers[0]]
    found = score(lambda tokens: jnp.broadcast_to(one, (*tokens.shape, len(probe.words))), draw(probe, 4, 1500))
    # 99.9 %, so that none of seven fails by chance
    assert found[0].accuracy == pytest.approx(
        1 / len(probe.answers), abs=3.3 / 1.96 * (found[0].high - found[0].low) / 2
    )


def test_targets_are_scored_by_their_distance():
    # The model is right at distances under 4 only.
    tokens = np.array([[0, 1, 1, 1, 1], [0, 1, 1, 1, 1]], np.int32)
    distance = np.array([[1, 2, 3, 0], [4, 5, 0, 2]], np.int32)
    right = np.array([[1, 1, 1, 0], [0, 0, 1, 1]])
    drawn = Draw(tokens, distance)
    logits = lambda batch: np.stack([1 - right, right], axis=-1)
    found = score(logits, drawn, batch=2)
    assert [(part.nearest, part.farthest, part.targets, part.accuracy) for part in found] == [
        (1, 5, 6, 4 / 6),
        (1, 1, 1, 1.0),
        (2, 3, 3, 1.0),
        (4, 5, 2, 0.0),
    ]
    assert [part.targets for part in score(logits, drawn, limits=(1, 3, 6), batch=2)] == [6, 3, 3]


def test_every_batch_has_the_same_shape():
    tokens = draw(PROBES["parity"], 0, 7).tokens[:, :-1]
    shapes = []

    def next_is_same(batch):
        shapes.append(batch.shape)
        return np.eye(5)[batch]

    np.testing.assert_array_equal(predictions(next_is_same, tokens, 3), tokens)
    assert shapes == [(3, tokens.shape[1])] * 3


def test_wilsons_interval_of_five_and_of_none_in_ten():
    assert wilson(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    z = 1.959964
    assert wilson(0.0, 10) == pytest.approx((0, z**2 / (10 + z**2)), abs=1e-6)
    assert wilson(1.0, 10) == pytest.approx((10 / (10 + z**2), 1), abs=1e-6)


def test_targets_that_fall_together_count_as_one_row():
    # Ten rows of eight targets, five rows right: as nine trials, because the mean was fitted too, and not as eighty.
    correct = np.repeat(np.arange(10) < 5, 8).reshape(10, 8)
    whole = np.ones((10, 8), bool)
    found = accuracy(correct, whole, whole.astype(int))
    assert (found.targets, found.rows, found.accuracy) == (80, 10, 0.5)
    assert (found.low, found.high) == pytest.approx(wilson(0.5, 9))
    # All right: as ten trials. One target a row: as many as rows, to the same factor.
    found = accuracy(whole, whole, whole.astype(int))
    assert (found.low, found.high) == pytest.approx(wilson(1.0, 10))
    single = np.eye(10, 8, dtype=bool)[:8]
    found = accuracy(correct[:8], single, single.astype(int))
    assert (found.low, found.high) == pytest.approx(wilson(5 / 8, 7))


def test_the_interval_holds_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = {"rows": 0, "targets": 0}
    for _ in range(1000):
        # Of eight targets of a row the first four fall together, and the rest.
        correct = np.repeat(random.random((60, 2)) < 0.7, 4, axis=1)
        whole = np.ones(correct.shape, bool)
        found = accuracy(correct, whole, whole.astype(int))
        held["rows"] += found.low <= 0.7 <= found.high
        low, high = wilson(found.accuracy, found.targets)
        held["targets"] += low <= 0.7 <= high
    assert 0.93 <= held["rows"] / 1000 <= 0.97
    assert held["targets"] / 1000 < 0.75  # what it would be if rows were ignored


def test_nothing_to_score():
    assert (
        score(lambda tokens: np.zeros((*tokens.shape, 2)), Draw(np.zeros((2, 5), np.int32), np.zeros((2, 4), int)))
        == []
    )
    assert score(lambda tokens: np.zeros((*tokens.shape, 5)), draw(PROBES["parity"], 0, 0)) == []
    assert not any(map(math.isnan, itertools.chain(wilson(0.0, 1), wilson(1.0, 1))))
