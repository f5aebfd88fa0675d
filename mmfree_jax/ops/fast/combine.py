"""What a BitLinear can make its input of (`origin.Kind`), computed by XLA."""

import jax

from mmfree_jax.ops.fast.autodiff import own_backward
from mmfree_jax.ops.fast.origin import Kind
from mmfree_jax.ops.fast.stream import rms_norm
from mmfree_jax.ops.ternary import wide


def combine(kind: Kind, sources: tuple[jax.Array, ...], gain: jax.Array | None, eps: float) -> jax.Array:
    """Make the input of its sources, in their type; norms compute in at least float32."""
    if kind == "plain":
        return sources[0]
    if kind == "swiglu":
        return swiglu(*sources)
    assert gain is not None
    normed = rms_norm(sources[0], gain, eps)
    return normed if kind == "norm" else normed * jax.nn.silu(sources[1])


def _swiglu_forward(gate: jax.Array, up: jax.Array):
    return jax.nn.silu(gate) * up, (gate, up)


def _swiglu_backward(saved: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Behind a barrier, or XLA's GPU compiler makes two passes of the two gradients.
    gate, up, d = (a.astype(wide(a.dtype)) for a in jax.lax.optimization_barrier((*saved, d)))
    share = jax.nn.sigmoid(gate)
    dgate, dup = d * up * share * (1 + gate * (1 - share)), d * gate * share
    return dgate.astype(saved[0].dtype), dup.astype(saved[1].dtype)


# silu(gate) * up; the backward pass computes in at least float32.
swiglu = own_backward(_swiglu_forward, _swiglu_backward)
