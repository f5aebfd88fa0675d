"""Tables as rows of plain values, from every place that runs are kept: CSV, JSONL, Parquet, sweep directories, local
Weights & Biases folders and TensorBoard logs. Nothing is ever unpickled."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN_NAMES = {"Name": "run_id", "State": "state"}  # the fixed headings of a Weights & Biases runs table


class ScalingError(ValueError):
    """A fault in the input that the user can mend; the message is one line that says how."""


def read_rows(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Raw rows of a table and the SHA-256 of the bytes that they came from."""
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise ScalingError(f"no such file or directory: {path}")
    data = path.read_bytes()
    if not data.strip():
        raise ScalingError(f"{path} is empty")
    if path.suffix == ".parquet":
        return read_parquet(path), hashlib.sha256(data).hexdigest()
    if path.suffix in {".pkl", ".pickle", ".pt"}:
        raise ScalingError(f"{path.name} is a pickle, which can run any code when opened: export it as CSV")
    return from_wandb_table(parse_text(decode(data, path), path)), hashlib.sha256(data).hexdigest()


def read_folder(path: Path) -> tuple[list[dict[str, Any]], str]:
    """A sweep directory, else local Weights & Biases runs, else TensorBoard logs."""
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
    raise ScalingError(
        f"{path} holds none of runs.csv, runs/*/result.json, wandb-summary.json or TensorBoard event files"
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
    except json.JSONDecodeError as error:
        raise ScalingError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ScalingError(f"{path} is not a JSON object")
    return value


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Rows of a Parquet file; needs pyarrow, an optional dependency."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ScalingError("reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise ScalingError(f"{path.name} is not a Parquet file: {error}") from error


def from_wandb_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A runs table exported from Weights & Biases: `Name` is the run, and only runs in state `finished` have ended."""
    if not rows or not set(RUN_NAMES) <= set(rows[0]) or "run_id" in rows[0]:
        return rows
    renamed = [{RUN_NAMES.get(k, k): v for k, v in row.items()} for row in rows]
    return [{"ended": str(row["state"] == "finished")} | row for row in renamed]


def wandb_row(summary: Path) -> dict[str, Any]:
    """One local run: its last summary values, and `config.yaml`'s settings as `config.NAME`."""
    values = {
        k: v for k, v in json_object(summary).items() if not k.startswith("_") and not isinstance(v, (dict, list))
    }
    config = summary.with_name("config.yaml")
    settings = wandb_config(config.read_text()) if config.is_file() else {}
    folder = summary.parent.parent if summary.parent.name == "files" else summary.parent
    return {"run_id": folder.name} | {f"config.{k}": v for k, v in settings.items()} | values


def wandb_config(text: str) -> dict[str, str]:
    """Scalars of a config.yaml as Weights & Biases writes it: a name on one line, `value: x` indented below it."""
    out, name = {}, ""
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith(":"):
            name = line.rstrip()[:-1]
        elif name and line.strip().startswith("value:"):
            out[name] = line.split(":", 1)[1].strip().strip("'\"")
    return out


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
        from tensorboardX.proto.event_pb2 import Event
    except ImportError as error:
        raise ScalingError("reading TensorBoard logs needs tensorboardX: pip install tensorboardX") from error
    data, place = file.read_bytes(), 0
    while place + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, place)  # then 4 bytes of checksum, the record, 4 more
        record = data[place + 12 : place + 12 + length]
        if len(record) < length:
            return
        event = Event.FromString(record)
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                yield event.step, value.tag, float(value.simple_value)
        place += length + 16


def decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScalingError(
            f"{path.name} is not UTF-8 text (byte {error.start}); a table must be CSV or JSONL"
        ) from error


def parse_text(text: str, path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL (by its suffix) or CSV text."""
    if path.suffix in {".jsonl", ".ndjson"}:
        return [parse_json_line(line, i) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = reader.fieldnames or []
    if len(set(header)) < len(header):
        raise ScalingError(f"{path.name} names a column twice: {sorted({h for h in header if header.count(h) > 1})}")
    rows = []
    for row in reader:
        if None in row:
            raise ScalingError(f"{path.name} line {reader.line_num} has more fields than the header")
        rows.append(row)
    return rows


def parse_json_line(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ScalingError(f"line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ScalingError(f"line {number} is not a JSON object")
    return row
