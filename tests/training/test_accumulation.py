"""Micro-batches: weights are quantised once a step. That they compute the same run is for test_loop.py."""

from pathlib import Path

import jax
import jax.extend
import numpy as np
import pytest
from flax import nnx

from mmfree_jax.config import OptimConfig
from mmfree_jax.training.step import make_program, program_key
from tests.conftest import tiny_run
from tests.models.families import CONFIGS, model, tokens


@pytest.mark.parametrize("name", ["transformer++", "matmul-free", "tied", "dense-head", "scale-per-channel"])
def test_codes_made_ahead_change_neither_loss_nor_gradients(name):
    built = model(CONFIGS[name])
    ids = tokens(built.config)
    graphdef, params = nnx.split(built)

    def loss(params, codes):
        again = nnx.merge(graphdef, params)
        if codes is not None:
            again.use_codes(codes)
        return again.loss(ids[:, :-1], ids[:, 1:])[0]

    ahead = jax.jit(lambda params: nnx.merge(graphdef, params).make_codes())(params)
    gradient = jax.jit(jax.value_and_grad(loss))
    for a, b in zip(jax.tree.leaves(gradient(params, ahead)), jax.tree.leaves(gradient(params, None)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def largest_roundings(jaxpr, inside: bool = False) -> dict[bool, int]:
    """Elements of the largest array that is rounded: outside (False) and inside (True) of any loop."""
    found = {False: 0, True: 0}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "round":
            found[inside] = max(found[inside], eqn.outvars[0].aval.size)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            for where, size in largest_roundings(inner, inside or eqn.primitive.name == "scan").items():
                found[where] = max(found[where], size)
    return found


def test_weights_are_quantised_outside_the_loop_over_micro_batches():
    run = tiny_run("matmul-free", Path("none"), optim=OptimConfig(accumulate=2, warmup_steps=2))
    program = make_program(program_key(run, None))
    tokens = jax.ShapeDtypeStruct((4, 2), np.int32)  # windows so short that no activation is as large as a matrix
    with jax.set_mesh(program.mesh):
        traced = program.train_step.trace(program.abstract_state, tokens, jax.ShapeDtypeStruct((), np.float32))
    rounded = largest_roundings(traced.jaxpr.jaxpr)
    assert rounded[False] >= run.model.depth * run.model.width**2
    assert rounded[True] < run.model.width**2
