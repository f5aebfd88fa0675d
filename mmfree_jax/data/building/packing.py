"""Documents arranged so that windows do not cut them.

Best-fit packing (Ding et al. 2024, arXiv 2404.10830): documents that fit a window are never truncated. The result is an
ordinary token set whose windows of one length are the packed rows. What no document fills is end-of-document tokens,
and so is one more token after the last row.

The last target of a window is the first token of the next row. After an end of document, as almost everywhere, that is
some document's first token predicted from nothing, as at every other document start. Of a document longer than a row
the rest lies elsewhere: two targets of such a document are wrong, the one after its last full row and the first of the
rest.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.data.building.token_writer import ShardWriter, finish, publish, split_entry
from mmfree_jax.data.reading.token_set import PACKED, Split, TokenSet

SHARD_ROWS_TOKENS = 1 << 27  # tokens in a shard, rounded down to whole rows


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Items of `lengths` (int [n], each 1 to `capacity`) in rows that hold `capacity`: rows of item numbers.

    Longest first, each into the fullest row that still takes it; equal lengths in their given order.
    """
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set when a row has exactly s tokens free
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            row, space = len(rows), capacity
            rows.append([])
        rows[row].append(item)
        left = space - length
        by_space[left].append(row)
        spaces |= 1 << left
    return rows


def pieces_of(split: Split, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths (int64 [pieces]) of documents, those longer than `sequence` cut into full rows and a rest."""
    starts = split.document_starts()
    lengths = np.diff(np.append(starts, len(split)))
    counts = -(-lengths // sequence)
    first = np.repeat(starts, counts)
    offset = (np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)) * sequence
    return first + offset, np.minimum(sequence, np.repeat(lengths, counts) - offset)


def _write(folder: Path, token_set: TokenSet, name: str, sequence: int) -> dict[str, Any]:
    split = token_set.split(name)
    starts, lengths = pieces_of(split, sequence)
    rows = best_fit(lengths, sequence)
    per_shard = max(SHARD_ROWS_TOKENS // sequence, 1)
    shards = []
    for number, first in enumerate(range(0, len(rows), per_shard)):
        writer = ShardWriter(folder, f"{name}-{number:05d}", split.dtype)
        for row in rows[first : first + per_shard]:
            for item in row:
                writer.add(split[int(starts[item]) : int(starts[item] + lengths[item])])
            writer.extend(np.full(sequence - int(lengths[row].sum()), token_set.end_of_document))
        if first + per_shard >= len(rows):  # the target of the last row's last token: without it the row is no window
            writer.extend(np.full(1, token_set.end_of_document))
        shards.append(writer.close())
    return split_entry(shards, token_set.text_bytes(name))


def pack(token_set: TokenSet, path: Path, sequence: int) -> TokenSet:
    """A copy of `token_set` at `path` whose training documents are packed into rows of `sequence` tokens.

    Held-out text keeps its order: it is read as a whole. Training takes the result with the same `sequence` and
    separate documents only. Raises FileExistsError when `path` exists and ValueError for a set that is packed already.
    """
    if sequence < 2:
        raise ValueError(f"rows of {sequence} tokens hold no document: 2 is the least")
    if token_set.packed_sequence:
        raise ValueError(f"{token_set.path} is packed already, for {token_set.packed_sequence} tokens")

    def fill(folder: Path) -> None:
        splits = {name: _write(folder, token_set, name, sequence) for name in token_set.splits if name != "valid"}
        if "valid" in token_set.splits:
            splits["valid"] = token_set.index["splits"]["valid"]
            for shard in token_set.split("valid").shards:
                for file in (shard.file, shard.starts_file):
                    (folder / file).write_bytes((token_set.path / file).read_bytes())
        finish(folder, splits, token_set.tokenizer(), token_set.card, {PACKED: sequence})

    return publish(path, fill)
