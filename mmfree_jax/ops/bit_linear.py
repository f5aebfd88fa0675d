"""RMSNorm and linear layers: the dense one of the Transformer++, and BitLinear with ternary weights (Zhu et al. 2024,
arXiv 2406.02528, section 3.1 and Algorithm 1).

BitLinear is RMSNorm -> integer activations -> product with ternary weights. Both quantisers are straight-through.
Several products of one input go through one call: `w_GDF` holds G matrices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmfree_jax.ops.fast.choice import op
from mmfree_jax.ops.ternary import (
    Quantised,
    best_scale,
    quantise_activations,
    straight_through,
    ternary_codes,
    weight_scale,
    wide,
)


class Recipe(NamedTuple):
    """What a linear layer computes, apart from its arrays."""

    ternary: bool = True  # False: a dense layer, of which only `axes` matters
    bits: int = 8  # of the activations; 0 leaves them as they are
    scale_axes: tuple[int, ...] = (-2, -1)  # axes of w_GDF that share one weight scale
    eps: float = 1e-6
    axes: tuple[str | None, str | None] = (None, None)  # logical names of the input and output axes of w
    gradient_bits: int = 0  # 8: `ops.fast` quantises gradients to outputs too; the definition's are exact
    columns: int = 0  # of the output axis, before the padding that has no part in the scale; 0: there is none
    best_scale: bool = False  # the weights' scale is that of least squares, not the mean magnitude


class Weights(NamedTuple):
    """The arrays of G linear layers with one input.

    w_GDF: latent weights, quantised per `Recipe.scale_axes`. gain: of the RMSNorm before the quantiser: [D] shared by
    the products, [G, D] one each, None for no norm. codes: what `quantise_kernel` made of w_GDF, where that was done
    ahead; gradients go to w_GDF all the same.
    """

    w_GDF: jax.Array
    gain: jax.Array | None = None
    codes: tuple[Quantised, ...] | None = None


@op
def rms_norm(x: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
    """Normalise by the root mean square: x / rms(x) * gain (Zhang & Sennrich 2019, arXiv 1910.07467).

    Shapes: x [..., D], gain [D]. Computed in at least float32, returned in x's type.
    """
    exact = x.astype(wide(x.dtype))
    rstd = jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + eps)
    return (exact * rstd * gain_D.astype(exact.dtype)).astype(x.dtype)


@op
def linear(recipe: Recipe, x: jax.Array, weights: Any) -> tuple[jax.Array, ...]:
    """Apply G linear layers, ternary or dense, to one input: [..., D] -> G arrays [..., F] of x's type.

    weights: `Weights`, or another form that has a `linear` of its own (`ops.served_linear.PackedWeights`).
    """
    if not isinstance(weights, Weights):
        return weights.linear(recipe, x)
    if recipe.ternary:
        return bit_linear(recipe, x, weights)
    return tuple(jnp.matmul(x, w_DF) for w_DF in weights.w_GDF.astype(x.dtype))


@op
def bit_linear(recipe: Recipe, x: jax.Array, weights: Weights) -> tuple[jax.Array, ...]:
    """Apply G BitLinear layers to one input: [..., D] -> G arrays [..., F] of x's type.

    Norms and quantisers compute in at least float32; their results are rounded to x's type before the product.
    """
    w_GDF, gain, codes = weights
    exact, ys = wide(x.dtype), []
    for g, kernel in enumerate(codes or quantise_kernel(recipe, w_GDF)):
        # x / rms(x) * gain, then q = round(127 u / max |u|) for each token.
        u = x.astype(exact)
        if gain is not None:
            u = rms_norm(u, gain if gain.ndim == 1 else gain[g], recipe.eps)
        if recipe.bits:
            u = straight_through(u, quantise_activations(u, recipe.bits))
        # t = round(W / mean |W|) in {-1, 0, 1}: the product has no multiplications, only signs.
        w_DF = straight_through(w_GDF[g].astype(exact), kernel)
        ys.append(jnp.matmul(u.astype(x.dtype), w_DF.astype(x.dtype)))
    return tuple(ys)


@op
def quantise_kernel(recipe: Recipe, w_GDF: jax.Array) -> tuple[Quantised, ...]:
    """Quantise the G matrices of a BitLinear: ternary codes [D, F] and their scale, [1, 1] or [1, F], of each.

    Columns of padding have code zero and no part in a scale that columns share.
    """
    # A padded vocabulary must not change the model: padding is made zero before the mean of magnitudes, and the mean is
    # taken over the columns that exist.
    groups, _, columns = w_GDF.shape
    if recipe.columns:
        w_GDF = jnp.where(jnp.arange(columns) < recipe.columns, w_GDF, 0)
    scale = weight_scale(w_GDF, recipe.scale_axes)
    if recipe.columns and -1 in recipe.scale_axes:  # a mean that counts zeros which are not there
        scale = scale * (columns / recipe.columns)
    if recipe.best_scale:
        scale = best_scale(w_GDF, recipe.scale_axes, scale)
    scale = jnp.broadcast_to(scale, (groups, 1, scale.shape[-1]))
    return tuple(Quantised(ternary_codes(w_GDF[g], scale[g]), scale[g]) for g in range(groups))
