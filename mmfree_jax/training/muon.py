"""Muon: momentum, orthogonalised matrix by matrix (Jordan 2024, kellerjordan.github.io/posts/muon)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from mmfree_jax.devices import backend
from mmfree_jax.sharding import RULES, divisible_spec

# Parameters of the blocks are stacks [layers, ..., D, F]. If they are sharded, complete matrices are moved to the
# devices, some of the layers to each, and orthogonalised there without further communication.

# Five iterations of the quintic a x + b x^3 + c x^5 bring singular values in (0, 1] near 1: to about 0.7 .. 1.2.
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
ADAM_RMS = 0.2  # root mean square of AdamW's updates; Muon's are scaled to it (arXiv 2502.16982, equation 4)


class MuonState(NamedTuple):
    """The momentum of each matrix, float32."""

    momentum: Any


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Return Muon: Nesterov momentum, then the nearest orthogonal matrix, scaled to the size of AdamW's update.

    The scale is 0.2 sqrt(max(D, F)): an orthogonal matrix has the root mean square 1 / sqrt(max(D, F)).
    """

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        buffers = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, updates)
        ahead = jax.tree.map(lambda m, g: momentum * m + g, buffers, updates)
        with nnx.logical_axis_rules(tuple(RULES.items())):
            places = nnx.get_partition_spec(updates)

        def orthogonal(stack: jax.Array, place: P | None) -> jax.Array:
            *_, D, F = stack.shape
            ends = (None, None) if place is None else tuple(place)[-2:]
            m_NDF = layer_sharded(stack.reshape(-1, D, F), ends)
            return ADAM_RMS * math.sqrt(max(D, F)) * m_NDF.reshape(stack.shape)

        return jax.tree.map(orthogonal, ahead, places), MuonState(buffers)

    return optax.GradientTransformation(lambda params: MuonState(jax.tree.map(jnp.zeros_like, params)), update)


# The quintic maps a singular value s to a s + b s^3 + c s^5, and products of the whole matrix apply it to all singular
# values at once: X (a + b X'X + c (X'X)^2). The coefficients are chosen for a steep start at zero, not for convergence
# to 1: after five rounds values lie between 0.7 and 1.2, which is as good as 1 for a step, and rounding to bfloat16
# does not matter.
def newton_schulz(m_NDF: jax.Array) -> jax.Array:
    """Return the matrices' orthogonal factors, approximately: U S V' -> U S' V' with all of S' near 1; in m's type.

    Products are in bfloat16 on accelerators (Jordan 2024 finds the iteration insensitive), float32 on CPU.
    """
    a, b, c = COEFFICIENTS
    dtype = m_NDF.dtype if backend() == "cpu" else jnp.bfloat16
    tall = m_NDF.shape[-2] > m_NDF.shape[-1]
    x = m_NDF.mT if tall else m_NDF  # the Gram matrix of the shorter side
    x = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-20)).astype(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).astype(m_NDF.dtype)


def layer_sharded(m_NDF: jax.Array, ends: tuple) -> jax.Array:
    """Compute `newton_schulz` with the matrices distributed over the devices that hold shards of each.

    `ends`: mesh axes that shard D and F. One axis moves at a time: each move is then an all-to-all, while both at once
    would gather the entire stack on every device. An axis that would leave devices without a matrix does not move.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return newton_schulz(m_NDF)
    home = divisible_spec(m_NDF.shape, P(None, *ends), mesh)
    moves, devices = _moves(len(m_NDF), home, dict(mesh.shape))
    padded = jnp.pad(m_NDF, ((0, -len(m_NDF) % devices), (0, 0), (0, 0)))  # a sharded axis must divide evenly
    for move in moves[1:]:
        padded = jax.lax.with_sharding_constraint(padded, move)
    done = newton_schulz(padded)
    for move in reversed(moves):
        done = jax.lax.with_sharding_constraint(done, move)
    return done[: len(m_NDF)]


def _moves(matrices: int, home: P, mesh_shape: dict[str, int]) -> tuple[list[P], int]:
    """Placements from `home` to complete matrices on each device, each with one more axis on the first dimension; and
    the number of devices that the last one distributes the matrices over."""
    # From P(None, "fsdp", "tensor") for 24 matrices [D, F] on 4 x 2 devices: first P("tensor", "fsdp", None), then
    # P(("tensor", "fsdp"), None, None). In the last one each of the 8 devices has 3 complete matrices.
    moves, devices = [home], 1
    taken: tuple[str, ...] = ()
    for dimension in (2, 1):
        axis = home[dimension]
        if axis is None or mesh_shape[axis] == 1 or devices * mesh_shape[axis] > matrices:
            continue
        taken, devices = (*taken, axis), devices * mesh_shape[axis]
        kept = [moves[-1][other] if other != dimension else None for other in (1, 2)]
        moves.append(P(taken, *kept))
    return moves, devices
