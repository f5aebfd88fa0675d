"""`ops.served_linear`, faster."""

import math

import jax
from jax.typing import DTypeLike

from mmfree_jax.ops import served_linear
from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast.cpu.half_product import half_product


def row_product(x: jax.Array, w_FD: jax.Array, out: DTypeLike | None = None) -> jax.Array:
    """`ops.served_linear.row_product`; C++ serves few rows on a CPU, where XLA would copy the matrix as float32."""
    if not choice.half_product(x, w_FD):
        return served_linear.row_product.definition(x, w_FD, out)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return half_product(w_FD, rows).reshape(*x.shape[:-1], w_FD.shape[0]).astype(out or x.dtype)
