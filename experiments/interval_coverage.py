"""Do the ensemble's intervals hold the truth where no law is exactly true? Simulated ladders of two families, scored.

    python -m experiments.interval_coverage --workers 8 --out experiments/results/interval_coverage.csv
    python -m experiments.interval_coverage --rows "0.2 %, 1 out" --ladders 50 --out sample.csv

Two Chinchilla laws whose exponents of N differ by 0.04 meet at a stated compute: inside the ladder (1e20 FLOP), one or
two decades beyond its largest run (1e21). Sizes from 1e7 to 1e9 parameters at 5, 20, 80 and 160 tokens a parameter; run
noise 0.1 to 0.2 % (0.4 % where said), trunk noise below it, and a misfit of the stated rms. The truth includes the
misfit. "assumed" rows draw it from the ensemble's own smooth covariance; the others are another law
((A/N^a + B/D^b)^0.75), slopes that drift, waves 2 to 4 decades long, and floors 2 % apart. In "never" rows the laws
are parallel and B stays behind.

A row of the table is one case and method: tied (all ties by weight), untied, headline (what `verdict` would use) and
oracle, which knows noise and misfit. Columns: share of ladders whose 95 % statement holds, for the crossing
(open ends included), the difference of the frontiers at the compute of the crossing, a new run there, and rho; share of
two-sided crossings; share of wrong two-sided crossings; median half-widths of the difference and the new run (1e-3).
All 38 cases with 200 ladders take about 3 core-hours. Expect, tied: assumed rows pooled 97 %, each 92 to 100 %;
others above 90 %, waves too.
"""

import argparse
import csv
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import brentq

from experiments.simulated_ladders import BASELINE
from experiments.workers import resumed
from scaling.ensemble.answers import interval
from scaling.ensemble.crossing import HORIZON, crossing_of, overtakes
from scaling.ensemble.discrepancy import ADDITIVE
from scaling.ensemble.ensemble import Ensemble
from scaling.ensemble.posterior import posterior
from scaling.ensemble.rows import rows_of
from scaling.spec import Spec
from scaling.tables.runs import Runs

LN10 = np.log(10.0)
GAP = 0.04  # of alpha
RATIOS = np.array([5.0, 20.0, 80.0, 160.0])
MIDDLE = np.array([8.0, 9.5])  # log10 N and D about which slopes drift
LOWEST = 6 * 1e7**2 * 5.0  # FLOP of the cheapest run
GRID = np.linspace(np.log10(LOWEST), 23.0, 49)
FEATURES = 100  # waves that stand for a Gaussian process
METHODS = ("tied", "untied", "headline", "oracle")


@dataclass(frozen=True)
class Case:
    """crossing: log10 FLOP; misfit: rms; kind: assumed, power, drift, waves, floors or never; largest: parameters."""

    crossing: float
    misfit: float
    kind: str = "assumed"
    noise: float = 0.001
    sizes: int = 6
    largest: float = 1e9


def cases() -> dict[str, Case]:
    """Every row of the table by its name."""
    out = {}
    places = {"inside": 20.0, "1 out": 22.0, "2 out": 23.0}
    for noise in (0.001, 0.004):
        for misfit in (0.0, 0.002, 0.005):
            for place, crossing in places.items():
                tail = "" if noise == 0.001 else ", noise 0.4 %"
                out[f"{100 * misfit:g} %, {place}{tail}"] = Case(crossing, misfit, noise=noise)
    for sizes in (4, 10, 14):
        for misfit in (0.0, 0.002, 0.005):
            out[f"{100 * misfit:g} %, 1 out, {sizes} sizes"] = Case(22.0, misfit, sizes=sizes)
    for kind, misfit in (("power", 0.0), ("drift", 0.0), ("waves", 0.003), ("floors", 0.002)):
        for place in ("inside", "1 out"):
            out[f"{kind}, {place}"] = Case(places[place], misfit, kind)
    for misfit in (0.0, 0.002, 0.005):
        out[f"never, {100 * misfit:g} %"] = Case(22.0, misfit, "never")
    return out


