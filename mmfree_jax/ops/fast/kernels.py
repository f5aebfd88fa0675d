"""Where the kernels of a device are: `hopper` and `tpu` have modules and functions of the same names."""

import importlib
from typing import Any, Literal

from mmfree_jax.devices import backend

OF_TPUS = ("normed_codes", "recurrence", "attention")  # `hopper` has all of `checks`


def kernels() -> tuple[str, ...]:
    """Return the names of the kernels that there are for the platform that is used, or traced for."""
    from mmfree_jax.ops.fast.checks import CHECKS

    return OF_TPUS if architecture() == "tpu" else tuple(CHECKS)


def architecture() -> Literal["hopper", "tpu"]:
    """Return the folder of the kernels for the platform that is used, or traced for."""
    return "tpu" if backend() == "tpu" else "hopper"


def kernel_module(name: str) -> Any:
    """Return the module of a kernel for that platform. Imported late: few machines have what all kernels need."""
    return importlib.import_module(f"mmfree_jax.ops.fast.{architecture()}.{name}")
