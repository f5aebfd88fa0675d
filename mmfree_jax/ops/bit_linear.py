"""BitLinear: RMSNorm -> integer activations -> product with ternary weights, as one op with its own backward pass
(Zhu et al. 2024, arXiv 2406.02528, section 3.1 and Algorithm 1).

Both quantisers are straight-through: the backward pass treats rounding as the identity and scales as constants. It
keeps the input, one number per token, and the integer codes, never a dequantised copy.

Several products of one input go through one call (`w_GDF` holds G matrices): they share the norm's statistics, and
the codes too where they share the gain.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmfree_jax.ops.kernels.choice import on_hopper, one_device
from mmfree_jax.ops.rms_norm import reciprocal_rms, rms_norm_backward
from mmfree_jax.ops.ternary import Quantised, dequantise, quantise_activations, quantise_weights, wide
from mmfree_jax.sharding import constrain


class Recipe(NamedTuple):
    """What a BitLinear computes, apart from its arrays."""

    bits: int = 8  # of the activations; 0 leaves them as they are
    scale_axes: tuple[int, ...] = (-2, -1)  # axes of w_GDF that share one weight scale
    eps: float = 1e-6
    axes: tuple[str | None, str | None] = (None, None)  # logical names of the input and output axes of w


class Saved(NamedTuple):
    """What the backward pass needs of the input side."""

    x: jax.Array
    rstd: jax.Array | None
    gain: jax.Array | None
    inputs: tuple[Quantised, ...]  # one, or one a product where the products have their own gains


def bit_linear(recipe: Recipe, x: jax.Array, w_GDF: jax.Array, gain: jax.Array | None) -> tuple[jax.Array, ...]:
    """G ternary products of one input.

    Args:
        recipe: static options.
        x: [..., D] activations.
        w_GDF: latent weights, quantised per `recipe.scale_axes`.
        gain: of the RMSNorm before the quantiser: [D] shared by the products, [G, D] one each, None for no norm.

    Returns:
        G arrays [..., F] of x's type.
    """
    return _bit_linear(recipe, x, w_GDF, gain)


def quantise_input(recipe: Recipe, x: jax.Array, gain: jax.Array | None) -> Saved:
    """Norm and quantise x: the input side of `bit_linear`."""
    if gain is None:
        return Saved(x, None, None, (quantise_activations(x, recipe.bits),))
    rstd = reciprocal_rms(x, recipe.eps)
    x_hat = x.astype(rstd.dtype) * rstd
    gains = [gain] if gain.ndim == 1 else [gain[g] for g in range(gain.shape[0])]
    inputs = tuple(quantise_activations(x_hat * g.astype(rstd.dtype), recipe.bits) for g in gains)
    return Saved(x, rstd, gain, inputs)


def quantise_kernel(recipe: Recipe, w_GDF: jax.Array) -> Quantised:
    """Ternary codes of the weights, quantised where they live and only then gathered: one byte a weight travels."""
    codes, scale = quantise_weights(w_GDF, recipe.scale_axes)
    assert scale is not None
    into, out = recipe.axes
    codes = constrain(constrain(codes, None, into, out), None, None if into == "embed" else into, out)
    return Quantised(codes, jnp.broadcast_to(scale, (codes.shape[0], 1, scale.shape[-1])))


def product(x: Quantised, w: Quantised, dtype: Any, out: Any = None) -> jax.Array:
    """[..., D] x [D, F] of codes, then both scales, as `out` (default: `wide(dtype)`).

    Integers of these sizes are exact in bfloat16 and float32 alike, so the product does not depend on the type that
    carries them, nor on the integer units doing it.
    """
    out = wide(dtype) if out is None else out
    if _integer_units_serve(x, w, out):
        return _integer_product(x, w, out)
    y = jnp.matmul(x.codes.astype(dtype), w.codes.astype(dtype), preferred_element_type=wide(dtype))
    for scale in (x.scale, w.scale):
        y = y if scale is None else y * scale.astype(y.dtype)
    return y.astype(out)


def _integer_units_serve(x: Quantised, w: Quantised, out: Any) -> bool:
    """Whether the int8 kernel computes this product: whole blocks of int8 codes, one weight scale, bfloat16 wanted."""
    if x.scale is None or w.scale is None or w.scale.size != 1 or out != jnp.bfloat16:
        return False
    if not (on_hopper() and one_device()):
        return False
    from mmfree_jax.ops.kernels.int8_matmul import supports

    inner, columns = w.codes.shape
    return x.codes.dtype == jnp.int8 and supports(x.codes.size // inner, inner, columns)


def _integer_product(x: Quantised, w: Quantised, out: Any) -> jax.Array:
    from mmfree_jax.ops.kernels.int8_matmul import int8_matmul

    assert x.scale is not None
    assert w.scale is not None
    rows = x.codes.reshape(-1, x.codes.shape[-1])
    y = int8_matmul(rows, w.codes.T, x.scale.reshape(-1), w.scale.reshape(1), out)
    return y.reshape(*x.codes.shape[:-1], -1)


def product_backward(x: Quantised, w: Quantised, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `product` to the dequantised operands, straight through both quantisers.

    Returns the gradient to x [..., D] and to w [D, F], in `wide(dy.dtype)`.
    """
    exact = wide(dy.dtype)
    scaled = dy if w.scale is None or w.scale.size == 1 else (dy * w.scale).astype(dy.dtype)
    dx = jnp.matmul(scaled, w.codes.astype(dy.dtype).T, preferred_element_type=exact)
    if w.scale is not None and w.scale.size == 1:
        dx = dx * w.scale.reshape(()).astype(exact)
    return dx, outer(dequantise(x, dy.dtype), dy)


