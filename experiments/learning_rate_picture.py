"""The picture and the verdict of learning_rate_transfer.py: loss against rate, a line for each width.

    python -m experiments.learning_rate_picture runs/transfer/runs.csv --out runs/transfer.png

Prints the optimum at each width, by a parabola through the best three rates, and how far it moves from that of the
narrowest. A mark shows each optimum, a cross at the top a run that diverged.
"""

import csv
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import tyro
from matplotlib.figure import Figure

from experiments.learning_rate_transfer import DATA, PARAMETRISATIONS, STEP
from mmfree_jax.command_line import parse
from mmfree_jax.config import ConfigError, require
from scaling.report.plot import STYLE, save

Curves = dict[tuple[str, str], dict[int, dict[float, float]]]  # family, parametrisation -> width -> rate -> loss


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draw loss against rate and print the optima."""

    table: tyro.conf.Positional[Path]
    """Runs table of learning_rate_transfer (CSV)."""
    out: Path
    """The picture (PNG, SVG or PDF)."""


def read(path: Path) -> list[dict[str, Any]]:
    """Read the columns that matter. A run that ended worse than knowing nothing has diverged.

    Raises ConfigError for a table without these columns.
    """
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    wanted: dict[str, Any] = {"family": str, "parametrisation": str, "width": int, "lr": float, "loss": float}
    missing = sorted(set(wanted) - set(rows[0] if rows else wanted))
    require(not missing, f"{path}: not a table of this experiment: it has no {', '.join(missing)}")
    return [
        {name: kind(row[name]) for name, kind in wanted.items()}
        | {"diverged": row.get("diverged") == "True" or not float(row["loss"]) < math.log(DATA.vocab)}
        for row in rows
    ]


def optimum(losses: dict[float, float]) -> float:
    """The best rate: the lowest point of the parabola in log rate through the least loss and its neighbours.

    The least tried rate itself where a neighbour is missing or diverged.
    """
    tried = sorted(losses)
    at = min(range(len(tried)), key=lambda i: losses[tried[i]])
    around = [losses[tried[i]] for i in (at - 1, at, at + 1) if 0 <= i < len(tried)]
    if len(around) < 3 or not all(map(math.isfinite, around)):
        return tried[at]
    below, least, above = around
    curvature = below - 2 * least + above
    return tried[at] * STEP ** (0.5 * (below - above) / curvature) if curvature > 0 else tried[at]


def curves(rows: list[dict[str, Any]]) -> Curves:
    """Mean losses over seeds, infinite where a run diverged.

    The narrowest width, the base of muP, counts for both parametrisations.
    """
    base = min(row["width"] for row in rows)
    found: dict[tuple[str, str], dict[int, dict[float, list[float]]]] = {}
    for row in sorted(rows, key=lambda row: row["width"]):
        for parametrisation in PARAMETRISATIONS if row["width"] == base else (row["parametrisation"],):
            tried = found.setdefault((row["family"], parametrisation), {}).setdefault(row["width"], {})
            tried.setdefault(row["lr"], []).append(math.inf if row["diverged"] else row["loss"])
    mean = lambda tried: {lr: sum(losses) / len(losses) for lr, losses in tried.items()}
    return {key: {width: mean(tried) for width, tried in widths.items()} for key, widths in found.items()}


def verdict_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The optimum at each width, and how many grid steps it moves away from that of the base."""
    for (family, parametrisation), widths in curves(rows).items():
        best = {width: optimum(losses) for width, losses in widths.items()}
        moved = [math.log(lr / best[min(best)], STEP) for lr in best.values()]
        farthest = max(moved, key=abs)
        shown = ", ".join(f"{width}: {lr:.3g}" for width, lr in best.items())
        held = "within one grid step" if abs(farthest) <= 1 else "moves by more than one grid step"
        yield f"{family}, {parametrisation}: {shown} · {farthest:+.2f} steps of x{STEP:g} · {held}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Panels of family x parametrisation."""
    panels = curves(rows)
    families = sorted({family for family, _ in panels}, reverse=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4 * len(families)), layout="constrained")
        grid = figure.subplots(len(families), len(PARAMETRISATIONS), sharex="row", sharey="row", squeeze=False)
    for across, family in zip(grid, families, strict=True):
        for axes, parametrisation in zip(across, PARAMETRISATIONS, strict=True):
            _panel(axes, panels.get((family, parametrisation), {}))
            axes.set_title(f"{family}, {'muP' if parametrisation == 'mup' else parametrisation}", fontsize=10)
        across[0].set_ylabel("held-out loss (nats per token)")
        across[-1].legend(frameon=False, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("learning rate (of the base width under muP)")
    save(figure, path)


def _panel(axes: Any, widths: dict[int, dict[float, float]]) -> None:
    colours = matplotlib.colormaps["viridis"]
    for i, (width, losses) in enumerate(widths.items()):
        colour = colours(0.85 * i / max(1, len(widths) - 1))
        ended = {lr: loss for lr, loss in sorted(losses.items()) if math.isfinite(loss)}
        axes.plot(list(ended), list(ended.values()), "o-", color=colour, ms=4, lw=1.5, label=f"width {width}")
        if ended:
            axes.plot(optimum(losses), min(ended.values()), marker="v", color=colour, ms=9, mec="white", zorder=4)
        lost = [lr for lr in losses if lr not in ended]
        axes.plot(lost, [0.97] * len(lost), "x", color=colour, ms=7, transform=axes.get_xaxis_transform())
    axes.set_xscale("log", base=2)
    tried = sorted({lr for losses in widths.values() for lr in losses})
    axes.set_xticks(tried[::2], [f"{lr:.2g}" for lr in tried[::2]])
    axes.minorticks_off()


def main(arguments: list[str]) -> int:
    """The command; returns the exit status."""
    try:
        choice = parse(Draw, arguments, "experiments.learning_rate_picture")
        rows = read(choice.table)
        require(bool(rows), f"{choice.table}: no runs yet")
        draw(rows, choice.out)
        print("\n".join(verdict_lines(rows)))
    except (ConfigError, OSError) as error:
        print(f"learning_rate_picture: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
