"""Forecasts of public tables' dearest runs from their cheaper ones: how many lay in their 95 % intervals.

    python -m experiments.public_forecasts --data DIR --out experiments/results/public_forecasts.csv      (one minute)

DIR holds the tables that `scaling verify` reads, and beside them, where they are at hand, llama3.csv, marin.csv and
olmo.csv (columns as in the commands below). Early ladders that fail the ladder gate (five sizes, 1.5 decades of
compute) are not fitted, as nobody should extrapolate from them. Expect at least 90 % inside, pooled, in the top decade.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from scaling import Ensemble, Runs, Spec
from scaling.ensemble.backtest import DISTANCES, LeftOut
from scaling.verify import epoch_table, gadre_table, xlstm_table

MARIN = {"N": "params", "D": "tokens", "flops": "budget", "family": "dataset"}


def tables(folder: Path) -> dict[str, Runs]:
    """Every table at hand, one family each."""
    out = {
        "epoch": epoch_table(folder / "epoch_chinchilla" / "svg_extracted_data.csv"),
        "gadre": gadre_table(folder / "gadre" / "models.csv"),
    }
    xlstm = xlstm_table(folder / "xlstm" / "isoflop_selected.csv")
    out |= {str(s): xlstm.select(xlstm["source"] == s) for s in np.unique(xlstm["source"].astype(str))}
    for name, columns in (("llama3", {}), ("marin", MARIN), ("olmo", {"loss": "c4"})):
        path = folder / f"{name}.csv"
        if path.is_file():
            runs = Runs.read(path, columns=columns)
            out |= {f"{name} {f}": runs.family(f) for f in runs.families}
    return out


def row(name: str, distance: str, points: list[LeftOut]) -> dict[str, str]:
    inside = sum(p.inside for p in points)
    share = f"{inside / len(points):.3f}" if points else ""
    return {
        "table": name,
        "decades beyond": distance,
        "left out": str(len(points)),
        "inside": str(inside),
        "share": share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    rows: list[dict[str, str]] = []
    every: list[LeftOut] = []
    for name, runs in tables(a.data).items():
        found = Ensemble.of(runs, runs.families, Spec(draws=400)).test
        rows.append(row(name, "all", list(found.points)))
        every += found.points
    for low, high in zip((0.0, *DISTANCES), DISTANCES, strict=False):
        rows.append(row("pooled", f"{low:g} to {high:g}", [p for p in every if low < p.decades <= high]))
    rows.append(row("pooled, the top decade", "fitted below 1/10", [p for p in every if p.origin == 10.0]))
    with a.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(a.out.read_text(), end="")


if __name__ == "__main__":
    main()
