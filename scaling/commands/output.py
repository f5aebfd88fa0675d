"""What every verb prints and returns: 0 ok, 1 error, 2 a gate failed, 130 interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np

from scaling.fitting.fit import Gate

OK, ERROR, GATE, INTERRUPTED = 0, 1, 2, 130


def exit_code(gates: Sequence[Gate]) -> int:
    return OK if all(g.passed for g in gates) else GATE


def print_gates(gates: Sequence[Gate]) -> None:
    """The failed ones."""
    for gate in gates:
        if not gate.passed:
            print(f"GATE {gate.name}: {gate.message}")


def print_json(value: Any) -> None:
    print(json.dumps(plain(value), indent=1, allow_nan=False))


def plain(value: Any) -> Any:
    """A value as JSON takes it: records as objects, arrays and tuples as lists, NaN and infinity as None."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
