"""Token embeddings: rows of a table whose vocabulary may be cut over devices."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mmfree_jax.sharding import Summed, axis_if_cut, constrain, gathered, per_shard, ways

TOKENS, ROWS = ("batch", "time"), ("batch", "time", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The rows of `tokens_BT` as `dtype`, [B, T, D]; their gradients are summed in the table's type.

    A table cut over fsdp is gathered in `dtype`. A vocabulary cut over tensor stays where it is: each device looks up
    what it has, and the rows are summed.
    """
    axis = axis_if_cut("vocab", table_VD.shape[0])
    if ways("embed", table_VD.shape[1]) > 1:
        table_VD = gathered(table_VD.astype(dtype), ("vocab", "embed"))

    def local(table_VD, tokens_BT):
        if axis is None:
            return (table_VD[tokens_BT].astype(dtype),)
        here_BT = tokens_BT - jax.lax.axis_index(axis) * table_VD.shape[0]
        found_BT = (here_BT >= 0) & (here_BT < table_VD.shape[0])
        x_BTD = table_VD[jnp.where(found_BT, here_BT, 0)].astype(dtype)
        return (jax.lax.psum(jnp.where(found_BT[..., None], x_BTD, 0), axis),)

    return per_shard(local, [("vocab", None), TOKENS], [ROWS], table_VD, tokens_BT)[0]


def _forward(table_VD: jax.Array, tokens_BT: jax.Array, dtype: DTypeLike):
    return embed(table_VD, tokens_BT, dtype), (tokens_BT, jnp.zeros_like(table_VD[:, :0]))


def _backward(dtype: DTypeLike, saved, dx_BTD: jax.Array):
    tokens_BT, like_V0 = saved  # the table's length and type
    axis = axis_if_cut("vocab", like_V0.shape[0])

    def local(like_V0, tokens_BT, dx_BTD):
        dtable_VD = jnp.zeros((like_V0.shape[0], dx_BTD.shape[-1]), like_V0.dtype)
        first = 0 if axis is None else jax.lax.axis_index(axis) * like_V0.shape[0]
        here_BT = jnp.where(tokens_BT >= first, tokens_BT - first, like_V0.shape[0])  # what is elsewhere is dropped
        return (dtable_VD.at[here_BT].add(dx_BTD.astype(like_V0.dtype), mode="drop"),)

    embed_name = "embed" if ways("embed", dx_BTD.shape[-1]) > 1 else None
    results = [Summed(("vocab", embed_name))]
    dtable_VD = per_shard(local, [("vocab", None), TOKENS, ROWS], results, like_V0, tokens_BT, dx_BTD)[0]
    return constrain(dtable_VD, "vocab", "embed"), None


embed.defvjp(_forward, _backward)
