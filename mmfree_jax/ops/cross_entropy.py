"""Language-model head and cross-entropy in one op that never holds the logits of more than a chunk of tokens.

Value and gradients are computed in the same pass over the chunks, so the logits are made once and the backward pass
only scales what the forward pass kept (Cut Your Losses, Wijmans et al. 2024, arXiv 2411.09009, recomputes instead).
log-sum-exp is in at least float32.

On a mesh every device computes the logits of its rows and its part of the vocabulary; one number per token travels.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mmfree_jax.devices import backend
from mmfree_jax.ops.bit_linear import Saved, input_backward, quantise_input
from mmfree_jax.ops.dense import outer
from mmfree_jax.ops.ternary import Quantised, dequantise, wide
from mmfree_jax.ops.ternary_weights import Recipe, gather_kernel, input_gradient, product, quantise_kernel
from mmfree_jax.sharding import Names, Summed, axis_if_cut, constrain, gathered, per_shard, ways

LOGITS_PER_CHUNK = {"cpu": 2**19, "gpu": 2**26, "tpu": 2**26}  # 2 MiB stay in a core's cache; 256 MiB of memory
TOKENS: Names = ("batch", "time")  # logical names of the operands
ROWS: Names = (*TOKENS, None)
KERNEL: Names = (None, "vocab")


def head_loss(
    recipe: Recipe | None,
    x_BTD: jax.Array,
    w_DV: jax.Array,
    gain_D: jax.Array | None,
    targets_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    kernel: Quantised | None = None,
    vocab: int = 0,
    z_loss: float = 0.0,
    chunks: int = 0,
) -> jax.Array:
    """Sum over tokens of the cross-entropy in nats.

    Args:
        recipe: of a ternary head (`bit_linear.Recipe`); None for a dense one.
        x_BTD: hidden states.
        w_DV: head weights.
        gain_D: of the head's own norm, ternary heads only; None for no norm.
        targets_BT: int32 token to predict at each position.
        mask_BT: weight of each position, 0 to leave it out; None counts all.
        kernel: what `quantise_kernel` made of w_DV, where that was done ahead.
        vocab: how many columns of w_DV are tokens; those after them are padding, which has no probability and receives
            no gradient. 0: all.
        z_loss: adds z_loss * logsumexp^2 per token, which keeps logits near zero (PaLM, Chowdhery et al. 2022,
            arXiv 2204.02311, section 5).
        chunks: how many pieces the time axis is cut into; 0 chooses by device and size.

    Returns:
        a scalar in at least float32. The mask receives no gradient.
    """
    operands = recipe, x_BTD, w_DV, gain_D, targets_BT, mask_BT
    return head_losses(*operands, kernel=kernel, vocab=vocab, z_loss=z_loss, chunks=chunks)[0]


def head_losses(
    recipe: Recipe | None,
    x_BTD: jax.Array,
    w_DV: jax.Array,
    gain_D: jax.Array | None,
    targets_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    kernel: Quantised | None = None,
    vocab: int = 0,
    z_loss: float = 0.0,
    chunks: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """What `head_loss` returns, and the part of it that is the z-loss, for logs: it has no gradient."""
    weights_BT = jnp.ones(targets_BT.shape, wide(x_BTD.dtype)) if mask_BT is None else mask_BT.astype(wide(x_BTD.dtype))
    return _head_loss((recipe, vocab, z_loss, chunks), x_BTD, w_DV, gain_D, targets_BT, weights_BT, kernel)


def head_nats(
    recipe: Recipe | None,
    x_BTD: jax.Array,
    w_DV: jax.Array,
    gain_D: jax.Array | None,
    targets_BT: jax.Array,
    *,
    vocab: int = 0,
    chunks: int = 0,
) -> jax.Array:
    """Cross-entropy in nats of each token, [B, T], in at least float32; arguments as `head_loss`."""
    saved, kernel = _operands(recipe, x_BTD, w_DV, gain_D)
    axis = axis_if_cut("vocab", w_DV.shape[1])

    def local(x, kernel, targets_BT):
        count = chunks or chunk_count(targets_BT, kernel)
        one = lambda piece: _nats(piece[0], kernel, piece[1], x_BTD.dtype, axis, vocab)[0]
        return (_join(jax.lax.map(one, _cut((x, targets_BT), count)), targets_BT.shape[1]),)

    return per_shard(local, [ROWS, KERNEL, TOKENS], [TOKENS], saved.inputs[0], kernel, targets_BT)[0]


def largest_logits(
    recipe: Recipe | None,
    x_BTD: jax.Array,
    w_DV: jax.Array,
    gain_D: jax.Array | None,
    *,
    vocab: int = 0,
) -> jax.Array:
    """The largest magnitude of each token's logits, [B, T], in at least float32; arguments as `head_loss`."""
    saved, kernel = _operands(recipe, x_BTD, w_DV, gain_D)
    axis = axis_if_cut("vocab", w_DV.shape[1])
    time = jnp.zeros(x_BTD.shape[:2], jnp.int32)

    def local(x, kernel, like_BT):
        def one(piece):
            sizes_BTV = jnp.abs(product(piece, kernel, x_BTD.dtype))
            top_BT = jnp.max(without_padding(sizes_BTV, vocab, _first(sizes_BTV, axis)), axis=-1)
            return top_BT if axis is None else jax.lax.pmax(top_BT, axis)

        return (_join(jax.lax.map(one, _cut(x, chunk_count(like_BT, kernel))), like_BT.shape[1]),)

    return per_shard(local, [ROWS, KERNEL, TOKENS], [TOKENS], saved.inputs[0], kernel, time)[0]


