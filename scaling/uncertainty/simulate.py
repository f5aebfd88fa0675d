"""Ladders drawn from known laws: whether intervals cover what they promise, and what a ladder could decide.

`python -m scaling.uncertainty.simulate --ladders 1000 --out FILE` writes the coverage table: share of simulated
ladders whose nominal 95 % interval holds the truth, by design, noise and bootstrap.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling.fitting.fit import fit
from scaling.tables.runs import FLOPS_PER_PARAMETER_TOKEN, Runs, ScalingError
from scaling.uncertainty.bootstrap import Draws, bootstrap, interval
from scaling.uncertainty.sensitivity import delta_from_noise

LAW = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True)
class Noise:
    """Standard deviations on log loss: of a run, of a trunk (all decays of one size), of a cell common to families;
    and of lack of fit, a smooth wave along log N and log D that the law cannot follow."""

    run: float = 0.003
    trunk: float = 0.0
    common: float = 0.0
    misfit: float = 0.0


@dataclass(frozen=True)
class Cells:
    """The runs of one family: sizes n and tokens d, which of them are decays off one trunk, and what they cost in FLOP
    per parameter and token; all (n,)."""

    n: np.ndarray
    d: np.ndarray
    trunk: np.ndarray
    rate: np.ndarray


@dataclass(frozen=True)
class Ladder:
    """Sizes (parameters) and tokens per parameter; each size is one trunk with a decay per ratio."""

    sizes: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def flops(self) -> float:
        """Cost of one family: each trunk is trained once, to its largest budget, as decays branch off it."""
        return FLOPS_PER_PARAMETER_TOKEN * sum(n * n * max(self.ratios) for n in self.sizes)

    @property
    def cells(self) -> Cells:
        """Every size with every ratio."""
        n = np.repeat(self.sizes, len(self.ratios))
        trunk = np.repeat(np.arange(len(self.sizes)), len(self.ratios))
        rate = np.full(len(n), FLOPS_PER_PARAMETER_TOKEN)
        return Cells(n, n * np.tile(self.ratios, len(self.sizes)), trunk, rate)


@dataclass(frozen=True)
class Case:
    """One row of the coverage table."""

    name: str
    ladder: Ladder
    noise: Noise
    method: str
    clustered: bool = True
    delta: float | None = 1e-3


Truth = Sequence[float] | Callable[[np.ndarray, np.ndarray], np.ndarray]
Truths = Mapping[str, Sequence[float]]
AnyTruths = Mapping[str, Truth]


def true_loss(law: Truth, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Loss at n parameters and d tokens, of (E, A, B, alpha, beta) or of any function of the two."""
    if callable(law):
        return law(n, d)
    floor, a, b, alpha, beta = law
    return floor + a / n**alpha + b / d**beta


def draw(
    truths: AnyTruths,
    cells: Cells | Mapping[str, Cells],
    noise: Noise,
    rng: np.random.Generator,
    clustered: bool = True,
) -> Runs:
    """One simulated table: every family on the same cells, or on its own. Raises ScalingError on noise in common to
    designs that have no cells in common."""
    designs = {family: cells for family in truths} if isinstance(cells, Cells) else cells
    longest = max(len(own.n) for own in designs.values())
    if noise.common and any(len(own.n) != longest for own in designs.values()):
        raise ScalingError("noise of cells in common needs the same cells in every family")
    shared = noise.common * rng.normal(size=longest)
    rows = []
    for family, law in truths.items():
        n, d, trunk, rate = (getattr(designs[family], name) for name in ("n", "d", "trunk", "rate"))
        error = noise.run * rng.normal(size=len(n)) + noise.trunk * rng.normal(size=trunk.max() + 1)[trunk]
        loss = true_loss(law, n, d) * np.exp(error + shared[: len(n)] + misfit(noise.misfit, n, d, rng))
        for k in range(len(n)):
            cluster = f"{family}-trunk-{trunk[k]}" if clustered else ""
            cell = {"N": n[k], "D": d[k], "flops": rate[k] * n[k] * d[k], "loss": loss[k], "cluster": cluster}
            rows.append({"run_id": f"{family}-{k}", "family": family} | cell)
    return Runs.from_rows(rows)


