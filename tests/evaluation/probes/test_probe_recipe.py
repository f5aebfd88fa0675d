"""The recipe that trains families on probes: it learns, resumes, and draws what it found."""

import numpy as np
import pytest

from experiments import probes
from mmfree_jax.evaluation.probes import PROBES, StateTracking

EASY = StateTracking("Z2", (1, 2))  # the product of one element is that element
SMALL = probes.Recipe(width=16, depth=1, tokens=16 * EASY.length, steps=80)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(probes, "PROBES", {"easy": EASY})
    monkeypatch.setattr(probes, "TEST_ROWS", 50)
    monkeypatch.setattr(probes, "PART", 20)
    monkeypatch.setattr(probes, "RATES", {"dense": 2e-2, "ternary": 2e-2})


def test_seeds_learn_apart_and_the_table_goes_on_where_it_stopped(small, tmp_path):
    table = tmp_path / "probes.csv"
    assert probes.done(table, SMALL) == set()
    probes.append(table, list(probes.rows("matmul-free", "easy", SMALL)))
    assert probes.done(table, SMALL) == {("matmul-free", "easy")}
    held = probes.read(table)
    whole = [row for row in held if row["nearest"] == "all"]
    assert [(row["seed"], row["lengths"]) for row in whole] == [
        (seed, lengths) for lengths in ("trained", "beyond") for seed in "012"
    ]
    assert all(float(row["accuracy"]) > 0.95 for row in whole[:3])  # chance is a half
    assert len({row["loss"] for row in whole}) == 3
    assert {row["farthest"] for row in held if row["lengths"] == "beyond"} == {"3", "7"}
    with pytest.raises(SystemExit, match="is of another recipe"):
        probes.done(table, probes.Recipe(width=32))
    probes.picture(table, tmp_path / "probes.png")
    assert (tmp_path / "probes.png").stat().st_size > 5000


def test_what_lies_beyond_has_the_vocabulary_of_training_and_longer_rows():
    for name, probe in PROBES.items():
        longer = probes.beyond(probe)
        assert (longer.words, longer.answers) == (probe.words, probe.answers), name
        assert longer.length > 1.5 * probe.length, name


def test_no_step_reads_rows_of_another_and_seeds_have_their_own(small):
    recipe = probes.Recipe(tokens=4 * PROBES["recall"].length + 3, steps=50)
    tokens, masks = map(np.asarray, probes.batches(PROBES["recall"], recipe))
    assert tokens.shape == (50, 3, 4, PROBES["recall"].length)
    assert masks.shape == (50, 3, 4, PROBES["recall"].length - 1)
    rows = tokens.reshape(-1, tokens.shape[-1])
    assert len(np.unique(rows, axis=0)) == len(rows) == 50 * 3 * 4
    assert (masks.reshape(len(rows), -1)[:, 32:].sum(axis=1) == 16).all()  # the later half asks, each key once more
