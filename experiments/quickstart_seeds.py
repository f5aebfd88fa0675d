"""How far do repeats of the quickstart scatter, and does a GPU end where a CPU does?

    JAX_PLATFORMS=cpu mmfree sweep experiments/quickstart_seeds.py --out runs/seeds-cpu
    mmfree sweep experiments/quickstart.py --out runs/quickstart-gpu        # on a machine with a GPU
    python -m experiments.quickstart_seeds runs/seeds-cpu runs/quickstart-gpu

The first trains the quickstart with three seeds (weights and order of the data). The last prints
results/quickstart_devices.csv: for every family, size and budget the losses on both devices at seed 0, and their
difference in standard deviations between seeds, pooled over all cells. The text is that of installed packages: both
sweeps have to run in one environment.
"""

import csv
import math
import statistics
import sys
from pathlib import Path

from experiments.quickstart import BUDGETS, FAMILIES, WIDTHS, base_run, rate
from mmfree_jax.sweep.experiment import Study, trunk_and_decays
from mmfree_jax.sweep.grids import repeats

SEEDS = (0, 1, 2)
COLUMNS = ("family", "width", "D", "cpu", "cpu_mean", "cpu_sd", "gpu", "difference", "in_sd")


def study() -> Study:
    """The quickstart once for each seed."""
    bases = [base_run(family, width, rate(family, width)) for width in WIDTHS for family in FAMILIES]
    runs = [run for base in bases for repeat in repeats(base, SEEDS) for run in trunk_and_decays(repeat, BUDGETS)]
    return Study(name="quickstart-seeds", title="Repeats of the quickstart", runs=tuple(runs), baseline=FAMILIES[0])


def losses(folder: Path) -> dict[tuple[str, int, int], dict[int, float]]:
    """Held-out losses of a sweep by cell (family, width, D) and seed."""
    found: dict[tuple[str, int, int], dict[int, float]] = {}
    with (folder / "runs.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["loss"]:
                cell = row["family"], int(row["width"]), int(float(row["D"]))
                found.setdefault(cell, {})[int(row["seed"])] = float(row["loss"])
    return found


def compared(cpu: Path, gpu: Path) -> list[dict[str, object]]:
    """A row a cell. Differences are at seed 0; standard deviations are of the CPU's seeds, pooled for `in_sd`."""
    on_cpu, on_gpu = losses(cpu), losses(gpu)
    pooled = math.sqrt(statistics.mean(statistics.variance(of.values()) for of in on_cpu.values()))
    rows = []
    for cell, of in sorted(on_cpu.items()):
        difference = on_gpu[cell][0] - of[0]
        figures = of[0], statistics.mean(of.values()), statistics.stdev(of.values()), on_gpu[cell][0], difference
        rounded = [f"{figure:.4f}" for figure in figures]
        rows.append(dict(zip(COLUMNS, (*cell, *rounded, f"{difference / pooled:.2f}"), strict=True)))
    return rows


def main(cpu: str, gpu: str) -> None:
    """Print the table, and below it the two figures that it is about."""
    rows = compared(Path(cpu), Path(gpu))
    table = csv.DictWriter(sys.stdout, COLUMNS)
    table.writeheader()
    table.writerows(rows)
    differences, scaled = ([float(str(row[name])) for row in rows] for name in ("difference", "in_sd"))
    largest = max(abs(difference) for difference in scaled)
    mean, error = statistics.mean(scaled), 1 / math.sqrt(len(rows))
    print(
        f"largest difference {largest:.2f} sd; mean {statistics.mean(differences):+.4f} nats, {mean:+.2f} sd where the "
        f"standard error of a mean of {len(rows)} is {error:.2f} sd",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
