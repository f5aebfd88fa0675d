"""Which implementation serves: the one place that decides between a definition, XLA and a kernel.

The user's own choices are contexts around what is traced: `kernels_allowed(False)` leaves all to XLA, `definitions()`
leaves all to the definitions.
"""

import functools
import importlib
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from mmfree_jax.devices import backend, has_libraries
from mmfree_jax.ops.fast import verification
from mmfree_jax.ops.fast.checks import Use
from mmfree_jax.ops.fast.kernels import architecture, kernel_module
from mmfree_jax.sharding import Names, activation_axes, gathered_axes, shard_count, sharding_axis
from mmfree_jax.tracing import during

# A model calls the functions in `ops`. Each is decorated with `op` and calls the function of its name in `ops.fast`,
# which computes the same with a backward pass of its own. That function asks here, while a program is traced, which
# form to take: for this op, at these shapes and types, on this mesh and device. A kernel serves where it supports the
# shape and `verification` has found it right. All sizes are of one device's part: on a mesh a kernel runs inside
# `sharding.per_shard`, as the compiler cannot cut it.

P = ParamSpec("P")
R = TypeVar("R")

STEPS: Names = ("batch", "time", "channels")  # logical names of [B, T, D]
QUERIES_AT_ONCE = 256  # whose scores are made at once where no kernel keeps them on the chip
LOGITS_PER_CHUNK = {"cpu": 2**19, "gpu": 2**26, "tpu": 2**26}  # 2 MiB stay in a core's cache; 256 MiB of memory
HOPPER = ("hopper",)
MOST_ROWS = 2**31 // (128 * 127)  # whose products of int8 codes an int32 can sum

_allowed: ContextVar[bool] = ContextVar("kernels_allowed", default=True)
_forward_only: ContextVar[bool] = ContextVar("forward_only", default=False)
_defined: ContextVar[tuple[str, ...] | None] = ContextVar("defined", default=None)


class Op(Generic[P, R]):
    """A function with two implementations: its definition, and the function of its name in `ops.fast`."""

    def __init__(self, definition: Callable[P, R]):
        self._definition = definition
        self._module = definition.__module__.replace(".ops.", ".ops.fast.")
        functools.update_wrapper(self, definition)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute it by the fast implementation, unless `definitions` surrounds the call."""
        name, but = self._definition.__name__, _defined.get()
        if but is not None and name not in but:
            return self._definition(*args, **kwargs)
        return getattr(importlib.import_module(self._module), name)(*args, **kwargs)

    def definition(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute it, and the ops that it is made of, by their definitions."""
        with definitions():
            return self._definition(*args, **kwargs)


def op(definition: Callable[P, R]) -> Op[P, R]:
    """Decorate a definition in `ops` that has a fast twin of the same name in the module of the same name."""
    return Op(definition)


def definitions(but: tuple[str, ...] = ()) -> Any:
    """Compute ops by their definitions in what is traced inside, apart from those named. Also a decorator."""
    return during(_defined, but)


def kernels_allowed(allowed: bool) -> Any:
    """Allow or forbid kernels in what is traced inside; without them, XLA computes everything. Also a decorator."""
    return during(_allowed, allowed)


def forward_only() -> Any:
    """Promise that what is traced inside is not differentiated: kernels without a backward pass may serve."""
    return during(_forward_only, True)


def available(on: tuple[str, ...] = ("hopper", "tpu")) -> bool:
    """Whether kernels can run here and may, of one of these architectures."""
    return _allowed.get() and verification.possible() and architecture() in on


def local_rows(x: jax.Array) -> int:
    """Count the rows of x [..., D] that lie on one device."""
    return math.prod(
        size // shard_count(name, size) for name, size in zip(activation_axes(x.ndim), x.shape[:-1], strict=False)
    )


def input_codes(fusion: Any, sources: tuple[jax.Array, ...], source_gain: Any, gains: int, products: int) -> bool:
    """Whether a kernel makes the codes of a BitLinear's input, and the gradients to its sources.

    It takes 8 bits, a norm before the quantiser (gains > 0), and rows that are whole on a device and fill whole lanes.
    """
    recipe, width, dtype = fusion.recipe, sources[0].shape[-1], sources[0].dtype
    if gains == 0 or recipe.bits != 8 or fusion.kind == "plain" or not available():
        return False
    arrays = len(sources) + products + fusion.residual, len(sources) + gains
    fits = kernel_module("normed_codes").supports(width, (source_gain is not None) + gains, dtype, *arrays)
    if shard_count(gathered_axes(recipe.axes)[0], width) > 1 or not fits:
        return False
    options = fusion.kind, gains, products, str(dtype), recipe.gradient_bits, fusion.residual, fusion.onward
    return verification.serves(Use("normed_codes", (local_rows(sources[0]), width), options))


