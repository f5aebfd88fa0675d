"""`ops.cross_entropy` in pieces of the time axis, so that the logits of one piece only are ever held.

The loss and its gradients are computed in the same pass over the pieces, so the logits are made once and the backward
pass only scales what the forward pass kept (Cut Your Losses, Wijmans et al. 2024, arXiv 2411.09009, recomputes
instead). log-sum-exp is in at least float32.

On a mesh every device computes the logits of its rows and its part of the vocabulary; one number per token travels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.ops.cross_entropy import Head, Losses, mask_padding
from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast.bit_linear import Fusion, Input, input_backward, quantise_input, quantise_kernel
from mmfree_jax.ops.fast.dense import outer
from mmfree_jax.ops.fast.products import gather_kernel, input_gradient, product
from mmfree_jax.ops.ternary import Quantised, dequantise, wide
from mmfree_jax.sharding import Names, Summed, axis_if_cut, constrain, gathered, per_shard, ways

TOKENS: Names = ("batch", "time")  # logical names of the operands
ROWS: Names = (*TOKENS, None)
KERNEL: Names = (None, "vocab")


def head_nats(head: Head, x_BTD: jax.Array, targets_BT: jax.Array, chunks: int = 0) -> jax.Array:
    """`ops.cross_entropy.head_nats`. chunks: pieces of the time axis; 0 chooses by device and size."""
    return _by_pieces(head, x_BTD, _nats, targets_BT, chunks)[0]


def largest_logits(head: Head, x_BTD: jax.Array) -> jax.Array:
    """`ops.cross_entropy.largest_logits`."""

    def largest(x: Quantised, kernel: Quantised, _, dtype, axis: str | None, vocab: int) -> jax.Array:
        sizes_BTV = jnp.abs(product(x, kernel, dtype))
        top_BT = jnp.max(mask_padding(sizes_BTV, vocab, _first(sizes_BTV, axis)), axis=-1)
        return top_BT if axis is None else jax.lax.pmax(top_BT, axis)

    no_targets_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    return _by_pieces(head, x_BTD, largest, no_targets_BT)


def _by_pieces(head: Head, x_BTD: jax.Array, of_piece: Callable, targets_BT: jax.Array, chunks: int = 0) -> Any:
    """What `of_piece` finds of each token, as arrays [B, T], with the logits of one piece at a time."""
    saved, kernel = _operands(head, x_BTD)
    axis = axis_if_cut("vocab", head.w_DV.shape[1])

    def local(x, kernel, targets_BT):
        one = lambda piece: of_piece(piece[0], kernel, piece[1], x_BTD.dtype, axis, head.vocab)
        found = jax.lax.map(one, _cut((x, targets_BT), chunks or _chunk_count(targets_BT, kernel)))
        return (jax.tree.map(lambda a: _join(a, targets_BT.shape[1]), found),)

    return per_shard(local, [ROWS, KERNEL, TOKENS], [TOKENS], saved.codes[0], kernel, targets_BT)[0]


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


def _chunk_count(targets_BT: jax.Array, kernel: Quantised) -> int:
    return choice.loss_chunks(targets_BT.size, targets_BT.shape[1], kernel.codes.shape[1])


def _operands(head: Head, x_BTD: jax.Array) -> tuple[Input, Quantised]:
    """Both sides of the head's product as codes and scales; a dense head is codes without a scale."""
    recipe, w_DV, gain_D, codes, _ = head
    if not recipe.ternary:
        kernel_DV = gathered(w_DV.astype(x_BTD.dtype), ("embed", "vocab"))
        return Input((x_BTD,), None, None, None, (Quantised(x_BTD, None),)), Quantised(kernel_DV, None)
    shards = quantise_kernel(recipe, w_DV[None]) if codes is None else (codes,)
    (kernel,) = gather_kernel(recipe, shards)
    return quantise_input(Fusion(recipe), (x_BTD,), None, gain_D), kernel


def _nats(x: Quantised, kernel: Quantised, targets_BT, dtype, axis: str | None, vocab: int):
    """Nats of each token of one piece and the log-sum-exp of its logits; `axis` of the mesh cuts the vocabulary."""
    return _nats_and_logits(x, kernel, targets_BT, dtype, axis, vocab)[:2]


def _nats_and_logits(x: Quantised, kernel: Quantised, targets_BT, dtype, axis: str | None, vocab: int):
    """What `_nats` returns, and the logits."""
    logits_BTV = product(x, kernel, dtype)
    logits_BTV = mask_padding(logits_BTV, vocab, _first(logits_BTV, axis))
    top_BT = jnp.max(logits_BTV, axis=-1)
    top_BT = top_BT if axis is None else jax.lax.pmax(top_BT, axis)
    total_BT = top_BT + jnp.log(_summed(jnp.sum(jnp.exp(logits_BTV - top_BT[..., None]), axis=-1), axis))
    hit_BT = jnp.sum(jnp.where(_chosen(logits_BTV, targets_BT, axis), logits_BTV, 0), axis=-1)
    return total_BT - _summed(hit_BT, axis), total_BT, logits_BTV


def _first(logits_BTV: jax.Array, axis: str | None) -> jax.Array | int:
    """The token of this device's first column, where the vocabulary is cut."""
    return 0 if axis is None else jax.lax.axis_index(axis) * logits_BTV.shape[2]


def _chosen(logits_BTV: jax.Array, targets_BT: jax.Array, axis: str | None) -> jax.Array:
    """True at each token's target."""
    token = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    return token + _first(logits_BTV, axis) == targets_BT[..., None]


