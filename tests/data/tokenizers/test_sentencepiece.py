import itertools
import struct
from pathlib import Path

import numpy as np
import pytest

from mmfree_jax.data.tokenizers import tokenizer as tokenization
from mmfree_jax.data.tokenizers.sentencepiece import SPACE

WORDS = "the theory of the matrix and the other matrices is in the theorem there"


def number(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(place: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return number(place << 3 | 2) + number(len(value)) + value
    if isinstance(value, float):
        return number(place << 3 | 5) + struct.pack("<f", value)
    return number(place << 3) + number(value)


def made_up_pieces() -> list[tuple[str, float, int]]:
    """A small BPE vocabulary: special tokens, bytes, then merges of WORDS with falling scores, then characters."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)] + [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)]
    words = [[*(SPACE + word)] for word in WORDS.split()]
    merged: list[str] = []
    for _ in range(40):
        pairs = [a + b for word in words for a, b in itertools.pairwise(word)]
        if not pairs:
            break
        best = max(sorted(set(pairs)), key=pairs.count)
        merged.append(best)
        words = [merge(word, best) for word in words]
    characters = sorted(set(WORDS.replace(" ", SPACE)))
    return pieces + [(text, -float(i), 1) for i, text in enumerate(merged + characters)]


def merge(word: list[str], piece: str) -> list[str]:
    out: list[str] = []
    for part in word:
        if out and out[-1] + part == piece and len(out[-1]) < len(piece):
            out[-1] += part
        else:
            out.append(part)
    return out


def model_bytes(pieces: list[tuple[str, float, int]], kind: int = 2) -> bytes:
    data = b"".join(
        field(1, field(1, text.encode()) + field(2, score) + field(3, type_)) for text, score, type_ in pieces
    )
    return data + field(2, field(3, kind) + field(35, 1)) + field(3, field(3, 1))


def reference(text: str, pieces: list[tuple[str, float, int]]) -> list[str]:
    """What SentencePiece does: the best-scored neighbours first, leftmost among equals; unknown characters as bytes."""
    scores = {text: score for text, score, kind in pieces if kind == 1}
    parts = [*(SPACE + text).replace(" ", SPACE)]
    while True:
        found = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [p for part in parts for p in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])]


@pytest.fixture
def tokenizer(tmp_path: Path) -> tokenization.Tokenizer:
    (tmp_path / "small.model").write_bytes(model_bytes(made_up_pieces()))
    return tokenization.load(tmp_path / "small.model")


TEXTS = [WORDS, "the", "then there is", "naïve 数学\n", "a</s>b", " two  blanks ", "other\tthe", "x" * 50]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_those_of_the_algorithm_and_texts_survive(tokenizer: tokenization.Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert [tokenizer.backend.id_to_token(int(token)) for token in tokens] == reference(text, made_up_pieces())
    assert tokenizer.decode(tokens) == text


def test_special_tokens_and_numbers_are_those_of_the_file(tokenizer: tokenization.Tokenizer) -> None:
    assert tokenizer.vocab_size == len(made_up_pieces())
    assert tokenizer.end_of_document == 2
    assert tokenizer.end_of_document not in tokenizer.encode("a </s> b")


def test_long_texts_get_no_blanks_between_their_pieces(
    tokenizer: tokenization.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join([WORDS] * 30)
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenization, "PIECE", 100)
    assert len(tokenization.split_long(text)) > 5
    np.testing.assert_array_equal(tokenizer.encode(text), whole)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_saved_copy_is_the_same_tokenizer(tokenizer: tokenization.Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    assert tokenization.load(tmp_path).vocab_hash == tokenizer.vocab_hash


def test_unigram_models_are_read(tmp_path: Path) -> None:
    (tmp_path / "uni.model").write_bytes(model_bytes(made_up_pieces(), kind=1))
    tokenizer = tokenization.load(tmp_path / "uni.model")
    assert tokenizer.decode(tokenizer.encode("the theory")) == "the theory"


@pytest.mark.parametrize("content", [b"", b"not a model at all, but text", model_bytes(made_up_pieces())[:200]])
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
        tokenization.load(tmp_path / "bad.model")


def test_mistral_is_found_in_its_package_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "mistral_common" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mistral_common" / "__init__.py").write_text("")
    (folder / "tokenizer.model.v1").write_bytes(model_bytes(made_up_pieces()))
    assert tokenization.named("mistral").vocab_size == len(made_up_pieces())
    monkeypatch.setattr(tokenization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install mistral-common"):
        tokenization.named("mistral")
