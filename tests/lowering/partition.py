"""Small steps of every family, partitioned for eight simulated devices: what the gates compare with.

export JAX_PLATFORMS=cpu
export XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
python -m tests.lowering.partition > tests/lowering/collectives.json      # with the newest JAX
"""

import json
from collections import Counter
from typing import Any

from mmfree_jax.config import FAMILIES, DataConfig, MeshConfig, ModelConfig, RunConfig
from mmfree_jax.lowering.program import lower_for, partition

MESHES = {
    "fsdp=8": MeshConfig(fsdp=8),
    "fsdp=4,tensor=2": MeshConfig(fsdp=4, tensor=2),
    "data=2,fsdp=2,sequence=2": MeshConfig(data=2, fsdp=2, sequence=2),
}


def small_run(family: str, mesh: MeshConfig) -> RunConfig:
    """Three layers of a width that every axis divides; wide enough for matrices to outweigh gains."""
    mixer, linear = FAMILIES[family]
    heads = 4 if mixer == "attention" else 1
    model = ModelConfig(mixer, linear, vocab=1024, width=256, depth=3, glu_width=768, heads=heads)
    data = DataConfig(vocab=1024, sequence=64, batch=16)
    return RunConfig(family, model, data, mesh=mesh, remat="products", precision="bfloat16")


def cases() -> list[tuple[str, str]]:
    """Every family on the first mesh, the two main ones on the others."""
    return [
        (family, mesh)
        for mesh in MESHES
        for family in FAMILIES
        if mesh == "fsdp=8" or family in ("transformer++", "matmul-free")
    ]


def measured(family: str, mesh: str) -> dict[str, Any]:
    """Counts of collectives by kind and type, gathered bytes, and the share of the parameters that is cut."""
    report = partition(small_run(family, MESHES[mesh]), "cuda")
    counts: Counter[str] = Counter()
    gathered: Counter[str] = Counter()
    for one in report.traffic:
        counts[f"{one.kind} {one.dtype}"] += one.count
        if one.kind == "all-gather":
            gathered[one.dtype] += int(one.sent)
    return {"collectives": dict(sorted(counts.items())), "gathered": dict(gathered), "sharded": report.sharded}


def main() -> None:
    """Lower every family for both platforms; print what partitioning says, as JSON."""
    for family in FAMILIES:
        for platform in ("cuda", "tpu"):
            lower_for(small_run(family, MESHES["fsdp=8"]), platform)
    print(json.dumps({f"{family} {mesh}": measured(family, mesh) for family, mesh in cases()}, indent=1))


if __name__ == "__main__":
    main()
