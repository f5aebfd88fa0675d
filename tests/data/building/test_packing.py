import random
from pathlib import Path

import numpy as np
import pytest

from mmfree_jax.data.building import token_writer
from mmfree_jax.data.building.packing import best_fit, pack
from mmfree_jax.data.reading.documents import document_ids, is_target
from mmfree_jax.data.reading.pipeline import batches
from mmfree_jax.data.reading.token_set import TokenSet
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from tests.data.made_up import passage

SEQUENCE = 256


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    rng = random.Random(0)
    texts = [passage(rng, 20)[: rng.randint(1, 600)] for _ in range(300)]
    card = {"name": "test", "description": "Made up.", "sources": []}
    folder = tmp_path_factory.mktemp("packing") / "loose"
    return token_writer.write_token_set(folder, {"train": texts, "valid": texts[:9]}, byte_tokenizer(), card)


def documents(tokens: np.ndarray, end: int) -> list[bytes]:
    pieces = np.split(tokens, np.flatnonzero(tokens == end) + 1)
    return [piece.tobytes() for piece in pieces if len(piece) > 1]


def test_every_row_is_within_capacity_and_every_item_once() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 101, 2000)
    rows = best_fit(lengths, 100)
    assert sorted(item for row in rows for item in row) == list(range(2000))
    assert max(lengths[row].sum() for row in rows) <= 100
    assert len(rows) <= 1.02 * np.ceil(lengths.sum() / 100)  # best fit decreasing is nearly perfect on such lengths


def test_documents_that_fit_a_row_are_whole_in_one_row(loose: TokenSet, tmp_path: Path) -> None:
    packed = pack(loose, tmp_path / "packed", SEQUENCE)
    packed.verify()
    rows = packed.split("train")[:-1].reshape(-1, SEQUENCE)
    fitting = [d for d in documents(loose.split("train")[:], 0) if len(d) <= 2 * SEQUENCE]
    found = [d for row in rows for d in documents(row, 0)]
    assert len(fitting) > 50
    for document in set(fitting):
        assert found.count(document) >= fitting.count(document)
    padding = packed.split("train")[:].size - len(loose.split("train"))
    assert 0 <= padding < 0.03 * rows.size


def test_long_documents_lose_nothing_and_held_out_text_is_untouched(loose: TokenSet, tmp_path: Path) -> None:
    packed = pack(loose, tmp_path / "packed", SEQUENCE)
    count = lambda some: np.bincount(some.split("train")[:], minlength=257)[1:]
    np.testing.assert_array_equal(count(packed), count(loose))
    np.testing.assert_array_equal(packed.split("valid")[:], loose.split("valid")[:])
    assert packed.text_bytes("train") == loose.text_bytes("train")
    assert packed.fingerprint != loose.fingerprint


def test_windows_of_a_packed_set_are_its_rows(loose: TokenSet, tmp_path: Path) -> None:
    packed = pack(loose, tmp_path / "packed", SEQUENCE)
    rows = sorted(row.tobytes() for row in packed.split("train")[:-1].reshape(-1, SEQUENCE).astype(np.int32))
    with batches(packed, sequence=SEQUENCE, batch=len(rows), seed=0) as source:
        assert sorted(row[:-1].tobytes() for row in next(source)) == rows


def test_documents_begin_with_the_end_before_them_and_only_padding_is_no_target() -> None:
    windows = np.array([[5, 6, 0, 7, 0, 0, 0, 8, 9, 1], [0, 1, 2, 0, 0, 0, 3, 0, 0, 4]])
    expected = [[0, 0, 1, 1, 2, 3, 4, 4, 4], [1, 1, 1, 2, 3, 4, 4, 5, 6]]
    assert document_ids(windows[:, :-1], 0).tolist() == expected
    assert is_target(windows, 0).astype(int).tolist() == [[1, 1, 1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 0, 1]]


def test_packing_twice_is_refused(loose: TokenSet, tmp_path: Path) -> None:
    packed = pack(loose, tmp_path / "packed", SEQUENCE)
    with pytest.raises(ValueError, match="packed already, for 256 tokens"):
        pack(packed, tmp_path / "again", SEQUENCE)
    with pytest.raises(ValueError, match="rows of 0 tokens hold no document"):
        pack(loose, tmp_path / "again", 0)
