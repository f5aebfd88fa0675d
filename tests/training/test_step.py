"""What a compiled step computes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfree_jax.config import ConfigError, OptimConfig
from mmfree_jax.training.step import make_program, program_key
from tests.conftest import tiny_run


@pytest.mark.parametrize("accumulate", [1, 2])
def test_z_loss_is_trained_on_and_reported_apart_from_the_loss(accumulate):
    """z * logsumexp^2 per target (PaLM, Chowdhery et al. 2022, section 5)."""
    plain = tiny_run("matmul-free", Path("none"), optim=OptimConfig(warmup_steps=2))
    run = dataclasses.replace(plain, optim=dataclasses.replace(plain.optim, z_loss=0.1, accumulate=accumulate))
    tokens_BT = np.random.default_rng(0).integers(0, 257, (4, 33)).astype(np.int32)
    programs = [make_program(program_key(config, None)) for config in (plain, run)]
    logits_BTV = None
    trained, held_out = [], []
    for program in programs:
        with jax.set_mesh(program.mesh):
            state = program.init(jax.random.key(0))
            logits_BTV = nnx.merge(program.graphdef, state.params)(jnp.asarray(tokens_BT[:, :-1]))
            held_out.append(program.nats(state.params, program.place(tokens_BT)).sum())
            trained.append(program.train_step(state, program.place(tokens_BT), np.float32(1e-3))[1])
    squares = np.mean(np.square(jax.nn.logsumexp(logits_BTV, axis=-1)))
    np.testing.assert_allclose(trained[1]["z_loss"], 0.1 * squares, rtol=1e-5)
    np.testing.assert_allclose(trained[1]["loss"], trained[0]["loss"], rtol=1e-5)
    assert "z_loss" not in trained[0]
    assert abs(trained[1]["grad_norm"] / trained[0]["grad_norm"] - 1) > 1e-4
    assert held_out[0] == held_out[1]


def test_a_negative_z_loss_is_refused():
    with pytest.raises(ConfigError, match=r"z_loss=-1: must not be negative"):
        OptimConfig(z_loss=-1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["transformer++", "matmul-free"])
def test_unrolled_layers_take_the_same_step_as_a_loop(family, precision):
    """Their gradients are stacked before the optimizer, in the type that they were computed in."""
    tokens_BT = np.random.default_rng(0).integers(0, 257, (4, 33)).astype(np.int32)
    looped = dataclasses.replace(tiny_run(family, Path("none")), precision=precision, unroll=1)
    steps = []
    for run in (looped, dataclasses.replace(looped, unroll=looped.model.depth)):
        program = make_program(program_key(run, None))
        with jax.set_mesh(program.mesh):
            state, metrics = program.train_step(
                program.init(jax.random.key(0)), program.place(tokens_BT), np.float32(1e-3)
            )
        steps.append(jax.tree.leaves((state.opt, metrics)))
    for a, b in zip(*steps, strict=True):
        if precision == "float32":
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(float(jnp.abs(b).max()), 1e-12))
        else:  # the two programs round at other places, and a rounded activation can change its code: in the norm
            assert np.linalg.norm(np.subtract(a, b)) <= 0.1 * np.linalg.norm(b)
