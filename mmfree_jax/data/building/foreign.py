"""Converts token files of other projects (nanoGPT and llm.c .bin, Megatron .bin with .idx) into token sets."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmfree_jax.data.building.token_writer import SHARD_TOKENS, ShardWriter, finish, publish, split_entry
from mmfree_jax.data.reading.token_set import Shard, TokenSet
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer

# llm.c's token files: bytes of the header, and type of the tokens by its first number (GPT-2's, Llama 3's tokens).
_LLMC_HEADER, _LLMC_DTYPES = 1024, {20240520: "<u2", 20240801: "<u4"}
_ENOUGH = 8  # numbers that must look like upper halves of 32-bit ones to conclude that they are
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def _plain(path: Path, dtype: str) -> np.ndarray:
    """Tokens of a nanoGPT file (nothing but numbers, of `dtype`) or an llm.c one (256 int32 of header, then tokens)."""
    # Files of llm.c begin with a magic number. The first two tokens of a nanoGPT file cannot look like one: its lower
    # half is 55,432 or more, and GPT-2 has 50,257 tokens.
    with path.open("rb") as file:
        start = file.read(12)
    head = np.frombuffer(start if len(start) == 12 else bytes(12), "<i4")
    if int(head[0]) in _LLMC_DTYPES:
        size = path.stat().st_size - _LLMC_HEADER
        kind = np.dtype(_LLMC_DTYPES[int(head[0])])
        tokens = np.memmap(path, kind, "r", _LLMC_HEADER, max(size, 0) // kind.itemsize) if size > 0 else head[:0]
        if size != head[2] * kind.itemsize:
            raise ValueError(f"{path} is cut off: {len(tokens)} tokens instead of {head[2]}")
        return tokens
    size = np.dtype(dtype).itemsize
    if path.stat().st_size % size or not path.stat().st_size:
        raise ValueError(f"{path} is cut off or not of type {dtype}: {path.stat().st_size} bytes")
    return np.memmap(path, dtype, "r")


def _check_width(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Check that 16-bit numbers are not halves of 32-bit ones, and can name the whole vocabulary. Raises ValueError."""
    if tokens.dtype.itemsize != 2:
        return
    # Read as 16 bits, 32-bit tokens of a vocabulary below 65,536 are a token and a zero in turn.
    upper = tokens[1 : 2 * SHARD_TOKENS : 2]
    if len(tokens) % 2 == 0 and len(upper) >= _ENOUGH and int(upper.max()) <= (vocab_size - 1) >> 16:
        raise ValueError(
            f"{path} looks like numbers of 32 bits, because every second one is (nearly) 0: use --dtype uint32"
        )
    if vocab_size > 1 << 16:
        raise ValueError(f"{path} of 16-bit numbers cannot hold a vocabulary of {vocab_size}: use --dtype uint32")


