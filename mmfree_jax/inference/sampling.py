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
    column = {name: values[:, None] for name, values in settings.items()}
    penalty = column["repetition_penalty"]
    penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        scaled_BV = logits_BV / jnp.where(column["temperature"] == 0, 1, column["temperature"])
        order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
        sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
        kept_BV = jnp.where(_keeps(sorted_BV, column), sorted_BV, -jnp.inf)
        draw = lambda seed, count, row: jax.random.categorical(jax.random.fold_in(jax.random.key(seed), count), row)
        ranks_B = jax.vmap(draw)(settings["seed"], counts_B, kept_BV)
        drawn_B = jnp.take_along_axis(order_BV, ranks_B[:, None], axis=-1)[:, 0]
        return jnp.where(settings["temperature"] == 0, greedy_B, drawn_B).astype(jnp.int32)

    # Sorting a vocabulary takes milliseconds on a CPU: not for a batch that needs no order.
    return jax.lax.cond(jnp.all(settings["temperature"] == 0), lambda: greedy_B, drawn)


def _keeps(sorted_BV: jax.Array, column: dict[str, jax.Array]) -> jax.Array:
    """True for the ranks that the filters leave, the most likely token always among them."""
    rank_V = jnp.arange(sorted_BV.shape[-1])
    top_k = jnp.where(column["top_k"] == 0, sorted_BV.shape[-1], column["top_k"])
    kept_BV = rank_V < top_k
    shares_BV = jax.nn.softmax(jnp.where(kept_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(shares_BV, axis=-1) - shares_BV
    kept_BV &= (before_BV < column["top_p"]) | (rank_V == 0)
    return kept_BV & (shares_BV >= column["min_p"] * shares_BV[:, :1])
