"""Checkpoints move: a run saved on one mesh goes on on others to the same losses. What cannot be read says why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from mmfree_jax.checkpoint import CheckpointError, Checkpoints, restore
from tests.simulated import run

# Eight simulated devices in one process for all meshes: compiling is what takes the time.
PROGRAM = """
import dataclasses, json, shutil, sys
from pathlib import Path
import jax
from mmfree_jax.config import MeshConfig, OptimConfig
from mmfree_jax.data import TokenSet
from mmfree_jax.training import loop
from tests.conftest import read_metrics, tiny_run
from tests.training.test_loop import Guarded

family, corpus, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
run = tiny_run(family, corpus, steps=8, checkpoint_every=4, evaluate=False, log_every=1)
run = dataclasses.replace(
    run,
    data=dataclasses.replace(run.data, batch=8),
    optim=OptimConfig(lr=1e-3, warmup_steps=1),
    mesh=MeshConfig(data=4, fsdp=2),
)
own, loop.Diagnostics = loop.Diagnostics, Guarded
loop.train(run, out / "4x2", TokenSet.open(corpus))
loop.Diagnostics = own
curves = {}
for data, fsdp in ((8, 1), (2, 4), (1, 1)):
    folder = out / f"{data}x{fsdp}"
    shutil.copytree(out / "4x2", folder)
    shutil.rmtree(folder / "checkpoints" / "8")
    (folder / "result.json").unlink()
    loop.train(dataclasses.replace(run, mesh=MeshConfig(data=data, fsdp=fsdp)), folder, TokenSet.open(corpus))
    assert json.loads((folder / "config.json").read_text())["mesh"]["fsdp"] == fsdp
for folder in out.iterdir():
    curves[folder.name] = [row["loss"] for row in read_metrics(folder)]
print(json.dumps(curves))
"""


@pytest.mark.slow
def test_a_run_saved_on_one_mesh_goes_on_on_others(token_set, tmp_path):
    """On the first, from its third step on, transfers from the host that nobody asked for are errors."""
    said, _ = run("-c", PROGRAM, "matmul-free", str(token_set.path), str(tmp_path))
    curves = json.loads(said.splitlines()[-1])
    saved = curves.pop("4x2")
    assert len(saved) == 8
    assert set(curves) == {"8x1", "2x4", "1x1"}
    for name, curve in curves.items():
        assert curve[:4] == saved[:4], name
        # int8 codes that a rounding error tips over are the only difference there can be
        np.testing.assert_allclose(curve, saved, rtol=1e-4, err_msg=name)


def shaped(*shape: int) -> jax.ShapeDtypeStruct:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here)


@pytest.mark.parametrize("name", ["x[lr=3e-3]", "a*b", "is it?", "b]:x:é", "{0}%d"])
def test_a_folder_of_any_name_holds_checkpoints_that_can_be_read(name, tmp_path):
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save({"a": jnp.arange(4.0)}, {"more": 1}, 3)
    state, meta = restore(tmp_path / name, {"a": shaped(4)})
    assert state["a"].tolist() == [0, 1, 2, 3]
    assert meta == {"more": 1}


def halved(name: str) -> Callable[[Path], None]:
    def cut(step: Path) -> None:
        for path in step.rglob(name):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: (step / "state" / "_METADATA").unlink(),
        lambda step: shutil.rmtree(step / "state"),
        lambda step: [shutil.rmtree(folder) for folder in list(step.rglob("d"))],
        halved("_METADATA"),
        halved("manifest.ocdbt"),
    ],
)
def test_what_is_damaged_is_said_to_be_and_what_to_fall_back_on(damage, tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (3, 7):
            checkpoints.save({"a": jnp.ones(4)}, {"more": 1}, step)
    damage(tmp_path / "c" / "7")
    with pytest.raises(CheckpointError, match=r"c/7 cannot be read: .*is damaged, remove it: the one before .* 3$"):
        restore(tmp_path / "c", {"a": shaped(4)})
    restore(tmp_path / "c", {"a": shaped(4)}, step=3)


@pytest.mark.parametrize("other", [{"a": shaped(5)}, {"b": shaped(4)}, {"a": shaped(4), "b": shaped(4)}])
def test_a_checkpoint_of_another_model_is_not_called_damaged(other, tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save({"a": jnp.ones(4)}, {"more": 1}, 3)
    with pytest.raises(CheckpointError, match=r"c/3 cannot be read: it holds other arrays") as failed:
        restore(tmp_path / "c", other)
    assert "remove" not in str(failed.value)


def test_a_device_without_the_memory_for_a_checkpoint_does_not_make_it_damaged(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save({"a": jnp.ones(4)}, {"more": 1}, 3)

    def full(*_, **__):
        raise KeyError("state") from jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(ocp.training.Checkpointer, "load_checkpointables", full)
    with pytest.raises(CheckpointError, match=r"cannot be read: JaxRuntimeError: RESOURCE_EXHAUSTED") as failed:
        restore(tmp_path / "c", {"a": shaped(4)})
    assert "remove" not in str(failed.value)
