"""Exact counts from a ModelConfig: parameters, operations by class, bytes of decoding state. Needs no JAX.

Conventions. A product or an accumulation of n weights counts 2n, also if the weights are ternary: "each operation
is treated identically between MatMul-free LM and Transformer++" (Zhu et al. 2024, arXiv 2406.02528, section 4.2).
`N` counts the matrices, head included, input-embedding lookup excluded, so that families of equal shape have equal N.
All of `model.vocab` counts, also the padding beyond `model.tokenizer_vocab`: its logits are computed, then ignored.
The backward pass of a product is two products of its size; that of element-wise work counts as twice its forward pass.
"""

import dataclasses
from dataclasses import dataclass

from mmfree_jax.config import ModelConfig

# Element-wise operations per element (an exponential, logarithm, root or division counts as one).
SIGMOID, SILU = 3, 4
GATES = SIGMOID + 3 + SILU + 2  # forget gate, its floor, candidate, candidate times (1 - f)
RECURRENCE = 2
RMS = 4  # square, sum, scale, gain
QUANTISE = 5  # magnitude, maximum, scale, round, clip; once more the scale of the product
SOFTMAX = 5  # scale, maximum, exponential, sum, division
WKV = 22  # exponents and their maxima, two recurrences, the weighted average


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of each kind."""

    embedding: int
    head: int  # 0 when tied: the embedding is the head
    mixer: int  # matrices of the token mixers
    glu: int  # matrices of the channel mixing
    gains: int  # of every norm
    other: int  # forget-gate floors; mixes, decays and bonuses of RWKV-4
    tied: bool

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.mixer + self.glu + self.gains + self.other

    @property
    def N_nonemb(self) -> int:
        """Matrices of the blocks."""
        return self.mixer + self.glu

    @property
    def N(self) -> int:
        """Matrices of the blocks and of the head: what takes part in products or accumulations."""
        return self.N_nonemb + (self.embedding if self.tied else self.head)


@dataclass(frozen=True)
class OpCounts:
    """Operations by class."""

    dense: float = 0  # multiplications and additions with dense block weights
    ternary: float = 0  # additions and subtractions with ternary block weights, counted as if they were products
    attention: float = 0  # scores and weighted values
    head: float = 0
    elementwise: float = 0
    norm_quant: float = 0

    @property
    def products(self) -> float:
        """Operations of all matrix products."""
        return self.dense + self.ternary + self.attention + self.head

    @property
    def total(self) -> float:
        """All classes."""
        return self.products + self.elementwise + self.norm_quant


def _kv_width(config: ModelConfig) -> int:
    """Width of the keys, and of the values."""
    return config.width // config.heads * (config.kv_heads or config.heads)


def _layer_gains(config: ModelConfig) -> int:
    """Norm gains of one layer."""
    D, F = config.width, config.glu_width
    gains = 2 * D + (D if config.mixer == "mlgru" else 0)
    if config.linear == "ternary" and config.linear_norm:
        into_mixer, into_glu = 3, 1 if config.joint_glu else 2
        gains += (into_mixer + 1 + into_glu) * D + F  # and before the mixer's output projection and the GLU's
    return gains + (D + F if config.sublayer_norm else 0)


def _ternary_head(config: ModelConfig) -> bool:
    return config.linear == "ternary" and not config.dense_head


def parameters(config: ModelConfig) -> Parameters:
    """Return exact parameter counts. Their total is the size of the initialised model."""
    # Four matrices of D x D in every mixer: q, k, v, o; i, f, g, o; r, k, v, o. Grouped queries narrow two of them.
    D, L, V = config.width, config.depth, config.vocab
    mixer = {"attention": 2 * D * D + 2 * D * _kv_width(config)}.get(config.mixer, 4 * D * D)
    # Lower bounds of the MLGRU's forget gate; mixes, decays and bonuses of RWKV-4.
    other = {"mlgru": D if config.lower_bounds else 0, "rwkv4": 5 * D}.get(config.mixer, 0)
    head_gain = D if _ternary_head(config) and config.linear_norm else 0
    return Parameters(
        embedding=V * D,
        head=0 if config.tie_embeddings else V * D,
        mixer=L * mixer,
        glu=L * 3 * D * config.glu_width,
        gains=L * _layer_gains(config) + D + head_gain,
        other=L * other,
        tied=config.tie_embeddings,
    )


def forward_flops(config: ModelConfig, positions: float, pairs: float) -> OpCounts:
    """Return the operations of a forward pass over `positions` tokens, padding included.

    pairs: of a position and one that it sees, itself included, over all windows (`data.reading.documents`). Attention
    counts these and no masked scores, although some kernels compute them: the count belongs to the model and its data,
    and is the same on every device.
    """
    count = parameters(config)
    attention, softmax = 0.0, 0.0
    if config.mixer == "attention":
        # Two products (scores, weighted values), each a multiplication and an addition for each of the D channels.
        attention = 4 * config.depth * config.width * pairs
        softmax = SOFTMAX * config.depth * config.heads * pairs
    blocks = 2 * count.N_nonemb * positions
    head_norm_quant = float(RMS * config.width)  # the final norm, and norm and quantiser of a ternary head
    if _ternary_head(config):
        head_norm_quant += RMS * config.width if config.linear_norm else 0
        head_norm_quant += QUANTISE * config.width if config.activation_bits else 0
    each = config.depth * _layer_elementwise(config) + SOFTMAX * config.vocab
    return OpCounts(
        dense=blocks if config.linear == "dense" else 0.0,
        ternary=blocks if config.linear == "ternary" else 0.0,
        attention=attention,
        head=2 * config.vocab * config.width * positions,
        elementwise=softmax + each * positions,
        norm_quant=(config.depth * _layer_norm_quant(config) + head_norm_quant) * positions,
    )


def train_flops(config: ModelConfig, positions: float, pairs: float) -> OpCounts:
    """Return the operations of training on `positions` tokens: three times those of the forward pass.

    They are exact up to the rounding of a float. Recomputed activations (remat) and the optimizer do not count, because
    they are not the model's work.
    """
    counts = dataclasses.asdict(forward_flops(config, positions, pairs))
    return OpCounts(**{name: float(3 * count) for name, count in counts.items()})


def train_flops_per_token(config: ModelConfig, sequence: int) -> OpCounts:
    """Return operations per token of a training step (`train_flops`), if each window is one document.

    Plans use this. If documents are separate, a run needs less.
    """
    return train_flops(config, 1, (sequence + 1) / 2)  # a token sees itself and, on average, half of the others


def decode_state_bytes(config: ModelConfig, tokens: int, element_bytes: int = 2) -> int:
    """Return the bytes that decoding stores for one sequence of `tokens` tokens.

    Attention stores keys, values and an int32 document id per token; the recurrences a state whose size does not
    depend on the tokens, in float32. `element_bytes` is the width of activations (2: bfloat16).
    """
    D, L = config.width, config.depth
    if config.mixer == "attention":
        return L * tokens * (2 * _kv_width(config) * element_bytes + 4)
    return L * D * 4 if config.mixer == "mlgru" else L * D * (3 * 4 + element_bytes)


def _layer_elementwise(config: ModelConfig) -> float:
    """Element-wise operations of one layer on one token, softmax aside."""
    D, F = config.width, config.glu_width
    glu_and_residuals = (SILU + 1) * F + 2 * D
    if config.mixer == "attention":
        return glu_and_residuals + 3 * (D + _kv_width(config))  # rotary: two products and a sum
    if config.mixer == "rwkv4":
        return glu_and_residuals + (3 * 3 + WKV + SIGMOID + 1) * D
    return glu_and_residuals + (GATES + RECURRENCE + SILU + 1) * D


def _layer_norm_quant(config: ModelConfig) -> float:
    """Operations of one layer's norms and quantisers on one token."""
    D, F = config.width, config.glu_width
    total = RMS * _layer_gains(config)
    if config.linear == "dense" or config.activation_bits == 0:
        return total
    # Codes are shared where the norm is.
    mixer_inputs = 3 if config.linear_norm or config.mixer == "rwkv4" else 1
    glu_inputs = 1 if config.joint_glu or not config.linear_norm else 2
    return total + QUANTISE * ((mixer_inputs + 1 + glu_inputs) * D + F)
