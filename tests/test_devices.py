"""Facts about the hardware that a run is on."""

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


@pytest.mark.parametrize(("visible", "gpu"), [(None, 0), ("", 0), ("2", 2), ("3,1", 3), ("GPU-1a", 1)])
def test_energy_is_that_of_the_gpu_that_the_process_sees(visible, gpu, monkeypatch):
    """As a sweep shows each of its workers one: CUDA then calls it number 0."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    first = types.SimpleNamespace(local_hardware_id=0, device_kind="NVIDIA H100")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [first])
    monkeypatch.setattr(jax, "local_devices", lambda: [first])
    nvml = FourGpus()
    monkeypatch.setattr("importlib.import_module", lambda name: nvml)
    meter = EnergyMeter()
    assert meter.joules() == gpu + 1
