"""Reads token sets from disk: memory-mapped, checked, with random access across shards.

index.json            format version, dtype, vocabulary, splits -> shards with counts and SHA-256, fingerprint
train-00000.bin       tokens, little-endian uint16 or uint32; every document ends with the end-of-document token
train-00000.docs      where documents start inside the shard, little-endian uint64
valid-00000.bin …     the held-out split
tokenizer.json        the tokenizer that made the tokens
data_card.json/.md    where the text is from
"""

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.checksums import READERS
from mmfree_jax.data.tokenizers import tokenizer as tokenization
from mmfree_jax.files import sha256

FORMAT = "mmfree-token-set"
VERSION = 1
PACKED = "packed_sequence"  # key of the index: the window length that a set is packed for
INDEX, TOKENIZER, CARD, READABLE_CARD = "index.json", "tokenizer.json", "data_card.json", "data_card.md"
DTYPES = ("uint16", "uint32")
SHARD_FILE = re.compile(r"\w[\w.-]*\.bin", re.ASCII)  # a plain name: an index must not lead out of its folder


class TokenSetError(ValueError):
    """A token set is incomplete, damaged or of another kind; the message names the file and what to do."""


@dataclass(frozen=True)
class Shard:
    """One pair of files: tokens, and where documents start in them."""

    file: str
    tokens: int
    documents: int
    sha256: str
    starts_sha256: str

    @property
    def starts_file(self) -> str:
        """Name of the file with the document starts."""
        return self.file.removesuffix(".bin") + ".docs"

    def sums(self) -> tuple[tuple[str, str], ...]:
        """Return the names of both files with their SHA-256."""
        return (self.file, self.sha256), (self.starts_file, self.starts_sha256)


def wrong_in_index(index: dict[str, Any]) -> str:
    """Return what is wrong in an index of the right format and version, whoever wrote it; empty if nothing is."""
    kinds = {"dtype": str, "vocab_size": int, "vocab_hash": str, "fingerprint": str, "end_of_document": int}
    for name, kind in {**kinds, "splits": dict}.items():
        if name not in index:
            return f"has no {name!r}"
        if type(index[name]) is not kind:
            return f"has {name}={index[name]!r:.60}, which must be of type {kind.__name__}"
    if not re.fullmatch("[0-9a-f]{64}", index["fingerprint"]):
        return f"has fingerprint={index['fingerprint']!r:.80}, which is no SHA-256"
    if index["dtype"] not in DTYPES:
        return f"has dtype={index['dtype']!r:.60}, not one of {', '.join(DTYPES)}"
    if not 0 <= index["end_of_document"] < index["vocab_size"] <= 1 << 32:
        return "has an end_of_document that is not in its vocabulary"
    packed = index.get(PACKED)
    if packed is not None and not (type(packed) is int and packed >= 2):
        return f"has {PACKED}={packed!r:.60}, which must be at least 2"
    for name, split in index["splits"].items():
        shards = split.get("shards") if isinstance(split, dict) else None
        if not isinstance(shards, list) or not _is_count(split.get("text_bytes")):
            return f"describes the split {name!r:.60} without its shards and text_bytes"
        for shard in shards:
            if not _is_shard(shard):
                return f"has a shard in the split {name!r:.60} that is none: {shard!r:.80}"
    return ""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 60


def _is_shard(value: Any) -> bool:
    """Whether an entry of an index has the fields of a Shard, and a file in the folder of the index."""
    return (
        isinstance(value, dict)
        and value.keys() == {field.name for field in fields(Shard)}
        and _is_count(value["tokens"])
        and _is_count(value["documents"])
        and all(type(value[name]) is str for name in ("file", "sha256", "starts_sha256"))
        and SHARD_FILE.fullmatch(value["file"]) is not None
    )


def fingerprint(vocab_hash: str, dtype: str, splits: dict[str, Any]) -> str:
    """Return the SHA-256 of the content: vocabulary, dtype and the checksums of all shards in order."""
    # File names and metadata do not count: equal tokens are equal data, wherever and by whomever they were written.
    sums = {name: [[s["sha256"], s["starts_sha256"]] for s in split["shards"]] for name, split in splits.items()}
    return hashlib.sha256(json.dumps([vocab_hash, dtype, sums], sort_keys=True).encode()).hexdigest()


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if not path.is_file():
        raise TokenSetError(f"{path} is missing: build the token set again")
    expected = count * dtype.itemsize
    if path.stat().st_size != expected:
        raise TokenSetError(f"{path} has {path.stat().st_size} bytes instead of {expected}: build the token set again")
    # Mapped, so that opening takes no time and only the pages that windows touch are read, once for all processes of a
    # machine. NumPy cannot map an empty file.
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)


class Split:
    """The tokens of one split as one long array over all shards. Only what is indexed is read."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shards: list[Shard]):
        self.name = name
        self.dtype = dtype
        self.shards = shards
        self.parts = [_map(folder / shard.file, dtype, shard.tokens) for shard in shards]
        starts = np.dtype("<u8")
        self.starts = [_map(folder / shard.starts_file, starts, shard.documents) for shard in shards]
        self.bounds = np.cumsum([0] + [shard.tokens for shard in shards])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(shard.documents for shard in self.shards)

    def document_starts(self) -> np.ndarray:
        """Return the index of the first token of every document, int64 [documents], increasing."""
        pieces = [s.astype(np.int64) + b for s, b in zip(self.starts, self.bounds, strict=False)]
        return np.concatenate([np.zeros(0, np.int64), *pieces])

    def __getitem__(self, where: slice) -> np.ndarray:
        """Return tokens [start:stop], of the set's dtype. Raises ValueError for a step other than 1."""
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("a split is read in runs: the step must be 1")
        # Windows cross shards as if these were one file: the last window of a shard goes on in the next.
        first = int(np.searchsorted(self.bounds, start, side="right")) - 1
        pieces = []
        for part, low in zip(self.parts[first:], self.bounds[first:], strict=False):
            if low >= stop:
                break
            pieces.append(part[max(start - int(low), 0) : stop - int(low)])
        return np.asarray(pieces[0]) if len(pieces) == 1 else np.concatenate([np.zeros(0, self.dtype), *pieces])


