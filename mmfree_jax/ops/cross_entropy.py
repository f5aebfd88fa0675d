"""Language-model head and cross-entropy in one op that never holds the logits of more than a chunk of tokens.

Value and gradients are computed in the same pass over the chunks, so the logits are made once and the backward pass
only scales what the forward pass kept (Cut Your Losses, Wijmans et al. 2024, arXiv 2411.09009, recomputes instead).
log-sum-exp is in at least float32.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mmfree_jax.ops.bit_linear import (
    Recipe,
    Saved,
    input_backward,
    input_gradient,
    outer,
    product,
    quantise_input,
    quantise_kernel,
)
from mmfree_jax.ops.ternary import Quantised, dequantise, wide
from mmfree_jax.sharding import constrain

LOGITS_PER_CHUNK = {"cpu": 2**19, "gpu": 2**26, "tpu": 2**26}  # 2 MiB stay in a core's cache; 256 MiB of memory


def head_loss(
    recipe: Recipe | None,
    x_BTD: jax.Array,
    w_DV: jax.Array,
    gain_D: jax.Array | None,
    targets_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
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
        z_loss: adds z_loss * logsumexp^2 per token, which keeps logits near zero (PaLM, Chowdhery et al. 2022,
            arXiv 2204.02311, section 5).
        chunks: how many pieces the time axis is cut into; 0 chooses by device and size.

    Returns:
        a scalar in at least float32. The mask receives no gradient.
    """
    weights_BT = jnp.ones(targets_BT.shape, wide(x_BTD.dtype)) if mask_BT is None else mask_BT.astype(wide(x_BTD.dtype))
    static = (recipe, z_loss, chunks or chunk_count(x_BTD.shape[0], x_BTD.shape[1], w_DV.shape[1]))
    return _head_loss(static, x_BTD, w_DV, gain_D, targets_BT, weights_BT)


def head_nats(
    recipe: Recipe | None,
    x_BTD: jax.Array,
    w_DV: jax.Array,
    gain_D: jax.Array | None,
    targets_BT: jax.Array,
    *,
    chunks: int = 0,
) -> jax.Array:
    """Cross-entropy in nats of each token, [B, T], in at least float32; arguments as `head_loss`."""
    saved, kernel = _operands(recipe, x_BTD, w_DV, gain_D)
    count = chunks or chunk_count(x_BTD.shape[0], x_BTD.shape[1], w_DV.shape[1])
    pieces = _cut((saved.inputs[0], targets_BT), count)
    nats_CBT = jax.lax.map(lambda piece: _nats(piece[0], kernel, piece[1], x_BTD.dtype)[0], pieces)
    return _join(nats_CBT, x_BTD.shape[1])


def chunk_count(batch: int, time: int, vocab: int) -> int:
    """Pieces of the time axis that keep a chunk's logits within the device's budget."""
    budget = LOGITS_PER_CHUNK.get(jax.default_backend(), 2**26)
    return min(time, math.ceil(batch * time * vocab / budget))


def _operands(recipe, x_BTD, w_DV, gain_D) -> tuple[Saved, Quantised]:
    """Both sides of the head's product as codes and scales; a dense head is codes without a scale."""
    if recipe is None:
        return Saved((x_BTD,), None, None, None, (Quantised(x_BTD, None),)), Quantised(w_DV.astype(x_BTD.dtype), None)
    return quantise_input(recipe, (x_BTD,), None, gain_D), quantise_kernel(recipe, w_DV[None])[0]


def _nats(x: Quantised, kernel: Quantised, targets_BT, dtype):
    """Nats of each token of one chunk, its logits and their log-sum-exp."""
    logits_BTV = constrain(product(x, kernel, dtype), "batch", "time", "vocab")
    total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    hit_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return total_BT - hit_BT, logits_BTV, total_BT


def _loss(x: Quantised, kernel: Quantised, targets_BT, weights_BT, z_loss: float, dtype) -> jax.Array:
    nats_BT, _, total_BT = _nats(x, kernel, targets_BT, dtype)
    return jnp.sum((nats_BT + z_loss * total_BT**2) * weights_BT)


def _loss_and_gradients(x: Quantised, kernel: Quantised, targets_BT, weights_BT, z_loss: float, dtype):
    """Loss of one chunk and its gradients to the dequantised operands."""
    nats_BT, logits_BTV, total_BT = _nats(x, kernel, targets_BT, dtype)
    loss = jnp.sum((nats_BT + z_loss * total_BT**2) * weights_BT)
    pull_BT = weights_BT * (1 + 2 * z_loss * total_BT)
    chosen_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2) == targets_BT[..., None]
    softmax_BTV = jnp.exp(logits_BTV - total_BT[..., None])
    g_BTV = softmax_BTV * pull_BT[..., None] - jnp.where(chosen_BTV, weights_BT[..., None], 0)
    g_BTV = g_BTV.astype(dtype)
    return loss, (input_gradient(kernel, g_BTV), outer(dequantise(x, dtype), g_BTV))


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
def _head_loss(static, x_BTD, w_DV, gain_D, targets_BT, weights_BT) -> jax.Array:
    recipe, z_loss, chunks = static
    saved, kernel = _operands(recipe, x_BTD, w_DV, gain_D)

    def one(total, piece):
        return total + _loss(piece[0], kernel, piece[1], piece[2], z_loss, x_BTD.dtype), None

    pieces = _cut((saved.inputs[0], targets_BT, weights_BT), chunks)
    return jax.lax.scan(one, jnp.zeros((), weights_BT.dtype), pieces)[0]


def _forward(static, x_BTD, w_DV, gain_D, targets_BT, weights_BT):
    recipe, z_loss, chunks = static
    saved, kernel = _operands(recipe, x_BTD, w_DV, gain_D)

    def one(carry, piece):
        loss, (dx_BTD, dw_DV) = _loss_and_gradients(piece[0], kernel, piece[1], piece[2], z_loss, x_BTD.dtype)
        return (carry[0] + loss, carry[1] + dw_DV), dx_BTD

    zero = (jnp.zeros((), weights_BT.dtype), jnp.zeros(w_DV.shape, weights_BT.dtype))
    pieces = _cut((saved.inputs[0], targets_BT, weights_BT), chunks)
    (loss, dw_DV), dx_CBTD = jax.lax.scan(one, zero, pieces)
    (dx_BTD,), _, dgain_D = input_backward(recipe or Recipe(), saved, [_join(dx_CBTD, x_BTD.shape[1])])
    return loss, (dx_BTD, dw_DV.astype(w_DV.dtype), dgain_D)


def _backward(static, gradients, g):
    scaled = jax.tree.map(lambda a: (a * g).astype(a.dtype), gradients)
    return *scaled, None, None


_head_loss.defvjp(_forward, _backward)
