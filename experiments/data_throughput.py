"""How fast are batches read? `python -m experiments.data_throughput SET [SET …]`, for folders of token sets.

Shuffled windows come by the same path as in training, the prefetching thread included; several sets are mixed equally.
Each row is a window length and a batch: tokens a second, the time from one batch to the next if nothing else is done,
and by how much memory grows from the first tenth of the batches to the last. Expect above 10 M tokens a second from
windows of 512 on, and no growth beyond the mapped files. Tables are in results/data_throughput.md.
"""

import argparse
import resource
import time
from pathlib import Path

from mmfree_jax.data import Mixture, TokenSet, batches


def measure(source: TokenSet, sequence: int, batch: int, seconds: float) -> tuple[float, float, float]:
    """Take batches for `seconds` as fast as they come. Returns tokens a second, seconds a batch, and MB of growth."""
    memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB
    with batches(source, sequence=sequence, batch=batch, seed=0) as rows:
        for _ in range(10):
            next(rows)
        count, early, began = 0, memory(), time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            next(rows)
            count += 1
            early = memory() if passed < seconds / 10 else early
    return count * batch * sequence / passed, passed / count, memory() - early


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path, nargs="+", help="folders of token sets")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each measurement [3]")
    chosen = parser.parse_args()
    sets = [TokenSet.open(path) for path in chosen.sets]
    for sequence, batch in ((128, 32), (512, 32), (2048, 8), (2048, 64)):
        rate, each, grown = measure(Mixture(sets, [1] * len(sets)), sequence, batch, chosen.seconds)
        speed = f"{rate / 1e6:.1f} M tokens/s, {each * 1e6:.0f} us a batch, +{grown:.1f} MB"
        print(f"sequence {sequence}, batch {batch}: {speed}", flush=True)
