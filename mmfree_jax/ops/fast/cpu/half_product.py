"""Products of matrices in bfloat16 with a few vectors in float32 on a CPU: JAX's side of `half_product.cc`."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.ops.fast.cpu.library import BY_XLA, registered, run_variant, target, variant_names


def supports(rows: int) -> bool:
    """Whether `half_product` serves so many rows here: few, and there is a C++ compiler or what it has made."""
    return rows < BY_XLA and registered()


def half_product(w_NK: jax.Array, x_MK: jax.Array) -> jax.Array:
    """Multiply float32 x_MK with the rows of bfloat16 w_NK: float32 [M, N], summed in float32."""
    shape = jax.ShapeDtypeStruct((x_MK.shape[0], w_NK.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(target("half_product"), shape)(w_NK, x_MK)


def variants() -> Iterator[str]:
    """Names of the variants that this CPU runs, the fastest first."""
    return (name for _, name in variant_names("half_"))


def product_by_variant(variant: str, w_NK: np.ndarray, x_MK: np.ndarray) -> np.ndarray:
    """Multiply by one variant in one thread, without XLA: for tests. Raises KeyError if this CPU does not run it."""
    (M, K), N = x_MK.shape, w_NK.shape[0]
    y_MN = np.empty((M, N), np.float32)
    run_variant("half_", variant, (M, N, K), w_NK, x_MK, y_MN)
    return y_MN
