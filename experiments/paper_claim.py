"""Does the MatMul-free paper's figure support its claim of a crossing? Its digitised points, and what they can carry.

    python -m experiments.paper_claim --out docs

A few minutes on one CPU core; no training. Writes paper-claim.csv and paper-claim.png, which docs/paper-claim.md
explains. Expect: the two lines as drawn cross at 8.0e22 FLOP by their rounded coefficients
(CLAIM, 7.7e22, is the same point before rounding), refits of the same end points at 3e24 or 3e28, their
intervals have no upper end, and a ladder that would settle the question.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import brentq
from scipy.stats import t as student

from experiments.simulated_ladders import BASELINE, Cells, Ladder, Noise, crossing_at, draw, optimal_loss
from scaling import Ensemble, Runs, ScalingError, Spec, compare
from scaling.ensemble.answers import interval
from scaling.ensemble.frontier import SIX_N_D
from scaling.plan import Plan, candidates, cheapest
from scaling.report.chart import PALETTE
from scaling.report.plot import SIZE, STYLE, save

# Zhu et al. 2024 (arXiv 2406.02528), figure 3, digitised: (FLOP, training loss in nats) where each
# curve of 370M, 1.3B and 2.7B parameters ends, and the straight lines of loss in log10 FLOP drawn through their tails.
END_POINTS = {
    "matmul-free": ((2.2e19, 2.88), (8.9e20, 2.37), (1.78e21, 2.20)),
    "transformer++": ((2.2e19, 2.62), (7.8e20, 2.155), (1.72e21, 2.076)),
}
DRAWN = {"matmul-free": (9.676, -0.3505), "transformer++": (7.798, -0.2685)}
# Section 4: parameters and training tokens behind the three end points of each family.
PAPER_RUNS = ((3.7e8, 15e9), (1.3e9, 100e9), (2.7e9, 100e9))

READING_SD = 0.02  # nats; how well points can be read off a curve of this width
RUN_NOISE = 0.003  # sd of log loss about a smooth law, the least that published ladders show
CLAIM = 7.7e22  # FLOP at which the digitised lines cross; DRAWN, rounded to four digits, crosses at 8.0e22
ASKED = 1.75e22  # FLOP, one decade beyond the largest end points: as far as a difference is told
GAP_AT = 1.75e21  # FLOP of the largest end points, where MatMul-free is GAP behind
GAP = 2.20 - 2.076
ORDINARY_GAP = 0.04  # of alpha: a moderate difference
LADDER_NOISE = Noise(0.001, 0.0005, misfit=0.002)
RATIOS = (5.0, 10.0, 20.0, 40.0, 80.0)
LARGEST_RUN = 2e21  # FLOP; the paper's own go to 1.78e21
HIGHEST = 60.0  # log10 FLOP up to which a crossing is looked for
Row = tuple[str, str, str]


def lines(points: np.ndarray, power: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Least-squares lines of loss (or its logarithm) in log10 FLOP for points (2 families, 3, 2).

    Returns the difference line (intercept, slope), MatMul-free minus Transformer++, its covariance (2, 2) from the
    pooled residual variance, and the degrees of freedom.
    """
    coefficients, squares, inverse = [], 0.0, np.zeros((2, 2))
    for family in points:
        x, y = np.log10(family[:, 0]), np.log(family[:, 1]) if power else family[:, 1]
        design = np.column_stack([np.ones_like(x), x])
        found = np.linalg.lstsq(design, y, rcond=None)[0]
        coefficients.append(found)
        squares += float(((y - design @ found) ** 2).sum())
        inverse += np.linalg.inv(design.T @ design)
    freedom = points.shape[0] * (points.shape[1] - 2)
    return coefficients[0] - coefficients[1], inverse * squares / freedom, freedom


def crossing(line: np.ndarray) -> float:
    """log10 FLOP at which a difference line (intercept, slope) comes down to zero; inf where it never does."""
    return float(-line[0] / line[1]) if line[1] < 0 else float("inf")


