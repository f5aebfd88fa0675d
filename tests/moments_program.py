"""What test_moments.py reads: eight simulated devices in a process of their own."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from mmfree_jax.config import FAMILIES, DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from mmfree_jax.data.building.token_writer import write_token_set
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from mmfree_jax.training.loop import train
from mmfree_jax.training.step import make_program, program_key
from tests.axes_program import CARD
from tests.conftest import read_metrics, tiny_run

MESH = MeshConfig(fsdp=4, tensor=2)


def bytes_of_a_device(tree) -> int:
    """Bytes that the first device holds."""
    return sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree))


def trained(family: str, moments: str, mesh: MeshConfig):
    """Parameters after three steps, and bytes of the moments over those of the parameters."""
    mixer, linear = FAMILIES[family]
    heads = 2 if mixer == "attention" else 1
    model = ModelConfig(mixer, linear, vocab=256, width=256, depth=1, glu_width=512, heads=heads)
    optim = OptimConfig(warmup_steps=0, moments=moments)
    run = RunConfig("m", model, DataConfig(vocab=257, sequence=16, batch=8), optim, mesh=mesh)
    program = make_program(program_key(run, None))
    rows = np.random.default_rng(0).integers(0, 256, (3, 8, 17), dtype=np.int32)
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        for some in rows:
            state, _ = program.train_step(state, program.place(some), program.repeat(np.float32(1e-3)))
    share = bytes_of_a_device(state.opt) / bytes_of_a_device(state.params)
    return [np.asarray(a) for a in jax.tree.leaves(state.params)], share


def resumed(folder: Path) -> tuple[list[list[float]], str]:
    """Losses of twelve steps on one device, and on one until step 5 and then on eight; and the second run's log."""
    token_set = write_token_set(folder / "corpus", {"train": ["a few words. "] * 400}, byte_tokenizer(), CARD)
    run = tiny_run("matmul-free", token_set.path, keep_checkpoints=9, precision="float32", evaluate=False, log_every=1)
    optim, data = dataclasses.replace(run.optim, moments="int8"), dataclasses.replace(run.data, batch=8)
    run, curves = dataclasses.replace(run, optim=optim, data=data), []
    for mesh in (MeshConfig(), MESH):
        train(dataclasses.replace(run, mesh=mesh), folder / "run", token_set)
        curves.append([row["loss"] for row in read_metrics(folder / "run") if "loss" in row])
        for checkpoint in (folder / "run" / "checkpoints").iterdir():
            if checkpoint.name.isdigit() and int(checkpoint.name) > 5:
                shutil.rmtree(checkpoint)
        (folder / "run" / "result.json").unlink()
    return curves, (folder / "run" / "log.txt").read_text()


def main() -> None:
    """Print it as JSON."""
    found = {}
    for family, moments in (("transformer++", "bfloat16"), ("matmul-free", "int8")):
        (one, share), (eight, of_a_device) = (trained(family, moments, mesh) for mesh in (MeshConfig(), MESH))
        apart = max(float(np.abs(a - b).mean()) for a, b in zip(one, eight, strict=True))
        found[f"{family} {moments}"] = share, of_a_device, apart
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps([found, *resumed(Path(folder))]))


if __name__ == "__main__":
    main()
