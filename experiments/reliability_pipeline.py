"""Everything that a small run goes through, as one command that may be killed at any moment and started again.

`python -m experiments.reliability_pipeline FOLDER FAMILY PROCESSES [INDEX HOST:PORT]` builds a corpus from
FOLDER/text.jsonl, declares a sweep of one run, trains and evaluates it, writes runs.csv and exports the model. What is
done already is passed over. Of a run of several processes, those with an INDEX train, and one without it then does
the rest.
`experiments.reliability_kills` starts it.

Environment: KILL=MODULE:NAME:N:SECONDS kills this process with SIGKILL so long after the N-th call of that function
began. TIMES=FILE appends the time of every step to FILE.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mmfree_jax import api, distributed
from mmfree_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from mmfree_jax.data import cli as corpus_cli
from mmfree_jax.presets import run_preset
from mmfree_jax.sweep import status, study, worker
from mmfree_jax.sweep.experiment import Study
from mmfree_jax.training.step import make_program, program_key
from mmfree_jax.weights import load_params

FAMILIES = ("transformer++", "matmul-free", "matmul-free-rwkv4", "bitnet", "hgrn")
AS_HUGGINGFACE = ("transformer++", "matmul-free")  # how a family is exported; the others as packed folders
STEPS = 12


def run_of(family: str, processes: int, corpus: Path) -> RunConfig:
    """Twelve steps of a two-layer model over bytes; a checkpoint every three, an evaluation every four."""
    model = run_preset(f"{family}-tiny").model
    heads = {"heads": 2} if model.mixer == "attention" else {}
    sizes: dict[str, Any] = {"vocab": 257, "width": 16, "depth": 2, "glu_width": 32, **heads}
    return RunConfig(
        name="run",
        model=dataclasses.replace(ModelConfig(mixer=model.mixer, linear=model.linear), **sizes),
        data=DataConfig(corpus=str(corpus), vocab=257, sequence=32, batch=8),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, decay_steps=4),
        mesh=MeshConfig(data=processes),
        steps=STEPS,
        log_every=2,
        checkpoint_every=3,
        eval_every=4,
    )


def pipeline(folder: Path, family: str, processes: int, index: int, coordinator: str) -> int:
    """Train, and in a single process do the rest. Returns the exit status."""
    corpus, out = folder / "corpus", folder / "sweep"
    if index == 0 and not corpus.exists():
        words = ["build", str(folder / "text.jsonl"), "--tokenizer", "bytes", "--held-out", "0.1", "--processes", "1"]
        corpus_cli.main([*words, "--out", str(corpus)])
    if coordinator:
        distributed.HEARTBEAT_SECONDS = 8  # after so long the other process calls a killed one dead; usually 30
        distributed.join(distributed.Group(coordinator, processes, index), 120)
    run = run_of(family, processes, corpus)
    declared = Study("kills", "kills", (run,), run.model.family)
    distributed.first_does(lambda: study.prepare(declared, out, Console(quiet=True)))
    code = worker.main(out, [run.name])
    return code if code or coordinator else _finish(folder, out, run)


def _finish(folder: Path, out: Path, run: RunConfig) -> int:
    status.collect(out, (run,))
    trained, exported = out / "runs" / run.name, folder / "exported"
    if not exported.exists():
        api.export(trained, exported, format="huggingface" if run.model.family in AS_HUGGINGFACE else "packed")
    alone = dataclasses.replace(run, mesh=MeshConfig())
    here = make_program(program_key(dataclasses.replace(alone, precision="float32"), None)).abstract_state.params
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(load_params(trained, here)):
        digest.update(np.asarray(leaf).tobytes())
    print(json.dumps({"parameters": digest.hexdigest()}), flush=True)
    return 0


def watched(function: Any, kill: tuple[int, float] | None, note: Any) -> Any:
    """The function; its n-th call starts the time to the kill, and every call is noted."""
    calls = 0

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if kill and calls == kill[0]:
            timer = threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        found = function(*arguments, **named)
        note(*arguments)
        return found

    return call


def watch(place: str, kill: tuple[int, float] | None = None, note: Any = lambda *_: None) -> None:
    """Replace MODULE:NAME by its watched form."""
    module, name = place.split(":")
    owner: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    setattr(owner, last, watched(getattr(owner, last), kill, note))


def note_step(file: str, interval: Any, step: int, *_: Any) -> None:
    """Append the time and the 1-based step to a file."""
    with open(file, "a", encoding="utf-8") as times:
        times.write(f"{time.time():.4f} {step + 1}\n")


if __name__ == "__main__":
    if times := os.environ.get("TIMES"):
        watch("mmfree_jax.training.metrics:Interval.add", note=functools.partial(note_step, times))
    if place := os.environ.get("KILL"):
        *where, occurrence, seconds = place.split(":")
        watch(":".join(where), (int(occurrence), float(seconds)))
    where_to, family_name, *group = sys.argv[1:]
    own, address = (int(group[1]), group[2]) if len(group) == 3 else (0, "")
    sys.exit(pipeline(Path(where_to), family_name, int(group[0]), own, address))
