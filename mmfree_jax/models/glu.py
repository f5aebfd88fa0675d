"""Channel mixing: the gated linear unit of every family (SwiGLU, Shazeer 2020, arXiv 2002.05202; Zhu et al. 2024,
section 3.3)."""

from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.config import ModelConfig
from mmfree_jax.models.layers import Projection, RMSNorm, matrix_inits
from mmfree_jax.ops.bit_glu import bit_glu
from mmfree_jax.ops.prologue import Prologue
from mmfree_jax.sharding import constrain


class GLU(nnx.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one tensor to the quantiser, as in the official checkpoints."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: Any):
        D, F = config.width, config.glu_width
        into, out = matrix_inits(config)
        kwargs = {"rngs": rngs, "param_dtype": param_dtype}
        self.gate_up = Projection(
            config, D, F, init=into, axes=("embed", "mlp"), groups=2, joint=True, kept_as="gate_up", **kwargs
        )
        self.norm = RMSNorm(F, config.norm_eps, param_dtype) if config.sublayer_norm else None
        self.down = Projection(config, F, D, init=out, axes=("mlp", "embed"), **kwargs)

    def __call__(self, u_BTD: jax.Array | Prologue) -> tuple[jax.Array, jax.Array | Prologue]:
        """[B, T, D] -> [B, T, D], and u (`Projection.read`)."""
        into, out = self.gate_up.recipe, self.down.recipe
        if into is not None and out is not None and self.norm is None and isinstance(u_BTD, Prologue):
            y_BTD, u_BTD = bit_glu(into, u_BTD, self.gate_up.weights(), out, self.down.weights())
            return checkpoint_name(y_BTD, "projection"), u_BTD
        gate_up, u_BTD = self.gate_up.read(u_BTD)
        y_BTF = Prologue("swiglu", tuple(constrain(a, "batch", "time", "channels") for a in gate_up)).value()
        return self.down(y_BTF if self.norm is None else self.norm(y_BTF))[0], u_BTD
