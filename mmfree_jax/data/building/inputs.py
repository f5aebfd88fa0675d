"""Documents out of files: plain text and JSON lines (also compressed), Parquet, Hugging Face datasets.

Input is cut into units that do not depend on how many processes read them. Every error names the file and the place.
Text and JSON lines are read block by block: a long text file becomes documents of PART_BYTES, cut at blank lines, else
at ends of lines, else between words; a JSON line above LONGEST_RECORD is a bad record. Text is UTF-8, or UTF-16 or
UTF-32 with a byte-order mark; a file with a larger share of other characters than MOST_REPLACED is refused.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.data.building.lines import (
    COMPRESSED,
    InputError,
    blocks,
    byte_order_encoding,
    line_number,
    line_start,
    lines,
    range_blocks,
    records,
)
from mmfree_jax.data.building.text import repair
from mmfree_jax.errors import need

UNIT_BYTES = 64_000_000  # bytes of input in a unit: about ten seconds of work, a shard of about 40 MB
LARGE_TEXT = 1_000_000  # a larger text file becomes several documents, so that some of it can be held out
PART_BYTES = 65_536  # bytes of a document cut out of a large text file
LONGEST_RECORD = 64_000_000  # bytes of a JSON line; a worker can hold several of them
MOST_REPLACED = 1e-3  # largest share of a file's or document's characters that may not be UTF-8
_TEXT, _JSON = (".txt", ".md", ".rst", ".text"), (".jsonl", ".ndjson")
_BARE_JSON = ".json"  # read as JSON lines if compressed or named; in folders such files mostly describe the others
_ENDINGS = (
    "use .txt, .md, .rst, .jsonl or .parquet; text and JSON lines also with .gz, .zst, .xz or .bz2; a "
    ".json file is read as JSON lines when it is named itself"
)
HUGGING_FACE = "hf:"


@dataclass(frozen=True)
class Unit:
    """A part of the input that one worker reads: whole files, or [start, stop) of one.

    The range counts bytes of JSON lines and of large plain text, row groups of Parquet, shards
    of a Hugging Face dataset.
    """

    kind: str
    files: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    split: str | None = None  # the split of its documents; None: drawn by lot


@dataclass(frozen=True)
class Reading:
    """How documents are taken from records."""

    key: str = "text"  # the field of a JSON object or Parquet row that holds the text
    skip_bad: bool = False  # leave out bad records and count them, instead of failing at the first


def _kind(path: Path, named: bool = True) -> str | None:
    """The kind of a file by its ending; None if it is unknown. `named`: the user named the file itself, not its
    folder."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = len(suffixes) > 1 and suffixes[-1] in COMPRESSED
    last = suffixes[-2] if compressed else suffixes[-1] if suffixes else ""
    if last == _BARE_JSON and (compressed or named):
        return "jsonl"
    kinds = {"text": _TEXT, "jsonl": _JSON, "parquet": (".parquet",)}
    return next((kind for kind, endings in kinds.items() if last in endings), None)


def _slices(kind: str, path: str, total: int, step: int) -> list[Unit]:
    return [Unit(kind, (path,), start, min(start + step, total)) for start in range(0, total, step)]


