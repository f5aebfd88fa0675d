"""What a run writes about itself: metrics.jsonl, TensorBoard, log.txt.

In metrics.jsonl `tokens` are the targets that carried a loss so far, the row's D in the end, and `flops` what had to be
computed for them; `tokens_per_s` are positions, padding included, and `mfu` is `flops` by time: what the device does.

Every file is append-only and its length is part of each checkpoint, so a resumed run first cuts its logs back to the
checkpoint: no step is ever logged twice, however the run died.
"""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from mmfree_jax import flops, nvidia
from mmfree_jax.config import RunConfig
from mmfree_jax.data import Counts
from mmfree_jax.devices import EnergyMeter, peak_flops
from mmfree_jax.distributed import added, is_first, total


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
    counts: Counts | None = None  # of these examples; None in checkpoints of before they were counted
    seconds: float = 0.0
    joules: float | None = None
    uncounted: int = 0  # steps whose seconds and joules are still to be made out from later ones
    shared: bool = False  # a part of it was computed beside other runs on one GPU: times and energy are not its own
    train_loss: float | None = None
    attempts: int = 0
    held: list[Any] = dataclasses.field(default_factory=list)  # steps not logged yet, as `Pending.held`

    def __post_init__(self) -> None:
        if isinstance(self.counts, dict):  # out of a checkpoint
            self.counts = Counts(**self.counts)

    def of_all_steps(self, measured: float | None) -> float | None:
        """`seconds` or `joules` with those steps that were last and alone in their process, at the mean of all others.

        None where the run shared its device, and where no step was measured.
        """
        if measured is None or self.shared or self.step <= self.uncounted:
            return None
        return measured * self.step / (self.step - self.uncounted)


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step taken and not logged: its 1-based number, metrics, rate, and counts of all steps up to it."""

    step: int
    metrics: Mapping[str, Any]
    rate: float
    before: Counts  # when this process began, over all processes
    own: Counts  # what this process has counted since

    def held(self, counts: Counts) -> dict[str, Any]:
        """As it stands in a checkpoint."""
        metrics = {name: float(value) for name, value in self.metrics.items()}
        return {"step": self.step, "rate": self.rate, "metrics": metrics, "counts": dataclasses.asdict(counts)}

    @staticmethod
    def taken_up(held: Any, counts: Counts) -> "Pending":
        """Inverse of `held`; also of lists of step, loss, norm, rate and z-loss, as older checkpoints have them, whose
        counts are taken to be those of the checkpoint."""
        if isinstance(held, dict):
            return Pending(held["step"], held["metrics"], held["rate"], Counts(**held["counts"]), Counts())
        step, loss, norm, rate, *z = held
        metrics = dict(zip(("loss", "grad_norm", "z_loss"), (loss, norm, *z), strict=False))
        return Pending(int(step), metrics, rate, counts, Counts())


def totals(pending: Sequence[Pending]) -> list[Counts]:
    """Counts of all steps up to each of these, over all processes: every one of them takes part."""
    numbers = iter(added([number for one in pending for number in dataclasses.astuple(one.own)]))
    return [one.before + Counts(*itertools.islice(numbers, 3)) for one in pending]


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

    def __init__(self, config: RunConfig, progress: Progress, counts: Counts, log: Log):
        """counts: of the steps up to `progress.step`."""
        self.config, self.progress, self.log = config, progress, log
        progress.shared = progress.shared or nvidia.is_shared()
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak = None if peak is None or progress.shared else peak * config.mesh.devices
        self.meter = EnergyMeter()
        self.pending = [Pending.taken_up(held, counts) for held in progress.held]
        progress.held = []
        self.before = counts
        self.reached = progress.step, counts  # the last step that needs no more counting here, and counts up to it
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

    def add(self, step: int, metrics: dict[str, jax.Array], rate: float, counts: Counts) -> None:
        """Take the metrics of 0-based step `step`, without waiting for them (but for the first: it compiles), and what
        this process has counted of the batches up to it."""
        self.pending.append(Pending(step + 1, metrics, rate, self.before, counts))
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
        jax.block_until_ready([one.metrics for one in self.pending])
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
        counts = totals(self.pending)
        self.progress.held = [one.held(c) for one, c in zip(self._fetched(), counts, strict=True)]
        self.progress.counts = counts[-1] if counts else self.progress.counts
        self.pending.clear()

    def _fetched(self) -> list[Pending]:
        """The pending steps with their metrics as NumPy scalars."""
        metrics = jax.device_get([one.metrics for one in self.pending])
        return [dataclasses.replace(one, metrics=values) for one, values in zip(self.pending, metrics, strict=True)]

    def flush_if_due(self) -> None:
        """Log when the newest step taken is a multiple of log_every."""
        every = self.config.log_every
        if self.pending and every and self.pending[-1].step % every == 0:
            self.flush()

    def flush(self) -> None:
        """Wait for the steps taken so far and log their means. Raises Diverged if a loss is not finite, once the steps
        before it are logged."""
        if not self.pending:
            return
        stopped = self.pause()
        fetched, counts = self._fetched(), totals(self.pending)
        steps = [one.step for one in fetched]
        metrics = {name: np.array([one.metrics[name] for one in fetched], np.float64) for name in fetched[0].metrics}
        finite = np.isfinite(metrics["loss"] + metrics["grad_norm"])
        count = len(steps) if finite.all() else int(np.argmin(finite))
        notes = self.notes if count == len(steps) else {}
        means = {name: float(one[:count].mean()) for name, one in metrics.items() if count}
        if count:
            self.progress.counts = counts[count - 1]
            self._log(steps[count - 1], means, fetched[count - 1].rate, notes)
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
        counts, since = self.progress.counts, step - self.reached[0]
        assert counts is not None
        done, before = (self._flops(*at) for at in ((step, counts), self.reached))
        each = (done - before) / since if since > 0 else None  # FLOPs of a step, the mean over those of this row
        self.reached = (step, counts) if since > 0 else self.reached
        self.progress.train_loss = means["loss"]
        self.log.metrics(
            {
                "step": step,
                "tokens": counts.targets,
                "flops": done,
                "loss": means["loss"],
                "lr": rate,
                **{name: mean for name, mean in means.items() if name != "loss"},
                "tokens_per_s": steps_per_s and steps_per_s * self.config.data.tokens_per_step,
                "mfu": self.peak and steps_per_s and each and steps_per_s * each / self.peak,
                "data_wait_s": self.waited / len(self.pending),
                "seconds": self.progress.seconds if own else None,
                "joules": self.progress.joules if own else None,
                **notes,
            }
        )

    def _flops(self, step: int, counts: Counts) -> float:
        """Of all steps up to this one."""
        positions = step * self.config.data.tokens_per_step
        return flops.train_flops(self.config.model, positions, counts.pairs).products
