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

from mmfree_jax.ops.kernels.choice import on_hopper, one_device
from mmfree_jax.ops.prologue import Kind, Prologue, combine
from mmfree_jax.ops.rms_norm import reciprocal_rms, rms_norm_backward
from mmfree_jax.ops.ternary import Quantised, dequantise, quantise_activations, ternary_codes, weight_scale, wide
from mmfree_jax.sharding import constrain


class Recipe(NamedTuple):
    """What a BitLinear computes, apart from its arrays."""

    bits: int = 8  # of the activations; 0 leaves them as they are
    scale_axes: tuple[int, ...] = (-2, -1)  # axes of w_GDF that share one weight scale
    eps: float = 1e-6
    axes: tuple[str | None, str | None] = (None, None)  # logical names of the input and output axes of w
    prologue: Kind = "plain"  # how the input is made of the arrays that are kept; set by `bit_linear`


class Saved(NamedTuple):
    """What the backward pass needs of the input side."""

    sources: tuple[jax.Array, ...]
    source_gain: jax.Array | None
    gain: jax.Array | None
    rstd: jax.Array | None  # None without a gain, and where a kernel computes it again
    inputs: tuple[Quantised, ...]  # one, or one a product where the products have their own gains
    scales: tuple[jax.Array, ...] = ()  # theirs, where a kernel makes the codes again and `inputs` need not be kept


def bit_linear(
    recipe: Recipe, x: jax.Array | Prologue, w_GDF: jax.Array, gain: jax.Array | None
) -> tuple[jax.Array, ...]:
    """G ternary products of one input.

    Args:
        recipe: static options.
        x: [..., D] activations, or how they are to be made: they are then made again in the backward pass, not kept.
        w_GDF: latent weights, quantised per `recipe.scale_axes`.
        gain: of the RMSNorm before the quantiser: [D] shared by the products, [G, D] one each, None for no norm.

    Returns:
        G arrays [..., F] of x's type.
    """
    if not isinstance(x, Prologue):
        return _bit_linear(recipe, (x,), None, w_GDF, gain)
    if x.gain is not None and x.eps != recipe.eps:
        raise ValueError(f"the norms of one BitLinear share their epsilon: {x.eps} and {recipe.eps}")
    return _bit_linear(recipe._replace(prologue=x.kind), x.sources, x.gain, w_GDF, gain)


def quantise_input(
    recipe: Recipe, sources: tuple[jax.Array, ...], source_gain: jax.Array | None, gain: jax.Array | None
) -> Saved:
    """Make the input, norm and quantise it: the input side of `bit_linear`."""
    if _one_pass_serves(recipe, sources, source_gain, gain):
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


def _one_pass_serves(recipe: Recipe, sources, source_gain, gain) -> bool:
    """Whether the kernels between activations and codes serve: 8 bits, whole lanes, and a norm before the quantiser."""
    if gain is None or recipe.bits != 8 or recipe.prologue == "plain" or not (on_hopper() and one_device()):
        return False
    from mmfree_jax.ops.kernels.normed_codes import supports

    vectors = (source_gain is not None) + len(_gains(gain))
    return supports(sources[0].shape[-1], vectors, sources[0].dtype)


def _one_pass(recipe: Recipe, sources, source_gain, gain) -> tuple[Quantised, ...]:
    from mmfree_jax.ops.kernels.normed_codes import forward

    shape = sources[0].shape
    codes, scales = forward(recipe.prologue, *_rows_and_gains(sources, source_gain, gain), recipe.eps)
    pairs = zip(codes, scales, strict=True)
    return tuple(_kept(Quantised(q.reshape(shape), s.reshape(*shape[:-1], 1))) for q, s in pairs)


def _one_pass_backward(recipe: Recipe, saved: Saved, dys: list[jax.Array]) -> tuple:
    """What `input_backward` returns, and the dequantised inputs, made again on the way."""
    from mmfree_jax.ops.kernels.normed_codes import backward

    sources, source_gain, gain = saved.sources, saved.source_gain, saved.gain
    assert gain is not None
    arrays = _rows_and_gains(sources, source_gain, gain)
    scales = [scale.reshape(-1) for scale in saved.scales]
    dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    drows, dsource_gain, dgains, inputs = backward(recipe.prologue, *arrays, scales, dys, recipe.eps)
    shaped = lambda rows: tuple(a.reshape(sources[0].shape) for a in rows)
    like = lambda d, a: None if a is None else d.reshape(a.shape).astype(a.dtype)
    gradients = shaped(drows), like(dsource_gain, source_gain), like(jnp.stack(dgains), gain)
    return gradients, shaped(inputs)