def chunk_count(targets_BT: jax.Array, kernel: Quantised) -> int:
    """Pieces of the time axis that keep a chunk's logits within the device's budget."""
    budget = LOGITS_PER_CHUNK.get(backend(), 2**26)
    return min(targets_BT.shape[1], math.ceil(targets_BT.size * kernel.codes.shape[1] / budget))


def _operands(recipe, x_BTD, w_DV, gain_D, kernel: Quantised | None = None) -> tuple[Saved, Quantised]:
    """Both sides of the head's product as codes and scales; a dense head is codes without a scale."""
    if recipe is None:
        kernel_DV = gathered(w_DV.astype(x_BTD.dtype), ("embed", "vocab"))
        return Saved((x_BTD,), None, None, None, (Quantised(x_BTD, None),)), Quantised(kernel_DV, None)
    shards = quantise_kernel(recipe, w_DV[None]) if kernel is None else (kernel,)
    (kernel,) = gather_kernel(recipe, shards)
    return quantise_input(recipe, (x_BTD,), None, gain_D), kernel


def _nats(x: Quantised, kernel: Quantised, targets_BT, dtype, axis: str | None, vocab: int):
    """Nats of each token of one chunk, its logits and their log-sum-exp; `axis` of the mesh cuts the vocabulary."""
    logits_BTV = product(x, kernel, dtype)
    logits_BTV = without_padding(logits_BTV, vocab, _first(logits_BTV, axis))
    total_BT = _log_sum_exp(logits_BTV, axis)
    hit_BT = jnp.sum(jnp.where(_chosen(logits_BTV, targets_BT, axis), logits_BTV, 0), axis=-1)
    return total_BT - _summed(hit_BT, axis), logits_BTV, total_BT


def _log_sum_exp(logits_BTV: jax.Array, axis: str | None) -> jax.Array:
    top_BT = jnp.max(logits_BTV, axis=-1)
    top_BT = top_BT if axis is None else jax.lax.pmax(top_BT, axis)
    return top_BT + jnp.log(_summed(jnp.sum(jnp.exp(logits_BTV - top_BT[..., None]), axis=-1), axis))


def _first(logits_BTV: jax.Array, axis: str | None) -> jax.Array | int:
    """The token of this device's first column, where the vocabulary is cut."""
    return 0 if axis is None else jax.lax.axis_index(axis) * logits_BTV.shape[2]


def without_padding(logits: jax.Array, vocab: int, first: jax.Array | int = 0) -> jax.Array:
    """Logits [..., V] with the lowest finite number for padding: tokens from `vocab` on (0: no padding).

    first: token of the first column. The number is finite so that differences, and products with its probability of 0,
    are not NaN.
    """
    if vocab == 0:
        return logits
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) + first
    return jnp.where(token < vocab, logits, jnp.finfo(logits.dtype).min)


def _chosen(logits_BTV: jax.Array, targets_BT: jax.Array, axis: str | None) -> jax.Array:
    """True at each token's target."""
    token = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    return token + _first(logits_BTV, axis) == targets_BT[..., None]


def _summed(a: jax.Array, axis: str | None) -> jax.Array:
    return a if axis is None else jax.lax.psum(a, axis)


