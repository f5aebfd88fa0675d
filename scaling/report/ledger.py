"""The forecast ledger: what earlier fits said of runs that did not exist yet, and how right they were.

`forecast.jsonl` beside a report, one forecast a line. Every report adds the next size of each family's own ladder, and
`predict` whatever it is asked; when a table arrives that holds such a run, the forecast is scored. Runs that nobody had
asked about are scored too, against the fit that lay in the folder before they came.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import norm

from scaling.ensemble.answers import Prediction
from scaling.tables.runs import Runs, ScalingError

if TYPE_CHECKING:
    from scaling.analysis import Analysis

FILE = "forecast.jsonl"
SAME_CELL = 0.01  # a run is the forecast one if N and D agree this closely (natural log)
LEVEL = 0.95


@dataclass(frozen=True)
class Forecast:
    """made: UTC time; table: digest of the runs that it rests on; N, D: the run; loss, low, high: nats per token, 95 %
    interval of a new run; sd: of log loss; run_id, observed: the run that came, empty until it does."""

    made: str
    table: str
    family: str
    N: float
    D: float
    loss: float
    low: float
    high: float
    sd: float
    run_id: str = ""
    observed: float | None = None

    @property
    def scored(self) -> bool:
        return self.observed is not None

    @property
    def error(self) -> float:
        """Log of observed over forecast loss; positive when the run turned out worse."""
        return float(np.log((self.observed or np.nan) / self.loss))

    @property
    def covered(self) -> bool:
        return self.observed is not None and self.low <= self.observed <= self.high

    @property
    def log_score(self) -> float:
        """Log density of the outcome under the forecast, as normal in log loss; higher is better (Good 1952)."""
        return float(norm.logpdf(self.error, scale=self.sd))

    @property
    def pit(self) -> float:
        """Probability integral transform; uniform over many forecasts if they are calibrated (Dawid 1984)."""
        return float(norm.cdf(self.error, scale=self.sd))

    @property
    def interval_score(self) -> float:
        """Width plus a penalty for a miss, in nats; lower is better (Gneiting & Raftery 2007, eq. 43)."""
        x = self.observed if self.observed is not None else np.nan
        return float(self.high - self.low + 2 / (1 - LEVEL) * (max(self.low - x, 0) + max(x - self.high, 0)))

    def is_of(self, family: str, n: float, d: float) -> bool:
        """Whether this is a forecast of that cell."""
        return family == self.family and max(abs(np.log(self.N / n)), abs(np.log(self.D / d))) < SAME_CELL


def digest_of(runs: Runs) -> str:
    """SHA-256 of what a fit sees of a table: family, N, D and loss of every row, whatever their order."""
    rows = zip(*(runs[name].tolist() for name in ("family", "N", "D", "loss")), strict=True)
    return hashlib.sha256("\n".join(sorted(repr(row) for row in rows)).encode()).hexdigest()


def read_ledger(folder: Path) -> list[Forecast]:
    """The ledger of a report folder, empty where there is none; raises ScalingError on a damaged one."""
    path = folder / FILE
    if not path.is_file():
        return []
    names = {f.name for f in fields(Forecast)}
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ScalingError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict) or not names <= set(row):
            raise ScalingError(f"{path}, line {number} is not a forecast")
        out.append(Forecast(**{name: row[name] for name in names}))
    return out


def write_ledger(folder: Path, ledger: Iterable[Forecast]) -> None:
    """Writes the whole ledger in one step, so that an interruption cannot cut it short."""
    lines = [json.dumps(asdict(f) | scores(f)) for f in ledger]
    part = folder / (FILE + ".part")
    part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    part.replace(folder / FILE)


def scores(forecast: Forecast) -> dict[str, Any]:
    """What a scored forecast earned; nothing for an open one."""
    if not forecast.scored:
        return {}
    # Coverage alone rewards wide intervals; the log and interval scores charge for width, and the integral transform
    # shows by its shape over many forecasts whether they are too narrow (U), too wide (a hump) or off to one side (a
    # slope).
    names = ("error", "covered", "log_score", "pit", "interval_score")
    return {name: getattr(forecast, name) for name in names}


def holds_cell(runs: Runs, family: str, n: float, d: float) -> bool:
    """Whether a table has a run of that family, size and budget."""
    near = (np.abs(np.log(runs["N"] / n)) < SAME_CELL) & (np.abs(np.log(runs["D"] / d)) < SAME_CELL)
    return bool((near & (runs["family"] == family)).any())


def made_of(p: Prediction, made: str, table: str) -> Forecast:
    return Forecast(made, table, p.family, p.N, p.D, p.loss, p.run_low, p.run_high, p.sd)


def record(ledger: Sequence[Forecast], new: Iterable[Forecast]) -> list[Forecast]:
    """The ledger with forecasts that it does not hold yet; a table forecasts a cell once."""
    out = list(ledger)
    for forecast in new:
        if not any(f.table == forecast.table and f.is_of(forecast.family, forecast.N, forecast.D) for f in out):
            out.append(forecast)
    return out


def next_cells(runs: Runs) -> list[tuple[float, float]]:
    """The ladder's own continuation: one size up at its mean spacing, with the budgets per parameter of the largest."""
    sizes = np.unique(runs["N"])
    if len(sizes) < 2:
        return []
    # What a researcher would most likely run next, so that most forecasts are one day scored.
    step = (sizes[-1] / sizes[0]) ** (1 / (len(sizes) - 1))
    ratios = np.unique(np.round(runs["D"][runs["N"] == sizes[-1]] / sizes[-1], 6))
    n = float(f"{sizes[-1] * step:.3g}")
    return [(n, float(f"{n * ratio:.3g}")) for ratio in ratios[-6:]]