def normed_product(recipe: Any, kind: str, x: jax.Array, added: bool, weights: Any) -> bool:
    """Whether one kernel computes a BitLinear of packed weights, from the sources of its input on.

    It takes the few rows of a decoding step, 8 bits and whole matrices.
    """
    first, rows, width = weights.codes[0], math.prod(x.shape[:-1]), x.shape[-1]
    columns, bytes_of_a_row = first.bytes_FI.shape
    if not available(HOPPER) or recipe.bits != 8 or bytes_of_a_row % 4 or x.dtype not in (jnp.bfloat16, jnp.float32):
        return False
    from mmfree_jax.ops.fast.hopper import packed_product

    cut = shard_count("batch", x.shape[0]) * math.prod(map(shard_count, recipe.axes, (width, columns)))
    if cut > 1 or not packed_product.supports(rows, width, columns, first.layout):
        return False
    gains = 0 if weights.gain is None else math.prod(weights.gain.shape[:-1])
    options = kind, len(weights.codes), gains, str(x.dtype), first.scale.size > 1, added, first.layout
    return verification.serves(Use("normed_product", (rows, width, columns), options))


def dense_product(recipe: Any, kind: str, x: jax.Array, added: bool, weights: Any) -> bool:
    """Whether one kernel computes dense layers, from the sources of their input on: for the few rows of decoding."""
    first, rows = weights.rows_FD[0], math.prod(x.shape[:-1])
    columns, width = first.shape
    if not available(HOPPER) or x.dtype not in (jnp.bfloat16, jnp.float32):
        return False
    from mmfree_jax.ops.fast.hopper import dense_product as kernel

    cut = shard_count("batch", x.shape[0]) * math.prod(map(shard_count, recipe.axes, (width, columns)))
    if cut > 1 or kind == "gated" or not kernel.supports(rows, width, columns):
        return False
    options = kind, len(weights.rows_FD), str(x.dtype), str(first.dtype), added
    return verification.serves(Use("dense_product", (rows, width, columns), options))


def half_product(x: jax.Array, w_FD: jax.Array) -> bool:
    """Whether C++ on a CPU multiplies a few rows in float32 with a matrix in bfloat16, forward only, on one device."""
    if backend() != "cpu" or not (_allowed.get() and _forward_only.get()) or shard_count("batch", x.shape[0]) > 1:
        return False
    from mmfree_jax.ops.fast.cpu import half_product as kernel

    return (x.dtype, w_FD.dtype) == (jnp.float32, jnp.bfloat16) and kernel.supports(math.prod(x.shape[:-1]))


def packed_form(x: Any, w: Any) -> Literal["kernel", "cpu", "unpacked"]:
    """The form of a product of codes [..., D] with a packed matrix [D, F].

    "kernel" and "cpu" (C++) read the 2-bit weights as they lie in memory; "unpacked" makes codes of a byte of them
    first, for XLA or a kernel of large tiles.
    """
    if x.scale is None or w.layout != "planes" or x.codes.dtype != jnp.int8 or not _allowed.get():
        return "unpacked"
    if not available(HOPPER):
        return "cpu" if backend() == "cpu" else "unpacked"
    from mmfree_jax.ops.fast.hopper import packed_product

    rows, width, columns = math.prod(x.codes.shape[:-1]), x.codes.shape[-1], w.bytes_FI.shape[0]
    if shard_count("batch", x.codes.shape[0]) > 1 or not packed_product.supports_codes(rows, width, columns):
        return "unpacked"
    use = Use("codes_product", (rows, width, columns), (w.scale.size > 1,))
    return "kernel" if verification.serves(use) else "unpacked"


def gradient_codes_onward(recipe: Any, columns: int, dtype: Any) -> bool:
    """Whether a kernel can make codes of gradients [..., columns]: 8 bits, rows whole on a device, in whole lanes."""
    if not available(HOPPER) or recipe.gradient_bits != 8 or shard_count(gathered_axes(recipe.axes)[1], columns) > 1:
        return False
    from mmfree_jax.ops.fast.hopper import normed_codes

    return normed_codes.supports(columns, 0, dtype)


