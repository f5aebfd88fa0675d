"""BitNet b1.58 as transformers has it (`BitNetForCausalLM`, Ma et al. 2025, arXiv 2504.12285): its config.json, its
tensors, and the forms in which its ternary weights are stored.

Either a folder has latent weights, which are quantised at each use ("online"), or codes with a scale for each matrix,
`weight_scale` ("offline"). Without a quantisation_config transformers quantises nothing, and the layers are dense here
too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.config import ModelConfig, require
from mmfree_jax.interop import llama
from mmfree_jax.interop.safetensors import Slot

SIZES = llama.SIZES
FIXED = {"attention_bias": False}
# What a model must be to be written in this format.
ARCHITECTURE = {
    "dense_head": True, "linear_norm": False, "sublayer_norm": True, "joint_glu": False, "activation_bits": 8,
    "weight_scale": "tensor", "parametrisation": "standard",
}  # fmt: skip
CODES_IN_A_BYTE = 4


def model_config(values: dict[str, Any], file: Path) -> ModelConfig:
    """Return the architecture that a config.json describes. Raises ConfigError for what our models cannot do."""
    quantised, activation = values.get("quantization_config"), values.get("hidden_act", "relu2")
    require(activation in ("relu2", "silu"), f"{file}: hidden_act={activation!r} is not supported, only relu2 and silu")
    ternary: dict[str, Any] = {}
    if quantised:
        _check(quantised, file)
        ternary = {"linear": "ternary", "linear_norm": False, "dense_head": True, "joint_glu": False}
    defaults = {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
    dense = llama.dense_fields(defaults | values, file)
    return ModelConfig(**dense | ternary | {"sublayer_norm": True, "activation": activation})


def _check(quantised: Any, file: Path) -> None:
    """Raise ConfigError for a quantiser that is not ours."""
    # What is missing is accepted: `coded` knows the defaults of transformers.
    known = {
        "quant_method": ("bitnet",),
        "linear_class": ("autobitlinear", "bitlinear"),
        "quantization_mode": ("online", "offline"),
        "modules_to_not_convert": (None, [], ["lm_head"]),
        "use_rms_norm": (False,),
    }
    require(isinstance(quantised, dict), f"{file}: quantization_config={quantised!r} is not an object")
    for name, values in known.items():
        found = quantised.get(name, values[0])
        require(found in values, f"{file}: quantization_config.{name}={found!r} is not supported")


def config_values(config: ModelConfig) -> dict[str, Any]:
    """Return what config.json has in this format only; weights are written as latent ones."""
    found = {
        **llama.attention_values(config),
        "model_type": "bitnet",
        "architectures": ["BitNetForCausalLM"],
        "attention_bias": False,
        "hidden_act": config.activation,
    }
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    return found | ({"quantization_config": online} if config.linear == "ternary" else {})


tensors = llama.tensors


def block_tensors(config: ModelConfig) -> Iterator[tuple[str, Slot]]:
    """Yield the tensors of one block: Llama's, and norms before the output and down projections."""
    yield from llama.block_tensors(config)
    yield "self_attn.attn_sub_norm.weight", Slot("mixer.norm.gain", (), (config.width,))
    yield "mlp.ffn_sub_norm.weight", Slot("glu.norm.gain", (), (config.glu_width,))


def coded(values: dict[str, Any], table: dict[str, Slot]) -> dict[str, Slot]:
    """Return the tensors of a folder whose matrices are codes, by what its config.json says; else the table as it is.

    Beside each matrix there is its scale, which has no place in our parameters.
    """
    quantised = values.get("quantization_config") or {}
    # `bitlinear` stores the inverse of the scale, `autobitlinear` the scale.
    divides = quantised.get("linear_class", "bitlinear") == "bitlinear"
    if not quantised or (not divides and quantised.get("quantization_mode", "offline") == "online"):
        return table
    found = {}
    for name, slot in table.items():
        found[name] = slot
        if slot.matrix and "_proj." in name:
            scale = name.replace(".weight", ".weight_scale")
            packed = (-(-slot.shape[0] // CODES_IN_A_BYTE), *slot.shape[1:])
            found[name] = slot._replace(packed=packed, scale=scale, divides=divides)
            found[scale] = Slot("", (), (1,))
    return found


def latent(stored: np.ndarray, scale: float, rows: int) -> np.ndarray:
    """Return weights [rows, in] whose absmean codes and scale are the stored ones.

    stored: codes as numbers, or four in a byte: a byte of row r holds the codes of the rows r + p * rows / 4, plus 1,
    in the bits 2p and 2p + 1.
    """
    codes = stored.astype(np.float32)
    if stored.dtype == np.uint8:
        codes = np.concatenate([stored >> 2 * p & 3 for p in range(CODES_IN_A_BYTE)])[:rows].astype(np.float32) - 1
    # The mean of |codes * scale| would be smaller than the scale by the share of zeros, so quantising these again would
    # shrink every weight. Divided by that share the mean is the scale, and a non-zero code is still rounded to itself.
    share = np.count_nonzero(codes) / codes.size
    return codes * np.float32(scale / share if share else 0)
