"""Ternary weights on a mesh: quantised where they live, gathered as codes, multiplied; their gradients brought back.

Products of integers run on the integer units of a Hopper GPU where a kernel serves, on each device's part.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.dense import outer
from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast.choice import Use
from mmfree_jax.ops.prologue import Kind
from mmfree_jax.ops.ternary import (
    TOP,
    Quantised,
    column_codes,
    column_scale,
    dequantise,
    pack,
    quantise_gradients,
    ternary_codes,
    unpack,
    weight_scale,
    wide,
)
from mmfree_jax.sharding import Names, Summed, constrain, packed_gathers, per_shard, rows_of, ways, whole


class Recipe(NamedTuple):
    """What a BitLinear computes, apart from its arrays."""

    bits: int = 8  # of the activations; 0 leaves them as they are
    scale_axes: tuple[int, ...] = (-2, -1)  # axes of w_GDF that share one weight scale
    eps: float = 1e-6
    axes: tuple[str | None, str | None] = (None, None)  # logical names of the input and output axes of w
    gradient_bits: int = 0  # 8: the gradient to an output is quantised, and both products of it are of integers
    columns: int = 0  # of the output axis, before the padding that has no part in the scale; 0: there is none
    # Set by the ops, not by their callers:
    prologue: Kind = "plain"  # how the input is made of the arrays that are kept
    beside: bool = False  # whether an extra gradient for the first source (from the residual) is added to its gradient
    onward: bool = False  # whether gradients to the sources are quantised for the products that made them


class Unscaled(NamedTuple):
    """A gradient that is yet to be multiplied by a scalar; None stands for 1."""

    values: jax.Array
    factor: jax.Array | None

    def scaled(self, dtype: Any) -> jax.Array:
        """The gradient itself."""
        return (self.values if self.factor is None else self.values * self.factor).astype(dtype)


class GradientCodes(NamedTuple):
    """The gradient to an output, quantised for both of its products."""

    rows: Quantised  # times the weights' scale where every column has its own; one scale a token
    largest: jax.Array | None  # magnitude of `rows` times the input's scale in each column, of each device: [.., .., F]


def quantise_kernel(recipe: Recipe, w_GDF: jax.Array) -> tuple[Quantised, ...]:
    """Ternary codes [D, F] of each matrix, quantised and left on the devices that hold the weights."""
    groups, names = w_GDF.shape[0], (None, *recipe.axes)
    w_GDF = without_padding(recipe, w_GDF)
    scale = weight_scale(w_GDF, recipe.scale_axes, names)
    if recipe.columns and -1 in recipe.scale_axes:  # a mean that counts zeros which are not there
        scale = scale * (w_GDF.shape[-1] / recipe.columns)
    scale = jnp.broadcast_to(scale, (groups, 1, scale.shape[-1]))

    def one(g: int) -> Quantised:
        codes = constrain(ternary_codes(w_GDF[g], scale[g]), *recipe.axes)
        return Quantised(checkpoint_name(codes, "codes"), checkpoint_name(scale[g], "codes"))

    return tuple(one(g) for g in range(groups))


def without_padding(recipe: Recipe, w_GDF: jax.Array) -> jax.Array:
    """The weights with zeros in the columns that are padding."""
    if not recipe.columns:
        return w_GDF
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, w_GDF.shape, w_GDF.ndim - 1) < recipe.columns, w_GDF, 0)


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


def product(
    x: Quantised, w: Quantised, dtype: Any, out: Any = None, axes: Names = (None, None), turned: bool = False
) -> jax.Array:
    """[..., D] x [D, F] of codes, or turned [..., F] x [D, F]^T, then both scales, as `out` (default: `wide(dtype)`).

    Integers of these sizes are exact in bfloat16 and float32 alike, so the product does not depend on the type that
    carries them, nor on the integer units doing it. `axes` are the logical names of w's axes.
    """
    out = wide(dtype) if out is None else out
    if _integer_units_serve(x, w, out, axes, turned):
        return _integer_product(x, w, axes, turned)
    w_codes = w.codes.astype(dtype)
    y = jnp.matmul(x.codes.astype(dtype), w_codes.T if turned else w_codes, preferred_element_type=wide(dtype))
    for scale in (x.scale, w.scale):
        y = y if scale is None else y * scale.astype(y.dtype)
    return y.astype(out)


def _integer_units_serve(x: Quantised, w: Quantised, out: Any, axes: Names, turned: bool) -> bool:
    """Whether the int8 kernels compute this product: whole blocks of int8 codes and whole sums on every device, one
    weight scale, bfloat16 wanted."""
    if x.scale is None or w.scale is None or w.scale.size != 1 or out != jnp.bfloat16 or not choice.available():
        return False
    if ways(axes[turned], w.codes.shape[turned]) > 1:
        return False
    from mmfree_jax.ops.kernels import int8_matmul, transposed_codes

    rows = local_rows(x.codes)
    shape = [size // ways(name, size) for name, size in zip(axes, w.codes.shape, strict=True)]
    inner, columns = reversed(shape) if turned else shape
    whole_blocks = int8_matmul.supports(rows, inner, columns) and transposed_codes.supports(inner, columns)
    if x.codes.dtype != jnp.int8 or not whole_blocks:
        return False
    turning = [] if turned else [Use("transposed_codes", (inner, columns), (False,))]
    return all(map(choice.serves, [*turning, Use("int8_matmul", (rows, inner, columns), (False,))]))


def local_rows(x: jax.Array) -> int:
    """How many rows of x [..., D] lie on one device."""
    return math.prod(size // ways(name, size) for name, size in zip(rows_of(x.ndim), x.shape[:-1], strict=False))


def _integer_product(x: Quantised, w: Quantised, axes: Names, turned: bool) -> jax.Array:
    from mmfree_jax.ops.kernels.int8_matmul import int8_matmul
    from mmfree_jax.ops.kernels.transposed_codes import transposed

    def local(x_codes, x_scale, w_codes, w_scale):
        rows = x_codes.reshape(-1, x_codes.shape[-1])
        summed_last = w_codes if turned else transposed(w_codes)
        y = int8_matmul(rows, summed_last, x_scale.reshape(-1), w_scale.reshape(1))
        return (y.reshape(*x_codes.shape[:-1], -1),)

    rows, columns = rows_of(x.codes.ndim), rows_of(x.codes.ndim, axes[not turned])
    return per_shard(local, [rows, rows, axes, (None, None)], [columns], x.codes, x.scale, w.codes, w.scale)[0]


def input_gradient(w: Quantised, dy: jax.Array, axes: Names = (None, None), out: Any = None) -> Unscaled:
    """The gradient to the dequantised input [..., D] of `product`. `axes` are the logical names of w's.

    A weight scale that all of w shares is left to the caller, who may have a pass over the gradient to put it into:
    then `out` can be dy's type (default: at least float32), or a GPU writes float32 and converts it in another pass.
    """
    dx = jnp.matmul(_per_channel(w, dy), w.codes.astype(dy.dtype).T, preferred_element_type=out or wide(dy.dtype))
    return Unscaled(dx, _shared_scale(w))


def integer_input_gradient(w: Quantised, codes: GradientCodes, dtype: Any, axes: Names = (None, None)) -> Unscaled:
    """`input_gradient` as a product of integers, [..., D] as `dtype` (SwitchBack, Wortsman et al. 2023, arXiv
    2304.13013, section 2.2)."""
    shared = _shared_scale(w)
    scaled = w._replace(scale=None if shared is None else shared.reshape(1, 1))
    return Unscaled(product(codes.rows, scaled, dtype, dtype, axes, turned=True), None)


def _shared_scale(w: Quantised) -> jax.Array | None:
    return None if w.scale is None or w.scale.size != 1 else w.scale.reshape(())


def _per_channel(w: Quantised, dy: jax.Array) -> jax.Array:
    return dy if w.scale is None or w.scale.size == 1 else (dy * w.scale).astype(dy.dtype)


def gradient_codes(
    recipe: Recipe, w: Quantised, dy: jax.Array | GradientCodes, x_scale: jax.Array | None
) -> GradientCodes:
    """8-bit codes of dy [..., F] by absmax per token, if it is not codes yet; x_scale [..., 1]: of the product's
    input."""
    if isinstance(dy, GradientCodes):
        return dy
    dy = _per_channel(w, dy)
    use = Use("row_codes", (local_rows(dy), dy.shape[-1]), (str(dy.dtype), x_scale is not None))
    if not (one_pass_codes(recipe, dy.shape[-1], dy.dtype) and choice.serves(use)):
        return GradientCodes(quantise_gradients(dy, recipe.gradient_bits), None)
    from mmfree_jax.ops.kernels.normed_codes import codes

    def local(dy, by):
        found = codes(dy.reshape(-1, dy.shape[-1]), None if by is None else by.reshape(-1))
        return codes_of_rows(found, dy.shape)

    rows = rows_of(dy.ndim)
    return GradientCodes(*per_shard(local, [rows, rows], [rows, rows], dy, x_scale))


def codes_of_rows(found: tuple[jax.Array, jax.Array, jax.Array | None], shape: tuple[int, ...]) -> GradientCodes:
    """What a kernel found, `normed_codes.RowCodes` of a gradient of this shape. On a mesh, of a device's part of it."""
    codes, scales, largest = found
    rows = Quantised(codes.reshape(shape), scales.reshape(*shape[:-1], 1))
    return GradientCodes(rows, None if largest is None else largest.reshape(*(1,) * (len(shape) - 1), -1))


