"""The shape rule of small ladders: one model for each width, so that sizes differ in nothing else."""

import dataclasses

from mmfree_jax import flops
from mmfree_jax.config import ModelConfig
from mmfree_jax.presets import model_preset

# At one N the loss hardly depends on depth to width, on the width of a head or on that of the feed-forward layer
# (Kaplan et al. 2020, arXiv 2001.08361, figure 5), so any rule that all families share is good enough.

HEAD = 32  # channels of an attention head
GLU_MULTIPLE = 16
WIDTHS = range(32, 8193, 32)


def ladder_model(family: str, width: int, vocab: int, depth: int) -> ModelConfig:
    """Return a family at a width: GLU width 8/3 of it, rounded up to a multiple of 16; heads of about 32 channels.

    8/3: three matrices of a GLU have the parameters of two of width 4 (Shazeer 2020, arXiv 2002.05202, section 2).
    """
    base = model_preset(family, "tiny")
    return dataclasses.replace(
        base,
        vocab=vocab,
        width=width,
        depth=depth,
        glu_width=-(-width * 8 // (3 * GLU_MULTIPLE)) * GLU_MULTIPLE,
        heads=max(1, width // HEAD) if base.mixer == "attention" else 1,
    )


def nearest_model(family: str, size: float, vocab: int) -> ModelConfig:
    """Return the family's model whose N is nearest to `size`, with one layer per 64 of width and at least two.

    The sizes of GPT-3 have 43 to 128 channels a layer (Brown et al. 2020, arXiv 2005.14165, table
    2.1).
    """
    models = [ladder_model(family, width, vocab, depth=max(2, width // 64)) for width in WIDTHS]
    return min(models, key=lambda m: abs(flops.parameters(m).N - size))