def score(ledger: Sequence[Forecast], runs: Runs, table: str) -> list[Forecast]:
    """The ledger with the outcomes that a table holds, for forecasts that were made from another one."""
    # A table that a forecast was made from cannot score it; digests tell tables apart whatever their file names.
    rows = list(zip(*(runs[name].tolist() for name in ("run_id", "family", "N", "D", "loss")), strict=True))
    out = []
    for forecast in ledger:
        came = [r for r in rows if forecast.is_of(r[1], r[2], r[3])]
        due = bool(came) and not forecast.scored and forecast.table != table
        out.append(replace(forecast, run_id=came[0][0], observed=came[0][4]) if due else forecast)
    return out


def unasked(ledger: Sequence[Forecast], runs: Runs, earlier: Analysis, table: str) -> list[Forecast]:
    """Forecasts of the earlier analysis (of `table`) for runs that came since and that nobody had asked it about.

    They are dated as that analysis's own forecasts are: it was on disk before the runs were in the table.
    """
    # Only a fit that was on disk before the runs came may claim to have forecast them.
    made = min((f.made for f in ledger if f.table == table), default=None)
    out = []
    for row in runs.records() if made else ():
        family, n, d = row["family"], row["N"], row["D"]
        if family in earlier.families and not holds_cell(earlier.runs, family, n, d):
            ensemble = earlier.ensemble(family)
            known = {name: row[name] for name in ("flops", ensemble.law.beside) if row.get(name, "") != ""}
            out.append(made_of(ensemble.predict(n, d, family, **known), str(made), table))
    return out


def ledger_sentence(ledger: Sequence[Forecast]) -> str:
    """How the forecasts have done, in words."""
    done = [f for f in ledger if f.scored]
    waiting = len(ledger) - len(done)
    if not done:
        return f"No forecast has been scored yet; {waiting} wait for their runs."
    inside = sum(f.covered for f in done)
    rms = 100 * float(np.sqrt(np.mean([f.error**2 for f in done])))
    mean = float(np.mean([f.log_score for f in done]))
    return (
        f"{inside} of {len(done)} scored forecasts lie within their 95 % interval; rms error {rms:.2f} % of the loss, "
        f"mean log score {mean:+.2f}; {waiting} wait for their runs."
    )
