"""Writes token sets: into a hidden folder, which is renamed when it is complete, so that no partial set is ever
seen."""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.data.building import card as cards
from mmfree_jax.data.reading.token_set import (
    CARD,
    FORMAT,
    INDEX,
    READABLE_CARD,
    TOKENIZER,
    VERSION,
    Shard,
    TokenSet,
    fingerprint,
)
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer
from mmfree_jax.files import locked, naming

SHARD_TOKENS = 1 << 27  # a shard is closed at the first document end after this many tokens (256 MB of uint16)


class ShardWriter:
    """One shard under construction: `folder`/`name`.bin and .docs; complete and on the disk after `close`."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.path = folder / f"{name}.bin"
        self.tokens = 0
        self._dtype = dtype.newbyteorder("<")
        self._starts: list[int] = []
        self._sum = hashlib.sha256()
        self._file = self.path.open("wb")

    def add(self, tokens: np.ndarray, starts: Sequence[int] | np.ndarray = (0,)) -> None:
        """Append tokens, in which documents begin at `starts`; without any they belong to the last document.

        A document should end with an end-of-document token.
        """
        self._starts += [int(start) + self.tokens for start in starts]
        # The checksum grows with the file, which is never read again to be checked.
        data = tokens.astype(self._dtype).tobytes()
        self._file.write(data)
        self._sum.update(data)
        self.tokens += len(tokens)

    def close(self) -> Shard:
        """Write everything to the disk and describe it."""
        starts = np.array(self._starts, "<u8").tobytes()
        with self._file as tokens, self.path.with_suffix(".docs").open("wb") as documents:
            documents.write(starts)
            for file in (tokens, documents):
                file.flush()
                os.fsync(file.fileno())
        sums = self._sum.hexdigest(), hashlib.sha256(starts).hexdigest()
        return Shard(self.path.name, self.tokens, len(self._starts), *sums)


def write_texts(
    folder: Path, texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, splits: Iterable[str], suffix: str = ""
) -> dict[str, dict[str, Any]]:
    """Tokenise (split, text) pairs, a document each, into shards `SPLIT` + `suffix` + -00000.bin in `folder`.

    Returns the index entry of each of `splits`. Empty documents are left out: they would be end-of-document tokens in a
    row.
    """
    shards: dict[str, list[Shard]] = {name: [] for name in splits}
    sizes, writers = dict.fromkeys(shards, 0), dict[str, ShardWriter]()
    # The tokenizer takes texts in batches, ahead of what it has given back. So split and size of each text wait in a
    # queue until its tokens come, in the same order.
    waiting: deque[tuple[str, int]] = deque()

    def noted() -> Iterator[str]:
        for split, text in texts:
            if text:
                waiting.append((split, len(text) if text.isascii() else len(text.encode("utf-8", "replace"))))
                yield text

    for tokens in tokenizer.encode_stream(noted()):
        split, size = waiting.popleft()
        if split not in writers:
            writers[split] = ShardWriter(folder, f"{split}{suffix}-{len(shards[split]):05d}", tokenizer.dtype)
        writers[split].add(np.append(tokens, tokenizer.end_of_document))
        sizes[split] += size
        if writers[split].tokens >= SHARD_TOKENS:
            shards[split].append(writers.pop(split).close())
    for split, writer in writers.items():
        shards[split].append(writer.close())
    return {name: split_entry(shards[name], sizes[name]) for name in shards}


def split_entry(shards: list[Shard], text_bytes: int) -> dict[str, Any]:
    """Return the index entry of a split."""
    return {
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "text_bytes": text_bytes,
        "shards": [asdict(shard) for shard in shards],
    }


def finish(
    folder: Path,
    splits: Mapping[str, dict[str, Any]],
    tokenizer: Tokenizer,
    card: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write tokenizer, data card and, last, the index (with `extra` in it) of the shards in `folder`."""
    tokenizer.save(folder / TOKENIZER)
    dtype = tokenizer.dtype.name
    counts = {name: {k: v for k, v in split.items() if k != "shards"} for name, split in splits.items()}
    identity = {"vocab_size": tokenizer.vocab_size, "vocab_hash": tokenizer.vocab_hash, "dtype": dtype}
    identity["fingerprint"] = fingerprint(tokenizer.vocab_hash, dtype, dict(splits))
    complete = {"tokenizer": tokenizer.description, **card, **(extra or {}), **identity, "splits": counts}
    (folder / CARD).write_text(json.dumps(complete, indent=1) + "\n", encoding="utf-8")
    (folder / READABLE_CARD).write_text(cards.readable(complete), encoding="utf-8")
    index = {"format": FORMAT, "version": VERSION, **identity, "end_of_document": tokenizer.end_of_document}
    index |= {"tokenizer": TOKENIZER, "splits": dict(splits), **(extra or {})}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    # Before the rename: after a crash a folder with the final name must have all of its content.
    for file in sorted(folder.iterdir()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def publish(path: Path, fill: Callable[[Path], None]) -> TokenSet:
    """Let `fill` write a set into a hidden folder beside `path`, then rename it to `path`; a failure leaves nothing.

    Raises FileExistsError when `path` is there already, LockedError when another process is writing it, and
    TokenSetError when what was written cannot be opened.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already: remove it or choose another folder")
    work = path.with_name(f".{path.name}.building")
    with locked(work), naming(work):
        folder = work / "set"
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        try:
            fill(folder)
            # Opened as a reader would, so that a fault of the writer cannot become a set.
            TokenSet.open(folder)
            os.rename(folder, path)
        finally:
            shutil.rmtree(work)
    return TokenSet.open(path)


def write_token_set(
    path: Path, splits: Mapping[str, Iterable[str]], tokenizer: Tokenizer, card: Mapping[str, Any]
) -> TokenSet:
    """Build a token set from texts held in memory: split name -> documents. See `publish` for errors."""

    def fill(folder: Path) -> None:
        labelled = ((name, text) for name, texts in splits.items() for text in texts)
        entries = write_texts(folder, labelled, tokenizer, splits)
        finish(folder, entries, tokenizer, card)

    return publish(path, fill)
