"""Runs whose D, U, N, FLOPs, tokens and mfu can be worked out by hand (test_axes.py), and, as a program on eight
simulated devices, those of them that need eight and one held-out loss on several meshes."""

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from mmfree_jax.config import FAMILIES, Branch, DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from mmfree_jax.data import TokenSet
from mmfree_jax.data.building import token_writer
from mmfree_jax.data.building.packing import pack
from mmfree_jax.data.building.token_writer import write_token_set
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from mmfree_jax.evaluation.loss import evaluate
from mmfree_jax.training import loop, metrics
from mmfree_jax.training.interrupt import Interrupted
from mmfree_jax.training.step import make_program, program_key
from tests.conftest import read_metrics, sentences, tiny_run
from tests.training.stopping import stop_after

SEQUENCE, BATCH, STEPS, MIDDLE = 8, 8, 6, 3  # 16 windows of 8 positions: two steps are an epoch
CARD = {"name": "counted", "description": "made up", "sources": []}
SECONDS_A_STEP, PEAK = 0.5, 1e7  # of the clock and the device that the runs believe in


class Case(NamedTuple):
    family: str
    text: str  # loose or packed
    documents: str  # joined or apart
    accumulate: int
    devices: int
    history: str  # fresh, resumed or branched


def corpora(folder: Path) -> dict[str, TokenSet]:
    """Loose: 16 windows `a b c d . a . .`, where a dot is an end of document; packed: 16 of `a b c d . . . .`."""
    short = write_token_set(folder / "short", {"train": ["abcd"] * 16}, byte_tokenizer(), CARD)
    a, b, c, d, end = (int(token) for token in short.split("train")[:5])
    loose = exactly(folder / "loose", [a, b, c, d, end, a, end, end] * 16 + [a, b])
    return {"loose": loose, "packed": pack(short, folder / "packed", SEQUENCE)}


def exactly(path: Path, tokens: list[int]) -> TokenSet:
    """A token set of just these, as none of our writers makes: they leave out empty documents."""

    def fill(folder: Path) -> None:
        writer = token_writer.ShardWriter(folder, "train-00000", np.dtype(np.uint16))
        writer.add(np.array(tokens), starts=())
        token_writer.finish(folder, {"train": token_writer.split_entry([writer.close()], 0)}, byte_tokenizer(), CARD)

    return token_writer.publish(path, fill)


def run_of(case: Case, corpus: Path) -> RunConfig:
    """Six steps, logged every two, of two layers of width 8 and GLU width 16 over bytes."""
    mixer, linear = FAMILIES[case.family]
    heads = {"heads": 2} if mixer == "attention" else {}
    separate = case.documents == "apart"
    return RunConfig(
        name="run",
        model=ModelConfig(mixer=mixer, linear=linear, vocab=257, width=8, depth=2, glu_width=16, **heads),
        data=DataConfig(corpus=str(corpus), vocab=257, sequence=SEQUENCE, batch=BATCH, separate_documents=separate),
        optim=OptimConfig(lr=1e-3, warmup_steps=1, accumulate=case.accumulate),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2) if case.devices == 8 else MeshConfig(),
        steps=STEPS,
        log_every=2,
        checkpoint_every=0,
        evaluate=False,
    )


@contextlib.contextmanager
def believed() -> Iterator[None]:
    """A device of `PEAK` FLOP/s that takes `SECONDS_A_STEP` for every step: the clock shows what it was waited for."""
    done: dict[int, float] = {}  # when the metrics of each step are there, by the loss among them
    now, make, wait = [0.0], loop.make_program, jax.block_until_ready

    def noted(key: Any) -> Any:
        program = make(key)

        def step(*arguments: Any) -> Any:
            state, values = program.train_step(*arguments)
            kept.append(values["loss"])
            done[id(values["loss"])] = SECONDS_A_STEP * len(kept)
            return state, values

        return dataclasses.replace(program, train_step=step)

    def waited(tree: Any) -> Any:
        now[0] = max([now[0], *(done[id(leaf)] for leaf in jax.tree.leaves(tree) if id(leaf) in done)])
        return wait(tree)

    kept: list[jax.Array] = []  # so that no other array has the identity of one of them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_program", noted)
        patch.setattr(jax, "block_until_ready", waited)
        patch.setattr(loop.Program, "prepare", lambda *_, **__: None)
        patch.setattr(loop, "self_check", lambda *_: None)
        patch.setattr(metrics, "peak_flops", lambda _: PEAK)
        patch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now[0], strftime=time.strftime))
        yield


def numbers(case: Case, token_set: TokenSet, folder: Path) -> dict[str, Any]:
    """The row of a case's run, and the rows of its metrics."""
    run = run_of(case, token_set.path)
    with believed():
        if case.history == "resumed":
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupted):
                patch.setattr("mmfree_jax.training.loop.Diagnostics", stop_after(MIDDLE))
                loop.train(run, folder / "run", token_set)
        if case.history == "branched":
            trunk = dataclasses.replace(run, name="trunk", steps=MIDDLE + 1, milestones=(MIDDLE,))
            loop.train(trunk, folder / "trunk", token_set)
            run = dataclasses.replace(run, branch=Branch("trunk", MIDDLE))
        result = loop.train(run, folder / "run", token_set)
    return {"result": result, "metrics": read_metrics(folder / "run")}


def held_out(folder: Path) -> dict[str, Any]:
    """Scores of one untrained model on meshes of 1, 2 and 8 devices."""
    texts = {"train": sentences(5, 0), "valid": sentences(25, 1)}
    token_set, found = write_token_set(folder / "held-out", texts, byte_tokenizer(), CARD), {}
    for shape in ((1, 1), (2, 1), (4, 2)):
        data = DataConfig(str(token_set.path), vocab=257, sequence=32, batch=8)
        run = tiny_run("matmul-free", token_set.path, data=data, mesh=MeshConfig(*shape), precision="float32")
        program = make_program(program_key(run, None))
        with jax.set_mesh(program.mesh):
            params = program.init(jax.random.key(0)).params
        found[f"{shape[0] * shape[1]}"] = evaluate(program.nats, program.mesh, params, token_set, 32)
    return found


def main(cases: list[Case]) -> None:
    with tempfile.TemporaryDirectory() as place:
        sets = corpora(Path(place))
        runs = [numbers(case, sets[case.text], Path(place) / str(number)) for number, case in enumerate(cases)]
        print(json.dumps({"runs": runs, "held out": held_out(Path(place))}))


if __name__ == "__main__":
    assert jax.device_count() == 8
    main([Case(*case) for case in json.loads(sys.argv[1])])
