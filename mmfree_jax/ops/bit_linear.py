"""BitLinear: RMSNorm -> integer activations -> product with ternary weights, as one op with its own backward pass
(Zhu et al. 2024, arXiv 2406.02528, section 3.1 and Algorithm 1).

Both quantisers are straight-through: the backward pass treats rounding as the identity and scales as constants. It
keeps what the input is made of, one number per token, and the integer codes unless a kernel makes them again; never a
dequantised copy.

Several products of one input go through one call (`w_GDF` holds G matrices): they share the norm's statistics, and
the codes too where they share the gain.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast.choice import Use
from mmfree_jax.ops.prologue import Prologue, combine
from mmfree_jax.ops.rms_norm import reciprocal_rms, rms_norm_backward
from mmfree_jax.ops.ternary import (
    Quantised,
    dequantise,
    quantise_activations,
    wide,
)
from mmfree_jax.ops.ternary_weights import (
    GradientCodes,
    Recipe,
    Unscaled,
    codes_of_rows,
    gather_kernel,
    gradient_codes,
    input_gradient,
    integer_input_gradient,
    integer_weight_gradients,
    local_rows,
    one_pass_codes,
    product,
    quantise_kernel,
    spread,
    weight_gradients,
)
from mmfree_jax.sharding import Names, Summed, constrain, per_shard, rows_of, ways, whole


class Saved(NamedTuple):
    """What the backward pass needs of the input side."""

    sources: tuple[jax.Array, ...]
    source_gain: jax.Array | None
    gain: jax.Array | None
    rstd: jax.Array | None  # None without a gain, and where a kernel computes it again
    inputs: tuple[Quantised, ...]  # one, or one a product where the products have their own gains
    scales: tuple[jax.Array, ...] = ()  # theirs, where a kernel makes the codes again and `inputs` need not be kept


class Weights(NamedTuple):
    """The arrays of G BitLinears with one input.

    w_GDF: latent weights, quantised per `recipe.scale_axes`. gain: of the RMSNorm before the quantiser: [D] shared by
    the products, [G, D] one each, None for no norm. kernel: what `quantise_kernel` made of w_GDF, where that was done
    ahead; gradients go to w_GDF all the same.
    """

    w_GDF: jax.Array
    gain: jax.Array | None
    kernel: tuple[Quantised, ...] | None = None


class Residuals(NamedTuple):
    """What `forward` leaves to `backward`."""

    saved: Saved
    shards: tuple[Quantised, ...]  # the quantised weights, where they live
    like: jax.Array  # a scalar of the weights' type: residuals are arrays


def bit_linear(
    recipe: Recipe,
    x: jax.Array | Prologue,
    w_GDF: jax.Array,
    gain: jax.Array | None,
    kernel: tuple[Quantised, ...] | None = None,
) -> tuple[jax.Array, ...]:
    """G ternary products of one input.

    Args:
        recipe: static options.
        x: [..., D] activations, or how they are to be made: they are then made again in the backward pass, not kept.
        w_GDF, gain, kernel: of the G matrices (`Weights`).

    Returns:
        G arrays [..., F] of x's type.
    """
    recipe, *sources = opened(recipe, x)
    return _bit_linear(recipe, *sources, Weights(w_GDF, gain, kernel))[0]


def bit_linear_beside(recipe: Recipe, x: Prologue, weights: Weights) -> tuple[tuple[jax.Array, ...], Prologue]:
    """`bit_linear`, and the prologue once more with its first source as it was.

    Whoever needs that source besides takes it from there: both gradients to it are then added up in one pass over it.
    """
    recipe, *sources = opened(recipe, x)
    ys, first = _bit_linear(recipe._replace(beside=True), *sources, weights)
    return ys, x.reread(first)


def opened(recipe: Recipe, x: jax.Array | Prologue) -> tuple[Recipe, tuple[jax.Array, ...], jax.Array | None]:
    """The recipe with the prologue's kind, its sources and its gain. Raises ValueError if their epsilons differ."""
    if not isinstance(x, Prologue):
        return recipe, (x,), None
    if x.gain is not None and x.eps != recipe.eps:
        raise ValueError(f"the norms of one BitLinear share their epsilon: {x.eps} and {recipe.eps}")
    return recipe._replace(prologue=x.kind), x.sources, x.gain


