"""All forms of attention compute the same thing, and documents do not see each other."""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments
from mmfree_jax.lowering.memory import QUERIES_AT_ONCE
from mmfree_jax.ops.attention import attend, causal_attention
from mmfree_jax.ops.fast import attention, choice
from mmfree_jax.ops.fast.verification import kernels_assumed

SEGMENTS = jnp.repeat(jnp.array([[0, 1, 2], [5, 5, 3]]), jnp.array([30, 50, 70]), axis=1)


def operands(heads=4, kv_heads=2, time=150):
    shapes = ((2, time, heads, 8), (2, time, kv_heads, 8), (2, time, kv_heads, 8))
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_forms_equal_the_definition_with_their_gradients(kv_heads, segments, monkeypatch):
    def run(form):
        score = lambda *a: jnp.sum(jnp.sin(form(*a, segments_BT=segments)))
        return jax.tree.leaves(jax.jit(jax.value_and_grad(score, argnums=(0, 1, 2)))(*operands(kv_heads=kv_heads)))

    expected = run(causal_attention.definition)
    monkeypatch.setattr(choice, "QUERIES_AT_ONCE", 32)  # five blocks, the last filled up
    for name in ("rows", "full", "blocks"):
        for a, b in zip(run(functools.partial(attention.causal_attention, form=name)), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_documents_are_separate_sequences():
    q, k, v = operands()
    whole = causal_attention(q, k, v, segments_BT=SEGMENTS)
    alone = causal_attention(q[:1, 30:80], k[:1, 30:80], v[:1, 30:80])
    np.testing.assert_allclose(whole[:1, 30:80], alone, atol=1e-6)


def test_attention_is_the_written_out_formula():
    q, k, v = operands(heads=1, kv_heads=1, time=9)
    scores = np.array(q[0, :, 0] @ k[0, :, 0].T) / 8**0.5
    scores[np.triu_indices(9, 1)] = -np.inf
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    for form in (causal_attention, causal_attention.definition):
        np.testing.assert_allclose(form(q, k, v)[0, :, 0], weights @ v[0, :, 0], atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v, jnp.tri(9, dtype=bool))[0, :, 0], weights @ v[0, :, 0], atol=1e-6)


@pytest.mark.parametrize("documents", [None, SEGMENTS], ids=["joined", "apart"])
def test_memory_grows_with_time_and_not_with_its_square(documents):
    """Compiled for this CPU; `lower --compile` and experiments/document_attention.py say the same of an H200."""

    def temporaries(time):
        shape = jax.ShapeDtypeStruct((1, time, 2, 8), jnp.float32)
        segments = None if documents is None else jax.ShapeDtypeStruct((1, time), jnp.int32)
        attend = functools.partial(attention.causal_attention, form="blocks")
        loss = lambda q, k, v, segments: jnp.sum(attend(q, k, v, segments_BT=segments))
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 4.5 * temporaries(2048)


@pytest.mark.parametrize("width", [36, 44, 64, 5])
@pytest.mark.parametrize("time", [1, 18, 19])
def test_heads_of_any_width_and_any_length_are_filled_up_for_cudnn(monkeypatch, width, time):
    """A stand-in for NVIDIA's kernel. That takes widths of a multiple of 8 and even lengths, and scales by the width
    that it is given."""

    def fused(q, k, v, *, is_causal, scale, implementation):
        assert is_causal
        assert implementation == "cudnn"
        assert {a.shape[-1] % 8 for a in (q, k, v)} == {0}
        assert {a.shape[1] % 2 for a in (q, k, v)} == {0}
        return right(q, k, v, is_causal=True, scale=scale, implementation="xla")

    right = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    shapes = ((2, time, 4, width), (2, time, 2, width), (2, time, 2, width))
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))

    def run(form):
        score = lambda *a: jnp.sum(jnp.sin(form(*a)))
        return jax.tree.leaves(jax.value_and_grad(score, argnums=(0, 1, 2))(q, k, v))

    cudnn = functools.partial(attention.causal_attention, form="cudnn")
    for a, b in zip(run(cudnn), run(causal_attention.definition), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_the_form_on_a_gpu_follows_type_documents_and_width(monkeypatch):
    monkeypatch.setattr(choice, "backend", lambda: "gpu")
    monkeypatch.setattr(choice, "widest_fused_head", lambda: 256)
    shaped = lambda width, dtype: jax.ShapeDtypeStruct((2, 150, 4, width), dtype)
    form = lambda q, segments: choice.attention_form(q, q, segments)
    assert choice.QUERIES_AT_ONCE == QUERIES_AT_ONCE  # what `lower` counts
    assert form(shaped(36, jnp.bfloat16), None) == "cudnn"
    assert form(shaped(256, jnp.float16), None) == "cudnn"
    assert form(shaped(264, jnp.bfloat16), None) == "full"
    assert form(shaped(64, jnp.float32), None) == "full"
    assert form(shaped(64, jnp.bfloat16), SEGMENTS) == "full"
    long = lambda dtype: jax.ShapeDtypeStruct((2, 8192, 4, 64), dtype)
    assert form(long(jnp.bfloat16), SEGMENTS) == "blocks"  # never the square of time
    assert form(long(jnp.float32), None) == "blocks"
    with kernels_assumed():
        assert form(long(jnp.bfloat16), SEGMENTS) == "channels"
        assert form(shaped(240, jnp.bfloat16), SEGMENTS) == "channels"  # 248 with 8 channels for 150 documents
        assert form(shaped(249, jnp.bfloat16), SEGMENTS) == "full"
        assert form(long(jnp.float32), SEGMENTS) == "blocks"
        with choice.kernels_allowed(False):
            assert form(long(jnp.bfloat16), SEGMENTS) == "blocks"
            assert form(long(jnp.bfloat16), None) == "cudnn"
    monkeypatch.setattr(choice, "backend", lambda: "cpu")
    assert form(shaped(64, jnp.bfloat16), None) == "rows"


DECLARING = [path.stem for path in Path(experiments.__file__).parent.glob("*.py") if "def study(" in path.read_text()]


@pytest.mark.parametrize("name", sorted(DECLARING))
def test_every_head_that_an_experiment_declares_is_fused_on_a_gpu(monkeypatch, name):
    module = importlib.import_module(f"experiments.{name}")
    if hasattr(module, "best_rates"):  # of a table that is yet to be measured
        monkeypatch.setattr(module, "best_rates", lambda: dict.fromkeys(module.CELLS, (1e-3, 1e-3)))
    study = module.study()
    monkeypatch.setattr(choice, "backend", lambda: "gpu")
    monkeypatch.setattr(choice, "widest_fused_head", lambda: 256)
    widths = {run.model.width // run.model.heads for run in study.runs if run.model.mixer == "attention"}
    for width in widths:
        q = jax.ShapeDtypeStruct((8, 128, 1, width), jnp.bfloat16)
        assert choice.attention_form(q, q, None) == "cudnn"
