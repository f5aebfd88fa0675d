"""The picture in README.md: held-out loss against compute of the quickstart's ladder, from the committed table.

    python -m experiments.quickstart_picture

Reads the 30 runs on one H200 in results/quickstart_devices.csv (the column `gpu`). Writes docs/quickstart.png and, as a
runs table with N and FLOPs from the configs, results/quickstart_h200.csv, which docs/tutorials/scaling-claim.md uses.
A line joins the three token budgets of a model size. Compute is that of the products in training.
"""

import csv
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from experiments.quickstart import DATA, FAMILIES, WIDTHS, base_run
from mmfree_jax import flops

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "quickstart.png"
COLOURS = {"transformer++": "#1f77b4", "matmul-free": "#d62728"}
MARKERS = "os^Dv"  # one for each width


def runs_table() -> list[dict[str, Any]]:
    """The runs in the order of the committed table."""
    rows = []
    with (RESULTS / "quickstart_devices.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            family, width, D = row["family"], int(row["width"]), int(row["D"])
            model = base_run(family, width, 1e-3).model
            rows.append(
                {
                    "run_id": f"{family}-w{width}-{D}",
                    "family": family,
                    "N": flops.parameters(model).N,
                    "D": D,
                    "loss": float(row["gpu"]),
                    "flops": flops.train_flops_per_token(model, DATA.sequence).products * D,
                    "width": width,
                    "cluster": f"{family}-w{width}",
                }
            )
    return rows


def draw(rows: list[dict[str, Any]]) -> None:
    """Write the picture."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
    for family in FAMILIES:
        for width, marker in zip(WIDTHS, MARKERS, strict=True):
            line = sorted((r["flops"], r["loss"]) for r in rows if (r["family"], r["width"]) == (family, width))
            compute, loss = zip(*line, strict=True)
            label = family if width == WIDTHS[-1] else None
            axes.plot(compute, loss, marker=marker, color=COLOURS[family], lw=1.2, ms=4, label=label)
    for width, marker in zip(WIDTHS, MARKERS, strict=True):
        axes.plot([], [], marker, color="0.4", ms=4, label=f"width {width}")
    axes.set_xscale("log")
    axes.set_xlabel("training compute (FLOP)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    """Write the table and the picture."""
    rows = runs_table()
    with (RESULTS / "quickstart_h200.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows)


if __name__ == "__main__":
    main()
