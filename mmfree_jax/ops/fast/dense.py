"""The dense linear layer on a mesh: weights are gathered in the type of the activations, gradients scattered.

dense(axes, x, w_GDF) multiplies one input [..., D] by G matrices, in its type: G arrays [..., F]. `axes` are the
logical names of D and F. The weights are kept for the backward pass in that type, and where they live: what
was gathered of fsdp shards is gathered again, as early as the compiler likes. Kept, it would be a whole model on every
device.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mmfree_jax.ops.fast.autodiff import own_backward
from mmfree_jax.sharding import (
    Names,
    PartialSum,
    activation_axes,
    constrain,
    gather_fsdp,
    gathered_axes,
    per_shard,
    shard_count,
)


def _forward(axes: Names, x: jax.Array, w_GDF: jax.Array):
    # Each matrix by itself: a stack would be transposed before it travels, and transposed back after.
    shards = [w_DF.astype(x.dtype) for w_DF in w_GDF]
    rows = activation_axes(x.ndim, gathered_axes(axes)[1])
    ys = tuple(constrain(jnp.matmul(x, gather_fsdp(w_DF, axes)), *rows) for w_DF in shards)
    return ys, (x, shards, jnp.zeros((), w_GDF.dtype))  # residuals are arrays: the last carries the weights' type


def _backward(axes: Names, saved, dys: tuple[jax.Array, ...]):
    x, shards, typed = saved
    # The barriers keep the gather of the backward pass apart from that of the forward pass: XLA would find that both
    # are the same array and keep the gathered weights of every layer until they are needed again.
    if any(name == "embed" and shard_count(name, size) > 1 for name, size in zip(axes, shards[0].shape, strict=True)):
        shards, (x, dys) = jax.lax.optimization_barrier(shards), jax.lax.optimization_barrier((x, dys))
    ws = [gather_fsdp(w_DF, axes) for w_DF in shards]
    parts = [jnp.matmul(dy, w_DF.T) for dy, w_DF in zip(dys, ws, strict=True)]
    dx = constrain(sum(parts[1:], parts[0]), *activation_axes(x.ndim, gathered_axes(axes)[0]))
    into, out = (name if shard_count(name, size) > 1 else None for name, size in zip(axes, ws[0].shape, strict=True))
    names = [activation_axes(x.ndim, name) for name in gathered_axes((into, out))]
    local = lambda x, dys: tuple(outer(x, dy) for dy in dys)
    dws = per_shard(local, names, [PartialSum((into, out))] * len(dys), x, dys)
    return dx, jnp.stack([constrain(dw_DF, *axes) for dw_DF in dws]).astype(typed.dtype)


dense = own_backward(_forward, _backward, static=(0,))


def outer(x: jax.Array, dy: jax.Array, out: DTypeLike | None = None) -> jax.Array:
    """Compute the gradient to w of x @ w, summed over rows: [..., D], [..., F] -> [D, F] as `out` (None: dy's type)."""
    rows = tuple(range(dy.ndim - 1))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=out or dy.dtype)
