"""What a run writes about itself: metrics.jsonl, TensorBoard, log.txt.

Every file is append-only and its length is part of each checkpoint, so a resumed run first cuts its logs back to the
checkpoint: no step is ever logged twice, however the run died.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from mmfree_jax import nvidia
from mmfree_jax.config import RunConfig
from mmfree_jax.devices import EnergyMeter, peak_flops
from mmfree_jax.distributed import is_first, total


class Diverged(RuntimeError):
    """The loss is no longer a number. The message says at which step and what to try; steps before it are logged."""


@dataclasses.dataclass
class Progress:
    """Where a run stands: the part of a checkpoint that is not arrays.

    `seconds` and `joules` are of training steps alone, trunk included: without compilation, evaluation and saving. The
    first step of each process, which compiles, counts as much as those that it took next; what a process did that was
    killed after its last checkpoint counts nothing, like its steps.
    """

    step: int = 0
    data: int = 0  # examples that the data pipeline has given out, over all hosts
    seconds: float = 0.0
    joules: float | None = None
    uncounted: int = 0  # steps whose seconds and joules are still to be made out from later ones
    shared: bool = False  # a part of it was computed beside other runs on one GPU: times and energy are not its own
    train_loss: float | None = None
    attempts: int = 0
    held: list[list[float]] = dataclasses.field(default_factory=list)  # steps not logged yet: step, loss, norm, rate

    def of_all_steps(self, measured: float | None) -> float | None:
        """`seconds` or `joules` with those steps that were last and alone in their process, at the mean of all others.

        None where the run shared its device, and where no step was measured.
        """
        if measured is None or self.shared or self.step <= self.uncounted:
            return None
        return measured * self.step / (self.step - self.uncounted)


# What a step's metrics may be, in the order in which those not logged yet are kept: step, loss, norm, rate, z-loss.
HELD = ("loss", "grad_norm", "z_loss")


def _ordered(held: list[float]) -> list[float]:
    """Step and rate first."""
    step, loss, norm, rate, *rest = held
    return [step, rate, loss, norm, *rest]


class RunLog:
    """The logs of one run folder. `marks` (from the checkpoint being resumed) says how much of them to keep."""

    def __init__(self, folder: Path, marks: dict[str, int]):
        self.folder = folder
        _rewind(folder, marks)
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = (folder / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._text = (folder / "log.txt").open("a", buffering=1, encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tb"), flush_secs=30)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.mark()
        self._board.close()
        self._metrics.close()
        self._text.close()

    def event(self, text: str) -> None:
        """One line of log.txt, with the time."""
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def describe(self, title: str, text: str) -> None:
        """A text page of TensorBoard (the config)."""
        self._board.add_text(title, f"```\n{text}\n```", 0)

    def metrics(self, row: dict[str, Any]) -> None:
        """One object of metrics.jsonl and one point of every TensorBoard curve; row["step"] is its step."""
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        for name, value in _curves(row):
            self._board.add_scalar(name, value, row["step"])

    def diagnostics(self, step: int, scalars: dict[str, float], histograms: dict[str, np.ndarray]) -> None:
        """TensorBoard curves and histograms that are too wide for metrics.jsonl."""
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        for name, values in histograms.items():
            self._board.add_histogram(name, values, step)

    def mark(self) -> dict[str, int]:
        """Flush everything to disk and return the length of each file in bytes."""
        for file in (self._metrics, self._text):
            file.flush()
            os.fsync(file.fileno())
        self._board.flush()
        return {str(path.relative_to(self.folder)): path.stat().st_size for path in _log_files(self.folder)}


class SilentLog:
    """Stands for the RunLog in all processes but the first, which alone writes."""

    def __enter__(self) -> "SilentLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def event(self, text: str) -> None:
        """Nothing."""

    def describe(self, title: str, text: str) -> None:
        """Nothing."""

    def metrics(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def diagnostics(self, step: int, scalars: dict[str, float], histograms: dict[str, np.ndarray]) -> None:
        """Nothing."""

    def mark(self) -> dict[str, int]:
        """No file has a length here; checkpoints take the first process's word."""
        return {}


