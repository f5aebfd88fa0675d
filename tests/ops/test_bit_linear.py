"""The fast BitLinear against its definition, automatic differentiation of straight-through quantisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear, linear, quantise_kernel, rms_norm
from mmfree_jax.ops.fast.bit_linear import Fusion, quantise_input
from mmfree_jax.ops.fast.choice import kernels_allowed
from mmfree_jax.ops.fast.ternary import column_codes
from mmfree_jax.ops.fast.verification import kernels_assumed
from mmfree_jax.ops.ternary import Quantised

X = jax.random.normal(jax.random.key(0), (2, 9, 16))
W = jax.random.normal(jax.random.key(1), (3, 16, 24)) * jnp.linspace(0.5, 2, 24)
GAINS = 1 + 0.3 * jax.random.normal(jax.random.key(2), (3, 16))
CASES = {
    "a gain each": (Recipe(), GAINS),
    "one gain": (Recipe(), GAINS[0]),
    "no norm": (Recipe(), None),
    "one scale": (Recipe(scale_axes=(-3, -2, -1)), GAINS[0]),
    "scale per channel": (Recipe(scale_axes=(-2,)), GAINS),
    "best scale": (Recipe(best_scale=True), GAINS),
    "4 bits": (Recipe(bits=4), GAINS),
    "no codes": (Recipe(bits=0), GAINS),
    "dense": (Recipe(ternary=False), None),
    "padding": (Recipe(columns=21), GAINS[0]),
    "padding, scale per channel": (Recipe(columns=21, scale_axes=(-2,)), GAINS),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_straight_through_ones(case):
    recipe, gain = CASES[case]
    weigh = jax.random.normal(jax.random.key(3), (3, 2, 9, 24))

    def values_and_gradients(form):
        def score(x, w, gain):
            ys = form(recipe, x, Weights(w, gain))
            return sum(jnp.sum(y * r) for y, r in zip(ys, weigh, strict=True)), ys

        gradients, ys = jax.jit(jax.grad(score, argnums=(0, 1, 2), has_aux=True))(X, W, gain)
        return ys, gradients

    (ys, gradients), (expected_ys, expected) = map(values_and_gradients, (linear, linear.definition))
    for y, expected_y in zip(ys, expected_ys, strict=True):
        np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-4)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_definition_is_the_written_out_formula():
    """In float64 and without the package: RMSNorm, absmax, absmean, product."""
    x, w, gain = (np.asarray(a, np.float64) for a in (X, W[0], GAINS[0]))
    u = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gain
    s, m = 127 / np.abs(u).max(-1, keepdims=True), np.abs(w).mean()
    expected = np.round(u * s) / s @ (np.clip(np.round(w / m), -1, 1) * m)
    found = bit_linear.definition(Recipe(), X, Weights(W[:1], GAINS[0]))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_codes_made_ahead_are_used():
    made = quantise_kernel(Recipe(), 2 * W)
    for form in (bit_linear, bit_linear.definition):
        found = form(Recipe(), X, Weights(W, GAINS, made))
        for y, expected in zip(found, bit_linear(Recipe(), X, Weights(2 * W, GAINS)), strict=True):
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


def test_gradients_are_the_analytic_ones():
    """dW = y~' dout, with no mask and no gradient through a scale; dx passes W~ and then the norm."""
    recipe, dout = Recipe(), jax.random.normal(jax.random.key(3), (2, 9, 24))
    _, pull = jax.vjp(lambda x, w: bit_linear(recipe, x, Weights(w[None], GAINS[0]))[0], X, W[0])
    dx, dw = pull(dout)
    (codes,), (kernel,) = quantise_input(Fusion(recipe), (X,), None, GAINS[0]).codes, quantise_kernel(recipe, W[:1])
    values = np.asarray(codes.codes * codes.scale)
    np.testing.assert_allclose(dw, np.einsum("btd,btf->df", values, dout), atol=1e-4)
    dy = np.asarray(dout @ (kernel.codes * kernel.scale).T * GAINS[0])
    rstd = 1 / np.sqrt(np.mean(np.square(X), -1, keepdims=True) + recipe.eps)
    x_hat = X * rstd
    np.testing.assert_allclose(dx, rstd * (dy - x_hat * (x_hat * dy).mean(-1, keepdims=True)), atol=1e-4)


