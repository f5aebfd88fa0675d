"""The command line, `python -m scaling VERB`; each verb is a file of `scaling/commands/`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from scaling.commands import allocate, backtest, compare, fit, lint, optima, plan, plot, predict, report, verify
from scaling.commands.arguments import OneLineParser
from scaling.commands.output import ERROR, INTERRUPTED
from scaling.tables.runs import ScalingError


def parser() -> argparse.ArgumentParser:
    text = "Scaling laws from a table of runs, with intervals and certificates."
    top = OneLineParser(prog="scaling", description=text)
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=OneLineParser)
    for command in (lint, plot, fit, optima, backtest, allocate, predict, compare, plan, report, verify):
        command.add(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns 0 (ok), 1 (error, one line on stderr), 2 (a gate failed) or 130 (interrupted)."""
    arguments = parser().parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `scaling … | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ScalingError, OSError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return ERROR


if __name__ == "__main__":
    sys.exit(main())
