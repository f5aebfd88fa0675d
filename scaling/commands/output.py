"""What every verb prints and returns: 0 ok, 1 error, 2 a gate failed, 130 interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

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
    print(json.dumps(value, indent=1, allow_nan=False))
