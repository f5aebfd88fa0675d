"""Speed of the fits beside SciPy's L-BFGS-B in the same process: `python -m experiments.fit_speed [--out FILE.md]`.

The tables are synthetic: 240 rows of a Chinchilla law (Besiroglu et al. 2024's vector) with 0.5 % noise, and ladders of
two families. CPU seconds are given beside wall-clock ones, since the machine may be shared.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from scipy.optimize import minimize

from experiments.simulated_ladders import Ladder, Noise, draw
from scaling import analyse
from scaling.fitting.fit import Fit, bounds_of, fit, starts_of
from scaling.fitting.solve import evaluate, gradient, multistart
from scaling.report.write import write_report
from scaling.tables.runs import Runs
from scaling.verify import pair_bootstrap

ROWS, STARTS, DRAWS, SCIPY_PROBLEMS = 240, 64, 4000, 40


def sample_table(seed: int = 0) -> Runs:
    """240 runs, sizes 1e8-1e10, 5-200 tokens a parameter."""
    rng = np.random.default_rng(seed)
    n = 10 ** rng.uniform(8, 10, ROWS)
    d = n * 10 ** rng.uniform(np.log10(5), np.log10(200), ROWS)
    loss = 1.8169 + 482.01 / n**0.3478 + 2085.43 / d**0.3658
    return Runs.of(N=n, D=d, loss=loss * np.exp(0.005 * rng.normal(size=ROWS)))


class Took(NamedTuple):
    """Seconds, the best of several repeats: wall clock and CPU."""

    wall: float
    cpu: float


def timed(work: Callable[[], object], repeats: int = 7) -> Took:
    """Best time of several runs, each clock by itself."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return Took(min(w for w, _ in times), min(c for _, c in times))


def scipy_refit(fitted: Fit, seed: int) -> Took:
    """One pair-bootstrap refit by L-BFGS-B in our centred coordinates with our analytic gradient."""
    weight = np.random.default_rng(seed).multinomial(ROWS, np.full(ROWS, 1 / ROWS)).astype(float)
    target = fitted.objective.target(fitted.runs["loss"])
    scale = fitted.objective.delta

    def value_and_slope(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value = evaluate(fitted.model, fitted.objective, theta[None], target, weight)[0]
        return value / scale, gradient(fitted.model, fitted.objective, theta[None], target, weight)[0][0] / scale

    options = {"ftol": 1e-15, "gtol": 1e-8}
    return timed(lambda: minimize(value_and_slope, fitted.theta, jac=True, method="L-BFGS-B", options=options), 1)


def measured() -> list[tuple[str, Took, str]]:
    """What was timed, how long it took, and the goal."""
    runs, two, eight = sample_table(), families(2), families(8)
    fitted = fit(runs)
    model, loss, every = fitted.model, runs["loss"], np.ones(ROWS)
    starts, box = starts_of(model, loss, STARTS, 0), bounds_of(model, loss)
    solving = timed(lambda: multistart(model, fitted.objective, loss, every, starts, box))
    singles = [scipy_refit(fitted, seed) for seed in range(SCIPY_PROBLEMS)]
    theirs = Took(*(DRAWS * float(np.mean(clock)) for clock in zip(*singles, strict=True)))
    pair = timed(lambda: analyse(two, draws=DRAWS), 3)
    answers = analyse(two, draws=DRAWS)
    asked = timed(lambda: (answers.crossing(), answers.difference(1e20), answers.allocate(1e20, "F0")), 1)
    with tempfile.TemporaryDirectory() as folder:
        reports = [timed(partial(write_report, runs, folder), 1) for runs in (two, eight)]
        size = (Path(folder) / "report.html").stat().st_size / 1e6
    return [
        (f"{STARTS} starts carried to the optimum, {ROWS} rows", solving, ""),
        (f"fit of {STARTS} starts with polish, second solver and certificate", timed(lambda: fit(runs)), "0.05"),
        (f"{DRAWS} bootstrap refits of {ROWS} rows", timed(lambda: pair_bootstrap(fitted, DRAWS), 3), "3"),
        (f"the same by SciPy L-BFGS-B, one start each ({SCIPY_PROBLEMS} measured)", theirs, ""),
        (f"ensemble of {DRAWS} draws, two families of 28 rows", pair, "3"),
        ("its crossing, a difference beyond the runs (back-test included) and an allocation", asked, ""),
        ("report of two families", reports[0], "15"),
        (f"report of eight families (page {size:.1f} MB, plotly.js included)", reports[1], "45"),
    ]


def families(count: int) -> Runs:
    """Families of 7 sizes x 4 budgets with 0.3 % noise, exponents 0.005 apart."""
    truths = {f"F{k}": (1.8, 250.0, 420.0, 0.34 + 0.005 * k, 0.37) for k in range(count)}
    ladder = Ladder(tuple(np.geomspace(1e6, 2.5e8, 7)), (5, 10, 20, 80))
    return draw(truths, ladder.cells, Noise(0.003), np.random.default_rng(0))


def table(rows: list[tuple[str, Took, str]]) -> str:
    """The measurements as Markdown, with where and on what they were made."""
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, SciPy {scipy.__version__}"
    where = f"{datetime.now(UTC):%Y-%m-%d}, {versions}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
    lines = ["| what | wall, s | CPU, s | goal, s |", "|---|---:|---:|---:|"]
    lines += [f"| {what} | {took.wall:.3g} | {took.cpu:.3g} | {goal} |" for what, took, goal in rows]
    return f"# Speed of the fits\n\n`python -m experiments.fit_speed`: {where}.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Markdown file to write as well")
    out = parser.parse_args().out
    text = table(measured())
    print(text, end="")
    if out:
        out.write_text(text)


if __name__ == "__main__":
    main()
