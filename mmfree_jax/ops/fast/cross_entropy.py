"""`ops.cross_entropy` on a mesh, with the head in pieces of time: the logits of one piece only are ever held."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mmfree_jax.ops.cross_entropy import Head, Losses, mask_padding
from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast.autodiff import own_backward
from mmfree_jax.ops.fast.bit_linear import Fusion, Input, input_backward, quantise_input, quantise_kernel
from mmfree_jax.ops.fast.dense import outer
from mmfree_jax.ops.fast.products import gather_kernel, input_gradient, product
from mmfree_jax.ops.ternary import Quantised, dequantise, wide
from mmfree_jax.sharding import Names, PartialSum, constrain, gather_fsdp, per_shard, shard_count, sharding_axis

# The loss and its gradients are computed in the same pass over the pieces, so the logits are made once and the backward
# pass only scales what the forward pass kept (Cut Your Losses, Wijmans et al. 2024, arXiv 2411.09009, recomputes
# instead). log-sum-exp is in at least float32.
#
# On a mesh every device computes the logits of its rows and its part of the vocabulary; one number per token travels.

TOKENS: Names = ("batch", "time")  # logical names of the operands
ROWS: Names = (*TOKENS, None)
KERNEL: Names = (None, "vocab")


def head_nats(head: Head, x_BTD: jax.Array, targets_BT: jax.Array, chunks: int = 0) -> jax.Array:
    """`ops.cross_entropy.head_nats`. chunks: pieces of the time axis; 0 chooses by device and size."""
    return _of_tokens(head, x_BTD, _nats, targets_BT, chunks)[0]


def largest_logits(head: Head, x_BTD: jax.Array) -> jax.Array:
    """`ops.cross_entropy.largest_logits`."""

    def largest(x: Quantised, kernel: Quantised, _, dtype, axis: str | None, vocab: int) -> jax.Array:
        sizes_BTV = jnp.abs(product(x, kernel, dtype))
        first = 0 if axis is None else jax.lax.axis_index(axis) * sizes_BTV.shape[2]
        top_BT = jnp.max(mask_padding(sizes_BTV, vocab, first), axis=-1)
        return top_BT if axis is None else jax.lax.pmax(top_BT, axis)

    no_targets_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    return _of_tokens(head, x_BTD, largest, no_targets_BT)


def head_loss(
    head: Head,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    z_loss: float = 0.0,
    chunks: int = 0,
) -> Losses:
    """`ops.cross_entropy.head_loss`. chunks: pieces of the time axis; 0 chooses by device and size."""
    recipe, w_DV, gain_D, codes, vocab = head
    exact = wide(x_BTD.dtype)
    weights_BT = jnp.ones(targets_BT.shape, exact) if mask_BT is None else mask_BT.astype(exact)
    total, z = _head_loss((recipe, vocab, z_loss, chunks), x_BTD, w_DV, gain_D, targets_BT, weights_BT, codes)
    count = jnp.sum(weights_BT) if mask_BT is not None else jnp.asarray(targets_BT.size, exact)
    return Losses(total, count, z)


def _of_tokens(head: Head, x_BTD: jax.Array, of_piece: Callable, targets_BT: jax.Array, chunks: int = 0) -> Any:
    """Compute arrays [B, T] from the logits of each token, by `of_piece`, without gradients."""
    saved, kernel = _operands(head, x_BTD)
    axis = sharding_axis("vocab", head.w_DV.shape[1])

    def local(x, kernel, targets_BT):
        one = lambda _, piece: ((), of_piece(piece[0], kernel, piece[1], x_BTD.dtype, axis, head.vocab))
        return (_scan_pieces(one, (), (x, targets_BT), kernel, chunks)[1],)

    return per_shard(local, [ROWS, KERNEL, TOKENS], [TOKENS], saved.codes[0], kernel, targets_BT)[0]


def _scan_pieces(body: Callable, carry: Any, tokens: Any, kernel: Quantised, chunks: int) -> tuple[Any, Any]:
    """`jax.lax.scan` over pieces of time: of a tree of arrays [B, T, ...], and so are the stacked results."""
    batch, time = jax.tree.leaves(tokens)[0].shape[:2]
    chunks = chunks or choice.loss_chunks(batch * time, time, kernel.codes.shape[1])

    # A piece is every `chunks`-th step, so that where the mesh shards time each device has a part of every piece. What
    # fills up the last steps is zero, and a target with weight zero.
    def cut(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [(0, 0), (0, -time % chunks)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, -1, chunks, *a.shape[2:]), 2, 0)

    carry, found = jax.lax.scan(body, carry, jax.tree.map(cut, tokens))
    join = lambda a: jnp.moveaxis(a, 0, 2).reshape(batch, -1, *a.shape[3:])[:, :time]
    return carry, jax.tree.map(join, found)


def _operands(head: Head, x_BTD: jax.Array) -> tuple[Input, Quantised]:
    """Both sides of the head's product as codes and scales; a dense head is codes without a scale."""
    recipe, w_DV, gain_D, codes, _ = head
    if not recipe.ternary:
        kernel_DV = gather_fsdp(w_DV.astype(x_BTD.dtype), ("embed", "vocab"))
        return Input((x_BTD,), None, None, None, (Quantised(x_BTD, None),)), Quantised(kernel_DV, None)
    shards = quantise_kernel(recipe, w_DV[None]) if codes is None else (codes,)
    (kernel,) = gather_kernel(recipe, shards)
    return quantise_input(Fusion(recipe), (x_BTD,), None, gain_D), kernel