class TokenSet:
    """An opened token set. `open` checks sizes and versions at once; `verify` reads everything."""

    def __init__(self, path: Path, index: dict[str, Any]):
        self.path = path
        self.index = index
        self.vocab_size: int = index["vocab_size"]
        self.vocab_hash: str = index["vocab_hash"]
        self.fingerprint: str = index["fingerprint"]
        self.end_of_document: int = index["end_of_document"]
        self.packed_sequence: int | None = index.get(PACKED)
        self.sets: tuple[TokenSet, ...] = (self,)  # what is trained on; more than one in a Mixture
        self.weights: tuple[float, ...] = (1.0,)
        dtype = np.dtype(index["dtype"]).newbyteorder("<")
        shards = {name: [Shard(**shard) for shard in split["shards"]] for name, split in index["splits"].items()}
        self.splits = {name: Split(path, name, dtype, some) for name, some in shards.items()}

    @staticmethod
    def open(path: str | Path) -> "TokenSet":
        """Open the folder `path`. Raises FileNotFoundError or TokenSetError, naming the file that is wrong."""
        path = Path(path)
        if not (path / INDEX).is_file():
            raise FileNotFoundError(f"{path} is not a token set: it has no {INDEX}")
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        except ValueError as error:
            raise TokenSetError(f"{path / INDEX} is not JSON ({error}): build the token set again") from None
        except RecursionError:
            raise TokenSetError(f"{path / INDEX} is nested too deeply: build the token set again") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise TokenSetError(f"{path / INDEX} does not describe a token set")
        if index.get("version") != VERSION:
            raise TokenSetError(
                f"{path / INDEX} has format version {index.get('version')}, this program reads {VERSION}"
            )
        if wrong := wrong_in_index(index):
            raise TokenSetError(f"{path / INDEX} {wrong}: build the token set again")
        return TokenSet(path, index)

    def split(self, name: str) -> Split:
        """Return the split `name`; KeyError names the splits there are."""
        if name not in self.splits:
            raise KeyError(f"{self.path} has no split {name!r}, only {', '.join(self.splits)}")
        return self.splits[name]

    def text_bytes(self, split: str) -> int:
        """Return the UTF-8 bytes of the text of a split, end-of-document tokens not counted."""
        return int(self.index["splits"][self.split(split).name]["text_bytes"])

    def bytes_per_token(self, split: str) -> float:
        """Return the bytes of text that a token stands for: bits per byte = nats per token / ln 2 / bytes_per_token."""
        return self.text_bytes(split) / max(len(self.split(split)), 1)

    def tokenizer(self) -> tokenization.Tokenizer:
        """Load the tokenizer of this set. Raises TokenSetError for another one than made the tokens."""
        found = tokenization.load(self.path / TOKENIZER)
        if found.vocab_hash != self.vocab_hash:
            raise TokenSetError(f"{self.path / TOKENIZER} is not the tokenizer that made these tokens")
        return found

    @property
    def card(self) -> dict[str, Any]:
        """The data card."""
        return json.loads((self.path / CARD).read_text(encoding="utf-8"))

    def verify(self) -> None:
        """Read every file and compare checksums and token range. Raises TokenSetError naming the first wrong file."""
        self.tokenizer()
        shards = [shard for split in self.splits.values() for shard in split.shards]
        with ThreadPoolExecutor(READERS) as pool:
            sums = [(name, expected) for one in shards for name, expected in one.sums()]
            found = pool.map(lambda entry: sha256([self.path / entry[0]]), sums)
            for (name, expected), digest in zip(sums, found, strict=True):
                if digest != expected:
                    raise TokenSetError(f"{self.path / name} is damaged (wrong SHA-256): build the token set again")
        for split in self.splits.values():
            for shard, part, starts in zip(split.shards, split.parts, split.starts, strict=True):
                if len(part) and int(part.max()) >= self.vocab_size:
                    raise TokenSetError(f"{self.path / shard.file} has a token outside the vocabulary")
                if len(starts) and (int(starts[-1]) > len(part) or (starts[1:] < starts[:-1]).any()):
                    raise TokenSetError(f"{self.path / shard.starts_file} has document starts that are not in order")
        splits = self.index["splits"]
        if fingerprint(self.vocab_hash, self.index["dtype"], splits) != self.fingerprint:
            raise TokenSetError(f"{self.path / INDEX} does not match its own fingerprint")


class Mixture(TokenSet):
    """Token sets of one vocabulary to train on together. Held-out text and metadata are those of the first.

    weights: relative shares of the training windows. Raises TokenSetError for sets of different vocabularies.
    """

    def __init__(self, sets: Sequence[TokenSet], weights: Sequence[float]):
        super().__init__(sets[0].path, sets[0].index)
        # A token must mean the same in all of them; the held-out text is one, so losses are comparable.
        for other in sets[1:]:
            if other.vocab_hash != self.vocab_hash:
                raise TokenSetError(f"{self.path} and {other.path} have different vocabularies and cannot be mixed")
        self.sets, self.weights = tuple(sets), tuple(weights)
        # Equal corpora in other shares are other data.
        parts = [[one.fingerprint, weight] for one, weight in zip(sets, weights, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
