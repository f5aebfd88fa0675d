"""Whether a kernel can serve here: what every chooser asks about the device and the mesh."""

import functools

import jax


@functools.cache
def on_hopper() -> bool:
    """Whether the kernels can run: an NVIDIA GPU of compute capability 9.0, and jax 0.11 or later."""
    if jax.default_backend() != "gpu" or jax.__version_info__ < (0, 11):
        return False
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def one_device() -> bool:
    """Whether the surrounding mesh is a single device: the compiler cannot cut a kernel into shards."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1
