"""Any mesh computes the same run: eight simulated devices against one, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmfree_jax.config import ConfigError, MeshConfig
from mmfree_jax.sharding import make_mesh
from tests.conftest import MAIN_FAMILIES

PROGRAM = """
import dataclasses, json, math, sys
from pathlib import Path
import jax
from mmfree_jax.config import MeshConfig
from mmfree_jax.data import TokenSet
from mmfree_jax.training.loop import train
from mmfree_jax.training.step import make_program, program_key
from tests.conftest import read_metrics, tiny_run

family, corpus, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
assert jax.device_count() == 8
found = {}
for shape in ((1, 1, 1, 1), (8, 1, 1, 1), (2, 2, 2, 1), (1, 4, 1, 2)):
    run = tiny_run(family, corpus, steps=6, name="x".join(map(str, shape)))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch=8), mesh=MeshConfig(*shape))
    folder = out / run.name
    result = train(run, folder, TokenSet.open(corpus))
    state = make_program(program_key(run, None)).abstract_state
    leaves = jax.tree.leaves(state.params)
    here = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    curve = [row["loss"] for row in read_metrics(folder)]
    found[run.name] = {"curve": curve, "loss": result["loss"], "share": here / sum(leaf.size for leaf in leaves)}
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_every_mesh_trains_the_same_model(family, token_set, tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    command = [sys.executable, "-c", PROGRAM, family, str(token_set.path), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    one = found.pop("1x1x1x1")
    for name, other in found.items():
        # int8 codes that a rounding error tips over are the only difference there can be
        np.testing.assert_allclose(other["curve"], one["curve"], rtol=1e-4, err_msg=name)
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert found["8x1x1x1"]["share"] == 1
    assert found["2x2x2x1"]["share"] < 0.45  # a quarter, but for the vocabulary of 257, which cannot be halved
    assert found["1x4x1x2"]["share"] < 0.45


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ConfigError, match="needs 4096 devices, only"):
        make_mesh(MeshConfig(data=64, fsdp=64))
