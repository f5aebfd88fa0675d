"""Text in, text out: where a completion ends, what a stream tells and when, and which tokenizer is taken."""

import dataclasses
import functools
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from mmfree_jax.config import ConfigError
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from mmfree_jax.inference.completion import Detokeniser, Reader
from mmfree_jax.inference.engine import Part
from mmfree_jax.inference.packed import save_packed
from mmfree_jax.inference.text import TextModel, find_tokenizer, load_text_model
from tests.inference.small import made, served

TOKENIZER = train_bpe(["a stitch in time saves nine; 日本語 café, the quick brown fox\n" * 9], 300)


@functools.cache
def model() -> TextModel:
    return TextModel(served("matmul-free"), TOKENIZER, (TOKENIZER.end_of_document,))


def part(tokens) -> Part:
    return Part(list(tokens), [0.0] * len(tokens), [])


def read(text: str, stops: list[str], end: bool = False, by: int = 1) -> tuple[list[str], Reader]:
    """What is certain after each piece of a text's tokens, and at the end."""
    reader, told = model().reader(stops), []
    tokens = [*TOKENIZER.encode(text).tolist(), *([TOKENIZER.end_of_document] if end else [])]
    for first in range(0, len(tokens), by):
        enough = reader.take(part(tokens[first : first + by]))
        told.append(reader.certain())
        if enough:
            break
    reader.end(None)
    return [*told, reader.certain()], reader


def test_a_stream_tells_whole_characters_and_nothing_that_may_become_a_stop():
    told, reader = read("日本語 stitch", ["itcher"])
    assert all("\ufffd" not in text for text in told)
    assert all(later.startswith(earlier) for earlier, later in pairwise(told))
    assert told[-2] == "日本語 st"  # "itch" may begin the stop string
    assert told[-1] == reader.completion().text == "日本語 stitch"


@pytest.mark.parametrize("by", [1, 3, 50])
def test_the_first_stop_string_ends_a_completion_wherever_tokens_are_cut(by):
    _, reader = read("a stitch in time saves nine", ["saves", " in t"], by=by)
    assert reader.completion().text == "a stitch"
    assert reader.completion().finish == "stop"
    assert reader.completion().tokens == TOKENIZER.encode("a stitch in time").tolist()


@pytest.mark.parametrize("by", [1, 4, 50])
def test_the_end_of_the_document_ends_a_completion(by):
    reader = read("a stitch", [], end=True, by=by)[1]
    found = reader.completion()
    assert (found.text, found.finish) == ("a stitch", "end")
    assert found.tokens == TOKENIZER.encode("a stitch").tolist()
    assert len(found.logprobs) == len(found.tokens)


def byte_fallback() -> Tokenizer:
    """As SentencePiece's: a text's first blank is stripped, and characters that are no tokens are bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "▁café", "é"]
    backend = tokenizers.Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True))
    backend.add_special_tokens(["<s>", "</s>"])
    blanks, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse(), strip])
    return Tokenizer(backend, "with bytes to fall back on")


@pytest.mark.parametrize("make", [lambda: TOKENIZER, byte_tokenizer, byte_fallback])
def test_text_that_comes_token_by_token_is_that_of_all_tokens_at_once(make):
    tokenizer, rng = make(), np.random.default_rng(0)
    for count in (1, 2, 3, 5, 8, 40, 200):
        for _ in range(20):
            tokens = rng.integers(0, tokenizer.vocab_size, count).tolist()
            words, told = Detokeniser(tokenizer), [""]
            for token in tokens:
                words.add(token)
                told.append(words.text)
            assert all(later.startswith(earlier) for earlier, later in pairwise(told))
            assert words.text + words.rest() == tokenizer.decode(tokens)


def test_a_token_is_decoded_with_its_neighbours_only(monkeypatch):
    tokenizer, decoded = model().tokenizer, []
    whole = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: (decoded.append(len(tokens)), whole(tokens))[1])
    tokens = TOKENIZER.encode("the quick 日本語 fox " * 40).tolist()
    words = Detokeniser(tokenizer)
    for token in tokens:
        words.add(token)
    assert max(decoded) < 20
    assert len(tokens) > 200


def test_a_stream_gives_the_text_of_generate():
    how = {"max_tokens": 30, "temperature": 0.8, "seed": 3}
    pieces = list(model().stream("a stitch", **how))
    (whole,) = model().generate("a stitch", **how)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1
    assert len(whole.tokens) == 30
    assert whole.finish == "length"


def test_prompts_are_one_text_or_several_or_token_numbers():
    text, tokens = "a stitch", TOKENIZER.encode("a stitch").tolist()
    one = model().generate(text, max_tokens=4, temperature=0)
    assert (
        one
        == model().generate([text], max_tokens=4, temperature=0)
        == model().generate(tokens, max_tokens=4, temperature=0)
    )
    assert model().generate([text, tokens], max_tokens=4, temperature=0) == one * 2
    assert model().generate([], max_tokens=4) == []


def test_more_prompts_than_slots_have_the_same_completions(monkeypatch):
    prompts = ["a", "stitch", "in time"]
    expected = model().generate(prompts, max_tokens=5, seed=7)
    monkeypatch.setattr("mmfree_jax.inference.text.MOST_SLOTS", 2)
    found = model().generate(prompts, max_tokens=5, seed=7)
    assert [row.tokens for row in found] == [row.tokens for row in expected]


def test_without_a_tokenizer_prompts_are_token_numbers():
    bare = dataclasses.replace(model(), tokenizer=None, ends=())
    (found,) = bare.generate([1, 2, 3], max_tokens=3, temperature=0)
    assert len(found.tokens) == 3
    assert found.text == ""
    for wrong in (lambda: bare.generate("text"), lambda: bare.generate([1], stop="x"), lambda: next(bare.stream("x"))):
        with pytest.raises(ConfigError, match="tokenizer"):
            wrong()


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(ConfigError, match="max_tokens"):
        model().generate("a", max_tokens=0)
    with pytest.raises(TypeError, match="heat"):
        model().generate("a", heat=1)


def test_a_packed_folder_brings_its_tokenizer(tmp_path):
    text = TOKENIZER.backend.to_str()
    save_packed(made("matmul-free"), tmp_path / "packed", stored="float32", tokenizer_json=text, end=0)
    found = load_text_model(tmp_path / "packed")
    assert found.tokenizer.vocab_hash == TOKENIZER.vocab_hash
    assert found.ends == (TOKENIZER.end_of_document,)
    assert found.generate("a stitch", max_tokens=5, temperature=0) == model().generate(
        "a stitch", max_tokens=5, temperature=0
    )
    np.testing.assert_allclose(found([[1, 2]]), model()([[1, 2]]), atol=1e-6)
    assert find_tokenizer(tmp_path) is None
