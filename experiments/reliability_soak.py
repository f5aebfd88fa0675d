"""A long run of tiny steps: `python -m experiments.reliability_soak [--steps N] [--checkpoint-every N] [--out FILE]`.

Host memory, Python's blocks of memory, open files and threads of the process after every thousandth step, with
checkpoints, evaluations, logs and TensorBoard as usual. After the first ten thousand, in which caches fill, files must
stay as many and memory nearly so. What TensorStore keeps of every JSON that it returns, at checkpoints, is printed too.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from experiments.reliability_kills import write_text
from experiments.reliability_pipeline import run_of
from mmfree_jax.config import OptimConfig
from mmfree_jax.data import TokenSet
from mmfree_jax.data import cli as corpus_cli
from mmfree_jax.training import loop

EVERY = 1000
WARM = 10_000  # steps in which caches fill
MOST_GROWTH = 0.3  # megabytes in a thousand steps after that, by a line through all rows


def measured(step: int, began: float) -> dict[str, float]:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return {
        "step": step,
        "seconds": round(time.monotonic() - began, 1),
        "resident_mb": round(pages * resource.getpagesize() / 1e6, 1),
        "python_blocks": sys.getallocatedblocks(),
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def soak(steps: int, checkpoint_every: int = 500) -> list[dict[str, float]]:
    """Train for so many steps, and return what was held after every thousandth."""
    rows: list[dict[str, float]] = []
    began = time.monotonic()
    add = loop.Interval.add

    def noted(self: Any, step: int, *rest: Any) -> None:
        add(self, step, *rest)
        if (step + 1) % EVERY == 0:
            rows.append(measured(step + 1, began))
            print(rows[-1], flush=True)

    loop.Interval.add = noted  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        write_text(folder)
        corpus_cli.main(["build", str(folder / "text.jsonl"), "--tokenizer", "bytes", "--out", str(folder / "corpus")])
        run = run_of("matmul-free", 1, folder / "corpus")
        run = dataclasses.replace(run, steps=steps, optim=OptimConfig(lr=1e-3, warmup_steps=50))
        run = dataclasses.replace(run, log_every=10, checkpoint_every=checkpoint_every, eval_every=1000)
        loop.train(run, folder / "out", TokenSet.open(folder / "corpus"), check_first=False)
    return rows


def kept_by_tensorstore(calls: int = 2000) -> float:
    """Python's blocks that stay allocated after a call that returns JSON and drops it. Orbax makes such calls."""
    spec = tensorstore.KvStore.Spec({"driver": "memory", "path": "a/"})
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(calls):
        spec.to_json()
    gc.collect()
    return (sys.getallocatedblocks() - before) / calls


def main() -> None:
    """Run, write the table, and fail if anything grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps; 0: only at the end [500]")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/reliability_soak.csv"))
    options = parser.parse_args()
    rows = soak(options.steps, options.checkpoint_every)
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    warm = [row for row in rows if row["step"] >= WARM]
    growth = float(np.polyfit([row["step"] / 1000 for row in warm], [row["resident_mb"] for row in warm], 1)[0])
    files = warm[-1]["open_files"] - warm[0]["open_files"]
    blocks = float(np.polyfit([row["step"] / 1000 for row in warm], [row["python_blocks"] for row in warm], 1)[0])
    print(
        f"from step {WARM} on: memory {growth:+.2f} MB in a thousand steps, {blocks:+.0f} blocks, open files {files:+}"
    )
    print(f"TensorStore keeps {kept_by_tensorstore():.1f} blocks of each JSON that it returns")
    sys.exit(growth > MOST_GROWTH or files > 0)


if __name__ == "__main__":
    main()