@pytest.mark.parametrize("unit", [1.0, 1e-9])
@pytest.mark.parametrize("axes", [(-2, -1), (-2,)])
def test_integer_gradients_are_quantised_per_token_whatever_their_size(axes, unit):
    """With gradient_bits, dx is that of codes times scale of dy; so is dw, its codes brought to a scale a column."""
    dout = unit * jax.random.normal(jax.random.key(3), (2, 9, 24)) * jnp.linspace(0.1, 3, 9)[:, None]
    recipe = Recipe(scale_axes=axes, gradient_bits=8)
    dout = dout.at[0, 0].set(0)
    pull = lambda recipe: jax.vjp(lambda x, w: bit_linear(recipe, x, Weights(w[None]))[0], X, W[0])[1](dout)
    (dx, dw), exact = pull(recipe), pull(recipe._replace(gradient_bits=0))
    (kernel,), (x,) = quantise_kernel(recipe, W[:1]), quantise_input(Fusion(recipe), (X,), None, None).codes
    dy, scale = np.asarray(dout, np.float64), np.asarray(kernel.scale, np.float64)
    per_channel = dy if scale.size == 1 else dy * scale
    step = np.abs(per_channel).max(-1, keepdims=True) / 127
    codes = np.round(per_channel / np.where(step == 0, 1, step))
    expected = codes * step @ np.asarray(kernel.codes, np.float64).T * (scale.item() if scale.size == 1 else 1)
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5 * unit)
    assert np.abs(dx - exact[0]).max() > 1e-4 * unit

    values = (codes * step * np.asarray(x.scale, np.float64)).reshape(-1, 24)
    one_a_column = np.abs(values).max(0) / 127
    within_one = np.einsum("btd,btf->df", np.abs(x.codes).astype(np.float64), np.ones_like(dy)) * one_a_column
    product = np.einsum("rd,rf->df", np.asarray(x.codes, np.float64).reshape(-1, 16), values)
    to_values = 1 if scale.size == 1 else 1 / scale[0]
    assert np.all(np.abs(dw - product * to_values) < within_one * to_values)
    assert np.abs(dw - exact[1]).max() > 1e-4 * unit


def test_codes_of_columns_keep_what_is_small_on_average():
    """A gradient shared by all tokens, a thirtieth of a step of each column's codes, survives in the sum over tokens;
    rounded to nearest it would be lost. Whole codes stay as they are."""
    rng = np.random.default_rng(0)
    dy = np.full((4096, 8), 0.03)
    dy[rng.integers(0, 4096, 8), range(8)] = 127
    ones = jnp.ones((4096, 1))
    found = column_codes(Quantised(jnp.asarray(dy, jnp.float32), ones), ones)
    np.testing.assert_allclose(found.scale, 1)
    error = np.asarray(found.codes, np.float64) - dy
    assert np.abs(error.sum(0)).max() < 4  # evenly in time: chance alone would give 11
    by_chance = np.sqrt(4096 * 0.03 * 0.97)
    assert np.abs(rng.choice([-1, 1], 4096) @ error).max() < 4 * by_chance
    whole = rng.integers(-127, 128, (64, 8))
    whole[0] = 127
    q = Quantised(jnp.asarray(whole, jnp.int8), jnp.ones((64, 1)))
    np.testing.assert_array_equal(column_codes(q, jnp.ones((64, 1))).codes, whole)


def test_bfloat16_products_are_exact_on_codes():
    """The integer product does not depend on the type that carries it."""
    low = bit_linear(Recipe(), X.astype(jnp.bfloat16), Weights(W, GAINS))[0]
    full = bit_linear(Recipe(), X.astype(jnp.bfloat16).astype(jnp.float32), Weights(W, GAINS))[0]
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, full.astype(jnp.bfloat16))


def test_the_backward_pass_keeps_bytes_not_floats():
    saved = jax.eval_shape(
        lambda x, w: jax.vjp(lambda x, w: bit_linear(Recipe(), x, Weights(w, GAINS[0])), x, w)[1], X, W
    )
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))
    assert kept < X.size * (4 + 1) + W.size * 1 + 4 * (2 * X.size // 16 + GAINS.size + 100)


def test_rms_norm_and_its_gradient():
    weigh = jax.random.normal(jax.random.key(4), X.shape)
    score = lambda norm: lambda x, gain: jnp.sum(norm(x, gain, 1e-6) * weigh)
    found, expected = (jax.grad(score(norm), (0, 1))(X, GAINS[0]) for norm in (rms_norm, rms_norm.definition))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    exact = np.asarray(X, np.float64)
    exact = exact / np.sqrt((exact * exact).mean(-1, keepdims=True) + 1e-6) * np.asarray(GAINS[0])
    for norm in (rms_norm, rms_norm.definition):
        np.testing.assert_allclose(norm(X, GAINS[0], 1e-6), exact, atol=1e-6)
    assert rms_norm(X.astype(jnp.bfloat16), GAINS[0], 1e-6).dtype == jnp.bfloat16


def test_the_backward_pass_follows_what_the_forward_pass_chose():
    """A user's "no kernels" is over when gradients are taken: they must not look for a kernel's leavings."""
    keys, gain = jax.random.split(jax.random.key(4)), jnp.ones(128)  # a width that kernels would take
    x, w = jax.random.normal(keys[0], (6, 128)), jax.random.normal(keys[1], (1, 128, 24))

    def loss(x, w):
        with kernels_allowed(False):
            (y,) = bit_linear(Recipe(), rms_norm(x, gain, 1e-6), Weights(w, gain))
        return jnp.sum(y * y)

    with kernels_assumed():
        found = jax.grad(loss, (0, 1))(x, w)
    for a, b in zip(found, jax.grad(loss, (0, 1))(x, w), strict=True):
        np.testing.assert_array_equal(a, b)
