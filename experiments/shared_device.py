"""A sweep of small models on one GPU: one run at a time, several workers, and several under NVIDIA's MPS.

    python -m experiments.shared_device quickstart        # each under four minutes on an H200
    python -m experiments.shared_device ladder

Prints the wall time of the same sweep each way, from starting the workers to the last result, and its largest
difference of a loss to the first way. Programs are compiled before, by a sweep of few steps whose time is the row
`compiling`; so a row is what a sweep takes whose programs are known, and what sharing a device is worth without sharing
compilers.
"""

import contextlib
import csv
import dataclasses
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from experiments import h200_ladder, quickstart
from mmfree_jax.config import OptimConfig, RunConfig
from mmfree_jax.sweep import mps, study
from mmfree_jax.sweep.experiment import Study
from mmfree_jax.sweep.local import GPU, find_slots, this_machine

FAMILIES = ("transformer++", "matmul-free")
STEPS = {"quickstart": 1500, "ladder": 250}
FEW = 8  # steps of the sweep that compiles
FIELDS = ("shapes", "runs", "steps", "way", "workers", "seconds", "of_one_at_a_time", "loss_apart", "failed")


def of_quickstart() -> list[RunConfig]:
    """The quickstart's shapes, a run each."""
    return [quickstart.base_run(f, w, quickstart.rate(f, w)) for w in quickstart.WIDTHS[1:] for f in FAMILIES]


def of_ladder() -> list[RunConfig]:
    """Four shapes of the ladder up to 10M parameters, on the embedded text, at 8 x 1024 tokens a step."""
    data = dataclasses.replace(quickstart.DATA, sequence=1024, batch=8)
    return [
        RunConfig(
            f"{family}-w{width}",
            dataclasses.replace(h200_ladder.model(family, width, depth), vocab=data.vocab),
            data,
            OptimConfig(lr=2e-3, warmup_steps=20),
        )
        for width, depth in h200_ladder.SHAPES[:4]
        for family in FAMILIES
    ]


def declared(shapes: str, steps: int) -> Study:
    """The sweep, of this many steps a run."""
    runs = {"quickstart": of_quickstart, "ladder": of_ladder}[shapes]()
    short = []
    for run in runs:
        optim = dataclasses.replace(run.optim, warmup_steps=min(run.optim.warmup_steps, steps // 2))
        short.append(dataclasses.replace(run, optim=optim, steps=steps, checkpoint_every=0, diagnose_every=0))
    return Study("shared-device", "Runs that share a device", tuple(short), "transformer++")


def timed(shapes: str, steps: int, workers: int) -> tuple[float, dict[str, float]]:
    """Run the sweep in a new folder. Returns seconds and the loss of each run."""
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        code = study.sweep(declared(shapes, steps), Path(out), Console(file=io.StringIO()), this_machine(workers))
        seconds = time.perf_counter() - began
        if code:
            errors = [path.read_text()[-200:] for path in Path(out).glob("runs/*/error.txt")]
            raise RuntimeError(f"exit status {code}: {errors[:1]}")
        with (Path(out) / "runs.csv").open(encoding="utf-8") as file:
            return seconds, {row["run_id"]: float(row["loss"]) for row in csv.DictReader(file)}


@contextlib.contextmanager
def clients() -> Iterator[str]:
    """Make every process that starts inside a client of MPS. Yields why not, or nothing."""
    said: list[str] = []
    gpus = [slot.env[GPU] for slot in find_slots() if GPU in slot.env]
    with mps.service(gpus, said.append) as env:
        os.environ.update(env)
        try:
            yield "" if env else said[-1]
        finally:
            for name in env:
                del os.environ[name]


def rows(shapes: str, steps: int) -> Iterator[dict[str, str]]:
    """Measure every way."""
    count = len(declared(shapes, steps).runs)
    expected: dict[str, float] = {}
    alone = 0.0
    ways = [("compiling", FEW, count), ("one at a time", steps, 1), ("several workers", steps, count)]
    ways += [("several workers, half as many", steps, max(1, count // 2)), ("several workers, MPS", steps, count)]
    for way, length, workers in ways:
        row = dict.fromkeys(FIELDS, "") | {"shapes": shapes, "runs": str(count), "steps": str(length), "way": way}
        row["workers"] = str(workers)
        with clients() if "MPS" in way else contextlib.nullcontext("") as why:
            if why:
                yield row | {"failed": why}
                continue
            try:
                seconds, losses = timed(shapes, length, workers)
            except RuntimeError as error:
                yield row | {"failed": str(error)}
                continue
        row["seconds"] = f"{seconds:.1f}"
        if way != "compiling":
            expected, alone = expected or losses, alone or seconds
            row["of_one_at_a_time"] = f"{seconds / alone:.2f}"
            row["loss_apart"] = f"{max(abs(losses[name] - loss) for name, loss in expected.items()):.2g}"
        yield row


def main(shapes: str, steps: int) -> None:
    """Print the table."""
    table = csv.DictWriter(sys.stdout, FIELDS)
    table.writeheader()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MMFREE_JAX_CACHE"] = cache
        for row in rows(shapes, steps):
            table.writerow(row)
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else STEPS[sys.argv[1]])