def one_pass_codes(recipe: Recipe, columns: int, dtype: Any) -> bool:
    """Whether a kernel can make the codes of gradients [..., columns]: 8 bits, and rows that are whole on a device and
    fill whole lanes."""
    if not choice.available() or recipe.gradient_bits != 8 or ways(whole(recipe.axes)[1], columns) > 1:
        return False
    from mmfree_jax.ops.kernels.normed_codes import supports

    return supports(columns, 0, dtype)


def weight_gradients(recipe: Recipe, inputs: tuple[jax.Array, ...], dys: tuple[jax.Array, ...]) -> jax.Array:
    """`outer` for each matrix, [G, D, F], each summed where its weights live.

    In the type of dys, as the dense layers' are: the sum over a device's rows is in at least float32 and rounded once.
    """
    return _over_tokens(recipe, lambda x, dy, _: outer(x, dy), inputs, dys, (None,) * len(dys))


def integer_weight_gradients(
    recipe: Recipe, kernel: tuple[Quantised, ...], inputs: tuple[Quantised, ...], dys: list[GradientCodes], dtype: Any
) -> jax.Array:
    """`weight_gradients` by products of integers, as `dtype`: of the inputs' codes and those of dys.

    The sum is over tokens, so no token's scale can be taken out of it: the codes of dys take in both of theirs, and are
    brought to one scale a column (`ternary.column_codes`; each device's part has its own).
    """
    per_channel = tuple(w.scale if w.scale is not None and w.scale.size > 1 else None for w in kernel)
    one = lambda x, dy, channel: _integer_outer(x, dy, channel, dtype)
    return _over_tokens(recipe, one, inputs, tuple(dys), per_channel)


