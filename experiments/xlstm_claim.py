"""Does xLSTM lead Llama at every amount of compute? What the public runs of the xLSTM scaling study carry.

    python -m experiments.xlstm_claim --out docs

Half a minute on an idle CPU core; no training. Writes xlstm-claim.csv and xlstm-claim.png, which docs/xlstm-claim.md
explains. Expect: a lead at all three budgets at which both families were trained on 16,384 tokens of context, smaller
at each larger budget, most of it lost where mixing over time is not counted; and no statement beyond 3e19 FLOP.

The rows are of Beck et al. 2025 (arXiv 2510.02228), by their own code from the logs in NX-AI/xlstm_scaling_laws at
604bb30: finished runs only, FLOP by their default rule (attention counted).
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from scaling import Ensemble, Runs, Spec, compare
from scaling.ensemble.answers import interval
from scaling.fitting.approaches import IsoCurve, isoflop
from scaling.report.chart import PALETTE
from scaling.report.plot import SIZE, STYLE, save

TABLE = Path(__file__).parent / "tables" / "xlstm_runs.csv"
PAIR = ("Llama", "xLSTM")
CONTEXT = 16384  # tokens; the one context at which the runs of both families are at hand, at equal batch size
OTHER, OTHER_BUDGET = 8192, 1e20  # there both were trained on one budget, xLSTM on batches twice as large
BUDGETS = (6e18, 1e19, 3e19)
BEYOND = 3e20
DIVERGED = 5.0  # nats; three runs of xLSTM ended between 7.6 and 10.8, where guessing costs 10.8
SPEC = Spec(draws=1000, select="best")  # cells with several learning rates count by their best
LAWS = ("chinchilla", "tied", "gamma")
Row = tuple[str, str, str]


def read(context: int) -> Runs:
    """The runs of both families at one context length that did not diverge."""
    runs = Runs.read(TABLE)
    return runs.select((runs["context"] == context) & (runs["loss"] < DIVERGED))


def minima(context: int, family: str) -> dict[float, IsoCurve]:
    """The parabola in log N of each budget, by the budget."""
    runs = read(context)
    runs = runs.select(runs["family"] == family)
    labels = runs["budget"].astype(float)
    runs, labels = runs.select(np.isfinite(labels)), labels[np.isfinite(labels)]
    found: dict[float, IsoCurve] = {}
    for budget in np.unique(labels):
        curves = isoflop(runs.select(labels == budget), labels[labels == budget]).curves
        found |= {float(budget): curves[0]} if curves else {}
    return found


def ensemble(spec: Spec = SPEC, mixing: bool = True) -> Ensemble:
    """All that is stated of the two families. Without `mixing` compute is that of linear layers, as if attention to
    16,384 tokens were free."""
    runs = read(CONTEXT)
    if not mixing:
        rows = [row | {"flops": row["flops"] * (1 - float(row["mixing"]))} for row in runs.records()]
        runs = Runs.from_rows(rows)
    return compare(runs, *PAIR, spec)


def signed(low: float, middle: float, high: float) -> str:
    """A difference in nats with its interval."""
    return f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"


def told(e: Ensemble, budget: float) -> str:
    """The difference of frontiers at a budget."""
    found = e.difference(budget)
    return signed(found.low, found.value, found.high)


def table_rows() -> Iterator[Row]:
    """What was measured, without any law of N and D."""
    runs = Runs.read(TABLE)
    yield "finished runs with a loss", str(len(runs)), "of 672 in the paper; the logs of the others are not at hand"
    diverged = (runs["loss"] >= DIVERGED).sum()
    yield "diverged and left out", str(diverged), f"loss above {DIVERGED} nats; all of xLSTM, over a billion parameters"
    matched = read(CONTEXT)
    counts = ", ".join(f"{(matched['family'] == f).sum()} {f}" for f in PAIR)
    yield f"at {CONTEXT} tokens", counts, f"{matched['flops'].min():.1e} to {matched['flops'].max():.1e} FLOP"
    for f in PAIR:
        share = np.quantile(matched["mixing"][matched["family"] == f].astype(float), [0, 0.5, 1])
        text = "{1:.0%} ({0:.0%} to {2:.0%})".format(*share)
        yield f"share of mixing over time, {f}", text, "of the FLOP; median and range over the runs at this context"
    ends = {context: [minima(context, f) for f in PAIR] for context in (CONTEXT, OTHER)}
    for context, budgets in ((CONTEXT, BUDGETS), (OTHER, (OTHER_BUDGET,))):
        for budget in budgets:
            first, second = (found[budget].best_loss for found in ends[context])
            text = f"{first:.3f} and {second:.3f}: {second - first:+.3f}"
            yield f"best loss at {budget:.0e} FLOP, {context} tokens", text, "minima of parabolas in log N"


def frontier_rows(e: Ensemble) -> Iterator[Row]:
    """What the ensemble says of the frontiers, within the runs and beyond."""
    yield "headline", e.verdict()[0], "`scaling compare`, defaults, best learning rate of each cell"
    for budget in BUDGETS:
        yield f"difference at {budget:.0e} FLOP", told(e, budget), "frontier of xLSTM minus that of Llama, 95 %"
    gaps = e.gaps(np.array([BUDGETS[0], BUDGETS[-1]]))
    change = gaps[:, 1] - gaps[:, 0]
    low, high = interval(change)
    yield (
        "change of the lead",
        signed(low, float(np.median(change)), high),
        "from 6e18 to 3e19 FLOP; above zero: it shrinks",
    )
    found = e.difference(BEYOND)
    how = f"{found.decades:.1f} decades beyond the runs: {'validated' if found.validated else 'not validated'}"
    yield f"difference at {BEYOND:.0e} FLOP", told(e, BEYOND), how
    rho = e.efficiency()
    text = f"{rho.rho:.2f} ({rho.low:.2f} to {rho.high:.2f})"
    yield (
        "one parameter of xLSTM is worth",
        text,
        f"parameters of Llama, at {rho.N:.2g} parameters and {rho.D:.2g} tokens",
    )


def choice_rows() -> Iterator[Row]:
    """What other choices would say: of the law, and of what counts as compute."""
    for law in LAWS:
        e = ensemble(replace(SPEC, law=law))
        share = (e.gaps(np.array([BEYOND]))[:, 0] < 0).mean()
        how = f"share of draws in which xLSTM leads: {share:.2f}"
        yield f"difference at {BEYOND:.0e} FLOP, law `{law}`", told(e, BEYOND), how
    e = ensemble(mixing=False)
    for budget in BUDGETS[:2]:
        yield f"difference at {budget:.0e} FLOP without mixing", told(e, budget), "linear layers alone are counted"


def forecast_row() -> Row:
    """What the smaller two budgets say of the third."""
    runs = read(CONTEXT)
    e = compare(runs.select(runs["flops"] < 2e19), *PAIR, SPEC)
    return "difference at 3e+19 FLOP, by the runs below 2e19", told(e, BUDGETS[-1]), e.verdict()[0]


def picture(e: Ensemble, path: Path) -> None:
    """Left: loss against parameters at each budget; right: the difference of frontiers and of parabolas' minima."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 * SIZE[0], SIZE[1]), layout="constrained")
        left, right = figure.subplots(1, 2)
    marks = ("o", "s", "^")
    curves = [minima(CONTEXT, f) for f in PAIR]
    for family, found, colour in zip(PAIR, curves, PALETTE, strict=False):
        for mark, budget in zip(marks, BUDGETS, strict=True):
            curve = found[budget]
            left.plot(curve.n, curve.loss, mark, color=colour, ms=5, mec="white", label=f"{family}, {budget:.0e} FLOP")
            left.plot(curve.grid, curve.fitted, color=colour, lw=1.2)
    left.set(xscale="log", xlabel="parameters", ylabel="loss (nats per token)", ylim=(2.83, 3.62))
    left.set_title(f"runs at {CONTEXT} tokens of context", fontsize=11)
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    budgets = np.geomspace(BUDGETS[0], BEYOND, 40)
    gaps = e.gaps(budgets)
    low, middle, high = np.quantile(gaps, [0.025, 0.5, 0.975], axis=0)
    within = budgets <= e.measured()[1]
    for part, style, alpha in ((within, "-", 0.25), (~within, (0, (4, 2)), 0.1)):
        right.plot(budgets[part], middle[part], color="0.2", ls=style, lw=1.6)
        right.fill_between(budgets[part], low[part], high[part], color="0.2", alpha=alpha, lw=0)
    points = [curves[1][c].best_loss - curves[0][c].best_loss for c in BUDGETS]
    right.plot(BUDGETS, points, "D", color=PALETTE[2], ms=7, mec="white", label="minima of the parabolas")
    right.axhline(0, color="0.6", lw=0.8)
    right.set(xscale="log", xlabel="training compute (FLOP)", ylabel="loss of xLSTM minus loss of Llama (nats)")
    right.text(0.97, 0.03, "dashed: beyond the runs, not validated", transform=right.transAxes, ha="right", fontsize=8)
    right.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.93))
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    e = ensemble()
    picture(e, a.out / "xlstm-claim.png")
    with (a.out / "xlstm-claim.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["quantity", "value", "how"])
        for rows in (table_rows(), frontier_rows(e), [forecast_row()], choice_rows()):
            for row in rows:
                writer.writerow(row)
                print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