def misfit(size: float, n: np.ndarray, d: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random wave with a period of two to four decades in N and in D, rms `size`."""
    if size == 0:
        return np.zeros(len(n))
    period, phase = rng.uniform(2, 4, 2), rng.uniform(0, 2 * np.pi, 2)
    turns = [np.log10(x) / period[k] for k, x in enumerate((n, d))]
    return size * sum(np.sin(2 * np.pi * turn + phase[k]) for k, turn in enumerate(turns))


def coverage(
    truths: Truths,
    ladder: Ladder,
    noise: Noise,
    ladders: int,
    draws: int = 400,
    method: str = "auto",
    objective: str = "huber",
    clustered: bool = True,
    seed: int = 0,
    delta: float | None = 1e-3,
) -> dict[str, float]:
    """Share of ladders whose 95 % interval holds the truth, for parameters, predictions and the difference.

    Predictions are at the largest size and budget ("inside") and at ten times that compute ("beyond"). delta: Huber
    threshold, None for the one that suits each ladder's noise.
    """
    hits: dict[str, list[bool]] = {}
    for k in range(ladders):
        runs = draw(truths, ladder.cells, noise, np.random.default_rng([seed, k]), clustered)
        threshold = delta_from_noise(runs, starts=4) if delta is None else delta
        fitted = fit(runs, objective=objective, delta=threshold, starts=4, seed=k, share=("E",))
        sampled = bootstrap(fitted, draws, k, method)
        for name, (values, truth) in quantities(truths, ladder, sampled).items():
            low, high = interval(values)
            hits.setdefault(name, []).append(low <= truth <= high)
    return {name: float(np.mean(found)) for name, found in hits.items()}


def quantities(truths: Truths, ladder: Ladder, sampled: Draws) -> dict[str, tuple[np.ndarray, float]]:
    """Draws (K,) and truth of everything whose coverage is counted."""
    raw, families = sampled.raw(), list(truths)
    out = {"E": (raw["E"], truths[families[0]][0])}
    for name in ("alpha", "beta"):
        out[name] = raw[f"{name}[{families[1]}]"], truths[families[1]][LAW.index(name)]
    for label, reach in (("inside", 1.0), ("beyond", np.sqrt(10.0))):
        n, d = max(ladder.sizes) * reach, max(ladder.sizes) * max(ladder.ratios) * reach
        drawn = [sampled.predict(n, d, f)[:, 0] for f in families]
        true = [float(true_loss(truths[f], np.array(n), np.array(d))) for f in families]
        out[f"loss {label}"] = drawn[0], true[0]
        out[f"difference {label}"] = drawn[1] - drawn[0], true[1] - true[0]
    return out


TRUTHS: Truths = {"A": (1.8, 180.0, 420.0, 0.34, 0.37), "B": (1.8, 320.0, 420.0, 0.36, 0.37)}
FOUR = Ladder((1.6e5, 3e5, 6e5, 1.1e6), (10, 20, 40))
SIX = Ladder(tuple(np.geomspace(1e6, 1e8, 6)), (5, 10, 20, 40, 80))
FOURTEEN = Ladder(tuple(np.geomspace(1e6, 1e9, 14)), (5, 10, 20, 80))
SIXTY = Ladder(tuple(np.geomspace(1e6, 1e9, 10)), (2, 5, 10, 20, 80, 160))
CASES = (  # what `bootstrap` chooses by itself, then what it does not
    Case("4 trunks x 3, run noise", FOUR, Noise(0.003), "parametric"),
    Case("4 trunks x 3, trunk noise", FOUR, Noise(0.001, 0.003), "parametric"),
    Case("6 trunks x 5, run noise", SIX, Noise(0.003), "parametric"),
    Case("6 trunks x 5, trunk noise", SIX, Noise(0.001, 0.003), "parametric"),
    Case("14 trunks x 4, trunk noise", FOURTEEN, Noise(0.001, 0.003), "parametric"),
    Case("60 single runs, run noise", SIXTY, Noise(0.003), "pairs", clustered=False),
    Case("60 single runs, run noise", SIXTY, Noise(0.003), "pairs", clustered=False, delta=None),
    Case("6 trunks x 5, trunk noise", SIX, Noise(0.001, 0.003), "wild"),
    Case("14 trunks x 4, trunk noise", FOURTEEN, Noise(0.001, 0.003), "pairs"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ladders", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    with a.out.open("w", newline="") as stream:
        writer: csv.DictWriter[str] | None = None
        for case in CASES:
            settings = (case.ladder, case.noise, a.ladders, a.draws, case.method)
            shares = coverage(TRUTHS, *settings, clustered=case.clustered, delta=case.delta)
            row: dict[str, object] = {"case": case.name, "bootstrap": case.method, "delta": case.delta or "auto"}
            row |= {"ladders": a.ladders, "nominal": 0.95}
            row |= {quantity: f"{share:.3f}" for quantity, share in shares.items()}
            if writer is None:
                writer = csv.DictWriter(stream, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            stream.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