def _logits(x: Quantised, kernel: Quantised, targets_BT, dtype, axis: str | None, vocab: int) -> tuple:
    """Nats of each token of one piece, log-sum-exp of its logits, the logits, and where its target is among them.

    `axis` of the mesh shards the vocabulary: then logits are those of this device's columns, and nats and log-sum-exp
    are of all.
    """
    logits_BTV = product(x, kernel, dtype)
    first = 0 if axis is None else jax.lax.axis_index(axis) * logits_BTV.shape[2]  # token of this device's first column
    logits_BTV = mask_padding(logits_BTV, vocab, first)
    # Devices agree on the largest logit before they exponentiate, so that their sums have one scale and can be added.
    top_BT = jnp.max(logits_BTV, axis=-1)
    top_BT = top_BT if axis is None else jax.lax.pmax(top_BT, axis)
    over_devices = lambda a_BT: a_BT if axis is None else jax.lax.psum(a_BT, axis)
    total_BT = top_BT + jnp.log(over_devices(jnp.sum(jnp.exp(logits_BTV - top_BT[..., None]), axis=-1)))
    chosen_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) + first == targets_BT[..., None]
    hit_BT = over_devices(jnp.sum(jnp.where(chosen_BTV, logits_BTV, 0), axis=-1))
    return total_BT - hit_BT, total_BT, logits_BTV, chosen_BTV


def _nats(*piece: Any) -> tuple[jax.Array, jax.Array]:
    """Nats and log-sum-exp of `_logits`: all that is kept of a piece without gradients."""
    return _logits(*piece)[:2]


def _sums(nats_BT: jax.Array, total_BT: jax.Array, weights_BT: jax.Array, z_loss: float) -> jax.Array:
    """Loss of a piece, a scalar; with a z-loss an array [2] of the loss and the z-loss in it."""
    loss = jnp.sum((nats_BT + z_loss * total_BT**2) * weights_BT)
    return jnp.stack([loss, z_loss * jnp.sum(total_BT**2 * weights_BT)]) if z_loss else loss


def _loss_and_gradients(kernel: Quantised, piece: tuple, vocab: int, z_loss: float, dtype, axis: str | None):
    """Loss of one piece and its gradients to the dequantised operands; that to x sums this device's vocabulary only."""
    x, targets_BT, weights_BT = piece
    nats_BT, total_BT, logits_BTV, chosen_BTV = _logits(x, kernel, targets_BT, dtype, axis, vocab)
    loss = _sums(nats_BT, total_BT, weights_BT, z_loss)
    # With p = softmax(logits) and l = logsumexp: d(l - logit_y) = p - [y], d(z l^2) = 2 z l p.
    pull_BT = weights_BT * (1 + 2 * z_loss * total_BT)
    softmax_BTV = jnp.exp(logits_BTV - total_BT[..., None])
    g_BTV = softmax_BTV * pull_BT[..., None] - jnp.where(chosen_BTV, weights_BT[..., None], 0)
    g_BTV = g_BTV.astype(dtype)
    return loss, (input_gradient(kernel, g_BTV).scaled(dtype), outer(dequantise(x, dtype), g_BTV, wide(dtype)))


def _parts(sums: jax.Array, z_loss: float) -> tuple[jax.Array, jax.Array]:
    """The loss and the z-loss in it, of what `_sums` returns."""
    return (sums[0], sums[1]) if z_loss else (sums, jnp.zeros_like(sums))


