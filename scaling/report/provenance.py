"""Where every number of a report comes from; what nobody recorded is None and is shown as missing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from scaling.analysis import Analysis
from scaling.tables.runs import Runs

FROM_TABLE = (
    "tokenizer",
    "vocab",
    "val_set",
    "seq_len",
    "schedule",
    "flops_rule",
    "lr",
    "batch_tokens",
    "warmup_tokens",
    "precision",
)
FROM_CALLER = ("question", "data", "tuning", "hold_outs", "code_version", "hardware")


def provenance_block(found: Analysis, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every item of the checklist, None where it is not known, then whatever else the caller recorded."""
    runs, spec, fits = found.runs, found.spec, found.fits
    block: dict[str, Any] = {name: given.get(name) for name in FROM_CALLER}
    block |= {name: given.get(name, values_of(runs, name)) for name in FROM_TABLE}
    block |= {
        "families": {f: len(runs.family(f)) for f in found.families},
        "N_range": span(runs["N"]),
        "D_range": span(runs["D"]),
        "flops_range": span(runs["flops"]),
        "source": runs.source,
        "source_sha256": runs.sha256 or None,
        "derived": list(runs.notes),
        "exclusions": [f"{row['run_id']} ({row['reason']})" for row in runs.set_aside],
        "law": spec.law,
        "noise": spec.objective,
        "shared": "every tie by its weight" if spec.share is None else list(spec.share),
        "single_fits": {f: f"{fits[f].objective.name}, delta {fits[f].objective.delta:.3g}" for f in found.families},
        "solver": "centred batched damped IRLS/Newton, Newton polish; VarPro as second solver",
        "starts_agreeing": {f: f"{fits[f].certificate.agreeing} of {fits[f].certificate.starts}" for f in fits},
        "intervals": "ensemble over noise, misfit, ties and objective; equal-tailed 95 % of its draws",
        "draws": spec.draws,
        "seed": spec.seed,
        "software": {"numpy": np.__version__, "scipy": scipy.__version__, "scaling_sha256": own_digest()},
    }
    return block | {name: value for name, value in given.items() if name not in block}


def values_of(runs: Runs, name: str) -> Any:
    """The one value of a column, its few values, or its range; None where the table lacks it."""
    if name not in runs.columns:
        return "derived 6*N*D" if name == "flops_rule" and runs.notes else None
    values = [v for v in runs[name].tolist() if v != "" and v == v]
    distinct = sorted(set(values))
    if not distinct:
        return None
    if len(distinct) == 1:
        return distinct[0]
    return distinct if len(distinct) <= 6 else span(np.array(values)) if isinstance(values[0], float) else distinct[:6]


def span(values: np.ndarray) -> list[float]:
    return [float(values.min()), float(values.max())]


def own_digest() -> str:
    """SHA-256 over the sources of `scaling`: which code made the numbers."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
