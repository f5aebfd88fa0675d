"""The MatMul-free model as a first version would be written: what the optimised step is compared with.

Fake quantisation with gradients by autodiff, an associative scan, all logits at once, no recomputation. It takes the
parameters of a `LanguageModel` and computes the same function; tests hold the two losses together.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.models.mlgru import floors


def loss(model: LanguageModel, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats. Norms and quantisers compute in the model's activation type."""
    eps, dtype = model.config.norm_eps, model.dtype
    params = nnx.to_pure_dict(nnx.state(model.blocks, nnx.Param))
    assert model.lower_bounds is not None
    assert model.head.kernel is not None
    assert model.head.gain is not None

    def block(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        p, floor_D = layer
        x_BTD = x_BTD + _mixer(p["mixer"], _norm(x_BTD, p["mixer_norm"]["gain"], eps), floor_D, eps)
        return x_BTD + _glu(p["glu"], _norm(x_BTD, p["glu_norm"]["gain"], eps), eps), None

    x_BTD = model.embedding[...][tokens_BT].astype(dtype)
    depth = model.config.depth
    x_BTD, _ = jax.lax.scan(block, x_BTD, (params, floors(model.lower_bounds[...])), unroll=depth)
    x_BTD = _norm(x_BTD, model.norm.gain[...], eps)
    logits_BTV = _bit_linear(x_BTD, model.head.kernel[...], model.head.gain[...], eps).astype(jnp.float32)
    hit_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits_BTV, axis=-1) - hit_BT)


def _mixer(p: Any, u_BTD: jax.Array, floor_D: jax.Array, eps: float) -> jax.Array:
    kernel, gain = p["gates"]["kernel"], p["gates"]["gain"]
    c_BTD, f_BTD, g_BTD = (_bit_linear(u_BTD, kernel[i], gain[i], eps) for i in range(3))
    floor_D = floor_D.astype(u_BTD.dtype)
    factor_BTD = floor_D + (1 - floor_D) * jax.nn.sigmoid(f_BTD)
    x_BTD = (1 - factor_BTD) * jax.nn.silu(c_BTD)
    combine = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
    h_BTD = jax.lax.associative_scan(combine, (factor_BTD, x_BTD), axis=1)[1]
    y_BTD = _norm(g_BTD, p["gate_norm"]["gain"], eps) * jax.nn.silu(h_BTD)
    return _bit_linear(y_BTD, p["out"]["kernel"], p["out"]["gain"], eps)


def _glu(p: Any, x_BTD: jax.Array, eps: float) -> jax.Array:
    kernel_2DF, gain = p["gate_up"]["kernel"], p["gate_up"]["gain"]
    both = jnp.concatenate([kernel_2DF[0], kernel_2DF[1]], axis=-1)
    gate_BTF, up_BTF = jnp.split(_bit_linear(x_BTD, both, gain, eps), 2, axis=-1)
    return _bit_linear(jax.nn.silu(gate_BTF) * up_BTF, p["down"]["kernel"], p["down"]["gain"], eps)


def _norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * gain.astype(x.dtype)


def _bit_linear(x: jax.Array, w: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    x = _norm(x, gain, eps)
    to_codes = 127 / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-5)
    x = x + jax.lax.stop_gradient(jnp.clip(jnp.round(x * to_codes), -128, 127) / to_codes - x)
    w = w.astype(x.dtype)
    to_signs = 1 / jnp.maximum(jnp.mean(jnp.abs(w)), 1e-5)
    w = w + jax.lax.stop_gradient(jnp.clip(jnp.round(w * to_signs), -1, 1) / to_signs - w)
    return x @ w
