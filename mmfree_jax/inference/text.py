"""A model with its tokenizer: text in, text out."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfree_jax.config import ModelConfig, require
from mmfree_jax.data.reading.token_set import TOKENIZER
from mmfree_jax.data.tokenizers import tokenizer as tokenization
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer
from mmfree_jax.inference.generate import generate_tokens
from mmfree_jax.inference.model import ServedModel, load_packed, serve_model
from mmfree_jax.inference.packed import is_packed
from mmfree_jax.inference.sampling import Sampling
from mmfree_jax.run_folder import corpus_facts, known_corpora
from mmfree_jax.weights import load_model

UNFINISHED = "\ufffd"  # what a decoder gives for bytes that begin a character
MOST_ROWS = 64  # of a batch; more prompts are more batches

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    text: without the end of the document or the stop string (empty without a tokenizer). tokens, logprobs: what was
    chosen, and the log-probability of each under the model, before temperature and filters. finish: "end" (the model
    ended the document), "stop" (a stop string), or "length" (max_tokens).
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish: str


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model that generates; calling it with tokens, int32 [B, T], gives logits [B, T, V].

    tokenizer: None where the model's folder does not say which; then prompts are token numbers.
    end: the token that ends a document, where it is known.
    """

    served: ServedModel
    tokenizer: Tokenizer | None = None
    end: int | None = None

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.served.config

    def __call__(self, tokens_BT: Any) -> jax.Array:
        """Compute logits of the next token at every position, [B, T, V], in at least float32."""
        tokens_BT = np.asarray(tokens_BT, np.int32)
        return _logits(self.served, tokens_BT)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 128,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> list[Completion]:
        """Complete one prompt or several, text or token numbers, in batches.

        sampling: the fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty, seed. The prompt
        number n of a call has the seed `seed + n`, whatever batch it is in. stop: strings at which a completion ends.
        Raises ConfigError for settings that mean nothing, an empty prompt, and text where no tokenizer is known.
        """
        settings, stops = Sampling(**sampling), [stop] if isinstance(stop, str) else list(stop)
        require(max_tokens >= 1, f"max_tokens={max_tokens}: must be at least 1")
        require(not stops or self.tokenizer is not None, "stop strings need a tokenizer")
        rows = [self.encode(prompt) for prompt in _listed(prompts)]
        seeds = [dataclasses.replace(settings, seed=(settings.seed + n) % 2**32) for n in range(len(rows))]
        found: list[Completion] = []
        for first in range(0, len(rows), MOST_ROWS):
            part = slice(first, first + MOST_ROWS)
            found += self._complete(rows[part], seeds[part], max_tokens, stops)
        return found

    def stream(
        self, prompt: Prompt, *, max_tokens: int = 128, stop: Sequence[str] = (), **sampling: Any
    ) -> Iterator[str]:
        """Yield the text that follows a prompt, piece by piece, each of whole characters. Raises as `generate`."""
        require(self.tokenizer is not None, "text needs a tokenizer")
        reader, told = _Reader(self, list(stop)), 0
        for step in generate_tokens(self.served, [self.encode(prompt)], max_tokens, Sampling(**sampling), chunk=8):
            reader.read(step.tokens[0], step.logprobs[0])
            text = reader.certain()
            if len(text) > told:
                yield text[told:]
                told = len(text)
            if reader.finish:
                return
        if len(reader.text) > told:
            yield reader.text[told:]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt; an empty text begins a document."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        require(self.tokenizer is not None, "this model's tokenizer is not known: give token numbers")
        assert self.tokenizer is not None
        tokens = self.tokenizer.encode(prompt).tolist()
        return tokens or [self.tokenizer.end_of_document]

    def _complete(self, rows, seeds, max_tokens: int, stops: list[str]) -> list[Completion]:
        readers = [_Reader(self, stops) for _ in rows]
        for step in generate_tokens(self.served, rows, max_tokens, seeds):
            for reader, tokens, logprobs in zip(readers, step.tokens, step.logprobs, strict=True):
                reader.read(tokens, logprobs)
            if all(reader.finish for reader in readers):
                break
        return [reader.completion() for reader in readers]


class _Reader:
    """The tokens of one row, until it ends."""

    def __init__(self, model: TextModel, stops: list[str]):
        self.model, self.stops, self.finish, self.text = model, stops, "", ""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []

    def read(self, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Take more tokens; those after the end are left out."""
        for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            if self.finish:
                break
            if token == self.model.end:
                self.finish = "end"
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if self.stops:
                self._decode()
        self._decode()

    def _decode(self) -> None:
        if self.model.tokenizer is None or self.finish == "stop":
            return
        self.text = self.model.tokenizer.decode(self.tokens)
        places = [self.text.find(stop) for stop in self.stops if stop in self.text]
        if places:
            self.text, self.finish = self.text[: min(places)], "stop"

    def certain(self) -> str:
        """The text that no later token can change: without an unfinished character, or what may begin a stop string."""
        if self.finish:
            return self.text
        text = self.text.rstrip(UNFINISHED)
        longest = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        return text[: len(text) - longest]

    def completion(self) -> Completion:
        return Completion(self.text, self.tokens, self.logprobs, self.finish or "length")


@jax.jit
def _logits(served: ServedModel, tokens_BT: jax.Array) -> jax.Array:
    return served.extend(tokens_BT, served.start(*tokens_BT.shape))[0]


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # one prompt of token numbers
    return list(prompts)  # type: ignore[arg-type]


def load_text_model(path: Path, dtype: str = "float32") -> TextModel:
    """Load a model of any kind to generate with: packed, a run directory, an imported or a Hugging Face folder.

    Ternary weights of models that are not packed are packed in memory; embedding and dense weights stay float32.
    Raises as `weights.load_model` and `model.load_packed`.
    """
    served = load_packed(path, dtype) if is_packed(path) else serve_model(load_model(path), dtype=dtype)
    tokenizer = find_tokenizer(path)
    return TextModel(served, tokenizer, None if tokenizer is None else tokenizer.end_of_document)


def find_tokenizer(path: Path) -> Tokenizer | None:
    """Return the tokenizer of a model: the one in its folder, or that of the corpus that its run was trained on."""
    if (path / TOKENIZER).is_file():
        return tokenization.load(path)
    trained_with = corpus_facts(path).get("vocab_hash")
    for known in known_corpora(path):
        if (Path(known.path) / TOKENIZER).is_file():
            found = tokenization.load(Path(known.path))
            if found.vocab_hash == trained_with:
                return found
    return None
