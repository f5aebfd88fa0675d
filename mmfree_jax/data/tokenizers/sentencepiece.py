"""SentencePiece models as `tokenizers` backends, read without the SentencePiece library.

The file is a protocol buffer (sentencepiece_model.proto of google/sentencepiece); the conversion is the one by which
published tokenizer.json files of Llama and Mistral were made.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

SPACE = "\u2581"  # what stands for a blank in pieces
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # SentencePiece.type


@dataclass(frozen=True)
class _Model:
    pieces: list[tuple[str, float, int]]  # text, score, type; the place is the token number
    model_type: int
    byte_fallback: bool
    dummy_prefix: bool
    character_map: bytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a protocol buffer message: integers, or bytes for everything else."""
    # A message is a row of fields: a key with number and wire type, then the value; 0 is a variable-length integer, 2
    # has its length in front.
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise IndexError("a field is longer than the file")
        yield number, data[at : at + size]
        at += size


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = {1: b"", 2: bytes(4), 3: _NORMAL} | dict(_fields(data))
    text, score, kind = fields[1], fields[2], fields[3]
    assert isinstance(text, bytes)
    assert isinstance(score, bytes)
    assert isinstance(kind, int)
    return text.decode(), struct.unpack("<f", score)[0], kind


def _parse(data: bytes) -> _Model:
    # Fields of ModelProto: 1 pieces, 2 trainer_spec (3 model_type, 35 byte_fallback), 3 normalizer_spec (2 character
    # map, 3 add_dummy_prefix).
    fields = list(_fields(data))
    pieces = [_piece(value) for number, value in fields if number == 1 and isinstance(value, bytes)]
    trainer, normalizer = ({k: v for n, part in fields if n == m for k, v in _fields(bytes(part))} for m in (2, 3))
    return _Model(
        pieces,
        int(trainer.get(3, _UNIGRAM)),
        bool(trainer.get(35, 0)),
        bool(normalizer.get(3, 1)),
        bytes(normalizer.get(2, b"")),
    )


def _merges(vocabulary: dict[str, int], pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The merges that SentencePiece would make, best score first."""
    # A SentencePiece file has no merges: any two pieces whose concatenation is a piece may merge, that with the best
    # score first. `tokenizers` needs them as a list.
    found = []
    for text, score, kind in pieces:
        if kind in (_NORMAL, _USER_DEFINED):
            halves = ((text[:i], text[i:]) for i in range(1, len(text)))
            found += [
                (-score, vocabulary[a], vocabulary[b], a, b) for a, b in halves if a in vocabulary and b in vocabulary
            ]
    return [(a, b) for *_, a, b in sorted(found)]


def _backend(model: _Model) -> tokenizers.Tokenizer:
    if not all(text and math.isfinite(score) for text, score, _ in model.pieces):
        raise ValueError("a piece has no text or no score")
    vocabulary = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    unknown = next(number for number, piece in enumerate(model.pieces) if piece[2] == _UNKNOWN)
    if model.model_type == _BPE:
        merges = _merges(vocabulary, model.pieces)
        name = model.pieces[unknown][0]
        core = models.BPE(vocabulary, merges, unk_token=name, fuse_unk=True, byte_fallback=model.byte_fallback)
        return tokenizers.Tokenizer(core)
    if model.model_type == _UNIGRAM:
        scored = [(text, score) for text, score, _ in model.pieces]
        return tokenizers.Tokenizer(models.Unigram(scored, unknown, model.byte_fallback))
    raise ValueError(f"model type {model.model_type} is neither unigram nor BPE")


def _try_out(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Encode a text. Raises ValueError if a damaged table of characters makes the library panic."""
    try:
        backend.encode("ab a\u00e9 1")
    except BaseException as error:  # a panic of Rust is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path} is not a SentencePiece model that can be read: {error}") from None


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """Build the backend for a SentencePiece `.model` file. Raises ValueError naming the file when it is not one.

    Tokens are those of the SentencePiece library, except that runs of many blanks may be cut in other places (as in the
    published conversions): all merges of a piece have one rank there, but not in `tokenizers`.
    """
    try:
        model = _parse(path.read_bytes())
        backend = _backend(model)
        steps: list[normalizers.Normalizer] = []
        steps += [normalizers.Precompiled(model.character_map)] if model.character_map else []
    except Exception as error:  # of many kinds, and the library raises bare Exception
        raise ValueError(f"{path} is not a SentencePiece model that can be read: {error!r}") from None
    steps += [normalizers.Prepend(SPACE)] if model.dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _try_out(path, backend)
    control = [text for text, _, kind in model.pieces if kind in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    return backend