def _rows_and_gains(sources, source_gain, gain) -> tuple[list, jax.Array | None, list]:
    """A kernel's operands: activations as [rows, D], gains as float32 vectors."""
    rows = [s.reshape(-1, s.shape[-1]) for s in sources]
    gains = [g.astype(jnp.float32) for g in _gains(gain)]
    return rows, None if source_gain is None else source_gain.astype(jnp.float32), gains


def _kept(q: Quantised) -> Quantised:
    """Codes named for the remat policies: a byte a value, cheaper kept than made again."""
    return q if q.scale is None else Quantised(checkpoint_name(q.codes, "codes"), checkpoint_name(q.scale, "per_token"))


def quantise_kernel(recipe: Recipe, w_GDF: jax.Array) -> tuple[Quantised, ...]:
    """Ternary codes [D, F] of each matrix, quantised where they live and then gathered: a byte a weight travels."""
    groups, into, out = w_GDF.shape[0], *recipe.axes
    scale = weight_scale(w_GDF, recipe.scale_axes)
    scale = jnp.broadcast_to(scale, (groups, 1, scale.shape[-1]))

    def one(g: int) -> Quantised:
        codes = constrain(ternary_codes(w_GDF[g], scale[g]), into, out)
        codes = constrain(codes, None if into == "embed" else into, out)
        return Quantised(checkpoint_name(codes, "codes"), checkpoint_name(scale[g], "codes"))

    return tuple(one(g) for g in range(groups))


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


def input_gradient(w: Quantised, dy: jax.Array) -> jax.Array:
    """The gradient to the dequantised input [..., D] of `product`, in dy's type."""
    exact = wide(dy.dtype)
    scaled = dy if w.scale is None or w.scale.size == 1 else (dy * w.scale).astype(dy.dtype)
    dx = jnp.matmul(scaled, w.codes.astype(dy.dtype).T, preferred_element_type=exact)
    if w.scale is not None and w.scale.size == 1:
        dx = dx * w.scale.reshape(()).astype(exact)
    return dx.astype(dy.dtype)


def outer(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient to w of x @ w, summed over all rows: [..., D], [..., F] -> [D, F] in `wide(dy.dtype)`."""
    rows = tuple(range(dy.ndim - 1))
    return jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=wide(dy.dtype))


def input_backward(recipe: Recipe, saved: Saved, dys: list[jax.Array]) -> tuple:
    """Gradients to sources, source_gain and gain, given those to the quantised inputs, one for each product."""
    make = functools.partial(combine, recipe.prologue, eps=recipe.eps)
    x, pull = jax.vjp(lambda sources, gain: make(sources, gain), saved.sources, saved.source_gain)
    dx, dgain = _norm_backward(x, saved, dys)
    return *pull(dx), dgain


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bit_linear(recipe: Recipe, sources, source_gain, w_GDF: jax.Array, gain: jax.Array | None):
    return _forward(recipe, sources, source_gain, w_GDF, gain)[0]


def _forward(recipe: Recipe, sources, source_gain, w_GDF: jax.Array, gain: jax.Array | None):
    saved = quantise_input(recipe, sources, source_gain, gain)
    kernel = quantise_kernel(recipe, w_GDF)
    dtype = sources[0].dtype
    ys = [product(q, w, dtype, dtype) for q, w in zip(_spread(saved.inputs, kernel), kernel, strict=True)]
    if saved.scales:
        saved = saved._replace(inputs=())
    like = jnp.zeros((), w_GDF.dtype)  # residuals are arrays: this one carries the weights' type
    return tuple(ys), (saved, kernel, like)


def _backward(recipe: Recipe, residuals, dys):
    # Behind a barrier, or the compiler makes the dequantised inputs in the forward pass and keeps them until here.
    (saved, kernel, like), dys = jax.lax.optimization_barrier((residuals, dys))
    dinputs = [input_gradient(w, dy) for w, dy in zip(kernel, dys, strict=True)]
    if saved.scales:  # the forward pass chose; the user's choice may not reach here
        (dsources, dsource_gain, dgain), inputs = _one_pass_backward(recipe, saved, dinputs)
    else:
        dsources, dsource_gain, dgain = input_backward(recipe, saved, dinputs)
        inputs = tuple(dequantise(q, dy.dtype) for q, dy in zip(saved.inputs, dys, strict=False))
    dw_GDF = jnp.stack([outer(x, dy) for x, dy in zip(_spread(inputs, kernel), dys, strict=True)])
    return dsources, dsource_gain, dw_GDF.astype(like.dtype), dgain


def _spread(inputs: tuple, kernel: tuple) -> tuple:
    """An input for each matrix: its own, or the one that all share."""
    return inputs * (len(kernel) if len(inputs) == 1 else 1)


_bit_linear.defvjp(_forward, _backward)
