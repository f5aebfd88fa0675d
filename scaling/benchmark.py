"""Speed of the fits beside SciPy's L-BFGS-B in the same process: `python -m scaling.benchmark [--draws 4000]`.

The table is synthetic: 240 rows of a Chinchilla law (Besiroglu et al. 2024's vector) with 0.5 % noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from scaling.fitting.fit import bounds_of, fit, starts_of
from scaling.fitting.solve import evaluate, gradient, multistart
from scaling.tables.runs import Runs
from scaling.uncertainty.bootstrap import bootstrap

ROWS, STARTS, SCIPY_PROBLEMS = 240, 64, 40


def sample_table(seed: int = 0) -> Runs:
    """240 runs, sizes 1e8-1e10, 5-200 tokens a parameter."""
    rng = np.random.default_rng(seed)
    n = 10 ** rng.uniform(8, 10, ROWS)
    d = n * 10 ** rng.uniform(np.log10(5), np.log10(200), ROWS)
    loss = 1.8169 + 482.01 / n**0.3478 + 2085.43 / d**0.3658
    return Runs.of(N=n, D=d, loss=loss * np.exp(0.005 * rng.normal(size=ROWS)))


def timed(work: Callable[[], object], repeats: int = 5) -> float:
    """Best wall time in seconds of several runs."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def scipy_refit(runs: Runs, seed: int) -> float:
    """Seconds of one pair-bootstrap refit by L-BFGS-B in our centred coordinates with our analytic gradient."""
    fitted = fit(runs)
    weight = np.random.default_rng(seed).multinomial(ROWS, np.full(ROWS, 1 / ROWS)).astype(float)
    target = fitted.objective.target(runs["loss"])
    scale = fitted.objective.delta

    def value_and_slope(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value = evaluate(fitted.model, fitted.objective, theta[None], target, weight)[0]
        return value / scale, gradient(fitted.model, fitted.objective, theta[None], target, weight)[0][0] / scale

    begin = time.perf_counter()
    minimize(value_and_slope, fitted.theta, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-8})
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4000)
    draws = parser.parse_args().draws
    runs = sample_table()
    fitted = fit(runs)
    model, loss = fitted.model, runs["loss"]
    starts, box = starts_of(model, loss, STARTS, 0), bounds_of(model, loss)
    solve = timed(lambda: multistart(model, fitted.objective, loss, np.ones(ROWS), starts, box))
    print(f"{STARTS} starts, solved       {1e3 * solve:8.1f} ms")
    print(f"fit() with certificate  {1e3 * timed(lambda: fit(runs, starts=STARTS)):8.1f} ms")
    ours = timed(lambda: bootstrap(fitted, draws), 2)
    print(f"{draws} refits             {ours:8.2f} s")
    one = float(np.mean([scipy_refit(runs, seed) for seed in range(SCIPY_PROBLEMS)]))
    print(
        f"SciPy L-BFGS-B          {one * draws:8.2f} s  ({1e3 * one:.1f} ms each, {one * draws / ours:.0f} times ours)"
    )


if __name__ == "__main__":
    main()
