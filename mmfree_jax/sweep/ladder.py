"""A ladder with one dial: the model size determines width, depth, heads, batch, learning rate, weight decay and
horizon.

Shape: `mmfree_jax.sweep.shapes`. Batch, rate and weight decay: the functions below. Horizon: `ratios` of `rungs`.

Every formula was measured by somebody, at other sizes and on other data than yours: use them to begin with. The rate
transfers between widths and depths by muP (`architecture.Scales`), so it is measured once, at the base.
"""

import dataclasses
import math
from collections.abc import Sequence

from mmfree_jax import flops
from mmfree_jax.config import DataConfig, OptimConfig, RunConfig, require
from mmfree_jax.sweep.experiment import trunk_and_decays
from mmfree_jax.sweep.shapes import nearest_model


@dataclasses.dataclass(frozen=True)
class Base:
    """The size at which a family's learning rate was measured: width, depth and tokens a step."""

    lr: float
    width: int
    depth: int
    batch_tokens: int


def rungs(
    family: str, base: Base, sizes: Sequence[float], ratios: Sequence[float], data: DataConfig
) -> list[RunConfig]:
    """Return, for each size, a trunk and a decay that branches off it for each tokens-per-parameter ratio.

    Args:
        family: of `config.FAMILIES`.
        base: where its rate was measured.
        sizes: parameters N in products, head included.
        ratios: D / N of the end points; 20 is about compute-optimal (Hoffmann et al. 2022, arXiv 2203.15556).
        data: corpus and sequence length; its batch is replaced.

    Raises ConfigError for no sizes or ratios.
    """
    require(bool(sizes) and bool(ratios), "a ladder needs at least one size and one ratio")
    runs, ratios = [], sorted(ratios)
    for size in sizes:
        model = nearest_model(family, size, data.vocab)
        model = dataclasses.replace(model, parametrisation="mup", base_width=base.width, base_depth=base.depth)
        N = flops.parameters(model).N
        # The batch follows from the longest run of a size, because a trunk and its decays must share it. 6 N D is not
        # exact, but the same for families of one size.
        data = dataclasses.replace(data, batch=batch_sequences(6 * N * ratios[-1] * N, data.sequence))
        budgets = [max(10, round(ratio * N / data.tokens_per_step)) for ratio in ratios]
        lr = base.lr * rate_of_batch(data.tokens_per_step, base.batch_tokens)
        decay = weight_decay(lr, budgets[-1], ratios[-1])
        # A tenth of the shortest budget, as all budgets of a size share the warm-up of their trunk.
        optim = OptimConfig(lr=lr, warmup_steps=max(1, budgets[0] // 10), weight_decay=decay)
        run = RunConfig(f"{family}-{N / 1e6:.3g}M", model, data, optim, steps=budgets[-1])
        runs += trunk_and_decays(run, budgets)
    return runs


def batch_sequences(flop: float, sequence: int) -> int:
    """Return sequences a step: 0.292 C^0.327 tokens, to a power of two (DeepSeek LLM 2024, arXiv 2401.02954, eq. 1).

    `flop` is C, the compute of an entire run. Critical batch sizes also grow with the run, and with its tokens more
    than with the model (Zhang et al. 2024, arXiv 2410.21676).
    """
    # A power of two, so that meshes of powers of two divide it.
    tokens = 0.2920 * flop**0.3271
    return 2 ** max(0, round(math.log2(tokens / sequence)))


def rate_of_batch(tokens: float, base_tokens: float) -> float:
    """Return the factor on the learning rate for another batch: its square root (Malladi et al. 2022, arXiv
    2205.10287).

    Good for small factors, below the critical batch size: measure the rate at a batch near that of the ladder.
    """
    return math.sqrt(tokens / base_tokens)


def weight_decay(lr: float, steps: int, ratio: float) -> float:
    """Return the weight decay whose time scale 1 / (lr x decay) is the share tau of the run: 1 / (lr steps tau).

    AdamW averages its updates over that time (Wang & Aitchison 2024, arXiv 2405.13698). The best share of the run is
    tau = 1.084 (D / N)^-0.527 (Bergsma et al. 2025, arXiv 2505.13738, figure 1).
    """
    return 1 / (lr * steps * 1.084 * ratio**-0.527)
