"""The state of a sweep, read from its folders alone: safe while it runs, and from another machine."""

import csv
import dataclasses
import fcntl
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mmfree_jax.config import RunConfig
from mmfree_jax.files import last_line, read_json, write_atomically

State = Literal["waiting", "running", "stopped", "done", "failed"]


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """Where one run stands. `loss` is the held-out loss of a finished run, else the latest training loss."""

    config: RunConfig
    state: State
    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    error: str = ""
    result: dict[str, Any] | None = None


def run_folder(out: Path, run: RunConfig) -> Path:
    """The folder of a run inside a sweep's folder."""
    return out / "runs" / run.name


def status(folder: Path, run: RunConfig) -> RunStatus:
    """Where `run` stands, read from its folder."""
    if (folder / "result.json").exists():
        result = read_json(folder / "result.json")
        shown = result["loss"] if result["loss"] is not None else result["train_loss"]
        return RunStatus(run, "done", run.steps, shown, result=result)
    line = last_line(folder / "metrics.jsonl")
    row = json.loads(line) if line else {}
    step = row.get("step", run.first_step)
    known = {"step": step, "loss": row.get("loss"), "tokens_per_s": row.get("tokens_per_s")}
    if _held(folder):
        return RunStatus(run, "running", **known)
    error = folder / "error.txt"
    if error.exists():
        return RunStatus(run, "failed", **known, error=error.read_text(encoding="utf-8").strip().splitlines()[-1])
    return RunStatus(run, "stopped" if row else "waiting", **known)


def _held(folder: Path) -> bool:
    """Whether some process is training in this folder: it then holds the lock."""
    if not (folder / ".lock").exists():
        return False
    with (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def fail(folder: Path, message: str) -> None:
    """Leave a one-line reason where `--status` finds it."""
    write_atomically(folder / "error.txt", " ".join(message.split()) + "\n")


def collect(out: Path, runs: Sequence[RunConfig]) -> Path:
    """Write runs.csv: one row for every finished run that was evaluated, in the order of the experiment."""
    rows = [
        found.result
        for run in runs
        if (found := status(run_folder(out, run), run)).result and found.result["loss"] is not None
    ]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    path = out / "runs.csv"
    write_atomically(path, text.getvalue())
    return path
