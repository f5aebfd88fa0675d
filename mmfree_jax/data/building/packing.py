"""Documents arranged so that windows do not cut them.

Best-fit packing (Ding et al. 2024, arXiv 2404.10830): documents that fit into a window are never truncated. The result
is an ordinary token set whose windows of one length are the packed rows. Gaps are filled with end-of-document tokens;
one more of them follows the last row.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.data.building.token_writer import ShardWriter, finish, publish, split_entry
from mmfree_jax.data.reading.token_set import PACKED, Split, TokenSet

# The last target of a window is the first token of the next row. If the window ends with an end of document, as almost
# always, that is the first token of a document, predicted from nothing, as at every other start of a document. A
# document longer than a row is cut, and its rest is in another row: two of its targets are wrong, the one after its
# last full row and the first of the rest.

SHARD_ROWS_TOKENS = 1 << 27  # tokens in a shard, rounded down to a multiple of the row length


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Distribute items of `lengths` (int [n], each 1 to `capacity`) over rows of `capacity`; returns item numbers by
    row.

    The longest item comes first; each goes to the fullest row with room for it. Equal lengths keep their order.
    """
    # The set of free spaces is one big integer. Shifting it by the length leaves the spaces that are large enough, and
    # its lowest set bit is the smallest of them: the fullest row, in constant time however many rows there are.
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set when a row has exactly s tokens free
    # Longest first, because the short ones fill what the long ones leave; a stable sort makes the result independent of
    # NumPy's choice of algorithm.
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
    """Return starts and lengths (int64 [pieces]) of documents. Long ones are cut into full rows and a rest."""
    starts = split.document_starts()
    lengths = np.diff(np.append(starts, len(split)))
    counts = -(-lengths // sequence)
    # Piece k of a document starts k * sequence tokens after it: k counts up from 0 within each document.
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
            writer.add(np.full(sequence - int(lengths[row].sum()), token_set.end_of_document), starts=())
        if first + per_shard >= len(rows):  # the target of the last row's last token: without it the row is no window
            writer.add(np.full(1, token_set.end_of_document), starts=())
        shards.append(writer.close())
    return split_entry(shards, token_set.text_bytes(name))


def pack(token_set: TokenSet, path: Path, sequence: int) -> TokenSet:
    """Copy `token_set` to `path` with its training documents packed into rows of `sequence` tokens.

    Held-out text keeps its order, because all of it is read. Training on the result requires the same `sequence` and
    separate documents. Raises FileExistsError when `path` exists and ValueError for a set that is packed already.
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
