import itertools
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from experiments.data_throughput import measure
from mmfree_jax.data.building import token_writer
from mmfree_jax.data.reading.pipeline import batches, evaluation_windows
from mmfree_jax.data.reading.prefetch import Prefetched
from mmfree_jax.data.reading.token_set import Mixture, TokenSet
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from tests.data.made_up import passage, run_python

SEQUENCE, BATCH = 16, 8


def make_set(path: Path, seed: int, documents: int = 40, tokenizer: Tokenizer | None = None) -> TokenSet:
    rng = random.Random(seed)
    texts = [passage(rng, 2) for _ in range(documents)]
    card = {"name": "test", "description": "Made up.", "sources": []}
    splits = {"train": texts, "valid": texts[:5]}
    return token_writer.write_token_set(path, splits, tokenizer or byte_tokenizer(), card)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    folder = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_writer, "SHARD_TOKENS", 1500)
        return make_set(folder / "one", 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    return make_set(tmp_path_factory.mktemp("sets") / "two", 1, 15)


def take(count: int, *sets: TokenSet, **options: object) -> np.ndarray:
    settings = {"sequence": SEQUENCE, "batch": BATCH, "seed": 5} | options
    weights = settings.pop("weights", [1] * len(sets))
    with batches(Mixture(sets, weights), **settings) as source:  # type: ignore[arg-type]
        return np.stack(list(itertools.islice(source, count)))


def window_numbers(rows: np.ndarray, split: np.ndarray) -> list[int]:
    """Which window each row is, found by looking for it in the tokens."""
    count = (len(split) - 1) // SEQUENCE
    table = {split[i * SEQUENCE : (i + 1) * SEQUENCE + 1].tobytes(): i for i in range(count)}
    assert len(table) == count
    return [table[row.astype(split.dtype).tobytes()] for row in rows]


def test_an_epoch_has_every_window_once_and_the_next_another_order(tokens: TokenSet) -> None:
    split = tokens.split("train")[:]
    count = (len(split) - 1) // SEQUENCE
    rows = take(2 * count // BATCH + 1, tokens).reshape(-1, SEQUENCE + 1)
    assert rows.dtype == np.int32
    first, second = (window_numbers(rows[e * count : (e + 1) * count], split) for e in range(2))
    assert sorted(first) == sorted(second) == list(range(count))
    assert np.mean(np.array(first) == np.array(second)) < 0.05
    assert np.mean(np.diff(first) == 1) < 0.05
    targets = np.concatenate([rows[i, 1:] for i in np.argsort(first)])
    np.testing.assert_array_equal(targets, split[1 : count * SEQUENCE + 1])


def test_seeds_give_different_orders_and_one_seed_the_same(tokens: TokenSet) -> None:
    np.testing.assert_array_equal(take(5, tokens), take(5, tokens))
    assert not np.array_equal(take(5, tokens), take(5, tokens, seed=6))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_hosts_gives_the_same_batches_and_goes_on_from_the_same_integer(
    tokens: TokenSet, other: TokenSet, hosts: int, mixed: bool
) -> None:
    sets = (tokens, other) if mixed else (tokens,)
    whole = take(12, *sets)
    shares = [range(h * BATCH // hosts, (h + 1) * BATCH // hosts) for h in range(hosts)]
    before = [take(5, *sets, rows=rows) for rows in shares]
    np.testing.assert_array_equal(np.concatenate(before, axis=1), whole[:5])
    with batches(Mixture(sets, [1] * len(sets)), sequence=SEQUENCE, batch=BATCH, seed=5, rows=shares[-1]) as source:
        for _ in range(5):
            next(source)
        state = source.state
    assert state == 5 * BATCH
    after = [take(7, *sets, rows=rows, start=state) for rows in shares]
    np.testing.assert_array_equal(np.concatenate(after, axis=1), whole[5:])


def test_the_state_survives_a_change_of_batch_size(tokens: TokenSet) -> None:
    whole = take(6, tokens).reshape(-1, SEQUENCE + 1)
    np.testing.assert_array_equal(take(4, tokens, batch=4, start=32).reshape(-1, SEQUENCE + 1), whole[32:48])


def test_batches_are_the_same_in_another_process(tokens: TokenSet) -> None:
    code = """if True:
        import sys
        from mmfree_jax.data.reading.pipeline import batches
        from mmfree_jax.data.reading.token_set import TokenSet
        with batches(TokenSet.open(sys.argv[1]), sequence=16, batch=8, seed=5, start=40) as source:
            print(next(source).tolist())
    """
    output = run_python(code, str(tokens.path), PYTHONHASHSEED="9").stdout
    assert output == f"{take(1, tokens, start=40)[0].tolist()}\n"


@pytest.mark.parametrize(("weights", "shares"), [((0.75, 0.25), (3, 1)), ((1, 2), (1, 2)), ((0.1, 0.9), (1, 9))])
def test_mixtures_are_exact_in_every_block(
    tokens: TokenSet, other: TokenSet, weights: tuple[float, float], shares: tuple[int, int]
) -> None:
    block = sum(shares)
    split = tokens.split("train")[:]
    known = {split[i * SEQUENCE : (i + 1) * SEQUENCE + 1].tobytes() for i in range(len(split) // SEQUENCE)}
    rows = take(60 * block // BATCH, tokens, other, weights=weights).reshape(-1, SEQUENCE + 1)
    mine = np.array([row.astype(np.uint16).tobytes() in known for row in rows])
    counts = mine[: len(mine) // block * block].reshape(-1, block).sum(axis=1)
    assert set(counts) == {shares[0]}


def test_every_window_of_a_mixture_comes_once_before_any_comes_twice(tokens: TokenSet, other: TokenSet) -> None:
    count = (len(other.split("train")) - 1) // SEQUENCE
    rows = take(count * 3 // BATCH, tokens, other, weights=(0.5, 0.5)).reshape(-1, SEQUENCE + 1)
    split = other.split("train")[:]
    table = {split[i * SEQUENCE : (i + 1) * SEQUENCE + 1].tobytes() for i in range(count)}
    seen = [key for row in rows if (key := row.astype(np.uint16).tobytes()) in table]
    assert len(seen) >= count
    assert len(set(seen[:count])) == count


def test_a_mixture_is_told_from_its_parts_and_held_out_text_is_the_firsts(tokens: TokenSet, other: TokenSet) -> None:
    mixed = Mixture([tokens, other], [3, 1])
    unlike = Mixture([tokens, other], [1, 1]), Mixture([other, tokens], [3, 1]), tokens, other
    assert len({one.fingerprint for one in (mixed, *unlike)}) == 5
    np.testing.assert_array_equal(mixed.split("valid")[:], tokens.split("valid")[:])


def test_impossible_requests_say_what_to_change(tokens: TokenSet, other: TokenSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be some of the 6"):
        take(1, tokens, batch=6, rows=[5, 6])
    with pytest.raises(ValueError, match="use a shorter sequence or more text"):
        take(1, tokens, sequence=10_000_000)
    with pytest.raises(ValueError, match="must be positive"):
        take(1, tokens, other, weights=[1.0, 0.0])
    foreign = make_set(tmp_path / "foreign", 3, tokenizer=train_bpe([passage(random.Random(0), 200)], 300))
    with pytest.raises(ValueError, match="have different vocabularies and cannot be mixed"):
        take(1, tokens, foreign)


@pytest.mark.parametrize(("sequence", "batch"), [(16, 8), (7, 3), (100_000, 2), (1, 64)])
def test_evaluation_predicts_every_token_but_the_first_once(tokens: TokenSet, sequence: int, batch: int) -> None:
    split = tokens.split("valid")[:].astype(np.int64)
    inputs, targets, count = [], [], 0
    for rows, mask in evaluation_windows(tokens.split("valid"), sequence, batch):
        assert (rows.shape, mask.shape) == ((batch, sequence + 1), (batch, sequence))
        assert (rows.dtype, mask.dtype) == (np.int32, np.bool_)
        inputs.append(rows[:, :-1][mask])
        targets.append(rows[:, 1:][mask])
        count += 1
    np.testing.assert_array_equal(np.concatenate(targets), split[1:])
    np.testing.assert_array_equal(np.concatenate(inputs), split[:-1])
    assert count == -(-(len(split) - 1) // (sequence * batch))


def test_prefetching_works_ahead_but_not_further_than_asked() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    source = Prefetched(numbers(), 3)
    deadline = time.monotonic() + 60
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4  # three waiting, one in hand
    assert list(source) == list(range(100))
    source.close()


def test_prefetching_passes_errors_on_and_ends_its_thread() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    source = Prefetched(broken(), 2)
    assert next(source) == 1
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(source)
    endless = Prefetched(itertools.count(), 2)
    next(endless)
    endless.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "data-prefetch" and thread.is_alive()]


def test_batches_are_taken_to_the_device_ahead_of_use(tokens: TokenSet) -> None:
    placed: list[int] = []

    def put(rows: np.ndarray) -> list[list[int]]:
        placed.append(len(rows))
        return rows.tolist()

    with batches(tokens, sequence=SEQUENCE, batch=BATCH, seed=5, prefetch=3, put=put) as source:
        assert next(source) == take(1, tokens)[0].tolist()
        deadline = time.monotonic() + 60
        while len(placed) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert placed[:5] == [BATCH] * 5  # one used, three waiting, one in hand


def test_batches_come_faster_than_any_trainer_takes_them(tmp_path: Path) -> None:
    sets = [make_set(tmp_path / str(i), i, 3000) for i in range(2)]
    # The best of three: the machine may be doing something else. About 10 M tokens/s when it is not.
    rate, _, grown = max(measure(Mixture(sets, [1, 1]), 512, 32, 0.5) for _ in range(3))
    assert rate > 1e6
    assert grown < 50
