"""Independent pieces of work shared among processes: results come in order and do not depend on how many there are."""

import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def in_processes(function: Callable[..., Any], work: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """function(*arguments) for each entry of `work`; the function must be one that can be imported by its name."""
    # A spawned process reads the limit on threads afresh; with more than one each they would take turns on the cores.
    os.environ |= dict.fromkeys(THREADS, "1")
    with get_context("spawn").Pool(workers) as pool:
        for result in [pool.apply_async(function, arguments) for arguments in work]:
            yield result.get()
