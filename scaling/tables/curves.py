"""Training curves of a sweep directory, for drawing only: fits never use points from inside a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WANTED = ("tokens", "flops", "loss")


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
    branch = json.loads(config.read_text()).get("branch") if config.is_file() else None
    return branch["run"] if branch else ""


def after_trunk(curve: dict[str, np.ndarray], trunk: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """The trunk's curve up to where the branch's own begins, then that."""
    if trunk is None or not len(curve["tokens"]):
        return curve
    before = trunk["tokens"] < curve["tokens"][0]
    return {name: np.concatenate([trunk[name][before], curve[name]]) for name in WANTED}


def read_curve(log: Path) -> dict[str, np.ndarray]:
    """One run's curve; the last line may be cut off, since a run that is still going writes it."""
    rows = []
    lines = log.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise
            break
        if all(isinstance(row.get(name), (int, float)) for name in WANTED):
            rows.append([float(row[name]) for name in WANTED])
    table = np.array(rows).reshape(-1, len(WANTED))
    return {name: table[:, i] for i, name in enumerate(WANTED)}
