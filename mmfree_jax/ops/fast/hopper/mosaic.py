"""What the kernels share: compiler settings of those that stream over memory, and functions of registers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

# Pallas Mosaic GPU in short, as far as these kernels need it. GMEM is the device's memory, SMEM the shared memory of
# a multiprocessor, ACC an accumulator of the tensor cores in registers. A block has one or more warpgroups of 128
# threads. `emit_pipeline` walks over stages and has the copy engine (TMA) bring the operands of the next stages into
# SMEM while the body computes on this one. `copy_smem_to_gmem` starts a copy back; `wait_smem_to_gmem(n)` waits
# until all but the last n copies are over. `wgmma` multiplies two tiles of SMEM on the tensor cores.

# No automatic barriers: these kernels have no shared memory that several threads both read and write between the
# explicit ones. `commit_smem` (a fence, then a barrier of the warpgroup) orders what a stage has stored before the copy
# out of it. The same barrier stands between a stage's last read and the copy of a later stage into the same buffer. A
# stage that stores nothing has to have a barrier for that alone.
STREAMING = functools.partial(
    plgpu.CompilerParams,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    approx_math=True,
    unsafe_no_auto_barriers=True,
)


SHARED_BYTES = 227 * 1024 - 8192  # of shared memory that a block has on Hopper, less reductions, barriers and padding


def sigmoid(x: jax.Array) -> jax.Array:
    """Compute 1 / (1 + e^-x): an exponential and a reciprocal."""
    return 1.0 / (1.0 + jnp.exp(-x))


def broadcast(ref: Any, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Load a vector and broadcast it to an accumulator of this shape: along one of its axes, repeated on the other."""
    layout = plgpu.Layout.WGMMA.reduce(1 - axis)
    values = plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # as of jax 0.11
    return lax.broadcast_in_dim(values, shape, (axis,))
