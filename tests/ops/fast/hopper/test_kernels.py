"""The GPU kernels, interpreted on a CPU, against float64. Interpretation needs jax 0.11 or later."""

import collections
import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from mmfree_jax.config import ModelConfig
from mmfree_jax.models.language_model import Block
from mmfree_jax.models.layers import Context
from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear, rms_norm
from mmfree_jax.ops.fast.combine import combine
from mmfree_jax.ops.fast.hopper import normed_codes, transposed_codes
from mmfree_jax.ops.fast.hopper import recurrence as kernel
from mmfree_jax.ops.fast.hopper.int8_matmul import int8_matmul, supports
from mmfree_jax.ops.fast.recurrence import gated_recurrence, recurrence
from mmfree_jax.ops.fast.ternary import column_codes
from mmfree_jax.ops.fast.verification import kernels_assumed
from mmfree_jax.ops.glu import glu, swiglu
from mmfree_jax.ops.ternary import Quantised

KERNELS = {f"{kind}_codes{way}" for kind in ("norm", "gated", "swiglu") for way in ("", "_backward")}
KERNELS |= {"recurrence", "recurrence_backward", "int8_product", "transpose_codes", "row_codes"}

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="this jax cannot interpret Mosaic GPU kernels"
)


@contextlib.contextmanager
def pretended_gpu(interpret: bool = True):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=4)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    run = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()) if interpret else contextlib.nullcontext()
    with jax.sharding.use_abstract_mesh(mesh), run, kernels_assumed():
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
        out, last = jax.jit(lambda *a: gated_recurrence(*a, resets_BT=resets, form="kernel"))(*arrays)
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

    def loss(form):
        def value(*a):
            out, last = gated_recurrence(*a, resets_BT=resets, form=form)
            return jnp.sum(out * weigh) + jnp.sum(jnp.sin(last))

        return jax.jit(jax.grad(value, (0, 1, 2, 3)))

    expected = loss("walk")(*arrays)
    with pretended_gpu():
        found = loss("kernel")(*arrays)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@interpreted
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [
        (256, 128, 128),  # one block
        (512, 384, 256),  # two blocks that share rows
        (1024, 512, 512),  # copies run ahead from output to output, two and two of them a pair of blocks
        (768, 1024, 384),  # the same, alone: two outputs for one block and three for another
    ],
)
def test_int8_matmul_is_exact_before_rounding(rows, inner, columns):
    rng = np.random.default_rng(0)
    x, w = rng.integers(-128, 128, (rows, inner)), rng.integers(-1, 2, (columns, inner))
    scale, w_scale = rng.uniform(0.5, 2, rows).astype(np.float32), np.float32([0.03])
    with pretended_gpu():
        y = jax.jit(int8_matmul)(jnp.int8(x), jnp.int8(w), jnp.asarray(scale), jnp.asarray(w_scale))
    exact = (x @ w.T).astype(np.float32) * (scale * w_scale)[:, None]
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(jnp.bfloat16(exact), np.float32))


def test_shapes_that_do_not_fill_whole_blocks_are_left_to_the_reference():
    assert normed_codes.supports(5632, 1, jnp.bfloat16)
    assert not normed_codes.supports(5600, 1, jnp.bfloat16)
    assert not normed_codes.supports(2048, 1, jnp.float16)
    assert not normed_codes.supports(13824, 1, jnp.bfloat16)  # its gain alone would fill the registers
    assert supports(16384, 2048, 11264)
    assert not supports(16384, 2048, 32000 + 1)
    assert not supports(8, 2048, 2048)


@interpreted
@pytest.mark.parametrize(("time", "width", "blocks"), [(64, 128, 4), (128, 128, 8), (50, 200, 1), (1, 128, 128)])
def test_gated_recurrence_in_segments_and_at_any_size(monkeypatch, time, width, blocks):
    """Few sequences are cut in time; what does not fill whole tiles is filled up."""
    monkeypatch.setattr(kernel, "BLOCKS", blocks)
    arrays, resets = inputs(time, width, jnp.float32)
    weigh = jax.random.normal(jax.random.key(1), arrays[0].shape)

    def gradients(form):
        def value(*a):
            out, last = gated_recurrence(*a, resets_BT=resets, form=form)
            return jnp.sum(out * weigh) + jnp.sum(jnp.sin(last)), (out, last)

        return jax.jit(jax.grad(value, (0, 1, 2, 3), has_aux=True))(*arrays)

    expected = gradients("walk")
    with pretended_gpu():
        found = gradients("kernel")
    assert kernel.segments(2, time + -time % 32, 128) == {64: 2, 128: 4, 50: 1, 1: 1}[time]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@interpreted