Log = RunLog | SilentLog


def run_log(folder: Path, marks: dict[str, int]) -> Log:
    """The log of this process: on disk in the first, nowhere in the others."""
    return RunLog(folder, marks) if is_first() else SilentLog()


def as_numbers(tree: Any) -> Any:
    """Arrays as plain numbers and lists of them, None where not finite: what JSON can hold."""
    if isinstance(tree, dict):
        return {name: as_numbers(value) for name, value in tree.items()}
    if np.ndim(tree):
        return [as_numbers(value) for value in tree]
    return float(tree) if np.isfinite(tree) else None


def _curves(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """TensorBoard's names for what a row holds: train/loss, held_out/loss, grad_norm/blocks.glu.down.kernel/03."""
    for name, value in row.items():
        if value is None or name in ("step", "diagnostics"):
            continue
        if name.startswith("held_out_"):
            yield f"held_out/{name.removeprefix('held_out_')}", value
        else:
            yield f"train/{name}", value
    yield from _flat(row.get("diagnostics", {}), "")


def _flat(tree: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{name}/{key}".lstrip("/"))
    elif isinstance(tree, list):
        for layer, value in enumerate(tree):
            yield from _flat(value, f"{name}/{layer:02}")
    elif tree is not None:
        yield name, tree


def _log_files(folder: Path) -> list[Path]:
    named = [folder / "metrics.jsonl", folder / "log.txt", *(folder / "tb").glob("events.*")]
    return [path for path in named if path.exists()]


def _rewind(folder: Path, marks: dict[str, int]) -> None:
    """Cut every log back to its mark; one without a mark was begun after the checkpoint and goes."""
    for path in _log_files(folder):
        keep = marks.get(str(path.relative_to(folder)), 0)
        if keep == 0:
            path.unlink()
        else:
            os.truncate(path, min(keep, path.stat().st_size))


class Interval:
    """The steps since the last logged one: keeps their metrics on the device and logs their mean when asked."""

    def __init__(self, config: RunConfig, progress: Progress, flops_per_step: float, log: Log):
        self.config, self.progress, self.flops_per_step, self.log = config, progress, flops_per_step, log
        progress.shared = progress.shared or nvidia.is_shared()
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak = None if peak is None or progress.shared else peak * config.mesh.devices
        self.meter = EnergyMeter()
        self.pending: list[tuple[int, Mapping[str, Any], float]] = [
            (int(step), dict(zip(HELD, values, strict=False)), rate)
            for step, rate, *values in map(_ordered, progress.held)
        ]
        progress.held = []
        self.notes: dict[str, Any] = {}  # for the next row besides
        self.waited = 0.0
        self.compiled = False  # a first step of this process has been compiled and run
        self.began: float | None = None  # when the clocks did; None while they stand still
        self.running = 0  # steps taken since then
        self.timed, self.elapsed = 0, 0.0  # steps of this row that were timed, and their seconds

    def timed_next(self, rows: Iterator[jax.Array]) -> jax.Array:
        """The next batch; the time that the device may have had to wait for it is logged."""
        start = time.perf_counter()
        tokens_BT = next(rows)
        self.waited += time.perf_counter() - start
        return tokens_BT

    def add(self, step: int, metrics: dict[str, jax.Array], rate: float) -> None:
        """Take the metrics of 0-based step `step`, without waiting for them (but for the first: it compiles)."""
        self.pending.append((step + 1, metrics, rate))
        self.running += 1
        if not self.compiled:
            jax.block_until_ready(metrics)
            self.compiled = True
            self.progress.uncounted += 1
            self.resume()

    def note(self, **values: Any) -> None:
        """More to say in the next row: numbers, or trees of them."""
        self.notes |= as_numbers(values)

    def pause(self) -> bool:
        """Stop the clocks once the device is done with the steps taken so far, and add their time and energy to the
        progress. Whether there were any: otherwise the clocks go on."""
        jax.block_until_ready([metrics for _, metrics, _ in self.pending])
        drawn = total(self.meter.joules())
        if self.began is None or self.running == 0:
            return False
        elapsed, share = time.perf_counter() - self.began, 1 + self.progress.uncounted / self.running
        known = self.progress.joules is not None or self.progress.seconds == 0  # else a part was not measured
        self.progress.joules = (self.progress.joules or 0.0) + drawn * share if known and drawn is not None else None
        self.progress.seconds += elapsed * share
        self.progress.uncounted = 0
        self.timed, self.elapsed = self.timed + self.running, self.elapsed + elapsed
        self.began, self.running = None, 0
        return True

    def resume(self) -> None:
        """Start the clocks anew, after something that is not training."""
        if self.compiled:
            self.meter.restart()
            self.began, self.running = time.perf_counter(), 0

    def hold(self) -> None:
        """Put what is not logged yet into the progress: a run that is stopped here logs the same rows in the end."""
        self.pause()
        for step, metrics, rate in jax.device_get(self.pending):
            values = [float(metrics[name]) for name in HELD if name in metrics]
            self.progress.held.append([float(step), *values[:2], float(rate), *values[2:]])
        self.pending.clear()

    def flush_if_due(self) -> None:
        """Log when the newest step taken is a multiple of log_every."""
        every = self.config.log_every
        if self.pending and every and self.pending[-1][0] % every == 0:
            self.flush()

    def flush(self) -> None:
        """Wait for the steps taken so far and log their means. Raises Diverged if a loss is not finite, once the steps
        before it are logged."""
        if not self.pending:
            return
        stopped = self.pause()
        steps, fetched, rates = zip(*jax.device_get(self.pending), strict=True)
        metrics = {name: np.array([one[name] for one in fetched], np.float64) for name in fetched[0]}
        finite = np.isfinite(metrics["loss"] + metrics["grad_norm"])
        count = len(steps) if finite.all() else int(np.argmin(finite))
        notes = self.notes if count == len(steps) else {}
        means = {name: float(one[:count].mean()) for name, one in metrics.items() if count}
        if count:
            self._log(steps[count - 1], means, rates[count - 1], notes)
        if count < len(steps):
            if self.notes:
                self.log.metrics({"step": steps[-1], **self.notes})
            raise Diverged(
                f"{self.config.name}: loss {metrics['loss'][count]:.4g} and gradient norm "
                f"{metrics['grad_norm'][count]:.4g} at step {steps[count]}: lower optim.lr or raise optim.warmup_steps"
            )
        self.pending.clear()
        self.waited, self.notes = 0.0, {}
        self.timed, self.elapsed = 0, 0.0
        if stopped:
            self.resume()

    def _log(self, step: int, means: dict[str, float], rate: float, notes: dict[str, Any]) -> None:
        own, steps_per_s = not self.progress.shared, self.timed / self.elapsed if self.elapsed else None
        self.progress.train_loss = means["loss"]
        self.log.metrics(
            {
                "step": step,
                "tokens": step * self.config.data.tokens_per_step,
                "flops": step * self.flops_per_step,
                "loss": means["loss"],
                "lr": rate,
                **{name: mean for name, mean in means.items() if name != "loss"},
                "tokens_per_s": steps_per_s and steps_per_s * self.config.data.tokens_per_step,
                "mfu": self.peak and steps_per_s and steps_per_s * self.flops_per_step / self.peak,
                "data_wait_s": self.waited / len(self.pending),
                "seconds": self.progress.seconds if own else None,
                "joules": self.progress.joules if own else None,
                **notes,
            }
        )
