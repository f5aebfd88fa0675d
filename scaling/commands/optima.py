"""`scaling optima RUNS --N 7e9 --D 2e12`: the learning rate and batch size that a sweep recommends."""

from __future__ import annotations

import argparse
from typing import Any

from scaling.commands.arguments import new_verb, positive, read_table, table_arguments
from scaling.commands.output import OK, print_json
from scaling.fitting.optima import Optimum, optima
from scaling.report.words import rounded

NAMES = {"lr": ("learning rate", ""), "batch_tokens": ("batch", " tokens")}


def add(verbs: Any) -> None:
    verb = new_verb(verbs, "optima", run, "best learning rate and batch size by model size and tokens, from a sweep")
    table_arguments(verb)
    verb.add_argument("--N", type=positive, help="parameters to give the best settings for")
    verb.add_argument("--D", type=positive, help="training tokens to give them for")


def run(a: argparse.Namespace) -> int:
    runs = read_table(a)
    found = {family: optima(runs.family(family)) for family in runs.families}
    if a.json:
        print_json({family: {name: as_json(x, a.N, a.D) for name, x in one.items()} for family, one in found.items()})
        return OK
    for family, one in found.items():
        for x in one.values():
            print(f"{family}: {line(x)}")
            if a.N and a.D:
                value, low, high = x.at(a.N, a.D)
                ends = f"{low:.3g} to {high:.3g}{NAMES[x.setting][1]}"
                print(f"  at {a.N:.3g} parameters and {a.D:.3g} tokens: {value:.3g} ({ends}, 95 %)")
    return OK


def line(x: Optimum) -> str:
    """The law of one setting."""
    powers = " ".join(f"{name}^{value:.3f}" for name, (value, _, _) in x.exponents.items())
    ends = ", ".join(f"exponent of {name} {rounded(*values)}" for name, values in x.exponents.items())
    return f"best {NAMES[x.setting][0]} {x.scale:.3g} {powers}; {ends}, 95 %"


def as_json(x: Optimum, n: float | None, d: float | None) -> dict[str, Any]:
    asked = dict(zip(("value", "low", "high"), x.at(n, d), strict=True)) if n and d else {}
    return {"scale": x.scale, "exponents": x.exponents, "cells_less_parameters": x.freedom} | asked
