"""Facts about the quantisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmfree_jax.ops.bit_linear import Recipe, quantise_kernel
from mmfree_jax.ops.fast import ternary as fast
from mmfree_jax.ops.fast.ternary import pack, unpack
from mmfree_jax.ops.ternary import (
    best_scale,
    dequantise,
    quantise_activations,
    quantise_weights,
    straight_through,
    weight_scale,
)
from scaling.laws.formats import gaussian_error

VALUES = st.floats(-1e4, 1e4, width=32)
MATRICES = arrays(np.float32, (5, 7), elements=VALUES)
GAUSSIAN = jax.random.normal(jax.random.key(0), (256, 256))


@settings(max_examples=50, deadline=None)
@given(MATRICES)
def test_weight_codes_are_ternary_and_follow_the_published_formula(w):
    codes, scale = quantise_weights(jnp.asarray(w), (-2, -1))
    assert codes.dtype == jnp.int8
    assert set(np.unique(codes)) <= {-1, 0, 1}
    mean = max(np.abs(w).mean(dtype=np.float64), 1e-5)
    np.testing.assert_allclose(scale, [[mean]], rtol=35 * 2**-23)  # a float32 sum of 35 terms, in any order
    np.testing.assert_allclose(fast.weight_scale(jnp.asarray(w), (-2, -1)), [[mean]], rtol=35 * 2**-23)
    clear = np.abs(np.abs(w / mean) - 0.5) > 1e-5  # not within rounding of the threshold
    np.testing.assert_array_equal(np.asarray(codes)[clear], np.clip(np.round(w / mean), -1, 1)[clear])


def least_squares(w):
    """The scale and error of the best ternary matrix: of the k largest magnitudes, k the best, the mean."""
    magnitude = np.sort(np.abs(np.asarray(w, np.float64)).ravel())[::-1]
    sums, counts = np.cumsum(magnitude), np.arange(1, magnitude.size + 1)
    best = int(np.argmax(sums**2 / counts))
    return sums[best] / counts[best], float((magnitude**2).sum() - sums[best] ** 2 / counts[best])


@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform", "logistic"])
@pytest.mark.parametrize("unit", [0.02, 30.0])
def test_the_best_scale_is_that_of_least_squares(draw, unit):
    draws = {"uniform": lambda rng: rng.uniform(-1, 1, (384, 352))}
    w = jnp.asarray(unit * draws.get(draw, lambda rng: getattr(rng, draw)(size=(384, 352)))(np.random.default_rng(0)))
    scale, error = least_squares(w)
    codes, found = quantise_weights(w, (-2, -1), best=True)
    np.testing.assert_allclose(found, [[scale]], rtol=0.03)
    own = np.square(np.asarray(codes, np.float64) * float(found.item()) - w).sum()
    assert own <= 1.001 * error
    assert own < 0.9 * np.square(dequantise(quantise_weights(w, (-2, -1)), jnp.float32) - w).sum()
    mean = fast.weight_scale(w, (-2, -1))
    np.testing.assert_allclose(fast.best_scale(w, (-2, -1), mean), found, rtol=1e-4)


def test_the_best_scale_has_the_errors_on_normal_weights_that_forecasts_are_made_of():
    """0.190 of the variance, beside 0.264 by the mean magnitude."""
    errors = []
    for best in (False, True):
        made = dequantise(quantise_weights(GAUSSIAN, (-2, -1), best), jnp.float32)
        errors.append(float(jnp.mean((made - GAUSSIAN) ** 2)))
    assert errors == pytest.approx([0.2636, 0.1902], abs=0.003)
    assert errors == pytest.approx([gaussian_error("ternary-absmean"), gaussian_error("ternary")], abs=0.003)


def test_the_best_scale_of_zeros_and_of_padded_weights_is_finite_and_that_without_padding():
    zeros = jnp.zeros((1, 4, 6))
    assert best_scale(zeros, (-2, -1), weight_scale(zeros, (-2, -1))).item() == np.float32(1e-5)
    w = jax.random.normal(jax.random.key(0), (1, 64, 40))
    padded = jnp.pad(w, ((0, 0), (0, 0), (0, 8)), constant_values=3.0)
    for form in (quantise_kernel, quantise_kernel.definition):
        (alone,), (found,) = form(Recipe(best_scale=True), w), form(Recipe(best_scale=True, columns=40), padded)
        np.testing.assert_allclose(found.scale, alone.scale, rtol=1e-6)
        np.testing.assert_array_equal(found.codes[:, :40], alone.codes)
        assert not found.codes[:, 40:].any()


@settings(max_examples=50, deadline=None)
@given(MATRICES, st.sampled_from([4, 8]))
def test_activation_codes_use_the_whole_range_of_each_token(x, bits):
    codes, scale = quantise_activations(jnp.asarray(x), bits)
    top = 2 ** (bits - 1) - 1
    largest = np.abs(x).max(-1, keepdims=True)
    np.testing.assert_array_equal(np.abs(np.asarray(codes)).max(-1)[largest[:, 0] > 1e-5], top)
    assert (np.abs(np.asarray(codes) * np.asarray(scale) - x) <= 0.5001 * np.asarray(scale)).all()


def test_rounding_is_half_to_even():
    x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    np.testing.assert_array_equal(quantise_activations(x, 8).codes, [[127, 0, 2, 2, 0, -2]])
    w = jnp.array([[1.0, 1.5, 1.0, 0.5]])  # mean 1: 0.5 is a tie
    np.testing.assert_array_equal(quantise_weights(w, (-2, -1)).codes, [[1, 1, 1, 0]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_are_quantised_in_float32(dtype):
    x = GAUSSIAN.astype(dtype)
    for low, full in (
        (quantise_activations(x, 8), quantise_activations(x.astype(jnp.float32), 8)),
        (quantise_weights(x, (-2, -1)), quantise_weights(x.astype(jnp.float32), (-2, -1))),
    ):
        np.testing.assert_array_equal(low.codes, full.codes)
        np.testing.assert_array_equal(low.scale, full.scale)
        assert low.scale.dtype == jnp.float32


def test_float64_stays_float64():
    with jax.enable_x64(True):
        w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)))
        assert quantise_weights(w, (-2, -1)).scale.dtype == jnp.float64
        assert quantise_activations(w, 8).scale.dtype == jnp.float64


def test_quantising_twice_shrinks_the_scale_by_the_share_of_non_zeros():
    once = quantise_weights(GAUSSIAN, (-2, -1))
    twice = quantise_weights(dequantise(once, jnp.float32), (-2, -1))
    share = float(jnp.mean(once.codes != 0))
    assert 0.65 < share < 0.73
    np.testing.assert_allclose(twice.scale / once.scale, [[share]], rtol=1e-5)


def test_scales_cover_the_axes_they_are_asked_to():
    w = GAUSSIAN * jnp.linspace(1, 3, 256)
    per_channel = quantise_weights(w, (-2,))
    assert per_channel.scale.shape == (1, 256)
    np.testing.assert_allclose(per_channel.scale[0], np.abs(np.asarray(w)).mean(0), rtol=1e-5)
    assert (per_channel.codes != quantise_weights(w, (-2, -1)).codes).any()


def test_no_bits_leaves_activations_alone():
    q = quantise_activations(GAUSSIAN, 0)
    assert q.codes is GAUSSIAN
    assert q.scale is None


def test_straight_through_has_the_quantised_value_and_the_identity_gradient():
    quantised = lambda w: straight_through(w, quantise_weights(w, (-2, -1)))
    np.testing.assert_allclose(
        quantised(GAUSSIAN), dequantise(quantise_weights(GAUSSIAN, (-2, -1)), jnp.float32), atol=1e-6
    )
    np.testing.assert_array_equal(jax.grad(lambda w: quantised(w).sum())(GAUSSIAN), 1)


@pytest.mark.parametrize("shape", [(4, 3), (2, 8, 5)])
def test_packed_codes_are_a_quarter_of_a_byte_each_and_come_back(shape):
    codes = jax.random.randint(jax.random.key(0), shape, -1, 2, jnp.int8)
    packed = pack(codes)
    assert (packed.dtype, packed.size * 4) == (jnp.uint8, codes.size)
    np.testing.assert_array_equal(unpack(packed), codes)
    assert unpack(packed).dtype == jnp.int8
