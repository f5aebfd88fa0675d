"""Learning-rate schedules as plain functions of the step, and AdamW without a learning rate inside.

The rate is an argument of the compiled step, so that every run of one shape, decays and sweeps included, shares one
program.
"""

import math
from typing import Any

import jax
import optax

from mmfree_jax.config import OptimConfig

# Matrices decay; gains and the forget gate's lower bounds are scales, for which a pull to zero has no justification.
UNDECAYED = ("gain", "lower_bounds")


def learning_rate(config: OptimConfig, steps: int, step: int) -> float:
    """The rate of optimizer update number `step` (0-based) in a run of `steps` updates.

    wsd falls linearly over its last `decay_steps` updates and reaches `final_lr` x peak at step == steps (Hägele et
    al. 2024, arXiv 2405.18392); cosine-halving multiplies the cosine by 1/2 from mid-run on (Zhu et al. 2024,
    arXiv 2406.02528, section 4).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    return config.lr * _decay_factor(config, steps, step)


def _decay_factor(config: OptimConfig, steps: int, step: int) -> float:
    floor = config.final_lr
    if config.schedule in ("cosine", "cosine-halving"):
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return cosine * (0.5 if config.schedule == "cosine-halving" and step >= steps / 2 else 1.0)
    left = steps - step
    if left >= config.decay_steps:
        return 1.0
    return floor + (1 - floor) * left / config.decay_steps


def decay_mask(params: Any) -> Any:
    """A tree of bools: which parameters weight decay acts on (by name: all but gains and lower bounds)."""

    def decays(path: tuple, _: Any) -> bool:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        return not any(name in UNDECAYED for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam moments in float32, decoupled weight decay; the caller multiplies by -rate."""
    chain = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    chain.append(optax.scale_by_adam(config.beta1, config.beta2, config.eps))
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    return optax.chain(*chain)
