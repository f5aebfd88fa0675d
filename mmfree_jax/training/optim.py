"""Learning-rate schedules as plain functions of the step, and optimizers that contain no learning rate."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax
from flax import nnx

from mmfree_jax.config import ModelConfig, OptimConfig, Optimizer
from mmfree_jax.training.moments import stored
from mmfree_jax.training.muon import scale_by_muon

# Rate and weight decay are arguments of the compiled step, so that all runs of one shape share one program: trunks,
# decays and sweeps of the rate.

# matrix: between hidden layers, latent ternary ones included; gain: norms' gains and every other vector of a block.
Role = Literal["matrix", "embedding", "head", "gain", "lower_bounds"]
# Weight decay pulls to zero. Gains, lower bounds, decays and mixes are scales or gates, for which zero is not special.
DECAYED: tuple[Role, ...] = ("matrix", "embedding", "head")
SECOND_STAGE = 2 / 3  # factor on the rate: from 1.2e-3 to 8e-4 in the recipe of BitNet b1.58


class Rates(NamedTuple):
    """What the schedule gives a step: the learning rate, and the share of the weight decay that is applied."""

    learning: Any
    decay: Any = 1.0


def rates(config: OptimConfig, steps: int, step: int) -> Rates:
    """Return learning rate and share of the weight decay of update `step` (0-based) in a run of `steps` updates."""
    second = config.schedule == "two-stage" and step >= steps / 2
    return Rates(learning_rate(config, steps, step), 0.0 if second else 1.0)


def learning_rate(config: OptimConfig, steps: int, step: int) -> float:
    """Return the learning rate of update `step` (0-based) in a run of `steps` updates.

    wsd falls linearly over its last `decay_steps` updates and reaches `final_lr` x peak at step == steps (Hägele et
    al. 2024, arXiv 2405.18392); cosine-halving multiplies the cosine by 1/2 from mid-run on (Zhu et al. 2024,
    arXiv 2406.02528, section 4); two-stage falls linearly all the way, times 2/3 from mid-run on (Ma et al. 2024,
    "The Era of 1-bit LLMs: Training Tips, Code and FAQ").
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor, second_half = config.final_lr, step >= steps / 2
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule in ("cosine", "cosine-halving"):
        cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return config.lr * (cosine * (0.5 if config.schedule == "cosine-halving" and second_half else 1.0))
    if config.schedule == "two-stage":
        return config.lr * ((floor + (1 - floor) * (1 - progress)) * (SECOND_STAGE if second_half else 1.0))
    # wsd, and constant, which is wsd without a decay: the rate depends on the steps left, so a decay branch needs
    # nothing of its trunk but the state at the branch point.
    left = steps - step
    return config.lr if left >= config.decay_steps else config.lr * (floor + (1 - floor) * left / config.decay_steps)


def role_of(path: tuple[Any, ...]) -> Role:
    """Return the role of a parameter, from its place in the model."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    if "kernel" in names:
        return "head" if "head" in names else "matrix"
    if "embedding" in names:
        return "embedding"
    return "lower_bounds" if "lower_bounds" in names else "gain"


def make_optimizer(config: OptimConfig, model: ModelConfig) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer: clipping by global norm, AdamW or Muon, factors of the rate by role, weight decay.

    The caller multiplies the updates by -rate, and may pass `decay`, the share of the weight decay to apply. The
    factors do not act on the decay, so its time scale 1 / (rate x weight_decay) is the same for all parameters (Wang &
    Aitchison 2024, arXiv 2405.13698); under mup this is CompleteP's weight decay x width.
    """
    # The order matters: gradients are clipped before Adam sees them, factors by role scale the update, and weight decay
    # comes last, so that neither Adam nor the factors act on it.
    chain = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    if model.parametrisation == "mup":
        # Every parameter of a block, and the floors, which stand outside because they are a softmax over layers.
        in_block = lambda path: bool({"blocks", "lower_bounds"} & {str(getattr(key, "key", key)) for key in path})
        chain.append(_scaled_by(lambda path: gradient_factor(model, in_block(path))))
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    if config.moments != "float32":  # vectors are few, and a block of them would mix what belongs to different layers
        adam = _by_role(DECAYED, stored(adam, config.moments), adam)
    muon = stored(scale_by_muon(config.momentum), config.moments)
    chain.append(_by_role(("matrix",), muon, adam) if config.optimizer == "muon" else adam)
    factors = role_factors(config, model)
    if any(factor != 1 for factor in factors.values()):
        chain.append(_scaled_by(lambda path: factors[role_of(path)]))
    if config.weight_decay:

        def add_decay(updates: Any, state: Any, params: Any = None, *, decay: Any = 1.0, **_: Any) -> tuple[Any, Any]:
            decayed = lambda path, leaf, param: leaf + config.weight_decay * decay * param
            one = lambda path, leaf, param: decayed(path, leaf, param) if role_of(path) in DECAYED else leaf
            return jax.tree_util.tree_map_with_path(one, updates, params), state

        chain.append(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), add_decay))
    return optax.with_extra_args_support(optax.chain(*chain))