def fieller(line: np.ndarray, covariance: np.ndarray, freedom: float, level: float = 0.95) -> tuple[float, float]:
    """Interval of the crossing of two lines, exact for normal errors (Fieller 1954), within the end points' largest
    compute and 10^HIGHEST FLOP; inf where it is open above."""
    x = np.linspace(np.log10(GAP_AT), HIGHEST, 20_001)
    height = line[0] + line[1] * x
    variance = covariance[0, 0] + 2 * x * covariance[0, 1] + x**2 * covariance[1, 1]
    inside = np.flatnonzero(height**2 <= student.ppf((1 + level) / 2, freedom) ** 2 * variance)
    high = float("inf") if inside[-1] == len(x) - 1 else float(x[inside[-1]])
    return float(x[inside[0]]), high


def table() -> np.ndarray:
    """End points as (2 families, 3, 2), MatMul-free first."""
    return np.array([END_POINTS["matmul-free"], END_POINTS["transformer++"]])


def as_drawn() -> float:
    """log10 FLOP at which the paper's own lines cross."""
    first, second = (np.array(DRAWN[f]) for f in ("matmul-free", "transformer++"))
    return crossing(first - second)


def jittered(power: bool, count: int = 20_000) -> np.ndarray:
    """(count,) log10 crossings of refits after normal reading errors of READING_SD nats; inf where there is none."""
    rng = np.random.default_rng(0)
    points = np.repeat(table()[None], count, axis=0)
    points[..., 1] += READING_SD * rng.normal(size=points.shape[:-1])
    return np.array([crossing(lines(p, power)[0]) for p in points])


def three_sizes(laws: dict[str, tuple[float, ...]], count: int = 20_000) -> np.ndarray:
    """(count,) log10 crossings of straight lines through the paper's three runs a family, were these laws the truth:
    what the method would find with RUN_NOISE on every run."""
    rng = np.random.default_rng(1)
    n, d = np.array(PAPER_RUNS).T
    truths = list(laws.values())[::-1]
    found = []
    exact = [e + a / n**alpha + b / d**beta for e, a, b, alpha, beta in truths]
    for noise in RUN_NOISE * rng.normal(size=(count, 2, 3)):
        points = [np.column_stack([6 * n * d, y * np.exp(z)]) for y, z in zip(exact, noise, strict=True)]
        found.append(crossing(lines(np.array(points), power=False)[0]))
    return np.array(found)


def claimed_laws() -> dict[str, tuple[float, ...]]:
    """Two laws that agree with the figure: MatMul-free (B) is GAP nats behind at GAP_AT and ahead from CLAIM on."""

    def excess(step: float) -> float:
        first, second = crossing_at(CLAIM, step).values()
        return optimal_loss(second, GAP_AT) - optimal_loss(first, GAP_AT) - GAP

    return crossing_at(CLAIM, float(brentq(excess, 0.01, 0.7)))


def parallel_laws() -> dict[str, tuple[float, ...]]:
    """The rival: as far behind at GAP_AT, but never ahead: MatMul-free's parameters are worth a constant share."""
    e, a, b, alpha, beta = BASELINE
    goal = optimal_loss(BASELINE, GAP_AT) + GAP

    def excess(log_rho: float) -> float:
        return optimal_loss((e, a * np.exp(-alpha * log_rho), b, alpha, beta), GAP_AT) - goal

    return {"A": BASELINE, "B": (e, float(a * np.exp(-alpha * brentq(excess, -5.0, 0.0))), b, alpha, beta)}


def deciding_plan() -> Plan:
    """The ladder for the price of the six runs, without a run above LARGEST_RUN, that knows the difference at ASKED
    best, by the noise and misfit that a small pilot of the claimed laws shows."""
    pilot = draw(
        claimed_laws(), Ladder((2e7, 5e7, 1e8, 2e8, 5e8), RATIOS).cells, LADDER_NOISE, np.random.default_rng(0)
    )
    e = Ensemble.of(pilot, ("A", "B"), Spec(draws=400))
    options = candidates(np.geomspace(2e7, 4e9, 12).tolist(), RATIOS, (SIX_N_D, SIX_N_D), LARGEST_RUN, 1e14)
    return cheapest(e, options, spent(), ASKED, keep_runs=False)


