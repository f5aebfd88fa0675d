"""Faults that make a table of runs say less than it seems to, each with the rows at fault."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scaling.fitting.approaches import MIN_POINTS, budget_labels, sizes
from scaling.fitting.fit import Gate, ladder_gate
from scaling.tables.cells import cells, matched_cells
from scaling.tables.runs import CONVENTIONS, RECIPE, SCRATCH, SURROUNDINGS, Runs

WARMUP_SHARE = 0.2  # Porian et al. 2024: longer warm-ups bias small runs
REPEATS = 4.0  # epochs beyond which repeated tokens are worth visibly less (Muennighoff et al. 2023)
SHAPES_APART = 2.0  # ratio of width to depth; fitted exponents swing with it (McLeish et al. 2025)
EDGE = 0.1  # share of an IsoFLOP curve's width at either end in which its minimum counts as off-centre
MIDRUN = "mid-schedule points"
MUST_AGREE = (*CONVENTIONS, "vocab", "D_rule")
SHOULD_AGREE = ("schedule", "seq_len")
LEAST_FLOPS, MOST_FLOPS = 0.02, 100.0  # of 6 N D; sparse models cost less, short contexts with large heads more
LEAST_N, LEAST_D = 1e3, 1e4  # parameters and tokens
DIVERGED = 1.25  # times the loss of a smaller run on fewer tokens


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
    checks = (
        duplicates,
        midrun,
        disagreements,
        pooled,
        unrecorded,
        constant,
        designs,
        units,
        ladders,
        shapes,
        warmups,
        repeats,
        untuned,
        sweeps,
        outliers,
        diverged,
        isoflops,
    )
    found = [finding for check in checks for finding in check(runs)]
    return sorted(found, key=lambda f: f.severity != "error")


def lint_gates(runs: Runs) -> list[Gate]:
    """What lint calls an error in a family's own rows, as checks of a fit. Points inside a schedule are left out:
    whoever let them in was told, and the table's notes say so."""
    found = [(f, finding) for f in runs.families for finding in lint(runs.family(f))]
    return [
        Gate(f"{finding.name} [{family}]", False, f"{finding.message}: {finding.listed()}")
        for family, finding in found
        if finding.severity == "error" and finding.name != MIDRUN
    ]


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
    cell = cells(runs)
    near = np.bincount(cell)[cell] > 1
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
        yield Finding("error", MIDRUN, "not the end of a schedule", ids(runs, inside))


def disagreements(runs: Runs) -> Iterator[Finding]:
    """Conventions that differ between rows, or are stated for some of them only, so that losses or costs may not
    compare; the rows of the rarest value."""
    for name in (*MUST_AGREE, *SHOULD_AGREE):
        values = runs[name].astype(str) if name in runs.columns else np.full(len(runs), "")
        kinds, counts = np.unique(np.where(values == "nan", "", values), return_counts=True)
        if len(kinds) > 1:
            severity = "error" if name in MUST_AGREE and len(runs.kinds(name)) > 1 else "warning"
            severity = "error" if name in MUST_AGREE and "" in kinds.tolist() else severity
            listed = ", ".join(kind or "(blank)" for kind in kinds[:6])
            yield Finding(
                severity,
                f"mixed {name}",
                listed,
                ids(runs, np.where(values == "nan", "", values) == kinds[counts.argmin()]),
            )


def pooled(runs: Runs) -> Iterator[Finding]:
    """Families that hold runs of several recipes: a law fitted to them is one of the mixture."""
    for family in runs.families:
        part = runs.family(family)
        started = part.kinds("init")
        mixed = [("error", name) for name in RECIPE] + [("warning", name) for name in SURROUNDINGS]
        mixed += [("error", "init")] * (SCRATCH in started)
        for severity, name in mixed:
            if len(part.kinds(name)) > 1:
                values = part[name].astype(str)
                kinds, counts = np.unique(values[(values != "") & (values != "nan")], return_counts=True)
                message = f"{family} holds runs with {', '.join(kinds[:6])}: keep one with --where {name}=VALUE"
                yield Finding(severity, f"mixed {name}", message, ids(part, values == kinds[counts.argmin()]))


def unrecorded(runs: Runs) -> Iterator[Finding]:
    """Conventions that the table does not state, which nobody should have to guess."""
    absent = [name for name in CONVENTIONS if not runs.kinds(name)]
    if absent:
        yield Finding("warning", "conventions not recorded", f"{', '.join(absent)} (add with --set COLUMN=VALUE)")


def constant(runs: Runs) -> Iterator[Finding]:
    """Identical losses are a mistake in the table."""
    for family in runs.families:
        part = runs.family(family)
        if len(part) > 1 and np.ptp(part["loss"]) == 0:
            yield Finding(
                "error", "identical losses", f"{family}: every loss is {part['loss'][0]:g}", ids(part, part["loss"] > 0)
            )


def designs(runs: Runs) -> Iterator[Finding]:
    """Families whose grids differ, which costs the cancellation of common errors."""
    first, *others = runs.families
    for other in others:
        family = np.where(runs["family"] == first, 0, np.where(runs["family"] == other, 1, 2))
        if (matched_cells(runs, family)[family == 0] < 0).any():
            text = f"{first} and {other}: not every cell has its match (N within 1 %, equal D): fewer errors cancel"
            yield Finding("warning", "unequal designs", text)


