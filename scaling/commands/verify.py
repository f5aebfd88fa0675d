"""`scaling verify --data DIR`: published fits against ours."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scaling.commands.arguments import new_verb
from scaling.commands.output import GATE, OK, print_json
from scaling.verify import verify


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "verify", run, "refit public tables and print published against ours")
    verb.add_argument("--data", type=Path, required=True, help="folder that holds the public tables")


def run(a: argparse.Namespace) -> int:
    rows = verify(a.data)
    if a.json:
        print_json([asdict(r) for r in rows])
    else:
        for row in rows:
            print(row.line())
    return OK if all(r.passed for r in rows) else GATE
