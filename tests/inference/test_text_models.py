"""Text in, text out: where a completion ends, what a stream tells and when, and which tokenizer is taken."""

import dataclasses
import functools
from itertools import pairwise

import numpy as np
import pytest

from mmfree_jax.config import ConfigError
from mmfree_jax.data.tokenizers.tokenizer import train_bpe
from mmfree_jax.inference.packed import save_packed
from mmfree_jax.inference.text import TextModel, _Reader, find_tokenizer, load_text_model
from tests.inference.small import made, served

TOKENIZER = train_bpe(["a stitch in time saves nine; 日本語 café, the quick brown fox\n" * 9], 300)


@functools.cache
def model() -> TextModel:
    return TextModel(served("matmul-free"), TOKENIZER, TOKENIZER.end_of_document)


def read(text: str, stops: list[str], end: bool = False, by: int = 1) -> tuple[list[str], _Reader]:
    """What is certain after each piece of a text's tokens."""
    reader, told = _Reader(model(), stops), []
    tokens = np.array([*TOKENIZER.encode(text).tolist(), *([TOKENIZER.end_of_document] if end else [])])
    for first in range(0, len(tokens), by):
        part = tokens[first : first + by]
        reader.read(part, np.zeros(len(part)))
        told.append(reader.certain())
    return told, reader


def test_a_stream_tells_whole_characters_and_nothing_that_may_become_a_stop():
    told, reader = read("日本語 stitch", ["itcher"])
    assert all("\ufffd" not in text for text in told)
    assert all(later.startswith(earlier) for earlier, later in pairwise(told))
    assert told[-1] == "日本語 st"  # "itch" may begin the stop string
    assert reader.text == "日本語 stitch"


@pytest.mark.parametrize("by", [1, 3, 50])
def test_the_first_stop_string_ends_a_completion_wherever_tokens_are_cut(by):
    _, reader = read("a stitch in time saves nine", ["saves", " in t"], by=by)
    assert reader.completion().text == "a stitch"
    assert reader.completion().finish == "stop"


@pytest.mark.parametrize("by", [1, 4, 50])
def test_the_end_of_the_document_ends_a_completion(by):
    reader = read("a stitch", [], end=True, by=by)[1]
    reader.read(np.array([5, 6]), np.zeros(2))
    found = reader.completion()
    assert (found.text, found.finish) == ("a stitch", "end")
    assert found.tokens == TOKENIZER.encode("a stitch").tolist()
    assert len(found.logprobs) == len(found.tokens)


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


def test_more_prompts_than_a_batch_holds_have_the_same_completions(monkeypatch):
    prompts = ["a", "stitch", "in time"]
    expected = model().generate(prompts, max_tokens=5, seed=7)
    monkeypatch.setattr("mmfree_jax.inference.text.MOST_ROWS", 2)
    assert model().generate(prompts, max_tokens=5, seed=7) == expected


def test_without_a_tokenizer_prompts_are_token_numbers():
    bare = dataclasses.replace(model(), tokenizer=None, end=None)
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
    assert found.end == TOKENIZER.end_of_document
    assert found.generate("a stitch", max_tokens=5, temperature=0) == model().generate(
        "a stitch", max_tokens=5, temperature=0
    )
    np.testing.assert_allclose(found([[1, 2]]), model()([[1, 2]]), atol=1e-6)
    assert find_tokenizer(tmp_path) is None
