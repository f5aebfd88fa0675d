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
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"train/{name}", value, row["step"])

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
        self.pending: list[tuple[int, Mapping[str, jax.Array | float], float]] = [
            (int(step), {"loss": loss, "grad_norm": norm}, rate) for step, loss, norm, rate in progress.held
        ]
        progress.held = []
        self.waited = 0.0
        self.untimed = len(self.pending)  # pending steps that ran before the clock did
        self.began: float | None = None  # unknown until the first step of this process has been compiled and run

    def timed_next(self, rows: Iterator[jax.Array]) -> jax.Array:
        """The next batch; the time that the device may have had to wait for it is logged."""
        start = time.perf_counter()
        tokens_BT = next(rows)
        self.waited += time.perf_counter() - start
        return tokens_BT

    def add(self, step: int, metrics: dict[str, jax.Array], rate: float) -> None:
        """Take the metrics of 0-based step `step`, without waiting for them (but for the first: it compiles)."""
        self.pending.append((step + 1, metrics, rate))
        if self.began is None:
            jax.block_until_ready(metrics)
            self.untimed += 1
            self.progress.uncounted += 1
            self._restart()

    def _restart(self) -> None:
        self.meter.restart()
        self.began, self.waited = time.perf_counter(), 0.0

    def resume(self) -> None:
        """Start the clocks anew after something that is not training; what came before it is logged."""
        if self.began is not None:
            self._restart()

    def hold(self) -> None:
        """Put what is not logged yet into the progress: a run that is stopped here logs the same rows in the end."""
        pending = jax.device_get(self.pending)
        self._count()
        for step, metrics, rate in pending:
            self.progress.held.append([float(step), float(metrics["loss"]), float(metrics["grad_norm"]), float(rate)])
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
        steps, metrics, rates = zip(*self.pending, strict=True)
        losses, norms = np.array([[m["loss"], m["grad_norm"]] for m in jax.device_get(metrics)], np.float64).T
        if not np.isfinite(losses + norms).all():
            at = int(np.argmin(np.isfinite(losses + norms)))
            if at > 0:
                self._log(steps[at - 1], at, float(losses[:at].mean()), float(norms[:at].mean()), rates[at - 1])
            raise Diverged(
                f"{self.config.name}: loss {losses[at]:.4g} and gradient norm {norms[at]:.4g} at step {steps[at]}: "
                "lower optim.lr or raise optim.warmup_steps"
            )
        self._log(steps[-1], len(steps), float(losses.mean()), float(norms.mean()), rates[-1])
        self.pending.clear()

    def _count(self) -> float | None:
        """Add time and energy since the clocks began to the progress; returns the steps a second, None where none was
        timed. To be called once the device is done with the pending steps."""
        timed, self.untimed = len(self.pending) - self.untimed, 0
        drawn = total(self.meter.joules())
        if self.began is None or timed == 0:
            return None
        elapsed, share = time.perf_counter() - self.began, 1 + self.progress.uncounted / timed
        known = self.progress.joules is not None or self.progress.seconds == 0  # else a part was not measured
        self.progress.joules = (self.progress.joules or 0.0) + drawn * share if known and drawn is not None else None
        self.progress.seconds += elapsed * share
        self.progress.uncounted = 0
        self.meter.restart()
        self.began = time.perf_counter()
        return timed / elapsed

    def _log(self, step: int, count: int, loss: float, norm: float, rate: float) -> None:
        steps_per_s, own = self._count(), not self.progress.shared
        self.progress.train_loss = loss
        self.log.metrics(
            {
                "step": step,
                "tokens": step * self.config.data.tokens_per_step,
                "flops": step * self.flops_per_step,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens_per_s": steps_per_s and steps_per_s * self.config.data.tokens_per_step,
                "mfu": self.peak and steps_per_s and steps_per_s * self.flops_per_step / self.peak,
                "data_wait_s": self.waited / count,
                "seconds": self.progress.seconds if own else None,
                "joules": self.progress.joules if own else None,
            }
        )
        self.waited = 0.0