def row_codes(recipe: Any, dy: jax.Array, factored: bool) -> bool:
    """Whether a kernel makes the codes of a gradient to an output."""
    use = Use("row_codes", (local_rows(dy), dy.shape[-1]), (str(dy.dtype), factored))
    return gradient_codes_onward(recipe, dy.shape[-1], dy.dtype) and verification.serves(use)


def integer_product(x: Any, w: Any, out: Any, axes: Names, transposed: bool) -> bool:
    """Whether kernels multiply quantised x [..., D] and w [D, F] (`transposed`: [..., F] and [D, F]).

    They take whole blocks of int8 codes and whole sums on every device, one weight scale, and bfloat16 results.
    """
    if x.scale is None or w.scale is None or w.scale.size != 1 or out != jnp.bfloat16 or not available(HOPPER):
        return False
    if x.codes.dtype != jnp.int8 or shard_count(axes[transposed], w.codes.shape[transposed]) > 1:
        return False
    from mmfree_jax.ops.fast.hopper import int8_matmul, transposed_codes

    rows = local_rows(x.codes)
    shape = [size // shard_count(name, size) for name, size in zip(axes, w.codes.shape, strict=True)]
    inner, columns = reversed(shape) if transposed else shape
    if not (int8_matmul.supports(rows, inner, columns) and transposed_codes.supports(inner, columns)):
        return False
    transposing = [] if transposed else [Use("transposed_codes", (inner, columns), (False,))]
    return all(map(verification.serves, [*transposing, Use("int8_matmul", (rows, inner, columns), (False,))]))


def integers_by_xla(x: Any, w: Any) -> bool:
    """Whether XLA multiplies codes as integers: on TPUs, whose matrix units take int8, where both are codes of 8 bits.

    The products are the same numbers; a CPU would compute them more slowly, and a GPU would make int32 arrays of them.
    """
    return backend() == "tpu" and all(q.scale is not None and q.codes.dtype == jnp.int8 for q in (x, w))


def integer_sum_over_rows(x: jax.Array, dy: jax.Array) -> bool:
    """Whether kernels multiply codes [R, D] and [R, F] over their rows: whole blocks, and sums that an int32 holds."""
    from mmfree_jax.ops.fast.hopper import int8_matmul, transposed_codes

    (rows, inner), columns = x.shape, dy.shape[-1]
    whole_tiles = transposed_codes.supports(rows, inner) and transposed_codes.supports(rows, columns)
    if not (whole_tiles and int8_matmul.supports(inner, rows, columns) and rows <= MOST_ROWS):
        return False
    uses = [Use("transposed_codes", (rows, inner), (False,)), Use("transposed_codes", (rows, columns), (True,))]
    return all(map(verification.serves, [*uses, Use("int8_matmul", (inner, rows, columns), (True,))]))


def inputs_made_again() -> bool:
    """Whether dense layers keep the sources of a norm or a gate instead of its result.

    On TPUs, where memory is small and layers run in a loop: what a layer keeps is there depth times, in stacks that the
    compiler cannot thin out by recomputing, as a GPU's does for unrolled layers.
    """
    return backend() == "tpu"


def recurrence_form(x_BTD: Any, dtype: Any, gated: bool) -> Literal["kernel", "walk", "prefix"]:
    """The form of the recurrence, with the MLGRU's gates or without.

    "kernel" is one pass over memory on Hopper GPUs and TPUs, "walk" goes step by step, which is up to four times faster
    on a CPU than "prefix", a parallel prefix.
    """
    other: Literal["walk", "prefix"] = "walk" if backend() == "cpu" else "prefix"
    if not available() or dtype not in (jnp.bfloat16, jnp.float32) or x_BTD.shape[1] == 1:
        return other
    # The kernel's tiles are filled up with steps and channels that change nothing. On a mesh that would move every
    # other part to another place, so there each device has to have whole tiles from the beginning.
    parts = [shard_count(name, size) for name, size in zip(STEPS, x_BTD.shape, strict=True)]
    B, T, D = (size // n for size, n in zip(x_BTD.shape, parts, strict=True))
    rows, lanes = kernel_module("recurrence").TILE
    if (parts[1] > 1 and T % rows) or (parts[2] > 1 and D % lanes):
        return other
    use = Use("recurrence", (B, T, D), (str(jnp.dtype(dtype)), gated, parts[1] > 1))
    return "kernel" if verification.serves(use) else other


def attention_form(
    q_BTHK: Any, k_BTJK: Any, segments_BT: Any
) -> Literal["full", "blocks", "rows", "cudnn", "channels", "splash"]:
    """The form of attention.

    "full" makes all scores at once, "blocks" those of a block of queries; "rows" those of one row of the batch and one
    block of queries, up to four times faster on a CPU, where scores then stay in cache; "cudnn" is NVIDIA's fused
    kernel, which takes half precision, no documents and heads up to a width; "channels" is the same kernel, with more
    channels that keep documents apart; "splash" is that for TPUs. Where a mesh cuts time, queries see more keys than
    there are queries, which only "blocks" and "splash" know.
    """
    unfused: Literal["full", "blocks"] = "full" if q_BTHK.shape[1] <= QUERIES_AT_ONCE else "blocks"
    if architecture() == "tpu":
        return "splash" if _splash(q_BTHK, k_BTJK, segments_BT) else unfused
    if sharding_axis("time", q_BTHK.shape[1]) is not None:
        return unfused
    if backend() == "cpu":
        return "rows"
    if segments_BT is not None:
        return "channels" if _channels(q_BTHK, k_BTJK) else unfused
    fused = q_BTHK.dtype in (jnp.bfloat16, jnp.float16) and q_BTHK.shape[-1] <= widest_fused_head()
    return "cudnn" if fused else unfused


def _channels(q_BTHK: Any, k_BTJK: Any) -> bool:
    (B, T, H, K), J, dtype = q_BTHK.shape, k_BTJK.shape[2], q_BTHK.dtype
    cut = shard_count("heads", H) if shard_count("heads", J) == shard_count("heads", H) else 1
    if not available(HOPPER) or not has_libraries() or dtype != jnp.bfloat16 or T == 1:
        return False
    if not kernel_module("attention").supports(T, K):
        return False
    sizes = B // shard_count("batch", B), T, H // cut, J // cut, K
    return verification.serves(Use("attention", sizes, (str(dtype), True, 1)))


def _splash(q_BTHK: Any, k_BTJK: Any, segments_BT: Any) -> bool:
    (B, T, H, K), J, dtype = q_BTHK.shape, k_BTJK.shape[2], q_BTHK.dtype
    chunks, cut = shard_count("time", T), shard_count("heads", H)
    if shard_count("heads", J) != cut:  # then all of them are on every device
        cut = 1
    if not available(("tpu",)) or dtype not in (jnp.bfloat16, jnp.float32) or T == 1:
        return False
    if not kernel_module("attention").supports(T, H // cut, J // cut, chunks):
        return False
    sizes = B // shard_count("batch", B), T, H // cut, J // cut, K
    return verification.serves(Use("attention", sizes, (str(dtype), segments_BT is not None, chunks)))


def decode_attention(q_BTHK: Any, cache: Any) -> bool:
    """Whether a kernel rotates, keeps and attends from one token a row to a cache."""
    (B, T, H, K), (S, J), dtype = q_BTHK.shape, cache.k_BSJK.shape[1:3], q_BTHK.dtype
    if not available(HOPPER) or not _forward_only.get() or T != 1 or dtype not in (jnp.bfloat16, jnp.float32):
        return False
    from mmfree_jax.ops.fast.hopper import decode_attention as kernel

    cut = shard_count("batch", B) * shard_count("heads", J)
    if cut > 1 or cache.k_BSJK.dtype != dtype or not kernel.supports(H, J, K):
        return False
    return verification.serves(Use("decode_attention", (B, S, H, J, K), (str(dtype),)))


def widest_fused_head() -> int:
    """Return the widest head that cuDNN's kernel takes on the GPU here, or on one that is traced for; 0 without one."""
    if backend() == "gpu" != jax.default_backend():
        return (256 if available(HOPPER) else 128) if has_libraries() else 0
    capability = str(getattr(jax.devices()[0], "compute_capability", "")) if jax.default_backend() == "gpu" else ""
    if not capability.replace(".", "").isdigit():  # as gfx942 of another maker
        return 0
    return 256 if float(capability) >= 9 else 128


def loss_chunks(positions: int, time: int, columns: int) -> int:
    """Return into how many pieces the head cuts time, so that a piece's logits stay within the device's budget."""
    return min(time, math.ceil(positions * columns / LOGITS_PER_CHUNK.get(backend(), 2**26)))
