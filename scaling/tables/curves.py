"""Training curves of a sweep directory: for drawing, and for the law `annealed`, the only one that may be fitted to
points from inside a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from scipy.signal import lfilter

from scaling.tables.readers import json_object, parse_json_line
from scaling.tables.runs import Runs, ScalingError

WANTED = ("tokens", "flops", "loss")
SCHEDULE = ("step", "lr")  # of a curve whose points the law `annealed` can use; NaN where the log has none
MOMENTUM = 0.999  # per step, of the annealing's delayed effect (lambda of Tissue et al. 2024)
POINTS = 16  # taken from every run


def sweep_curves(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """run_id -> tokens, flops, loss (float64 arrays) from `runs/*/metrics.jsonl`; empty for a table without runs.

    A run that branches off a trunk has the trunk's curve before its own: that is how it was trained.
    """
    logs = sorted(path.glob("runs/*/metrics.jsonl")) if path.is_dir() else []
    own = {log.parent.name: read_curve(log) for log in logs}
    whole = {name: after_trunk(curve, own.get(trunk_of(path / "runs" / name))) for name, curve in own.items()}
    return {name: curve for name, curve in whole.items() if len(curve["loss"])}


def trunk_of(folder: Path) -> str:
    """The run that a run branches off, from its config.json; "" if it branches off none."""
    config = folder / "config.json"
    branch = json_object(config).get("branch") if config.is_file() else None
    trunk = branch.get("run", "") if isinstance(branch, dict) else ""
    return trunk if isinstance(trunk, str) else ""


def after_trunk(curve: dict[str, np.ndarray], trunk: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """The trunk's curve up to where the branch's own begins, then that."""
    if trunk is None or not len(curve["tokens"]):
        return curve
    before = trunk["tokens"] < curve["tokens"][0]
    return {name: np.concatenate([trunk[name][before], curve[name]]) for name in (*WANTED, *SCHEDULE)}


def read_curve(log: Path) -> dict[str, np.ndarray]:
    """One run's curve; the last line may be cut off, since a run that is still going writes it."""
    rows = []
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json_line(line, number)
        except ScalingError as error:
            if number < last:
                raise ScalingError(f"{log}: {error}") from error
            break
        if all(is_number(row.get(name)) for name in WANTED):
            told = [row.get(name) for name in (*WANTED, *SCHEDULE)]
            rows.append([float(x) if is_number(x) else np.nan for x in told])
    table = np.array(rows).reshape(-1, len(WANTED) + len(SCHEDULE))
    return {name: table[:, i] for i, name in enumerate((*WANTED, *SCHEDULE))}


def is_number(x: Any) -> TypeGuard[float]:
    """Whether a float can hold what a log says: whole numbers may have any length."""
    return isinstance(x, float) or (isinstance(x, int) and abs(x) < 1 << 1000)


def annealed(runs: Runs, curves: Mapping[str, Mapping[str, np.ndarray]]) -> Runs:
    """A table of points inside runs as the law `annealed` takes them, from the curves of those runs that have a
    schedule: D is the effective tokens, `annealing` the share of it that has taken effect. The points keep
    their run's cluster, and what several decays have of one trunk counts once. Raises ScalingError where no curve has a
    step and a learning rate."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in runs.records():
        curve = curves.get(str(row["run_id"]), {})
        if "lr" not in curve or np.isnan(curve["lr"]).any() or len(curve["lr"]) < 2:
            continue
        tokens, share = effort(curve["step"], curve["tokens"], curve["lr"])
        # Points of one run are no runs of their own: they keep its cluster, so that their common error counts once.
        peak = int(np.argmax(curve["lr"]))  # before it the rate still rises
        wanted = np.geomspace(curve["tokens"][peak], curve["tokens"][-1], POINTS + 1)[1:]
        for k in np.unique(np.searchsorted(curve["tokens"], wanted).clip(peak, len(tokens) - 1)):
            point = {"D": tokens[k], "annealing": share[k], "loss": curve["loss"][k], "flops": curve["flops"][k]}
            same = row["family"], row["N"], curve["tokens"][k], curve["loss"][k]
            rows.setdefault(same, row | point | {"run_id": f"{row['run_id']}@{k}", "ended": ""})
    if not rows:
        raise ScalingError("no training curve tells its steps and learning rates")
    return Runs.from_rows(list(rows.values()))


def effort(step: np.ndarray, tokens: np.ndarray, lr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Effective tokens and the share of the annealing that has taken effect at the points (n,) of a curve.

    Tokens count by the learning rate over its peak, their sum being S1 in tokens. A fall of the rate acts with a
    delay: momentum m_i = 0.999 m_(i-1) + fall_i, whose sum is S2; the share is S2 over what a fall to zero comes to in
    the end, so that it is 0 before any annealing and near 1 after a long one.
    """
    # The sums run over every step, the log has some of them: between logged steps the rate is taken to be a line.
    every = np.arange(int(step[0]), int(step[-1]) + 1)
    rate = np.interp(every, step, lr / lr.max())
    fall = np.append(0.0, -np.diff(rate)) * (every > every[np.argmax(rate)])
    share = (1 - MOMENTUM) * np.cumsum(lfilter([1.0], [1.0, -MOMENTUM], fall))
    seen = np.cumsum(rate * np.gradient(np.interp(every, step, tokens)))
    first = tokens[0] * rate[0]
    return first + np.interp(step, every, seen - seen[0]), np.interp(step, every, share)
