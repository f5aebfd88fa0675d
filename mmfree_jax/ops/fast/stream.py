"""`ops.stream` with backward passes of its own, and placed on a mesh."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from mmfree_jax.ops.fast.autodiff import own_backward
from mmfree_jax.ops.fast.origin import Origin, latest, note
from mmfree_jax.ops.ternary import wide
from mmfree_jax.sharding import Summed, axis_if_cut, constrain, gathered, per_shard, ways

TOKENS, ROWS = ("batch", "time"), ("batch", "time", None)  # logical names of [B, T] and [B, T, D]


def residual(x_BTD: jax.Array, y_BTD: jax.Array, scale: float = 1.0) -> jax.Array:
    """`ops.stream.residual`; a BitLinear that has read the stream adds both gradients to it (`origin`)."""
    y_BTD = y_BTD if scale == 1 else y_BTD * scale
    return constrain(latest(x_BTD, last=True) + y_BTD, *ROWS)


def rms_norm(x: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """`ops.stream.rms_norm`. Its backward pass keeps x and one number per token."""
    return note(_rms_norm(x, gain_D, eps), Origin("norm", (x,), gain_D, eps))


def reciprocal_rms(x: jax.Array, eps: float) -> jax.Array:
    """Compute 1 / sqrt(mean(x^2) + eps) over the last axis, kept with size 1, in `wide(x.dtype)`."""
    x = x.astype(wide(x.dtype))
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm_backward(x: jax.Array, rstd: jax.Array, dy_gain: jax.Array) -> jax.Array:
    """Compute the gradient to x of x * rstd, given the gradient `dy_gain` to that product (already times the gain)."""
    x_hat = x.astype(rstd.dtype) * rstd
    return (dy_gain - x_hat * jnp.mean(x_hat * dy_gain, axis=-1, keepdims=True)) * rstd


def _rms_norm_forward(x: jax.Array, gain_D: jax.Array, eps: float):
    rstd = checkpoint_name(reciprocal_rms(x, eps), "per_token")
    y = x.astype(rstd.dtype) * rstd * gain_D.astype(rstd.dtype)
    return y.astype(x.dtype), (x, rstd, gain_D)


def _rms_norm_backward(eps: float, saved, dy: jax.Array):
    # y = x_hat * gain, x_hat = x * rstd: dx = rstd (dy gain - x_hat mean(x_hat dy gain)).
    x, rstd, gain_D = saved
    dy = dy.astype(rstd.dtype)
    dgain_D = jnp.sum(dy * (x.astype(rstd.dtype) * rstd), axis=tuple(range(dy.ndim - 1)))
    dx = rms_norm_backward(x, rstd, dy * gain_D.astype(rstd.dtype))
    return dx.astype(x.dtype), dgain_D.astype(gain_D.dtype)


_rms_norm = own_backward(_rms_norm_forward, _rms_norm_backward, static=(2,))


def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`ops.stream.embed`; gradients are summed in the table's type.

    A table cut over fsdp is gathered in `dtype`. A vocabulary cut over tensor stays where it is: each device looks up
    what it has, and the rows are summed.
    """
    return _embed(table_VD, tokens_BT, dtype)


def _embed_forward(table_VD: jax.Array, tokens_BT: jax.Array, dtype: DTypeLike):
    like_V0 = table_VD[:, :0]  # all that the backward pass needs of the table: its length and type
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

    x_BTD = per_shard(local, [("vocab", None), TOKENS], [ROWS], table_VD, tokens_BT)[0]
    return x_BTD, (tokens_BT, like_V0)


def _embed_backward(dtype: DTypeLike, saved, dx_BTD: jax.Array):
    tokens_BT, like_V0 = saved
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


_embed = own_backward(_embed_forward, _embed_backward, static=(2,))