def units(runs: Runs) -> Iterator[Finding]:
    """Compute far from 6 N D, or sizes no language model has: a column in another unit, most often."""
    ratio = runs["flops"] / (6 * runs["N"] * runs["D"])
    for far, word in ((ratio < LEAST_FLOPS, "below"), (ratio > MOST_FLOPS, "above")):
        if far.any():
            mend = "check the units (--column flops='flops*1e9')"
            text = f"flops / (6 N D) is {np.median(ratio[far]):.2g}, {word} anything a language model costs: {mend}"
            yield Finding("error", "units of flops", text, ids(runs, far))
    for name, least in (("N", LEAST_N), ("D", LEAST_D)):
        small = runs[name] < least
        if small.any():
            text = (
                f"{name} is {np.median(runs[name][small]):.3g}: in millions or billions? (--column {name}='{name}*1e6')"
            )
            yield Finding("error", f"units of {name}", text, ids(runs, small))


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
            "warning", "repeated data", "more than 4 epochs: fit with --law data-constrained", ids(runs, over)
        )


def untuned(runs: Runs) -> Iterator[Finding]:
    """One learning rate for every size and family is no tuning."""
    if "lr" not in runs.columns or len(np.unique(runs["N"])) < 3:
        return
    rates = runs["lr"][~np.isnan(runs["lr"])]
    if len(rates) and len(np.unique(rates)) == 1:
        yield Finding("warning", "one learning rate", f"lr = {rates[0]:g} in every run, whatever its size or family")


def sweeps(runs: Runs) -> Iterator[Finding]:
    """Cells with several learning rates: all of them blur the fit, and the best of them is chosen by luck as well."""
    if "lr" not in runs.columns:
        return
    place = cells(runs)
    rates = np.unique(np.column_stack([place, runs["lr"]])[~np.isnan(runs["lr"])], axis=0)
    swept = np.isin(place, np.flatnonzero(np.bincount(rates[:, 0].astype(int), minlength=place.max() + 1) > 1))
    if swept.any():
        message = "several learning rates in a cell: fit with --select best, which chooses anew in every draw"
        yield Finding("warning", "learning-rate sweep", message, ids(runs, swept))


def shapes(runs: Runs) -> Iterator[Finding]:
    """Ratios of width to depth that differ within a family."""
    if not {"width", "depth"} <= set(runs.columns):
        return
    # N alone does not say what a model is: a ladder that grows in depth first and in width later bends its own curve.
    aspect = runs["width"] / runs["depth"]
    for family in runs.families:
        rows = (runs["family"] == family) & ~np.isnan(aspect)
        if rows.any() and aspect[rows].max() > SHAPES_APART * aspect[rows].min():
            message = f"{family}: width / depth goes from {aspect[rows].min():.3g} to {aspect[rows].max():.3g}"
            far = rows & (np.abs(np.log(aspect / np.median(aspect[rows]))) > np.log(SHAPES_APART) / 2)
            yield Finding("warning", "shape rule varies", message, ids(runs, far))


def outliers(runs: Runs) -> Iterator[Finding]:
    """Losses that rise with more data at equal size: diverged or mislabelled runs."""
    order = np.lexsort((runs["D"], runs["N"], runs["family"].astype(str)))
    new = (np.diff(runs["N"][order]) != 0) | (runs["family"][order][1:] != runs["family"][order][:-1])
    bad = np.zeros(len(runs), bool)
    for cell in np.split(order, np.flatnonzero(new) + 1):
        # At one size more tokens cannot raise the loss of a well-trained run by 2 %.
        if len(cell) > 1:
            best = np.minimum.accumulate(runs["loss"][cell])
            bad[cell[1:]] = runs["loss"][cell[1:]] > 1.02 * best[:-1]
    if bad.any():
        yield Finding(
            "warning", "loss rises with data", "over 2 % above a run of equal size on fewer tokens", ids(runs, bad)
        )


def diverged(runs: Runs) -> Iterator[Finding]:
    """Losses far above one of a smaller run on fewer tokens, which no law of N and D can have."""
    bad = [i for family in runs.families for i in far_above_smaller(runs, np.flatnonzero(runs["family"] == family))]
    if bad:
        message = f"over {DIVERGED - 1:.0%} above a smaller run on fewer tokens; leave out with --where 'loss<...'"
        yield Finding("warning", "looks diverged", message, ids(runs, np.array(bad)))


def far_above_smaller(runs: Runs, rows: np.ndarray) -> Iterator[int]:
    """Yield those of a family's rows whose loss is far above that of a row with no more parameters and tokens."""
    # By size, with the best losses so far in order of tokens: more tokens, lower loss.
    tokens, best = [0.0], [np.inf]
    for i in rows[np.lexsort((runs["D"][rows], runs["N"][rows]))]:
        d, loss = runs["D"][i], runs["loss"][i]
        place = bisect.bisect_right(tokens, d)
        if loss > DIVERGED * best[place - 1]:
            yield int(i)
        elif loss < best[place - 1]:
            beaten = next((k for k in range(place, len(best)) if best[k] < loss), len(best))
            tokens[place:beaten], best[place:beaten] = [d], [loss]


def isoflops(runs: Runs) -> Iterator[Finding]:
    """Curves of one budget whose minimum lies at an edge or that have none: approach 2 would extrapolate there."""
    for family in runs.families:
        part = runs.family(family)
        labels = budget_labels(part["flops"])
        for label in np.unique(labels):
            curve = part.select(labels == label)
            if sizes(curve) < MIN_POINTS or len(curve) == len(part):
                continue
            log_n = np.log(curve["N"])
            bend, slope, _ = np.polyfit(log_n - log_n.mean(), curve["loss"], 2)
            place = (log_n.mean() - slope / (2 * bend) - log_n.min()) / np.ptp(log_n) if bend > 0 else np.nan
            if not EDGE < place < 1 - EDGE:
                what = "has its minimum at an edge" if bend > 0 else "has no minimum"
                message = f"{family}: the IsoFLOP curve at {np.median(curve['flops']):.2g} FLOP {what}"
                yield Finding("warning", "off-centre IsoFLOP", message, ids(curve, curve["loss"] > 0))
