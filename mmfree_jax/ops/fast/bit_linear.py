"""`ops.bit_linear` with a backward pass of its own, and fused with what makes its input."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.bit_linear import Recipe, Weights
from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast.autodiff import own_backward_of_used
from mmfree_jax.ops.fast.combine import combine, reciprocal_rms, rms_norm, rms_norm_backward
from mmfree_jax.ops.fast.dense import dense
from mmfree_jax.ops.fast.kernels import kernel_module
from mmfree_jax.ops.fast.origin import Kind, Origin, Sum, can_hand_on, hand_on, origin, sum_of
from mmfree_jax.ops.fast.products import (
    GradientCodes,
    Unscaled,
    codes_of_rows,
    gather_kernel,
    gradient_codes,
    input_gradient,
    integer_input_gradient,
    integer_weight_gradients,
    one_each,
    packed_product,
    product,
    quantise_kernel,
    weight_gradients,
)
from mmfree_jax.ops.fast.ternary import quantise_normed
from mmfree_jax.ops.served_linear import PackedWeights, RowWeights
from mmfree_jax.ops.ternary import Quantised, dequantise, quantise_activations, wide
from mmfree_jax.sharding import Names, PartialSum, activation_axes, constrain, gathered_axes, per_shard

# The backward pass treats rounding as the identity and scales as constants. It keeps what the input is made of, one
# number per token, and the integer codes unless a kernel makes them again; never a dequantised copy. Several products
# of one input share the norm's statistics, and the codes too where they share the gain.

__all__ = ["bit_linear", "linear", "packed_linear", "quantise_kernel", "rms_norm"]


class Fusion(NamedTuple):
    """A BitLinear and what it computes besides."""

    recipe: Recipe
    kind: Kind = "plain"  # how its input is made of the sources that are kept
    residual: bool = False  # whether it returns its first source too, and adds the gradient to that copy to its own
    onward: bool = False  # whether gradients to the sources are quantised for the products that made them


class Input(NamedTuple):
    """What the backward pass needs of the input side."""

    sources: tuple[jax.Array, ...]
    source_gain: jax.Array | None
    gain: jax.Array | None
    rstd: jax.Array | None  # None without a gain, and where a kernel computes it again
    codes: tuple[Quantised, ...]  # one, or one a product where the products have their own gains
    scales: tuple[jax.Array, ...] = ()  # theirs, where a kernel makes the codes again and they need not be kept


class Residuals(NamedTuple):
    """What `forward` leaves to `backward`."""

    input: Input
    shards: tuple[Quantised, ...]  # the quantised weights, where they live
    typed: jax.Array  # a scalar of the weights' type: residuals are arrays


def linear(recipe: Recipe, x: jax.Array, weights: Weights | PackedWeights | RowWeights) -> tuple[jax.Array, ...]:
    """`ops.bit_linear.linear`."""
    if isinstance(weights, PackedWeights):
        return packed_linear(recipe, x, weights)
    if isinstance(weights, RowWeights):
        return row_linear(recipe, x, weights)
    return bit_linear(recipe, x, weights) if recipe.ternary else dense_linear(recipe, x, weights.w_GDF)


def dense_linear(recipe: Recipe, x: jax.Array, w_GDF: jax.Array) -> tuple[jax.Array, ...]:
    """`dense`, whose backward pass makes x again of what it was made of, where memory counts more (`choice`)."""
    kind, sources, source_gain, eps = origin(x)
    if kind == "plain" or not choice.inputs_made_again():
        return dense(recipe.axes, x, w_GDF)

    # A norm or a gate is a few operations an element, and reads what is kept anyway.
    def from_sources(sources, source_gain, w_GDF):
        return dense(recipe.axes, combine(kind, sources, source_gain, eps or 0.0), w_GDF)  # a gated unit has none

    return jax.checkpoint(from_sources, prevent_cse=False)(sources, source_gain, w_GDF)


def bit_linear(recipe: Recipe, x: jax.Array, weights: Weights) -> tuple[jax.Array, ...]:
    """`ops.bit_linear.bit_linear`, fused with the norm or gate that x comes from (`origin`)."""
    kind, sources, source_gain, _ = source(recipe, x)
    fusion = Fusion(recipe, kind, residual=kind == "norm")
    ys, copy = _bit_linear(fusion, sources, source_gain, weights)
    if fusion.residual:
        hand_on(sources[0], copy)
    return ys


def packed_linear(recipe: Recipe, x: jax.Array, weights: PackedWeights) -> tuple[jax.Array, ...]:
    """`ops.served_linear.PackedWeights.linear`, with the codes and the products of `bit_linear`."""
    kind, sources, source_gain, _ = source(recipe, x)
    added = sum_of(sources[0]) if kind == "norm" else None
    if choice.normed_product(recipe, kind, sources[0], added is not None, weights):
        return _normed_product(recipe, kind, sources, source_gain, added, weights)
    codes = quantise_input(Fusion(recipe, kind), sources, source_gain, weights.gain, len(weights.codes)).codes
    pairs = zip(one_each(codes, weights.codes), weights.codes, strict=True)
    return tuple(packed_product(q, w, x.dtype) for q, w in pairs)


def row_linear(recipe: Recipe, x: jax.Array, weights: RowWeights) -> tuple[jax.Array, ...]:
    """`ops.served_linear.RowWeights.linear`; a kernel serves few rows."""
    kind, sources, source_gain, _ = source(recipe, x)
    added = sum_of(sources[0]) if kind == "norm" else None
    if not choice.dense_product(recipe, kind, sources[0], added is not None, weights):
        return weights.linear(recipe, x)
    from mmfree_jax.ops.fast.hopper.dense_product import dense_product

    compute = lambda arrays, gain, *sum: dense_product(kind, arrays, gain, list(weights.rows_FD), recipe.eps, *sum)
    return _few_rows(compute, sources, source_gain, added)


def _normed_product(
    recipe: Recipe, kind: Kind, sources, source_gain, added: Sum | None, weights: PackedWeights
) -> tuple[jax.Array, ...]:
    from mmfree_jax.ops.fast.hopper.packed_product import normed_product

    gain = None if weights.gain is None else weights.gain.astype(jnp.float32)
    codes = [w.bytes_FI for w in weights.codes]
    scales = [w.scale.reshape(-1).astype(jnp.float32) for w in weights.codes]
    layout = weights.codes[0].layout
    compute = lambda arrays, inner, *sum: normed_product(
        kind, arrays, inner, gain, codes, scales, recipe.eps, *sum, layout=layout
    )
    return _few_rows(compute, sources, source_gain, added)


def _few_rows(compute: Callable, sources, source_gain, added: Sum | None) -> tuple[jax.Array, ...]:
    """Call a kernel for a few rows, which also adds the residual that the stream is a sum of (`added`)."""
    first, *others = sources
    shape = first.shape
    start, addend, factor = (first, None, 1.0) if added is None else added
    (x, *others), gain, _ = _flat((start, *others), source_gain, None)
    ys, total = compute([x, *others], gain, None if addend is None else addend.reshape(x.shape), factor)
    if total is not None:
        hand_on(first, total.reshape(shape))
    return tuple(y.reshape(*shape[:-1], -1) for y in ys)


def source(recipe: Recipe, x: jax.Array) -> Origin:
    """Return what x was made of, if this BitLinear is to make it itself; else x, plain.

    Its norms share their epsilon. A norm of anything but the residual stream, as before an output projection, stays
    apart: what it reads is wanted for nothing else.
    """
    found = origin(x)
    apart = found.gain is not None and found.eps != recipe.eps
    apart = apart or (found.kind == "norm" and not can_hand_on(found.sources[0]))
    return Origin("plain", (x,)) if apart else found


def quantise_input(
    fusion: Fusion,
    sources: tuple[jax.Array, ...],
    source_gain: jax.Array | None,
    gain: jax.Array | None,
    products: int = 1,
) -> Input:
    """Make the input, normalise and quantise it: the input side of that many products."""
    recipe, gains = fusion.recipe, _gains(gain)
    if choice.input_codes(fusion, sources, source_gain, len(gains), products):
        codes = _kernel_codes(fusion, sources, source_gain, gain)
        return Input(sources, source_gain, gain, None, codes, tuple(q.scale for q in codes if q.scale is not None))
    x = combine(fusion.kind, sources, source_gain, recipe.eps)
    if gain is None:
        return Input(sources, source_gain, None, None, (_named(quantise_activations(x, recipe.bits)),))
    # One statistic for all products; one set of codes for each gain.
    rstd = checkpoint_name(reciprocal_rms(x, recipe.eps), "per_token")
    codes = tuple(_named(quantise_normed(x, recipe.bits, rstd, g.astype(rstd.dtype))) for g in gains)
    return Input(sources, source_gain, gain, rstd, codes)


def _gains(gain: jax.Array | None) -> list[jax.Array]:
    if gain is None:
        return []
    return [gain] if gain.ndim == 1 else [gain[g] for g in range(gain.shape[0])]


def _named(q: Quantised) -> Quantised:
    """Codes with names for the remat policies: a byte a value, cheaper to keep than to recompute."""
    return q if q.scale is None else Quantised(checkpoint_name(q.codes, "codes"), checkpoint_name(q.scale, "per_token"))


def _kernel_codes(fusion: Fusion, sources, source_gain, gain) -> tuple[Quantised, ...]:
    forward = kernel_module("normed_codes").forward

    def local(sources, source_gain, gain):
        shape = sources[0].shape
        codes, scales = forward(fusion.kind, *_flat(sources, source_gain, gain), fusion.recipe.eps)
        pairs = zip(codes, scales, strict=True)
        return (tuple(Quantised(q.reshape(shape), s.reshape(*shape[:-1], 1)) for q, s in pairs),)

    rows = activation_axes(sources[0].ndim)
    gains = (None,) * gain.ndim
    (inputs,) = per_shard(local, [rows, (None,), gains], [rows], sources, source_gain, gain)
    return tuple(map(_named, inputs))


def _flat(sources, source_gain, gain) -> tuple[list, jax.Array | None, list]:
    """A kernel's operands: activations as [rows, D], gains as float32 vectors."""
    rows = [s.reshape(-1, s.shape[-1]) for s in sources]
    gains = [g.astype(jnp.float32) for g in _gains(gain)]
    return rows, None if source_gain is None else source_gain.astype(jnp.float32), gains


