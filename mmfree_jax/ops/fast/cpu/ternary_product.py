"""Products of 2-bit ternary weights with int8 activations on a CPU: JAX's side of `ternary_product.cc`.

Without a C++ compiler XLA multiplies (`product_by_xla`), with the same integers as a result.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.ops.fast.cpu.library import BY_XLA, registered, run_variant, target, variant_names
from mmfree_jax.ops.packed import PLANES, unpack_planes


def ternary_product(bytes_NI: jax.Array, q_MK: jax.Array) -> jax.Array:
    """Multiply int8 activations q_MK with ternary weights: int32 [M, N], exact.

    bytes_NI: weights of N outputs as `packed.pack_planes` packs them, I = ceil(K / 4).
    """
    if q_MK.shape[0] >= BY_XLA or not registered():
        return product_by_xla(bytes_NI, q_MK)
    q_MK = jnp.pad(q_MK, [(0, 0), (0, PLANES * bytes_NI.shape[1] - q_MK.shape[1])])
    shape = jax.ShapeDtypeStruct((q_MK.shape[0], bytes_NI.shape[0]), jnp.int32)
    return jax.ffi.ffi_call(target("ternary_product"), shape)(bytes_NI, q_MK)


def product_by_xla(bytes_NI: jax.Array, q_MK: jax.Array) -> jax.Array:
    """`ternary_product` by XLA, which unpacks the weights."""
    codes_NK = unpack_planes(bytes_NI, q_MK.shape[1])
    return jax.lax.dot_general(q_MK, codes_NK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def variants() -> Iterator[str]:
    """Names of the variants that this CPU runs, the fastest first."""
    return (name for _, name in variant_names())


def product_by_variant(variant: str, bytes_NI: np.ndarray, q_MK: np.ndarray) -> np.ndarray:
    """Multiply by one variant in one thread, without XLA: for tests. Raises KeyError if this CPU does not run it."""
    M, N, K = q_MK.shape[0], bytes_NI.shape[0], PLANES * bytes_NI.shape[1]
    q_MK, y_MN = np.pad(q_MK, [(0, 0), (0, K - q_MK.shape[1])]), np.empty((M, N), np.int32)
    run_variant("", variant, (M, N, K), bytes_NI, q_MK, y_MN)
    return y_MN
