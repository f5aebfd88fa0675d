"""Llama, the format of Transformer++ models: its config.json and its tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmfree_jax.config import ModelConfig, require
from mmfree_jax.interop.safetensors import Slot

# Keys of config.json without a default.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
FIXED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


# What a model must be to be written in this format.
ARCHITECTURE = {"sublayer_norm": False, "activation": "silu", "parametrisation": "standard"}


def model_config(values: dict[str, Any], file: Path) -> ModelConfig:
    """Return the architecture that a config.json describes. Raises ConfigError for what our attention cannot do."""
    return ModelConfig(**dense_fields(values, file))


def dense_fields(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the fields of a dense model with attention. Raises as `model_config`."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or heads
    head_dim = values.get("head_dim") or width // heads
    require(head_dim * heads == width, f"{file}: head_dim={head_dim} is not supported, only hidden_size / heads")
    # Older checkpoints have rope_theta at the top and rope_scaling beside it; newer ones have both in rope_parameters.
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    part = rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1
    require(part == 1, f"{file}: partial_rotary_factor={part} is not supported, only 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind == "default", f"{file}: rotary embeddings of type {kind!r} are not supported, only 'default'")
    theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    require(type(theta) in (int, float) and 0 < theta < 1e12, f"{file}: rope_theta={theta!r:.80} is no angle's base")
    return {
        "mixer": "attention",
        "linear": "dense",
        "vocab": values["vocab_size"],
        "width": width,
        "depth": values["num_hidden_layers"],
        "glu_width": values["intermediate_size"],
        "heads": heads,
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "tie_embeddings": values.get("tie_word_embeddings", False),
        "rope_theta": float(theta),
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "init_std": values.get("initializer_range", 0.02),
    }


def config_values(config: ModelConfig) -> dict[str, Any]:
    """Return what config.json has in this format only."""
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {**FIXED, **llama, **attention_values(config)}


def attention_values(config: ModelConfig) -> dict[str, Any]:
    """Return what config.json says of the attention."""
    return {
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.width // config.heads,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def tensors(config: ModelConfig, vocab: int) -> Iterator[tuple[str, Slot]]:
    """Yield the tensors outside the blocks, head excepted: names in the checkpoint and places in our parameters."""
    yield "model.embed_tokens.weight", Slot("embedding", (), (vocab, config.width))


def block_tensors(config: ModelConfig) -> Iterator[tuple[str, Slot]]:
    """Yield the tensors of one block."""
    D, F = config.width, config.glu_width
    kv_width = D // config.heads * (config.kv_heads or config.heads)
    yield "self_attn.q_proj.weight", Slot("mixer.query.kernel", (), (D, D), matrix=True)
    for g, name in enumerate("kv"):
        yield f"self_attn.{name}_proj.weight", Slot("mixer.key_value.kernel", (g,), (kv_width, D), matrix=True)
    yield "self_attn.o_proj.weight", Slot("mixer.out.kernel", (), (D, D), matrix=True)
    for g, name in enumerate(("gate", "up")):
        yield f"mlp.{name}_proj.weight", Slot("glu.gate_up.kernel", (g,), (F, D), matrix=True)
    yield "mlp.down_proj.weight", Slot("glu.down.kernel", (), (D, F), matrix=True)
    yield "input_layernorm.weight", Slot("mixer_norm.gain", (), (D,))
    yield "post_attention_layernorm.weight", Slot("glu_norm.gain", (), (D,))
