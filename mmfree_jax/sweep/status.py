"""The state of a sweep, read from its folders alone: safe while it runs, and from another machine."""

import contextlib
import csv
import dataclasses
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mmfree_jax.config import RunConfig, require
from mmfree_jax.files import last_lines, read_object, write_atomically
from mmfree_jax.sweep.heartbeat import Beat, holder

COLUMNS = ("run_id", "family", "N", "D", "loss")  # that every runs table has

State = Literal["waiting", "running", "stopped", "done", "failed"]


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """The state of one run. `loss` is the held-out loss of a finished run, else the latest training loss.

    `step` is the last one logged or saved; 0 before the first, also in a run that branches off another. `holder` is the
    process that trains it now. `steady`: the last two rows of metrics have a speed. The first speed may be that of a
    device that is warming up, and is not used to estimate when the run will end.
    """

    config: RunConfig
    state: State
    step: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    steady: bool = False
    error: str = ""
    result: dict[str, Any] | None = None
    holder: Beat | None = None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last step of a running run, at its latest speed; None if that is not known."""
        if self.state != "running" or not self.tokens_per_s or not self.steady:
            return None
        return (self.config.steps - self.step) * self.config.data.tokens_per_step / self.tokens_per_s

    @property
    def diverged(self) -> bool:
        """Whether it has diverged. It would diverge again, because it computes the same every time."""
        return self.state == "failed" and self.error.startswith("Diverged")


def run_folder(out: Path, run: RunConfig) -> Path:
    """Return the folder of a run in a sweep's folder."""
    return out / "runs" / run.name


def status(folder: Path, run: RunConfig, now: float | None = None) -> RunStatus:
    """Read the state of `run` from its folder. `now`: its `file_clock`, for callers with many folders."""
    if (folder / "result.json").exists():
        result = read_object(folder / "result.json")
        shown = result.get("train_loss") if result.get("loss") is None else result["loss"]
        return RunStatus(run, "done", run.steps, _number(shown), result=result)
    # Only the end of the file is read: a status of a thousand runs must not read a thousand logs.
    rows = [row for line in last_lines(folder / "metrics.jsonl", 2) if (row := _row(line)) is not None]
    row = rows[-1] if rows else {}
    saved, step = _saved_step(folder), row.get("step")
    known: dict[str, Any] = {
        "step": max(step if type(step) is int and 0 <= step < 1 << 60 else 0, saved),
        "loss": _number(row.get("loss")),
        "tokens_per_s": _number(row.get("tokens_per_s")),
        "steady": len(rows) == 2 and all(_number(one.get("tokens_per_s")) for one in rows),
    }
    # A run that is being trained may have an old error.txt, of the attempt before this one.
    if beat := holder(folder, now):
        return RunStatus(run, "running", **known, holder=beat)
    with contextlib.suppress(FileNotFoundError):  # a driver that tries it again may be deleting the error now
        if lines := (folder / "error.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines():
            return RunStatus(run, "failed", **known, error=lines[-1])
    return RunStatus(run, "stopped" if row or saved else "waiting", **known)


def _row(line: str) -> dict[str, Any] | None:
    """A line of metrics; None for one that a crash of the machine has left half written."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _number(value: Any) -> float | None:
    """A number that can be shown, else None."""
    return value if type(value) in (int, float) and abs(value) < 1e300 else None


def _saved_step(folder: Path) -> int:
    """Step of the newest checkpoint, which may be later than the newest row of metrics; 0 if there is none."""
    # Orbax renames a checkpoint to its number when it is complete.
    try:
        names = os.listdir(folder / "checkpoints")
    except FileNotFoundError:
        return 0
    return max((int(name) for name in names if name.isdigit()), default=0)  # unfinished ones have other names


def can_begin(out: Path, run: RunConfig) -> bool:
    """Return whether the checkpoint that a run branches off exists; always true for a run without a trunk.

    A trunk that failed later may still have left it.
    """
    if run.branch is None:
        return True
    return (out / "runs" / run.branch.run / "checkpoints" / str(run.branch.step)).is_dir()


def fail(folder: Path, message: str) -> None:
    """Record why a run failed, in one line, for `--status`."""
    write_atomically(folder / "error.txt", " ".join(message.split()) + "\n")


def collect(out: Path, runs: Sequence[RunConfig]) -> Path:
    """Write runs.csv: one row for every finished run that was evaluated, in the order of the experiment.

    Without a finished run it is only a header. Rows of other versions of this program may have other columns: the table
    has all of them, empty where a row has no value. Raises ConfigError if there is no such folder.
    """
    require(out.is_dir(), f"{out}: no such sweep folder")
    rows = [
        found.result
        for run in runs
        if (found := status(run_folder(out, run), run)).result and found.result.get("loss") is not None
    ]
    text = io.StringIO()
    # The first row decides the order of the columns; later rows may add some.
    columns = list(dict.fromkeys(name for row in rows for name in row)) or COLUMNS
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    path = out / "runs.csv"
    write_atomically(path, text.getvalue())
    return path
