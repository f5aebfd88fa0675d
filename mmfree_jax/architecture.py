"""The architecture of a model: families, a frozen and validated dataclass, the factors of muP. Needs no JAX.

Shape letters used throughout the project: B batch, T time, D model width, F GLU width, V vocabulary, L layers,
H heads, K head width.
"""

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

Mixer = Literal["attention", "mlgru", "rwkv4"]
Linear = Literal["dense", "ternary"]
Parametrisation = Literal["standard", "mup"]
Remat = Literal["none", "products", "mixer", "codes", "full"]

FAMILIES: dict[str, tuple[Mixer, Linear]] = {
    "transformer++": ("attention", "dense"),
    "bitnet": ("attention", "ternary"),
    "matmul-free": ("mlgru", "ternary"),
    "matmul-free-rwkv4": ("rwkv4", "ternary"),
    "hgrn": ("mlgru", "dense"),
}

# Fields of ModelConfig that are about the quantiser.
ONLY_TERNARY = ("activation_bits", "gradient_bits", "weight_scale", "linear_norm", "dense_head", "joint_glu")


LARGEST = 1 << 24  # of a size of a model: whatever is above was not meant


class ConfigError(ValueError):
    """A config that cannot be run. The message says what to change."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless condition holds."""
    if not condition:
        raise ConfigError(message)


