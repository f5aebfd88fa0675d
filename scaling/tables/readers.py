"""Tables as rows of plain values, from every place that runs are kept: CSV, JSONL, Parquet, sweep directories, local
Weights & Biases folders and TensorBoard logs. Nothing is ever unpickled."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

RUN_NAMES = {"Name": "run_id", "State": "state"}  # the fixed headings of a Weights & Biases runs table


DECIMAL_COMMA = re.compile(r"^(\s*-?\d+),(\d+\s*)$")


class ScalingError(ValueError):
    """A fault in the input that the user can mend; the message is one line that says how."""


def read_rows(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Raw rows of a table and the SHA-256 of the bytes that they came from."""
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise ScalingError(f"no such file or directory: {path}")
    data = path.read_bytes()
    digest, name = hashlib.sha256(data).hexdigest(), path.name.lower()
    if name.endswith(".gz"):
        try:
            data, name = gzip.decompress(data), name.removesuffix(".gz")
        except (OSError, EOFError, zlib.error) as error:
            raise ScalingError(f"{path.name} is not gzip: {error}") from error
    if not data.strip():
        raise ScalingError(f"{path} is empty")
    if name.endswith(".parquet"):
        return read_parquet(path), digest
    if name.endswith((".pkl", ".pickle", ".pt")):
        raise ScalingError(f"{path.name} is a pickle, which can run any code when opened: export it as CSV")
    return from_wandb_table(parse_text(decode(data, path), name)), digest


def read_folder(path: Path) -> tuple[list[dict[str, Any]], str]:
    """A sweep directory, else local Weights & Biases runs, else TensorBoard logs, else one CSV history a run, of which
    the last row counts."""
    if (path / "runs.csv").is_file():
        return read_rows(path / "runs.csv")
    results = sorted(path.glob("runs/*/result.json"))
    if results:
        return [json_object(p) for p in results], digest_of(results)
    summaries = sorted(path.glob("**/wandb-summary.json"))
    if summaries:
        return [wandb_row(p) for p in summaries], digest_of(summaries)
    events = sorted(path.glob("**/events.out.tfevents.*"))
    if events:
        folders = sorted({event.parent for event in events})
        return [tensorboard_row(folder, path) for folder in folders], digest_of(events)
    histories = sorted(p for p in path.iterdir() if p.suffix.lower() in {".csv", ".tsv"})
    if histories:
        return [read_rows(p)[0][-1] | {"run_id": p.stem} for p in histories], digest_of(histories)
    raise ScalingError(
        f"{path} holds no runs.csv, runs/*/result.json, wandb-summary.json, TensorBoard files or CSV histories"
    )


def digest_of(paths: list[Path]) -> str:
    """One SHA-256 over several files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(decode(path.read_bytes(), path))
    except ScalingError:
        raise
    except (ValueError, RecursionError) as error:
        raise ScalingError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ScalingError(f"{path} is not a JSON object")
    return value


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file; needs pyarrow, an optional dependency."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ScalingError("reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, UnicodeError) as error:  # damage shows as any of these
        raise ScalingError(f"{path.name} is not a Parquet file: {error}") from error


def from_wandb_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A runs table exported from Weights & Biases: `Name` is the run, and only runs in state `finished` have ended."""
    if not rows or not set(RUN_NAMES) <= set(rows[0]) or "run_id" in rows[0]:
        return rows
    renamed = [{RUN_NAMES.get(k, k): v for k, v in row.items()} for row in rows]
    return [{"ended": str(row["state"] == "finished")} | row for row in renamed]


def wandb_row(summary: Path) -> dict[str, Any]:
    """One local run: its last summary values, and `config.yaml`'s settings as `config.NAME`; what is nested is named
    with dots."""
    # Names with an underscore are the service's own (step, run time, time stamp).
    values = {k: v for k, v in flat(json_object(summary)).items() if not k.startswith("_")}
    config = summary.with_name("config.yaml")
    settings = wandb_config(config) if config.is_file() else {}
    folder = summary.parent.parent if summary.parent.name == "files" else summary.parent
    return {"run_id": folder.name} | {f"config.{k}": v for k, v in settings.items()} | values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by dots; lists are left out."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            out[f"{prefix}{name}"] = value
    return out


def wandb_config(path: Path) -> dict[str, Any]:
    """Settings of a config.yaml as Weights & Biases writes it: a mapping with `value` below each name."""
    try:
        data = yaml.safe_load(decode(path.read_bytes(), path)) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ScalingError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise ScalingError(f"{path} is not a mapping")
    data = {str(name): value for name, value in data.items()}
    known = {
        k: v["value"] for k, v in data.items() if isinstance(v, Mapping) and "value" in v and not k.startswith("_")
    }
    return flat(known)