def spent() -> float:
    """FLOP of the paper's six runs."""
    return sum(c for points in END_POINTS.values() for c, _ in points)


def cells_of(plan: Plan) -> Cells:
    """The runs of one family of a plan."""
    counts = [len(t.ratios) for t in plan.trunks]
    n = np.repeat([t.n for t in plan.trunks], counts)
    d = n * np.concatenate([t.ratios for t in plan.trunks])
    return Cells(n, d, np.repeat(np.arange(len(counts)), counts), np.full(len(n), 6.0))


def gap_at(truths: dict[str, tuple[float, ...]]) -> float:
    """Loss of B minus loss of A at ASKED, by the laws."""
    first, second = truths.values()
    return optimal_loss(second, ASKED) - optimal_loss(first, ASKED)


def decided(truths: dict[str, tuple[float, ...]], rival: float, cells: Cells, ladders: int) -> tuple[float, float]:
    """Shares of simulated ladders whose 95 % interval of the difference at ASKED holds the truth's own, and leaves out
    the rival's."""
    held, apart = [], []
    for k in range(ladders):
        runs = draw(truths, cells, LADDER_NOISE, np.random.default_rng([7, k]))
        e = Ensemble.of(runs, ("A", "B"), Spec(draws=400, seed=k))
        low, high = interval(e.gaps(np.array([ASKED]))[:, 0])
        held.append(low <= gap_at(truths) <= high)
        apart.append(not low <= rival <= high)
    return float(np.mean(held)), float(np.mean(apart))


def refusal() -> str:
    """What the package answers to the six end points themselves."""
    rows = [
        {"run_id": f"{f}-{k}", "family": f, "N": n, "D": d, "loss": loss, "flops": c}
        for f, points in END_POINTS.items()
        for k, ((n, d), (c, loss)) in enumerate(zip(PAPER_RUNS, points, strict=True))
    ]
    try:
        compare(Runs.from_rows(rows), "transformer++", "matmul-free")
    except ScalingError as error:
        return str(error)
    raise AssertionError("six points were enough for a joint law")


def decade(x: float) -> str:
    """A power of ten, or never."""
    return f"10^{x:.2f}" if np.isfinite(x) else "never"


def spread_row(name: str, found: np.ndarray, how: str) -> Row:
    low, middle, high = np.quantile(found, [0.025, 0.5, 0.975], method="nearest")
    share = np.isinf(found).mean()
    text = f"{decade(middle)} ({decade(low)} to {decade(high)}); never in {share:.0%}"
    return name, text, how


def point_rows() -> Iterator[Row]:
    """What the published points say: no simulation of training, no chance."""
    yield "crossing of the lines as drawn", decade(as_drawn()), "the two lines of figure 3"
    for name, power in (("semi-log", False), ("power law", True)):
        line, covariance, freedom = lines(table(), power)
        yield f"crossing of {name} refits", decade(crossing(line)), "least squares through three end points a family"
        low, high = fieller(line, covariance, freedom)
        text = f"{'the largest runs' if low == np.log10(GAP_AT) else decade(low)} to {decade(high)}"
        yield f"95 % interval, {name}", text, f"Fieller, residual variance with {freedom} degrees of freedom"
        how = f"refits after reading errors of {READING_SD} nats; median (95 %)"
        yield spread_row(f"{name} under reading errors", jittered(power), how)
    yield "a law of N and D", "refused", refusal()


