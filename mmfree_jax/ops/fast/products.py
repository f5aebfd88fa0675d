"""Products of a BitLinear on a mesh: weights quantised where they live, gathered as codes, multiplied; their gradients
brought back.

Products of integers run on the integer units of a Hopper GPU where kernels serve, on each device's part.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.bit_linear import Recipe
from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast.cpu.ternary_product import ternary_product
from mmfree_jax.ops.fast.dense import outer
from mmfree_jax.ops.fast.ternary import (
    best_scale,
    column_codes,
    column_scale,
    pack,
    quantise_gradients,
    unpack,
    weight_scale,
)
from mmfree_jax.ops.packed import Packed
from mmfree_jax.ops.ternary import Quantised, dequantise, ternary_codes, wide
from mmfree_jax.sharding import (
    Names,
    PartialSum,
    activation_axes,
    constrain,
    gathered_axes,
    packed_gathers,
    per_shard,
    shard_count,
)

# On a mesh, a layer's latent weights are cut over fsdp. Each device quantises its own part, and what travels is codes:
# a quarter of the bytes of float32 weights, or a sixteenth packed. The product then needs the whole matrix of codes,
# and its result two scales: one number a token from the input, one number a matrix (or a column) from the weights.
# Integers up to 127 times signs, summed over thousands of inputs, are exact in int32 as in float32, so scales come
# last.


class Unscaled(NamedTuple):
    """A gradient that is yet to be multiplied by a scalar; None stands for 1."""

    values: jax.Array
    factor: jax.Array | None

    def scaled(self, dtype: Any) -> jax.Array:
        """Return the gradient itself."""
        return (self.values if self.factor is None else self.values * self.factor).astype(dtype)


class GradientCodes(NamedTuple):
    """The gradient to an output, quantised for both of its products."""

    rows: Quantised  # times the weights' scale where every column has its own; one scale a token
    largest: jax.Array | None  # magnitude of `rows` times the input's scale in each column, of each device: [.., .., F]


def quantise_kernel(recipe: Recipe, w_GDF: jax.Array) -> tuple[Quantised, ...]:
    """`ops.bit_linear.quantise_kernel`, on the devices that hold the weights, where the codes stay."""
    groups, _, columns = w_GDF.shape
    if recipe.columns:
        # An iota where the weights live; a comparison with a constant vector would be whole on every device.
        token = jax.lax.broadcasted_iota(jnp.int32, w_GDF.shape, w_GDF.ndim - 1)
        w_GDF = jnp.where(token < recipe.columns, w_GDF, 0)
    scale = weight_scale(w_GDF, recipe.scale_axes, (None, *recipe.axes))
    if recipe.columns and -1 in recipe.scale_axes:  # a mean that counts zeros which are not there
        scale = scale * (columns / recipe.columns)
    if recipe.best_scale:
        scale = best_scale(w_GDF, recipe.scale_axes, scale, (None, *recipe.axes))
    scale = jnp.broadcast_to(scale, (groups, 1, scale.shape[-1]))
    quantised = []
    for g in range(groups):
        codes = constrain(ternary_codes(w_GDF[g], scale[g]), *recipe.axes)
        quantised.append(Quantised(checkpoint_name(codes, "codes"), checkpoint_name(scale[g], "codes")))
    return tuple(quantised)


def gather_kernel(recipe: Recipe, kernel: tuple[Quantised, ...]) -> tuple[Quantised, ...]:
    """All-gather the fsdp shards of the codes of `quantise_kernel`: a byte a weight, or 2 bits where they are packed.

    Codes are packed four rows to a byte, so the rows of a byte have to lie on one device.
    """
    # The constraint to the weights' own place comes first, or the partitioner gathers before it packs.
    gathered, shape = [], kernel[0].codes.shape
    cut = {name: (size, shard_count(name, size)) for name, size in zip(recipe.axes, shape, strict=True)}
    rows, shards = cut[recipe.axes[0]]
    packs = packed_gathers.get() and cut.get("embed", (0, 1))[1] > 1 and rows // shards % 4 == 0
    for q in kernel:
        codes = q.codes
        if packs:
            codes = unpack(constrain(constrain(pack(codes), *recipe.axes), *gathered_axes(recipe.axes)))
        gathered.append(q._replace(codes=constrain(codes, *gathered_axes(recipe.axes))))
    return tuple(gathered)


def product(
    x: Quantised, w: Quantised, dtype: Any, out: Any = None, axes: Names = (None, None), transposed: bool = False
) -> jax.Array:
    """Multiply codes [..., D] x [D, F], or transposed [..., F] x [D, F]^T, then apply both scales.

    Integers of these sizes are exact in bfloat16 and float32 alike, so the product does not depend on the type that
    carries them (`dtype`), nor on the integer units doing it. out: type of the result; None is `wide(dtype)`. axes: the
    logical names of w's axes.
    """
    # The scales come after the sum: one multiplication a result instead of one an operand, and the sum stays exact. A
    # sum of D products of 8-bit codes with signs is below 2^24 up to D = 131,072, so float32 holds it as well as int32.
    out = wide(dtype) if out is None else out
    if choice.integer_product(x, w, out, axes, transposed):
        return _integer_product(x, w, axes, transposed)
    carrier, total = (jnp.int8, jnp.int32) if choice.integers_by_xla(x, w) else (dtype, wide(dtype))
    w_codes = w.codes.astype(carrier)
    y = jnp.matmul(x.codes.astype(carrier), w_codes.T if transposed else w_codes, preferred_element_type=total)
    y = y.astype(wide(dtype))
    for scale in (x.scale, w.scale):
        y = y if scale is None else y * scale.astype(y.dtype)
    return y.astype(out)


def packed_product(x: Quantised, w: Packed, dtype: Any) -> jax.Array:
    """Multiply codes [..., D] by a packed matrix [D, F], then apply both scales: [..., F] of `dtype`, as `product`."""
    form = choice.packed_form(x, w)
    if form == "unpacked":
        return product(x, w.unpacked(x.codes.shape[-1]), dtype, dtype)
    if form == "kernel":
        return _codes_product(x, w, dtype)
    y = ternary_product(w.bytes_FI, x.codes.reshape(-1, x.codes.shape[-1])).astype(wide(dtype))
    y = y.reshape(*x.codes.shape[:-1], -1)
    assert x.scale is not None
    for scale in (x.scale, w.scale):
        y = y * scale.astype(y.dtype)
    return y.astype(dtype)


def _codes_product(x: Quantised, w: Packed, dtype: Any) -> jax.Array:
    from mmfree_jax.ops.fast.hopper.packed_product import codes_product

    assert x.scale is not None
    rows = x.codes.reshape(-1, x.codes.shape[-1])
    by_row, by_column = (a.reshape(-1).astype(jnp.float32) for a in (x.scale, w.scale))
    return codes_product(rows, by_row, w.bytes_FI, by_column, dtype).reshape(*x.codes.shape[:-1], -1)


def _integer_product(x: Quantised, w: Quantised, axes: Names, transposed: bool) -> jax.Array:
    """`product` by the integer units, which sum along the last axis of both operands."""
    from mmfree_jax.ops.fast.hopper.int8_matmul import int8_matmul
    from mmfree_jax.ops.fast.hopper.transposed_codes import transpose

    def local(x_codes, x_scale, w_codes, w_scale):
        rows = x_codes.reshape(-1, x_codes.shape[-1])
        summed_last = w_codes if transposed else transpose(w_codes)
        y = int8_matmul(rows, summed_last, x_scale.reshape(-1), w_scale.reshape(1))
        return (y.reshape(*x_codes.shape[:-1], -1),)

    rows, columns = activation_axes(x.codes.ndim), activation_axes(x.codes.ndim, axes[not transposed])
    return per_shard(local, [rows, rows, axes, (None, None)], [columns], x.codes, x.scale, w.codes, w.scale)[0]


def input_gradient(w: Quantised, dy: jax.Array, out: Any = None) -> Unscaled:
    """Compute the gradient to the dequantised input [..., D] of `product`.

    A weight scale that all of w shares is left to the caller, who may have a pass over the gradient to put it into:
    then `out` can be dy's type (default: at least float32), or a GPU writes float32 and converts it in another pass.
    """
    dx = jnp.matmul(_per_channel(w, dy), w.codes.astype(dy.dtype).T, preferred_element_type=out or wide(dy.dtype))
    return Unscaled(dx, _shared_scale(w))


def integer_input_gradient(w: Quantised, codes: GradientCodes, dtype: Any, axes: Names = (None, None)) -> Unscaled:
    """Compute `input_gradient` as a product of integers, [..., D] as `dtype` (SwitchBack, Wortsman et al. 2023, arXiv
    2304.13013, section 2.2)."""
    shared = _shared_scale(w)
    scaled = w._replace(scale=None if shared is None else shared.reshape(1, 1))
    return Unscaled(product(codes.rows, scaled, dtype, dtype, axes, transposed=True), None)


def _shared_scale(w: Quantised) -> jax.Array | None:
    return None if w.scale is None or w.scale.size != 1 else w.scale.reshape(())


def _per_channel(w: Quantised, dy: jax.Array) -> jax.Array:
    return dy if w.scale is None or w.scale.size == 1 else (dy * w.scale).astype(dy.dtype)


def gradient_codes(
    recipe: Recipe, w: Quantised, dy: jax.Array | GradientCodes, x_scale: jax.Array | None
) -> GradientCodes:
    """Quantise the gradient dy [..., F] by absmax per token, if it is not codes yet; x_scale [..., 1]: of the product's
    input."""
    if isinstance(dy, GradientCodes):
        return dy
    dy = _per_channel(w, dy)
    if not choice.row_codes(recipe, dy, x_scale is not None):
        return GradientCodes(quantise_gradients(dy, recipe.gradient_bits), None)
    from mmfree_jax.ops.fast.hopper.normed_codes import codes

    def local(dy, factors):
        found = codes(dy.reshape(-1, dy.shape[-1]), None if factors is None else factors.reshape(-1))
        return codes_of_rows(found, dy.shape)

    rows = activation_axes(dy.ndim)
    return GradientCodes(*per_shard(local, [rows, rows], [rows, rows], dy, x_scale))


def codes_of_rows(found: tuple[jax.Array, jax.Array, jax.Array | None], shape: tuple[int, ...]) -> GradientCodes:
    """Return what a kernel found, `normed_codes.RowCodes` of a gradient of this shape; on a mesh of a device's part."""
    codes, scales, largest = found
    rows = Quantised(codes.reshape(shape), scales.reshape(*shape[:-1], 1))
    return GradientCodes(rows, None if largest is None else largest.reshape(*(1,) * (len(shape) - 1), -1))


