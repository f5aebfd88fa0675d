"""`launch.py bench --suite check`: every kernel at hundreds of shapes on this device, each against float64; whole
ternary layers, also at widths that no kernel takes, against XLA on the CPU; and the gradients of whole small models of
all families against XLA in float32."""

import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.config import FAMILIES, ConfigError, DataConfig, ModelConfig, RunConfig
from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear, rms_norm
from mmfree_jax.ops.fast import checks
from mmfree_jax.ops.fast.checks import Use
from mmfree_jax.ops.fast.choice import kernels_allowed
from mmfree_jax.ops.fast.kernels import architecture, kernel_module, kernels
from mmfree_jax.ops.fast.verification import kernels_assumed
from mmfree_jax.ops.glu import glu
from mmfree_jax.training import self_check
from mmfree_jax.training.step import program_key

# Processes share the device, since most of a check is compilation: lowering a kernel keeps one core busy.

LIMIT_S = 430.0  # until a command begins its last checks, which may take 100 s; what is left is for the next command
PROCESSES = 12  # at most, on one device
MOST_VALUES = 2**26  # of one activation
ROW_COUNTS = (1, 2, 3, 77, 127, 128, 129, 154, 255, 264, 265, 300, 528, 529, 1000, 4096, 8191, 16384, 39989)
TYPES = ("bfloat16", "float32")
STEPS = (1, 31, 32, 33, 77, 1000, 2048, 8193)
LAYER_TOLERANCES = {"bfloat16": 0.1, "float32": 0.03}  # relative norm: codes on the edge of rounding fall either way


