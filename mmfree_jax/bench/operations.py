"""The operations of the models, each variant checked against the reference and then timed."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from mmfree_jax.bench.timing import memory_bytes, repeat, repetitions, time_calls
from mmfree_jax.ops.attention import causal_attention
from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear, rms_norm
from mmfree_jax.ops.cross_entropy import Head
from mmfree_jax.ops.fast.choice import available, kernels_allowed
from mmfree_jax.ops.fast.cross_entropy import head_loss
from mmfree_jax.ops.glu import swiglu
from mmfree_jax.ops.recurrence import gated_recurrence, gates, recurrence


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one size.

    variants: name -> function of `arrays`; the first is the reference in XLA, to which the others are held in float32
    on a few rows. moved: bytes that have to be read and written at least, flops: of its products; either may be 0.
    tuned: whether the compiler may time candidates on the device, as it does for products.
    """

    name: str
    variants: dict[str, Callable]
    arrays: Callable[[jax.Array], tuple]
    check_arrays: Callable[[jax.Array], tuple]
    tolerance: float
    moved: float = 0
    flops: float = 0
    tuned: bool = True


def gradient_of(function: Callable, count: int) -> Callable:
    """A function's results, and their gradients to its first `count` arguments against the last argument."""

    def loss(*arguments):
        *operands, weigh = arguments
        results = jax.tree.leaves(function(*operands))
        return sum(jnp.sum(r.astype(jnp.float32) * weigh.astype(jnp.float32)) for r in results), results

    return jax.grad(loss, tuple(range(count)), has_aux=True)


def both(function: Callable) -> dict[str, Callable]:
    """The reference, and beside it the kernel where there is one."""
    return {"xla": kernels_allowed(False)(function), **({"kernel": function} if available() else {})}


def draw(key: jax.Array, *shapes: Sequence[int], dtype: Any = jnp.bfloat16) -> tuple[jax.Array, ...]:
    """Standard normal arrays."""
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, shape, jnp.float32).astype(dtype) for k, shape in zip(keys, shapes, strict=True))


def recurrence_cases(sizes: Sequence[tuple[int, int]], D: int) -> Iterator[Case]:
    """The recurrence alone, and with the MLGRU's gates: in one pass, and gates first; of each size (B, T).

    Both read two and write one number a step forward; backward they write two and read three, with gates four.
    """

    def arrays(key, count=2, B=1, T=256, dtype=jnp.bfloat16):
        return draw(key, *[(B, T, D)] * count, dtype=dtype)

    def factors(key, **options):
        f, *others = arrays(key, **options)
        return jax.nn.sigmoid(f), *others

    def gates_first(c, f):
        factor, x = (a.astype(c.dtype) for a in gates(c, f, None))
        return recurrence(factor, x, dtype=c.dtype)

    plain = lambda f, x: recurrence(f, x, dtype=x.dtype)
    gated = lambda c, f: gated_recurrence(c, f, None)[0]
    beaten = {"gates, then kernel": gates_first} if available() else {}  # what the kernel with gates has to beat
    forms: list[tuple[str, dict[str, Callable], Callable, float, float]] = []
    for name, make, functions, backward in (
        ("recurrence", factors, both(plain), 5),
        ("gated recurrence", arrays, {**both(gated), **beaten}, 6),
    ):
        gradients = {form: gradient_of(function, 2) for form, function in functions.items()}
        forms.append((name, functions, make, 1e-4, 3))
        forms.append((f"{name} and gradient", gradients, functools.partial(make, count=3), 1e-3, 3 + backward))
    # All sizes have the same functions and check, which is then compiled once.
    checks = [functools.partial(make, dtype=jnp.float32) for _, _, make, _, _ in forms]
    for B, T in sizes:
        for (name, functions, make, tolerance, passes), check in zip(forms, checks, strict=True):
            moved, size = passes * 2 * B * T * D, f"B={B} T={T} D={D}"
            timed = functools.partial(make, B=B, T=T)
            yield Case(f"{name}, {size}", functions, timed, check, tolerance, moved=moved, tuned=False)


