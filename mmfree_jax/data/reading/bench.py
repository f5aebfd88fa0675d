"""Measures how fast batches are read from token sets, by the same path as in training, prefetching included."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mmfree_jax.data.reading.pipeline import batches
from mmfree_jax.data.reading.token_set import Mixture, TokenSet


@dataclass(frozen=True)
class Speed:
    """One setting measured."""

    sources: int
    sequence: int
    batch: int
    tokens_per_s: float
    microseconds: float  # from one batch to the next when nothing else is done
    grown_mb: float  # of memory, from the first tenth of the batches to the last

    def __str__(self) -> str:
        return (
            f"{self.sources} source(s), sequence {self.sequence}, batch {self.batch}: "
            f"{self.tokens_per_s / 1e6:.1f} M tokens/s, {self.microseconds:.0f} us a batch, +{self.grown_mb:.1f} MB"
        )


def measure(sets: Sequence[TokenSet], sequence: int, batch: int, seconds: float = 3.0) -> Speed:
    """Take shuffled batches of an equal mixture for `seconds` as fast as they come."""
    memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    mixture = Mixture(sets, [1] * len(sets))
    with batches(mixture, sequence=sequence, batch=batch, seed=0) as source:
        for _ in range(10):
            next(source)
        count, early = 0, memory()
        began = time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            next(source)
            count += 1
            early = memory() if passed < seconds / 10 else early
    rate = count * batch * sequence / passed
    return Speed(len(sets), sequence, batch, rate, 1e6 * passed / count, memory() - early)
