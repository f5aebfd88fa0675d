"""Time cut into chunks: what each passes on to the next, on one device or along the `sequence` axis of a mesh."""

import itertools

import jax
import jax.numpy as jnp

from mmfree_jax.sharding import Names

STATE: Names = ("batch", "channels")  # logical names of a state [B, D]


def segment_states(
    decay_BSD: jax.Array, end_BSD: jax.Array, h_BD: jax.Array, axis: str | None = None, reverse: bool = False
) -> jax.Array:
    """The state before each of S segments, [B, S, D]: a segment turns state h into decay * h + end.

    Segments follow one another on the devices along `axis` of the mesh, if given. With reverse they run backward in
    time, and the state before a segment is that after it in time.
    """
    # There are few segments, so they are chained one after the other; every device chains those of all and takes its
    # own.
    S = decay_BSD.shape[1]
    if axis is not None:
        decay_BSD, end_BSD = (jax.lax.all_gather(a, axis, axis=1, tiled=True) for a in (decay_BSD, end_BSD))
    # A state is small beside the activations, so all devices get all of them by one all-gather and chain them
    # themselves: a prefix over devices would wait for its neighbours in every round.
    order = range(decay_BSD.shape[1])[:: -1 if reverse else 1]
    states = {order[0]: h_BD}
    for s, after in itertools.pairwise(order):
        states[after] = decay_BSD[:, s] * states[s] + end_BSD[:, s]
    states_BSD = jnp.stack([states[s] for s in sorted(states)], axis=1)
    return states_BSD if axis is None else jax.lax.dynamic_slice_in_dim(states_BSD, jax.lax.axis_index(axis) * S, S, 1)