def bit_linear_cases(M: int, D: int, F: int) -> Iterator[Case]:
    """Gate and up of a GLU as one layer: norms and quantiser, then two products that share the codes."""

    def ternary(x, w_GDF, gain, outer):
        return bit_linear(Recipe(), rms_norm(x, outer, 1e-6), Weights(w_GDF, gain))

    def dense(x, w_GDF, gain, outer):
        u = rms_norm(x, outer, 1e-6)
        return tuple(jnp.matmul(u, w_GDF[g].astype(x.dtype)) for g in range(2))

    def arrays(key, M=M, dtype=jnp.bfloat16, weigh=False):
        shapes = [(M, D)] + [(M, F)] * weigh
        x, *dy = draw(key, *shapes, dtype=dtype)
        (w,) = draw(jax.random.key(1), (2, D, F), dtype=jnp.float32)
        return x, w, jnp.ones(D), jnp.ones(D), *dy

    variants = {
        "xla": kernels_allowed(False)(ternary),
        "dense bf16": dense,
        **({"kernel": ternary} if available() else {}),
    }
    small = functools.partial(arrays, M=256, dtype=jnp.float32)
    size, flops = f"{M} x {D} -> 2 x {F}", 4.0 * M * D * F
    yield Case(f"BitLinear, {size}", variants, arrays, small, 2e-2, flops=flops)
    backward: dict[str, Callable] = {name: gradient_of(function, 4) for name, function in variants.items()}
    both_ways, small = functools.partial(arrays, weigh=True), functools.partial(small, weigh=True)
    yield Case(f"BitLinear and gradient, {size}", backward, both_ways, small, 2e-2, flops=3 * flops)


def swiglu_case(M: int, F: int) -> Case:
    """SwiGLU, norm and quantiser, forward and backward around an empty product: what stands beside a GLU's products."""
    narrow = 128

    def function(gate, up, w_GDF, gain):
        return bit_linear(Recipe(), swiglu(gate, up), Weights(w_GDF, gain))[0]

    def arrays(key, M=M, dtype=jnp.bfloat16):
        gate, up, dy = draw(key, (M, F), (M, F), (M, narrow), dtype=dtype)
        return gate, up, *draw(jax.random.key(1), (1, F, narrow), dtype=jnp.float32), jnp.ones(F), dy

    small = functools.partial(arrays, M=256, dtype=jnp.float32)
    name = f"SwiGLU to codes and gradient, {M} x {F}"
    # Read gate and up, write codes; read codes and write them dequantised; read gate, up, dz; write dgate, dup.
    return Case(name, both(gradient_of(function, 4)), arrays, small, 2e-2, moved=M * F * (4 + 1 + 1 + 2 + 6 + 4))


DOCUMENT = 512  # tokens of a document on average, where documents are separate


def attention_case(B: int, T: int, H: int, K: int, apart: bool) -> Case:
    """Causal attention, of documents that are joined or apart, forward and backward.

    2 products forward, 5 backward, half of the scores seen; the same number of operations is taken for both, so that
    their rates show what documents cost.
    """

    def arrays(key, B=B, T=T, dtype=jnp.bfloat16):
        q, k, v, dy = draw(key, *[(B, T, H, K)] * 4, dtype=dtype)
        begins = jax.random.uniform(jax.random.key(1), (B, T)) < 1 / DOCUMENT
        return q, k, v, *([jnp.cumsum(begins, axis=1)] if apart else []), dy

    def attend(function):
        return gradient_of(lambda q, k, v, segments=None: function(q, k, v, segments_BT=segments), 3)

    variants = {"full": attend(causal_attention.definition), "auto": attend(causal_attention)}
    small = functools.partial(arrays, B=1, T=min(T, 1024), dtype=jnp.bfloat16)
    flops, documents = 7 * B * T * T * H * K, " within documents" * apart
    return Case(
        f"attention{documents} and gradient, B={B} T={T} H={H} K={K}", variants, arrays, small, 2e-2, flops=flops
    )


def head_case(B: int, T: int, D: int, V: int) -> Case:
    """Dense head and cross-entropy, forward and backward, by chunks and with all logits at once."""

    def function(chunks, x, w, targets):
        loss = lambda x, w: head_loss(Head(Recipe(ternary=False), w), x, targets, chunks=chunks).total
        return jax.value_and_grad(loss, (0, 1))(x, w)[1]

    def arrays(key, B=B, T=T, dtype=jnp.bfloat16):
        (x,) = draw(key, (B, T, D), dtype=dtype)
        (w,) = draw(jax.random.key(1), (D, V), dtype=jnp.float32)
        return x, w * 0.02, jax.random.randint(jax.random.key(2), (B, T), 0, V)

    variants: dict[str, Callable] = {"one chunk": functools.partial(function, 1)}
    variants["chunks"] = functools.partial(function, 0)
    small = functools.partial(arrays, B=1, T=min(T, 64), dtype=jnp.float32)
    name = f"head and loss and gradient, B={B} T={T} D={D} V={V}"
    return Case(name, variants, arrays, small, 1e-3, flops=6.0 * B * T * D * V)


