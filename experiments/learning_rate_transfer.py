"""Does the best learning rate stay where it is when the model gets wider? Standard parametrisation against muP.

    python -m experiments.learning_rate_transfer --out runs/transfer.csv --corpus s
    python -m experiments.learning_rate_picture runs/transfer.csv --out runs/transfer.png

Transformer++ and MatMul-free, width 256 to 2048, depth 4, 5M tokens a run. At every width the rate is searched on a
grid of factors of two, outwards from the best one of the width before, until the best has two tried neighbours on
either side (none beyond one that diverged). About 80 runs, 15 minutes on one H200; interrupted, the same command goes
on. results/learning_rate_transfer.csv was made in three such calls with `--around 1` (Transformer++ with `--seeds 3` at
the two narrow widths): the optimum stays within one step of the grid under muP, and falls by a factor of 5 under the
standard parametrisation; docs/parametrisation.md shows it.
"""

import csv
import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmfree_jax.command_line import parse
from mmfree_jax.config import FAMILIES, ConfigError, DataConfig, OptimConfig, Parametrisation, RunConfig, require
from mmfree_jax.sweep.shapes import ladder_model

COLUMNS = (
    "family", "parametrisation", "width", "lr", "seed", "loss", "diverged", "train_loss", "seconds", "fingerprint",
)  # fmt: skip
PARAMETRISATIONS: tuple[Parametrisation, ...] = ("standard", "mup")
GRID = 2.0  # factor between neighbouring rates
START = {"dense": 4e-3, "ternary": 8e-3}  # where the search at the narrowest width begins
HEAD = 64


@dataclasses.dataclass(frozen=True)
class Run:
    """Train until the best rate of every cell has its neighbours. OUT is written after each run and taken up again."""

    out: Path
    """The table (CSV)."""
    corpus: str = "s"
    """Corpus or folder of a token set; more tokens than a run reads, or repetition moves the optimum."""
    vocab: int = 4096
    """Of the corpus's tokenizer."""
    families: tuple[str, ...] = ("transformer++", "matmul-free")
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Ascending; the first is the base of muP."""
    depth: int = 4
    tokens: int = 5_000_000
    """Of a run."""
    sequence: int = 512
    batch: int = 32
    """Sequences a step."""
    around: int = 2
    """Grid steps to try on either side of the best."""
    seeds: int = 1
    """Runs for each rate; their mean loss counts."""

    def __post_init__(self) -> None:
        for family in self.families:
            require(family in FAMILIES, f"family {family!r}: choose from {', '.join(FAMILIES)}")
        require(list(self.widths) == sorted(set(self.widths)), f"widths {self.widths} must ascend")
        require(self.around >= 1 and self.seeds >= 1, "around and seeds must be at least 1")


def cells(choice: Run) -> Iterator[tuple[str, Parametrisation, int]]:
    """Family, parametrisation and width, narrow ones first; at the base width both parametrisations are the same."""
    for width in choice.widths:
        for family in choice.families:
            for parametrisation in PARAMETRISATIONS if width > choice.widths[0] else PARAMETRISATIONS[:1]:
                yield family, parametrisation, width


def config(choice: Run, family: str, parametrisation: Parametrisation, width: int, lr: float, seed: int) -> RunConfig:
    """One run: warm-up over a tenth of the steps, decay to zero over the last fifth."""
    data = DataConfig(choice.corpus, choice.vocab, choice.sequence, choice.batch)
    steps = max(10, choice.tokens // data.tokens_per_step)
    model = ladder_model(family, width, choice.vocab, choice.depth)
    if model.mixer == "attention":
        model = dataclasses.replace(model, heads=max(1, width // HEAD))
    if parametrisation == "mup":
        model = dataclasses.replace(model, parametrisation="mup", base_width=choice.widths[0], base_depth=choice.depth)
    optim = OptimConfig(lr=lr, warmup_steps=steps // 10, decay_steps=steps // 5)
    name = f"{family}-{parametrisation}-w{width}"
    # Without kernels: four layers train for seconds, and compiling kernels for every width takes longer.
    return RunConfig(name, model, data, optim, steps=steps, seed=seed, unroll=choice.depth, kernels="off")


def rate(family: str, index: int) -> float:
    """The rate at a place of the family's grid; 0 is where the search begins."""
    return START[FAMILIES[family][1]] * GRID**index


def place(family: str, lr: float) -> int:
    """Inverse of `rate`."""
    return round(math.log(lr / rate(family, 0), GRID))


def next_place(losses: dict[int, float], start: int, around: int) -> int | None:
    """Where to try next, nearest to the best first; None once the best has `around` neighbours on either side.

    `losses` by place, infinite for runs that diverged; nothing above one of those is tried.
    """
    if not losses:
        return start
    best = min(losses, key=lambda index: losses[index])
    if math.isinf(losses[best]):
        return min(losses) - 1
    for distance in range(1, around + 1):
        for index in (best - distance, best + distance):
            hopeless = any(math.isinf(loss) and at < index for at, loss in losses.items())
            if index not in losses and not hopeless:
                return index
    return None