def _plain_blocks(tokens: np.ndarray, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, document starts) of runs of whole documents, SHARD_TOKENS at a time; every document ends with `end`."""
    at = 0
    while at < len(tokens):
        block = np.asarray(tokens[at : at + SHARD_TOKENS])
        ends = np.flatnonzero(block == end)
        if at + len(block) == len(tokens):
            block = block if len(ends) and ends[-1] == len(block) - 1 else np.append(block, end)
            ends = np.flatnonzero(block == end)
        elif len(ends):  # what follows the last document end belongs to the next block
            block = block[: ends[-1] + 1]
        yield block, np.concatenate([[0], ends[:-1] + 1]) if len(ends) else np.zeros(1, np.int64)
        at += len(block)


def _megatron_documents(path: Path) -> Iterator[np.ndarray]:
    """Tokens of each document of a Megatron-LM indexed data set (version 1)."""
    index = path.with_suffix(".idx").read_bytes()
    if index[:9] != _MEGATRON_MAGIC or len(index) < 34:
        raise ValueError(f"{path.with_suffix('.idx')} is not an index of Megatron-LM")
    # Then sizes (int32), byte offsets (int64) and the first sequence of each document (int64): a document is one
    # sequence or several.
    version, code, sequences, bounds = struct.unpack_from("<QBQQ", index, 9)
    if version != 1 or code not in _MEGATRON_DTYPES:
        raise ValueError(f"{path.with_suffix('.idx')} has version {version} and type {code}, which are not known")
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    if len(index) < 34 + 12 * sequences + 8 * bounds:
        raise ValueError(f"{path.with_suffix('.idx')} is cut off")
    sizes = np.frombuffer(index, "<i4", sequences, 34)
    pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    documents = np.frombuffer(index, "<i8", bounds, 34 + 12 * sequences)
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    expected = int((pointers + sizes.astype(np.int64) * dtype.itemsize).max(initial=0))
    if expected != len(data):
        state = "cut off" if expected > len(data) else "not of its index"
        raise ValueError(f"{path} is {state}: the index expects {expected} bytes, not {len(data)}")
    # Sequences lie one after the other, and documents are rows of them: whatever else an index says is damage.
    inside = pointers.min(initial=0) >= 0 and sizes.min(initial=0) >= 0 and (pointers % dtype.itemsize == 0).all()
    ordered = len(documents) == 0 or (documents[0] >= 0 and documents[-1] <= sequences)
    if not (inside and ordered and (np.diff(documents) >= 0).all() and (np.diff(pointers) >= 0).all()):
        raise ValueError(f"{path.with_suffix('.idx')} has sequences or documents that are not in order")
    for first, last in zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True):
        if last > first:
            stop = int(pointers[last - 1]) + int(sizes[last - 1]) * dtype.itemsize
            yield data[int(pointers[first]) : stop].view(dtype)


def _megatron_blocks(path: Path, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    held: list[np.ndarray] = []
    size = 0
    for document in _megatron_documents(path):
        held.append(document if len(document) and document[-1] == end else np.append(document, end))
        size += len(held[-1])
        if size >= SHARD_TOKENS:
            yield np.concatenate(held), np.cumsum([0] + [len(one) for one in held[:-1]])
            held, size = [], 0
    if held:
        yield np.concatenate(held), np.cumsum([0] + [len(one) for one in held[:-1]])


def _write_split(folder: Path, name: str, path: Path, tokenizer: Tokenizer, dtype: str) -> dict:
    end = tokenizer.end_of_document
    if path.with_suffix(".idx").exists():
        blocks = _megatron_blocks(path, end)
    else:
        numbers = _plain(path, dtype)
        _check_width(path, numbers, tokenizer.vocab_size)
        blocks = _plain_blocks(numbers, end)
    known = range(tokenizer.vocab_size)
    lengths = np.array([0 if n in tokenizer.special else len(tokenizer.bytes_of(n)) for n in known])
    shards: list[Shard] = []
    size = 0
    for tokens, starts in blocks:
        # Checked block by block: another tokenizer or type shows in the first block, long before the end.
        if int(tokens.max()) >= tokenizer.vocab_size or int(tokens.min()) < 0:
            raise ValueError(
                f"{path} has tokens outside the vocabulary of {tokenizer.vocab_size}: another tokenizer or type?"
            )
        writer = ShardWriter(folder, f"{name}-{len(shards):05d}", tokenizer.dtype)
        writer.add(tokens, starts)
        shards.append(writer.close())
        size += int(lengths[tokens].sum())
    return split_entry(shards, size)


def convert(files: dict[str, Path], tokenizer: Tokenizer, path: Path, dtype: str = "<u2") -> TokenSet:
    """Convert token files into a token set at `path`. files: split name -> .bin (Megatron: with .idx in its folder).

    tokenizer: the one that made the tokens; dtype: of nanoGPT files, which do not say. Raises ValueError naming a file
    that is cut off, of another type or made with another tokenizer.
    """
    names = ", ".join(file.name for file in files.values())
    card = {"name": path.name, "description": f"Converted from {names}.", "sources": []}

    def fill(folder: Path) -> None:
        entries = {name: _write_split(folder, name, file, tokenizer, dtype) for name, file in files.items()}
        finish(folder, entries, tokenizer, card)

    return publish(path, fill)
