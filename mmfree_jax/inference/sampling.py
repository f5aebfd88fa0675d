"""Choosing the next token: temperature, top-k, top-p, min-p and a repetition penalty, each row by its own settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.config import require


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Filters apply after the temperature, each to what the one before it left.

    temperature: 0 takes the most likely token. top_k: only the k most likely; 0: all. top_p: the fewest tokens whose
    probabilities add up to it (Holtzman et al. 2020, arXiv 1904.09751). min_p: only tokens of at least this share of
    the largest probability (Nguyen et al. 2024, arXiv 2407.01082). repetition_penalty: divides positive logits of
    tokens that have occurred, and multiplies negative ones (Keskar et al. 2019, arXiv 1909.05858); 1: none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"temperature={self.temperature}: must not be negative (0 is greedy)")
        require(self.top_k >= 0, f"top_k={self.top_k}: must not be negative (0 keeps all tokens)")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0 and at most 1")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p}: must be from 0 to 1")
        require(self.repetition_penalty > 0, f"repetition_penalty={self.repetition_penalty}: must be positive")
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must be from 0 to 2^32 - 1")


FEW = 128  # tokens that are looked for without sorting all, where top_k asks for no more
PLAIN, GREEDY = Sampling(), Sampling(temperature=0.0)


def stacked(rows: list[Sampling]) -> dict[str, jax.Array]:
    """Return the settings of several rows as arrays [B], for `choose`."""
    columns = {name: np.array([getattr(row, name) for row in rows]) for name in dataclasses.asdict(rows[0])}
    types = {"top_k": np.int32, "seed": np.uint32}
    return {name: jnp.asarray(column.astype(types.get(name, np.float32))) for name, column in columns.items()}


def choose(logits_BV: jax.Array, seen_BV: jax.Array, counts_B: jax.Array, settings: dict[str, jax.Array]) -> jax.Array:
    """Choose a token for each row, int32 [B].

    Args:
        logits_BV: of the next token, at least float32.
        seen_BV: true for tokens that have occurred in the row.
        counts_B: how many tokens were chosen for the row before. A row's choices depend on its seed and this count
            only, not on what else is in the batch.
        settings: of `stacked`.
    """
    temperature_B, top_k_B, top_p_B = (settings[name] for name in ("temperature", "top_k", "top_p"))
    logits_BV = _penalised(logits_BV, seen_BV, settings["repetition_penalty"][:, None])
    scaled_BV = logits_BV / jnp.where(temperature_B == 0, 1, temperature_B)[:, None]
    keys_B = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(settings["seed"], counts_B)

    # Four ways to choose, each for the rows that need it. A batch pays only for those that one of its rows needs: to
    # sort a vocabulary takes milliseconds on a CPU. Which way a row takes depends on its own settings alone.
    sampled_B = temperature_B > 0
    few_B = sampled_B & (top_k_B > 0) & (top_k_B <= min(FEW, logits_BV.shape[1]))
    sorted_B = sampled_B & ~few_B & ((top_k_B > 0) | (top_p_B < 1))
    chosen_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    for rows_B, way in (
        (few_B, lambda: _among_most_likely(keys_B, scaled_BV, settings, min(FEW, logits_BV.shape[1]))),
        (sorted_B, lambda: _among_most_likely(keys_B, scaled_BV, settings, logits_BV.shape[1])),
        (sampled_B & ~few_B & ~sorted_B, lambda: _among_all(keys_B, scaled_BV, settings)),
    ):
        drawn_B = jax.lax.cond(jnp.any(rows_B), way, lambda: jnp.zeros_like(counts_B))
        chosen_B = jnp.where(rows_B, drawn_B, chosen_B)
    return chosen_B


def choose_greedily(
    logits_BV: jax.Array, seen_BV: jax.Array, counts_B: jax.Array, settings: dict[str, jax.Array]
) -> jax.Array:
    """`choose` where every row has temperature 0."""
    penalty_B1 = settings["repetition_penalty"][:, None]
    return jnp.argmax(_penalised(logits_BV, seen_BV, penalty_B1), axis=-1).astype(jnp.int32)


def _penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B1: jax.Array) -> jax.Array:
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, lowered_BV, logits_BV)


def _among_most_likely(
    keys_B: jax.Array, scaled_BV: jax.Array, settings: dict[str, jax.Array], count: int
) -> jax.Array:
    """Draw from what all filters leave of the `count` most likely tokens."""
    values_BN, tokens_BN = jax.lax.top_k(scaled_BV, count)
    kept_BN = _keeps(values_BN, {name: values[:, None] for name, values in settings.items()})
    ranks_B = _draw(keys_B, jnp.where(kept_BN, values_BN, -jnp.inf))
    return jnp.take_along_axis(tokens_BN, ranks_B[:, None], axis=-1)[:, 0]


def _among_all(keys_B: jax.Array, scaled_BV: jax.Array, settings: dict[str, jax.Array]) -> jax.Array:
    """Draw from what min-p leaves of all tokens, in no order."""
    largest_B1 = jnp.max(scaled_BV, axis=-1, keepdims=True)
    kept_BV = jnp.exp(scaled_BV - largest_B1) >= settings["min_p"][:, None]
    return _draw(keys_B, jnp.where(kept_BV, scaled_BV, -jnp.inf))


def _draw(keys_B: jax.Array, logits_BN: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys_B, logits_BN).astype(jnp.int32)


def _keeps(sorted_BN: jax.Array, column: dict[str, jax.Array]) -> jax.Array:
    """True for the ranks that the filters leave, the most likely token always among them."""
    rank_N = jnp.arange(sorted_BN.shape[-1])
    top_k = jnp.where(column["top_k"] == 0, sorted_BN.shape[-1], column["top_k"])
    kept_BN = rank_N < top_k
    shares_BN = jax.nn.softmax(jnp.where(kept_BN, sorted_BN, -jnp.inf), axis=-1)
    before_BN = jnp.cumsum(shares_BN, axis=-1) - shares_BN
    kept_BN &= (before_BN < column["top_p"]) | (rank_N == 0)
    return kept_BN & (shares_BN >= column["min_p"] * shares_BN[:, :1])