def _sums(nats_BT: jax.Array, total_BT: jax.Array, weights_BT: jax.Array, z_loss: float) -> jax.Array:
    """Loss of a chunk, a scalar; with a z-loss an array [2] of the loss and the z-loss in it."""
    loss = jnp.sum((nats_BT + z_loss * total_BT**2) * weights_BT)
    return jnp.stack([loss, z_loss * jnp.sum(total_BT**2 * weights_BT)]) if z_loss else loss


def _no_sums(z_loss: float, dtype) -> jax.Array:
    return jnp.zeros((2,) if z_loss else (), dtype)


def _parts(sums: jax.Array, z_loss: float) -> tuple[jax.Array, jax.Array]:
    return (sums[0], sums[1]) if z_loss else (sums, jnp.zeros_like(sums))


def _loss_and_gradients(kernel: Quantised, piece: tuple, vocab: int, z_loss: float, dtype, axis: str | None):
    """Loss of one chunk and its gradients to the dequantised operands; that to x sums this device's vocabulary only."""
    x, targets_BT, weights_BT = piece
    nats_BT, logits_BTV, total_BT = _nats(x, kernel, targets_BT, dtype, axis, vocab)
    loss = _sums(nats_BT, total_BT, weights_BT, z_loss)
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
def _head_loss(static, x_BTD, w_DV, gain_D, targets_BT, weights_BT, kernel) -> tuple[jax.Array, jax.Array]:
    recipe, vocab, z_loss, chunks = static
    saved, kernel = _operands(recipe, x_BTD, w_DV, gain_D, kernel)
    axis = axis_if_cut("vocab", w_DV.shape[1])

    def local(x, kernel, targets_BT, weights_BT):
        def one(total, piece):
            nats_BT, _, total_BT = _nats(piece[0], kernel, piece[1], x_BTD.dtype, axis, vocab)
            return total + _sums(nats_BT, total_BT, piece[2], z_loss), None

        pieces = _cut((x, targets_BT, weights_BT), chunks or chunk_count(targets_BT, kernel))
        return (jax.lax.scan(one, _no_sums(z_loss, weights_BT.dtype), pieces)[0],)

    arguments = saved.inputs[0], kernel, targets_BT, weights_BT
    return _parts(per_shard(local, [ROWS, KERNEL, TOKENS, TOKENS], [Summed(())], *arguments)[0], z_loss)


def _forward(static, x_BTD, w_DV, gain_D, targets_BT, weights_BT, kernel):
    recipe, vocab, z_loss, chunks = static
    saved, kernel = _operands(recipe, x_BTD, w_DV, gain_D, kernel)
    axis = axis_if_cut("vocab", w_DV.shape[1])

    def local(x, kernel, targets_BT, weights_BT):
        kernel = kernel._replace(codes=kernel.codes.astype(x_BTD.dtype))  # once, not in every chunk

        def one(carry, piece):
            loss, (dx_BTD, dw_DV) = _loss_and_gradients(kernel, piece, vocab, z_loss, x_BTD.dtype, axis)
            return (carry[0] + loss, carry[1] + dw_DV), _summed(dx_BTD, axis)

        zero = (_no_sums(z_loss, weights_BT.dtype), jnp.zeros(kernel.codes.shape, weights_BT.dtype))
        pieces = _cut((x, targets_BT, weights_BT), chunks or chunk_count(targets_BT, kernel))
        (loss, dw_DV), dx_CBTD = jax.lax.scan(one, zero, pieces)
        return loss, dw_DV, _join(dx_CBTD, targets_BT.shape[1])

    arguments = saved.inputs[0], kernel, targets_BT, weights_BT
    # Gradients to the weights are summed over devices once, not once a chunk.
    into = "embed" if ways("embed", w_DV.shape[0]) > 1 else None
    results: list[Names | Summed] = [Summed(()), Summed((into, "vocab")), ROWS]
    loss, dw_DV, dx_BTD = per_shard(local, [ROWS, KERNEL, TOKENS, TOKENS], results, *arguments)
    dw_DV = constrain(dw_DV, "embed", "vocab").astype(w_DV.dtype)
    (dx_BTD,), _, dgain_D = input_backward(recipe or Recipe(), saved, [dx_BTD])
    return _parts(loss, z_loss), (dx_BTD, dw_DV, dgain_D)


def _backward(static, gradients, g):
    scaled = jax.tree.map(lambda a: (a * g[0]).astype(a.dtype), gradients)
    return *scaled, None, None, None


_head_loss.defvjp(_forward, _backward)
