"""Rows of probes: every answer found again by a slow reader of their text, and none by a guess without reading."""

import hashlib
import itertools

import numpy as np
import pytest

from mmfree_jax.architecture import ConfigError
from mmfree_jax.evaluation.probes import (
    PROBES,
    Copying,
    Counting,
    Induction,
    LongRecall,
    Recall,
    StateTracking,
    draw,
)
from mmfree_jax.evaluation.probes.drawing import Random
from mmfree_jax.evaluation.probes.state_tracking import GENERATORS, elements, products
from tests.evaluation.probes.reading import SMALL

NAMES = list(PROBES)
ODD = {  # the smallest sizes, and ones that are no powers of two
    "recall": [Recall(1, 1, 2), Recall(7, 7, 30)],
    "copying": [Copying(2, (1, 2)), Copying(29, (3, 7, 11))],
    "induction": [Induction(3, (2, 3), 0), Induction(30, (2, 5, 17), 3)],
    "counting": [Counting(2, 1, (1, 2)), Counting(27, 12, (13, 14, 31))],
    "parity": [StateTracking("Z2", (1, 2)), StateTracking("Z2", (3, 8, 13))],
    "permutations": [StateTracking("S5", (1, 2, 9)), StateTracking("A5", (5, 7))],
    "long-recall": [LongRecall(1, 1, 2, 1, (0, 2), 0), LongRecall(3, 28, 5, 3, (1, 3, 9, 40), 5)],
}


def text(probe, row):
    return " ".join(probe.words[token] for token in row)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_and_distance_is_the_one_that_a_reader_of_the_text_finds(name, split):
    reader = SMALL[name][1]
    for probe in [SMALL[name][0], PROBES[name], *ODD[name]]:
        drawn = draw(probe, 3, 40, split)
        assert drawn.tokens.shape == (40, probe.length)
        assert (drawn.tokens.dtype, drawn.distance.dtype) == (np.int32, np.int32)
        for row, distance in zip(drawn.tokens, drawn.distance, strict=True):
            words = text(probe, row).split()
            found = {at: (answer, far) for at, answer, far in reader(words)}
            scored = np.flatnonzero(distance) + 1
            if name != "induction":  # where noise may repeat by chance, and then is not scored
                assert set(found) == set(scored)
            for at in scored:
                assert found[at] == (words[at], distance[at - 1])
                assert row[at] in probe.answers


LITERAL = {  # rows of seed 0, to be checked by hand
    "recall": "D c C c B b B b C c B b",
    "copying": "( B C C = B C C ( B C = B C",
    "induction": "D A E C D E B C D F E E F E",
    "counting": ". ( B B A A ? C 0 ( B A B ? B 2",
    "parity": ". ( 1 1 1 = 1 ( 1 1 = 0",
    "permutations": ". ( 231 321 312 = 132 ( 231 312 = 123",
    "long-recall": "C a B b 1 1 0 1 B b 0 C a 0 0 0",
}
DISTANCES = {  # at the answers of these rows, by their position
    "recall": {7: 2, 9: 6, 11: 4},
    "copying": {5: 4, 6: 4, 7: 4, 12: 3, 13: 3},
    "induction": {8: 4, 13: 3},
    "counting": {8: 4, 15: 3},
    "parity": {6: 3, 11: 2},
    "permutations": {6: 3, 11: 2},
    "long-recall": {9: 6, 12: 11},
}
TEST_ROWS = {  # of the test split, same seed
    "recall": "C a A b D c A b A b C a",
    "copying": "( C B = C B ( B A C = B A C",
    "induction": "D A C D A C B C A C C B C E",
    "counting": "( B C B ? C 1 ( A B B B C ? A 1",
    "parity": "( 1 0 = 1 ( 1 0 1 1 = 1",
    "permutations": "( 312 213 = 321 ( 231 123 312 231 = 231",
    "long-recall": "C b A a 0 1 1 A a 0 0 0 A a 0 1",
}


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_seed_are_these_on_every_platform(name):
    probe = SMALL[name][0]
    drawn = draw(probe, 0, 1)
    assert text(probe, drawn.tokens[0]) == LITERAL[name]
    assert {at + 1: far for at, far in enumerate(drawn.distance[0]) if far} == DISTANCES[name]
    assert text(probe, draw(probe, 0, 1, "test").tokens[0]) == TEST_ROWS[name]


def test_all_default_probes_are_the_same_for_ever():
    digest = hashlib.sha256()
    for probe in PROBES.values():
        drawn = draw(probe, 2026, 20, "test")
        digest.update(drawn.tokens.astype("<i4").tobytes() + drawn.distance.astype("<i4").tobytes())
    assert digest.hexdigest() == "21357fd9c3a48157c2a036a921f27b213ef0be8afc9b72d8fe19179a775b6dfb"


