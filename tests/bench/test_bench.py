import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import launch
from mmfree_jax.bench import operations
from mmfree_jax.bench.operations import Case
from mmfree_jax.bench.steps import defined_loss
from mmfree_jax.bench.timing import Timing, repeat, repetitions
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.presets import model_preset, run_preset
from tests.in_process import called

LIMITS = {"copy_bytes_per_s": 1e9, "bf16_flops": 1e9}


def bench(*arguments):
    command = [sys.executable, "launch.py", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_every_suite_runs_on_a_cpu_and_writes_its_figures(tmp_path):
    done = bench("--json", str(tmp_path / "b.json"), "--only", "tiny|recurrence|SwiGLU")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["ceilings"]["copy_bytes_per_s"] > 1e8
    dense, fast, integer, apart, rounded, plain = found["step"]
    assert dense["preset"] == apart["preset"] == "transformer++-tiny"
    assert integer["gradient_bits"] == 8
    assert apart["documents"] == "apart"
    assert rounded["moments"] == "int8"
    for other in (integer, rounded, plain):
        assert other["preset"] == fast["preset"] == "matmul-free-tiny"
        assert abs(fast["loss"] - other["loss"]) < 0.05
    asked = {(row["preset"], row["remat"], row["unoptimised"]): row["temporary_gb"] for row in found["memory"]}
    saved, kept = (asked["matmul-free-tiny", remat, ""] for remat in ("full", "none"))
    assert saved < kept < asked["matmul-free-tiny", "none", "float32"]
    assert all(row["step_ms_least"] <= row["step_ms"] <= row["step_ms_most"] for row in found["step"])
    untrained = np.log(run_preset("matmul-free-tiny").model.vocab)
    assert all(row["loss"] < untrained - 0.1 for row in found["step"])  # of the last of steps that follow each other
    starts = {(row["preset"], row["start"]): row for row in found["start"]}
    for preset in ("transformer++-tiny", "matmul-free-tiny"):
        cold, warm = starts[preset, "cold"], starts[preset, "warm"]
        assert cold["compiled"] >= 1
        assert warm["compiled"] == 0
        assert warm["compile_s"] < cold["compile_s"]
    assert " SwiGLU to codes and gradient, 512 x 384 " in done.stdout
    assert "BitLinear" not in done.stdout
    for name in ("recurrence", "gated recurrence"):
        assert f" {name}, B=2 T=256 D=128 " in done.stdout
        assert f" {name} and gradient, B=2 T=256 D=128 " in done.stdout


def test_a_case_nobody_knows_and_a_wrong_suite_fail_in_a_line():
    for done, reason in (
        (bench("--only", "tinyy"), "no case has 'tinyy' in its name"),
        (called(launch.main, "bench", "--suite", "speed"), "speed"),
    ):
        assert done.returncode == 1
        assert reason in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_variant_that_computes_something_else_is_refused():
    draw = lambda key: (jax.random.normal(key, (8, 8)),)
    case = Case("square", {"xla": lambda x: x * x, "wrong": lambda x: x * x + 0.01 * x}, draw, draw, tolerance=1e-4)
    rows = operations.measure([case], LIMITS)
    assert next(rows)["error"] == 0
    with pytest.raises(ValueError, match="square: wrong differs from the reference by"):
        next(rows)


def test_a_repeated_operation_runs_that_often_one_after_the_other():
    ran = []

    def function(x, w):
        jax.debug.callback(lambda: ran.append(1))
        return jnp.tanh(x @ w), x @ w.T

    arguments = jax.random.normal(jax.random.key(0), (8, 8)), jnp.eye(8) * 0.5
    results = jax.jit(repeat(function, 3))(*arguments)
    jax.effects_barrier()
    assert len(ran) == len(results) == 3
    for result in results:
        for found, wanted in zip(result, function(*arguments), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
    steps = jax.make_jaxpr(repeat(function, 3))(*arguments)
    calls, barriers = steps.eqns[::2], steps.eqns[1::2]
    assert {e.primitive.name for e in barriers} == {"optimization_barrier"}
    for before, barrier, after in zip(calls, barriers, calls[1:], strict=False):
        joined, passed = barrier.outvars[:2], barrier.outvars[2:]
        assert barrier.invars[2:] == before.outvars  # waits for all results
        assert after.invars == joined
        assert set(passed) <= set(steps.jaxpr.outvars)  # in use, or the compiler may take the barrier out


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="compilers for CPUs ignore barriers")
def test_the_compiler_keeps_all_applications():
    x = jnp.ones((256, 256))
    programs = [jax.jit(repeat(lambda x: x * x + 1, n)).lower(x).compile().as_text() for n in (1, 4)]
    assert [program.count(" fusion(") for program in programs] == [1, 4]


def test_programs_repeat_short_operations_within_memory(monkeypatch):
    assert repetitions(1e-4, 10**6) == 1  # on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [repetitions(least_s, 10**8) for least_s in (0, 7e-5, 2e-4, 1e-3, 5e-3)] == [16, 16, 10, 2, 1]
    assert [repetitions(0, result_bytes) for result_bytes in (10**9, 10**10)] == [4, 1]


def test_times_are_of_one_application_and_the_same_check_is_built_once(monkeypatch):
    monkeypatch.setattr(operations, "repetitions", lambda least_s, result_bytes: 4)
    monkeypatch.setattr(operations, "time_calls", lambda call: Timing(4.0, 2.0, 8.0) if len(call()) == 4 else None)
    traced = []

    def square(x):
        traced.append(x.shape)
        return x * x

    variants, draw = {"xla": square}, lambda n: lambda key: (jax.random.normal(key, (n, 8)),)
    check = draw(2)
    cases = [Case(f"{n} rows", variants, draw(n), check, tolerance=0, moved=4e9) for n in (8, 16)]
    rows = list(operations.measure(cases, LIMITS))
    assert [(row["ms"], row["ms_least"], row["ms_most"]) for row in rows] == [(1e3, 5e2, 2e3)] * 2
    assert [row["of_copy"] for row in rows] == [4.0] * 2
    assert traced.count((2, 8)) == 1


def test_the_unoptimised_model_computes_the_same_loss_and_gradients():
    config = model_preset("matmul-free", "tiny")
    model = LanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    ids = jax.random.randint(jax.random.key(1), (2, 33), 0, config.vocab)
    tokens, targets = ids[:, :-1], ids[:, 1:]

    def ours(model):
        nats, count, _ = model.loss(tokens, targets)
        return nats / count

    theirs = lambda model: defined_loss(model, tokens, targets)
    (a, da), (b, db) = (nnx.jit(nnx.value_and_grad(f))(model) for f in (ours, theirs))
    assert abs(a - b) < 2e-3  # a code that falls to the other side of a rounding changes the loss by about this
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    assert np.corrcoef(flat(da), flat(db))[0, 1] > 0.999
