import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from mmfree_jax.data.tokenizers import tokenizer as tokenization
from mmfree_jax.data.tokenizers import word_cache
from tests.data.made_up import passage, run_python

HARD = ["", " ", "naïve 数学 🙂\u200d🙂", "tabs\tand\r\nends", "x" * 3000, "12345", "<|endoftext|>", "\x00\x1f\x7f"]


@pytest.fixture(scope="module")
def bpe() -> tokenization.Tokenizer:
    rng = random.Random(0)
    return tokenization.train_bpe([passage(rng) for _ in range(300)], 400)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_every_text_survives_the_round_trip(kind: str, bpe: tokenization.Tokenizer) -> None:
    tokenizer = bpe if kind == "bpe" else tokenization.byte_tokenizer()
    for text in HARD:
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.uint16
        assert tokenizer.decode(tokens) == text
        assert tokenizer.end_of_document not in tokens


def test_bytes_are_tokens_of_the_byte_tokenizer() -> None:
    text = "aé🙂\n"
    np.testing.assert_array_equal(tokenization.byte_tokenizer().encode(text), np.array(list(text.encode())) + 1)
    assert tokenization.byte_tokenizer().vocab_size == 257
    assert tokenization.byte_tokenizer().vocab_hash == tokenization.BYTES_HASH
    for hard in HARD:
        assert tokenization.byte_tokenizer().backend.encode(hard).ids == [byte + 1 for byte in hard.encode()]


def test_digits_are_tokens_of_their_own(bpe: tokenization.Tokenizer) -> None:
    assert len(bpe.encode("2026")) == 4


def test_long_texts_give_the_same_tokens_in_pieces(
    bpe: tokenization.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    text = "\n\n  ".join(passage(rng) for _ in range(200))
    whole = np.array(bpe.backend.encode(text).ids)
    monkeypatch.setattr(tokenization, "PIECE", 1000)
    monkeypatch.setattr(tokenization, "BATCH", 5000)
    assert len(tokenization.split_long(text)) > 50
    np.testing.assert_array_equal(bpe.encode(text), whole)
    several = list(bpe.encode_stream([text, "", "short", text]))
    assert [len(tokens) for tokens in several] == [len(whole), 0, len(bpe.encode("short")), len(whole)]
    assert "".join(tokenization.split_long("y" * 3_000_000)) == "y" * 3_000_000


def test_a_saved_tokenizer_is_the_same_and_its_hash_ignores_layout(bpe: tokenization.Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    again = tokenization.load(tmp_path)
    assert again.vocab_hash == bpe.vocab_hash
    np.testing.assert_array_equal(again.encode("the matrix 42"), bpe.encode("the matrix 42"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert tokenization.vocabulary_hash(json.dumps(content)) == bpe.vocab_hash
    content["model"]["merges"].pop()
    assert tokenization.vocabulary_hash(json.dumps(content)) != bpe.vocab_hash
    assert tokenization.byte_tokenizer().vocab_hash != bpe.vocab_hash


def test_training_gives_the_same_file_in_every_process() -> None:
    code = """if True:
        import hashlib, made_up, random
        from mmfree_jax.data.tokenizers.tokenizer import train_bpe
        rng = random.Random(3)
        tokenizer = train_bpe([made_up.passage(rng) for _ in range(500)], 500)
        print(hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest())
    """
    settings = [("1", "true", "2"), ("2", "false", "1"), ("3", "true", "4")]
    outputs = {
        run_python(code, PYTHONHASHSEED=seed, TOKENIZERS_PARALLELISM=parallel, RAYON_NUM_THREADS=threads).stdout
        for seed, parallel, threads in settings
    }
    assert len(outputs) == 1


def test_impossible_vocabularies_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 257"):
        tokenization.train_bpe(["text"], 100)
    with pytest.raises(ValueError, match="too small for vocab_size 5000"):
        tokenization.train_bpe(["a little text"], 5000)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        tokenization.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        tokenization.load(tmp_path)


def test_remembered_words_give_the_tokens_of_the_library(bpe: tokenization.Tokenizer) -> None:
    rng = random.Random(0)
    alphabets = [
        "the of matrix's don't we'll I'D 12 \t\n",
        "ab \n\n  09'sé×÷ß",
        "a1 \u00b2\u00bd\u2167\u00aa\u00b5\u00a0\u2003\u0085\x1c\x1f\u00ad\u200b\u0301",
        "".join(chr(c) for c in range(0x250)) + "\u2019\u201c\u2026\u2028\u20ac\u2122",
        "数学 naïve 🙂\u200d🙂\n\r\n.,;!?()[]{}<>_-+=*/\\\"'`~@#$%^&|",
    ]
    for alphabet in alphabets:
        for length in (1, 3, 10, 60, 400):
            for _ in range(120):
                text = "".join(rng.choices(alphabet, k=length))
                assert bpe.encode(text).tolist() == bpe.backend.encode(text).ids, repr(text)


def test_the_classes_of_characters_are_those_of_unicode() -> None:
    for code in range(0x3000):
        char = chr(code)
        if word_cache._STRANGE.match(char) is None and char not in " \t\n\r0123456789":
            is_letter = unicodedata.category(char).startswith("L")
            assert is_letter == bool(re.match(f"[{word_cache._LETTERS}]", char)), hex(code)
            assert unicodedata.category(char)[0] in "LPSCM"
            assert not char.isspace()
            assert not char.isnumeric()


def test_other_tokenizers_are_left_to_the_library() -> None:
    assert tokenization.train_bpe(["some text"] * 9, 258)._cache is not None
    plain = tokenization.train_bpe(["some text"] * 9, 258).backend
    plain.pre_tokenizer = tokenization.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenization.Tokenizer(plain, "GPT-2's rules")._cache is None
