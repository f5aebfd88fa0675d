"""The GPU kernels, interpreted on a CPU, against float64. Interpretation needs jax 0.11 or later."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmfree_jax.ops import gated_recurrence as op
from mmfree_jax.ops.kernels import gated_recurrence as kernel
from mmfree_jax.ops.kernels.int8_matmul import int8_matmul, supports

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="this jax cannot interpret Mosaic GPU kernels"
)


@contextlib.contextmanager
def pretended_gpu():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=4)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def inputs(time: int, width: int, dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    c, f, h = draw(2, time, width), draw(2, time, width), draw(2, width)
    floor, resets = rng.uniform(0, 0.9, width), rng.uniform(size=(2, time)) < 0.1
    arrays = [jnp.asarray(a, dtype) for a in (c, f)] + [jnp.asarray(a, jnp.float32) for a in (floor, h)]
    return arrays, jnp.asarray(resets)


def states64(c, f, floor, h, resets):
    """The recurrence one step after the other, in float64."""
    c, f, floor, h = (np.asarray(a, np.float64) for a in (c, f, floor, h))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    factor = floor + (1 - floor) * sigmoid(f)
    out = np.empty_like(c)
    for t in range(c.shape[1]):
        h = np.where(np.asarray(resets)[:, t, None], 0, factor[:, t] * h) + (1 - factor[:, t]) * c[:, t] * sigmoid(
            c[:, t]
        )
        out[:, t] = h
    return out


@interpreted
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 4e-3)])
@pytest.mark.parametrize(("time", "width"), [(32, 128), (96, 256)])
def test_gated_recurrence_forward(time, width, dtype, tolerance):
    arrays, resets = inputs(time, width, dtype)
    with pretended_gpu():
        out, last = jax.jit(lambda *a: op.gated_recurrence(*a, resets_BT=resets, impl="kernel"))(*arrays)
    expected = states64(*arrays, resets)
    assert out.dtype == dtype
    assert last.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance * 3, rtol=tolerance)
    np.testing.assert_allclose(last, expected[:, -1], atol=3e-6)


@interpreted
@pytest.mark.parametrize("time", [32, 64])
def test_gated_recurrence_gradients_equal_those_of_the_reference(time):
    arrays, resets = inputs(time, 128, jnp.float32)
    weigh = jax.random.normal(jax.random.key(1), arrays[0].shape)

    def loss(impl):
        def value(*a):
            out, last = op.gated_recurrence(*a, resets_BT=resets, impl=impl)
            return jnp.sum(out * weigh) + jnp.sum(jnp.sin(last))

        return jax.jit(jax.grad(value, (0, 1, 2, 3)))

    expected = loss("reference")(*arrays)
    with pretended_gpu():
        found = loss("kernel")(*arrays)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@interpreted
@pytest.mark.parametrize(("rows", "inner", "columns"), [(256, 128, 128), (512, 384, 256)])
def test_int8_matmul_is_exact_before_rounding(rows, inner, columns):
    rng = np.random.default_rng(0)
    x, w = rng.integers(-128, 128, (rows, inner)), rng.integers(-1, 2, (columns, inner))
    scale, w_scale = rng.uniform(0.5, 2, rows).astype(np.float32), np.float32([0.03])
    with pretended_gpu():
        y = jax.jit(int8_matmul)(jnp.int8(x), jnp.int8(w), jnp.asarray(scale), jnp.asarray(w_scale))
    exact = (x @ w.T).astype(np.float32) * (scale * w_scale)[:, None]
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(jnp.bfloat16(exact), np.float32))


def test_shapes_that_do_not_fill_whole_blocks_are_left_to_the_reference():
    assert kernel.supports((1, 2048, 2048), jnp.bfloat16)
    assert not kernel.supports((1, 1000, 2048), jnp.bfloat16)
    assert not kernel.supports((1, 2048, 192), jnp.bfloat16)
    assert not kernel.supports((1, 2048, 2048), jnp.float16)
    assert supports(16384, 2048, 11264)
    assert not supports(16384, 2048, 32000 + 1)
    assert not supports(8, 2048, 2048)
