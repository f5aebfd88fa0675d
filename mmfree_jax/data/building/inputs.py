"""Documents out of files: plain text and JSON lines (also compressed), Parquet, ArrayRecord, Hugging Face datasets.

Input is cut into units that do not depend on how many processes read them. Every error names the file and the place.
Text and JSON lines are never held whole: a long text file becomes documents of PART_BYTES, cut at blank lines, else at
ends of lines, else between words; a JSON line above LONGEST_RECORD is a bad record. Text is UTF-8, or UTF-16 or UTF-32
with a byte-order mark; a file with a larger share of other characters than MOST_REPLACED is refused.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.data.building.lines import (
    COMPRESSED,
    InputError,
    blocks,
    line_number,
    line_start,
    lines,
    marked,
    need,
    range_blocks,
    records,
)
from mmfree_jax.data.building.text import mended

UNIT_BYTES = 64_000_000  # of input in a unit: some ten seconds of work, a shard of about 40 MB
LARGE_TEXT = 1_000_000  # bytes of a text file that are one document; of a larger one nothing could be held out
PART_BYTES = 65_536  # of a document cut out of a large text file
LONGEST_RECORD = 64_000_000  # bytes of a JSON line: what one worker can hold several times over
MOST_REPLACED = 1e-3  # largest share of a file's or document's characters that may not be UTF-8
_TEXT, _JSON = (".txt", ".md", ".rst", ".text"), (".jsonl", ".ndjson")
_BARE_JSON = ".json"  # JSON lines where it is compressed or named; in a folder most such files only describe the others
_ENDINGS = (
    "use .txt, .md, .rst, .jsonl, .parquet or .array_record; text and JSON lines also with .gz, .zst, .xz or .bz2; a "
    ".json file is read as JSON lines when it is named itself"
)
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


def _kind(path: Path, named: bool = True) -> str | None:
    """The kind of a file by its ending, None if it is unknown. `named`: the user named it, and it was not found in a
    folder."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = len(suffixes) > 1 and suffixes[-1] in COMPRESSED
    last = suffixes[-2] if compressed else suffixes[-1] if suffixes else ""
    if last == _BARE_JSON and (compressed or named):
        return "jsonl"
    kinds = {"text": _TEXT, "jsonl": _JSON, "parquet": _PARQUET, "arrayrecord": _ARRAY_RECORD}
    return next((kind for kind, endings in kinds.items() if last in endings), None)


def _slices(kind: str, path: str, total: int, step: int) -> list[Unit]:
    return [Unit(kind, (path,), start, min(start + step, total)) for start in range(0, total, step)]