def cases(small: bool) -> Iterator[Case]:
    """The shapes of a 1.3B model at 16,384 tokens a step; or tiny ones, for a CPU."""
    B, T, D, F, V = (2, 256, 128, 384, 512) if small else (8, 2048, 2048, 5632, 32000)
    yield from recurrence_cases([(B, T)] if small else [(B, T), (2, 8192)], D)
    yield from bit_linear_cases(B * T, D, F)
    yield swiglu_case(B * T, F)
    for apart in (False, True):
        yield attention_case(B, T, D // 128, 128, apart)
    yield head_case(B, T, D, V)


def worst_difference(found: Any, wanted: Any) -> float:
    """The largest difference of any result, relative to the largest value of that result; NaN if any result has one."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    wide = lambda a: np.asarray(a, np.float32)
    # Not Python's `max`, which drops NaN.
    return float(np.max([np.abs(wide(a) - wide(b)).max() / max(np.abs(wide(b)).max(), 1e-30) for a, b in pairs]))


def measure(cases: Sequence[Case], limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row for each variant. Raises ValueError when one does not compute what the reference does.

    On accelerators, what is timed is one program that applies the operation several times (`timing.repeat`), and a
    time is that of the program divided by how many they are: it holds no gap between programs, which takes 10 us.
    `error` and `temporary_mb` are of one application.

    All programs are built before the first is timed, beside each other. Those with products wait for each other: the
    compiler times candidates for them, which nothing else may disturb.
    """
    with ThreadPoolExecutor(min(6, os.cpu_count() or 1)) as many, ThreadPoolExecutor(1) as one:

        @functools.cache
        def built(function: Callable, times: int, shapes: tuple, tuned: bool) -> Future:
            return (one if tuned else many).submit(_build, function, times, shapes)

        plans = [_plan(case, limits, built) for case in cases]
    for case, plan in zip(cases, plans, strict=True):
        yield from _rows(case, plan, limits)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The programs of one case: what draws its inputs, and those of each variant."""

    draw_checked: Future
    draw: Future
    checks: dict[str, Future]
    timed: dict[str, Future]
    times: int


def _plan(case: Case, limits: dict[str, float], built: Callable[..., Future]) -> _Plan:
    # Inputs are drawn on the device by compiled programs: copying gigabytes of them there would take longer than the
    # test.
    key = jax.eval_shape(lambda: jax.random.key(0))
    few, all_rows = (jax.eval_shape(make, key) for make in (case.check_arrays, case.arrays))
    results = jax.eval_shape(next(iter(case.variants.values())), *all_rows)
    result_bytes = sum(r.size * r.dtype.itemsize for r in jax.tree.leaves(results))
    least_s = max(case.moved / limits["copy_bytes_per_s"], case.flops / limits["bf16_flops"])
    times = repetitions(least_s, result_bytes)
    checked = [name for name in case.variants if name != "dense bf16"]  # another function, there for its time
    return _Plan(
        built(case.check_arrays, 1, (key,), False),
        built(case.arrays, 1, (key,), False),
        {name: built(case.variants[name], 1, few, case.tuned) for name in checked},
        {name: built(function, times, all_rows, case.tuned) for name, function in case.variants.items()},
        times,
    )


def _build(function: Callable, times: int, shapes: tuple) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """The programs of one application and of `times`, two compilations of one lowering: that of a kernel takes long."""
    if times == 1:
        return (jax.jit(function).lower(*shapes).compile(),) * 2
    allowed = [export.DisabledSafetyCheck.custom_call("ALL")]  # it is called in this process only
    once = export.export(jax.jit(function), disabled_checks=allowed)(*shapes).call
    return jax.jit(once).lower(*shapes).compile(), jax.jit(repeat(once, times)).lower(*shapes).compile()


def _rows(case: Case, plan: _Plan, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    key = jax.random.key(0)
    checked, arrays = (program.result()[0](key) for program in (plan.draw_checked, plan.draw))
    wanted = None
    for name in case.variants:
        error = None
        if name in plan.checks:
            found = jax.device_get(plan.checks[name].result()[0](*checked))
            wanted = found if wanted is None else wanted
            error = worst_difference(found, wanted)
            if not error <= case.tolerance:
                raise ValueError(f"{case.name}: {name} differs from the reference by {error:.2g}")
        one, many = plan.timed[name].result()
        timing = time_calls(functools.partial(many, *arrays))
        median_s = timing.median_s / plan.times
        yield {
            "case": case.name,
            "variant": name,
            "error": error,
            "ms": median_s * 1e3,
            "ms_least": timing.least_s / plan.times * 1e3,
            "ms_most": timing.most_s / plan.times * 1e3,
            "of_copy": case.moved / median_s / limits["copy_bytes_per_s"] if case.moved else None,
            "of_bf16": case.flops / median_s / limits["bf16_flops"] if case.flops else None,
            "temporary_mb": memory_bytes(one)["temporary"] / 1e6,
        }
