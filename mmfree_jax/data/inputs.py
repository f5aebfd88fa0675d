"""Documents out of files: plain text, JSON lines (also compressed), Parquet, ArrayRecord, Hugging Face datasets.

Input is cut into units that do not depend on how many processes read them. Every error names the file and the place.
Text and JSON lines are never held whole: a long text file becomes documents of PART_BYTES, cut at blank lines, else at
ends of lines, else between words; a JSON line above LONGEST_RECORD is a bad record.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.data.lines import InputError, blocks, line_number, line_start, lines, need, range_blocks, records
from mmfree_jax.data.text import decode

UNIT_BYTES = 64_000_000  # of input in a unit: some ten seconds of work, a shard of about 40 MB
LARGE_TEXT = 1_000_000  # bytes of a text file that are one document; of a larger one nothing could be held out
PART_BYTES = 65_536  # of a document cut out of a large text file
LONGEST_RECORD = 64_000_000  # bytes of a JSON line: what one worker can hold several times over
_TEXT, _JSON = (".txt", ".md", ".rst", ".text"), (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zst", ".xz")
_ENDINGS = "use .txt, .md, .rst, .jsonl, .parquet or .array_record; text and JSON lines also with .gz, .zst or .xz"
_PARQUET, _ARRAY_RECORD = (".parquet",), (".array_record", ".arrayrecord")
HUGGING_FACE = "hf:"


@dataclass(frozen=True)
class Unit:
    """A part of the input that one worker reads: whole files, or [start, stop) of one.

    The range counts bytes of JSON lines and of large plain text, row groups of Parquet, records of ArrayRecord, shards
    of a Hugging Face dataset.
    """

    kind: str
    files: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    split: str | None = None  # where its documents go; by lot when not given


@dataclass(frozen=True)
class Reading:
    """How documents are taken out of records."""

    key: str = "text"  # the field of a JSON object or Parquet row that holds the text
    skip_bad: bool = False  # leave out bad records and count them, instead of failing at the first


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED else suffixes[-1] if suffixes else ""
    kinds = {"text": _TEXT, "jsonl": _JSON, "parquet": _PARQUET, "arrayrecord": _ARRAY_RECORD}
    return next((kind for kind, endings in kinds.items() if last in endings), None)


def _slices(kind: str, path: str, total: int, step: int) -> list[Unit]:
    return [Unit(kind, (path,), start, min(start + step, total)) for start in range(0, total, step)]


def _units_of_file(path: Path, kind: str) -> list[Unit]:
    size = path.stat().st_size
    if (kind == "jsonl" or (kind == "text" and size > LARGE_TEXT)) and path.suffix.lower() not in _COMPRESSED:
        return _slices(kind, str(path), size, UNIT_BYTES)
    if kind == "parquet":
        groups = _parquet_file(str(path)).metadata.num_row_groups
        return _slices(kind, str(path), groups, max(1, groups * UNIT_BYTES // max(size, 1)))
    if kind == "arrayrecord":
        count = _array_record(str(path)).num_records()
        return _slices(kind, str(path), count, max(1, count * UNIT_BYTES // max(size, 1)))
    return [Unit(kind, (str(path),))]


def _units_of_dataset(name: str) -> list[Unit]:
    return [Unit("hf", (name,), i, i + 1) for i in range(_dataset(name).num_shards)]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
        if not found:
            raise InputError(f"{path} holds no file that can be read: {_ENDINGS}")
        return found
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if _kind(path) is None:
        raise InputError(f"{path} has an unknown ending: {_ENDINGS}")
    return [path]


def plan(inputs: Sequence[str]) -> list[Unit]:
    """Units of files, folders (searched through, in sorted order) and `hf:NAME[:CONFIG]` datasets, in the order given.

    Raises InputError for what does not exist or has an unknown ending.
    """
    units: list[Unit] = []
    for name in inputs:
        if name.startswith(HUGGING_FACE):
            units += _units_of_dataset(name.removeprefix(HUGGING_FACE))
            continue
        for path in _files(Path(name)):
            units += _units_of_file(path, str(_kind(path)))
    return _together(units)


def _together(units: Sequence[Unit]) -> list[Unit]:
    """Neighbouring small text files as one unit."""
    merged: list[Unit] = []
    room = 0
    for unit in units:
        whole = unit.kind == "text" and unit.stop is None
        size = Path(unit.files[0]).stat().st_size if whole else UNIT_BYTES
        if whole and size <= room:
            merged[-1] = Unit("text", (*merged[-1].files, *unit.files))
            room -= size
        else:
            merged.append(unit)
            room = UNIT_BYTES - size if whole else 0
    return merged


def _text_documents(pieces: Iterator[bytes], is_slice: bool) -> Iterator[str]:
    """One document; or, of a large file or a slice of one, documents of PART_BYTES cut at blank lines."""
    held: list[bytes] = []
    size = 0
    while not is_slice and size <= LARGE_TEXT:
        line = next(pieces, None)
        if line is None:
            yield decode(b"".join(held).removesuffix(b"\n"))
            return
        held.append(line)
        size += len(line)
    for part in _parts(itertools.chain(held, pieces)):
        yield decode(b"".join(part).removesuffix(b"\n"))


def _parts(pieces: Iterable[bytes]) -> Iterator[list[bytes]]:
    part: list[bytes] = []
    size = 0
    for line in pieces:
        part.append(line)
        size += len(line)
        if size >= 2 * PART_BYTES or (size >= PART_BYTES and not line.strip()):
            yield part
            part, size = [], 0
    if part:
        yield part


def _slice_range(unit: Unit, whole_lines: bool) -> tuple[int, int]:
    """Where the lines that begin in the unit's range begin and end in the file."""
    assert unit.stop is not None
    with open(unit.files[0], "rb") as file:
        return line_start(file, unit.start, whole_lines), line_start(file, unit.stop, whole_lines)