@pytest.mark.parametrize(("time", "width", "blocks"), [(64, 128, 1), (128, 128, 8), (50, 200, 1)])
def test_recurrence_without_gates(monkeypatch, time, width, blocks):
    """States equal those of float64, gradients those of the walk, whole and in segments, at any size."""
    monkeypatch.setattr(kernel, "BLOCKS", blocks)
    (x, f, _, h), resets = inputs(time, width, jnp.float32)
    f, weigh = jax.nn.sigmoid(f), jax.random.normal(jax.random.key(1), x.shape)

    def gradients(form):
        def value(f, x, h):
            out = recurrence(f, x, h, resets_BT=resets, form=form)
            return jnp.sum(out * weigh), out

        return jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))(f, x, h)

    expected = gradients("walk")
    with pretended_gpu():
        found = gradients("kernel")
        half = recurrence(f.astype(jnp.bfloat16), x.astype(jnp.bfloat16), dtype=jnp.bfloat16, form="kernel")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    state, exact = np.asarray(h, np.float64), np.empty(x.shape)
    for t in range(time):
        state = np.where(np.asarray(resets)[:, t, None], 0, f[:, t] * state) + x[:, t]
        exact[:, t] = state
    np.testing.assert_allclose(found[1], exact, atol=2e-6, rtol=2e-6)
    assert half.dtype == jnp.bfloat16


@interpreted
def test_int8_matmul_with_a_scale_a_column():
    rng = np.random.default_rng(0)
    x, w = rng.integers(-128, 128, (256, 256)), rng.integers(-127, 128, (128, 256))
    scale, w_scale = rng.uniform(0.5, 2, 256).astype(np.float32), rng.uniform(0.5, 2, 128).astype(np.float32)
    with pretended_gpu():
        y = jax.jit(int8_matmul)(jnp.int8(x), jnp.int8(w), jnp.asarray(scale), jnp.asarray(w_scale))
    exact = (x @ w.T).astype(np.float32) * (scale[:, None] * w_scale)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(jnp.bfloat16(exact), np.float32))


@interpreted
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (640, 128)])
def test_transposed_codes(monkeypatch, rows, columns):
    """As they are, and brought to a scale a column: bit for bit the reference's."""
    monkeypatch.setattr(transposed_codes, "RESIDENT", {"plain": 2, "scaled": 2})  # several tiles a block
    rng = np.random.default_rng(0)
    codes, by = jnp.int8(rng.integers(-127, 128, (rows, columns))), jnp.asarray(rng.uniform(0.1, 2, rows), jnp.float32)
    wanted = column_codes(Quantised(codes, by[:, None]), jnp.ones((rows, 1)))
    with pretended_gpu():
        turned = jax.jit(transposed_codes.transpose)(codes)
        scaled = jax.jit(transposed_codes.transpose)(codes, by, wanted.scale[0])
    np.testing.assert_array_equal(turned, codes.T)
    np.testing.assert_array_equal(scaled, wanted.codes.T)


