"""The loss curves that golden.json holds: one run of every family, fifty steps in float32 on a CPU.

A change that moves a curve replaces golden.json in the same commit, whose message says why it moved:

    .venv/bin/python -m tests.training.golden --write       # new curves, measured on this stack
    .venv/bin/python -m tests.training.golden --spread      # how far they are from it as XLA compiles by default
    .venv312/bin/python -m tests.training.golden --spread   # and from another stack, compiled either way

The tolerance of test_golden.py is `TOLERANCE` times the spread: the largest distance between curves that nobody would
call different, over versions of Python, JAX and XLA and over how XLA compiles. In ternary families a rounding error
tips a weight or an activation into its next code now and then. Whether and where is chance, so these families share
the largest spread of any of them, as the dense ones do; and the distance is a mean over the steps, as a single step may
be off by as much as a small fault moves all of them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from tests.compiling import xla_flags

os.environ.setdefault("XLA_FLAGS", xla_flags())  # as conftest.py does; before JAX loads

import jax
import numpy as np

from mmfree_jax.config import FAMILIES, DataConfig, ModelConfig, OptimConfig, RunConfig
from mmfree_jax.data import TokenSet
from mmfree_jax.data.building.token_writer import write_token_set
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from mmfree_jax.training import loop

FILE = Path(__file__).with_name("golden.json")
TOLERANCE = 3.0  # times the spread
STEPS = 50
WORDS = "the loss of a model falls with compute while data and parameters grow together in time".split()


def corpus(folder: Path) -> TokenSet:
    """Short documents of made-up text, the same on every stack and machine."""
    draw = lambda *place: zlib.crc32(repr(place).encode())
    documents = [[WORDS[draw(i, j) % len(WORDS)] for j in range(2 + draw(i) % 9)] for i in range(400)]
    card = {"name": "golden", "description": "made up", "sources": []}
    return write_token_set(folder, {"train": list(map(" ".join, documents))}, byte_tokenizer(), card)


def run_of(family: str, corpus: Path) -> RunConfig:
    """Warm-up, plateau and decay; clipping, separate documents, and a weight decay that is felt within fifty steps.

    With an `eps` so large that Adam does not make whole steps of gradients that are rounding errors.
    """
    mixer, linear = FAMILIES[family]
    heads = {"heads": 2} if mixer == "attention" else {}
    return RunConfig(
        name="golden",
        model=ModelConfig(mixer=mixer, linear=linear, vocab=257, width=16, depth=2, glu_width=32, **heads),
        data=DataConfig(corpus=str(corpus), vocab=257, sequence=32, batch=4, separate_documents=True),
        optim=OptimConfig(lr=2e-3, warmup_steps=5, decay_steps=10, weight_decay=1.0, eps=1e-3),
        steps=STEPS,
        precision="float32",
        log_every=1,
        checkpoint_every=0,
        evaluate=False,
    )


def curve(run: RunConfig, token_set: TokenSet) -> list[float]:
    """Training loss in nats at every step."""
    with tempfile.TemporaryDirectory() as folder:
        loop.train(run, Path(folder) / "run", token_set, check_first=False)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def distance(one: list[float], other: list[float]) -> float:
    """The mean over the steps of how far two curves are from each other, in nats."""
    return float(np.abs(np.subtract(one, other)).mean())


def tolerance(held: dict, family: str) -> float:
    """In nats, from what golden.json holds."""
    alike = [one["spread"] for name, one in held["families"].items() if FAMILIES[name][1] == FAMILIES[family][1]]
    return TOLERANCE * max(alike)


def curves() -> dict[str, list[float]]:
    """Of every family, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        token_set = corpus(Path(folder) / "corpus")
        return {family: curve(run_of(family, token_set.path), token_set) for family in FAMILIES}


def measured(flags: str) -> dict[str, list[float]]:
    """Curves from a process with these XLA_FLAGS."""
    command, env = [sys.executable, "-m", "tests.training.golden", "--print"], {**os.environ, "XLA_FLAGS": flags}
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the loss curves of golden.json, or the spread beside them.")
    asked = parser.add_mutually_exclusive_group(required=True)
    for flag in ("--write", "--spread", "--print"):
        asked.add_argument(flag, action="store_true")
    asked = parser.parse_args()
    if asked.print:
        print(json.dumps(curves()))
        return
    stack = f"Python {sys.version_info.major}.{sys.version_info.minor}, jax {jax.__version__}"
    if asked.write:
        families = {family: {"spread": 0.0, "curve": found} for family, found in measured(xla_flags()).items()}
        held = {"written on": stack, "spread over": [], "families": families}
    else:
        held = json.loads(FILE.read_text(encoding="utf-8"))
        for way, flags in (("as the tests compile", xla_flags()), ("as XLA compiles by default", "")):
            held["spread over"].append(f"{stack}, {way}")
            for family, found in measured(flags).items():
                one = held["families"][family]
                one["spread"] = max(one["spread"], distance(found, one["curve"]))
    FILE.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"{family}: spread {one['spread']:.3g}" for family, one in held["families"].items()))


if __name__ == "__main__":
    main()