def best_place(losses: dict[int, float], start: int) -> int:
    """The place of the least loss, or `start` where nothing has been tried."""
    return min(losses, key=lambda index: losses[index]) if losses else start


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a table with numbers as numbers. Raises ConfigError for another table."""
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        require(tuple(reader.fieldnames or ()) == COLUMNS, f"{path}: not a table of this experiment")
        rows = list(reader)
    typed = {"width": int, "seed": int, "lr": float, "loss": float, "train_loss": float, "seconds": float}
    return [{k: typed.get(k, str)(v) for k, v in row.items()} | {"diverged": row["diverged"] == "True"} for row in rows]


class Table:
    """The CSV of finished runs; a row is on disk before the next run begins."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = read(path) if path.exists() else []

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and force it to disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
            stream.flush()
            os.fsync(stream.fileno())
        self.rows.append(row)

    def find(self, run: RunConfig) -> dict[str, Any] | None:
        """The row of a run that is done."""
        return next((row for row in self.rows if row["fingerprint"] == run.fingerprint()), None)


def run(choice: Run) -> None:
    """Search every cell."""
    from mmfree_jax.data import resolve_corpus

    table, began = Table(choice.out), time.perf_counter()
    trainer = Trainer(resolve_corpus(choice.corpus, choice.vocab))
    best: dict[tuple[str, str], int] = {}
    for family, parametrisation, width in cells(choice):
        losses: dict[int, float] = {}
        start = best.get((family, parametrisation), 0)
        while (index := next_place(losses, start, choice.around)) is not None:
            lr = rate(family, index)
            runs = [config(choice, family, parametrisation, width, lr, seed) for seed in range(choice.seeds)]
            rows = [table.find(one) or trainer.train(one, table) for one in runs]
            losses[index] = math.inf if any(r["diverged"] for r in rows) else sum(r["loss"] for r in rows) / len(rows)
            shown = "diverged" if math.isinf(losses[index]) else f"{losses[index]:.4f}"
            print(f"{time.perf_counter() - began:6.0f} s  {runs[0].name:<30} lr {lr:<10.4g} {shown}", flush=True)
        found = best_place(losses, start)
        best[family, parametrisation] = found
        if width == choice.widths[0]:
            best |= {(family, other): found for other in PARAMETRISATIONS}


class Trainer:
    """Trains runs one after another: one compiled program a cell, the batches on the device once for all."""

    def __init__(self, token_set: Any):
        self.token_set = token_set
        self.key: Any = None
        self.batches: list[Any] = []

    def train(self, run: RunConfig, table: Table) -> dict[str, Any]:
        """Train and evaluate a run, and add its row; the rate is an argument of the program."""
        import jax
        import numpy as np

        from mmfree_jax.evaluation.loss import evaluate
        from mmfree_jax.training.optim import rates
        from mmfree_jax.training.step import make_program, program_key

        key = program_key(run, self.token_set.end_of_document)
        if key != self.key:
            make_program.cache_clear()
            jax.clear_caches()
            self.key = key
        program = make_program(key)
        began = time.perf_counter()
        with jax.set_mesh(program.mesh):
            state = program.init(jax.random.key(run.seed))
            recent: list[Any] = []
            for step, tokens_BT in enumerate(self._read(run, program.place)):
                now = jax.tree.map(np.float32, rates(run.optim, run.steps, step))
                state, metrics = program.train_step(state, tokens_BT, jax.device_put(now))
                recent = [*recent[-9:], metrics["loss"]]
            train_loss = float(np.mean(jax.device_get(recent)))
            loss = evaluate(program.evaluate, program.mesh, state.params, self.token_set, run.data.sequence)["loss"]
        diverged = not loss < math.log(run.model.vocab)  # worse than knowing nothing, or not a number
        row = {
            "family": run.model.family,
            "parametrisation": run.model.parametrisation,
            "width": run.model.width,
            "lr": run.optim.lr,
            "seed": run.seed,
            "loss": loss,
            "diverged": diverged,
            "train_loss": train_loss,
            "seconds": round(time.perf_counter() - began, 2),
            "fingerprint": run.fingerprint(),
        }
        table.add(row)
        return row

    def _read(self, run: RunConfig, put: Any) -> list[Any]:
        """The run's batches: all runs see the same in the same order, so they are read once."""
        from mmfree_jax.data import batches

        data = run.data
        available = len(self.token_set.split("train"))
        require(
            run.positions <= available,
            f"a run of {run.positions:,} tokens repeats data: the corpus has {available:,}; lower --tokens",
        )
        if len(self.batches) != run.steps:
            with batches(self.token_set, sequence=data.sequence, batch=data.batch, seed=data.seed, put=put) as rows:
                self.batches = [next(rows) for _ in range(run.steps)]
        return self.batches


def main(arguments: list[str]) -> int:
    """The command; returns the exit status."""
    try:
        run(parse(Run, arguments, "experiments.learning_rate_transfer"))
    except (ConfigError, OSError) as error:
        print(f"learning_rate_transfer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
