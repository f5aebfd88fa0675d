"""Whether a kernel can serve here: what every chooser asks about the device and the user.

On a mesh a kernel runs inside `sharding.per_shard`: the compiler cannot cut it. Choosers ask about a device's part.
"""

import functools
from contextvars import ContextVar
from typing import Any

import jax

from mmfree_jax.tracing import during

_allowed: ContextVar[bool] = ContextVar("kernels_allowed", default=True)


def kernels_allowed(allowed: bool) -> Any:
    """Whether what is traced inside may use kernels; XLA alone computes everything otherwise. Also a decorator."""
    return during(_allowed, allowed)


def on_hopper() -> bool:
    """Whether the kernels can run and may: an NVIDIA GPU of compute capability 9.0, and jax 0.11 or later."""
    return _allowed.get() and _is_hopper()


@functools.cache
def _is_hopper() -> bool:
    if jax.default_backend() != "gpu" or jax.__version_info__ < (0, 11):
        return False
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"
