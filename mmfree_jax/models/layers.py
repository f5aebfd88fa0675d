"""Layers that every family shares: norms, projections, the GLU, and what a block is told about its tokens."""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.architecture import ModelConfig, scales
from mmfree_jax.ops.bit_linear import Recipe, Weights, linear, quantise_kernel, rms_norm
from mmfree_jax.ops.glu import glu
from mmfree_jax.ops.ternary import Quantised

Initializer = Any  # (key, shape, dtype) -> array

# Modules are built without a mesh; shardings are applied once, where the state is made by a jitted initialiser.
nnx.use_eager_sharding(False)


class Context(NamedTuple):
    """What a mixer may know about the tokens besides their activations; None where it does not apply.

    `starts_BT`: true at the first token of a document. `segments_BT`: document ids. `rotary`: cosines and sines of the
    positions, [T, K/2] or [B, T, K/2]. `positions_BT`: the places of tokens that follow a decoding state.
    """

    starts_BT: jax.Array | None = None
    segments_BT: jax.Array | None = None
    rotary: tuple[jax.Array, jax.Array] | None = None
    positions_BT: jax.Array | None = None


def initialisers(config: ModelConfig, sublayer: Literal["mixer", "glu"]) -> tuple[Initializer, Initializer]:
    """Return the initialisers of a sublayer's input and output projections.

    GLU and attention: N(0, init_std) for what reads the residual stream, and that times 1 / sqrt(2 L) for what writes
    to it (GPT-2, Radford et al. 2019, section 2.3); `architecture.Scales` says what width and depth change. Recurrent
    mixers: Xavier-uniform with gain 2^-2.5 for both, never rescaled, as in the official code
    (mmfreelm/models/hgrn_bit/modeling_hgrn_bit.py of github.com/ridgerchu/matmulfreellm, with the transformers version
    of the paper's time); the gain is RetNet's (Sun et al. 2023, arXiv 2307.08621).
    """
    if sublayer == "mixer" and config.mixer != "attention":

        def small_xavier(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            # Only the last two axes are a matrix: those before them are groups of matrices, which no fan counts.
            bound = 2**-2.5 * math.sqrt(6 / (shape[-2] + shape[-1]))
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return small_xavier, small_xavier
    # The residual stream is a sum of 2 L outputs, two a block: 1 / sqrt(2 L) keeps its variance that of one.
    factors = scales(config)
    std = config.init_std * factors.std
    return nnx.initializers.normal(std), nnx.initializers.normal(std / math.sqrt(2 * factors.output_depth))


def recipe_of(config: ModelConfig, axes: tuple[str, str], joint: bool = False) -> Recipe:
    """Return what a model's linear layers compute. joint: all matrices of a layer share one weight scale."""
    if config.linear == "dense":
        return Recipe(ternary=False, eps=config.norm_eps, axes=axes)
    # A scale per matrix is the paper's. The quantiser divides by a mean of magnitudes, so the matrices of one tensor in
    # the official checkpoints (gate and up) have to share it, or their codes would differ from the official ones.
    # Of [G, D, F]: a scale for each column, for each matrix, or for the matrices of the layer together.
    scale_axes: tuple[int, ...] = (-2,)
    if config.weight_scale != "channel":
        scale_axes = (-3, -2, -1) if joint else (-2, -1)
    recipe = Recipe(True, config.activation_bits, scale_axes, config.norm_eps, axes, config.gradient_bits)
    return recipe._replace(best_scale=config.weight_scale == "optimal")


def param(
    shape: tuple[int, ...],
    dtype: Any,
    *axes: str | None,
    init: Initializer = nnx.initializers.ones,
    rngs: nnx.Rngs | None = None,
) -> nnx.Param:
    """Return a parameter whose axes carry logical names, by which `sharding.Rules` places it.

    By default the gain of a norm: ones. Only random initialisers need `rngs`.
    """
    # The names travel as metadata of the parameter: through `eval_shape`, `vmap` over layers (which adds its own) and
    # into the sharding of the state. The array itself is made without a mesh.
    key = jax.random.key(0) if rngs is None else rngs.params()
    return nnx.Param(nnx.with_partitioning(init, axes)(key, shape, dtype))


class RMSNorm(nnx.Module):
    """RMSNorm with a gain that starts at one; no bias."""

    def __init__(self, width: int, eps: float, param_dtype: Any):
        self.eps = eps
        self.gain = param((width,), param_dtype, "norm")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [..., D], in x's type."""
        return rms_norm(x, self.gain[...], self.eps)


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
    ):
        shape = (groups, inputs, outputs) if groups else (inputs, outputs)
        names = (None, *axes) if groups else axes
        self.groups, self.recipe = groups, recipe_of(config, axes, joint)
        self.kernel = param(shape, param_dtype, *names, init=init, rngs=rngs)
        # The official checkpoints have a norm for each projection, though all of a layer read the same input.
        own = groups > 0 and not joint
        gain_shape, gain_axes = ((groups, inputs), (None, "norm")) if own else ((inputs,), ("norm",))
        has_gain = self.recipe.ternary and config.linear_norm
        self.gain = param(gain_shape, param_dtype, *gain_axes) if has_gain else None
        # Data, not a parameter: with gradient accumulation the codes of a step are put here once
        # (`LanguageModel.use_codes`) and live in the traced program only. `nnx.data` keeps NNX from freezing None into
        # the module's static structure.
        self.codes: tuple[Quantised, ...] | None = nnx.data(None)  # of the kernel, where quantised ahead of its use

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """[..., D] -> one [..., F] for each group (a tuple of one without groups)."""
        return tuple(checkpoint_name(y, "projection") for y in linear(self.recipe, x, self.weights()))

    def weights(self) -> Weights:
        """Return its arrays, as the ops take them."""
        w_GDF = self.kernel[...] if self.groups else self.kernel[...][None]
        return Weights(w_GDF, None if self.gain is None else self.gain[...], self.codes)

    def stacked_codes(self) -> tuple[Quantised, ...] | None:
        """Quantise the kernel of all layers, whose stack this is: codes with layers in front; None for dense layers."""
        if not self.recipe.ternary:
            return None
        w_LGDF = self.kernel[...] if self.groups else self.kernel[...][:, None]
        return jax.vmap(functools.partial(quantise_kernel, self.recipe))(w_LGDF)


class GLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), the channel mixer of every family (SwiGLU, Shazeer 2020, arXiv 2002.05202; Zhu et
    al. 2024, section 3.3); gate and up are one tensor to the quantiser, as in the official checkpoints. Both are
    switches: `config.activation` and `config.joint_glu`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: Any):
        D, F = config.width, config.glu_width
        into, out = initialisers(config, "glu")
        kwargs = {"rngs": rngs, "param_dtype": param_dtype}
        self.activation, joint = config.activation, config.joint_glu
        self.gate_up = Projection(config, D, F, init=into, axes=("embed", "mlp"), groups=2, joint=joint, **kwargs)
        self.norm = RMSNorm(F, config.norm_eps, param_dtype) if config.sublayer_norm else None
        self.down = Projection(config, F, D, init=out, axes=("mlp", "embed"), **kwargs)

    def __call__(self, u_BTD: jax.Array) -> jax.Array:
        """Mix channels of normed activations: [B, T, D] -> [B, T, D]."""
        gate_up, down = self.gate_up, self.down
        gain_F = None if self.norm is None else self.norm.gain[...]
        y_BTD = glu(gate_up.recipe, gate_up.weights(), down.recipe, down.weights(), u_BTD, gain_F, self.activation)
        return checkpoint_name(y_BTD, "projection")
