"""Bytes that one device of eight sends in a training step of a sharded model, read from the compiled program.

Weights that are gathered and gradients that are reduced, apart and together; the scan over layers is counted as often
as it runs. Compiled for eight H200s that need not be there (`pip install 'jax[cuda13]'`): on the CPU XLA would carry
bfloat16 as float32. Nothing is computed:
    python -m experiments.fsdp_bytes 1.3b > experiments/results/fsdp_bytes.md   (two minutes)

Expected: codes are gathered in half the bytes of bfloat16 weights, packed codes in an eighth.
"""

import dataclasses
import os
import sys
from typing import Any

import jax

from mmfree_jax.config import MeshConfig
from mmfree_jax.hlo import collectives
from mmfree_jax.lowering.compiled import ABSENT, compile_step
from mmfree_jax.presets import run_preset

MESH = MeshConfig(fsdp=8)
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("transformer++, bfloat16 weights", "transformer++", {}),
    ("matmul-free, int8 codes", "matmul-free", {}),
    ("matmul-free, packed codes", "matmul-free", {"gather": "packed"}),
)


def sent(family: str, size: str, changes: dict[str, Any]) -> list[float]:
    """GB that a device sends: gathers of block and head weights, of the embedding table, and gradients."""
    run = run_preset(f"{family}-{size}")
    data = dataclasses.replace(run.data, batch=MESH.devices, sequence=1024)  # bytes of weights do not depend on these
    run = dataclasses.replace(run, data=data, mesh=MESH, precision="bfloat16", kernels="off", **changes)
    table = run.model.vocab, run.model.width
    found = collectives(compile_step(run, "h200").as_text() or "")
    gathers = [one for one in found if one.kind == "all-gather"]
    tables = [one for one in gathers if one.arrays[0][1] == table]
    gigabytes = lambda some: sum(one.sent for one in some) / 1e9
    return [gigabytes(gathers) - gigabytes(tables), gigabytes(tables), gigabytes(found) - gigabytes(gathers)]


def main() -> None:
    os.environ.update(ABSENT)  # before JAX looks for devices
    size = sys.argv[1]
    print(f"# Bytes of a training step of the {size} models on eight H200s, fsdp=8\n")
    print(f"`python -m experiments.fsdp_bytes {size}`, jax {jax.__version__}; GB that each device sends, by a ring.\n")
    print("| | weights | of bf16's | embedding | gradients | together |\n|---|---:|---:|---:|---:|---:|")
    first = None
    for name, family, changes in CASES:
        weights, table, gradients = sent(family, size, changes)
        first = first or weights
        share = f"{weights / first:.3f}"
        print(
            f"| {name} | {weights:.3f} | {share} | {table:.3f} | {gradients:.3f} | {weights + table + gradients:.3f} |"
        )


if __name__ == "__main__":
    main()