def tensorboard_row(folder: Path, root: Path) -> dict[str, Any]:
    """One run: the last value of every scalar tag, and the last step; named by its folder."""
    last: dict[str, tuple[int, float]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for step, tag, value in tensorboard_scalars(file):
            if tag not in last or step >= last[tag][0]:
                last[tag] = step, value
    name = folder.relative_to(root).as_posix()
    steps = max((step for step, _ in last.values()), default=0)
    return {"run_id": name if name != "." else folder.name, "step": steps} | {t: v for t, (_, v) in last.items()}


def tensorboard_scalars(file: Path) -> Iterator[tuple[int, str, float]]:
    """(step, tag, value) of an event file; needs tensorboardX for the format. A record cut off ends the file."""
    try:
        from google.protobuf.message import DecodeError
        from tensorboardX.proto.event_pb2 import Event
    except ImportError as error:
        raise ScalingError("reading TensorBoard logs needs tensorboardX: pip install tensorboardX") from error
    data, place = file.read_bytes(), 0
    # A TFRecord: length (8 bytes), its checksum (4), the record, its checksum (4). Checksums are not looked at, since
    # a file that is still being written ends in the middle of a record anyway.
    while place + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, place)  # then 4 bytes of checksum, the record, 4 more
        record = data[place + 12 : place + 12 + length]
        if len(record) < length:
            return
        try:
            event = Event.FromString(record)
        except DecodeError as error:
            raise ScalingError(f"{file} is no event file of TensorBoard: {error}") from error
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                yield event.step, value.tag, float(value.simple_value)
            elif kind == "tensor" and (number := tensor_scalar(value.tensor)) is not None:
                yield event.step, value.tag, number
        place += length + 16


def tensor_scalar(tensor: Any) -> float | None:
    """The number of a tensor of one element (TensorFlow 2 writes scalars so); None for anything else."""
    kind = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}.get(tensor.dtype)  # DT_FLOAT, DT_DOUBLE, DT_INT32, DT_INT64
    if any(size.size != 1 for size in tensor.tensor_shape.dim) or kind is None:
        return None
    if tensor.tensor_content:
        return float(np.frombuffer(tensor.tensor_content, kind)[0])
    listed = [*tensor.float_val, *tensor.double_val, *tensor.int_val, *tensor.int64_val]
    return float(listed[0]) if len(listed) == 1 else None


def decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScalingError(
            f"{path.name} is not UTF-8 text (byte {error.start}); a table must be CSV or JSONL"
        ) from error


def parse_text(text: str, name: str) -> list[dict[str, Any]]:
    """Rows of a text: JSON lines or one JSON array by suffix, else a table with a header."""
    if name.endswith((".jsonl", ".ndjson")):  # only line feeds end a record: others may stand inside a string
        return [parse_json_line(line, i) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if name.endswith(".json"):
        return json_records(text, name)
    return parse_table(text, name)


def json_records(text: str, name: str) -> list[dict[str, Any]]:
    """An array of objects, or the first such array inside an object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ScalingError(f"{name} is not JSON: {error}") from error
    if isinstance(value, dict):
        value = next((v for v in value.values() if isinstance(v, list)), value)
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ScalingError(f"{name} is not a JSON array of objects")
    return value


def parse_table(text: str, name: str) -> list[dict[str, Any]]:
    """Rows of separated values: commas, or semicolons or tabs where the header has them; with semicolons a comma is a
    decimal mark. Columns without a name and without values are left out. Raises ScalingError on a quote that never
    closes, which would swallow rows, and on rows with more fields than the header."""
    # The mark that the header holds most of: a name may hold a comma, but hardly more of them than there are columns.
    header_line = text.lstrip("\ufeff").split("\n", 1)[0]
    mark = max(",;\t", key=header_line.count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    rows = []
    try:
        header = [field.strip() for field in next(reader)]
        named = [h for h in header if h]
        if len(set(named)) < len(named):
            raise ScalingError(f"{name} names a column twice: {sorted({h for h in named if named.count(h) > 1})}")
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            extra = [f for h, f in zip([*header, *[""] * len(fields)], fields, strict=False) if not h and f.strip()]
            if extra:
                raise ScalingError(f"{name} line {reader.line_num} has more fields than the header")
            row = dict(zip(header, fields, strict=False))
            row.pop("", None)
            rows.append({h: row.get(h) for h in named})
    except csv.Error as error:
        raise ScalingError(f"{name} line {reader.line_num}: {error} (a quote that never closes?)") from error
    if mark == ";":
        rows = [{k: DECIMAL_COMMA.sub(r"\1.\2", v) if v else v for k, v in row.items()} for row in rows]
    return rows


def parse_json_line(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ScalingError(f"line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ScalingError(f"line {number} is not a JSON object")
    return row