def quantise_input(
    recipe: Recipe,
    sources: tuple[jax.Array, ...],
    source_gain: jax.Array | None,
    gain: jax.Array | None,
    products: int = 1,
) -> Saved:
    """Make the input, norm and quantise it: the input side of `bit_linear`, for that many products."""
    if _one_pass_serves(recipe, sources, source_gain, gain, products):
        inputs = _one_pass(recipe, sources, source_gain, gain)
        return Saved(sources, source_gain, gain, None, inputs, tuple(q.scale for q in inputs if q.scale is not None))
    x = combine(recipe.prologue, sources, source_gain, recipe.eps)
    if gain is None:
        return Saved(sources, source_gain, None, None, (_kept(quantise_activations(x, recipe.bits)),))
    rstd = checkpoint_name(reciprocal_rms(x, recipe.eps), "per_token")
    inputs = tuple(_kept(quantise_activations(x, recipe.bits, rstd, g.astype(rstd.dtype))) for g in _gains(gain))
    return Saved(sources, source_gain, gain, rstd, inputs)


def _gains(gain: jax.Array) -> list[jax.Array]:
    return [gain] if gain.ndim == 1 else [gain[g] for g in range(gain.shape[0])]


def _one_pass_serves(recipe: Recipe, sources, source_gain, gain, products: int) -> bool:
    """Whether the kernels between activations and codes serve: 8 bits, a norm before the quantiser, and rows that are
    whole on a device and fill whole lanes."""
    width = sources[0].shape[-1]
    if gain is None or recipe.bits != 8 or recipe.prologue == "plain" or not choice.available():
        return False
    from mmfree_jax.ops.kernels.normed_codes import supports

    gains, dtype = len(_gains(gain)), sources[0].dtype
    arrays = len(sources) + products + recipe.beside, len(sources) + gains
    fits = supports(width, (source_gain is not None) + gains, dtype, *arrays)
    if ways(whole(recipe.axes)[0], width) > 1 or not fits:
        return False
    options = recipe.prologue, gains, products, str(dtype), recipe.gradient_bits, recipe.beside, recipe.onward
    return choice.serves(Use("normed_codes", (local_rows(sources[0]), width), options))


def _one_pass(recipe: Recipe, sources, source_gain, gain) -> tuple[Quantised, ...]:
    from mmfree_jax.ops.kernels.normed_codes import forward

    def local(sources, source_gain, gain):
        shape = sources[0].shape
        codes, scales = forward(recipe.prologue, *_flat(sources, source_gain, gain), recipe.eps)
        pairs = zip(codes, scales, strict=True)
        return (tuple(Quantised(q.reshape(shape), s.reshape(*shape[:-1], 1)) for q, s in pairs),)

    rows = rows_of(sources[0].ndim)
    gains = (None,) * gain.ndim
    (inputs,) = per_shard(local, [rows, (None,), gains], [rows], sources, source_gain, gain)
    return tuple(map(_kept, inputs))


