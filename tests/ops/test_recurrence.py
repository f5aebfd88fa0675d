"""Every form of the recurrences equals a sequential loop, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.ops import recurrence as module
from mmfree_jax.ops.recurrence import recurrence
from mmfree_jax.ops.wkv import wkv

B, T, D = 2, 13, 5
F = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (B, T, D)))
X = jax.random.normal(jax.random.key(1), (B, T, D))
H = jax.random.normal(jax.random.key(2), (B, D))
RESETS = jnp.zeros((B, T), bool).at[0, 4].set(True).at[1, 0].set(True).at[1, 9].set(True)


def loop(f, x, h, resets):
    out = []
    for t in range(x.shape[1]):
        h = jnp.where(resets[:, t, None], 0, f[:, t] * h) + x[:, t]
        out.append(h)
    return jnp.stack(out, 1)


@pytest.mark.parametrize("impl", ["scan", "associative"])
@pytest.mark.parametrize("resets", [jnp.zeros_like(RESETS), RESETS], ids=["one document", "documents"])
def test_forms_equal_the_loop_with_gradients(impl, resets):
    weigh = jax.random.normal(jax.random.key(3), (B, T, D))
    form = lambda f, x, h: recurrence(f, x, h, resets_BT=resets, impl=impl)
    run = lambda g: jax.jit(jax.value_and_grad(lambda f, x, h: jnp.sum(g(f, x, h) * weigh), (0, 1, 2)))(F, X, H)
    np.testing.assert_allclose(form(F, X, H), loop(F, X, H, resets), atol=1e-5)
    for a, b in zip(
        jax.tree.leaves(run(form)), jax.tree.leaves(run(lambda f, x, h: loop(f, x, h, resets))), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("impl", ["scan", "associative"])
def test_pieces_continue_each_other(impl):
    whole = recurrence(F, X, H, impl=impl)
    h, pieces = H, []
    for a, b in ((0, 6), (6, 7), (7, T)):
        pieces.append(recurrence(F[:, a:b], X[:, a:b], h, impl=impl))
        h = pieces[-1][:, -1]
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=1e-5)


@pytest.mark.parametrize(("backend", "form"), [("cpu", "scan"), ("gpu", "associative"), ("tpu", "associative")])
def test_a_cpu_walks_and_accelerators_take_the_parallel_prefix(backend, form, monkeypatch):
    taken = []
    for name in ("_walk", "_prefix"):
        monkeypatch.setattr(module, name, lambda f, x, h, reverse, name=name: taken.append(name) or x)
    monkeypatch.setattr(module, "backend", lambda: backend)
    ones = jnp.ones((1, 5, 3))
    recurrence(ones, ones)
    assert taken == [{"scan": "_walk", "associative": "_prefix"}[form]]


def test_the_carry_of_half_precision_inputs_is_float32():
    f, x = jnp.full((1, 64, 1), 0.99609375, jnp.bfloat16), jnp.ones((1, 64, 1), jnp.bfloat16)
    for impl in ("scan", "associative"):
        h = recurrence(f, x, impl=impl)
        assert h.dtype == jnp.float32
        np.testing.assert_allclose(h[0, -1, 0], (1 - 0.99609375**64) / (1 - 0.99609375), rtol=1e-5)


def plain_wkv(w, u, k, v, starts):
    out = np.zeros(k.shape)
    for b in range(k.shape[0]):
        first = 0
        for t in range(k.shape[1]):
            first = t if starts[b, t] else first
            age = np.arange(t - first, 0, -1)[:, None] - 1
            old = np.exp(k[b, first:t] - age * w)
            now = np.exp(u + k[b, t])
            out[b, t] = ((old * v[b, first:t]).sum(0) + now * v[b, t]) / (old.sum(0) + now)
    return out


def test_wkv_is_the_written_out_average():
    w, u = jnp.exp(jax.random.normal(jax.random.key(4), (D,))), jax.random.normal(jax.random.key(5), (D,))
    k = 3 * F
    starts = RESETS.at[:, 0].set(True)
    expected = plain_wkv(*(np.asarray(a, np.float64) for a in (w, u, k, X)), np.asarray(starts))
    np.testing.assert_allclose(wkv(w, u, k, X, resets_BT=RESETS)[0], expected, atol=1e-5)


def test_wkv_of_huge_keys_is_finite_and_unchanged_by_a_common_shift():
    w, u = jnp.full(D, 0.3), jnp.zeros(D)
    score = lambda k: jnp.sum(jnp.sin(wkv(w, u, k, X)[0]))
    k = 3 * X[::-1]
    shifted, plain = (jax.value_and_grad(score)(k + shift) for shift in (500.0, 0.0))
    assert np.isfinite(shifted[1]).all()
    np.testing.assert_allclose(shifted[0], plain[0], rtol=1e-3)
    np.testing.assert_allclose(shifted[1], plain[1], atol=1e-3)


def test_wkv_gradients_are_those_of_the_definition():
    def definition(w, u, k, v):
        a = b = jnp.zeros((B, D))
        out = []
        for t in range(T):
            now = jnp.exp(u + k[:, t])
            out.append((a + now * v[:, t]) / (b + now))
            a, b = (jnp.exp(-w) * s + jnp.exp(k[:, t]) * x for s, x in ((a, v[:, t]), (b, 1)))
        return jnp.stack(out, 1)

    w, u = jnp.linspace(0.1, 2, D), jnp.linspace(-1, 1, D)
    gradient = lambda form: jax.jit(jax.grad(lambda *operands: jnp.sum(jnp.sin(form(*operands))), (0, 1, 2, 3)))(
        w, u, 2 * F, X
    )
    stable = lambda *operands: wkv(*operands)[0]
    for a, b in zip(gradient(stable), gradient(definition), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