def _kernel_input_backward(
    fusion: Fusion, saved: Input, dinputs: list[Unscaled], row_factors: jax.Array | None, dcopy: jax.Array | None
) -> tuple:
    """What `input_backward` returns, with `row_factors` [..., 1] as `GradientCodes`; and the quantised inputs, made
    again on the way: as codes where a product of integers takes them, as values otherwise."""
    recipe, backward = fusion.recipe, kernel_module("normed_codes").backward

    def local(sources, source_gain, gain, scales, dys, factors, row_factors, dcopy):
        scales, dys = [scale.reshape(-1) for scale in scales], [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        arrays, shape = _flat(sources, source_gain, gain), sources[0].shape
        row_factors = None if row_factors is None else row_factors.reshape(-1)
        dcopy = None if dcopy is None else dcopy.reshape(dys[0].shape)
        how = recipe.eps, bool(recipe.gradient_bits)
        found = backward(fusion.kind, *arrays, scales, dys, factors, *how, row_factors, dcopy)
        shaped = lambda rows: tuple(a.reshape(shape) for a in rows)
        as_codes = row_factors is not None
        dsources = tuple(codes_of_rows(c, shape) for c in found.sources) if as_codes else shaped(found.sources)
        return dsources, found.norm_gain, jnp.stack(found.gains), shaped(found.inputs)

    sources, source_gain, gain = saved.sources, saved.source_gain, saved.gain
    assert gain is not None
    rows, gains = activation_axes(sources[0].ndim), (None,) * gain.ndim
    results: list[Names | PartialSum] = [rows, PartialSum((None,)), PartialSum((None, None)), rows]
    dys = tuple(d.values.astype(sources[0].dtype) for d in dinputs)
    present = [d.factor for d in dinputs if d.factor is not None]  # all of them, or none
    factors = jnp.stack(present) if present else None
    arguments = sources, source_gain, gain, saved.scales, dys, factors, row_factors, dcopy
    names: list[Names] = [rows, (None,), gains, rows, rows, (None,), rows, rows]
    dsources, dsource_gain, dgains, inputs = per_shard(local, names, results, *arguments)
    as_gain = lambda d, a: None if a is None else d.reshape(a.shape).astype(a.dtype)
    made = map(Quantised, inputs, saved.scales if recipe.gradient_bits else (None,) * len(inputs))
    return (dsources, as_gain(dsource_gain, source_gain), as_gain(dgains, gain)), tuple(made)


def input_backward(fusion: Fusion, saved: Input, dys: list[jax.Array], dcopy: jax.Array | None = None) -> tuple:
    """Compute the gradients to sources, source_gain and gain, given those to the quantised inputs, one for each
    product, and to the copy of the first source that `residual` takes."""
    make = functools.partial(combine, fusion.kind, eps=fusion.recipe.eps)
    x, pull = jax.vjp(lambda sources, gain: make(sources, gain), saved.sources, saved.source_gain)
    dx, dgain = _norm_backward(x, saved, dys)
    (dfirst, *others), dsource_gain = pull(dx)
    return (dfirst if dcopy is None else dfirst + dcopy, *others), dsource_gain, dgain


def _norm_backward(x: jax.Array, saved: Input, dys: list[jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    """Gradients to the value that is normalised and quantised, and to the gain of that norm."""
    # The gradient of x * rstd(x) is that of a projection: what points along x_hat is taken out, because scaling x does
    # not change its normed value. The quantiser passes gradients through unchanged.
    rstd, gain, count = saved.rstd, saved.gain, len(saved.codes)
    dys = [dy.astype(wide(dy.dtype)) for dy in dys]
    if rstd is None or gain is None:
        return sum(dys[1:], dys[0]).astype(x.dtype), None
    if count == 1:
        dys = [sum(dys[1:], dys[0])]
    gains = gain.reshape(count, -1).astype(rstd.dtype)
    # y_g = x_hat * gain_g with x_hat = x * rstd: gradients to x of all products are added before they pass the norm.
    x_hat = x.astype(rstd.dtype) * rstd
    rows = tuple(range(x.ndim - 1))
    dgain = jnp.stack([jnp.sum(dy * x_hat, axis=rows) for dy in dys]).reshape(gain.shape)
    through = [dy * gains[g] for g, dy in enumerate(dys)]
    dx = rms_norm_backward(x, rstd, sum(through[1:], through[0]))
    return dx.astype(x.dtype), dgain.astype(gain.dtype)


def forward(
    fusion: Fusion, sources: tuple[jax.Array, ...], source_gain: jax.Array | None, weights: Weights
) -> tuple[tuple[jax.Array, ...], Residuals]:
    """Compute the products [..., F], and what `backward` needs."""
    recipe, w_GDF = fusion.recipe, weights.w_GDF
    saved = quantise_input(fusion, sources, source_gain, weights.gain, w_GDF.shape[0])
    shards = quantise_kernel(recipe, w_GDF) if weights.codes is None else weights.codes
    axes, dtype = gathered_axes(recipe.axes), sources[0].dtype
    kernel, rows = gather_kernel(recipe, shards), activation_axes(sources[0].ndim, axes[1])
    ys = [product(q, w, dtype, dtype, axes) for q, w in zip(one_each(saved.codes, kernel), kernel, strict=True)]
    if saved.scales:
        saved = saved._replace(codes=())
    return tuple(constrain(y, *rows) for y in ys), Residuals(saved, shards, jnp.zeros((), w_GDF.dtype))


def backward(
    fusion: Fusion,
    residuals: Residuals,
    dys: tuple[Any, ...],
    *,
    dcopy: jax.Array | None = None,
    row_factors: jax.Array | None = None,
) -> tuple[tuple, jax.Array | None, Weights]:
    """Compute the gradients to sources, source_gain and weights, given those to the products (`GradientCodes` too).

    dcopy: the gradient to the copy of the first source. row_factors: `codes_onward` of a BitLinear whose products the
    sources are: where a kernel makes the gradients to sources, they come as `GradientCodes`.
    """
    # Three things are needed: the gradient to the quantised input, dY W^T; that to the sources, through quantiser, norm
    # and gate; and that to the weights, X^T dY, with X the quantised input. A kernel makes X again while it computes
    # the second, so the order is first, second, third.
    #
    # Behind barriers, or the compiler makes the dequantised inputs in the forward pass and keeps them until here; and
    # keeps gathered codes, which are gathered again. These have one of their own: they need not wait for dys.
    recipe, (saved, shards, typed) = fusion.recipe, residuals
    shards, (saved, dys) = jax.lax.optimization_barrier(shards), jax.lax.optimization_barrier((saved, dys))
    kernel, axes = gather_kernel(recipe, shards), gathered_axes(recipe.axes)
    dtype, scales = saved.sources[0].dtype, _scales(saved)
    codes: list[GradientCodes] = []
    if recipe.gradient_bits:
        operands = zip(kernel, dys, one_each(scales, dys) or (None,) * len(dys), strict=True)
        codes = [gradient_codes(recipe, w, dy, scale) for w, dy, scale in operands]
        dinputs = [integer_input_gradient(w, c, dtype, axes) for w, c in zip(kernel, codes, strict=True)]
    else:
        out = dtype if saved.scales else None
        dinputs = [input_gradient(w, dy, out) for w, dy in zip(kernel, dys, strict=True)]
    dinputs = [d._replace(values=constrain(d.values, *activation_axes(d.values.ndim, axes[0]))) for d in dinputs]
    if saved.scales:  # the forward pass chose; the user's choice may not reach here
        gradients, inputs = _kernel_input_backward(fusion, saved, dinputs, row_factors, dcopy)
    else:
        gradients, inputs = input_backward(fusion, saved, [d.scaled(dtype) for d in dinputs], dcopy), saved.codes
    if codes and scales:
        dw_GDF = integer_weight_gradients(recipe, kernel, inputs, codes, dtype)
    else:
        dw_GDF = weight_gradients(recipe, tuple(dequantise(q, dtype) for q in inputs), dys)
    # Gains are whole on every device: gathered here once, or the optimizer would do it for each of its moments.
    whole_gain = lambda d: None if d is None else constrain(d, *(None,) * d.ndim)
    dsources, dsource_gain, dgain = gradients
    return dsources, whole_gain(dsource_gain), Weights(dw_GDF.astype(typed.dtype), whole_gain(dgain))


def codes_onward(recipe: Recipe, residuals: Residuals) -> jax.Array | None:
    """Return the scale [..., 1] of the input, if codes by a kernel may stand for the gradients to the products."""
    scales, dtype = _scales(residuals.input), residuals.input.sources[0].dtype
    one_scale = all(q.scale is not None and q.scale.size == 1 for q in residuals.shards)
    columns = residuals.shards[0].codes.shape[-1]
    serves = len(scales) == 1 and one_scale and choice.gradient_codes_onward(recipe, columns, dtype)
    return scales[0] if serves else None


def _scales(saved: Input) -> tuple[jax.Array, ...]:
    return saved.scales or tuple(q.scale for q in saved.codes if q.scale is not None)


def _forward(fusion: Fusion, sources, source_gain, weights: Weights):
    ys, residuals = forward(fusion, sources, source_gain, weights)
    return (ys, sources[0] if fusion.residual else None), residuals


def _backward(fusion: Fusion, residuals: Residuals, gradients):
    dys, dcopy = gradients
    return backward(fusion, residuals, dys, dcopy=dcopy)


_bit_linear = own_backward_of_used(_forward, _backward)