def uses(count: int, seed: int) -> list[Use]:
    """`count` different uses of each kernel that this device has, a quarter as many of whole layers and an eighth as
    many of whole models.

    There is at least one model of each family, unless `count` is smaller. Widths go from 16 to 8192; where a kernel
    takes any width, their residues modulo 256 follow each other. Every other layer has widths that the kernels take.
    """
    found: list[Use] = []
    for kernel in (*kernels(), "layer", "model"):
        draw = DRAWS[kernel]
        rng = np.random.default_rng([seed, zlib.crc32(kernel.encode())])
        drawn: dict[Use, None] = {}  # in order, each once
        number = max(count // SHARES.get(kernel, 1), min(count, len(FAMILIES)))
        for attempt in range(100 * number):
            if len(drawn) < number:
                drawn[draw(rng, attempt)] = None
        found += drawn
    return found


def _rows(rng: np.random.Generator, width: int) -> int:
    """One of ROW_COUNTS half of the time, otherwise any count up to 40,000; fewer where memory limits it."""
    count = int(rng.choice(ROW_COUNTS)) if rng.uniform() < 0.5 else int(np.exp(rng.uniform(0, math.log(40_000))))
    return max(1, min(count, MOST_VALUES // width))


def _width(rng: np.random.Generator, attempt: int) -> int:
    """A width whose residue modulo 256 is that of `attempt`; its logarithm is uniform."""
    residue = attempt % 256
    return residue + 256 * int(np.exp(rng.uniform(0, math.log(33))) - 1) if residue >= 16 else residue + 256


def _multiple(rng: np.random.Generator, of: int, most: int) -> int:
    return of * int(np.exp(rng.uniform(0, math.log(most // of + 1))))


def _draw_normed_codes(rng: np.random.Generator, attempt: int) -> Use:
    kind = str(rng.choice(["norm", "gated", "swiglu"]))
    width, bits = 128 * (1 + attempt % 64), int(rng.choice([0, 8]))
    gains = int(rng.choice([1, 2, 3])) if kind == "norm" and width <= 2048 else 1
    products = gains if gains > 1 else int(rng.choice([1, 2, 3])) if kind == "norm" else 1
    options = kind, gains, products, str(rng.choice(TYPES)), bits, kind == "norm" and bool(rng.integers(2))
    onward = kind == "swiglu" and bits == 8 and architecture() == "hopper"
    use = Use("normed_codes", (_rows(rng, width), width), (*options, onward))
    # What the kernel does not support, a layer leaves to XLA: as `choice.input_codes`.
    sources, vectors = 1 if kind == "norm" else 2, gains + (kind != "swiglu")
    arrays = sources + products + options[-1], sources + gains
    fits = kernel_module("normed_codes").supports(width, vectors, jnp.dtype(options[3]), *arrays)
    return use if fits else _draw_normed_codes(rng, attempt)


def _draw_row_codes(rng: np.random.Generator, attempt: int) -> Use:
    width = 128 * (1 + attempt % 64)
    return Use("row_codes", (_rows(rng, width), width), (str(rng.choice(TYPES)), bool(rng.integers(2))))


def _draw_int8_matmul(rng: np.random.Generator, attempt: int) -> Use:
    sizes = _multiple(rng, 256, 16384), _multiple(rng, 128, 16384), _multiple(rng, 128, 8192)
    return Use("int8_matmul", sizes, (bool(rng.integers(2)),))


def _draw_transposed_codes(rng: np.random.Generator, attempt: int) -> Use:
    return Use("transposed_codes", (_multiple(rng, 128, 8192), 128 * (1 + attempt % 64)), (bool(rng.integers(2)),))


def _draw_recurrence(rng: np.random.Generator, attempt: int) -> Use:
    width = _width(rng, attempt)
    time = int(rng.choice(STEPS)) if rng.uniform() < 0.7 else int(rng.integers(1, 4096))
    batch = int(np.exp(rng.uniform(0, math.log(max(1, min(64, 40_000 // time, MOST_VALUES // (time * width))) + 1))))
    chunk = time % 32 == 0 and width % 128 == 0
    return Use("recurrence", (batch, time, width), (str(rng.choice(TYPES)), bool(rng.integers(2)), chunk))


def _draw_normed_product(rng: np.random.Generator, attempt: int) -> Use:
    kind, width = str(rng.choice(["plain", "norm", "gated", "swiglu"])), 16 * (1 + attempt % 512)
    products = int(rng.choice([1, 2, 3]))
    gains = int(rng.choice([0, 1, products]) if kind == "plain" else rng.choice([1, products]))
    added = kind == "norm" and bool(rng.integers(2))
    sizes = int(rng.integers(1, 5)), width, min(_multiple(rng, 8, 16384), MOST_VALUES // width // 8 * 8)
    per_column, layout = bool(rng.integers(2)), str(rng.choice(["planes", "trits"]))
    return Use("normed_product", sizes, (kind, products, gains, str(rng.choice(TYPES)), per_column, added, layout))


def _draw_codes_product(rng: np.random.Generator, attempt: int) -> Use:
    width = 128 * (1 + attempt % 64)
    sizes = int(rng.integers(1, 257)), width, min(_multiple(rng, 32, 16384), MOST_VALUES // width // 32 * 32)
    return Use("codes_product", sizes, (bool(rng.integers(2)),))


def _draw_dense_product(rng: np.random.Generator, attempt: int) -> Use:
    kind, width = str(rng.choice(["plain", "norm", "swiglu"])), 64 * (1 + attempt % 128)
    added = kind == "norm" and bool(rng.integers(2))
    sizes = int(rng.integers(1, 5)), width, min(_multiple(rng, 8, 16384), MOST_VALUES // width // 8 * 8)
    return Use(
        "dense_product", sizes, (kind, int(rng.choice([1, 2])), str(rng.choice(TYPES)), str(rng.choice(TYPES)), added)
    )


def _draw_decode_attention(rng: np.random.Generator, attempt: int) -> Use:
    slots, width, keys = (
        int(np.exp(rng.uniform(0, math.log(8192)))),
        int(rng.choice([32, 64, 128, 256])),
        attempt % 16 + 1,
    )
    rows = max(1, min(int(rng.integers(1, 65)), MOST_VALUES // (slots * width * keys)))
    return Use(
        "decode_attention", (rows, slots, keys * int(rng.integers(1, 9)), keys, width), (str(rng.choice(TYPES)),)
    )


def _draw_attention(rng: np.random.Generator, attempt: int) -> Use:
    """Of any kind for TPUs; for GPUs, whose library computes the rest, bfloat16 with documents and whole rows."""
    gpu = architecture() == "hopper"
    time, width, group = int(rng.choice([2, 33, 128, 1000, 2048, 4096])), 1 + attempt % 256, int(rng.integers(1, 5))
    chunks = int(rng.choice([1, 2, 4])) if time % 512 == 0 and not gpu else 1
    keys = int(rng.integers(1, 5))
    rows = max(1, min(int(rng.integers(1, 9)), MOST_VALUES // (time * width * keys * group)))
    if not gpu:
        options = str(rng.choice(TYPES)), bool(rng.integers(2)), chunks
    else:
        options = "bfloat16", True, 1
        width -= 128 * (not kernel_module("attention").supports(time, width))
    return Use("attention", (rows, time, keys * group, keys, width), options)


def _draw_layer(rng: np.random.Generator, attempt: int) -> Use:
    width, out = _width(rng, attempt // 2), _width(rng, int(rng.integers(256)))
    if attempt % 2:
        width, out = _multiple(rng, 128, 2304), _multiple(rng, 128, 2304)
    rows = min(_rows(rng, max(width, out)), 2048)  # the CPU computes it too
    options = str(rng.choice(["linear", "unit"])), str(rng.choice(TYPES)), int(rng.choice([0, 8]))
    return Use("layer", (rows, min(width, 2304), min(out, 2304)), options)


def _draw_model(rng: np.random.Generator, attempt: int) -> Use:
    family = list(FAMILIES)[attempt % len(FAMILIES)]
    width = _multiple(rng, 128, 1024) if rng.integers(2) else 4 * int(rng.integers(4, 200))
    sizes = int(rng.integers(1, 9)), int(rng.choice([31, 77, 128, 256, 1000])), width, 16 * int(rng.integers(2, 129))
    bits = int(rng.choice([0, 8])) if FAMILIES[family][1] == "ternary" else 0
    return Use("model", sizes, (family, str(rng.choice(TYPES)), bits, bool(rng.integers(2))))


DRAWS: dict[str, Callable[[np.random.Generator, int], Use]] = {
    "normed_codes": _draw_normed_codes,
    "row_codes": _draw_row_codes,
    "int8_matmul": _draw_int8_matmul,
    "transposed_codes": _draw_transposed_codes,
    "recurrence": _draw_recurrence,
    "normed_product": _draw_normed_product,
    "codes_product": _draw_codes_product,
    "dense_product": _draw_dense_product,
    "decode_attention": _draw_decode_attention,
    "attention": _draw_attention,
    "layer": _draw_layer,
    "model": _draw_model,
}
SHARES = {"layer": 4, "model": 8}  # their programs take far longer to compile than a kernel


@dataclasses.dataclass(frozen=True)
class CheckRow:
    """A row of the table: a use, its largest deviation in tolerances, and that of which result."""

    use: str
    passed: bool
    deviation: float | None
    worst: str
    seconds: float


def run_check(use: Use) -> CheckRow:
    """Check one use and return its row. An exception becomes a row that did not pass, so that the suite goes on."""
    began = time.perf_counter()
    try:
        outcome = {"layer": _layer, "model": _model}.get(use.kernel, checks.check)(use)
    except Exception as error:  # the row says so, and the suite fails
        return CheckRow(str(use), False, None, f"{type(error).__name__}: {error}"[:300], time.perf_counter() - began)
    deviation = max(outcome.deviations.values(), key=lambda value: np.nan_to_num(value, nan=np.inf))
    return CheckRow(str(use), outcome.passed, deviation, outcome.worst, time.perf_counter() - began)


def _layer(use: Use) -> checks.Outcome:
    """A BitLinear or a whole gated unit of any size on this device, in its type, against the CPU in float32.

    sizes: rows, width, width of the products. options: which of the two, type, bits of gradients.
    """
    (M, D, F), (op, dtype, bits) = use.sizes, use.options
    rng = np.random.default_rng(zlib.crc32(str(use).encode()))
    draw = lambda *shape: np.asarray(rng.standard_normal(shape), np.float32)
    x, dy = np.asarray(jnp.asarray(draw(M, D), dtype), np.float32), draw(M, F if op == "linear" else D)
    weights = {"gain": 1 + draw(D) / 4, "first": draw(2, D, F), "first gain": 1 + draw(D) / 4}
    if op == "unit":
        weights |= {"down": draw(1, F, D), "down gain": 1 + draw(F) / 4}
    recipe, kind = Recipe(gradient_bits=bits), jnp.dtype(dtype)

    def forward(x, w):
        u, first = rms_norm(x, w["gain"], recipe.eps), Weights(w["first"], w["first gain"])
        if op == "unit":
            return glu(recipe, first, recipe, Weights(w["down"], w["down gain"]), u)
        y, other = bit_linear(recipe, u, first)
        return y + other

    def gradients(x, w, dy, kind):
        y, pull = jax.vjp(forward, x.astype(kind), w)
        dx, dw = pull(dy.astype(kind))
        return {"output": y, "gradient to x": dx, **{f"gradient to {name}": d for name, d in dw.items()}}

    device, host = jax.local_devices()[0], jax.local_devices(backend="cpu")[0]
    with kernels_assumed() if device.platform in ("gpu", "tpu") else kernels_allowed(False):
        found = jax.jit(functools.partial(gradients, kind=kind))(*jax.device_put((x, weights, dy), device))
    with kernels_allowed(False):
        expected = jax.jit(functools.partial(gradients, kind=jnp.float32))(*jax.device_put((x, weights, dy), host))
    error = lambda a, b: float(np.linalg.norm(np.float32(a) - np.float32(b)) / np.linalg.norm(np.float32(b)))
    return checks.Outcome({name: error(found[name], b) / LAYER_TOLERANCES[dtype] for name, b in expected.items()})


def _model(use: Use) -> checks.Outcome:
    """The comparison of `training.self_check` for a model of two layers: each gradient's error over what rounding
    explains.

    sizes: rows, time, width, GLU width. options: family, type, bits of gradients, whether documents are apart.
    """
    (rows, time, width, glu_width), (family, dtype, bits, apart) = use.sizes, use.options
    mixer, linear = FAMILIES[family]
    model = ModelConfig(
        vocab=512,
        width=width,
        depth=2,
        glu_width=glu_width,
        mixer=mixer,
        linear=linear,
        heads=max(n for n in (1, 2, 4) if width % (2 * n) == 0) if mixer == "attention" else 1,
        gradient_bits=bits,
    )
    data = DataConfig(vocab=512, sequence=time, batch=rows, separate_documents=apart)
    run = RunConfig("check", model, data, precision=dtype)
    deviations = self_check.compare(program_key(run, 0), rows, 1, time, 512, tuned=False)
    return checks.Outcome({name: found / explained for name, (found, explained) in deviations.items()})


def uses_of_shard(shard: str, seed: int, shapes: int, only: str) -> list[Use]:
    """The uses of one shard, "i/n", whose names contain one of the words of `only` ("a|b").

    Raises ConfigError for a shard of another form, and where no use is left.
    """
    index, _, shards = shard.partition("/")
    if not (index.isdigit() and shards.isdigit() and int(index) < int(shards)):
        raise ConfigError(f"shard={shard!r}: want i/n with i from 0 to n - 1, as 0/4")
    found = uses(shapes, seed)[int(index) :: int(shards)]
    found = [use for use in found if any(word in str(use) for word in only.split("|"))]
    if not found:
        raise ConfigError(f"no check has {only!r} in its name")
    return found


def measure(uses: list[Use], done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each use: first those already in `done`, then new checks until LIMIT_S is over."""
    known = {row["use"]: row for row in done}
    yield from (known[str(use)] for use in uses if str(use) in known)
    until, new = time.monotonic() + LIMIT_S, (use for use in uses if str(use) not in known)
    in_time = itertools.takewhile(lambda _: time.monotonic() <= until, new)
    yield from map(dataclasses.asdict, _beside(in_time))


def by_kernel(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kernel: number of shapes, how many are wrong, and the largest deviation of the others."""
    found = []
    for kernel in DRAWS:
        of = [row for row in rows if row["use"].split()[0] == kernel]
        worst = max((row for row in of if row["passed"]), key=lambda row: row["deviation"], default={})
        wrong, most = sum(not row["passed"] for row in of), worst.get("use")
        line = {"kernel": kernel, "shapes": len(of), "wrong": wrong, "deviation": worst.get("deviation")}
        found.append({**line, "most deviating": most})
    return [row for row in found if row["shapes"]]


def _beside(uses: Iterator[Use]) -> Iterator[CheckRow]:
    """Check uses in several processes; each gets its next use when it has finished one.

    A process that dies takes the others of its pool along. Each use that they were checking is then checked alone, in a
    process of its own: the one that kills it fails, and the suite goes on in a new pool.
    """
    workers = max(1, min(PROCESSES, (os.cpu_count() or 1) - 1))
    # Processes are spawned, not forked: a fork would take over the GPU's context, which only one process can use.
    pool_of = functools.partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
    while True:
        lost: list[Use] = []
        with pool_of(workers) as pool:
            yield from _in(pool, workers, uses, lost)
        for use in lost:
            with pool_of(1) as alone:
                try:
                    yield alone.submit(run_check, use).result()
                except BrokenProcessPool:
                    yield CheckRow(str(use), False, None, "the process that checked it died", 0.0)
        if not lost:
            return


def _in(pool: ProcessPoolExecutor, workers: int, uses: Iterator[Use], lost: list[Use]) -> Iterator[CheckRow]:
    """Rows of uses, from a pool. Once a process has died, those that were being checked are added to `lost`."""
    running: dict[Future[CheckRow], Use] = {}
    for use in uses:
        try:
            running[pool.submit(run_check, use)] = use
        except BrokenProcessPool:
            lost.append(use)
        if len(running) >= workers:
            yield from _ended(running, FIRST_COMPLETED, lost)
        if lost:
            break
    yield from _ended(running, ALL_COMPLETED, lost)


def _ended(running: dict[Future[CheckRow], Use], when: str, lost: list[Use]) -> Iterator[CheckRow]:
    """Wait, and take the futures that have ended out of `running`."""
    for future in wait(running, return_when=when).done:
        use = running.pop(future)
        try:
            yield future.result()
        except BrokenProcessPool:
            lost.append(use)