@interpreted
def test_integer_gradients_equal_those_of_the_reference(monkeypatch):
    """All kernels of a layer whose products are of integers both ways."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    x, w, dys = draw(1, 256, 256), draw(2, 256, 128).astype(jnp.float32), (draw(1, 256, 128), draw(1, 256, 128))
    gains = jnp.asarray(rng.uniform(0.5, 2, 256), jnp.float32)
    normed = lambda x: rms_norm(x, jnp.ones(256), 1e-6)
    layer = lambda x, w, gain: bit_linear(Recipe(gradient_bits=8), normed(x), Weights(w, gain))
    pull = jax.jit(lambda dys: jax.vjp(layer, x, w, gains)[1](dys))
    expected = pull(dys)
    jax.clear_caches()
    with pretended_gpu():
        text = pull.lower(dys).as_text(debug_info=True)
        found = pull(dys)
    assert all(name in text for name in ("transpose_codes", "row_codes", "int8_product", "norm_codes_backward"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=1e-2 * float(jnp.abs(b).max()))


@interpreted
def test_gradients_to_a_gated_unit_s_sources_as_codes(monkeypatch):
    """Bit for bit those of `codes`, which reads the gradients that the kernel would have written."""
    monkeypatch.setattr(normed_codes, "BLOCKS", {"forward": 2, "backward": 2})
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.normal(size=(6, 384)), jnp.bfloat16)
    sources, gains, dys = [draw(), draw()], [jnp.asarray(rng.uniform(0.5, 2, 384), jnp.float32)], [draw()]
    by = jnp.linspace(0.5, 2, 6)
    with pretended_gpu():
        _, scales = jax.jit(lambda: normed_codes.forward("swiglu", sources, None, gains, 1e-6))()
        back = lambda by: normed_codes.backward("swiglu", sources, None, gains, scales, dys, None, 1e-6, True, by)
        values, as_codes = jax.jit(lambda: back(None))(), jax.jit(lambda: back(by))()
        expected = [jax.jit(normed_codes.codes)(d, by) for d in values.sources]
    for a, b in zip(jax.tree.leaves(as_codes), jax.tree.leaves(values._replace(sources=expected)), strict=True):
        np.testing.assert_array_equal(a, b)


@interpreted
@pytest.mark.parametrize(("scale_axes", "separate"), [((-3, -2, -1), 1), ((-3, -2), 3)])
def test_gradients_between_the_products_of_a_gated_unit(monkeypatch, scale_axes, separate):
    """Bit for bit those of two layers; where all columns share a weight scale, a kernel of its own makes codes of the
    gradient to the output only."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    x, dy, gains = draw(1, 8, 128), draw(1, 8, 128), jnp.asarray(rng.uniform(0.5, 2, (2, 128)), jnp.float32)
    weights = draw(2, 128, 128).astype(jnp.float32), draw(1, 128, 128).astype(jnp.float32)
    into, out = (Recipe(scale_axes=axes, gradient_bits=8) for axes in (scale_axes, scale_axes[1:]))
    normed = lambda x: rms_norm(x, jnp.ones(128), 1e-6)

    def one_op(x, gate_up, down, gains):
        return glu(into, Weights(gate_up, gains[0]), out, Weights(down, gains[1]), normed(x))

    def two_ops(x, gate_up, down, gains):
        gate, up = bit_linear(into, normed(x), Weights(gate_up, gains[0]))
        return bit_linear(out, swiglu(gate, up), Weights(down, gains[1]))[0]

    made, codes = [], normed_codes.codes
    monkeypatch.setattr(normed_codes, "codes", lambda *a: made.append(a) or codes(*a))
    gradients = []
    with pretended_gpu():
        for form in (one_op, two_ops):
            gradients += [jax.jit(lambda dy, form=form: jax.vjp(form, x, *weights, gains)[1](dy))(dy)]
            made += ["|"]
    assert made.index("|") == separate
    assert len(made) == separate + 3 + 2
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


@interpreted
@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_codes_of_gradients(monkeypatch, unit):
    monkeypatch.setattr(normed_codes, "BLOCKS", {"forward": 2, "backward": 2})
    x, by = unit * np.random.default_rng(0).normal(size=(6, 384)), np.linspace(0.5, 2, 6)
    x[3] = 0
    with pretended_gpu():
        codes, scales, _ = jax.jit(normed_codes.codes)(jnp.asarray(x, jnp.float32))
        *again, largest = jax.jit(normed_codes.codes)(jnp.asarray(x, jnp.float32), jnp.asarray(by, jnp.float32))
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_allclose(largest, np.abs(codes * (np.asarray(scales) * by)[:, None]).max(0), rtol=1e-6)
    exact = np.abs(x).max(axis=-1) / 127
    np.testing.assert_allclose(scales, exact, rtol=1e-6, atol=1e-30)
    np.testing.assert_array_equal(codes, np.round(x / np.where(exact == 0, 1, exact)[:, None]))


