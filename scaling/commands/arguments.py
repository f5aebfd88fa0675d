"""Flags that several verbs share, and the values they stand for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling.commands.output import ERROR
from scaling.fitting.solve import Objective
from scaling.laws.forms import LAWS
from scaling.tables.runs import Runs, ScalingError, as_number
from scaling.uncertainty.sensitivity import CUSTOMARY_DELTA, delta_from_noise, objective_text
from scaling.verdict.costs import AXES, Prices

OBJECTIVES = ("huber", "lad", "log-ls", "raw-ls")
Run = Callable[[argparse.Namespace], int]


class OneLineParser(argparse.ArgumentParser):
    """Wrong usage is an error like any other: one line, exit code 1 (argparse would say 2, which means a gate)."""

    def error(self, message: str) -> Any:
        print(f"error: {self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(ERROR)


def new_verb(verbs: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A verb's parser with the flags that every verb has."""
    verb = verbs.add_parser(name, help=text, description=text)
    verb.set_defaults(run=run)
    verb.add_argument("--json", action="store_true", help="machine-readable result on stdout")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return verb


def positive(text: str) -> float:
    value = float(text)
    if not (np.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def threshold(text: str) -> float | None:
    """A positive number, or None for auto."""
    return None if text == "auto" else positive(text)


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive count")
    return int(text)


def table_arguments(verb: argparse.ArgumentParser) -> None:
    """The table of runs and what is read from it: see `read_table`."""
    verb.add_argument("runs", type=Path, help="CSV, JSONL or Parquet table, or a folder of runs")
    verb.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="e.g. N=params")
    verb.add_argument("--set", action="append", default=[], metavar="COLUMN=VALUE", help="a column of one value")
    verb.add_argument(
        "--where", action="append", default=[], metavar="CONDITION", help="keep rows: family=llama, N>=1e8"
    )
    verb.add_argument("--allow-midrun", action="store_true", help="accept points inside a run (they mislead fits)")


def fit_arguments(verb: argparse.ArgumentParser, draws: int = 2000, drawn: str = "bootstrap draws") -> None:
    """Law, objective and bootstrap."""
    verb.add_argument("--law", default="chinchilla", choices=sorted(LAWS))
    verb.add_argument("--objective", default="huber", choices=OBJECTIVES)
    verb.add_argument(
        "--delta",
        type=threshold,
        help="Huber threshold on log loss (default auto: from the noise of the table, but not below "
        f"{CUSTOMARY_DELTA:g}, with which published fits are made)",
    )
    verb.add_argument("--draws", type=count, default=draws, help=f"{drawn} (default {draws})")
    verb.add_argument("--seed", type=int, default=0)


def family_arguments(verb: argparse.ArgumentParser) -> None:
    """Two families, and what they share: see `pair_of`."""
    verb.add_argument("--a", help="baseline family (default: the table's first)")
    verb.add_argument("--b", help="the family compared with it (default: the table's second)")
    share_argument(verb)


def pair_of(a: argparse.Namespace, runs: Runs) -> tuple[str, str]:
    """The two families that --a and --b name; raises ScalingError where the table has no two."""
    first = a.a or runs.families[0]
    rest = [name for name in runs.families if name != first]
    if not a.b and not rest:
        raise ScalingError(f"the table holds one family, {first!r}; a comparison needs two")
    second = a.b or rest[0]
    if first == second:
        raise ScalingError(f"family {first!r} cannot be compared with itself")
    return first, second


def axis_arguments(verb: argparse.ArgumentParser) -> None:
    """What two families are compared at equal amounts of, and along which path."""
    verb.add_argument("--horizon", type=positive, help="cost up to which a crossing is looked for")
    verb.add_argument("--axis", choices=sorted(AXES), help="what is compared at equal amounts (default flops)")
    verb.add_argument("--along", help="optimal (default), ratio=20 (tokens a parameter) or size=1e9")
    price_arguments(verb)


def price_arguments(verb: argparse.ArgumentParser) -> None:
    """What operations and hours cost."""
    verb.add_argument("--energy", action="append", default=[], metavar="CLASS=PJ", help="picojoules per operation")
    verb.add_argument("--usd-per-hour", type=positive, help="price of an accelerator, for the axis usd")


def prices_of(a: argparse.Namespace) -> Prices:
    """The cited energies with what --energy replaces, and the price of an hour."""
    energies = {name: positive_setting(value, "--energy") for name, value in assignments(a.energy, "--energy").items()}
    return Prices.of(energies, a.usd_per_hour)


def share_argument(verb: argparse.ArgumentParser) -> None:
    text = "parameters common to all families, e.g. E,B,beta; '' for none (default: E where the law has one)"
    verb.add_argument("--share", help=text)


def out_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", type=Path, help="folder for the full report (HTML, figures, fit.json)")


def assignments(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """NAME=VALUE flags as a mapping; raises ScalingError."""
    out = {}
    for text in pairs:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ScalingError(f"{flag} {text!r} is not NAME=VALUE")
        out[name.strip()] = value.strip()
    return out


def positive_setting(text: str, flag: str) -> float:
    """A positive number from inside a flag's value; raises ScalingError."""
    value = as_number(text)
    if value is None or not value > 0:
        raise ScalingError(f"{flag}: {text!r} is not a positive number")
    return value


def delta_of(a: argparse.Namespace, runs: Runs) -> float:
    """The Huber threshold asked for, or that of the noise of the table: the same whichever families a verb fits."""
    return delta_from_noise(runs, a.law) if a.delta is None else a.delta


def objective_line(a: argparse.Namespace, objective: Objective) -> str:
    """By what the laws were fitted, for the terminal."""
    return f"fitted by {objective_text(objective, a.delta is None)}"


def read_table(a: argparse.Namespace, allow_midrun: bool = False) -> Runs:
    """The table that --column, --set and --where describe."""
    columns, constants = assignments(a.column, "--column"), assignments(a.set, "--set")
    return Runs.read(a.runs, columns, a.where, constants, a.allow_midrun or allow_midrun)


def shared(a: argparse.Namespace) -> tuple[str, ...] | None:
    """The names in --share; None where it is left to the law."""
    if a.share is None:
        return None
    return tuple(name.strip() for name in a.share.split(",") if name.strip())
