"""The two ends of a language model: the embedding; the head and the cross-entropy of its logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear
from mmfree_jax.ops.fast.choice import op
from mmfree_jax.ops.ternary import Quantised, wide


class Head(NamedTuple):
    """A linear layer from hidden states to logits.

    recipe: of the layer. w_DV: weights. gain_D: of a ternary head's own norm; None for no norm. codes: what
    `quantise_kernel` made of w_DV, where that was done ahead. vocab: how many columns of w_DV are tokens; those after
    them are padding, which has no probability and gets no gradient; 0: all are tokens.
    """

    recipe: Recipe
    w_DV: jax.Array
    gain_D: jax.Array | None = None
    codes: Quantised | None = None
    vocab: int = 0


class Losses(NamedTuple):
    """Scalars in at least float32."""

    total: jax.Array  # sum of the targets' cross-entropies, z-loss included: what is minimised
    targets: jax.Array  # how many there are, each counted by its weight
    z_loss: jax.Array  # the part of the total that it is; it has no gradient


@op
def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Look up token embeddings: rows of the table as `dtype`, [B, T, D]."""
    return table_VD[tokens_BT].astype(dtype)


def head_logits(head: Head, x_BTD: jax.Array) -> jax.Array:
    """Compute logits [B, T, V] in at least float32; those of padding are the lowest finite number."""
    # Logits are sums over the whole width: they are accumulated in float32, even where activations are bfloat16.
    recipe, w_DV, gain_D, codes, vocab = head
    if recipe.ternary:
        (logits_BTV,) = bit_linear(recipe, x_BTD, Weights(w_DV[None], gain_D, None if codes is None else (codes,)))
    else:
        logits_BTV = jnp.matmul(x_BTD, w_DV.astype(x_BTD.dtype), preferred_element_type=wide(x_BTD.dtype))
    return mask_padding(logits_BTV.astype(wide(x_BTD.dtype)), vocab)


@op
def head_nats(head: Head, x_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Compute the cross-entropy of each target in nats, [B, T], in at least float32."""
    logits_BTV = head_logits(head, x_BTD)
    hit_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - hit_BT


@op
def head_loss(
    head: Head, x_BTD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array | None = None, z_loss: float = 0.0
) -> Losses:
    """Sum the cross-entropy over tokens, in nats.

    Args:
        x_BTD: hidden states.
        targets_BT: int32 token to predict at each position.
        mask_BT: weight of each position, 0 to leave it out; None counts all. It gets no gradient.
        z_loss: adds z_loss * logsumexp^2 per token, which keeps logits near zero (PaLM, Chowdhery et al. 2022,
            arXiv 2204.02311, section 5).
    """
    logits_BTV = head_logits(head, x_BTD)
    # -log softmax(logits)[target] = logsumexp(logits) - logits[target]
    total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    hit_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    # No max is subtracted here: `logsumexp` does so itself, and its gradient is the softmax.
    weights_BT = jnp.ones_like(total_BT) if mask_BT is None else jax.lax.stop_gradient(mask_BT.astype(total_BT.dtype))
    z = z_loss * jnp.sum(total_BT**2 * weights_BT)
    total = jnp.sum((total_BT - hit_BT) * weights_BT) + z
    return Losses(total, jnp.sum(weights_BT), jax.lax.stop_gradient(z))


@op
def largest_logits(head: Head, x_BTD: jax.Array) -> jax.Array:
    """Compute the largest magnitude of each token's logits, [B, T], in at least float32, padding left out."""
    sizes_BTV = jnp.abs(head_logits(head._replace(vocab=0), x_BTD))
    return jnp.max(mask_padding(sizes_BTV, head.vocab), axis=-1)


def mask_padding(logits: jax.Array, vocab: int, first: jax.Array | int = 0) -> jax.Array:
    """Set the logits [..., V] of padding, tokens from `vocab` on (0: no padding), to the lowest finite number.

    first: token of the first column. The number is finite so that differences, and products with its probability of 0,
    are not NaN.
    """
    if vocab == 0:
        return logits
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) + first
    return jnp.where(token < vocab, logits, jnp.finfo(logits.dtype).min)
