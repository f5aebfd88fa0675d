"""The gated linear unit as one op against the two layers that it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.ops.bit_glu import bit_glu
from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear
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
@pytest.mark.parametrize("deferred", [False, True])
def test_values_and_gradients_are_those_of_two_layers(case, deferred):
    out, (into_gain, out_gain) = CASES[case]
    into = out._replace(scale_axes=(-3, *out.scale_axes))

    def given(x, norm_gain):
        return Prologue("norm", (x,), norm_gain, 1e-6) if deferred else x * norm_gain

    def one_op(x, norm_gain, gate_up, down):
        return bit_glu(into, given(x, norm_gain), Weights(gate_up, into_gain), out, Weights(down, out_gain))

    def two_ops(x, norm_gain, gate_up, down):
        gate_and_up = bit_linear(into, given(x, norm_gain), gate_up, into_gain)
        return bit_linear(out, Prologue("swiglu", gate_and_up), down, out_gain)[0]

    operands = X, jnp.linspace(1, 2, 16), GATE_UP, DOWN
    weigh = jax.random.normal(jax.random.key(3), X.shape)
    score = lambda form: jax.jit(jax.value_and_grad(lambda *a: jnp.sum(form(*a) * weigh), argnums=(0, 1, 2, 3)))
    for a, b in zip(*(jax.tree.leaves(score(form)(*operands)) for form in (one_op, two_ops)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(jnp.abs(b).max()))
