"""Documents kept apart by channels, in NVIDIA's fused kernel or what stands in for it on a CPU, against float64."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.devices import DEVICES
from mmfree_jax.lowering.memory import whole_scores
from mmfree_jax.ops.attention import causal_attention as definition
from mmfree_jax.ops.fast.checks import Use, check
from mmfree_jax.ops.fast.hopper import attention
from mmfree_jax.presets import run_preset


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """JAX's attention by XLA where cuDNN is asked for, with what cuDNN refuses."""
    whole = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, is_causal, scale, implementation):
        assert implementation == "cudnn"
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= attention.WIDEST
        assert q.shape[-1] % 8 == 0
        return whole(q, k, v, is_causal=is_causal, scale=scale, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)


USES = [
    Use("attention", (2, 77, 4, 2, 32), ("bfloat16", True, 1)),
    Use("attention", (1, 130, 3, 3, 80), ("bfloat16", True, 1)),
    Use("attention", (1, 300, 2, 1, 247), ("bfloat16", True, 1)),  # 256 channels with the nine of 300 steps
    Use("attention", (3, 2, 1, 1, 8), ("bfloat16", True, 1)),
    Use("attention", (1, 129, 2, 2, 5), ("bfloat16", True, 1)),
]


@pytest.mark.parametrize("use", USES, ids=str)
def test_the_check_passes(use):
    outcome = check(use)
    assert outcome.passed, outcome.worst


def joined(monkeypatch):
    monkeypatch.setattr(attention, "APART", 0.0)


def too_few_channels(monkeypatch):
    monkeypatch.setattr(attention, "channels", lambda time: 1)


def scaled_by_all_channels(monkeypatch):
    whole = attention.cudnn
    monkeypatch.setattr(attention, "cudnn", lambda q, k, v, scale: whole(q, k, v, q.shape[-1] ** -0.5))


@pytest.mark.parametrize("fault", [joined, too_few_channels, scaled_by_all_channels])
def test_faults_are_seen(monkeypatch, fault):
    fault(monkeypatch)
    assert not check(Use("attention", (1, 500, 1, 1, 16), ("bfloat16", True, 1))).passed


IDS = {
    "one document": lambda T: np.zeros((1, T)),
    "one token a document": lambda T: np.arange(T)[None],
    "odd bounds": lambda T: np.searchsorted([1, 4, 7, 63, 64, 65, 100], np.arange(T), side="right")[None],
    "two rows that differ": lambda T: np.stack([np.zeros(T), np.arange(T) // 3]),
    "padding first": lambda T: (np.arange(T) >= 5)[None],
    "ids that fall and large ones": lambda T: np.repeat([2**30, 7, 0], [17, 23, T - 40])[None],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_any_documents_are_kept_apart_and_nothing_else_changes(ids, monkeypatch):
    """In float32, so that what is left of an earlier document would be seen, with gradients."""
    T, H, J, K = 113, 4, 2, 24
    segments = jnp.asarray(ids(T), jnp.int32)
    rng = np.random.default_rng(zlib.crc32(str(np.asarray(segments)).encode()))
    draw = lambda heads: jnp.asarray(rng.standard_normal((len(segments), T, heads, K)), jnp.float32)
    arrays, dy = (draw(H), draw(J), draw(J)), draw(H)

    def results(attend):
        y, pull = jax.vjp(lambda q, k, v: attend(q, k, v), *arrays)
        return y, *pull(dy)

    found = results(lambda q, k, v: attention.causal_attention(q, k, v, segments))
    expected = results(lambda q, k, v: definition.definition(q, k, v, segments_BT=segments))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_key_of_another_document_changes_no_bit():
    """However large its score would be: not a number close to zero is added, but zero."""
    T, K = 40, 16
    segments = jnp.asarray(np.arange(T) >= 20, jnp.int32)[None]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, T, 1, K)), jnp.float32) for _ in range(3))
    attend = jax.jit(lambda k, v: attention.causal_attention(q, k, v, segments)[:, 20:])
    other = attend(k.at[:, :20].mul(50), v.at[:, :20].add(1e4))
    assert np.array_equal(attend(k, v), other)


def test_channels_are_as_many_as_the_bits_of_the_last_number():
    assert [attention.channels(T) for T in (2, 3, 2048, 2049, 8192)] == [1, 2, 11, 12, 13]
    assert attention.supports(2048, 245)
    assert not attention.supports(2048, 246)


@pytest.mark.parametrize("width", [64, 128, 244, 246, 248, 256])
@pytest.mark.parametrize("time", [256, 2048, 2049])
def test_lower_knows_which_heads_have_room_for_documents(time, width):
    run = run_preset("transformer++-370m")
    model = dataclasses.replace(run.model, width=4 * width, heads=4)
    data = dataclasses.replace(run.data, sequence=time, separate_documents=True)
    counted = whole_scores(dataclasses.replace(run, model=model, data=data), DEVICES["h200"])
    assert counted != attention.supports(time, width)
