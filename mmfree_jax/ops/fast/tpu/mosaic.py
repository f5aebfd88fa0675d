"""What all kernels for TPUs share: how they are called, and vectors turned from lanes to rows."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mmfree_jax.tracing import during

# A register holds 8 rows (sublanes) of 128 lanes in float32, and a tile of memory is 8, 16 or 32 rows of types of 4, 2
# or 1 bytes. A grid is walked in order, its last axis fastest, while the blocks of the next step are copied into VMEM
# and those of the last one out of it. What is in scratch stays there from one step to the next.

LANES = 128  # of a register
SUBLANES = 8  # of a register in float32
VMEM_BYTES = 48 * 2**20  # that a kernel may use, of 64 MiB on v5p and 128 MiB on v5e and v6e

_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)
_noted: ContextVar[list[int] | None] = ContextVar("noted", default=None)


def interpreted() -> Any:
    """Interpret the kernels that are traced inside, on any device. Also a decorator."""
    return during(_interpreted, True)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Note the bytes that each kernel moves which is traced inside."""
    noted: list[int] = []
    with during(_noted, noted):
        yield noted


def is_interpreted() -> bool:
    """Whether kernels that are traced here are interpreted."""
    return _interpreted.get()


def call(
    body: Callable[..., None],
    grid: tuple[int, ...],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    scratch: Sequence[Any] = (),
    parallel: int = 0,
    name: str | None = None,
) -> Callable[..., Sequence[jax.Array]]:
    """Return a kernel over a grid whose first `parallel` axes may be walked in any order."""
    order: Any = ("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)

    def run(*operands: jax.Array) -> Sequence[jax.Array]:
        pairs = zip([*inputs, *outputs], [*operands, *results], strict=True)
        moved = sum(_moved(grid, spec, array) for spec, array in pairs)
        if (noted := _noted.get()) is not None:
            noted.append(moved)
        return pl.pallas_call(
            body,
            grid=grid,
            in_specs=list(inputs),
            out_specs=list(outputs),
            out_shape=list(results),
            scratch_shapes=list(scratch),
            compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_BYTES),
            # The compiler does not look into kernels: it orders copies and collectives beside them by this.
            cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
            interpret=_interpreted.get(),
            name=name,
        )(*operands)

    return run


def _moved(grid: tuple[int, ...], spec: Any, array: Any) -> int:
    """Bytes of an array that are copied into VMEM or out of it.

    A block is copied where its index changes: once for every step of the grid's axes up to the last that moves it.
    """
    if spec.block_shape is None:
        return array.size * array.dtype.itemsize
    index = lambda axis: tuple(map(int, spec.index_map(*(grid[a] - 1 if a == axis else 0 for a in range(len(grid))))))
    moves = [axis for axis in range(len(grid)) if index(axis) != index(None)]
    block = [1 if size is None else min(size, whole) for size, whole in zip(spec.block_shape, array.shape, strict=True)]
    blocks = math.prod(grid[: moves[-1] + 1]) if moves else 1
    # Of an axis that blocks hang over only what exists is copied.
    whole = math.prod(array.shape) / math.prod(n * -(-size // n) for n, size in zip(block, array.shape, strict=True))
    return int(blocks * math.prod(block) * array.dtype.itemsize * whole)


def along_rows(lanes: jax.Array) -> jax.Array:
    """[1, 128] -> [128, 128]: value r of the lanes everywhere in row r."""
    return jnp.transpose(jnp.broadcast_to(lanes, (LANES, LANES)))


def along_lanes(rows: jax.Array) -> jax.Array:
    """[128, 128] with equal values in each row -> [1, 128]: the value of row r in lane r."""
    return jnp.transpose(rows)[:1]


def wider(a: jax.Array, width: int) -> jax.Array:
    """[R, 128] with equal values in each row -> [R, width]."""
    copies = -(-width // LANES)
    return (a if copies == 1 else jnp.concatenate([a] * copies, axis=1))[:, :width]
