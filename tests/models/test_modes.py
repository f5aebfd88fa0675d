"""The model under both ways that Flax walks modules, and on a mesh."""

import os
import subprocess
import sys

import pytest

from tests.compiling import xla_flags

PROGRAM = """
import jax, jax.numpy as jnp
from flax import nnx
from mmfree_jax.config import FAMILIES, MeshConfig, ModelConfig
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.sharding import batch_sharding, make_mesh, shardings
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
ids = jax.random.randint(jax.random.key(1), (4, 16), 0, 64)
for family in {families}:
    mixer, linear = FAMILIES[family]
    heads = 2 if mixer == "attention" else 1
    config = ModelConfig(mixer, linear, vocab=64, width=16, depth=2, glu_width=32, heads=heads)
    build = lambda key: LanguageModel(config, rngs=nnx.Rngs(key), dtype=jnp.{dtype}, param_dtype=jnp.{dtype})
    init = lambda key: nnx.state(build(key))
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(0)))
    loss = lambda params, ids: nnx.merge(graph, params).loss(ids[:, :-1], ids[:, 1:])[0]
    alone, gradient = jax.jit(jax.value_and_grad(loss))(jax.jit(init)(jax.random.key(0)), ids)
    places = shardings(mesh, jax.eval_shape(init, jax.random.key(0)))
    with jax.set_mesh(mesh):
        params = jax.jit(init, out_shardings=places)(jax.random.key(0))
        spread, other = jax.jit(jax.value_and_grad(loss))(params, jax.device_put(ids, batch_sharding(mesh)))
    kernel = params["blocks"]["mixer"]["out"]["kernel"].get_value()
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size, kernel.sharding
    assert abs(float(alone - spread)) < {tolerance} * abs(float(alone)), (family, alone, spread)
    pairs = zip(*map(jax.tree.leaves, (gradient, other)))
    worst = max(float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in pairs)
    assert worst < {tolerance}, (family, worst)
print("fine")
"""


def run(families, dtype, tolerance, **environment):
    program = PROGRAM
    for name, value in {"families": families, "dtype": dtype, "tolerance": tolerance}.items():
        program = program.replace(f"{{{name}}}", str(value))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices=8)} | environment
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("mode", ["true", "false"], ids=["graph mode", "tree mode"])
def test_one_device_and_a_mesh_agree(mode):
    """Dense families: nothing amplifies the order of sums."""
    families = ["transformer++"] if mode == "true" else ["hgrn"]
    done = run(families, "float32", 1e-4, NNX_GRAPH_MODE=mode, NNX_GRAPH_UPDATES=mode)
    assert done.stdout == "fine\n", done.stderr[-3000:]
    assert "Involuntary full rematerialization" not in done.stderr


def test_ternary_models_agree_with_a_mesh_in_double_precision():
    """In tree mode. In float32 another order of sums may flip a rounded code, which says nothing about the program."""
    modes = {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false", "JAX_ENABLE_X64": "true"}
    done = run(["matmul-free"], "float64", 1e-9, **modes)
    assert done.stdout == "fine\n", done.stderr[-3000:]
    assert "Involuntary full rematerialization" not in done.stderr
