"""Speed of the fits beside SciPy's L-BFGS-B in the same process: `python -m scaling.benchmark [--out FILE.md]`.

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
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from scipy.optimize import minimize

from scaling.fitting.fit import Fit, bounds_of, fit, starts_of
from scaling.fitting.solve import evaluate, gradient, multistart
from scaling.report.write import write_report
from scaling.tables.runs import Runs
from scaling.uncertainty.bootstrap import bootstrap
from scaling.uncertainty.simulate import SIXTY, TRUTHS, Noise, draw

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
    runs, ladder = sample_table(), two_families()
    fitted, joint = fit(runs), fit(ladder, share=("E",))
    model, loss, every = fitted.model, runs["loss"], np.ones(ROWS)
    starts, box = starts_of(model, loss, STARTS, 0), bounds_of(model, loss)
    solving = timed(lambda: multistart(model, fitted.objective, loss, every, starts, box))
    ours = timed(lambda: bootstrap(fitted, DRAWS), 3)
    singles = [scipy_refit(fitted, seed) for seed in range(SCIPY_PROBLEMS)]
    theirs = Took(*(DRAWS * float(np.mean(clock)) for clock in zip(*singles, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        report = timed(lambda: write_report(ladder, folder), 1)
    return [
        (f"{STARTS} starts carried to the optimum, {ROWS} rows", solving, ""),
        (f"fit of {STARTS} starts with polish, second solver and certificate", timed(lambda: fit(runs)), "0.05"),
        (f"{DRAWS} bootstrap refits of {ROWS} rows", ours, "3"),
        (f"the same by SciPy L-BFGS-B, one start each ({SCIPY_PROBLEMS} measured)", theirs, ""),
        (
            f"two families of {len(ladder) // 2} rows, shared E, {DRAWS} refits",
            timed(lambda: bootstrap(joint, DRAWS), 1),
            "10",
        ),
        ("report of those two families, 2000 draws", report, "30"),
    ]


def two_families() -> Runs:
    """A ladder of 10 sizes x 6 budgets a family with 0.3 % noise."""
    return draw(TRUTHS, SIXTY.cells, Noise(0.003), np.random.default_rng(0), clustered=False)


def table(rows: list[tuple[str, Took, str]]) -> str:
    """The measurements as Markdown, with where and on what they were made."""
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, SciPy {scipy.__version__}"
    where = f"{datetime.now(UTC):%Y-%m-%d}, {versions}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
    lines = ["| what | wall, s | CPU, s | goal, s |", "|---|---:|---:|---:|"]
    lines += [f"| {what} | {took.wall:.3g} | {took.cpu:.3g} | {goal} |" for what, took, goal in rows]
    return f"# Speed of the fits\n\n`python -m scaling.benchmark`: {where}.\n\n" + "\n".join(lines) + "\n"


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
