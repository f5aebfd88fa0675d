"""The command line from a checkout: `python launch.py VERB …` is the installed command `mmfree VERB …`."""

import sys

from mmfree_jax.commands import command, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(command())
