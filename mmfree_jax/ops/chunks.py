"""Time cut into chunks: what each passes on to the next, on one device or along the `sequence` axis of a mesh."""

import itertools

import jax
import jax.numpy as jnp

from mmfree_jax.sharding import Names, axis_if_cut, per_shard

STEPS: Names = ("batch", "time", "channels")  # logical names of [B, T, D]
STATE: Names = ("batch", "channels")


def previous(x_BTD: jax.Array, first_BD: jax.Array, channels: str | None = "channels") -> jax.Array:
    """Each step's predecessor, [B, T, D]; first_BD stands before the first. One step of each chunk travels.

    `channels` is the logical name of the last axis.
    """
    axis = axis_if_cut("time", x_BTD.shape[1])

    def local(x_BTD, first_BD):
        if axis is not None:
            size = jax.lax.axis_size(axis)
            before_BD = jax.lax.ppermute(x_BTD[:, -1], axis, [(i, i + 1) for i in range(size - 1)])
            first_BD = jnp.where(jax.lax.axis_index(axis) == 0, first_BD, before_BD)
        return (jnp.concatenate([first_BD[:, None], x_BTD[:, :-1]], axis=1),)

    steps, state = (*STEPS[:2], channels), (STATE[0], channels)
    return per_shard(local, [steps, state], [steps], x_BTD, first_BD)[0]


def carried(
    decay_BSD: jax.Array, end_BSD: jax.Array, h_BD: jax.Array, axis: str | None = None, reverse: bool = False
) -> jax.Array:
    """The state before each of S segments, [B, S, D]: a segment turns state h into decay * h + end.

    Segments follow one another on the devices along `axis` of the mesh, if given. With reverse they run backward in
    time, and the state before a segment is that after it in time.
    """
    S = decay_BSD.shape[1]
    if axis is not None:
        decay_BSD, end_BSD = (jax.lax.all_gather(a, axis, axis=1, tiled=True) for a in (decay_BSD, end_BSD))
    order = range(decay_BSD.shape[1])[:: -1 if reverse else 1]
    states = {order[0]: h_BD}
    for s, after in itertools.pairwise(order):
        states[after] = decay_BSD[:, s] * states[s] + end_BSD[:, s]
    states_BSD = jnp.stack([states[s] for s in sorted(states)], axis=1)
    return states_BSD if axis is None else jax.lax.dynamic_slice_in_dim(states_BSD, jax.lax.axis_index(axis) * S, S, 1)
