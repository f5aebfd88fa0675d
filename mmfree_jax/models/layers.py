"""Parameters of the parts that every family shares: norms, projections, and what a block is told about its tokens."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.config import ModelConfig
from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear, bit_linear_beside
from mmfree_jax.ops.dense import dense
from mmfree_jax.ops.prologue import Prologue, settled
from mmfree_jax.ops.rms_norm import rms_norm
from mmfree_jax.ops.ternary import Quantised
from mmfree_jax.ops.ternary_weights import quantise_kernel
from mmfree_jax.parametrisation import output_depth, scales
from mmfree_jax.sharding import partitioned

Initializer = Any  # (key, shape, dtype) -> array


class Context(NamedTuple):
    """What a mixer may know about the tokens besides their activations; None where it does not apply.

    `starts_BT`: true at the first token of a document. `segments_BT`: document ids. `rotary`: cosines and sines
    [T, K/2] of the positions. `position`: how many tokens the decoding state already holds (an int32 scalar).
    """

    starts_BT: jax.Array | None = None
    segments_BT: jax.Array | None = None
    rotary: tuple[jax.Array, jax.Array] | None = None
    position: jax.Array | None = None


def normal(std: float) -> Initializer:
    """N(0, std)."""
    return nnx.initializers.normal(std)


def small_xavier() -> Initializer:
    """Xavier-uniform with gain 2^-2.5 over the last two axes: the official code's choice for i, f, g and o.

    mmfreelm/models/hgrn_bit/modeling_hgrn_bit.py of github.com/ridgerchu/matmulfreellm; the gain is RetNet's (Sun et
    al. 2023, arXiv 2307.08621).
    """

    def init(key, shape, dtype):
        bound = 2**-2.5 * math.sqrt(6 / (shape[-2] + shape[-1]))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def matrix_inits(config: ModelConfig) -> tuple[Initializer, Initializer]:
    """N(0, init_std) for what reads the residual stream; times 1/sqrt(2 L) for what writes to it.

    GPT-2, Radford et al. 2019, section 2.3; `parametrisation` says what width and depth change.
    """
    std = config.init_std * scales(config).std
    return normal(std), normal(std / math.sqrt(2 * output_depth(config)))


def mixer_inits(config: ModelConfig) -> tuple[Initializer, Initializer]:
    """Initialisers of a mixer's input and output projections.

    Recurrent mixers: `small_xavier` for both, never rescaled (the official code, with the transformers version of
    the paper's time). Attention: `matrix_inits`.
    """
    return matrix_inits(config) if config.mixer == "attention" else (small_xavier(), small_xavier())


def gain(shape: tuple[int, ...], param_dtype: Any) -> nnx.Param:
    """Gains of one norm, or of one a group; they start at one."""
    names = (None,) * (len(shape) - 1) + ("norm",)
    return nnx.Param(partitioned(nnx.initializers.ones, *names)(jax.random.key(0), shape, param_dtype))


class RMSNorm(nnx.Module):
    """RMSNorm with a gain that starts at one; no bias."""

    def __init__(self, width: int, eps: float, param_dtype: Any):
        self.eps = eps
        self.gain = gain((width,), param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D], in x's type."""
        return rms_norm(x, self.gain[...], self.eps)

    def deferred(self, x: jax.Array) -> Prologue:
        """The same, left to the BitLinear that takes it."""
        return Prologue("norm", (x,), self.gain[...], self.eps)


class Projection(nnx.Module):
    """One linear layer, or `groups` of them on the same input; dense, or ternary with its own norm (BitLinear).

    Ternary: one weight scale a matrix, or one for all groups with `joint` (they are one tensor in the official
    checkpoints: the gate and up halves of the GLU); likewise one norm gain a matrix, or one for all.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        init: Initializer,
        axes: tuple[str, str],
        groups: int = 0,
        joint: bool = False,
        param_dtype: Any = jnp.float32,
        dense: bool = False,
        kept_as: str = "projection",
    ):
        self.kept_as = kept_as
        shape = (groups, inputs, outputs) if groups else (inputs, outputs)
        names = (None, *axes) if groups else axes
        self.groups, self.axes = groups, axes
        self.kernel = nnx.Param(partitioned(init, *names)(rngs.params(), shape, param_dtype))
        self.recipe = None if dense or config.linear == "dense" else recipe(config, axes, joint)
        has_norm = self.recipe is not None and config.linear_norm
        own = (groups, inputs) if groups and not joint else (inputs,)
        self.gain = gain(own, param_dtype) if has_norm else None
        self.codes: tuple[Quantised, ...] | None = nnx.data(None)  # of the kernel, where they are made ahead of its use

    def __call__(self, x: jax.Array | Prologue) -> tuple[jax.Array, ...]:
        """[..., D] -> one [..., F] for each group (a tuple of one without groups)."""
        if self.recipe is None:
            ys = dense(self.axes, settled(x), self.weights().w_GDF)
        else:
            ys = bit_linear(self.recipe, x, *self.weights())
        return tuple(checkpoint_name(y, self.kept_as) for y in ys)

    def read(self, u: Prologue | jax.Array) -> tuple[tuple[jax.Array, ...], Prologue | jax.Array]:
        """`__call__`, and u once more. If u is of a stream that others need besides, they take it from there: a ternary
        layer then adds up both gradients to it in its own pass over them."""
        if self.recipe is None or not isinstance(u, Prologue):
            return self(u), u
        ys, u = bit_linear_beside(self.recipe, u, self.weights())
        return tuple(checkpoint_name(y, self.kept_as) for y in ys), u

    def weights(self) -> Weights:
        """Its arrays, as the ops take them."""
        w_GDF = self.kernel[...] if self.groups else self.kernel[...][None]
        return Weights(w_GDF, None if self.gain is None else self.gain[...], self.codes)

    def stacked_codes(self) -> tuple[Quantised, ...] | None:
        """Codes for `self.codes`, each with layers in front, if this stands for all layers; None for dense ones."""
        if self.recipe is None:
            return None
        w_LGDF = self.kernel[...] if self.groups else self.kernel[...][:, None]
        return jax.vmap(functools.partial(quantise_kernel, self.recipe))(w_LGDF)


def recipe(config: ModelConfig, axes: tuple[str, str], joint: bool = False) -> Recipe:
    """What the ternary layers of a model compute."""
    per_matrix = (-2,) if config.weight_scale == "channel" else (-2, -1)
    across = (-3, *per_matrix) if joint and config.weight_scale == "tensor" else per_matrix
    return Recipe(config.activation_bits, across, config.norm_eps, axes, config.gradient_bits)