def _over_tokens(
    recipe: Recipe, one: Callable[..., jax.Array], inputs: tuple, dys: tuple, per_channel: tuple
) -> jax.Array:
    """[G, D, F]: for each matrix `one` [D, F] of an input, a gradient and a scale [1, F], of each device's rows, added
    up where the weights live. Inputs and gradients are arrays, or trees whose first leaf is one."""
    (into, out), x, dy = recipe.axes, jax.tree.leaves(inputs)[0], jax.tree.leaves(dys)[0]
    into, out = (name if ways(name, a.shape[-1]) > 1 else None for name, a in ((into, x), (out, dy)))
    of_input, of_output = whole((into, out))
    names = [rows_of(dy.ndim, of_input), rows_of(dy.ndim, of_output), (None, of_output)]

    def local(inputs, dys, per_channel):
        return (jnp.stack([one(*three) for three in zip(spread(inputs, dys), dys, per_channel, strict=True)]),)

    dw_GDF = per_shard(local, names, [Summed((None, into, out))], inputs, dys, per_channel)[0]
    return constrain(dw_GDF, None, *recipe.axes)


def _integer_outer(x: Quantised, dy: GradientCodes, per_channel: jax.Array | None, dtype: Any) -> jax.Array:
    """[D, F] as `dtype`: the sum over tokens of x and dy / per_channel."""
    flat = lambda a: a.reshape(-1, a.shape[-1])
    codes, by, rows = flat(x.codes), flat(x.scale), Quantised(*map(flat, dy.rows))
    largest = None if dy.largest is None else dy.largest.reshape(-1)
    if largest is not None and dtype == jnp.bfloat16 and _integer_units_turn(codes, rows.codes):
        from mmfree_jax.ops.kernels.int8_matmul import int8_matmul
        from mmfree_jax.ops.kernels.transposed_codes import transposed

        scale = column_scale(largest)
        turned = transposed(rows.codes, (rows.scale * by).reshape(-1), scale)
        scale = scale if per_channel is None else scale / per_channel.reshape(-1)
        return int8_matmul(transposed(codes), turned, jnp.ones(codes.shape[-1]), scale)
    columns = column_codes(rows, by, largest)
    sums = outer(codes.astype(dtype), columns.codes.astype(dtype), wide(dtype))
    return dequantise(Quantised(sums if per_channel is None else sums / per_channel, columns.scale), dtype)


def _integer_units_turn(x: jax.Array, dy: jax.Array) -> bool:
    """Whether the int8 kernels compute a sum over rows: whole blocks, and no more rows than an int32 surely holds."""
    from mmfree_jax.ops.kernels import int8_matmul, transposed_codes

    (rows, inner), columns = x.shape, dy.shape[-1]
    turn = transposed_codes.supports(rows, inner) and transposed_codes.supports(rows, columns)
    if not (turn and int8_matmul.supports(inner, rows, columns) and rows * 128 * TOP < 2**31):
        return False
    uses = [Use("transposed_codes", (rows, inner), (False,)), Use("transposed_codes", (rows, columns), (True,))]
    return all(map(choice.serves, [*uses, Use("int8_matmul", (inner, rows, columns), (True,))]))


def spread(inputs: tuple, kernel: tuple) -> tuple:
    """An input for each matrix: its own, or the one that all share."""
    return inputs * (len(kernel) if len(inputs) == 1 else 1)
