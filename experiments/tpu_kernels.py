"""Every kernel for TPUs compiled for TPUs that are not here, and the bytes that it moves, as a table.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m experiments.tpu_kernels > experiments/results/tpu_kernels.csv
    (--quick: small shapes only, as CI does; or the name of a device)

Needs `pip install 'jax[tpu]'` and no TPU; nothing is computed. `moved`: bytes between memory and a core by the kernel's
blocks, which the program's total is made of; `program`: bytes accessed by the compiled program, by XLA's count, with
what stands around the kernel (for attention two to four transpositions, which in a model fuse with what makes queries
and keys), of blocks that a kernel reads again only one; `least`: operands and results, each once in each pass. Exit
status 1 if a kernel moves more than 1.3 times the least where its arrays are whole blocks: all but attention.
"""

import csv
import itertools
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from mmfree_jax.lowering.compiled import ABSENT, SLICES, absent_devices

os.environ.update(ABSENT)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmfree_jax.ops.fast.tpu import attention, mosaic, normed_codes, recurrence

MOST = 1.3  # times the least possible
COLUMNS = ("device", "kernel", "shape", "type", "options", "moved", "program", "least", "ratio", "temporaries", "whole")
BF16, F32 = jnp.bfloat16, jnp.float32
EPS = 1e-6


class Case(NamedTuple):
    """A kernel at a shape: what is compiled, and its operands."""

    kernel: str
    shape: tuple[int, ...]
    dtype: Any
    options: str
    function: Callable
    operands: tuple
    whole: bool  # whether its arrays are whole blocks, large enough for what is copied once not to count
    moved: float | None = None  # where it cannot be counted by blocks


def recurrences(B: int, T: int, D: int, dtype: Any, gated: bool) -> list[Case]:
    """Forward and backward, and what a chunk of time does to a state."""
    steps, state, keep = array((B, T, D), dtype), array((B, D), F32), array((B, T), F32)
    floor, whole, options = array((D,), F32) if gated else None, T % 256 == 0 and D % 512 == 0, "gated" * gated
    pairs: list[tuple[str, Callable, tuple]] = [
        ("recurrence", recurrence.forward, (steps, steps, floor, state, keep)),
        (
            "recurrence backward",
            recurrence.backward,
            (steps if gated else None, steps, floor, state, keep, steps, steps, state),
        ),
        ("segment ends", recurrence.segment_ends, (steps, steps, floor, keep)),
        ("segment starts", recurrence.segment_starts, (steps, floor, keep, steps)),
    ]
    return [Case(name, (B, T, D), dtype, options, f, operands, whole) for name, f, operands in pairs]


def codes(M: int, D: int, dtype: Any, kind: str, gains: int, products: int, copy: bool) -> list[Case]:
    """Forward and backward of one input of products."""
    rows, gain = array((M, D), dtype), array((D,), F32)
    sources, inner = [rows] * (1 if kind == "norm" else 2), None if kind == "swiglu" else gain
    forward = lambda sources, inner, gains: normed_codes.forward(kind, sources, inner, gains, EPS)

    def backward(sources, inner, gains, scales, dys, factors, dcopy):
        return normed_codes.backward(kind, sources, inner, gains, scales, dys, factors, EPS, False, None, dcopy)

    shared = sources, inner, [gain] * gains
    of_backward = (
        *shared,
        [array((M,), F32)] * gains,
        [rows] * products,
        array((products,), F32),
        rows if copy else None,
    )
    options, whole = f"{kind} {gains} {products}{' copy' * copy}", M % 512 == 0 and D % 128 == 0
    return [
        Case("codes", (M, D), dtype, options, forward, shared, whole),
        Case("codes backward", (M, D), dtype, options, backward, of_backward, whole),
    ]


def attentions(B: int, T: int, H: int, J: int, K: int, dtype: Any, documents: bool) -> list[Case]:
    """Forward, and the forward and the backward pass of training."""
    q, k = array((B, T, H, K), dtype), array((B, T, J, K), dtype)
    segments = array((B, T), jnp.int32) if documents else None
    attend = attention.causal_attention

    def both(q, k, v, segments, dy):
        return jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)[1](dy)

    shape, options = (B, T, H, J, K), "documents" * documents
    moved = lambda training: B * attention_bytes(T, H, J, K, dtype, documents, training)
    return [
        Case("attention", shape, dtype, options, attend, (q, k, k, segments), False, moved(False)),
        Case("attention, training", shape, dtype, options, both, (q, k, k, segments, q), False, moved(True)),
    ]