def _units_of_file(path: Path, kind: str) -> list[Unit]:
    size = path.stat().st_size
    large = kind == "jsonl" or (kind == "text" and size > LARGE_TEXT)
    if large and path.suffix.lower() not in COMPRESSED:
        with path.open("rb") as file:  # in UTF-16 and UTF-32 a single byte does not show the end of a line
            if byte_order_encoding(file.read(4)) is None:
                return _slices(kind, str(path), size, UNIT_BYTES)
    if kind == "parquet":
        groups = _parquet_file(str(path)).metadata.num_row_groups
        return _slices(kind, str(path), groups, max(1, groups * UNIT_BYTES // max(size, 1)))
    return [Unit(kind, (str(path),))]


def _files(path: Path, note: Callable[[str], None]) -> list[Path]:
    # Hidden files are often no input, such as the `._NAME` that macOS stores with each NAME.
    hidden = lambda file: any(p.startswith(".") or p == "__MACOSX" for p in file.relative_to(path).parts)
    if path.is_dir():
        every = sorted(file for file in path.rglob("*") if file.is_file())
        found = [file for file in every if _kind(file, named=False) and not hidden(file)]
        if not found:
            raise InputError(f"{path} holds no file that can be read: {_ENDINGS}")
        if len(found) < len(every):
            endings = Counter(
                "hidden" if hidden(file) else "".join(file.suffixes[-2:]) or file.name
                for file in sorted(set(every) - set(found))
            )
            listed = ", ".join(f"{ending} ({count})" for ending, count in endings.most_common(9))
            note(f"{path}: left out {endings.total()} files: {listed}{', …' * (len(endings) > 9)}")
        return found
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if _kind(path) is None:
        raise InputError(f"{path} has an unknown ending: {_ENDINGS}")
    return [path]


def plan(inputs: Sequence[str], note: Callable[[str], None] = lambda line: None) -> list[Unit]:
    """Cut files, folders (with everything in them, sorted) and `hf:NAME[:CONFIG]` datasets into units, in this order.

    `note` is called with a line for each folder with files that are not read: hidden ones, and of unknown endings.
    Raises InputError for what does not exist or has an unknown ending.
    """
    units: list[Unit] = []
    for name in inputs:
        if name.startswith(HUGGING_FACE):
            dataset = name.removeprefix(HUGGING_FACE)
            units += _slices("hf", dataset, _dataset(dataset).num_shards, 1)
            continue
        for path in _files(Path(name), note):
            units += _units_of_file(path, str(_kind(path)))
    return _together(units)


def _together(units: Sequence[Unit]) -> list[Unit]:
    """Join neighbouring small text files into one unit."""
    merged: list[Unit] = []
    room: int | None = None  # bytes left in the last unit; None: it takes no more files, not even empty ones
    for unit in units:
        # A folder of a million small files would be a million units, each a process and a shard.
        entire = unit.kind == "text" and unit.stop is None
        size = Path(unit.files[0]).stat().st_size if entire else 0
        if entire and room is not None and size <= room:
            merged[-1] = Unit("text", (*merged[-1].files, *unit.files))
            room -= size
        else:
            merged.append(unit)
            room = UNIT_BYTES - size if entire else None
    return merged


def _text_documents(pieces: Iterator[bytes], is_slice: bool) -> Iterator[bytes]:
    """One document; from a large file or a slice of one, documents of PART_BYTES, cut at blank lines."""
    held: list[bytes] = []
    size = 0
    # Only the file's size tells whether it is one document, and a compressed file's is known at its end: hold lines
    # back until it is too large to be one.
    while not is_slice and size <= LARGE_TEXT:
        line = next(pieces, None)
        if line is None:
            yield b"".join(held).removesuffix(b"\n")
            return
        held.append(line)
        size += len(line)
    part: list[bytes] = []
    size = 0
    for line in itertools.chain(held, pieces):
        part.append(line)
        size += len(line)
        if size >= 2 * PART_BYTES or (size >= PART_BYTES and not line.strip()):
            yield b"".join(part).removesuffix(b"\n")
            part, size = [], 0
    if part:
        yield b"".join(part).removesuffix(b"\n")


def _slice_range(unit: Unit, whole_lines: bool) -> tuple[int, int]:
    """Where in the file the lines begin and end that start in the unit's range."""
    # A line belongs to the unit in which it begins, so neighbours share a file without knowing of each other.
    assert unit.stop is not None
    with open(unit.files[0], "rb") as file:
        return line_start(file, unit.start, whole_lines), line_start(file, unit.stop, whole_lines)


def _text_of(record: Any, key: str) -> str | bytes:
    """Return the text in a row, or in bytes that hold one as JSON. Raises ValueError if there is none."""
    if isinstance(record, bytes):  # what is not UTF-8 becomes surrogates, because it matters only in the text itself
        record = json.loads(record.decode("utf-8-sig", "surrogateescape"))
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if key not in record:
        raise ValueError(f"no field {key!r}, only {', '.join(map(repr, list(record)[:9]))}")
    if not isinstance(record[key], str | bytes):
        raise ValueError(f"field {key!r} is not text but of type {type(record[key]).__name__}")
    return record[key]


class Documents:
    """An iterator over the texts of a unit.

    `bad` lists the records that were left out, as `FILE, line N: why`. `replaced` counts the characters of the other
    records that stand for bytes which are not UTF-8.
    """

    def __init__(self, unit: Unit, reading: Reading):
        self.unit, self.reading = unit, reading
        self.bad: list[str] = []
        self.replaced = 0

    def __iter__(self) -> Iterator[str]:
        file, replaced, characters = "", 0, 0
        for found, place, raw in READERS[self.unit.kind](self.unit, self.reading.key, self._refuse):
            if found != file:
                self._check_encoding(file, replaced, characters)
                file, replaced, characters = found, 0, 0
            text, lost = repair(raw)
            if self.reading.skip_bad and lost > MOST_REPLACED * len(text):
                self.bad.append(f"{found}{place}: {lost} of {len(text)} characters are not UTF-8")
                continue
            replaced, characters = replaced + lost, characters + len(text)
            self.replaced += lost
            yield text
        self._check_encoding(file, replaced, characters)

    def _check_encoding(self, file: str, replaced: int, characters: int) -> None:
        if replaced > MOST_REPLACED * characters:
            raise InputError(
                f"{file} is not UTF-8: {replaced} of {characters} characters cannot be read; convert it (iconv), or "
                "let --skip-bad leave out documents with such characters"
            )

    def _refuse(self, where: str, error: Exception) -> None:
        if not self.reading.skip_bad:
            raise InputError(f"{where}: {error} (--skip-bad leaves such records out)")
        self.bad.append(f"{where}: {error}")


# The readers of each kind of unit yield file, place in it (for messages), and text or UTF-8 bytes of each document.
Found = Iterator[tuple[str, str, str | bytes]]
Refuse = Callable[[str, Exception], None]  # told of each bad record: where it is, and what is wrong


def _read_text(unit: Unit, key: str, refuse: Refuse) -> Found:
    is_slice = unit.stop is not None
    for file in unit.files:
        stream = range_blocks(file, *_slice_range(unit, whole_lines=False)) if is_slice else blocks(file)
        for number, text in enumerate(_text_documents(lines(stream, PART_BYTES), is_slice), 1):
            yield file, f", document {number} from byte {unit.start}", text


def _read_jsonl(unit: Unit, key: str, refuse: Refuse) -> Found:
    path, is_slice = unit.files[0], unit.stop is not None
    offset, stop = _slice_range(unit, whole_lines=True) if is_slice else (0, 0)
    stream = range_blocks(path, offset, stop) if is_slice else blocks(path)
    for number, (line, size) in enumerate(records(stream, LONGEST_RECORD), 1):
        try:
            if line is None:
                most = f"{LONGEST_RECORD / 1e6:.0f} MB"
                raise ValueError(
                    f"a record of {size / 1e6:.0f} MB, more than {most}: such a document needs a text file"
                )
            if line.strip():
                text = _text_of(line, key)
                yield path, f", byte {offset}" if is_slice else f", line {number}", text
        except (ValueError, RecursionError) as error:
            refuse(f"{path}, line {line_number(path, offset) if is_slice else number}", error)
        offset += size


def _read_parquet(unit: Unit, key: str, refuse: Refuse) -> Found:
    path = unit.files[0]
    table = _parquet_file(path)
    try:
        if key not in table.schema_arrow.names:
            raise InputError(f"{path} has no column {key!r}, only {', '.join(table.schema_arrow.names)}")
        stop = unit.stop or table.metadata.num_row_groups
        row = sum(table.metadata.row_group(i).num_rows for i in range(unit.start))
        for batch in table.iter_batches(1024, row_groups=list(range(unit.start, stop)), columns=[key]):
            for number, text in enumerate(_bytes_where_text(batch.column(0)).to_pylist(), row):
                if isinstance(text, str | bytes):
                    yield path, f", row {number}", text
                elif text is not None:
                    why = f"column {key!r} holds {batch.schema.field(0).type}, which is not text"
                    refuse(f"{path}, row {number}", ValueError(why))
            row += batch.num_rows
    except (need("pyarrow", "Parquet", "pyarrow").ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{path} is cut off or damaged: {error}") from None


def _read_dataset(unit: Unit, key: str, refuse: Refuse) -> Found:
    dataset = _dataset(unit.files[0])
    source = f"{HUGGING_FACE}{unit.files[0]}, shard {unit.start}"
    for number, row in enumerate(dataset.shard(num_shards=dataset.num_shards, index=unit.start)):
        try:
            text = _text_of(row, key)
        except ValueError as error:
            refuse(f"{source}, row {number}", error)
        else:
            yield source, f", row {number}", text


READERS: dict[str, Callable[[Unit, str, Refuse], Found]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "hf": _read_dataset,
}


def _bytes_where_text(column: Any) -> Any:
    """Convert an Arrow array of text to bytes, which need not be UTF-8. Other types stay as they are."""
    arrow = need("pyarrow", "Parquet", "pyarrow")
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    text = arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)
    return column.cast(arrow.large_binary()) if text else column


def _parquet_file(path: str) -> Any:
    module = need("pyarrow.parquet", "Parquet", "pyarrow")
    try:
        return module.ParquetFile(path)
    except (need("pyarrow", "Parquet", "pyarrow").ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{path} is cut off or damaged: {error}") from None


def _dataset(name: str) -> Any:
    repository, _, config = name.partition(":")
    module = need("datasets", "a Hugging Face dataset", "datasets")
    return module.load_dataset(repository, config or None, split="train", streaming=True)
