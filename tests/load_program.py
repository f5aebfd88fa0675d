"""What models on disk become on meshes of eight devices: their folders are the arguments; prints JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mmfree_jax.config import MeshConfig, RunConfig
from mmfree_jax.training.step import make_program, program_key
from mmfree_jax.weights import load_model, load_params, model_config

MESHES = {"fsdp": MeshConfig(fsdp=8), "both": MeshConfig(data=2, fsdp=2, tensor=2), "copies": MeshConfig(data=8)}


def main(folders: list[Path]) -> None:
    """Of each folder and mesh: whether values are those of the whole model, and the share of them on each device."""
    found: dict[str, dict] = {}
    for folder in folders:
        whole = jax.tree.leaves(nnx.state(load_model(folder), nnx.Param))
        for name, mesh in MESHES.items():
            key = program_key(RunConfig("r", model_config(folder), mesh=mesh), None)
            leaves = jax.tree.leaves(load_params(folder, make_program(key).abstract_state.params))
            equal = all(np.array_equal(a, b) for a, b in zip(whole, leaves, strict=True))
            held = sum(leaf.addressable_shards[5].data.size for leaf in leaves) / sum(leaf.size for leaf in whole)
            found.setdefault(folder.name, {})[name] = {"equal": equal, "held": held}
    print(json.dumps(found))


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
