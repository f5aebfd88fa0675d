"""Faults that make a table of runs say less than it seems to, each with the rows at fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scaling.fitting.fit import ladder_gate
from scaling.tables.runs import Runs
from scaling.uncertainty.bootstrap import cluster_labels

NEAR = 0.005  # two runs of one family whose N and D agree this closely are near duplicates
WARMUP_SHARE = 0.2  # Porian et al. 2024: longer warm-ups bias small runs
REPEATS = 4.0  # epochs beyond which repeated tokens are worth visibly less (Muennighoff et al. 2023)
MUST_AGREE = ("tokenizer", "vocab", "val_set", "flops_rule", "schedule", "seq_len")


@dataclass(frozen=True)
class Finding:
    """severity: error (do not fit), warning; rows: the run_ids at fault."""

    severity: str
    name: str
    message: str
    rows: tuple[str, ...] = ()

    def listed(self) -> str:
        """Up to eight row ids."""
        more = f", … {len(self.rows) - 8} more" if len(self.rows) > 8 else ""
        return ", ".join(self.rows[:8]) + more


def lint(runs: Runs) -> list[Finding]:
    """Every finding, errors first."""
    checks = (duplicates, midrun, disagreements, designs, ladders, warmups, repeats, untuned, outliers)
    found = [finding for check in checks for finding in check(runs)]
    return sorted(found, key=lambda f: f.severity != "error")


def ids(runs: Runs, rows: np.ndarray) -> tuple[str, ...]:
    return tuple(str(name) for name in runs["run_id"][rows])


def duplicates(runs: Runs) -> Iterator[Finding]:
    """Rows that are equal, and rows so near each other that they are one run listed twice."""
    keys = np.array(
        [f"{f}|{n!r}|{d!r}|{x!r}" for f, n, d, x in zip(*(runs[c] for c in ("family", "N", "D", "loss")), strict=True)]
    )
    _, place, counts = np.unique(keys, return_inverse=True, return_counts=True)
    exact = counts[place] > 1
    if exact.any():
        yield Finding("error", "duplicates", "equal family, N, D and loss", ids(runs, exact))
    order = np.lexsort((np.log(runs["D"]), np.log(runs["N"]), runs["family"].astype(str)))
    same = runs["family"][order][1:] == runs["family"][order][:-1]
    close = (
        same & (np.abs(np.diff(np.log(runs["N"][order]))) < NEAR) & (np.abs(np.diff(np.log(runs["D"][order]))) < NEAR)
    )
    near = np.zeros(len(runs), bool)
    near[order[1:][close]] = near[order[:-1][close]] = True
    if (near & ~exact).any():
        yield Finding(
            "warning", "near duplicates", "N and D within 0.5 %: repeats, or one run twice", ids(runs, near & ~exact)
        )


def midrun(runs: Runs) -> Iterator[Finding]:
    """Points from inside a schedule."""
    inside = runs["ended"] == 0 if "ended" in runs.columns else np.zeros(len(runs), bool)
    _, place, counts = np.unique(runs["run_id"].astype(str), return_inverse=True, return_counts=True)
    inside = inside | (counts[place] > 1)
    if inside.any():
        yield Finding("error", "mid-schedule points", "not the end of a schedule", ids(runs, inside))


def disagreements(runs: Runs) -> Iterator[Finding]:
    """Conventions that differ between rows, so that losses or costs do not compare."""
    for name in MUST_AGREE:
        if name not in runs.columns:
            continue
        values = [str(v) for v in runs[name].tolist()]
        kinds = sorted(set(values))
        if len(kinds) > 1:
            severity = "error" if name in ("tokenizer", "vocab", "val_set", "flops_rule") else "warning"
            rare = min(kinds, key=values.count)
            yield Finding(severity, f"mixed {name}", ", ".join(kinds[:6]), ids(runs, np.array(values) == rare))


def designs(runs: Runs) -> Iterator[Finding]:
    """Families whose grids differ, which costs the cancellation of common errors."""
    families = tuple(runs.families)
    if len(families) > 1 and not cluster_labels(runs, families)[1]:
        message = "the families' (N, D) cells do not match one to one: their errors will not cancel from the difference"
        yield Finding("warning", "unequal designs", message)


def ladders(runs: Runs) -> Iterator[Finding]:
    for family in runs.families:
        gate = ladder_gate(runs, family)
        if not gate.passed:
            yield Finding("warning", "ladder too small", f"{family}: {gate.message}")


def warmups(runs: Runs) -> Iterator[Finding]:
    if "warmup_tokens" not in runs.columns:
        return
    warm = runs["warmup_tokens"]
    long = (warm > WARMUP_SHARE * runs["D"]) | (warm > runs["N"])
    if long.any():
        yield Finding("warning", "long warm-up", "over 20 % of D, or over N tokens", ids(runs, long))


def repeats(runs: Runs) -> Iterator[Finding]:
    if "U" not in runs.columns:
        return
    over = runs["D"] > REPEATS * runs["U"]
    if over.any():
        yield Finding(
            "warning", "repeated data", "more than 4 epochs: D overstates what was learnt from", ids(runs, over)
        )


def untuned(runs: Runs) -> Iterator[Finding]:
    """One learning rate for every size and family is no tuning."""
    if "lr" not in runs.columns or len(np.unique(runs["N"])) < 3:
        return
    rates = runs["lr"][~np.isnan(runs["lr"])]
    if len(rates) and len(np.unique(rates)) == 1:
        yield Finding("warning", "one learning rate", f"lr = {rates[0]:g} in every run, whatever its size or family")


def outliers(runs: Runs) -> Iterator[Finding]:
    """Losses that rise with more data at equal size: diverged or mislabelled runs."""
    bad = np.zeros(len(runs), bool)
    for family in runs.families:
        rows = np.flatnonzero(runs["family"] == family)
        for n in np.unique(runs["N"][rows]):
            cell = rows[runs["N"][rows] == n]
            cell = cell[np.argsort(runs["D"][cell], kind="stable")]
            best = np.minimum.accumulate(runs["loss"][cell])
            bad[cell[1:]] |= runs["loss"][cell[1:]] > 1.02 * best[:-1]
    if bad.any():
        yield Finding(
            "warning", "loss rises with data", "over 2 % above a run of equal size on fewer tokens", ids(runs, bad)
        )