def _summed(a: jax.Array, axis: str | None) -> jax.Array:
    return a if axis is None else jax.lax.psum(a, axis)


def _sums(nats_BT: jax.Array, total_BT: jax.Array, weights_BT: jax.Array, z_loss: float) -> jax.Array:
    """Loss of a piece, a scalar; with a z-loss an array [2] of the loss and the z-loss in it."""
    loss = jnp.sum((nats_BT + z_loss * total_BT**2) * weights_BT)
    return jnp.stack([loss, z_loss * jnp.sum(total_BT**2 * weights_BT)]) if z_loss else loss


def _no_sums(z_loss: float, dtype) -> jax.Array:
    return jnp.zeros((2,) if z_loss else (), dtype)


def _parts(sums: jax.Array, z_loss: float) -> tuple[jax.Array, jax.Array]:
    return (sums[0], sums[1]) if z_loss else (sums, jnp.zeros_like(sums))


def _loss_and_gradients(kernel: Quantised, piece: tuple, vocab: int, z_loss: float, dtype, axis: str | None):
    """Loss of one piece and its gradients to the dequantised operands; that to x sums this device's vocabulary only."""
    x, targets_BT, weights_BT = piece
    nats_BT, total_BT, logits_BTV = _nats_and_logits(x, kernel, targets_BT, dtype, axis, vocab)
    loss = _sums(nats_BT, total_BT, weights_BT, z_loss)
    # With p = softmax(logits) and l = logsumexp: d(l - logit_y) = p - [y], d(z l^2) = 2 z l p.
    pull_BT = weights_BT * (1 + 2 * z_loss * total_BT)
    softmax_BTV = jnp.exp(logits_BTV - total_BT[..., None])
    chosen_BTV = _chosen(logits_BTV, targets_BT, axis)
    g_BTV = softmax_BTV * pull_BT[..., None] - jnp.where(chosen_BTV, weights_BT[..., None], 0)
    g_BTV = g_BTV.astype(dtype)
    return loss, (input_gradient(kernel, g_BTV).scaled(dtype), outer(dequantise(x, dtype), g_BTV, wide(dtype)))


def _cut(tree, chunks: int):
    """[B, T, ...] -> [chunks, B, T / chunks, ...], zero-padded; strided, so that a sharded time axis stays put."""

    def cut(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % chunks)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, chunks, *a.shape[2:]), 2, 0)

    return jax.tree.map(cut, tree)


def _join(a: jax.Array, time: int) -> jax.Array:
    """Inverse of `_cut`: [chunks, B, T / chunks, ...] -> [B, T, ...]."""
    a = jnp.moveaxis(a, 0, 2)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :time]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_loss(static, x_BTD, w_DV, gain_D, targets_BT, weights_BT, codes) -> tuple[jax.Array, jax.Array]:
    recipe, vocab, z_loss, chunks = static
    nats_BT, total_BT = _by_pieces(Head(recipe, w_DV, gain_D, codes, vocab), x_BTD, _nats, targets_BT, chunks)
    return _parts(_sums(nats_BT, total_BT, weights_BT, z_loss), z_loss)


def _forward(static, x_BTD, w_DV, gain_D, targets_BT, weights_BT, codes):
    recipe, vocab, z_loss, chunks = static
    saved, kernel = _operands(Head(recipe, w_DV, gain_D, codes), x_BTD)
    axis = axis_if_cut("vocab", w_DV.shape[1])

    def local(x, kernel, targets_BT, weights_BT):
        kernel = kernel._replace(codes=kernel.codes.astype(x_BTD.dtype))  # once, not in every piece

        # Gradients to x leave piece by piece; those to the weights are one array that all pieces are added to.
        def one(carry, piece):
            loss, (dx_BTD, dw_DV) = _loss_and_gradients(kernel, piece, vocab, z_loss, x_BTD.dtype, axis)
            return (carry[0] + loss, carry[1] + dw_DV), _summed(dx_BTD, axis)

        zero = (_no_sums(z_loss, weights_BT.dtype), jnp.zeros(kernel.codes.shape, weights_BT.dtype))
        pieces = _cut((x, targets_BT, weights_BT), chunks or _chunk_count(targets_BT, kernel))
        (loss, dw_DV), dx_CBTD = jax.lax.scan(one, zero, pieces)
        return loss, dw_DV, _join(dx_CBTD, targets_BT.shape[1])

    arguments = saved.codes[0], kernel, targets_BT, weights_BT
    # Gradients to the weights are summed over devices once, not once a piece.
    into = "embed" if ways("embed", w_DV.shape[0]) > 1 else None
    results: list[Names | Summed] = [Summed(()), Summed((into, "vocab")), ROWS]
    loss, dw_DV, dx_BTD = per_shard(local, [ROWS, KERNEL, TOKENS, TOKENS], results, *arguments)
    dw_DV = constrain(dw_DV, "embed", "vocab").astype(w_DV.dtype)
    (dx_BTD,), _, dgain_D = input_backward(Fusion(recipe), saved, [dx_BTD])
    return _parts(loss, z_loss), (dx_BTD, dw_DV, dgain_D)


def _backward(static, gradients, g):
    scaled = jax.tree.map(lambda a: (a * g[0]).astype(a.dtype), gradients)
    return *scaled, None, None, None


_head_loss.defvjp(_forward, _backward)