def _text_of(record: Any, key: str) -> str:
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if key not in record:
        raise ValueError(f"no field {key!r}, only {', '.join(map(repr, list(record)[:9]))}")
    if not isinstance(record[key], str):
        raise ValueError(f"field {key!r} is not text")
    return record[key]


def _text_of_line(line: bytes | None, size: int, key: str) -> str | None:
    """The text of a JSON line; None for a blank one."""
    if line is None:
        most = f"{LONGEST_RECORD / 1e6:.0f} MB"
        raise ValueError(f"a record of {size / 1e6:.0f} MB, more than {most}: a document that long needs a text file")
    return _text_of(json.loads(decode(line)), key) if line.strip() else None


class Documents:
    """An iterator over the texts of a unit; `bad` lists the records left out, as `FILE, line N: why`."""

    def __init__(self, unit: Unit, reading: Reading):
        self.unit, self.reading = unit, reading
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return getattr(self, f"_{self.unit.kind}")()

    def _refuse(self, where: str, error: Exception) -> None:
        if not self.reading.skip_bad:
            raise InputError(f"{where}: {error} (such records can be skipped on request)")
        self.bad.append(f"{where}: {error}")

    def _text(self) -> Iterator[str]:
        sliced = self.unit.stop is not None
        for file in self.unit.files:
            stream = range_blocks(file, *_slice_range(self.unit, whole_lines=False)) if sliced else blocks(file)
            yield from _text_documents(lines(stream, PART_BYTES), is_slice=sliced)

    def _jsonl(self) -> Iterator[str]:
        path, sliced = self.unit.files[0], self.unit.stop is not None
        offset, stop = _slice_range(self.unit, whole_lines=True) if sliced else (0, 0)
        stream = range_blocks(path, offset, stop) if sliced else blocks(path)
        for number, (line, size) in enumerate(records(stream, LONGEST_RECORD), 1):
            try:
                text = _text_of_line(line, size, self.reading.key)
            except (ValueError, RecursionError) as error:
                self._refuse(f"{path}, line {line_number(path, offset) if sliced else number}", error)
            else:
                if text is not None:
                    yield text
            offset += size

    def _parquet(self) -> Iterator[str]:
        path = self.unit.files[0]
        table = _parquet_file(path)
        try:
            if self.reading.key not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise InputError(f"{path} has no column {self.reading.key!r}, only {names}")
            groups = list(range(self.unit.start, self.unit.stop or table.metadata.num_row_groups))
            for batch in table.iter_batches(1024, row_groups=groups, columns=[self.reading.key]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
        except need("pyarrow", "pyarrow", "Parquet").ArrowException as error:
            raise InputError(f"{path} is cut off or damaged: {error}") from None

    def _arrayrecord(self) -> Iterator[str]:
        path = self.unit.files[0]
        reader = _array_record(path)
        for number in range(self.unit.start, self.unit.stop or reader.num_records()):
            record = decode(reader.read([number])[0])
            try:
                yield _text_of(json.loads(record), self.reading.key) if record.startswith("{") else record
            except ValueError as error:
                self._refuse(f"{path}, record {number}", error)

    def _hf(self) -> Iterator[str]:
        name = self.unit.files[0]
        whole = _dataset(name)
        for number, row in enumerate(whole.shard(num_shards=whole.num_shards, index=self.unit.start)):
            try:
                yield _text_of(row, self.reading.key)
            except ValueError as error:
                self._refuse(f"{HUGGING_FACE}{name}, shard {self.unit.start}, row {number}", error)


def _parquet_file(path: str) -> Any:
    module = need("pyarrow.parquet", "pyarrow", "Parquet")
    try:
        return module.ParquetFile(path)
    except need("pyarrow", "pyarrow", "Parquet").ArrowException as error:
        raise InputError(f"{path} is cut off or damaged: {error}") from None


def _array_record(path: str) -> Any:
    module = need("array_record.python.array_record_module", "array_record", "ArrayRecord")
    return module.ArrayRecordReader(path)


def _dataset(name: str) -> Any:
    repository, _, config = name.partition(":")
    module = need("datasets", "datasets", "a Hugging Face dataset")
    return module.load_dataset(repository, config or None, split="train", streaming=True)
