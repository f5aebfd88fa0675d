"""Linear layers for inference, by the forms in which a served model holds its weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mmfree_jax.ops.bit_linear import Recipe, rms_norm
from mmfree_jax.ops.fast.choice import op
from mmfree_jax.ops.packed import Packed
from mmfree_jax.ops.ternary import dequantise, quantise_activations, wide


class PackedWeights(NamedTuple):
    """The arrays of G BitLinears with one input in a model that only has their codes: for inference.

    gain: of the RMSNorm before the quantiser, [D] shared by the products, [G, D] one each, None for no norm.
    """

    codes: tuple[Packed, ...]
    gain: jax.Array | None = None

    def linear(self, recipe: Recipe, x: jax.Array) -> tuple[jax.Array, ...]:
        """Apply the layers to one input, as `ops.bit_linear.linear`: [..., D] -> G arrays [..., F] of x's type."""
        exact, ys = wide(x.dtype), []
        for g, packed in enumerate(self.codes):
            u = x.astype(exact)
            if self.gain is not None:
                u = rms_norm(u, self.gain if self.gain.ndim == 1 else self.gain[g], recipe.eps)
            u = dequantise(quantise_activations(u, recipe.bits), x.dtype)
            ys.append(jnp.matmul(u, dequantise(packed.unpacked(x.shape[-1]), x.dtype)))
        return tuple(ys)


class RowWeights(NamedTuple):
    """The matrices of G dense layers with one input: [F, D] each, a row for each output.

    So they lie in a file, and so few tokens are multiplied fastest. Each is an array of its own: parts of a stack would
    be copied for every product that is not a kernel of ours.
    """

    rows_FD: tuple[jax.Array, ...]

    def linear(self, recipe: Recipe, x: jax.Array) -> tuple[jax.Array, ...]:
        """Apply the layers to one input, as `ops.bit_linear.linear`: [..., D] -> G arrays [..., F] of x's type."""
        return tuple(row_product(x, w_FD) for w_FD in self.rows_FD)


@op
def row_product(x: jax.Array, w_FD: jax.Array, out: DTypeLike | None = None) -> jax.Array:
    """Multiply x [..., D] with a matrix that has a row for each output: [..., F] of `out` (None: of x's type)."""
    return jnp.einsum("...d,fd->...f", x, w_FD.astype(x.dtype), preferred_element_type=out)
