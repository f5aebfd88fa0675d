"""A model with its tokenizer: text in, text out."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfree_jax.config import ModelConfig, require
from mmfree_jax.data.reading.token_set import TOKENIZER
from mmfree_jax.data.tokenizers import tokenizer as tokenization
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer
from mmfree_jax.files import read_json
from mmfree_jax.inference.completion import Completion, Reader
from mmfree_jax.inference.engine import Engine, Request
from mmfree_jax.inference.generate import TOP
from mmfree_jax.inference.model import Place, ServedModel, load_packed, serve_model
from mmfree_jax.inference.packed import PACKED, is_packed
from mmfree_jax.inference.sampling import Sampling
from mmfree_jax.run_folder import corpus_facts, known_corpora
from mmfree_jax.weights import load_model, origin

MOST_SLOTS = 64  # of an engine; more prompts wait for a slot
CHUNK, STREAMED = 16, 8  # tokens that are decoded in a call; of a stream, which tells them at once
ROOM = 256  # an attention cache holds a multiple of so many tokens, so that few programs are compiled

# Of Hugging Face folders: special tokens by their role, the template of chats, the tokens that end a text.
TOKENIZER_CONFIG, TEMPLATE, GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model that generates; calling it with tokens, int32 [B, T], gives logits [B, T, V].

    tokenizer: None where the model's folder does not say which; then prompts are token numbers.
    ends: tokens that end a text, where they are known. begin: tokens that a text begins with.
    """

    served: ServedModel
    tokenizer: Tokenizer | None = None
    ends: tuple[int, ...] = ()
    begin: tuple[int, ...] = ()

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
        top: int = 0,
        **sampling: Any,
    ) -> list[Completion]:
        """Complete one prompt or several, text or token numbers, by continuous batching.

        sampling: the fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty, seed. The prompt
        number n of a call has the seed `seed + n`. stop: strings at which a completion ends. top: how many of the most
        likely tokens to report at each place, 20 at most.
        Raises ConfigError for settings that mean nothing, an empty prompt, and text where no tokenizer is known.
        """
        settings, stops = Sampling(**sampling), [stop] if isinstance(stop, str) else list(stop)
        rows = [self.encode(prompt) for prompt in _listed(prompts)]
        engine = self._engine(rows, max_tokens, stops)
        require(0 <= top <= TOP, f"top={top}: must be from 0 to {TOP}")
        readers = [self.reader(stops) for _ in rows]
        for n, (row, reader) in enumerate(zip(rows, readers, strict=True)):
            own = dataclasses.replace(settings, seed=(settings.seed + n) % 2**32)
            engine.submit(Request(row, max_tokens, own, reader, top))
        engine.run()
        return [reader.completion() for reader in readers]

    def stream(
        self, prompt: Prompt, *, max_tokens: int = 128, stop: Sequence[str] = (), **sampling: Any
    ) -> Iterator[str]:
        """Yield the text that follows a prompt, piece by piece, each of whole characters. Raises as `generate`."""
        require(self.tokenizer is not None, "text needs a tokenizer")
        row, reader, told = self.encode(prompt), self.reader(list(stop)), 0
        engine = self._engine([row], max_tokens, stop, STREAMED)
        engine.submit(Request(row, max_tokens, Sampling(**sampling), reader))
        while not reader.ended:
            engine.step()
            if piece := reader.certain()[told:]:
                yield piece
                told += len(piece)
        reader.completion()

    def reader(self, stops: Sequence[str] = ()) -> Reader:
        """Return a listener that turns a request's tokens into text."""
        return Reader(self.tokenizer, self.ends, stops)

    def _engine(
        self, rows: Sequence[Sequence[int]], max_tokens: int, stops: Sequence[str], chunk: int = CHUNK
    ) -> Engine:
        """An engine with a slot for each row, whose caches hold the longest one and what follows it."""
        require(max_tokens >= 1, f"max_tokens={max_tokens}: must be at least 1")
        require(not stops or self.tokenizer is not None, "stop strings need a tokenizer")
        slots = min(MOST_SLOTS, 1 << max(0, len(rows) - 1).bit_length())
        capacity = -(-(max(map(len, rows), default=0) + max_tokens) // ROOM) * ROOM
        return Engine(self.served, slots, capacity, chunk=chunk, prompt_tokens=sys.maxsize)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt; an empty text begins a document."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        require(self.tokenizer is not None, "this model's tokenizer is not known: give token numbers")
        assert self.tokenizer is not None
        return [*self.begin, *self.tokenizer.encode(prompt).tolist()] or [self.tokenizer.end_of_document]


@jax.jit
def _logits(served: ServedModel, tokens_BT: jax.Array) -> jax.Array:
    return served.extend(tokens_BT, served.start(*tokens_BT.shape))[0]


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # one prompt of token numbers
    return list(prompts)  # type: ignore[arg-type]


def load_text_model(path: Path, dtype: str = "float32", embedding: Place = "device") -> TextModel:
    """Load a model of any kind to generate with: packed, a run directory, an imported or a Hugging Face folder.

    Ternary weights of models that are not packed are packed in memory; embedding and dense weights stay float32.
    dtype, embedding: as `model.load_packed`. Raises as it and `weights.load_model`.
    """
    if is_packed(path):
        served = load_packed(path, dtype, embedding)
    else:
        served = serve_model(load_model(path), dtype=dtype, embedding=embedding)
    tokenizer = find_tokenizer(path)
    return TextModel(served, tokenizer, find_ends(path, tokenizer), find_begin(path, tokenizer))


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


def find_ends(path: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Return the tokens that end a text: those that the model's folder names, else the one between documents."""
    if (path / GENERATION).is_file():
        named = read_json(path / GENERATION).get("eos_token_id")
    else:
        named = read_json(path / PACKED)["end_of_document"] if is_packed(path) else origin(path).eos
    if named is None:
        return () if tokenizer is None else (tokenizer.end_of_document,)
    return tuple(named) if isinstance(named, list) else (named,)


def find_begin(path: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Return the tokens that a published tokenizer puts in front of a text. Models trained here had none there."""
    if tokenizer is None or not (path / TOKENIZER_CONFIG).is_file():
        return ()
    return tuple(tokenizer.backend.encode("", add_special_tokens=True).ids[:1])


def text_files(path: Path) -> list[Path]:
    """Return the files of a folder that say how its model reads and writes text, apart from the tokenizer."""
    return [path / name for name in (TOKENIZER_CONFIG, TEMPLATE, GENERATION) if (path / name).is_file()]
