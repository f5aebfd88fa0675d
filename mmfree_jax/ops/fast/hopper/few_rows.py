"""What kernels for the few rows of a decoding step share (Pallas Triton, Hopper): how a block reads a row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mmfree_jax.ops.fast.origin import Kind

# A decoding step reads every weight once and computes almost nothing, so it takes as long as its bytes, if nothing
# waits. What waits is the chain of small operations before each product: each would be a kernel of its own, and a
# kernel takes two microseconds to start and end, as long as the product itself. So every block of a product repeats
# that chain for the whole row: the row is some kilobytes that all blocks find in the second-level cache. A launch has
# no more blocks than run at once, so that each computes its row once. A block asks for its first weights before it
# reads the row, and for others while it multiplies (`pipelined`), so that memory is never idle.
#
# No sum of the chain waits for another, because what a norm does is a factor of its whole row: blocks compute with the
# row as it is before its norm, and multiply the result.

MOST_ROWS = 4  # from there on tensor cores pay
PROCESSORS = 132  # multiprocessors of an H200
INTERPRET = False  # True where tests run the kernels on a CPU


class Row(NamedTuple):
    """A row of activations in a kernel: references to what it is made of (`origin.Origin`).

    number: which row. gain: of the norm in it. addend: added to the first source, times `factor`. total: where that sum
    is written, by the block that `writes`.
    """

    kind: Kind
    number: jax.Array
    sources: list[Any]
    gain: Any = None
    addend: Any = None
    factor: float = 1.0
    total: Any = None
    writes: Any = False

    @property
    def has_norm(self) -> bool:
        """Whether the row is of a norm: then `read` lacks the factor 1 / rms of the first source."""
        return self.kind in ("norm", "gated")

    def read(self, index: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Return the row at some places, but for the factor of its norm, and its first source there; float32."""
        load = lambda ref: masked_load(ref.at[self.number, index], mask).astype(jnp.float32)
        first, *others = self.sources
        x = load(first)
        if self.addend is not None:
            rounded = (x + self.factor * load(self.addend)).astype(first.dtype)
            if self.total is not None:
                at = self.total.at[self.number, index]
                pl.when(self.writes)(lambda: plt.store(at, rounded, mask=mask))
            x = rounded.astype(jnp.float32)
        if self.kind == "swiglu":
            return x * jax.nn.sigmoid(x) * load(others[0]), x
        v = x if self.gain is None else x * masked_load(self.gain.at[index], mask)
        if self.kind == "gated":
            h = load(others[0])
            v = v * h * jax.nn.sigmoid(h)
        return v, x


def masked_load(at: Any, mask: jax.Array | None) -> jax.Array:
    """Load what the mask allows, and zeros elsewhere. Nothing may be clamped into range: Triton would no longer see
    that places lie together, and load them one by one."""
    return plt.load(at, mask=mask, other=None if mask is None else 0)


def tiles_of_a_block(tiles: int, products: int, blocks: int) -> int:
    """Tiles that each block computes, so that all blocks of a launch run at once, `blocks` on a multiprocessor, and
    compute their row once."""
    return -(-tiles // max(1, blocks * PROCESSORS // products))


def tiles_ahead(count: int, size: int, ahead: int) -> int:
    """Tiles of `size` bytes, of `count`, to ask for before the first is needed, so that about `ahead` bytes are on
    their way."""
    return min(count, max(1, ahead // size))


def columns_of(first: Any, tile: Any, count: int, width: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Return the columns of one of a block's `count` tiles, of which the block's first is `first`, and which exist."""
    column = (first + tile) * width + jnp.arange(width)
    return column, (column < columns) & (tile < count)


def all_columns(first: Any, count: int, width: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Return the columns of all results of `pipelined`, [width, ...], and which exist."""
    tile = jnp.arange(pl.next_power_of_2(count))[None]
    column = (first + tile) * width + jnp.arange(width)[:, None]
    return column, (column < columns) & (tile < count)


def pipelined(
    count: int, ahead: list[Any], load: Callable[[Any], Any], multiply: Callable[[Any], jax.Array]
) -> jax.Array:
    """Multiply tiles 0 to count - 1 in turn, each loaded `len(ahead)` tiles before it is needed; `ahead` are the first.

    Returns the results, [width, count] filled up to a power of two. They are collected in registers: to store them here
    would make all warps wait for each other at every tile.
    """
    place = jnp.arange(pl.next_power_of_2(count))

    def step(tile: jax.Array, carry: Any) -> Any:
        loaded, results = carry
        following = load(tile + len(loaded))
        results = jnp.where(place[None] == tile, multiply(loaded[0])[:, None], results)
        return [*loaded[1:], following], results

    like = jax.eval_shape(multiply, ahead[0])
    return lax.fori_loop(0, count, step, (ahead, jnp.zeros((*like.shape, len(place)), like.dtype)))[1]