def _scaled_by(factor: Callable[[tuple], float]) -> optax.GradientTransformation:
    """Multiply each leaf by the factor of its path."""
    scale = lambda path, leaf: leaf * factor(path)
    return optax.stateless(lambda updates, params=None: jax.tree_util.tree_map_with_path(scale, updates))


def role_factors(config: OptimConfig, model: ModelConfig) -> dict[Role, float]:
    """Return each role's factor on the learning rate: that of the config times that of the parametrisation."""
    chosen: dict[Role, float] = {
        "matrix": 1.0,
        "embedding": config.embedding_lr,
        "head": config.head_lr,
        "gain": config.gain_lr,
        "lower_bounds": config.bounds_lr,
    }
    return {role: own * rate_factor(model, role, config.optimizer) for role, own in chosen.items()}


def rate_factor(config: ModelConfig, role: Role, optimizer: Optimizer = "adamw") -> float:
    """Return the factor of muP (`architecture.Scales`) on the learning rate of parameters with this role.

    It is not 1 only for matrices between hidden layers. Adam's updates have entries of size 1 and the rank of a batch,
    so their effect grows with the width, which 1 / width compensates. Muon's are orthogonal; with root mean square 1
    their spectral norm is the root of the width (Yang et al. 2023, arXiv 2310.17813, condition 1).
    """
    wider, _ = config.relative_size
    if role != "matrix":
        return 1.0
    return 1 / wider if optimizer == "adamw" else 1 / math.sqrt(wider)


def gradient_factor(config: ModelConfig, in_block: bool) -> float:
    """Return the factor that gives a gradient its size at the base, so that Adam's epsilon means the same at every
    size.

    Gradients fall as 1 / width, inside blocks also as 1 / depth. Multiplying them by the inverse is the same as scaling
    epsilon by 1 / width / depth, as CompleteP does: m / (sqrt(v) + c eps) = (m / c) / (sqrt(v) / c + eps).
    """
    wider, deeper = config.relative_size
    return wider * deeper if in_block else wider


def _by_role(
    roles: tuple[Role, ...], first: optax.GradientTransformation, others: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One transformation for parameters of these roles, another for the rest. Updates and parameters are nnx.States.

    States are split instead of masked (`optax.partition`), so that their sharding and checkpoints need no exceptions.
    """

    divide = lambda tree: nnx.split_state(tree, lambda path, _: role_of(path) in roles, ...)

    init = lambda params: tuple(one.init(part) for one, part in zip((first, others), divide(params), strict=True))

    def update(updates: Any, state: tuple, params: Any = None) -> tuple[Any, tuple]:
        parts = zip((first, others), divide(updates), state, strict=True)
        (mine, after), (rest, after_rest) = (one.update(part, kept) for one, part, kept in parts)
        return nnx.merge_state(mine, rest), (after, after_rest)

    return optax.GradientTransformation(init, update)