class World:
    """A truth and one ladder drawn from it."""

    def __init__(self, case: Case, rng: np.random.Generator):
        self.case = case
        run = case.noise * 2 ** rng.random()
        trunk, length, common = run * rng.random(), rng.uniform(0.5, 1.0), rng.uniform(0, 0.5)
        self.hyper = np.array([[run, trunk, 0.0, case.misfit, length, common, 0.0]])
        self.drift = rng.normal(0, 0.008, (2, 2)) * (case.kind == "drift")
        parts = [self.smooth(rng, length) for _ in range(3)]
        self.misfits = [self.mixed(parts[0], own, common) for own in parts[1:]]
        if case.kind == "waves":
            self.misfits = [self.long_wave(rng) for _ in range(2)]
        self.laws = self.meeting(case)
        self.runs = self.ladder(run, trunk, rng)
        self.target = self.best_run()
        noise = np.hypot(run, trunk) * rng.normal()
        self.new_run = float(np.exp(self.log_loss(0, self.target[None])[0] + noise))

    def smooth(self, rng: np.random.Generator, length: float) -> Callable[[np.ndarray], np.ndarray]:
        waves, phase = rng.normal(size=(FEATURES, 2)) / length, rng.uniform(0, 2 * np.pi, FEATURES)
        alone = np.arange(FEATURES) < ADDITIVE * FEATURES  # along N or D only, as in the ensemble's covariance
        waves[alone, np.arange(FEATURES)[alone] % 2] = 0.0
        return lambda x: self.case.misfit * np.sqrt(2 / FEATURES) * np.cos(x @ waves.T + phase).sum(-1)

    @staticmethod
    def mixed(
        one: Callable[[np.ndarray], np.ndarray], two: Callable[[np.ndarray], np.ndarray], share: float
    ) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: np.sqrt(share) * one(x) + np.sqrt(1 - share) * two(x)

    def long_wave(self, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        rate, phase = 2 * np.pi / rng.uniform(2, 4, 2), rng.uniform(0, 2 * np.pi, 2)
        return lambda x: self.case.misfit * np.sin(x * rate + phase).sum(-1)

    def meeting(self, case: Case) -> list[np.ndarray]:
        """Both laws as (E, log A, log B, alpha, beta), equal in loss at the crossing; or parallel ones."""
        e, a, b, alpha, beta = BASELINE
        first = np.array([e, np.log(a), np.log(b), alpha, beta])
        if case.kind == "never":
            return [first, first + np.array([0, 0.1, 0, 0, 0])]
        floor = 0.98 * e if case.kind == "floors" else e

        def other(log_a: float) -> np.ndarray:
            return np.array([floor, log_a, np.log(b), alpha + GAP, beta])

        def excess(log_a: float) -> float:
            self.laws = [first, other(log_a)]
            low, high = (self.best(f, np.array([case.crossing]), misfit=False)[0] for f in (0, 1))
            return float(high - low)

        return [first, other(float(brentq(excess, 3, 12)))]

    def log_loss(self, family: int, x: np.ndarray, misfit: bool = True) -> np.ndarray:
        """(...,) at x (..., 2) = log10 N, log10 D."""
        e, log_a, log_b, alpha, beta = self.laws[family]
        bend = LN10 * self.drift[family] * (x - MIDDLE) ** 2 / 2
        terms = bend - LN10 * np.array([alpha, beta]) * x + np.array([log_a, log_b])
        power = 0.75 if self.case.kind == "power" else 1.0
        reducible = power * np.logaddexp(terms[..., 0] / power, terms[..., 1] / power)
        return np.logaddexp(np.log(e), reducible) + (self.misfits[family](x) if misfit else 0)

    def along(self, log_c: np.ndarray) -> np.ndarray:
        """(M, 81, 2) sizes and tokens to choose from at each budget."""
        both = np.atleast_1d(log_c)[:, None] - np.log10(6)
        n = np.linspace(-1.2, 1.2, 81) + both / 2 - 0.6
        return np.stack([n, both - n], -1)

    def best(self, family: int, log_c: np.ndarray, misfit: bool = True) -> np.ndarray:
        """(M,) log loss of the best allocation."""
        return self.log_loss(family, self.along(log_c), misfit).min(-1)

    def best_run(self) -> np.ndarray:
        """Log10 N and D of family A's best allocation at the crossing, by its law."""
        options = self.along(np.array([self.case.crossing]))[0]
        return options[self.log_loss(0, options, misfit=False).argmin()]

    def ladder(self, run: float, trunk: float, rng: np.random.Generator) -> Runs:
        n = np.repeat(np.geomspace(1e7, self.case.largest, self.case.sizes), len(RATIOS))
        d = n * np.tile(RATIOS, self.case.sizes)
        rows = []
        for f, family in enumerate("AB"):
            size = np.repeat(np.arange(self.case.sizes), len(RATIOS))
            error = run * rng.normal(size=len(n)) + trunk * rng.normal(size=self.case.sizes)[size]
            loss = np.exp(self.log_loss(f, np.log10(np.column_stack([n, d]))) + error)
            rows += [
                {"run_id": f"{family}{k}", "family": family, "N": n[k], "D": d[k], "loss": loss[k]}
                | {"cluster": f"{family}-{size[k]}"}
                for k in range(len(n))
            ]
        return Runs.from_rows(rows)

    def truths(self, centre: np.ndarray, edge: float) -> tuple[float, float, float, float]:
        """Compute from which B leads, difference at the crossing, loss of the new run, rho at the ladder's middle."""
        gaps = np.exp(self.best(1, GRID)) - np.exp(self.best(0, GRID))
        crossing = float(overtakes(GRID * LN10, gaps[None], edge)[0])
        at = np.array([self.case.crossing])
        difference = float(np.exp(self.best(1, at)[0]) - np.exp(self.best(0, at)[0]))
        log_n, log_d = centre / LN10
        goal = self.log_loss(1, np.array([log_n, log_d]))
        sizes = log_n + np.linspace(-2, 2, 401)
        curve = np.minimum.accumulate(self.log_loss(0, np.column_stack([sizes, np.full(401, log_d)])))
        return crossing, difference, self.new_run, float(10 ** (np.interp(-goal, -curve, sizes) - log_n))


def ensembles(world: World, spec: Spec) -> dict[str, Ensemble]:
    """The four methods on one ladder."""
    headline = Ensemble.of(world.runs, ("A", "B"), spec)
    rows = rows_of(headline.runs, "AB", headline.law, headline.centre)
    known = posterior(
        rows, headline.law, headline.posterior.ties, "log-ls", 0, known=np.repeat(world.hyper, 16, axis=0)
    )
    draws = known.draws(spec.draws, np.random.default_rng(0))
    oracle = Ensemble(headline.runs, spec, ("A", "B"), headline.law, headline.centre, known, draws)
    return dict(zip(METHODS, (headline.tied, headline.untied, headline, oracle), strict=True))


def score(ensemble: Ensemble, world: World, truths: tuple[float, float, float, float]) -> list[float]:
    """What a row of the table averages, for one ladder."""
    crossing, difference, new_run, rho = truths
    budgets = np.union1d(ensemble.budgets(beyond=HORIZON), 10**world.case.crossing)
    gaps = ensemble.gaps(budgets)
    said = crossing_of(overtakes(np.log(budgets), gaps, ensemble.measured()[1]), ensemble.measured(), "FLOP")
    low, high = interval(gaps[:, np.searchsorted(budgets, 10**world.case.crossing)])
    n, d = 10**world.target
    curve = ensemble.rows_curve("A", Runs.of("A", N=[n], D=[d], loss=[1.0]))[:, 0]
    run_low, run_high = interval(np.exp(curve + ensemble.run_noise()))
    worth, inside = ensemble.efficiency(), said.kind == "inside"
    held = [said.contains(crossing), low <= difference <= high, run_low <= new_run <= run_high]
    held += [worth.low <= rho <= worth.high]
    widths = [500 * (high - low), 500 * (run_high - run_low) / np.exp(np.median(curve))]
    return [*map(float, held), float(inside), float(inside and not held[0]), *widths]


def trial(name: str, case: Case, k: int, spec: Spec) -> dict[str, list[float]]:
    """Scores of every method on one ladder."""
    world = World(case, np.random.default_rng([zlib.crc32(name.encode()), k]))
    found = ensembles(world, spec)
    truths = world.truths(found["tied"].centre, found["tied"].measured()[1])
    out = {method: score(found[method], world, truths) for method in ("tied", "untied", "oracle")}
    return out | {"headline": out["untied" if found["headline"].only_untied else "tied"]}


HEADER = ("crossing", "difference", "new run", "rho", "two-sided", "false two-sided", "half-width", "run half-width")


def row_of(name: str, method: str, found: np.ndarray) -> dict[str, str]:
    shares = [f"{x:.3f}" for x in found[:, :6].mean(axis=0)]
    widths = [f"{x:.1f}" for x in np.median(found[:, 6:], axis=0)]
    return {"case": name, "method": method, "ladders": str(len(found))} | dict(
        zip(HEADER, shares + widths, strict=True)
    )


def write_table(path: Path, scores: dict[tuple[str, int], dict[str, list[float]]]) -> None:
    """One row a case and method, over the ladders scored so far."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["case", "method", "ladders", *HEADER], lineterminator="\n")
        writer.writeheader()
        for name in cases():
            found = [scores[key] for key in sorted(scores) if key[0] == name]
            writer.writerows(row_of(name, m, np.array([one[m] for one in found])) for m in METHODS if found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladders", type=int, default=200)
    parser.add_argument("--draws", type=int, default=800)
    parser.add_argument("--rows", default="", help="only the cases whose name contains one of these, with | between")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th case from the I-th on; scores may be joined")
    parser.add_argument("--workers", type=int, default=1, help="processes; the scores do not depend on them")
    parser.add_argument("--scores", type=Path, help="JSONL file of single ladders: those in it are not made again")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    first, step = map(int, a.shard.split("/"))
    named = [name for name in cases() if any(part in name for part in a.rows.split("|"))]
    chosen = {name: cases()[name] for name in named[first::step]}
    work = {(name, k): (name, chosen[name], k, Spec(draws=a.draws)) for k in range(a.ladders) for name in chosen}
    scores = resumed(trial, work, a.workers, a.scores)
    write_table(a.out, scores)
    print(a.out.read_text(), end="")


if __name__ == "__main__":
    main()
