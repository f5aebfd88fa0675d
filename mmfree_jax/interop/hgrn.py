"""`hgrn_bit`, the format of the released MatMul-free models: its config.json and its tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmfree_jax.config import ModelConfig
from mmfree_jax.interop.safetensors import Slot

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")  # keys of config.json without a default
# What the official code computes whatever its config says, or only with these values.
FIXED = {"num_heads": 1, "expand_ratio": 1, "use_short_conv": False, "hidden_act": "swish"}

# What a model must be to be written in this format: what the official code computes.
ARCHITECTURE = {
    "dense_head": False, "linear_norm": True, "sublayer_norm": False, "output_gate": "official", "joint_glu": True,
    "activation": "silu", "activation_bits": 8, "weight_scale": "tensor", "parametrisation": "standard",
}  # fmt: skip


def model_config(values: dict[str, Any], file: Path) -> ModelConfig:
    """Return the architecture that a config.json describes."""
    # The official code rounds the GLU's width up to a multiple of 256 where the config gives a ratio.
    width = values["hidden_size"]
    rounded = -(-int(width * values.get("hidden_ratio", 4) * 2 / 3) // 256) * 256
    return ModelConfig(
        mixer="mlgru",
        linear="ternary",
        vocab=values["vocab_size"],
        width=width,
        depth=values["num_hidden_layers"],
        glu_width=values.get("intermediate_size") or rounded,
        lower_bounds=values.get("use_lower_bound", True),
        tie_embeddings=values.get("tie_word_embeddings", False),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        init_std=values.get("initializer_range", 0.02),
    )


def config_values(config: ModelConfig) -> dict[str, Any]:
    """Return what config.json has in this format only."""
    return {
        **FIXED,
        "model_type": "hgrn_bit",
        "architectures": ["HGRNBitForCausalLM"],
        "attn_mode": "fused_recurrent",
        "conv_size": 4,
        "share_conv_kernel": True,
        "use_lower_bound": config.lower_bounds,
        "hidden_ratio": 4,
        "fuse_cross_entropy": True,
        "use_cache": True,
    }


def tensors(config: ModelConfig, vocab: int) -> Iterator[tuple[str, Slot]]:
    """Yield the tensors outside the blocks, head excepted: names in the checkpoint and places in our parameters."""
    yield "model.embeddings.weight", Slot("embedding", (), (vocab, config.width))
    yield "lm_head.norm.weight", Slot("head.gain", (), (config.width,))
    if config.lower_bounds:
        yield "model.lower_bounds", Slot("lower_bounds", (), (config.depth, config.width))


def block_tensors(config: ModelConfig) -> Iterator[tuple[str, Slot]]:
    """Yield the tensors of one block. `gate_proj` packs the gate's rows before those of the up projection."""
    D, F = config.width, config.glu_width
    for g, name in enumerate("ifg"):
        yield f"attn.{name}_proj.weight", Slot("mixer.gates.kernel", (g,), (D, D), matrix=True)
        yield f"attn.{name}_proj.norm.weight", Slot("mixer.gates.gain", (g,), (D,))
    yield "attn.o_proj.weight", Slot("mixer.out.kernel", (), (D, D), matrix=True)
    yield "attn.o_proj.norm.weight", Slot("mixer.out.gain", (), (D,))
    yield "attn.g_norm.weight", Slot("mixer.gate_norm.gain", (), (D,))
    yield "attn_norm.weight", Slot("mixer_norm.gain", (), (D,))
    yield "mlp_norm.weight", Slot("glu_norm.gain", (), (D,))
    yield "mlp.gate_proj.weight", Slot("glu.gate_up.kernel", (), (2 * F, D), matrix=True)
    yield "mlp.gate_proj.norm.weight", Slot("glu.gate_up.gain", (), (D,))
    yield "mlp.down_proj.weight", Slot("glu.down.kernel", (), (D, F), matrix=True)
    yield "mlp.down_proj.norm.weight", Slot("glu.down.gain", (), (F,))
