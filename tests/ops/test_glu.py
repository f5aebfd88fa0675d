"""The gated linear unit as one op against the two layers that it is made of, and what is fused with a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear, linear, rms_norm
from mmfree_jax.ops.fast.origin import latest, origin
from mmfree_jax.ops.glu import gated_norm, glu, residual, swiglu

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
    "dense": (Recipe(ternary=False), (None, None)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_two_layers(case):
    """Also where the input is a residual stream, which reads it once more."""
    out, (into_gain, out_gain) = CASES[case]
    into = out._replace(scale_axes=(-3, *out.scale_axes))

    def one_op(x, norm_gain, gate_up, down):
        u = rms_norm(x, norm_gain, 1e-6)
        return residual(x, glu(into, Weights(gate_up, into_gain), out, Weights(down, out_gain), u))

    def two_ops(x, norm_gain, gate_up, down):
        gate, up = linear(into, jax.lax.optimization_barrier(rms_norm(x, norm_gain, 1e-6)), Weights(gate_up, into_gain))
        y = jax.lax.optimization_barrier(swiglu(gate, up))
        return x + linear(out, y, Weights(down, out_gain))[0]

    compare(one_op, two_ops, X, jnp.linspace(1, 2, 16), GATE_UP, DOWN)


@pytest.mark.parametrize("case", [case for case in CASES if case != "integer gradients"])
def test_values_and_gradients_are_those_of_the_definition(case):
    out, (into_gain, out_gain) = CASES[case]
    unit = lambda form: (
        lambda x, gain, gate_up, down: form(out, Weights(gate_up, into_gain), out, Weights(down, out_gain), x, gain)
    )
    compare(unit(glu), unit(glu.definition), X, jnp.linspace(1, 2, 24), GATE_UP, DOWN, tolerance=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("readers", [1, 2])
def test_a_stream_that_layers_read_gets_all_gradients(case, readers):
    """The residual takes the copy that the last reader returned."""
    recipe, (gain, _) = CASES[case]
    weights = Weights(GATE_UP, gain)

    def fused(x, norm_gain, w):
        u = rms_norm(x, norm_gain, 1e-6)
        y = sum(sum(linear(recipe, u, weights._replace(w_GDF=w * (1 + i))))[..., :16] for i in range(readers))
        assert (latest(x) is not x) == recipe.ternary
        z = residual(x, y)
        assert latest(x) is x, "its residual is over"
        return z

    def apart(x, norm_gain, w):
        u = jax.lax.optimization_barrier(rms_norm(x, norm_gain, 1e-6))
        return x + sum(sum(linear(recipe, u, weights._replace(w_GDF=w * (1 + i))))[..., :16] for i in range(readers))

    compare(fused, apart, X, jnp.linspace(1, 2, 16), GATE_UP)


def test_a_stream_read_inside_another_trace_is_left_alone():
    """A copy made inside of jit or checkpoint would not exist outside."""
    recipe, weights = Recipe(), Weights(GATE_UP, GAINS[0])

    def within(wrap):
        def block(x, norm_gain, w):
            u = rms_norm(x, norm_gain, 1e-6)
            read = wrap(lambda u: sum(bit_linear(recipe, u, weights._replace(w_GDF=w)))[..., :16])
            return residual(x, read(u))

        return block

    for wrap in (jax.jit, jax.checkpoint):
        compare(within(wrap), within(lambda f: f), X, jnp.linspace(1, 2, 16), GATE_UP)


def test_notes_go_with_their_arrays():
    from mmfree_jax.ops.fast import origin as module

    def program(x):
        u = rms_norm(x, GAINS[0], 1e-6)
        assert origin(u).kind == "norm"
        assert origin(u + 0).kind == "plain"
        assert origin(swiglu(x, u)).sources == (x, u)
        assert origin(gated_norm(x, u, GAINS[0], 1e-6)).gain is GAINS[0]
        return u

    before = len(module._notes)
    jax.jit(program)(X)
    jax.clear_caches()
    assert len(module._notes) == before
    assert origin(rms_norm(X, GAINS[0], 1e-6)).kind == "plain", "an array outside of a trace would be held"


def compare(form, reference, *operands, tolerance=1e-6):
    weigh = jax.random.normal(jax.random.key(3), X.shape)

    def found(f):
        gradients = jax.value_and_grad(lambda *a: jnp.sum(f(*a) * weigh), argnums=range(len(operands)))
        return jax.tree.leaves(jax.jit(gradients)(*operands))

    for a, b in zip(found(form), found(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))