def _units_of_file(path: Path, kind: str) -> list[Unit]:
    size = path.stat().st_size
    large = kind == "jsonl" or (kind == "text" and size > LARGE_TEXT)
    if large and path.suffix.lower() not in COMPRESSED and not _is_marked(path):
        return _slices(kind, str(path), size, UNIT_BYTES)
    if kind == "parquet":
        groups = _parquet_file(str(path)).metadata.num_row_groups
        return _slices(kind, str(path), groups, max(1, groups * UNIT_BYTES // max(size, 1)))
    if kind == "arrayrecord":
        count = _array_record(str(path)).num_records()
        return _slices(kind, str(path), count, max(1, count * UNIT_BYTES // max(size, 1)))
    return [Unit(kind, (str(path),))]


def _is_marked(path: Path) -> bool:
    """Whether a file starts with a mark of UTF-16 or UTF-32, where a single byte does not show a line's end."""
    with path.open("rb") as file:
        return marked(file.read(4)) is not None


def _units_of_dataset(name: str) -> list[Unit]:
    return [Unit("hf", (name,), i, i + 1) for i in range(_dataset(name).num_shards)]


def _hidden(path: Path) -> bool:
    """Whether a path inside a folder is hidden, as the `._NAME` that macOS keeps beside each NAME."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _left_out(folder: Path, files: Iterable[Path]) -> str:
    """One line on files of a folder that are not read: how many of each ending."""
    endings = Counter("hidden" if _hidden(f.relative_to(folder)) else "".join(f.suffixes[-2:]) or f.name for f in files)
    listed = ", ".join(f"{ending} ({count})" for ending, count in endings.most_common(9))
    return f"{folder}: left out {endings.total()} files: {listed}{', …' * (len(endings) > 9)}"


def _files(path: Path, note: Callable[[str], None]) -> list[Path]:
    if path.is_dir():
        every = sorted(file for file in path.rglob("*") if file.is_file())
        found = [file for file in every if _kind(file, named=False) and not _hidden(file.relative_to(path))]
        if not found:
            raise InputError(f"{path} holds no file that can be read: {_ENDINGS}")
        if len(found) < len(every):
            note(_left_out(path, sorted(set(every) - set(found))))
        return found
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if _kind(path) is None:
        raise InputError(f"{path} has an unknown ending: {_ENDINGS}")
    return [path]


def plan(inputs: Sequence[str], note: Callable[[str], None] = lambda line: None) -> list[Unit]:
    """Units of files, folders (searched through, in sorted order) and `hf:NAME[:CONFIG]` datasets, in the order given.

    `note` is called with a line for each folder that holds files which are not read: of unknown endings, or hidden.
    Raises InputError for what does not exist or has an unknown ending.
    """
    units: list[Unit] = []
    for name in inputs:
        if name.startswith(HUGGING_FACE):
            units += _units_of_dataset(name.removeprefix(HUGGING_FACE))
            continue
        for path in _files(Path(name), note):
            units += _units_of_file(path, str(_kind(path)))
    return _together(units)


def _together(units: Sequence[Unit]) -> list[Unit]:
    """Neighbouring small text files as one unit."""
    merged: list[Unit] = []
    room: int | None = None  # of the last unit; None: it takes no more files, not even empty ones
    for unit in units:
        whole = unit.kind == "text" and unit.stop is None
        size = Path(unit.files[0]).stat().st_size if whole else 0
        if whole and room is not None and size <= room:
            merged[-1] = Unit("text", (*merged[-1].files, *unit.files))
            room -= size
        else:
            merged.append(unit)
            room = UNIT_BYTES - size if whole else None
    return merged


def _text_documents(pieces: Iterator[bytes], is_slice: bool) -> Iterator[bytes]:
    """One document; or, of a large file or a slice of one, documents of PART_BYTES cut at blank lines."""
    held: list[bytes] = []
    size = 0
    while not is_slice and size <= LARGE_TEXT:
        line = next(pieces, None)
        if line is None:
            yield b"".join(held).removesuffix(b"\n")
            return
        held.append(line)
        size += len(line)
    for part in _parts(itertools.chain(held, pieces)):
        yield b"".join(part).removesuffix(b"\n")


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


def _text_of(record: Any, key: str) -> str | bytes:
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if key not in record:
        raise ValueError(f"no field {key!r}, only {', '.join(map(repr, list(record)[:9]))}")
    if not isinstance(record[key], str | bytes):
        raise ValueError(f"field {key!r} is not text but of type {type(record[key]).__name__}")
    return record[key]


def _parsed(data: bytes) -> Any:
    """Parse JSON. Bytes that are not UTF-8 become surrogates, for only those in the text matter."""
    return json.loads(data.decode("utf-8-sig", "surrogateescape"))


def _text_of_line(line: bytes | None, size: int, key: str) -> str | bytes | None:
    """The text of a JSON line; None for a blank one."""
    if line is None:
        most = f"{LONGEST_RECORD / 1e6:.0f} MB"
        raise ValueError(f"a record of {size / 1e6:.0f} MB, more than {most}: a document that long needs a text file")
    return _text_of(_parsed(line), key) if line.strip() else None


def _is_spoilt(replaced: int, characters: int) -> bool:
    return replaced > MOST_REPLACED * characters


class Documents:
    """An iterator over the texts of a unit.

    `bad` lists the records left out, as `FILE, line N: why`. `replaced` counts the characters of the other records that
    stand for bytes which are not UTF-8.
    """

    def __init__(self, unit: Unit, reading: Reading):
        self.unit, self.reading = unit, reading
        self.bad: list[str] = []
        self.replaced = 0

    def __iter__(self) -> Iterator[str]:
        file, replaced, characters = "", 0, 0
        for found, where, raw in getattr(self, f"_{self.unit.kind}")():
            if found != file:
                self._check_encoding(file, replaced, characters)
                file, replaced, characters = found, 0, 0
            text, lost = mended(raw)
            if self.reading.skip_bad and _is_spoilt(lost, len(text)):
                self.bad.append(f"{found}{where}: {lost} of {len(text)} characters are not UTF-8")
                continue
            replaced, characters = replaced + lost, characters + len(text)
            self.replaced += lost
            yield text
        self._check_encoding(file, replaced, characters)

    def _check_encoding(self, file: str, replaced: int, characters: int) -> None:
        if _is_spoilt(replaced, characters):
            raise InputError(
                f"{file} is not UTF-8: {replaced} of {characters} characters cannot be read; convert it (iconv), or "
                "let --skip-bad leave out documents with such characters"
            )

    def _refuse(self, where: str, error: Exception) -> None:
        if not self.reading.skip_bad:
            raise InputError(f"{where}: {error} (--skip-bad leaves such records out)")
        self.bad.append(f"{where}: {error}")

    def _text(self) -> Iterator[tuple[str, str, str | bytes]]:
        """Yield file, place in it (for messages), and text or UTF-8 bytes of each document; so do the other kinds."""
        sliced = self.unit.stop is not None
        for file in self.unit.files:
            stream = range_blocks(file, *_slice_range(self.unit, whole_lines=False)) if sliced else blocks(file)
            for number, text in enumerate(_text_documents(lines(stream, PART_BYTES), is_slice=sliced), 1):
                yield file, f", document {number} from byte {self.unit.start}", text

    def _jsonl(self) -> Iterator[tuple[str, str, str | bytes]]:
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
                    yield path, f", byte {offset}" if sliced else f", line {number}", text
            offset += size

    def _parquet(self) -> Iterator[tuple[str, str, str | bytes]]:
        path, key = self.unit.files[0], self.reading.key
        table = _parquet_file(path)
        try:
            if key not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise InputError(f"{path} has no column {key!r}, only {names}")
            stop = self.unit.stop or table.metadata.num_row_groups
            row = sum(table.metadata.row_group(i).num_rows for i in range(self.unit.start))
            for batch in table.iter_batches(1024, row_groups=list(range(self.unit.start, stop)), columns=[key]):
                for number, text in enumerate(_bytes_where_text(batch.column(0)).to_pylist(), row):
                    if isinstance(text, str | bytes):
                        yield path, f", row {number}", text
                    elif text is not None:
                        why = f"column {key!r} holds {batch.schema.field(0).type}, which is not text"
                        self._refuse(f"{path}, row {number}", ValueError(why))
                row += batch.num_rows
        except need("pyarrow", "pyarrow", "Parquet").ArrowException as error:
            raise InputError(f"{path} is cut off or damaged: {error}") from None

    def _arrayrecord(self) -> Iterator[tuple[str, str, str | bytes]]:
        path = self.unit.files[0]
        reader = _array_record(path)
        for number in range(self.unit.start, self.unit.stop or reader.num_records()):
            try:
                record = reader.read([number])[0]
            except RuntimeError as error:
                raise InputError(f"{path} is damaged at record {number}: {error}") from None
            try:
                text = _text_of(_parsed(record), self.reading.key) if record.startswith(b"{") else record
            except (ValueError, RecursionError) as error:
                self._refuse(f"{path}, record {number}", error)
            else:
                yield path, f", record {number}", text

    def _hf(self) -> Iterator[tuple[str, str, str | bytes]]:
        name = self.unit.files[0]
        whole = _dataset(name)
        source = f"{HUGGING_FACE}{name}, shard {self.unit.start}"
        for number, row in enumerate(whole.shard(num_shards=whole.num_shards, index=self.unit.start)):
            try:
                text = _text_of(row, self.reading.key)
            except ValueError as error:
                self._refuse(f"{source}, row {number}", error)
            else:
                yield source, f", row {number}", text


def _bytes_where_text(column: Any) -> Any:
    """An Arrow array of text as one of bytes, which need not be UTF-8; of any other type, as it is."""
    arrow = need("pyarrow", "pyarrow", "Parquet")
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    text = arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)
    return column.cast(arrow.large_binary()) if text else column


def _parquet_file(path: str) -> Any:
    module = need("pyarrow.parquet", "pyarrow", "Parquet")
    try:
        return module.ParquetFile(path)
    except need("pyarrow", "pyarrow", "Parquet").ArrowException as error:
        raise InputError(f"{path} is cut off or damaged: {error}") from None


def _array_record(path: str) -> Any:
    module = need("array_record.python.array_record_module", "array_record", "ArrayRecord")
    reader = module.ArrayRecordReader(path)
    if not reader.ok():  # it would be taken for one without records
        raise InputError(f"{path} is cut off, or no ArrayRecord file")
    return reader


def _dataset(name: str) -> Any:
    repository, _, config = name.partition(":")
    module = need("datasets", "datasets", "a Hugging Face dataset")
    return module.load_dataset(repository, config or None, split="train", streaming=True)
