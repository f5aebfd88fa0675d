"""A sweep on a TPU host: a worker for each chip, or one for all of them."""

import dataclasses

import pytest

from mmfree_jax.config import ConfigError, MeshConfig
from mmfree_jax.presets import run_preset
from mmfree_jax.sweep import local


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A machine with the device files of four chips, and the package that drives them."""
    for chip in range(4):
        (tmp_path / f"accel{chip}").touch()
    monkeypatch.setattr(local, "TPU_FILES", (str(tmp_path / "accel[0-9]*"), str(tmp_path / "vfio[0-9]*")))
    monkeypatch.setattr(local, "_visible_gpus", lambda: [])
    monkeypatch.setattr(local.importlib.util, "find_spec", lambda name: name == "libtpu" or None)


def chain(**axes):
    run = run_preset("matmul-free-tiny")
    return [dataclasses.replace(run, mesh=MeshConfig(**axes))]


@pytest.mark.parametrize("platforms", [None, "", "tpu", "tpu,cpu"])
def test_every_chip_gets_a_worker(host, monkeypatch, platforms):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms is not None:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    machine = local.this_machine()
    assert machine.kind == "TPU chip"
    assert [slot.name for slot in machine.slots] == ["tpu0", "tpu1", "tpu2", "tpu3"]
    found = [local.combine_slots([slot], 1).env for slot in machine.slots]
    assert [env["TPU_VISIBLE_CHIPS"] for env in found] == ["0", "1", "2", "3"]
    assert len({env["TPU_PROCESS_PORT"] for env in found}) == 4
    assert all("JAX_PLATFORMS" not in env for env in found)


def test_a_mesh_of_all_chips_gets_all_and_no_other_is_taken(host, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    machine = local.this_machine()
    assert machine.room(chain(fsdp=4)) == 4
    assert local.combine_slots(machine.slots, 4).env == {}  # libtpu takes all chips unless it is told not to
    for axes in ({"fsdp": 2}, {"fsdp": 8}):
        with pytest.raises(ConfigError, match="chips"):
            machine.room(chain(**axes))


def test_chips_are_left_alone_where_the_user_wants_a_cpu(host, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert local.this_machine().kind == "CPU core"
