"""The kernels for TPUs, interpreted on the CPU, against float64: forward and backward, at sizes that divide nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mmfree_jax.devices import compiled_for, traced_for
from mmfree_jax.ops.bit_linear import Recipe, Weights, linear, rms_norm
from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast.checks import Use, check
from mmfree_jax.ops.fast.tpu import attention, normed_codes, recurrence
from mmfree_jax.ops.fast.tpu.mosaic import interpreted
from mmfree_jax.ops.fast.verification import kernels_assumed
from mmfree_jax.ops.glu import swiglu

USES = [
    Use("recurrence", (2, 77, 100), ("float32", True, True)),  # one block that hangs over both ends
    Use("recurrence", (1, 300, 640), ("bfloat16", True, False)),  # two blocks of time and two of channels
    Use("recurrence", (3, 1, 5), ("float32", False, False)),
    Use("recurrence", (1, 513, 128), ("bfloat16", False, True)),
    Use("normed_codes", (77, 256), ("norm", 1, 3, "float32", 0, True, False)),
    Use("normed_codes", (1, 33), ("norm", 3, 3, "float32", 0, False, False)),
    Use("normed_codes", (300, 100), ("gated", 1, 1, "bfloat16", 0, False, False)),
    Use("normed_codes", (600, 640), ("swiglu", 1, 1, "bfloat16", 8, False, False)),  # two blocks of rows
    Use("attention", (2, 77, 4, 2, 32), ("float32", True, 1)),
    Use("attention", (1, 130, 3, 3, 80), ("bfloat16", False, 1)),
    Use("attention", (1, 256, 2, 1, 160), ("float32", True, 2)),  # queries of the second of two chunks
    Use("attention", (1, 641, 2, 1, 520), ("bfloat16", True, 1)),  # three blocks of keys, backward in one pass
    Use("attention", (1, 1100, 1, 1, 520), ("float32", False, 1)),  # five, in two passes
]


@pytest.mark.parametrize("use", USES, ids=str)
def test_kernels_agree_with_float64(use):
    with interpreted(), traced_for("tpu"):
        outcome = check(use)
    assert outcome.passed, outcome.worst


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("channels", "dtype"), [(32, "bfloat16"), (128, "float32"), (600, "float32")])
def test_blocks_cover_time_and_are_whole(chunks, channels, dtype):
    for time in (1, 77, 128, 129, 1025, 2048, 2049, 4096, 20_000):
        time = time if chunks == 1 else -(-time // 256) * 256
        cut = attention.blocks(time, chunks, channels, dtype)
        assert time <= cut.time < time + 2 * 128 * -(-cut.time // cut.keys)
        assert cut.time == time or chunks == 1
        assert cut.time % cut.keys == cut.keys % cut.at_once == cut.queries % cut.at_once == cut.at_once % 128 == 0
        assert cut.time // chunks % cut.queries == 0
        assert max(cut.queries * channels, cut.keys * channels / 2) * jnp.dtype(dtype).itemsize <= 2**19


def broken_carry(monkeypatch):
    """A recurrence that forgets its state between groups of steps."""
    monkeypatch.setattr(recurrence._Walk, "over", lambda self, group, carry: group(0, carry))


def codes_rounded_down(monkeypatch):
    monkeypatch.setattr(normed_codes.jnp, "round", jnp.floor)


def unscaled_queries(monkeypatch):
    whole = attention._kernel
    monkeypatch.setattr(attention, "_kernel", lambda *sizes: lambda q, *rest: whole(*sizes)(2 * q, *rest))


FAULTS = [
    (broken_carry, Use("recurrence", (1, 40, 8), ("float32", True, False))),
    (codes_rounded_down, Use("normed_codes", (4, 32), ("swiglu", 1, 1, "float32", 0, False, False))),
    (unscaled_queries, Use("attention", (1, 8, 1, 1, 4), ("float32", False, 1))),
]


@pytest.mark.parametrize(("fault", "use"), FAULTS, ids=lambda one: getattr(one, "__name__", ""))
def test_faults_are_seen(monkeypatch, fault, use):
    fault(monkeypatch)
    with interpreted(), traced_for("tpu"):
        assert not check(use).passed


def test_kernels_serve_on_tpus_only_once_verified():
    q, codes = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16), jax.ShapeDtypeStruct((2, 64, 96), jnp.bfloat16)
    forms = lambda: (choice.attention_form(q, q, None), choice.recurrence_form(codes, jnp.bfloat16, gated=True))
    with traced_for("tpu"):
        assert forms() == ("full", "prefix")
        with kernels_assumed():
            assert forms() == ("splash", "kernel")
            with choice.kernels_allowed(False):
                assert forms() == ("full", "prefix")


def test_cudnn_serves_what_is_compiled_for_a_gpu_and_not_what_is_only_partitioned_for_it():
    q = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16)
    with traced_for("cuda"):
        assert choice.attention_form(q, q, None) == "full"
        with compiled_for():
            assert choice.attention_form(q, q, None) == "cudnn"


@pytest.mark.parametrize(("width", "fits"), [(1024, True), (2816, True), (13824, True), (100_000, False)])
def test_widths_whose_rows_exceed_vmem_are_left_to_xla(width, fits):
    assert normed_codes.supports(width, 1, jnp.bfloat16, 3, 3) == fits


def test_dense_layers_keep_what_their_inputs_are_made_of():
    """On TPUs, where each residual is a stack of all layers: gradients are the same, and two arrays fewer are kept."""
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    recipe, axes = Recipe(ternary=False), {"gate_up": draw(0, 2, 32, 64), "down": draw(1, 1, 64, 32)}

    @jax.jit
    def loss(x, gain, weights):
        gate, up = linear(recipe, rms_norm(x, gain, 1e-6), Weights(weights["gate_up"], None))
        (y,) = linear(recipe, swiglu(gate, up), Weights(weights["down"], None))
        return jnp.sum(jnp.sin(y))

    def gradients(platform):
        jax.clear_caches()
        with traced_for(platform):
            _, pull = jax.vjp(loss, draw(2, 4, 8, 32), jnp.ones(32), axes)
            return pull(1.0), [a.shape for a in jax.tree.leaves(pull)]

    (usual, kept), (found, fewer) = gradients("cpu"), gradients("tpu")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(usual), strict=True):
        assert jnp.allclose(a, b, rtol=1e-5, atol=1e-6)
    wide = lambda shapes: sum(shape[:2] == (4, 8) for shape in shapes)
    assert wide(fewer) <= wide(kept) - 2


PROGRAM = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mmfree_jax.config import MeshConfig
from mmfree_jax.devices import traced_for
from mmfree_jax.ops.attention import causal_attention
from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear, rms_norm
from mmfree_jax.ops.fast.tpu.mosaic import interpreted
from mmfree_jax.ops.fast.verification import kernels_assumed
from mmfree_jax.ops.recurrence import gated_recurrence
from mmfree_jax.sharding import make_mesh

rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
resets = jnp.asarray(rng.uniform(size=(2, 40)) < 0.1)
segments = jnp.cumsum(jnp.asarray(rng.uniform(size=(2, 256)) < 0.05), axis=1)

def recurrence(c, f, floor, h):
    out, last = gated_recurrence(c, f, floor, h, resets_BT=resets)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(last))

def attend(q, k, v):
    return jnp.sum(jnp.sin(causal_attention(q, k, v, segments_BT=segments)))

def layer(x, w, gain):
    recipe = Recipe(axes=("embed", "heads"))
    return sum(jnp.sum(jnp.sin(y)) for y in bit_linear(recipe, rms_norm(x, gain, 1e-6), Weights(w, jnp.ones(96))))

cases = {
    "recurrence": (recurrence, (draw(2, 40, 96), draw(2, 40, 96), jnp.full(96, 0.3), draw(2, 96))),
    "attention": (attend, (draw(2, 256, 2, 32), draw(2, 256, 2, 32), draw(2, 256, 2, 32))),
    "layer": (layer, (draw(4, 20, 96), draw(2, 96, 64), jnp.ones(96))),
}
found = {}
for name, (f, args) in cases.items():
    gradient = jax.jit(jax.value_and_grad(f, tuple(range(len(args)))))
    expected = gradient(*args)
    mesh = make_mesh(MeshConfig(1, 2, 1, 2))
    placed = [jax.device_put(a, NamedSharding(mesh, P())) for a in args]
    with jax.set_mesh(mesh), traced_for("tpu"), kernels_assumed(), interpreted():
        traced = jax.jit(jax.value_and_grad(f, tuple(range(len(args))))).trace(*placed)
        made = traced.lower().compile()(*placed)
    pairs = zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True)
    error = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
    found[name] = [error, "pallas_call" in str(traced.jaxpr)]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_kernels_compute_each_devices_part():
    """Rows over two devices, time over two: states and keys travel from one to the next."""
    root = Path(__file__).parents[4]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=root, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(in_kernels for _, in_kernels in found.values()), found
    assert found["recurrence"][0] < 5e-6
    assert found["attention"][0] < 5e-6
    assert found["layer"][0] < 1e-4
