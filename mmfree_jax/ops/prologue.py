"""What stands between a layer's stored activations and the input of a BitLinear: a norm, a gated norm, a gated unit.

Given to `bit_linear` unevaluated, it is computed in the same pass as the norm and the quantiser, and made again in the
backward pass instead of being kept.
"""

from typing import Literal, NamedTuple

import jax

from mmfree_jax.ops.rms_norm import rms_norm
from mmfree_jax.ops.ternary import wide

Kind = Literal["plain", "norm", "gated", "swiglu"]


class Prologue(NamedTuple):
    """A value [..., D] to be made out of `sources` [..., D]; `gain` [D] is that of the norm in it.

    plain: the one source. norm: RMSNorm of it. gated: RMSNorm of the first times silu of the second (the official
    output gate of Zhu et al. 2024). swiglu: silu of the first times the second (Shazeer 2020, arXiv 2002.05202).
    """

    kind: Kind
    sources: tuple[jax.Array, ...]
    gain: jax.Array | None = None
    eps: float = 1e-6

    def value(self) -> jax.Array:
        """The value in the sources' type; norms compute in at least float32."""
        return combine(self.kind, self.sources, self.gain, self.eps)

    def reread(self, first: jax.Array) -> "Prologue":
        """The same, its first source as an op handed it on."""
        return self._replace(sources=(first, *self.sources[1:]))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self.sources[0].shape


def settled(x: jax.Array | Prologue) -> jax.Array:
    """The value, if it has not been computed yet."""
    return x.value() if isinstance(x, Prologue) else x


def combine(kind: Kind, sources: tuple[jax.Array, ...], gain: jax.Array | None, eps: float) -> jax.Array:
    """`Prologue.value` as a function of its arrays."""
    first = sources[0]
    if kind == "plain":
        return first
    if kind == "swiglu":
        return swiglu(first, sources[1])
    assert gain is not None
    normed = rms_norm(first, gain, eps)
    return normed if kind == "norm" else normed * jax.nn.silu(sources[1])


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202). Its backward pass computes in at least float32."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(saved: tuple[jax.Array, jax.Array], d: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Behind a barrier, or XLA's GPU compiler makes two passes of the two gradients.
    gate, up, d = (a.astype(wide(a.dtype)) for a in jax.lax.optimization_barrier((*saved, d)))
    share = jax.nn.sigmoid(gate)
    dgate, dup = d * up * share * (1 + gate * (1 - share)), d * gate * share
    return dgate.astype(saved[0].dtype), dup.astype(saved[1].dtype)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)
