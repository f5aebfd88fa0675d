"""Independent pieces of work shared among processes: results come in order and do not depend on how many there are."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def in_processes(function: Callable[..., Any], work: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """function(*arguments) for each entry of `work`; the function must be one that can be imported by its name."""
    # A spawned process reads the limit on threads afresh; with more than one each they would take turns on the cores.
    os.environ |= dict.fromkeys(THREADS, "1")
    with get_context("spawn").Pool(workers) as pool:
        for result in [pool.apply_async(function, arguments) for arguments in work]:
            yield result.get()


def resumed(
    function: Callable[..., Any], work: Mapping[tuple[Any, ...], tuple[Any, ...]], workers: int, path: Path | None
) -> dict[tuple[Any, ...], Any]:
    """Results of `work` by key, and all others that `path` holds: a JSONL file of single results (keys are tuples).

    What is in the file is not computed again, and what is computed is added to it at once. Values must survive JSON.
    """
    known = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
    results = {tuple(key): result for *key, result in map(json.loads, known)}
    wanted = [key for key in work if key not in results]
    with path.open("a", encoding="utf-8") if path else nullcontext() as stream:
        for key, result in zip(wanted, in_processes(function, [work[key] for key in wanted], workers), strict=True):
            results[key] = result
            if stream:
                stream.write(json.dumps([*key, result]) + "\n")
                stream.flush()
    return results