def outer(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient to w of x @ w, summed over all rows: [..., D], [..., F] -> [D, F] in `wide(dy.dtype)`."""
    rows = tuple(range(dy.ndim - 1))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=wide(dy.dtype))


def input_backward(saved: Saved, dys: list[jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    """Gradients to x and gain, given those to the quantised inputs, one for each product."""
    x, rstd, gain, inputs = saved
    if rstd is None or gain is None:
        return sum(dys[1:], dys[0]).astype(x.dtype), None
    if len(inputs) == 1:
        dys = [sum(dys[1:], dys[0])]
    gains = gain.reshape(len(inputs), -1).astype(rstd.dtype)
    x_hat = x.astype(rstd.dtype) * rstd
    rows = tuple(range(x.ndim - 1))
    dgain = jnp.stack([jnp.sum(dy * x_hat, axis=rows) for dy in dys]).reshape(gain.shape)
    through = [dy * gains[g] for g, dy in enumerate(dys)]
    dx = rms_norm_backward(x, rstd, sum(through[1:], through[0]))
    return dx.astype(x.dtype), dgain.astype(gain.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bit_linear(recipe: Recipe, x: jax.Array, w_GDF: jax.Array, gain: jax.Array | None):
    return _forward(recipe, x, w_GDF, gain)[0]


def _forward(recipe: Recipe, x: jax.Array, w_GDF: jax.Array, gain: jax.Array | None):
    saved = quantise_input(recipe, x, gain)
    kernel = quantise_kernel(recipe, w_GDF)
    ys = [product(q, w, x.dtype, x.dtype) for q, w in _pairs(saved.inputs, kernel)]
    like = jnp.zeros((), w_GDF.dtype)  # residuals are arrays: this one carries the weights' type
    return tuple(ys), (saved, kernel, like)


def _backward(recipe: Recipe, residuals, dys):
    saved, kernel, like = residuals
    pulled = [product_backward(q, w, dy) for (q, w), dy in zip(_pairs(saved.inputs, kernel), dys, strict=True)]
    dx, dgain = input_backward(saved, [dx for dx, _ in pulled])
    return dx, jnp.stack([dw for _, dw in pulled]).astype(like.dtype), dgain


def _pairs(inputs: tuple[Quantised, ...], kernel: Quantised) -> list[tuple[Quantised, Quantised]]:
    """Each product's input beside its matrix."""
    groups = kernel.codes.shape[0]
    assert kernel.scale is not None
    matrices = [Quantised(kernel.codes[g], kernel.scale[g]) for g in range(groups)]
    return list(zip(inputs * (groups if len(inputs) == 1 else 1), matrices, strict=True))


_bit_linear.defvjp(_forward, _backward)