def ladder_rows(ladders: int) -> Iterator[Row]:
    """What the method could find at best, and what would settle the question."""
    gap = list(claimed_laws().values())[1][3] - BASELINE[3]
    yield (
        "alpha that the claim needs",
        f"{gap:+.3f}",
        f"{GAP:.3f} nats behind at {GAP_AT:.2e} FLOP, level at {CLAIM:.1e}",
    )
    how = (
        f"straight lines through 370M, 1.3B, 2.7B of laws that cross at 10^{np.log10(CLAIM):.2f}, {RUN_NOISE:.1%} noise"
    )
    for step, laws in ((gap, claimed_laws()), (ORDINARY_GAP, crossing_at(CLAIM, ORDINARY_GAP))):
        yield spread_row(f"three sizes a family, alpha {step:+.2f}", three_sizes(laws), how)
    yield "cost of the six runs", f"{spent():.2e} FLOP", "sum of the end points' compute"
    plan = deciding_plan()
    shape = "; ".join(f"{t.n:.2g} x {len(t.ratios)}" for t in plan.trunks)
    yield "a ladder for that price", shape, "parameters x number of token budgets, both families alike"
    largest = f"both families; largest run at most {LARGEST_RUN:.0e}"
    yield "its cost", f"{plan.flops:.2e} FLOP", largest
    both = {"if the claim holds": claimed_laws(), "if the laws are parallel": parallel_laws()}
    for name, truths in both.items():
        yield (
            f"difference at {ASKED:.2e} FLOP, {name}",
            f"{gap_at(truths):+.3f} nats",
            "one decade beyond the largest runs",
        )
    asked = f"of {ladders} simulated ladders, with 0.2 % lack of fit"
    for (name, truths), other in zip(both.items(), list(both.values())[::-1], strict=True):
        held, apart = decided(truths, gap_at(other), cells_of(plan), ladders)
        text = f"interval holds the truth in {held:.0%}, leaves out the other claim in {apart:.0%}"
        yield f"it would say, {name}", text, asked


def picture(path: Path) -> None:
    """End points, the lines as drawn and as refitted, and the crossings' intervals."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
    x = np.linspace(19, 29, 200)
    for place, (family, points) in enumerate(END_POINTS.items()):
        c, loss = np.array(points).T
        colour = PALETTE[1 - place]
        axes.plot(c, loss, "s" if place == 0 else "o", color=colour, ms=7, mec="white", label=family, zorder=4)
        intercept, slope = DRAWN[family]
        axes.plot(10**x, intercept + slope * x, color=colour, lw=1.8)
        axes.plot(10**x, np.polyval(np.polyfit(np.log10(c), loss, 1), x), color=colour, lw=1.2, ls=(0, (4, 2)))
        axes.plot(10**x, np.exp(np.polyval(np.polyfit(np.log10(c), np.log(loss), 1), x)), color=colour, lw=1.2, ls=":")
    for style, name in (("-", "as drawn"), ((0, (4, 2)), "refitted, semi-log"), (":", "refitted, power law")):
        axes.plot([], [], color="0.3", ls=style, lw=1.4, label=name)
    for level, power in ((0.55, False), (0.35, True)):
        line, covariance, freedom = lines(table(), power)
        low, _ = fieller(line, covariance, freedom)
        axes.annotate("", (1e29, level), (10**low, level), arrowprops={"arrowstyle": "->", "color": "0.2", "lw": 2})
        text = f"crossing, 95 % interval, {'power law' if power else 'semi-log'}"
        axes.text(10 ** (low + 0.1), level + 0.03, text, fontsize=8, color="0.2")
    axes.set_xscale("log")
    axes.set_xlim(1e19, 1e29)
    axes.set_ylim(0.2, 3.1)
    axes.set_xlabel("training compute (FLOP)")
    axes.set_ylabel("training loss (nats per token)")
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--ladders", type=int, default=200, help="simulated ladders a truth")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    picture(a.out / "paper-claim.png")
    with (a.out / "paper-claim.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["quantity", "value", "how"])
        for rows in (point_rows(), ladder_rows(a.ladders)):
            for row in rows:
                writer.writerow(row)
                print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