def attention_bytes(T: int, H: int, J: int, K: int, dtype: Any, documents: bool, training: bool) -> float:
    """Bytes of one row by the blocks of splash attention, and by what XLA does between its passes.

    A head of queries or keys is one unit. Of what has a number for each query (its place, its document, the logarithm
    of its sum) the kernel takes a column of 128 lanes where queries are rows, and 8 sublanes where they are lanes.
    """
    cut, item, lanes, sublanes = attention.blocks(T, 1, K, dtype), jnp.dtype(dtype).itemsize, 128 * 4, 8 * 4
    unit, queries, keys = cut.time * K * item, cut.time // cut.queries, cut.time // cut.keys
    # A block of keys stays where the next head of queries has the same one.
    seen = H * (queries + 1) / 2 if queries > 1 else J  # times that all keys are read, where queries stay
    columns = H * cut.time * lanes * (1 + documents)
    again = columns + 2 * seen * unit + documents * seen * cut.time * sublanes
    sums = 4 * cut.queries * (2 * 128 + K)  # largest scores, sums and results of one block, which leave as results
    forward = 2 * H * unit + again + sums
    if not training:
        return forward
    # The logarithms leave as a column of lanes, whose first XLA copies; and it makes each row's product of y and dy.
    forward += 2 * H * cut.time * lanes
    rows = 2 * H * unit + 2 * H * cut.time * sublanes
    seen_from = H * (queries + queries // keys) / 2 / queries  # times that all queries are read, where keys stay
    of_queries = 2 * unit + cut.time * sublanes * (3 + documents)
    backward = 4 * J * unit + keys * seen_from * of_queries + 8 * cut.keys * K
    if not cut.one_pass:
        return forward + rows + backward + 3 * H * unit + again + 4 * cut.queries * K + 2 * H * cut.time * 4
    summed = (keys + 1) * H * unit if keys > 1 else 0
    return forward + rows + backward + keys * H * unit + summed + 4 * cut.queries * K


def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An operand."""
    return jax.ShapeDtypeStruct(shape, dtype)


def cases(quick: bool) -> list[Case]:
    """All kernels, at the shapes of models unless `quick`, and at sizes that divide nothing."""
    found = [
        *recurrences(2, 77, 100, F32, True),
        *recurrences(1, 257, 513, BF16, False),
        *recurrences(1, 1, 5, F32, True),
    ]
    found += [*codes(77, 100, F32, "norm", 3, 3, True), *codes(1, 33, BF16, "gated", 1, 1, False)]
    found += [*codes(300, 640, BF16, "swiglu", 1, 1, False), *attentions(2, 77, 4, 2, 32, F32, True)]
    found += attentions(1, 200, 2, 2, 80, BF16, False)
    if quick:
        return found
    found += [*recurrences(4, 2048, 1024, BF16, True), *recurrences(4, 2048, 2048, BF16, True)]
    found += [*recurrences(1, 8192, 1024, F32, False)]
    found += [*codes(8192, 1024, BF16, "norm", 1, 3, True), *codes(8192, 2048, BF16, "norm", 3, 3, False)]
    found += [*codes(8192, 1024, BF16, "gated", 1, 1, False), *codes(8192, 2816, BF16, "swiglu", 1, 1, False)]
    found += [*codes(8192, 5632, BF16, "swiglu", 1, 1, False), *codes(513, 13824, BF16, "swiglu", 1, 1, False)]
    return [*found, *attentions(4, 2048, 8, 8, 128, BF16, False)]


def row(device: str, case: Case) -> dict[str, Any]:
    """Compile one case."""
    one = NamedSharding(Mesh(np.array(absent_devices(device, 1)), ("x",)), PartitionSpec())
    operands = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), case.operands)
    with mosaic.counted() as moved:
        lowered = jax.jit(case.function).lower(*operands)
    compiled, size = lowered.compile(), lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    least = size(operands) + size(jax.eval_shape(case.function, *operands))
    if case.kernel == "attention, training":  # the backward pass reads operands and result of the forward pass again
        q, k, _, segments, _ = case.operands
        least += size((q, q, q, k, k, segments)) + 2 * q.size // q.shape[-1] * 4
    if "codes backward" in case.kernel:  # scales are computed again
        least -= size(case.operands[3])
    total = sum(moved) if case.moved is None else case.moved
    return {
        "device": device,
        "kernel": case.kernel,
        "shape": "x".join(map(str, case.shape)),
        "type": jnp.dtype(case.dtype).name,
        "options": case.options,
        "moved": round(total),
        "program": round((compiled.cost_analysis() or {})["bytes accessed"]),
        "least": least,
        "ratio": f"{total / least:.3f}",
        "temporaries": getattr(compiled.memory_analysis(), "temp_size_in_bytes", ""),
        "whole": int(case.whole),
    }


def main() -> int:
    """Print the table, row by row."""
    table = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    table.writeheader()
    failed = 0
    devices = [device for device in SLICES if device in sys.argv] or SLICES
    for device, case in itertools.product(devices, cases("--quick" in sys.argv)):
        made = row(device, case)
        # By XLA's count as well, where nothing but the kernel is in the program.
        counted = [made["moved"]] if case.moved is not None else [made["moved"], made["program"]]
        failed += bool(made["whole"]) and max(counted) > MOST * made["least"]
        table.writerow(made)
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
