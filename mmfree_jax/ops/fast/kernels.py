"""Where the kernels of a device are: `hopper` and `tpu` have modules and functions of the same names."""

import importlib
from typing import Any, Literal

from mmfree_jax.devices import backend


def architecture() -> Literal["hopper", "tpu"]:
    """Return the folder of the kernels for the platform that is used, or traced for."""
    return "tpu" if backend() == "tpu" else "hopper"


def kernel_module(name: str) -> Any:
    """Return the module of a kernel for that platform. Imported late: few machines have what all kernels need."""
    return importlib.import_module(f"mmfree_jax.ops.fast.{architecture()}.{name}")
