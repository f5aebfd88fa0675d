"""What training took in: windows counted by hand, and the same sums however a run is divided."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfree_jax.data import Counts, Mixture, TokenSet, batches
from mmfree_jax.data.building import token_writer
from mmfree_jax.data.building.packing import pack
from mmfree_jax.data.reading.documents import count_windows, document_ids, is_target
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from tests.data.made_up import passage

SEQUENCE, BATCH, END = 16, 8, 0
SETTINGS = {"sequence": SEQUENCE, "seed": 5}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenSet]:
    """`many` and `few` short documents, and the few packed."""
    folder, rng = tmp_path_factory.mktemp("counts"), random.Random(0)
    texts = [passage(rng, 2)[: rng.randint(1, 40)] for _ in range(200)]
    card = {"name": "test", "description": "Made up.", "sources": []}
    write = lambda name, some: token_writer.write_token_set(folder / name, {"train": some}, byte_tokenizer(), card)
    many, few = write("many", texts), write("few", texts[:30])
    return {"many": many, "few": few, "packed": pack(few, folder / "packed", SEQUENCE)}


def windows_of(token_set: TokenSet) -> int:
    return (len(token_set.split("train")) - 1) // SEQUENCE


def taken(token_set: TokenSet, steps: int, batch: int = BATCH, **options) -> Counts:
    with batches(token_set, **SETTINGS, batch=batch, **options) as source:
        for _ in range(steps):
            next(source)
        return source.counts


def test_windows_counted_by_hand():
    windows = np.array([[5, 6, 0, 7, 0, 0, 0, 8, 9, 1], [0, 1, 2, 0, 0, 0, 3, 0, 0, 4]])
    both, one = np.array([True, True]), np.array([False, True])
    # Documents 5 6 | 0 7 | 0 | 0 | 0 8 9 and 0 1 2 | 0 | 0 | 0 3 | 0 | 0: n (n + 1) / 2 pairs each.
    pairs = (3 + 3 + 1 + 1 + 6) + (6 + 1 + 1 + 3 + 1 + 1)
    assert count_windows(windows, both, END) == Counts(targets=7 + 6, unique=13, pairs=pairs)
    assert count_windows(windows, one, END) == Counts(targets=13, unique=6, pairs=pairs)
    assert count_windows(windows, one, None) == Counts(targets=18, unique=9, pairs=2 * 45)


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4))
def test_pairs_are_those_that_the_mask_of_attention_lets_through(rows):
    windows = np.array(rows)
    inputs = windows[:, :-1]
    ids = document_ids(inputs, END)
    seen = (ids[:, :, None] == ids[:, None, :]) & np.tri(inputs.shape[1], dtype=bool)
    assert count_windows(windows, np.ones(len(windows), bool), END).pairs == seen.sum()


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", ["many", "packed"])
def test_an_epoch_has_every_target_of_its_windows_and_later_ones_have_no_new_ones(sets, name, separate):
    token_set = sets[name]
    count = windows_of(token_set)
    tokens = token_set.split("train")[: count * SEQUENCE + 1]
    targets = is_target(tokens, END).sum() if separate else count * SEQUENCE
    assert separate == (targets < count * SEQUENCE) or name == "many"
    epoch = taken(token_set, count, batch=1, separate=separate)
    assert epoch.targets == epoch.unique == targets
    more = taken(token_set, 3 * count, batch=1, separate=separate)
    assert more == Counts(3 * epoch.targets, epoch.unique, 3 * epoch.pairs)


@pytest.mark.parametrize("separate", [False, True])
def test_counts_are_the_same_sums_in_parts_in_several_processes(sets, separate):
    mixed = Mixture([sets["many"], sets["few"]], [1, 3])
    steps = 3 * windows_of(sets["few"]) // BATCH  # more than two epochs of the few
    whole = taken(mixed, steps, separate=separate)
    parts = [taken(mixed, 4, separate=separate), taken(mixed, steps - 4, start=4 * BATCH, separate=separate)]
    assert parts[0] + parts[1] == whole
    shares = [taken(mixed, steps, rows=rows, separate=separate) for rows in ([0, 3, 4], [1, 2], [5, 6, 7])]
    assert shares[0] + shares[1] + shares[2] == whole
    held_twice = [taken(mixed, steps, counting=rows, separate=separate) for rows in (range(5), range(5, 8))]
    assert held_twice[0] + held_twice[1] == whole
    assert whole.unique < whole.targets <= steps * BATCH * SEQUENCE


def test_of_a_mixture_the_windows_that_come_again_are_not_new(sets):
    """Three of four windows are of the few: after four times their number every one of theirs has come three times."""
    mixed, few = Mixture([sets["many"], sets["few"]], [1, 3]), windows_of(sets["few"])
    assert few < windows_of(sets["many"])
    found = taken(mixed, 4 * few, batch=1)
    assert found.targets == 4 * few * SEQUENCE
    assert found.unique == (few + few) * SEQUENCE  # all of the few, and as many of the many
