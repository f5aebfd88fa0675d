"""What the compiler asks for: the training step compiled for an H200 that is not here, as a table of bytes.

    python -m experiments.h200_memory > experiments/results/h200_memory.csv

About half an hour on one core; needs `pip install 'jax[cuda13]'` (5 GB), but no GPU. `mmfree_jax.lowering.memory` is
held to these figures by tests/lowering/test_memory.py.
"""

import csv
import dataclasses
import itertools
import sys
from typing import Any

from mmfree_jax.config import MeshConfig, RunConfig
from mmfree_jax.lowering.compiled import compile_absent
from mmfree_jax.lowering.memory import policies
from mmfree_jax.presets import run_preset

COLUMNS = (
    "preset",
    "depth",
    "batch",
    "sequence",
    "remat",
    "unroll",
    "kernels",
    "accumulate",
    "fsdp",
    "tensor",
    "bytes",
)


def cases() -> list[tuple]:
    """Rows of the table but for their last column: shallow models, as every further layer asks for the same."""
    main = "transformer++-1.3b", "matmul-free-1.3b"
    found: list[tuple] = [
        (preset, depth, 8, 2048, remat, unroll, "auto", 1, 1, 1)
        for preset in main
        for depth, unroll in ((4, 4), (4, 1), (8, 1))
        for remat in policies(run_preset(preset))
    ]
    others = itertools.product(("matmul-free-rwkv4-1.3b", "bitnet-1.3b", "hgrn-1.3b"), ("none", "products"))
    found += [(preset, 4, 8, 2048, remat, 1, "auto", 1, 1, 1) for preset, remat in others]
    found += [("matmul-free-1.3b", 4, 8, 2048, remat, 1, "off", 1, 1, 1) for remat in ("none", "products")]
    found += [
        (preset, 4, 8 * fsdp, 2048, remat, 1, "auto", 1, fsdp, tensor)
        for preset in main
        for remat in ("none", "products")
        for fsdp, tensor in ((8, 1), (4, 2))
    ]
    return [*found, *((preset, 4, 8, 2048, "full", 1, "auto", 2, 1, 1) for preset in main)]


def run_of(preset: str, depth: int, batch: int, sequence: int, *more: Any) -> RunConfig:
    """The run of a row."""
    run = run_preset(preset)
    remat, unroll, kernels, accumulate, fsdp, tensor = more
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, depth=depth),
        data=dataclasses.replace(run.data, batch=batch, sequence=sequence),
        optim=dataclasses.replace(run.optim, accumulate=accumulate),
        mesh=MeshConfig(fsdp=fsdp, tensor=tensor),
        precision="bfloat16",
        remat=remat,
        unroll=unroll,
        kernels=kernels,
    )


def compiled_bytes(run: RunConfig) -> int:
    """State, batch and temporaries of the compiled step on one device of its mesh."""
    found = compile_absent(run, "h200")
    return round(found.state + found.temporaries)


def main() -> None:
    """Print the table, row by row."""
    table = csv.writer(sys.stdout)
    table.writerow(COLUMNS)
    for case in cases():
        table.writerow((*case, compiled_bytes(run_of(*case))))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
