"""Tokenizers: bytes, byte-level BPE trained here, any local `tokenizer.json`; one class around `tokenizers`.

A vocabulary is named by a hash of what decides token numbers, so that tokens, models and decoders can be checked
against each other.
"""

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmfree_jax.data.tokenizers import sentencepiece
from mmfree_jax.data.tokenizers.word_cache import WordCache, fits

END_OF_DOCUMENT = "<|endoftext|>"
# Names that published tokenizers give to the token between documents, in the order in which they are looked for.
_END_NAMES = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|endofprompt|>", "[SEP]")
BYTES_HASH = "4544468f257f5af27bcd74226af4d855f38a617c5540fb4ff28d413119a1db66"  # `vocab_hash` of `byte_tokenizer()`
PIECE = 65_536  # characters: a longer text is encoded in pieces, which bounds memory
LONGEST_PIECE = 1_048_576  # characters without a line end after which a piece is cut anywhere
BATCH = 4_000_000  # characters encoded in one call
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # a token for one byte, in SentencePiece's vocabularies
MOST_TOKENS = 1 << 24  # in a vocabulary that is read from a file
_LINE_END = re.compile(r"(?<=\S)(?=\n)")  # GPT-2's rules have no token from a word into the white space after it


class Tokenizer:
    """Text to token numbers and back.

    Special tokens written out in a text are encoded as plain text: only `end_of_document` separates documents.
    """

    def __init__(self, backend: tokenizers.Tokenizer, description: str):
        self.backend = backend
        self.description = description
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        ends = [number for name in _END_NAMES if (number := backend.token_to_id(name)) is not None]
        if not ends:
            raise ValueError(
                f"the tokenizer has no token to put between documents (looked for {', '.join(_END_NAMES)})"
            )
        self.end_of_document: int = ends[0]
        self._json = backend.to_str(pretty=True)
        self.vocab_hash: str = vocabulary_hash(self._json)
        # SentencePiece puts a blank before every text; it must not come again before the pieces of a long one.
        self._prefix = backend.token_to_id(sentencepiece.SPACE) if "Prepend" in self._json else None
        self._byte_level = "ByteLevel" in str(backend.decoder)
        self._cache = WordCache(backend, self.dtype) if fits(self._json) else None
        # Text is data here: a special token that somebody wrote out must not separate documents.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()

    @property
    def dtype(self) -> np.dtype:
        """uint16 where every token fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 65_536 else np.uint32)

    @functools.cached_property
    def special(self) -> frozenset[int]:
        """Tokens that `decode` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def encode(self, text: str) -> np.ndarray:
        """Encode one text: tokens, `dtype` [tokens], without an end-of-document token."""
        return next(self.encode_stream([text]))

    def encode_stream(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode each text: tokens, `dtype` [tokens]; texts of any length, memory bounded by a few batches of 4 MB."""
        # Long texts are cut into pieces and short ones collected, so that every batch has about the same size. `last`
        # says where texts end in a batch, and `held` has the tokens of a text that continues in the next one.
        pieces: list[str] = []
        last: list[bool] = []
        held: list[np.ndarray] = []
        size = 0
        for text in texts:
            cut = split_long(text)
            for i, piece in enumerate(cut):
                pieces.append(piece)
                last.append(i + 1 == len(cut))
                size += len(piece)
                if size >= BATCH:
                    yield from self._encode(pieces, last, held)
                    pieces, last, size = [], [], 0
        yield from self._encode(pieces, last, held)

    def _encode(self, pieces: list[str], last: list[bool], held: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Tokens of the texts that end in `pieces`; the beginning of one that does not end waits in `held`."""
        clean = [p if p.isascii() else p.encode("utf-8", "replace").decode() for p in pieces]
        for tokens, is_last in zip(self._batch(clean), last, strict=True):
            repeated = held and len(tokens) and tokens[0] == self._prefix
            held.append(tokens[1:] if repeated else tokens)
            if is_last:
                yield held[0] if len(held) == 1 else np.concatenate(held)
                held.clear()

    def _batch(self, texts: list[str]) -> Iterator[np.ndarray]:
        if self.vocab_hash == BYTES_HASH:  # the library takes ten times as long for what is an addition
            for text in texts:
                yield np.frombuffer(text.encode(), np.uint8).astype(self.dtype) + self.dtype.type(1)
            return
        if self._cache is not None:
            yield from map(self._cache.encode, texts)
            return
        for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(encoding.ids, self.dtype)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Decode `tokens`; end-of-document tokens are left out, incomplete UTF-8 becomes U+FFFD."""
        return self.backend.decode([int(token) for token in tokens], skip_special_tokens=True)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token stands for inside a text; none for a number without a token."""
        name = self.backend.id_to_token(token)
        if name is None or token in self.backend.get_added_tokens_decoder():
            return (name or "").encode()
        if self._byte_level:
            return bytes(_BYTE_OF_NAME[character] for character in name)
        if (byte := BYTE_TOKEN.fullmatch(name)) is not None:
            return bytes([int(byte[1], 16)])
        return name.replace(sentencepiece.SPACE, " ").encode()

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json` that the `tokenizers` library, `transformers` and `load` read."""
        path.write_text(self._json, encoding="utf-8")


def vocabulary_hash(tokenizer_json: str) -> str:
    """Return the SHA-256 of what decides token numbers in a `tokenizer.json`, not its layout and library version."""
    # Versions of the library write the same tokenizer in different ways: merges as pairs or as text, keys in any order.
    parsed = json.loads(tokenizer_json)
    model = parsed["model"]
    vocabulary = model["vocab"]
    essence: dict[str, Any] = {
        "type": model.get("type", "BPE"),
        "vocab": sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary,
        "merges": [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])],
        "added": sorted((token["id"], token["content"]) for token in parsed.get("added_tokens", [])),
        "normalizer": (parsed.get("normalizer") or {}).get("type"),
        "pre_tokenizer": (parsed.get("pre_tokenizer") or {}).get("type"),
    }
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()


def split_long(text: str) -> list[str]:
    """Cut a long text into pieces that join to it again, at ends of lines where there are any."""
    pieces, start = [], 0
    while len(text) - start > 2 * PIECE:
        match = _LINE_END.search(text, start + PIECE, min(start + LONGEST_PIECE, len(text)))
        stop = match.end() if match else min(start + LONGEST_PIECE, len(text))
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]] if start < len(text) or not pieces else pieces


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016; bytes as in Radford et al. 2019), each digit a token of its own.

    Token 0 is the end of a document, 1..256 are the bytes. The same texts in the same order give the same tokenizer in
    every process. Raises ValueError when `vocab_size` is under 257 or the text is too small to fill it.
    """
    # With all bytes in the alphabet no text is unknown, whatever script it is in.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < 1 + len(alphabet):
        raise ValueError(f"vocab_size {vocab_size} is too small: a byte-level BPE needs at least {1 + len(alphabet)}")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((piece for text in texts for piece in split_long(text)), trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the text is too small for vocab_size {vocab_size}: only {backend.get_vocab_size()} tokens occur"
        )
    return Tokenizer(backend, f"byte-level BPE, {vocab_size} tokens, digits split, trained on the training split")


# Byte-level BPE writes each byte as a printable character (GPT-2): its own where it has one, else one from 256 on.
_KEPT = [*range(33, 127), *range(161, 173), *range(174, 256)]
_MOVED = [byte for byte in range(256) if byte not in _KEPT]
_BYTE_OF_NAME = {chr(byte): byte for byte in _KEPT} | {chr(256 + i): byte for i, byte in enumerate(_MOVED)}


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer with a token for every byte: 0 is the end of a document, byte b is token b + 1."""
    vocabulary = {END_OF_DOCUMENT: 0} | {name: byte + 1 for name, byte in _BYTE_OF_NAME.items()}
    backend = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([END_OF_DOCUMENT])
    return Tokenizer(backend, "bytes")


def load(path: Path) -> Tokenizer:
    """Load a tokenizer from a `tokenizer.json`, a folder that holds one, or a SentencePiece model (any other name).

    Raises FileNotFoundError when there is none, ValueError when the file is not one or has no end-of-document token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {file}")
    if file.suffix != ".json":
        return Tokenizer(sentencepiece.load_backend(file), f"SentencePiece, read from {file.name}")
    try:
        content = file.read_text(encoding="utf-8")
        _check_numbers(content)
        backend = tokenizers.Tokenizer.from_str(content)
    except BaseException as error:  # the library raises bare Exception; a panic of Rust is none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{file} is not a tokenizer: {error}") from None
    return Tokenizer(backend, f"read from {file.name}")


def _check_numbers(tokenizer_json: str) -> None:
    """Raise ValueError for a token number above MOST_TOKENS: the library makes room for all numbers below it."""
    parsed = json.loads(tokenizer_json)
    vocabulary = parsed["model"]["vocab"]
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary)]
    largest = max([*numbers, *(token["id"] for token in parsed.get("added_tokens") or [])], default=0)
    if largest > MOST_TOKENS:
        raise ValueError(f"token number {largest} is above {MOST_TOKENS}")


def named(name: str) -> Tokenizer:
    """Load the tokenizer called "bytes" or "mistral" (32,000 tokens, of the package mistral-common), or one at a path.

    Raises ModuleNotFoundError when mistral-common is not installed, and what `load` raises.
    """
    if name == "bytes":
        return byte_tokenizer()
    if name == "mistral":
        package = importlib.util.find_spec("mistral_common")
        if package is None or not package.submodule_search_locations:
            raise ModuleNotFoundError(
                "Mistral's tokenizer comes with the package mistral-common: pip install mistral-common"
            )
        return load(Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1")
    return load(Path(name))
