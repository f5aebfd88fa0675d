"""Ternary weights on a mesh: quantised where they live, gathered as codes, multiplied; their gradients brought back.

Products of integers run on the integer units of a Hopper GPU where a kernel serves, on each device's part.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.dense import outer
from mmfree_jax.ops.kernels.choice import on_hopper
from mmfree_jax.ops.prologue import Kind
from mmfree_jax.ops.ternary import (
    Quantised,
    pack,
    quantise_gradients,
    ternary_codes,
    unpack,
    weight_scale,
    wide,
)
from mmfree_jax.sharding import Axes, Names, Summed, constrain, packed_gathers, per_shard, rows_of, ways, whole


class Recipe(NamedTuple):
    """What a BitLinear computes, apart from its arrays."""

    bits: int = 8  # of the activations; 0 leaves them as they are
    scale_axes: tuple[int, ...] = (-2, -1)  # axes of w_GDF that share one weight scale
    eps: float = 1e-6
    axes: tuple[str | None, str | None] = (None, None)  # logical names of the input and output axes of w
    gradient_bits: int = 0  # 8: the gradient to an output is quantised for the product that gives the input's
    prologue: Kind = "plain"  # how the input is made of the arrays that are kept; set by `bit_linear`


class Unscaled(NamedTuple):
    """A gradient that is yet to be multiplied by a scalar; None stands for 1."""

    values: jax.Array
    factor: jax.Array | None

    def scaled(self, dtype: Any) -> jax.Array:
        """The gradient itself."""
        return (self.values if self.factor is None else self.values * self.factor).astype(dtype)


def quantise_kernel(recipe: Recipe, w_GDF: jax.Array) -> tuple[Quantised, ...]:
    """Ternary codes [D, F] of each matrix, quantised and left on the devices that hold the weights."""
    groups, names = w_GDF.shape[0], (None, *recipe.axes)
    scale = weight_scale(w_GDF, recipe.scale_axes, names)
    scale = jnp.broadcast_to(scale, (groups, 1, scale.shape[-1]))

    def one(g: int) -> Quantised:
        codes = constrain(ternary_codes(w_GDF[g], scale[g]), *recipe.axes)
        return Quantised(checkpoint_name(codes, "codes"), checkpoint_name(scale[g], "codes"))

    return tuple(one(g) for g in range(groups))


def gather_kernel(recipe: Recipe, kernel: tuple[Quantised, ...]) -> tuple[Quantised, ...]:
    """The codes of `quantise_kernel` with their fsdp shards put together: a byte a weight travels, or 2 bits."""

    def one(codes: jax.Array) -> jax.Array:
        if packed_gathers() and _packs(recipe, codes.shape):
            codes = unpack(constrain(constrain(pack(codes), *recipe.axes), *whole(recipe.axes)))
        return constrain(codes, *whole(recipe.axes))

    return tuple(q._replace(codes=one(q.codes)) for q in kernel)


def _packs(recipe: Recipe, shape: tuple[int, ...]) -> bool:
    """Whether codes are gathered at all, and rows that are packed together lie on one device."""
    cut = {name: (size, ways(name, size)) for name, size in zip(recipe.axes, shape, strict=True)}
    rows, shards = cut[recipe.axes[0]]
    return cut.get("embed", (0, 1))[1] > 1 and rows // shards % 4 == 0


def product(x: Quantised, w: Quantised, dtype: Any, out: Any = None, axes: Names = (None, None)) -> jax.Array:
    """[..., D] x [D, F] of codes, then both scales, as `out` (default: `wide(dtype)`).

    Integers of these sizes are exact in bfloat16 and float32 alike, so the product does not depend on the type that
    carries them, nor on the integer units doing it. `axes` are the logical names of w's axes.
    """
    out = wide(dtype) if out is None else out
    if _integer_units_serve(x, w, out, axes):
        return _integer_product(x, w, out, axes)
    y = jnp.matmul(x.codes.astype(dtype), w.codes.astype(dtype), preferred_element_type=wide(dtype))
    for scale in (x.scale, w.scale):
        y = y if scale is None else y * scale.astype(y.dtype)
    return y.astype(out)


def _integer_units_serve(x: Quantised, w: Quantised, out: Any, axes: Names) -> bool:
    """Whether the int8 kernel computes this product: whole blocks of int8 codes and whole sums on every device, one
    weight scale, bfloat16 wanted."""
    if x.scale is None or w.scale is None or w.scale.size != 1 or out != jnp.bfloat16 or not on_hopper():
        return False
    if ways(axes[0], w.codes.shape[0]) > 1:
        return False
    from mmfree_jax.ops.kernels.int8_matmul import supports

    rows = [size // ways(name, size) for name, size in zip(rows_of(x.codes.ndim), x.codes.shape[:-1], strict=False)]
    inner, columns = (size // ways(name, size) for name, size in zip(axes, w.codes.shape, strict=True))
    return x.codes.dtype == jnp.int8 and supports(math.prod(rows), inner, columns)


def _integer_product(x: Quantised, w: Quantised, out: Any, axes: Names) -> jax.Array:
    from mmfree_jax.ops.kernels.int8_matmul import int8_matmul

    def local(x_codes, x_scale, w_codes, w_scale):
        rows = x_codes.reshape(-1, x_codes.shape[-1])
        y = int8_matmul(rows, w_codes.T, x_scale.reshape(-1), w_scale.reshape(1), out)
        return (y.reshape(*x_codes.shape[:-1], -1),)

    rows, columns = rows_of(x.codes.ndim), rows_of(x.codes.ndim, axes[1])
    return per_shard(local, [rows, rows, axes, (None, None)], [columns], x.codes, x.scale, w.codes, w.scale)[0]


def input_gradient(w: Quantised, dy: jax.Array, bits: int = 0, axes: Names = (None, None), out: Any = None) -> Unscaled:
    """The gradient to the dequantised input [..., D] of `product`.

    With bits, dy is quantised by absmax per token first and the product is one of integers, as in SwitchBack
    (Wortsman et al. 2023, arXiv 2304.13013, section 2.2); the gradient to the weights never is. `axes` are w's. A
    weight scale that all of w shares is left to the caller, who may have a pass over the gradient to put it into: then
    `out` can be dy's type (default: at least float32), or a GPU writes float32 and converts it in another pass.
    """
    shared = None if w.scale is None or w.scale.size != 1 else w.scale.reshape(())
    dy = dy if w.scale is None or shared is not None else (dy * w.scale).astype(dy.dtype)
    if bits:
        scale = None if shared is None else shared.reshape(1, 1)
        codes = _quantised_gradient(dy, bits, axes[1])
        return Unscaled(product(codes, Quantised(w.codes.T, scale), dy.dtype, dy.dtype, axes[::-1]), None)
    dx = jnp.matmul(dy, w.codes.astype(dy.dtype).T, preferred_element_type=out or wide(dy.dtype))
    return Unscaled(dx, shared)


def _quantised_gradient(dy: jax.Array, bits: int, last: Axes) -> Quantised:
    """`quantise_gradients`, in one pass where the kernel serves; `last` names dy's last axis."""
    if not on_hopper() or bits != 8 or ways(last, dy.shape[-1]) > 1:
        return quantise_gradients(dy, bits)
    from mmfree_jax.ops.kernels import normed_codes

    if not normed_codes.supports(dy.shape[-1], 0, dy.dtype):
        return quantise_gradients(dy, bits)

    def local(dy):
        codes, scale = normed_codes.codes(dy.reshape(-1, dy.shape[-1]))
        return (Quantised(codes.reshape(dy.shape), scale.reshape(*dy.shape[:-1], 1)),)

    return per_shard(local, [rows_of(dy.ndim)], [rows_of(dy.ndim)], dy)[0]


def weight_gradients(recipe: Recipe, inputs: tuple[jax.Array, ...], dys: tuple[jax.Array, ...]) -> jax.Array:
    """`outer` for each matrix, [G, D, F], each summed where its weights live.

    In the type of dys, as the dense layers' are: the sum over a device's rows is in at least float32 and rounded once.
    """
    into, out = recipe.axes
    into, out = (name if ways(name, a.shape[-1]) > 1 else None for name, a in ((into, inputs[0]), (out, dys[0])))
    names = [rows_of(dys[0].ndim, name) for name in whole((into, out))]
    local = lambda inputs, dys: (jnp.stack([outer(x, dy) for x, dy in zip(spread(inputs, dys), dys, strict=True)]),)
    dw_GDF = per_shard(local, names, [Summed((None, into, out))], inputs, dys)[0]
    return constrain(dw_GDF, None, *recipe.axes)


def spread(inputs: tuple, kernel: tuple) -> tuple:
    """An input for each matrix: its own, or the one that all share."""
    return inputs * (len(kernel) if len(inputs) == 1 else 1)
