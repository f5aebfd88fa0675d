"""Whether a kernel can serve here: what every chooser asks about the device, the mesh and the user."""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_allowed: ContextVar[bool] = ContextVar("kernels_allowed", default=True)


@contextlib.contextmanager
def kernels_allowed(allowed: bool) -> Iterator[None]:
    """Whether what is traced inside may use kernels; XLA alone computes everything otherwise. Also a decorator."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def on_hopper() -> bool:
    """Whether the kernels can run and may: an NVIDIA GPU of compute capability 9.0, and jax 0.11 or later."""
    return _allowed.get() and _is_hopper()


@functools.cache
def _is_hopper() -> bool:
    if jax.default_backend() != "gpu" or jax.__version_info__ < (0, 11):
        return False
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def one_device() -> bool:
    """Whether the surrounding mesh is a single device: the compiler cannot cut a kernel into shards."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1