def _one_pass_backward(
    recipe: Recipe, saved: Saved, dinputs: list[Unscaled], by: jax.Array | None, beside: jax.Array | None
) -> tuple:
    """What `input_backward` returns, with factors `by` [..., 1] of rows as `GradientCodes`; and the quantised inputs,
    made again on the way: as codes where a product of integers takes them, as values otherwise."""
    from mmfree_jax.ops.kernels.normed_codes import backward

    def local(sources, source_gain, gain, scales, dys, factors, by, beside):
        scales, dys = [scale.reshape(-1) for scale in scales], [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        arrays, shape = _flat(sources, source_gain, gain), sources[0].shape
        by, beside = None if by is None else by.reshape(-1), None if beside is None else beside.reshape(dys[0].shape)
        how = recipe.eps, bool(recipe.gradient_bits)
        found = backward(recipe.prologue, *arrays, scales, dys, factors, *how, by, beside)
        shaped = lambda rows: tuple(a.reshape(shape) for a in rows)
        dsources = shaped(found.sources) if by is None else tuple(codes_of_rows(c, shape) for c in found.sources)
        return dsources, found.norm_gain, jnp.stack(found.gains), shaped(found.inputs)

    sources, source_gain, gain = saved.sources, saved.source_gain, saved.gain
    assert gain is not None
    rows, gains = rows_of(sources[0].ndim), (None,) * gain.ndim
    results: list[Names | Summed] = [rows, Summed((None,)), Summed((None, None)), rows]
    dys = tuple(d.values.astype(sources[0].dtype) for d in dinputs)
    given = [d.factor for d in dinputs if d.factor is not None]  # all of them, or none
    factors = jnp.stack(given) if given else None
    arguments = sources, source_gain, gain, saved.scales, dys, factors, by, beside
    names: list[Names] = [rows, (None,), gains, rows, rows, (None,), rows, rows]
    dsources, dsource_gain, dgains, inputs = per_shard(local, names, results, *arguments)
    like = lambda d, a: None if a is None else d.reshape(a.shape).astype(a.dtype)
    made = map(Quantised, inputs, saved.scales if recipe.gradient_bits else (None,) * len(inputs))
    return (dsources, like(dsource_gain, source_gain), like(dgains, gain)), tuple(made)


def _flat(sources, source_gain, gain) -> tuple[list, jax.Array | None, list]:
    """A kernel's operands: activations as [rows, D], gains as float32 vectors."""
    rows = [s.reshape(-1, s.shape[-1]) for s in sources]
    gains = [g.astype(jnp.float32) for g in _gains(gain)]
    return rows, None if source_gain is None else source_gain.astype(jnp.float32), gains


def _kept(q: Quantised) -> Quantised:
    """Codes named for the remat policies: a byte a value, cheaper kept than made again."""
    return q if q.scale is None else Quantised(checkpoint_name(q.codes, "codes"), checkpoint_name(q.scale, "per_token"))


def input_backward(recipe: Recipe, saved: Saved, dys: list[jax.Array], beside: jax.Array | None = None) -> tuple:
    """Gradients to sources, source_gain and gain, given those to the quantised inputs, one for each product; beside: a
    gradient that comes to the first source on another way."""
    make = functools.partial(combine, recipe.prologue, eps=recipe.eps)
    x, pull = jax.vjp(lambda sources, gain: make(sources, gain), saved.sources, saved.source_gain)
    dx, dgain = _norm_backward(x, saved, dys)
    (dfirst, *others), dsource_gain = pull(dx)
    return (dfirst if beside is None else dfirst + beside, *others), dsource_gain, dgain


def _norm_backward(x: jax.Array, saved: Saved, dys: list[jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    """Gradients to the value that is normed and quantised, and to the gain of that norm."""
    rstd, gain, inputs = saved.rstd, saved.gain, saved.inputs
    dys = [dy.astype(wide(dy.dtype)) for dy in dys]
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


def forward(
    recipe: Recipe, sources: tuple[jax.Array, ...], source_gain: jax.Array | None, weights: Weights
) -> tuple[tuple[jax.Array, ...], Residuals]:
    """The products [..., F], and what `backward` needs."""
    saved = quantise_input(recipe, sources, source_gain, weights.gain, weights.w_GDF.shape[0])
    shards = quantise_kernel(recipe, weights.w_GDF) if weights.kernel is None else weights.kernel
    axes, dtype = whole(recipe.axes), sources[0].dtype
    kernel, rows = gather_kernel(recipe, shards), rows_of(sources[0].ndim, axes[1])
    ys = [product(q, w, dtype, dtype, axes) for q, w in zip(spread(saved.inputs, kernel), kernel, strict=True)]
    if saved.scales:
        saved = saved._replace(inputs=())
    return tuple(constrain(y, *rows) for y in ys), Residuals(saved, shards, jnp.zeros((), weights.w_GDF.dtype))


def backward(
    recipe: Recipe,
    residuals: Residuals,
    dys: tuple[Any, ...],
    *,
    beside: jax.Array | None = None,
    by: jax.Array | None = None,
) -> tuple[tuple, jax.Array | None, Weights]:
    """Gradients to sources, source_gain and weights, given those to the products: arrays, or `GradientCodes`.

    beside: a gradient that comes to the first source on another way. by: `codes_taken_by` of a BitLinear whose products
    the sources are: where a kernel makes the gradients to sources, they come as `GradientCodes`.
    """
    # Behind barriers, or the compiler makes the dequantised inputs in the forward pass and keeps them until here; and
    # keeps gathered codes, which are gathered again. These have one of their own: they need not wait for dys.
    saved, shards, like = residuals
    shards, (saved, dys) = jax.lax.optimization_barrier(shards), jax.lax.optimization_barrier((saved, dys))
    kernel, axes = gather_kernel(recipe, shards), whole(recipe.axes)
    dtype = saved.sources[0].dtype
    scales = _scales(saved)
    codes: list[GradientCodes] = []
    if recipe.gradient_bits:
        triples = zip(kernel, dys, spread(scales, dys) or (None,) * len(dys), strict=True)
        codes = [gradient_codes(recipe, w, dy, scale) for w, dy, scale in triples]
        dinputs = [integer_input_gradient(w, c, dtype, axes) for w, c in zip(kernel, codes, strict=True)]
    else:
        out = dtype if saved.scales else None
        dinputs = [input_gradient(w, dy, axes, out) for w, dy in zip(kernel, dys, strict=True)]
    dinputs = [d._replace(values=constrain(d.values, *rows_of(d.values.ndim, axes[0]))) for d in dinputs]
    if saved.scales:  # the forward pass chose; the user's choice may not reach here
        (dsources, dsource_gain, dgain), inputs = _one_pass_backward(recipe, saved, dinputs, by, beside)
    else:
        scaled = [d.scaled(dtype) for d in dinputs]
        dsources, dsource_gain, dgain = input_backward(recipe, saved, scaled, beside)
        inputs = saved.inputs
    if codes and scales:
        dw_GDF = integer_weight_gradients(recipe, kernel, inputs, codes, dtype)
    else:
        dw_GDF = weight_gradients(recipe, tuple(dequantise(q, dtype) for q in inputs), dys)
    # Gains are whole on every device: gathered here once, or the optimizer would do it for each of its moments.
    whole_gain = lambda d: None if d is None else constrain(d, *(None,) * d.ndim)
    return dsources, whole_gain(dsource_gain), Weights(dw_GDF.astype(like.dtype), whole_gain(dgain))


def codes_taken_by(recipe: Recipe, residuals: Residuals) -> jax.Array | None:
    """The scale [..., 1] of the input, if codes by a kernel may stand for the gradients to the products; else None."""
    scales, like = _scales(residuals.saved), residuals.saved.sources[0]
    one_scale = all(q.scale is not None and q.scale.size == 1 for q in residuals.shards)
    columns = residuals.shards[0].codes.shape[-1]
    return scales[0] if len(scales) == 1 and one_scale and one_pass_codes(recipe, columns, like.dtype) else None


def _scales(saved: Saved) -> tuple[jax.Array, ...]:
    return saved.scales or tuple(q.scale for q in saved.inputs if q.scale is not None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bit_linear(recipe: Recipe, sources, source_gain, weights: Weights):
    return _forward(recipe, sources, source_gain, weights)[0]


def _forward(recipe: Recipe, sources, source_gain, weights: Weights):
    ys, residuals = forward(recipe, sources, source_gain, weights)
    return (ys, sources[0] if recipe.beside else None), residuals


def _backward(recipe: Recipe, residuals: Residuals, gradients):
    dys, dfirst = gradients
    return backward(recipe, residuals, dys, beside=dfirst)


_bit_linear.defvjp(_forward, _backward)
