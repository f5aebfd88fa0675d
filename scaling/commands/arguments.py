"""Flags that several verbs share, and the values they stand for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling.commands.output import ERROR
from scaling.costs import AXES, Prices
from scaling.ensemble.ensemble import baseline_first
from scaling.ensemble.posterior import NOISES
from scaling.fitting.selection import CHOICES
from scaling.fitting.sensitivity import CUSTOMARY_DELTA
from scaling.laws.forms import LAWS
from scaling.spec import Spec
from scaling.tables.curves import annealed, sweep_curves
from scaling.tables.remote import is_url, local
from scaling.tables.runs import Runs, ScalingError, as_number

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


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive count")
    return int(text)


def runs_place(text: str) -> Path:
    try:
        return local(text)
    except ScalingError as error:  # argparse would hide the message of any other error
        raise argparse.ArgumentTypeError(str(error)) from None


def path_here(text: str) -> Path:
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL: give a path of this machine")
    return Path(text)


def table_arguments(verb: argparse.ArgumentParser) -> None:
    """The table of runs and what is read from it: see `read_table`."""
    verb.add_argument(
        "runs", type=runs_place, help="CSV, JSONL or Parquet table, or a folder of runs; or the URL of one"
    )
    verb.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="e.g. N=params")
    verb.add_argument("--set", action="append", default=[], metavar="COLUMN=VALUE", help="a column of one value")
    verb.add_argument(
        "--where", action="append", default=[], metavar="CONDITION", help="keep rows: family=llama, N>=1e8"
    )
    verb.add_argument("--curves", action="store_true", help="points of the folder's curves, for --law annealed")
    verb.add_argument("--allow-midrun", action="store_true", help="accept points inside a run (they mislead fits)")


def spec_arguments(verb: argparse.ArgumentParser) -> None:
    """What an analysis assumes: one flag for every field of `Spec`, with its defaults."""
    d = Spec()
    verb.add_argument("--law", default=d.law, choices=sorted(LAWS))
    text = "noise of the runs: auto weighs normal against Huber's; or fix one (default auto)"
    verb.add_argument("--objective", default=d.objective, choices=sorted(NOISES), help=text)
    text = f"Huber threshold of single fits (default: from the noise of the table, at least {CUSTOMARY_DELTA:g})"
    verb.add_argument("--delta", type=positive, help=text)
    text = "parameters common to two families, e.g. E,B,beta; '' for none (default: every tie by its weight)"
    verb.add_argument("--share", help=text)
    text = "rows that count: all, the best learning rate of each cell, or the envelope"
    verb.add_argument("--select", default=d.select, choices=CHOICES, help=text)
    verb.add_argument("--draws", type=count, default=d.draws, help=f"draws of the ensemble (default {d.draws})")
    verb.add_argument("--seed", type=int, default=d.seed)
    verb.add_argument("--energy", action="append", default=[], metavar="CLASS=PJ", help="picojoules per operation")
    verb.add_argument("--usd-per-hour", type=positive, help="price of an accelerator, for the axis usd")
    verb.add_argument(
        "--baseline", help="the family that others are compared with (default: transformer++, or the first)"
    )


def spec_of(a: argparse.Namespace) -> Spec:
    """The Spec that the flags describe."""
    energies = {name: positive_setting(value, "--energy") for name, value in assignments(a.energy, "--energy").items()}
    share = None if a.share is None else tuple(name.strip() for name in a.share.split(",") if name.strip())
    prices = Prices.of(energies, a.usd_per_hour)
    return Spec(
        a.law, a.objective, a.delta, share, a.select, a.draws, a.seed, prices, getattr(a, "a", None) or a.baseline
    )


def pair_arguments(verb: argparse.ArgumentParser) -> None:
    """Two families: see `pair_of`."""
    verb.add_argument("--a", help="baseline family (default: --baseline)")
    verb.add_argument("--b", help="the family compared with it (default: the next one)")


def pair_of(a: argparse.Namespace, runs: Runs) -> tuple[str, str]:
    """The two families that --a and --b name; raises ScalingError where the table has no two."""
    ordered = baseline_first(runs, a.a or a.baseline)
    if len(ordered) < 2:
        raise ScalingError(f"the table holds one family, {ordered[0]!r}; a comparison needs two")
    second = a.b or ordered[1]
    if second == ordered[0]:
        raise ScalingError(f"family {second!r} cannot be compared with itself")
    return ordered[0], str(runs.family(second)["family"][0])


def axis_arguments(verb: argparse.ArgumentParser) -> None:
    """What two families are compared at equal amounts of, and along which path."""
    verb.add_argument("--axis", default="flops", choices=sorted(AXES), help="what is equal (default flops)")
    verb.add_argument("--along", default="optimal", help="optimal (default), ratio=20 (tokens a parameter) or size=1e9")
    verb.add_argument(
        "--at", type=positive, action="append", default=[], help="a budget to compare at; may be repeated"
    )


def accuracy_argument(verb: argparse.ArgumentParser) -> None:
    text = "also the accuracy of this column, by way of the loss; may be repeated"
    verb.add_argument("--accuracy", action="append", default=[], metavar="COLUMN", help=text)


def out_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--out", type=path_here, help="folder for the full report (HTML, figures, fit.json)")


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


def read_table(a: argparse.Namespace, allow_midrun: bool = False) -> Runs:
    """The table that --column, --set and --where describe."""
    columns, constants = assignments(a.column, "--column"), assignments(a.set, "--set")
    runs = Runs.read(a.runs, columns, a.where, constants, a.allow_midrun or allow_midrun)
    return annealed(runs, sweep_curves(a.runs)) if a.curves else runs
