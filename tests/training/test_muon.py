"""Muon on eight simulated devices: the same updates as on one, whole matrices moved, never the whole stack."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec as P

from mmfree_jax.training.muon import _moves
from tests.compiling import xla_flags

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, re, sys
import jax, numpy as np
from mmfree_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from mmfree_jax.sharding import make_mesh
from mmfree_jax.training.muon import layer_sharded, newton_schulz
from mmfree_jax.training.step import make_program, program_key
from jax.sharding import NamedSharding, PartitionSpec as P

def trained(mesh):
    model = ModelConfig("attention", "dense", vocab=64, width=32, depth=4, glu_width=64, heads=2)
    optim = OptimConfig(optimizer="muon", warmup_steps=0)
    run = RunConfig("m", model, DataConfig(vocab=257, sequence=16, batch=8), optim, mesh=mesh)
    program = make_program(program_key(run, None))
    tokens = program.place(np.random.default_rng(0).integers(0, 64, (8, 17), dtype=np.int32))
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        for _ in range(3):
            state, _ = program.train_step(state, tokens, jax.device_put(np.float32(1e-2)))
    return jax.tree.map(np.asarray, (state.params, state.opt))

one, eight = (trained(mesh) for mesh in (MeshConfig(), MeshConfig(fsdp=4, tensor=2)))
apart = max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight)))
moved = max(float(np.abs(a).max()) for a in jax.tree.leaves(one))

mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
stack = np.random.default_rng(1).normal(size=(int(sys.argv[1]), 64, 96)).astype(np.float32)
with jax.set_mesh(mesh):
    place = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    sharded = jax.jit(lambda m: layer_sharded(m, ("fsdp", "tensor")), in_shardings=place, out_shardings=place)
    compiled = sharded.lower(jax.device_put(stack, place)).compile()
    error = float(np.abs(np.asarray(compiled(jax.device_put(stack, place))) - np.asarray(newton_schulz(stack))).max())
text = compiled.as_text()
kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
counts = {kind: len(re.findall(rf"= [^=]*\\b{kind}(?:-start)?\\(", text)) for kind in kinds}
temporary = compiled.memory_analysis().temp_size_in_bytes
print(json.dumps({"apart": apart, "moved": moved, "error": error, "counts": counts, "share": temporary / stack.nbytes}))
"""


@pytest.mark.parametrize("matrices", [8, 12])
def test_sharded_and_unsharded_agree_and_only_pieces_move(matrices):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(matrices)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=8)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Involuntary full rematerialization" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["apart"] < 1e-4 < found["moved"]
    assert found["error"] < 1e-4
    assert found["counts"]["all-gather"] == found["counts"]["all-reduce"] == 0
    assert found["counts"]["all-to-all"] == 4
    assert found["share"] < {8: 1, 12: 1.5}[matrices]  # of the stack, on each device; twelve are padded to sixteen


@pytest.mark.parametrize(
    ("matrices", "expected", "devices"),
    [
        (24, [P(None, "fsdp", "tensor"), P("tensor", "fsdp", None), P(("tensor", "fsdp"), None, None)], 8),
        (4, [P(None, "fsdp", "tensor"), P("tensor", "fsdp", None)], 2),  # eight devices would mostly hold padding
        (1, [P(None, "fsdp", "tensor")], 1),
    ],
)
def test_an_axis_moves_only_while_there_are_matrices_for_its_devices(matrices, expected, devices):
    assert _moves(matrices, P(None, "fsdp", "tensor"), {"fsdp": 4, "tensor": 2}) == (expected, devices)
