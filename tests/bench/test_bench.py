import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfree_jax.bench import operations, unoptimised
from mmfree_jax.bench.operations import Case
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.presets import model_preset


def bench(*arguments):
    command = [sys.executable, "launch.py", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_every_suite_runs_on_a_cpu_and_writes_its_figures(tmp_path):
    done = bench("--json", str(tmp_path / "b.json"), "--only", "tiny")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["ceilings"]["copy_bytes_per_s"] > 1e8
    assert [row["preset"] for row in found["step"]] == ["transformer++-tiny", *["matmul-free-tiny"] * 3]
    fast, integer, plain = found["step"][1:]
    assert integer["gradient_bits"] == 8
    assert abs(fast["loss"] - integer["loss"]) < 0.05
    assert abs(fast["loss"] - plain["loss"]) < 0.05
    asked = {(row["preset"], row["remat"], row["unoptimised"]): row["temporary_gb"] for row in found["memory"]}
    saved, kept = (asked["matmul-free-tiny", remat, ""] for remat in ("full", "none"))
    assert saved < kept < asked["matmul-free-tiny", "none", "float32"]
    assert all(row["step_ms_least"] <= row["step_ms"] <= row["step_ms_most"] for row in found["step"])
    assert all(0 < row["cached_s"] < row["compile_s"] for row in found["step"])
    done = bench("--suite", "kernels", "--only", "recurrence")
    assert done.returncode == 0, done.stderr
    for name in ("recurrence", "gated recurrence"):
        assert f" {name}, B=2 T=256 D=128 " in done.stdout
        assert f" {name} and gradient, B=2 T=256 D=128 " in done.stdout


def test_a_case_nobody_knows_and_a_wrong_suite_fail_in_a_line():
    for arguments, reason in (
        (["--only", "tinyy"], "no case has 'tinyy' in its name"),
        (["--suite", "speed"], "speed"),
    ):
        done = bench(*arguments)
        assert done.returncode == 1
        assert reason in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_variant_that_computes_something_else_is_refused():
    draw = lambda key: (jax.random.normal(key, (8, 8)),)
    case = Case("square", {"xla": lambda x: x * x, "wrong": lambda x: x * x + 0.01 * x}, draw, draw, tolerance=1e-4)
    rows = operations.measure(case, {"copy_bytes_per_s": 1e9, "bf16_flops": 1e9})
    assert next(rows)["error"] == 0
    with pytest.raises(ValueError, match="square: wrong differs from the reference by"):
        next(rows)


def test_the_unoptimised_model_computes_the_same_loss_and_gradients():
    config = model_preset("matmul-free", "tiny")
    model = LanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    ids = jax.random.randint(jax.random.key(1), (2, 33), 0, config.vocab)
    tokens, targets = ids[:, :-1], ids[:, 1:]

    def ours(model):
        nats, count = model.loss(tokens, targets)
        return nats / count

    (a, da), (b, db) = (nnx.value_and_grad(f)(model) for f in (ours, lambda m: unoptimised.loss(m, tokens, targets)))
    assert abs(a - b) < 2e-3  # a code that falls to the other side of a rounding changes the loss by about this
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    assert np.corrcoef(flat(da), flat(db))[0, 1] > 0.999