@interpreted
@pytest.mark.parametrize(
    ("kind", "gains", "products", "width"),
    [("norm", 3, 3, 256), ("norm", 1, 2, 384), ("gated", 1, 1, 256), ("swiglu", 1, 1, 512)],
)
def test_normed_codes_and_their_gradients(monkeypatch, kind, gains, products, width):
    """Codes equal those of float64; gradients straight through; inputs made again equal codes times scale; a gradient
    that comes to the first source besides is added to it."""
    monkeypatch.setattr(normed_codes, "BLOCKS", {"forward": 2, "backward": 2})
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape)
    sources = [draw(6, width) for _ in range(1 if kind == "norm" else 2)]
    inner = None if kind == "swiglu" else rng.uniform(0.5, 2, width)
    outer = [rng.uniform(0.5, 2, width) for _ in range(gains)]
    dys = [draw(6, width) for _ in range(products)]
    factors = jnp.linspace(0.5, 2, products)
    single = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
    operands, beside = single((sources, inner, outer)), single(draw(6, width))
    with pretended_gpu():
        codes, scales = jax.jit(lambda: normed_codes.forward(kind, *operands, 1e-6))()
        backward = jax.jit(
            lambda *how: normed_codes.backward(kind, *operands, scales, single(dys), factors, 1e-6, *how),
            static_argnums=0,
        )
        back, as_codes = backward(), backward(True, None, beside)

    norm = lambda a, gain: a / np.sqrt(np.mean(a * a, axis=-1, keepdims=True) + 1e-6) * gain
    silu = lambda a: a / (1 + np.exp(-a))
    made = {"norm": lambda: norm(sources[0], inner), "gated": lambda: norm(sources[0], inner) * silu(sources[1])}
    x = made.get(kind, lambda: silu(sources[0]) * sources[1])()
    for gain, q, scale, again in zip(outer, codes, scales, back[3], strict=True):
        wanted = norm(x, gain)
        exact = np.abs(wanted).max(axis=-1) / 127
        np.testing.assert_allclose(scale, exact, rtol=1e-6)
        np.testing.assert_array_equal(q, np.round(wanted / exact[:, None]))
        np.testing.assert_allclose(again, q * scale[:, None], rtol=1e-6)
    first, *others = jax.tree.leaves(as_codes)
    np.testing.assert_allclose(first, back.sources[0] + beside, atol=1e-6, rtol=1e-6)
    for a, b in zip(others, jax.tree.leaves((back.sources[1:], *back[1:3], codes)), strict=True):
        np.testing.assert_array_equal(a, b)

    def through(sources, inner, outer):
        x = combine(kind, tuple(sources), inner, 1e-6)
        x_hat = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        terms = zip(outer * (products // gains), single(dys), factors, strict=True)
        return sum(jnp.sum(x_hat * g * dy * factor) for g, dy, factor in terms)

    expected = jax.grad(through, (0, 1, 2))(*operands)
    for a, b in zip(jax.tree.leaves(back[:3]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@interpreted
@pytest.mark.parametrize("gradient_bits", [0, 8])
def test_a_block_lowers_to_its_kernels_and_to_nothing_beside_them(gradient_bits):
    """At the widths of 1.3b: layouts and registers are checked here, which an interpreter does without.

    Norms, gates and both gradients to the residual stream are parts of the kernels: if one stood alone, its pass over
    the activations would be here as an operation of XLA.
    """
    config = ModelConfig(width=2048, depth=1, glu_width=5632, gradient_bits=gradient_bits)
    build = lambda: Block(config, jnp.zeros(()), rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    graph, params = nnx.split(nnx.eval_shape(build))

    def loss(params, x, floor):
        y, _ = nnx.merge(graph, params)(x, Context(), floor, None)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    x, floor = jax.ShapeDtypeStruct((2, 1024, 2048), jnp.bfloat16), jax.ShapeDtypeStruct((2048,), jnp.float32)
    jax.clear_caches()
    with pretended_gpu(interpret=False):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(params, x, floor)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = ["norm_codes", "gated_codes", "swiglu_codes", "recurrence"]
    calls = collections.Counter(name.removeprefix("00") for name in re.findall(r"(\w+)_mosaic_gpu\b", text))
    expected = {"norm_codes", "gated_codes", "swiglu_codes", "recurrence", "int8_product", "transpose_codes"}
    expected |= {f"{name}_backward" for name in kernels}
    assert expected | ({"row_codes"} if gradient_bits else set()) == set(calls) & KERNELS
    whole = "tensor<2x1024x2048xbf16>"
    passes = [line for line in text.splitlines() if "stablehlo." in line and line.rstrip().endswith(whole)]
    passes = collections.Counter(re.search(r"stablehlo\.(\w+)", line)[1] for line in passes)
    assert passes["multiply"] == 0, "a norm or a gate stands alone"
    # The two residual sums forward; backward none, as kernels add both gradients.
    assert passes["add"] == 2