def weight_gradients(recipe: Recipe, inputs: tuple[jax.Array, ...], dys: tuple[jax.Array, ...]) -> jax.Array:
    """Compute the gradients to the matrices, [G, D, F], each summed where its weights live.

    In the type of dys, as the dense layers' are: the sum over a device's rows is in at least float32 and rounded once.
    """
    return _over_tokens(recipe, lambda x, dy, _: outer(x, dy), inputs, dys, (None,) * len(dys))


def integer_weight_gradients(
    recipe: Recipe, kernel: tuple[Quantised, ...], inputs: tuple[Quantised, ...], dys: list[GradientCodes], dtype: Any
) -> jax.Array:
    """Compute `weight_gradients` by products of integers, as `dtype`: of the inputs' codes and those of dys.

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
    # Each device multiplies its own rows, and `PartialSum` reduce-scatters the sums to the shards of the weights: what
    # travels has the size of the weights, whatever the batch is.
    (into, out), x, dy = recipe.axes, jax.tree.leaves(inputs)[0], jax.tree.leaves(dys)[0]
    into, out = (name if shard_count(name, a.shape[-1]) > 1 else None for name, a in ((into, x), (out, dy)))
    of_input, of_output = gathered_axes((into, out))
    names = [activation_axes(dy.ndim, of_input), activation_axes(dy.ndim, of_output), (None, of_output)]

    def local(inputs, dys, per_channel):
        operands = zip(one_each(inputs, dys), dys, per_channel, strict=True)
        return (jnp.stack([one(*operand) for operand in operands]),)

    dw_GDF = per_shard(local, names, [PartialSum((None, into, out))], inputs, dys, per_channel)[0]
    return constrain(dw_GDF, None, *recipe.axes)


def _integer_outer(x: Quantised, dy: GradientCodes, per_channel: jax.Array | None, dtype: Any) -> jax.Array:
    """[D, F] as `dtype`: the sum over tokens of x and dy / per_channel."""
    # dW = sum over tokens t of s_t x_t (r_t dy_t), codes x and dy with scales s and r. Both scales depend on t, which
    # is summed over, so they go into the codes of dy, which are rounded again: to one scale for each column of dW.
    flat = lambda a: a.reshape(-1, a.shape[-1])
    codes, x_scale, rows = flat(x.codes), flat(x.scale), Quantised(*map(flat, dy.rows))
    largest = None if dy.largest is None else dy.largest.reshape(-1)
    if largest is not None and dtype == jnp.bfloat16 and choice.integer_sum_over_rows(codes, rows.codes):
        from mmfree_jax.ops.fast.hopper.int8_matmul import int8_matmul
        from mmfree_jax.ops.fast.hopper.transposed_codes import transpose

        scale = column_scale(largest)
        dy_codes = transpose(rows.codes, (rows.scale * x_scale).reshape(-1), scale)
        scale = scale if per_channel is None else scale / per_channel.reshape(-1)
        return int8_matmul(transpose(codes), dy_codes, jnp.ones(codes.shape[-1]), scale)
    columns = column_codes(rows, x_scale, largest)
    if choice.integers_by_xla(x, columns) and len(codes) <= choice.MOST_ROWS:
        sums = outer(codes, columns.codes, jnp.int32).astype(wide(dtype))
    else:
        sums = outer(codes.astype(dtype), columns.codes.astype(dtype), wide(dtype))
    return dequantise(Quantised(sums if per_channel is None else sums / per_channel, columns.scale), dtype)


def one_each(inputs: tuple, kernel: tuple) -> tuple:
    """Return an input for each matrix: its own, or the one that all share."""
    return inputs * (len(kernel) if len(inputs) == 1 else 1)