@functools.cache
def type_hints(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields. They are looked up once, because that takes longer than all checks."""
    return typing.get_type_hints(cls)


def check_choices(config: Any) -> None:
    """Check every Literal-typed field of a dataclass instance against its allowed values."""
    for name, hint in type_hints(config.__class__).items():
        if typing.get_origin(hint) is Literal:
            value, allowed = getattr(config, name), typing.get_args(hint)
            require(value in allowed, f"{name}={value!r}: choose one of {', '.join(map(str, allowed))}")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. A family is `mixer` x `linear`; the other switches are ablations of it.

    Sizes are element counts. `heads` and `kv_heads` belong to attention: the MLGRU is element-wise, where heads would
    change nothing. Switches that a family does not have must keep their defaults.
    """

    mixer: Mixer = "mlgru"
    linear: Linear = "ternary"
    vocab: int = 32000  # rows of the embedding and outputs of the head
    tokenizer_vocab: int = 0  # tokens of the tokenizer; further rows are padding and never predicted; 0: no padding
    width: int = 1024
    depth: int = 24
    glu_width: int = 2816
    heads: int = 1
    kv_heads: int = 0  # 0: as many as heads; fewer is grouped-query attention (Ainslie et al. 2023)
    tie_embeddings: bool = False
    dense_head: bool = False  # keep the head of a ternary model dense (BitNet b1.58); MatMul-free's own is ternary
    linear_norm: bool = True  # "double norm": each ternary layer has an RMSNorm of its own, after that of the block
    sublayer_norm: bool = False  # BitNet b1.58: RMSNorm before the output and down projections
    activation: Literal["silu", "relu2"] = "silu"  # of the GLU's gate; relu2: max(x, 0)^2 (BitNet b1.58 2B4T)
    joint_glu: bool = True  # gate and up are one tensor to the quantiser (ternary layers only)
    output_gate: Literal["official", "paper"] = "official"  # which branch is normed (MLGRU only)
    lower_bounds: bool = True  # learned floors of the forget gate, cumulative over depth (MLGRU only)
    activation_bits: Literal[0, 4, 8] = 8  # 0: activations are not quantised (ternary layers only)
    gradient_bits: Literal[0, 8] = 0  # 8: integer products in the backward pass too (ternary layers but the head)
    # One absmean scale a matrix, or one an output channel; optimal: the scale of least squares for a matrix.
    weight_scale: Literal["tensor", "channel", "optimal"] = "tensor"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    parametrisation: Parametrisation = "standard"  # mup: hyper-parameters of the base are right at every size
    base_width: int = 0  # mup: the size at which the hyper-parameters were found
    base_depth: int = 0
    base_head: int = 0  # mup with attention: head width of the base; 0: as wide as here

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("vocab", "width", "depth", "glu_width", "heads"):
            size = getattr(self, name)
            require(1 <= size <= LARGEST, f"model.{name}={size}: must be at least 1 and at most {LARGEST}")
        require(
            0 <= self.tokenizer_vocab <= self.vocab,
            f"model.tokenizer_vocab={self.tokenizer_vocab}: must be from 0 (no padding) to model.vocab={self.vocab}",
        )
        require(self.norm_eps > 0, f"model.norm_eps={self.norm_eps}: must be positive")
        require(self.init_std > 0, f"model.init_std={self.init_std}: must be positive")
        if self.mixer == "attention":
            self._check_attention()
        else:
            self._keeps_default("heads", "kv_heads", reason=f"mixer={self.mixer} is element-wise and has no heads")
            self._keeps_default("rope_theta", reason=f"mixer={self.mixer} has no rotary embeddings")
        if self.linear == "dense":
            self._keeps_default(*ONLY_TERNARY, reason="linear=dense has no quantiser")
        if self.mixer != "mlgru":
            self._keeps_default("output_gate", "lower_bounds", reason=f"mixer={self.mixer} has no such gate")
        self._check_parametrisation()

    def _check_attention(self) -> None:
        require(self.rope_theta > 0, f"model.rope_theta={self.rope_theta}: must be positive")
        heads, kv = self.heads, self.kv_heads
        if self.width % heads or (self.width // heads) % 2:
            possible = [h for h in range(1, self.width + 1) if self.width % h == 0 and (self.width // h) % 2 == 0]
            nearest = ", ".join(map(str, sorted(sorted(possible, key=lambda h: abs(h - heads))[:4])))
            raise ConfigError(
                f"model.heads={heads} does not divide model.width={self.width} into even heads (rotary embeddings "
                f"turn pairs of channels): use one of {nearest}"
            )
        require(
            kv == 0 or (0 < kv <= heads and heads % kv == 0),
            f"model.kv_heads={kv} must divide model.heads={heads} (0: as many)",
        )

    def _check_parametrisation(self) -> None:
        if self.parametrisation == "standard":
            self._keeps_default("base_width", "base_depth", "base_head", reason="parametrisation=standard has no base")
            return
        for name in ("base_width", "base_depth"):
            require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)}: parametrisation=mup needs it")
        require(self.base_head >= 0, f"model.base_head={self.base_head}: must not be negative")
        if self.mixer != "attention":
            self._keeps_default("base_head", reason=f"mixer={self.mixer} has no heads")

    def _keeps_default(self, *names: str, reason: str) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in names:
            value = getattr(self, name)
            require(value == defaults[name], f"model.{name}={value!r} would do nothing: {reason}; leave it out")

    @property
    def relative_size(self) -> tuple[float, float]:
        """Width and depth relative to the base of muP; (1, 1) under the standard parametrisation."""
        if self.parametrisation == "standard":
            return 1.0, 1.0
        return self.width / self.base_width, self.depth / self.base_depth

    @property
    def family(self) -> str:
        """The family's name, or mixer+linear where it has none."""
        pair = (self.mixer, self.linear)
        return next((name for name, key in FAMILIES.items() if key == pair), f"{self.mixer}+{self.linear}")


@dataclass(frozen=True)
class Scales:
    """Factors of the forward pass and of initial values relative to the base model of muP.

    standard: all are 1, and the rate has to be found again at every size. mup (Yang et al. 2022, arXiv 2203.03466,
    table 8) with depth as in CompleteP (Dey et al. 2025, arXiv 2505.01618, table 1, alpha = 1): rate, weight decay and
    initial values found at `base_width` and `base_depth` are right at every size. `training.optim` has the factors of
    rates and gradients; docs/parametrisation.md derives them for ternary layers.
    """

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
    wider, deeper = config.relative_size
    head = config.width // config.heads
    scores = math.sqrt(config.base_head / head) if config.mixer == "attention" and config.base_head else 1.0
    # The depth of the base, because the residual branch has a factor 1 / L of its own at every depth.
    return Scales(config.base_depth, std=1 / math.sqrt(wider), residual=1 / deeper, logits=1 / wider, scores=scores)
