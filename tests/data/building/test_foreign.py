import random
import struct
from pathlib import Path

import numpy as np
import pytest

from mmfree_jax.data.building import foreign
from mmfree_jax.data.building.foreign import convert
from mmfree_jax.data.cli import main
from mmfree_jax.data.reading.token_set import TokenSet
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from tests.data.made_up import passage


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    return train_bpe([passage(rng) for _ in range(200)], 400)


def made_up_texts() -> list[str]:
    rng = random.Random(1)
    return [passage(rng, rng.randint(1, 9)) + " naïve 数学" for _ in range(50)]


def tokens_of(tokenizer: Tokenizer) -> list[np.ndarray]:
    return [np.append(tokenizer.encode(text), 0) for text in made_up_texts()]


def check(token_set: TokenSet, tokenizer: Tokenizer) -> None:
    token_set.verify()
    expected = tokens_of(tokenizer)
    train = token_set.split("train")
    np.testing.assert_array_equal(train[:], np.concatenate(expected))
    np.testing.assert_array_equal(train.document_starts(), np.cumsum([0] + [len(one) for one in expected[:-1]]))
    assert token_set.text_bytes("train") == sum(len(text.encode()) for text in made_up_texts())


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_nanogpt_files_are_divided_into_their_documents(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(foreign, "SHARD_TOKENS", 2000)
    np.concatenate(tokens_of(tokenizer))[:-1].astype(dtype).tofile(
        tmp_path / "train.bin"
    )  # the last end may be missing
    token_set = convert({"train": tmp_path / "train.bin"}, tokenizer, tmp_path / "set", dtype)
    assert len(token_set.split("train").shards) > 2
    check(token_set, tokenizer)


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_llmc_files_are_recognised_by_their_header(
    tokenizer: Tokenizer, tmp_path: Path, magic: int, version: int, dtype: str
) -> None:
    """Of GPT-2's tokens and of Llama 3's: `dev/data/data_common.py` there."""
    tokens = np.concatenate(tokens_of(tokenizer))
    head = np.zeros(256, "<i4")
    head[:3] = magic, version, len(tokens)
    (tmp_path / "train.bin").write_bytes(head.tobytes() + tokens.astype(dtype).tobytes())
    check(convert({"train": tmp_path / "train.bin"}, tokenizer, tmp_path / "set"), tokenizer)
    for lost in (1, 2, 10**9):  # in a token, at its end (of two bytes), all
        (tmp_path / "train.bin").write_bytes(head.tobytes() + tokens.astype(dtype).tobytes()[:-lost])
        with pytest.raises(ValueError, match=r"train\.bin is cut off"):
            convert({"train": tmp_path / "train.bin"}, tokenizer, tmp_path / "other")


@pytest.mark.parametrize("dtype", ["<u4", "<i4"])
def test_numbers_of_32_bits_are_not_read_as_16(tokenizer: Tokenizer, tmp_path: Path, dtype: str) -> None:
    np.concatenate(tokens_of(tokenizer)).astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin looks like numbers of 32 bits.*--dtype uint32"):
        convert({"train": tmp_path / "train.bin"}, tokenizer, tmp_path / "set")
    check(convert({"train": tmp_path / "train.bin"}, tokenizer, tmp_path / "set", dtype), tokenizer)


def test_16_bits_do_not_hold_a_large_vocabulary(tmp_path: Path) -> None:
    numbers = np.array([1, 70_000, 2, 69_999] * 9, "<u4")
    for stored, why in ((numbers, "looks like numbers of 32 bits"), (np.arange(36), "cannot hold a vocabulary of 128")):
        stored.astype("<u4" if stored is numbers else "<u2").tofile(tmp_path / "train.bin")
        with pytest.raises(ValueError, match=rf"train\.bin .*{why}.*--dtype uint32"):
            foreign._check_width(tmp_path / "train.bin", np.fromfile(tmp_path / "train.bin", "<u2"), 128_000)


def write_megatron(path: Path, documents: list[list[np.ndarray]]) -> None:
    """An indexed data set; every document is a list of sequences."""
    sequences = [sequence.astype("<u2") for document in documents for sequence in document]
    sizes = np.array([len(one) for one in sequences], "<i4")
    pointers = np.concatenate([[0], np.cumsum(2 * sizes[:-1].astype("<i8"))]).astype("<i8")
    bounds = np.cumsum([0] + [len(document) for document in documents]).astype("<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(bounds))
    path.with_suffix(".idx").write_bytes(head + sizes.tobytes() + pointers.tobytes() + bounds.tobytes())
    path.write_bytes(b"".join(one.tobytes() for one in sequences))


@pytest.mark.parametrize("with_end", [True, False])
def test_megatron_files_keep_their_documents(tokenizer: Tokenizer, tmp_path: Path, with_end: bool) -> None:
    documents = [one if with_end else one[:-1] for one in tokens_of(tokenizer)]
    write_megatron(tmp_path / "train.bin", [[one[:5], one[5:]] for one in documents])
    check(convert({"train": tmp_path / "train.bin"}, tokenizer, tmp_path / "set"), tokenizer)
    whole = (tmp_path / "train.bin").read_bytes()
    for data, state in ((whole[:-10], "cut off"), (whole + whole, "not of its index")):
        (tmp_path / "train.bin").write_bytes(data)
        with pytest.raises(ValueError, match=rf"train\.bin is {state}"):
            convert({"train": tmp_path / "train.bin"}, tokenizer, tmp_path / "other")


def test_wrong_types_and_tokenizers_are_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    np.array([5, 70, 399, 0], "<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="outside the vocabulary of 257"):
        convert({"train": tmp_path / "train.bin"}, byte_tokenizer(), tmp_path / "set")
    with pytest.raises(ValueError, match="outside the vocabulary of 400"):
        convert({"train": tmp_path / "train.bin"}, tokenizer, tmp_path / "set", "<u4")
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match="not of type <u2"):
        convert({"train": tmp_path / "train.bin"}, tokenizer, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for text in made_up_texts():
        assert b"".join(map(tokenizer.bytes_of, tokenizer.encode(text).tolist())) == text.encode()
    np.concatenate(tokens_of(tokenizer)).astype("<u2").tofile(tmp_path / "train.bin")
    made = convert({"train": tmp_path / "train.bin"}, tokenizer, tmp_path / "set")
    assert made.text_bytes("train") == sum(len(text.encode()) for text in made_up_texts())


def test_the_command_converts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    np.concatenate(tokens_of(tokenizer)).astype("<u2").tofile(tmp_path / "train.bin")
    command = ["convert", str(tmp_path / "train.bin"), "--valid", str(tmp_path / "train.bin")]
    assert main([*command, "--tokenizer", str(tmp_path), "--out", str(tmp_path / "set")]) == 0
    check(TokenSet.open(tmp_path / "set"), tokenizer)
