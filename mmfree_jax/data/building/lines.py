"""Reads bytes, lines and records from files and parts of files, compressed or not, one block at a time."""

import bz2
import codecs
import gzip
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmfree_jax.errors import need

BLOCK = 1 << 20  # bytes read at once
_READERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}
COMPRESSED = (*_READERS, ".zst")
_MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class InputError(ValueError):
    """Input that cannot be read; the message names the file and the place in it."""


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    zstandard = need("zstandard", "a .zst file", "zstandard")
    # A .zst file may be several frames after each other, as parallel compressors write it; the library stops at the end
    # of the first. Window sizes above 128 MB have to be allowed.
    begin = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    frame, started = begin(), False
    while block := file.read(BLOCK):
        while block:
            frame, started = (begin() if frame.eof else frame), True
            try:
                yield frame.decompress(block)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            block = frame.unused_data if frame.eof else b""
    if started and not frame.eof:
        raise EOFError("the last frame is not complete")


def _decompressed(path: str, file: BinaryIO) -> Iterator[bytes]:
    ending = Path(path).suffix.lower()
    if ending == ".zst":
        return _zstd_blocks(file)
    plain = _READERS.get(ending, lambda raw: raw)(file)
    return iter(lambda: plain.read(BLOCK), b"")


def byte_order_encoding(head: bytes) -> str | None:
    """Return utf-16 or utf-32 if a file starts with the byte-order mark of one of them, else None."""
    return next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)


def _as_utf8(stream: Iterator[bytes]) -> Iterator[bytes]:
    """Convert blocks to UTF-8 if they start with a byte-order mark of UTF-16 or UTF-32."""
    head = b""
    while len(head) < 4 and (block := next(stream, None)) is not None:
        head += block
    name = byte_order_encoding(head)
    if name is None:
        yield head
        yield from stream
        return
    decoder = codecs.getincrementaldecoder(name)()
    for block in itertools.chain([head], stream):
        yield decoder.decode(block).encode()
    decoder.decode(b"", final=True)


def blocks(path: str) -> Iterator[bytes]:
    """Yield the decompressed content of a file in blocks. UTF-16 and UTF-32 with a byte-order mark become UTF-8.

    Raises InputError when the file is cut off or damaged.
    """
    done = 0
    with open(path, "rb") as file:
        try:
            if not file.peek(1) and Path(path).suffix.lower() in COMPRESSED:
                raise EOFError("it has no bytes, which no compressed file has")
            for block in _as_utf8(_decompressed(path, file)):
                yield block
                done += len(block)
        except (EOFError, OSError, lzma.LZMAError, zlib.error, UnicodeError) as error:
            raise InputError(f"{path} is cut off or damaged after {done} bytes of content: {error}") from None


def lines(stream: Iterable[bytes], longest: int) -> Iterator[bytes]:
    """Yield lines with their ends. One of more than `longest` bytes comes in pieces, cut after a space or a
    character."""
    rest = b""
    for block in stream:
        *complete, rest = (rest + block).split(b"\n") if b"\n" in block else [rest + block]
        yield from (line + b"\n" for line in complete)
        while len(rest) > longest:
            cut = rest.rfind(b" ", 0, longest) + 1 or longest
            while cut > 1 and rest[cut] & 0xC0 == 0x80:  # in the middle of a character of UTF-8
                cut -= 1
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def records(stream: Iterable[bytes], longest: int) -> Iterator[tuple[bytes | None, int]]:
    """Yield JSON lines and their length with the end. A line longer than `longest` is None and never in memory."""
    # The rest of a line that is too long is dropped block by block and only counted, so that a broken file without line
    # ends does not fill the memory.
    rest, passed = b"", 0
    for block in stream:
        *complete, rest = (rest + block).split(b"\n") if b"\n" in block else [rest + block]
        for line in complete:
            yield None if passed else line, passed + len(line) + 1
            passed = 0
        if passed or len(rest) > longest:
            rest, passed = b"", passed + len(rest)
    if rest or passed:
        yield None if passed else rest, passed + len(rest)


def line_start(file: BinaryIO, at: int, whole_lines: bool) -> int:
    """Return the offset of the first line that begins at byte `at` or later.

    Or that of a word, if the next BLOCK bytes have no line end and whole lines are not needed.
    """
    done = max(at - 1, 0)
    file.seek(done)
    while at and (block := file.read(BLOCK)):
        found = block.find(b"\n")
        if found < 0 and not whole_lines:
            found = block.find(b" ")
        if found >= 0:
            return done + found + 1
        done += len(block)
    return done


def range_blocks(path: str, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes [start, stop) of a file in blocks."""
    with open(path, "rb") as file:
        file.seek(start)
        while start < stop and (block := file.read(min(BLOCK, stop - start))):
            yield block
            start += len(block)


def line_number(path: str, offset: int) -> int:
    """Return the number, from 1, of the line that begins at byte `offset`."""
    # Counted only for an error message: a slice of a file knows its bytes, and a person looks for a line.
    with open(path, "rb") as file:
        return 1 + sum(file.read(min(BLOCK, offset - at)).count(b"\n") for at in range(0, offset, BLOCK))
