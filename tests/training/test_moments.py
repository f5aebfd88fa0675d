"""Moments in fewer bits: what is stored is right on average, an optimizer hardly notices, and meshes agree."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.config import ModelConfig, OptimConfig
from mmfree_jax.lowering.program import REMATERIALISED
from mmfree_jax.training.moments import BLOCK, from_codes, random_bits, to_bfloat16, to_codes
from mmfree_jax.training.optim import make_optimizer
from tests.simulated import run_once
from tests.training.test_optim import parameters_and_gradients, trained, tree_of


def noise(shape, step=0):
    return random_bits(jnp.int32(step), 7, shape)


def spread(rng, *shape):
    """Values over six powers of ten, of both signs."""
    return jnp.float32(rng.standard_normal(shape) * 10.0 ** rng.uniform(-5, 1, shape))


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 200), (1,), (2, 63), (65,)])
@pytest.mark.parametrize("positive", [False, True])
def test_codes_are_within_a_step_and_zero_stays_zero(shape, positive):
    x = spread(np.random.default_rng(0), *shape)
    x = (jnp.abs(x) if positive else x).at[..., 0].set(0)
    codes, scales = to_codes(x, noise(shape), positive)
    assert codes.dtype == (jnp.uint8 if positive else jnp.int8)
    assert codes.shape == shape
    assert scales.shape == (*shape[:-1], -(-shape[-1] // BLOCK))
    back, blocks = from_codes(codes, scales), np.repeat(np.asarray(scales), BLOCK, -1)[..., : shape[-1]]
    kept = np.abs(x) > blocks * 2.0 ** (-31.5 if positive else -15.5)
    assert (np.abs(back - x) <= (2 ** (1 / 8) - 1) * np.abs(x) * 1.001)[kept].all()
    assert (np.sign(back) == np.sign(x))[kept].all()
    assert (np.asarray(back) == 0)[np.asarray(x) == 0].all()


def test_the_largest_of_each_block_is_exact_and_blocks_do_not_share_a_scale():
    x = spread(np.random.default_rng(1), 4, 256).at[:, 64:128].mul(1e6)
    codes, scales = to_codes(x, noise(x.shape), False)
    largest = np.abs(x).reshape(4, 4, 64).max(-1)
    np.testing.assert_array_equal(scales, largest)
    np.testing.assert_array_equal(np.abs(from_codes(codes, scales)).reshape(4, 4, 64).max(-1), largest)


@pytest.mark.parametrize("positive", [False, True])
def test_a_second_moment_never_becomes_zero_and_a_zero_block_is_no_error(positive):
    x = jnp.zeros((2, 64)).at[0, 0].set(1.0).at[0, 1].set(1e-12)
    codes, scales = to_codes(x, noise(x.shape), positive)
    assert (codes[0, 1] > 0) == positive
    back = from_codes(codes, scales)
    assert np.isfinite(back).all()
    assert (back[1] == 0).all()


def means(store, x, draws=2000):
    return np.mean([np.asarray(store(jnp.full(64, x), noise((64,), step)), np.float64) for step in range(draws)])


@pytest.mark.parametrize("x", [0.4, 0.93, -0.0707, 3.1e-5])
def test_rounding_keeps_the_mean(x):
    """The distance of two codes is 9 % in 8 bits and 0.8 % in bfloat16: nearest would be off by up to half of it."""

    def in_codes(a, bits):
        return from_codes(*to_codes(a.at[0].set(1.0), bits, False))[1:]

    assert means(in_codes, x, 400) == pytest.approx(x, rel=2e-3)
    assert means(to_bfloat16, x, 400) == pytest.approx(x, rel=2e-4)


def test_bfloat16_keeps_what_it_can_hold_and_what_is_not_finite():
    x = jnp.float32([1.0, -2.5, 0.0, jnp.inf, -jnp.inf, jnp.nan])
    for step in range(20):
        found = to_bfloat16(x, noise(x.shape, step)).astype(jnp.float32)
        np.testing.assert_array_equal(found, x)


def test_random_bits_are_even_and_do_not_repeat_along_any_axis_step_or_leaf():
    a = np.asarray(noise((64, 64))) / 2.0**32
    assert np.histogram(a, 16, (0, 1))[0].std() < 40  # 256 in each, +- 16
    others = (np.asarray(noise((64, 64), 1)), np.asarray(random_bits(jnp.int32(0), 8, (64, 64))))
    for b in (np.roll(a, 1, 0), np.roll(a, 1, 1), a.T, *(other / 2.0**32 for other in others)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.06


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_moving_average_follows_where_nearest_would_stay(moments, beta2):
    """Gradients that become ten times smaller: the second moment has to fall to a hundredth."""
    optimizer = make_optimizer(OptimConfig(clip=0, weight_decay=0, beta2=beta2, moments=moments), ModelConfig())
    params = tree_of({"blocks/kernel": np.zeros((8, 64))})
    step, state = jax.jit(lambda g, state: optimizer.update(g, state, params)), optimizer.init(params)
    rng, late = np.random.default_rng(0), []
    for t in range(round(8 / (1 - beta2))):
        size = 1.0 if t < 1 / (1 - beta2) else 0.1
        updates, state = step(tree_of({"blocks/kernel": size * rng.choice([-1, 1], (8, 64))}), state)
        late.append(float(jnp.sqrt(jnp.mean(jax.tree.leaves(updates)[0] ** 2))))
    # The root mean square of m / sqrt(v) of random signs with beta1 = 0.9 is sqrt(0.1 / 1.9).
    assert np.mean(late[-20:]) == pytest.approx(np.sqrt(0.1 / 1.9), rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("moments", "apart"), [("bfloat16", 0.02), ("int8", 0.15)])
def test_updates_are_those_of_float32_but_for_rounding_and_vectors_are_not_rounded(optimizer, moments, apart):
    p, gradients = parameters_and_gradients(steps=20)
    config = OptimConfig(optimizer=optimizer, moments=moments)
    exact = trained(dataclasses.replace(config, moments="float32"), ModelConfig(), p, gradients, 0.01)
    found = trained(config, ModelConfig(), p, gradients, 0.01)
    for name, a in exact.items():
        moved = np.abs(a - np.float32(p[name])).mean()
        if name in ("embedding", "head/kernel", "blocks/kernel"):
            assert 0 < np.abs(found[name] - a).mean() < apart * moved, name
        else:
            np.testing.assert_array_equal(found[name], a)


@pytest.fixture(scope="module")
def on_meshes(tmp_path_factory) -> list:
    """What the program found."""
    said, beside = run_once(tmp_path_factory, "moments", "tests/moments_program.py")
    assert REMATERIALISED not in beside
    return json.loads(said.splitlines()[-1])


def test_moments_are_sharded_as_parameters_are(on_meshes):
    """Bytes of the moments over those of the parameters, of one device and of one of eight."""
    for name, (share, of_a_device, apart) in on_meshes[0].items():
        wanted = {"bfloat16": 1, "int8": 2 * (1 + 4 / BLOCK) / 4}[name.split()[1]]
        assert share == pytest.approx(wanted, rel=0.02), name
        assert of_a_device == pytest.approx(wanted, rel=0.1), name  # vectors are whole on each
        # On average. Other random bits would be 2e-6 and 5e-5 apart.
        assert apart < {"bfloat16": 1e-6, "int8": 1e-5}[name.split()[1]], name


def test_a_run_goes_on_on_another_mesh(on_meshes):
    _, (whole, other), said = on_meshes
    assert "resume matmul-free-tiny at step 5" in said
    assert len(whole) == len(other) == 12
    assert other[:5] == whole[:5]
    np.testing.assert_allclose(other[:9], whole[:9], atol=5e-5)
    np.testing.assert_allclose(other, whole, atol=2e-3)  # by then a ternary code may have fallen to the other side