def test_the_integers_come_from_the_raw_output_of_pcg64():
    # The high 32 bits of NumPy's own first numbers, scaled by hand.
    raw = np.random.PCG64(np.random.SeedSequence([1, 7])).random_raw(4)
    assert Random("test", 7).integers(10, 2, 2).ravel().tolist() == [int(x) // 2**32 * 10 // 2**32 for x in raw]


@pytest.mark.parametrize("name", NAMES)
def test_no_test_row_is_a_training_row_or_that_of_another_seed(name):
    rows = [
        row.tobytes()
        for split, seed in itertools.product(["train", "test"], [0, 1, 2**40])
        for row in draw(PROBES[name], seed, 1000, split).tokens
    ]
    assert len(set(rows)) == len(rows)


@pytest.fixture(scope="module", params=NAMES)
def many(request):
    """A probe, 4,000 rows of it, and the row, the position and the token of every scored target."""
    probe = PROBES[request.param]
    drawn = draw(probe, 1, 4000)
    rows, inputs = np.nonzero(drawn.mask)
    return probe, drawn, rows, inputs + 1, drawn.tokens[rows, inputs + 1]


def test_every_answer_is_equally_frequent(many):
    probe, _, _, _, answers = many
    chance = 1 / len(probe.answers)
    shares = np.bincount(answers - probe.answers.start, minlength=len(probe.answers)) / len(answers)
    assert np.abs(shares - chance).max() < 4.5 * np.sqrt(chance / len(answers))


def test_neither_position_nor_distance_tells_the_answer(many):
    # The answer most frequent at a position, or a distance, in half of the rows, is no better than chance in the rest.
    probe, drawn, rows, at, answers = many
    train = rows < 2000
    for known in (at, drawn.distance[rows, at - 1]):
        counts = np.zeros((probe.length + 1, len(probe.words)))
        np.add.at(counts, (known[train], answers[train]), 1)
        right = counts.argmax(axis=1)[known[~train]] == answers[~train]
        chance = 1 / len(probe.answers)
        assert abs(right.mean() - chance) < 4.5 * np.sqrt(chance / len(right))


GUESS = {  # the best that copying a fixed position, or from a fixed number of tokens back, may reach
    "recall": 0.10,  # one of 16 pairs, or an equal value of the others
    "copying": 0.10,  # a fixed way back fits the shortest strings now and then
    "induction": 0.15,  # the same: one of four distances in the first of four ranges, besides chance
    "counting": 0.10,
    "parity": 0.51,
    "permutations": 0.34,  # of one element the product is that element: one range of five
    "long-recall": 0.07,
}


def test_no_fixed_place_holds_the_answer(many):
    probe, drawn, rows, at, answers = many
    name = next(name for name, known in PROBES.items() if known is probe)
    for place in range(probe.length):
        assert np.mean((drawn.tokens[rows, place] == answers) & (place < at)) < GUESS[name]
        back = np.maximum(at - place, 0)
        assert place == 0 or np.mean((drawn.tokens[rows, back] == answers) & (place <= at)) < GUESS[name]


@pytest.mark.parametrize(("name", "expected"), [("recall", 0.0918), ("long-recall", 0.1797)])
def test_a_value_of_the_row_without_its_key_is_right_as_often_as_stated(name, expected):
    probe = PROBES[name]
    drawn = draw(probe, 8, 4000)
    start = (drawn.tokens < probe.keys).argmax(axis=1)
    values = np.take_along_axis(drawn.tokens, start[:, None] + 1 + 2 * np.arange(probe.pairs), axis=1)
    rows, inputs = np.nonzero(drawn.mask)
    right = (values[rows] == drawn.tokens[rows, inputs + 1][:, None]).mean()
    assert 1 / probe.pairs + (1 - 1 / probe.pairs) / probe.values == pytest.approx(expected, abs=1e-4)
    assert right == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("name", ["copying", "induction", "counting", "parity", "permutations"])
def test_each_row_asks_one_question_in_each_range_and_in_any_order(name):
    probe = PROBES[name]
    drawn = draw(probe, 5, 600)
    orders = set()
    for distances in drawn.distance:
        asked = [int(d) - (name == "copying") for d, _ in itertools.groupby(distances[distances > 0])]
        bins = np.searchsorted(probe.distances, asked, side="right") - 1
        assert sorted(bins) == list(range(len(probe.distances) - 1))
        orders.add(tuple(bins))
    assert len(orders) == np.prod(range(1, len(probe.distances)))  # every order occurs
    seen = set(np.unique(drawn.distance[drawn.mask]) - (name == "copying"))
    assert {limit for limit in probe.distances[:-1]} <= seen
    assert {limit - 1 for limit in probe.distances[1:]} <= seen


@pytest.mark.parametrize("name", ["recall", "long-recall"])
def test_any_pair_may_be_asked_for_at_any_distance_whatever_was_asked_before(name):
    probe = PROBES[name]
    drawn = draw(probe, 5, 2000)
    start = (drawn.tokens < probe.keys).argmax(axis=1)  # the first key
    at = (np.nonzero(drawn.mask)[1] + 1).reshape(2000, -1)
    if name == "long-recall":
        after = at - start[:, None] - 2 * probe.pairs
        assert (np.searchsorted(probe.distances, after, side="right") - 1 == np.arange(at.shape[1])).all()
    keys = np.take_along_axis(drawn.tokens, start[:, None] + 2 * np.arange(probe.pairs), axis=1)
    asked = (np.take_along_axis(drawn.tokens, at - 1, axis=1)[:, :, None] == keys[:, None]).argmax(axis=2)
    share = 1 / probe.pairs
    for pairs in asked.T:
        assert np.abs(np.bincount(pairs, minlength=probe.pairs) / 2000 - share).max() < 4.5 * np.sqrt(share / 2000)
    again = (asked[:, 1:] == asked[:, :-1]).mean()
    assert abs(again - share) < 4.5 * np.sqrt(share / 2000)  # the pair just asked for is as likely as any other


def test_counts_are_uniform_at_every_length():
    # A string twice as long does not have counts twice as high: length says nothing.
    probe = PROBES["counting"]
    drawn = draw(probe, 6, 4000)
    for low, high in itertools.pairwise(probe.distances):
        rows, inputs = np.nonzero((drawn.distance >= low) & (drawn.distance < high))
        shares = np.bincount(drawn.tokens[rows, inputs + 1] - probe.answers.start) / 4000
        assert np.abs(shares - 0.1).max() < 4.5 * np.sqrt(0.1 / 4000)


def test_groups_are_groups_of_their_order_and_kind():
    orders = {group: len(elements(group)) for group in GENERATORS}
    assert orders == {"Z2": 2, "Z60": 60, "S3": 6, "A4xZ5": 60, "A5": 60, "S5": 120}
    commutative = set()
    for group, order in orders.items():
        table = products(group)
        assert (table[0] == np.arange(order)).all()
        assert (table[:, 0] == np.arange(order)).all()
        assert all(len(set(line)) == order for line in [*table, *table.T])
        assert (table[table] == table[:, table]).all()  # (a b) c == a (b c)
        commutative |= {group} if (table == table.T).all() else set()
    assert commutative == {"Z2", "Z60"}


def commutators(table, members):
    """The subgroup that the commutators a b a^-1 b^-1 of members generate."""
    inverse = (table == 0).argmax(axis=1)
    found = {int(table[table[a, b], table[inverse[a], inverse[b]]]) for a in members for b in members}
    while new := {int(table[a, b]) for a in found for b in found} - found:
        found |= new
    return found


def test_only_a5_and_s5_are_not_solvable():
    solvable = set()
    for group in GENERATORS:
        members = set(range(len(elements(group))))
        while (smaller := commutators(products(group), members)) != members:
            members = smaller
        solvable |= {group} if len(members) == 1 else set()
    assert solvable == {"Z2", "Z60", "S3", "A4xZ5"}


def test_the_product_applies_the_first_permutation_first():
    # 213 exchanges the first two points, 132 the last two: 1 -> 2 -> 3, 2 -> 1 -> 1, 3 -> 3 -> 2.
    words = StateTracking("S3").words
    assert words[products("S3")[words.index("132"), words.index("213")]] == "312"


def test_other_lengths_have_the_same_vocabulary():
    # So a model trained on one is scored on another.
    assert Copying(16, (64, 128)).words == Copying(16).words
    assert LongRecall(distances=(1, 1000)).words == LongRecall().words
    assert len(set(Recall(100, 200, 300).words)) == 500


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_few_rows(name, count):
    drawn = draw(PROBES[name], 0, count)
    assert drawn.tokens.shape == (count, PROBES[name].length)
    assert drawn.mask.any() == bool(count)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recall(pairs=33), "pairs=33"),
        (lambda: Recall(values=1), "values=1"),
        (lambda: Copying(distances=(4,)), "distances"),
        (lambda: Copying(distances=(4, 4)), "distances"),
        (lambda: Copying(distances=(0, 4)), "at least 1"),
        (lambda: Induction(distances=(1, 4)), "at least 2"),
        (lambda: Induction(symbols=5), "symbols=5: 6"),
        (lambda: Counting(distances=(8, 16)), "at least 9"),
        (lambda: StateTracking("Z3"), "choose one of"),
        (lambda: LongRecall(distances=(16, 17)), "differ by 2"),
    ],
)
def test_sizes_that_make_no_task_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
