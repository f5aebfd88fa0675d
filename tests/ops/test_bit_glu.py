"""The gated linear unit as one op against the two layers that it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.ops.bit_glu import bit_glu
from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear, bit_linear_beside
from mmfree_jax.ops.prologue import Prologue

X = jax.random.normal(jax.random.key(0), (2, 9, 16))
GATE_UP, DOWN = jax.random.normal(jax.random.key(1), (2, 16, 24)), jax.random.normal(jax.random.key(2), (1, 24, 16))
GAINS = jnp.linspace(0.5, 2, 16), jnp.linspace(2, 0.5, 24)
CASES = {
    "one scale": (Recipe(), GAINS),
    "scale per channel": (Recipe(scale_axes=(-2,)), GAINS),
    "no norm": (Recipe(), (None, None)),
    "4 bits": (Recipe(bits=4), GAINS),
    "no codes": (Recipe(bits=0), GAINS),
    "integer gradients": (Recipe(gradient_bits=8), GAINS),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_two_layers(case):
    """Also where the input is needed besides, as by a residual stream."""
    out, (into_gain, out_gain) = CASES[case]
    into = out._replace(scale_axes=(-3, *out.scale_axes))

    def one_op(x, norm_gain, gate_up, down):
        u = Prologue("norm", (x,), norm_gain, 1e-6)
        y, u = bit_glu(into, u, Weights(gate_up, into_gain), out, Weights(down, out_gain))
        return u.sources[0] + y

    def two_ops(x, norm_gain, gate_up, down):
        gate_and_up = bit_linear(into, Prologue("norm", (x,), norm_gain, 1e-6), gate_up, into_gain)
        return x + bit_linear(out, Prologue("swiglu", gate_and_up), down, out_gain)[0]

    compare(one_op, two_ops, X, jnp.linspace(1, 2, 16), GATE_UP, DOWN)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_hands_on_what_it_reads(case):
    recipe, (gain, _) = CASES[case]

    def handed_on(x, norm_gain, w):
        ys, u = bit_linear_beside(recipe, Prologue("norm", (x,), norm_gain, 1e-6), Weights(w, gain))
        return jnp.sin(u.sources[0]) + sum(ys)[..., :16]

    def beside(x, norm_gain, w):
        return jnp.sin(x) + sum(bit_linear(recipe, Prologue("norm", (x,), norm_gain, 1e-6), w, gain))[..., :16]

    compare(handed_on, beside, X, jnp.linspace(1, 2, 16), GATE_UP)


def compare(form, reference, *operands):
    weigh = jax.random.normal(jax.random.key(3), X.shape)

    def found(f):
        gradients = jax.value_and_grad(lambda *a: jnp.sum(f(*a) * weigh), argnums=range(len(operands)))
        return jax.tree.leaves(jax.jit(gradients)(*operands))

    for a, b in zip(found(form), found(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(jnp.abs(b).max()))
