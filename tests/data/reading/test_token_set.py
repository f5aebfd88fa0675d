import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmfree_jax.data.building import token_writer
from mmfree_jax.data.reading.token_set import TokenSet, TokenSetError
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from tests.data.made_up import passage

CARD = {"name": "test", "description": "Made up.", "sources": []}


def texts(count: int = 30) -> list[str]:
    rng = random.Random(0)
    return [passage(rng) for _ in range(count)]


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenSet:
    """A set with several shards."""
    monkeypatch.setattr(token_writer, "SHARD_TOKENS", 3000)
    splits = {"train": [*texts(), "", "naïve 数学 🙂"], "valid": texts(3)}
    return token_writer.write_token_set(tmp_path / "set", splits, byte_tokenizer(), CARD)


def test_what_was_written_is_read_across_shards(built: TokenSet) -> None:
    train = built.split("train")
    documents = [*texts(), "naïve 数学 🙂"]
    expected = np.concatenate([[*(np.array(list(text.encode())) + 1), 0] for text in documents])
    assert len(train.shards) > 3
    assert len(train) == len(expected)
    np.testing.assert_array_equal(train[:], expected)
    for start in range(0, len(train), 977):
        np.testing.assert_array_equal(train[start : start + 4000], expected[start : start + 4000])
    assert len(train[5:5]) == len(train[len(train) :]) == 0
    assert train[0:9].dtype == np.uint16


def test_documents_begin_where_the_index_says(built: TokenSet) -> None:
    train = built.split("train")
    starts = train.document_starts()
    assert train.documents == len(starts) == 31  # the empty document is left out
    ends = np.append(starts[1:], len(train)) - 1
    assert (train[:][ends] == built.end_of_document).all()
    assert built.tokenizer().decode(train[int(starts[30]) : int(ends[30])]) == "naïve 数学 🙂"


def test_bytes_per_token_counts_text_only(built: TokenSet) -> None:
    size = sum(len(text.encode()) for text in texts(3))
    assert built.text_bytes("valid") == size
    assert built.bytes_per_token("valid") == size / (size + 3)


def test_an_untouched_set_verifies_and_identical_content_has_one_fingerprint(built: TokenSet, tmp_path: Path) -> None:
    built.verify()
    splits = {"train": [*texts(), "naïve 数学 🙂"], "valid": texts(3)}
    again = token_writer.write_token_set(tmp_path / "again", splits, byte_tokenizer(), CARD | {"name": "other"})
    assert again.fingerprint == built.fingerprint
    other = token_writer.write_token_set(tmp_path / "other", splits | {"valid": texts(2)}, byte_tokenizer(), CARD)
    assert other.fingerprint != built.fingerprint
    assert built.card["splits"]["train"]["documents"] == 31
    assert "| train |" in (built.path / "data_card.md").read_text()


@pytest.mark.parametrize("file", ["train-00001.bin", "train-00000.docs", "valid-00000.bin"])
def test_a_truncated_or_missing_shard_is_named_on_opening(built: TokenSet, file: str) -> None:
    content = (built.path / file).read_bytes()
    (built.path / file).write_bytes(content[:-2])
    with pytest.raises(TokenSetError, match=f"{file} has {len(content) - 2} bytes instead of {len(content)}"):
        TokenSet.open(built.path)
    (built.path / file).unlink()
    with pytest.raises(TokenSetError, match=f"{file} is missing"):
        TokenSet.open(built.path)


@pytest.mark.parametrize("file", ["train-00001.bin", "train-00000.docs", "valid-00000.bin"])
def test_one_changed_bit_is_found_and_its_file_named(built: TokenSet, file: str) -> None:
    content = bytearray((built.path / file).read_bytes())
    content[len(content) // 2] ^= 1
    (built.path / file).write_bytes(content)
    with pytest.raises(TokenSetError, match=f"{file} is damaged"):
        TokenSet.open(built.path).verify()


def test_another_tokenizer_is_noticed(built: TokenSet) -> None:
    content = json.loads((built.path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (built.path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenSetError, match=r"tokenizer\.json is not the tokenizer"):
        TokenSet.open(built.path).verify()


def test_unreadable_indexes_are_named(built: TokenSet, tmp_path: Path) -> None:
    index = built.path / "index.json"
    content = json.loads(index.read_text())
    for changed, message in [
        (json.dumps(content | {"version": 99}), "format version 99, this program reads 1"),
        (json.dumps({"format": "something"}), "does not describe a token set"),
        (index.read_text()[:-20], r"index\.json is not JSON"),
        (index.read_text().replace('"vocab_size"', '"size"'), r"index\.json has no 'vocab_size'"),
    ]:
        index.write_text(changed)
        with pytest.raises(TokenSetError, match=message):
            TokenSet.open(built.path)
    with pytest.raises(FileNotFoundError, match="is not a token set"):
        TokenSet.open(tmp_path)


def test_a_failed_build_leaves_nothing_and_nothing_is_overwritten(built: TokenSet, tmp_path: Path) -> None:
    def broken():
        yield "one document"
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        token_writer.write_token_set(tmp_path / "new", {"train": broken()}, byte_tokenizer(), CARD)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(FileExistsError, match="exists already"):
        token_writer.write_token_set(built.path, {"train": texts()}, byte_tokenizer(), CARD)
    built.verify()


def test_a_set_can_be_moved(built: TokenSet, tmp_path: Path) -> None:
    shutil.move(built.path, tmp_path / "elsewhere")
    TokenSet.open(tmp_path / "elsewhere").verify()


def test_an_unknown_split_is_answered_with_those_there_are(built: TokenSet) -> None:
    with pytest.raises(KeyError, match="no split 'test', only train, valid"):
        built.split("test")
