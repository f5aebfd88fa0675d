"""Facts about the hardware that a run is on."""

import sys
import types

import jax
import pytest

from mmfree_jax.devices import EnergyMeter


class FourGpus:
    """NVML of a machine whose GPU number i has drawn i + 1 joules a look."""

    def __init__(self):
        self.looks = 0

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 4

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}a-bc"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.looks += 1
        return 1000 * (handle + 1) * self.looks  # millijoules


class NVMLError(Exception):
    """As of drivers: it has no text of its own."""


def unsupported(*_):
    raise NVMLError


def on_nvidia(monkeypatch, nvml, visible: str | None) -> EnergyMeter:
    """A meter of a process that sees these GPUs, and uses the first."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    first = types.SimpleNamespace(local_hardware_id=0, device_kind="NVIDIA H100")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [first])
    monkeypatch.setattr(jax, "local_devices", lambda: [first])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return EnergyMeter()


@pytest.mark.parametrize(("visible", "gpu"), [(None, 0), ("", 0), ("2", 2), ("3,1", 3), ("GPU-1a", 1)])
def test_energy_is_that_of_the_gpu_that_the_process_sees(visible, gpu, monkeypatch):
    """As a sweep shows each of its workers one: CUDA then calls it number 0."""
    assert on_nvidia(monkeypatch, FourGpus(), visible).joules() == gpu + 1


@pytest.mark.parametrize("what", ["nvmlInit", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetHandleByIndex"])
def test_where_nvml_does_not_answer_energy_is_not_known_and_nothing_ends(what, monkeypatch):
    """Old GPUs have no such counter, containers no permission, some libraries no such function."""
    nvml = FourGpus()
    setattr(nvml, what, unsupported)
    assert on_nvidia(monkeypatch, nvml, None).joules() is None
    assert on_nvidia(monkeypatch, object(), None).joules() is None


@pytest.mark.parametrize("visible", ["MIG-5c1a-0", "GPU-nosuch", "7"])
def test_gpus_that_nvml_does_not_know_by_their_name_draw_nothing_known(visible, monkeypatch):
    nvml = FourGpus()
    nvml.nvmlDeviceGetHandleByUUID = unsupported
    by_index = nvml.nvmlDeviceGetHandleByIndex
    nvml.nvmlDeviceGetHandleByIndex = lambda index: by_index(index) if index < 4 else unsupported()
    assert on_nvidia(monkeypatch, nvml, visible).joules() is None


def test_a_counter_that_fails_once_is_not_believed_again(monkeypatch):
    """What it then says would be the energy of a part of the run."""
    nvml = FourGpus()
    meter = on_nvidia(monkeypatch, nvml, None)
    assert meter.joules() == 1
    counter, nvml.nvmlDeviceGetTotalEnergyConsumption = nvml.nvmlDeviceGetTotalEnergyConsumption, unsupported
    assert meter.joules() is None
    nvml.nvmlDeviceGetTotalEnergyConsumption = counter
    meter.restart()
    assert meter.joules() is None
