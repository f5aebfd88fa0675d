"""Presets: `FAMILY-SIZE` names a complete config, of which every field can be overridden."""

import difflib
from typing import Any

from mmfree_jax.config import FAMILIES, ConfigError, DataConfig, ModelConfig, OptimConfig, RunConfig

# name: (depth, width). 370m, 1.3b and 2.7b are those of Zhu et al. 2024 (arXiv 2406.02528), 7b and 13b those of Llama
# (Touvron et al. 2023, arXiv 2302.13971), 70b its 65B six layers deeper.
SIZES = {
    "tiny": (4, 128),
    "370m": (24, 1024),
    "1.3b": (24, 2048),
    "2.7b": (32, 2560),
    "7b": (32, 4096),
    "13b": (40, 5120),
    "70b": (86, 8192),
}
# Further architectures of a family. With a tied head llama.cpp loads a BitNet (docs/llama-cpp.md); b1.58 is what
# Microsoft published as BitNet b1.58 2B4T (Ma et al. 2025, arXiv 2504.12285).
B158 = {"activation": "relu2", "joint_glu": False, "rope_theta": 500_000.0, "norm_eps": 1e-5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bitnet-tied": ("bitnet", {"tie_embeddings": True}),
    "bitnet-b1.58": ("bitnet", {"tie_embeddings": True, **B158}),
}
OWN_SIZES = {"bitnet-b1.58": {"tiny": SIZES["tiny"], "2b4t": (30, 2560)}}
QUERIES_OF_A_KEY, OWN_VOCAB = {"bitnet-b1.58": 4}, {"bitnet-b1.58-2b4t": 128_256}
PRESETS = tuple(f"{family}-{size}" for family in (*FAMILIES, *VARIANTS) for size in OWN_SIZES.get(family, SIZES))

# Peak learning rates and token budgets of Zhu et al. 2024, section 4; 7b to 70b continue their trend and are untested.
# 2b4t: of its report.
RATES = {"370m": 4e-3, "1.3b": 2.5e-3, "2.7b": 1.5e-3, "7b": 1e-3, "13b": 7e-4, "70b": 3e-4, "2b4t": 1.5e-3}
DENSE_RATE = 3e-4
TOKENS = {"370m": 15e9, "1.3b": 100e9, "2.7b": 100e9, "7b": 100e9, "13b": 100e9, "70b": 100e9, "2b4t": 4e12}
TINY_RATES = {"dense": 2e-3, "ternary": 8e-3}  # experiments/results/quickstart_rates.csv


def split_name(preset: str) -> tuple[str, str]:
    """Split the name of a preset into family and size. Raises ConfigError that names the nearest preset."""
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1)
        raise ConfigError(
            f"no preset {preset!r}" + (f"; did you mean {near[0]}?" if near else f": {', '.join(PRESETS)}")
        )
    family, _, size = preset.rpartition("-")
    return family, size


def model_preset(family: str, size: str) -> ModelConfig:
    """Return the architecture of a family, or of a variant of one, and a size.

    Shape: GLU width 8/3 of the model width, rounded up to a multiple of 256 (64 for tiny), so that every family has
    4 D^2 + 3 D F weights a layer; attention heads of 128 channels (32 for tiny); vocabulary 32,000 (2,048).
    """
    name, (family, changes) = family, VARIANTS.get(family, (family, {}))
    depth, width = OWN_SIZES.get(name, SIZES)[size]
    mixer, linear = FAMILIES[family]
    tiny = size == "tiny"
    multiple, head = (64, 32) if tiny else (256, 128)
    return ModelConfig(
        mixer,
        linear,
        vocab=OWN_VOCAB.get(f"{name}-{size}", 2048 if tiny else 32000),
        width=width,
        depth=depth,
        glu_width=-(-width * 8 // (3 * multiple)) * multiple,
        heads=width // head if mixer == "attention" else 1,
        kv_heads=width // head // QUERIES_OF_A_KEY[name] if name in QUERIES_OF_A_KEY else 0,
        linear_norm=family != "bitnet",  # BitNet b1.58 norms the input of each projection once and
        sublayer_norm=family == "bitnet",  # keeps its head dense (Ma et al. 2025, arXiv 2504.12285)
        dense_head=family == "bitnet",
        **changes,
    )


def run_preset(preset: str) -> RunConfig:
    """Return the run of a preset: tiny takes about a minute on 2 CPU cores, the others follow the paper's recipe.

    Dense families have a cosine schedule to a tenth of the peak, ternary ones the same with the paper's halving at half
    the run.
    Raises ConfigError for an unknown name.
    """
    family, size = split_name(preset)
    model = model_preset(family, size)
    # Small enough for a first try on a laptop, with diagnostics on to show what there is to see.
    if size == "tiny":
        data = DataConfig(vocab=model.vocab, sequence=128, batch=16)
        optim = OptimConfig(lr=TINY_RATES[model.linear], warmup_steps=20, decay_steps=40)
        return RunConfig(preset, model, data, optim, steps=200, checkpoint_every=100, diagnose_every=100)
    data = DataConfig(vocab=model.vocab, sequence=2048, batch=256 if size == "370m" else 512)
    ternary = model.linear == "ternary"
    optim = OptimConfig(
        lr=RATES[size] if ternary else DENSE_RATE,
        schedule="cosine-halving" if ternary else "cosine",
        warmup_steps=1000,
        final_lr=0.1,
        weight_decay=0.01,
    )
    steps = round(TOKENS[size] / data.tokens_per_step)
    return RunConfig(
        preset, model, data, optim, steps=steps, checkpoint_every=1000, diagnose_every=1000, remat="products"
    )