# Not `own_backward`: where nobody asks for gradients, the function is cheaper than its forward pass, which makes them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(static, x_BTD, w_DV, gain_D, targets_BT, weights_BT, codes) -> tuple[jax.Array, jax.Array]:
    recipe, vocab, z_loss, chunks = static
    nats_BT, total_BT = _of_tokens(Head(recipe, w_DV, gain_D, codes, vocab), x_BTD, _nats, targets_BT, chunks)
    return _parts(_sums(nats_BT, total_BT, weights_BT, z_loss), z_loss)


def _forward(static, x_BTD, w_DV, gain_D, targets_BT, weights_BT, codes):
    recipe, vocab, z_loss, chunks = static
    saved, kernel = _operands(Head(recipe, w_DV, gain_D, codes), x_BTD)
    axis = sharding_axis("vocab", w_DV.shape[1])

    def local(x, kernel, targets_BT, weights_BT):
        kernel = kernel._replace(codes=kernel.codes.astype(x_BTD.dtype))  # once, not in every piece

        # Gradients to x leave piece by piece; those to the weights are one array that all pieces are added to.
        def one(carry, piece):
            loss, (dx_BTD, dw_DV) = _loss_and_gradients(kernel, piece, vocab, z_loss, x_BTD.dtype, axis)
            dx_BTD = dx_BTD if axis is None else jax.lax.psum(dx_BTD, axis)
            return (carry[0] + loss, carry[1] + dw_DV), dx_BTD

        exact = weights_BT.dtype
        zero = jnp.zeros((2,) if z_loss else (), exact), jnp.zeros(kernel.codes.shape, exact)
        (loss, dw_DV), dx_BTD = _scan_pieces(one, zero, (x, targets_BT, weights_BT), kernel, chunks)
        return loss, dw_DV, dx_BTD

    # Gradients to the weights are summed over devices once, not once a piece.
    into = "embed" if shard_count("embed", w_DV.shape[0]) > 1 else None
    results: list[Names | PartialSum] = [PartialSum(()), PartialSum((into, "vocab")), ROWS]
    arguments = saved.codes[0], kernel, targets_BT, weights_BT
    loss, dw_DV, dx_BTD = per_shard(local, [ROWS, KERNEL, TOKENS, TOKENS], results, *arguments)
    dw_DV = constrain(dw_DV, "embed", "vocab").astype(w_DV.dtype)
    (dx_BTD,), _, dgain_D = input_backward(Fusion(recipe), saved, [dx_BTD])
    return _parts(loss, z_loss), (dx_BTD, dw_DV, dgain_D)


def _backward(static, gradients, g):
    scaled = jax.tree.map(lambda a: (a * g[0]).astype(a.dtype), gradients)
    return *scaled, None, None, None


_head_loss.defvjp(_forward, _backward)


def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`ops.cross_entropy.embed`; gradients are summed in the table's type.

    A table cut over fsdp is gathered in `dtype`. A vocabulary cut over tensor stays where it is: each device looks up
    what it has, and the rows are summed.
    """
    return _embed(table_VD, tokens_BT, dtype)


def _embed_forward(table_VD: jax.Array, tokens_BT: jax.Array, dtype: DTypeLike):
    like_V0 = table_VD[:, :0]  # all that the backward pass needs of the table, its length and type, without its bytes
    axis = sharding_axis("vocab", table_VD.shape[0])
    if shard_count("embed", table_VD.shape[1]) > 1:
        table_VD = gather_fsdp(table_VD.astype(dtype), ("vocab", "embed"))

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
    axis = sharding_axis("vocab", like_V0.shape[0])

    def local(like_V0, tokens_BT, dx_BTD):
        dtable_VD = jnp.zeros((like_V0.shape[0], dx_BTD.shape[-1]), like_V0.dtype)
        first = 0 if axis is None else jax.lax.axis_index(axis) * like_V0.shape[0]
        here_BT = jnp.where(tokens_BT >= first, tokens_BT - first, like_V0.shape[0])  # what is elsewhere is dropped
        return (dtable_VD.at[here_BT].add(dx_BTD.astype(like_V0.dtype), mode="drop"),)

    embed_name = "embed" if shard_count("embed", dx_BTD.shape[-1]) > 1 else None
    results = [PartialSum(("vocab", embed_name))]
    dtable_VD = per_shard(local, [("vocab", None), TOKENS, ROWS], results, like_V0, tokens_BT, dx_BTD)[0]
    return constrain(dtable_VD, "vocab", "embed"), None


_embed = own_backward(_embed_forward, _embed_backward, static=(2,))
