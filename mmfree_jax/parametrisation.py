"""What changes with the width and depth of a model: factors on initial values, outputs, rates and Adam's epsilon.

standard: nothing; the rate has to be found again at every size. mup: maximal update parametrisation (Yang et al. 2022,
arXiv 2203.03466, table 8) with depth as in CompleteP (Dey et al. 2025, arXiv 2505.01618, table 1, alpha = 1): rate,
weight decay and initial values found at `base_width` and `base_depth` are right at every size. At the base both are the
same model and the same training. docs/parametrisation.md derives what this means for ternary layers. Needs no JAX.
"""

import math
from dataclasses import dataclass
from typing import Literal

from mmfree_jax.architecture import ModelConfig

# matrix: between hidden layers, latent ternary ones included; gain: norms' gains and every other vector of a block.
Role = Literal["matrix", "embedding", "head", "gain", "lower_bounds"]


@dataclass(frozen=True)
class Scales:
    """Factors of the forward pass and of initial values relative to the base model."""

    output_depth: int  # L in the factor 1 / sqrt(2 L) on initial values of projections that write to the stream
    std: float = 1.0  # of the initial matrices of a block; the small Xavier of recurrent mixers includes it
    residual: float = 1.0  # on the output of a mixer or GLU, before it is added to the residual stream
    logits: float = 1.0
    scores: float = 1.0  # on attention scores, in addition to 1 / sqrt(K)


def scales(config: ModelConfig) -> Scales:
    """Return the factors of a model; all 1 under the standard parametrisation."""
    if config.parametrisation == "standard":
        return Scales(config.depth)
    # A sum of `width` products has a variance in proportion to the width, so initial matrices shrink with its root.
    # Logits shrink with the width itself, because in training the head's weights align with its input, and sums of
    # aligned terms grow in proportion to their number.
    wider, deeper = ratios(config)
    head = config.width // config.heads
    scores = math.sqrt(config.base_head / head) if config.mixer == "attention" and config.base_head else 1.0
    # The depth of the base, because the residual branch has a factor 1 / L of its own at every depth.
    return Scales(config.base_depth, std=1 / math.sqrt(wider), residual=1 / deeper, logits=1 / wider, scores=scores)


def ratios(config: ModelConfig) -> tuple[float, float]:
    """Return width and depth relative to the base; (1, 1) under the standard parametrisation."""
    if config.parametrisation == "standard":
        return 1.0, 1.0
    return config.width / config.base_width, config.depth / config.base_depth


def rate_factor(config: ModelConfig, role: Role, optimizer: Literal["adamw", "muon"] = "adamw") -> float:
    """Return the factor on the learning rate of parameters with this role.

    It is not 1 only for matrices between hidden layers. Adam's updates have entries of size 1 and the rank of a batch,
    so their effect grows with the width, which 1 / width compensates. Muon's are orthogonal; with root mean square 1
    their spectral norm is the root of the width (Yang et al. 2023, arXiv 2310.17813, condition 1).
    """
    wider, _ = ratios(config)
    if role != "matrix":
        return 1.0
    return 1 / wider if optimizer == "adamw" else 1 / math.sqrt(wider)


def gradient_factor(config: ModelConfig, in_block: bool) -> float:
    """Return the factor that gives a gradient its size at the base, so that Adam's epsilon means the same at every
    size.

    Gradients fall as 1 / width, inside blocks also as 1 / depth. Multiplying them by the inverse is the same as scaling
    epsilon by 1 / width / depth, as CompleteP does: m / (sqrt(v) + c eps) = (m / c) / (sqrt(v) / c + eps).
    """
    wider, deeper = ratios(config)
    return wider * deeper if in_block else wider
