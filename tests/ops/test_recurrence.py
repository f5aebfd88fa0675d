"""Every form of the recurrences equals a sequential loop, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.devices import traced_for
from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast import recurrence as module
from mmfree_jax.ops.recurrence import gated_recurrence, recurrence, token_shift, wkv

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


def run_form(name, *operands, **kwargs):
    if name == "definition":
        return recurrence.definition(*operands, **kwargs)
    return module.recurrence(*operands, **kwargs, form=name)


@pytest.mark.parametrize("name", ["walk", "prefix", "definition"])
@pytest.mark.parametrize("resets", [jnp.zeros_like(RESETS), RESETS], ids=["one document", "documents"])
def test_forms_equal_the_loop_with_gradients(name, resets):
    weigh = jax.random.normal(jax.random.key(3), (B, T, D))
    form = lambda f, x, h: run_form(name, f, x, h, resets_BT=resets)
    run = lambda g: jax.jit(jax.value_and_grad(lambda f, x, h: jnp.sum(g(f, x, h) * weigh), (0, 1, 2)))(F, X, H)
    np.testing.assert_allclose(form(F, X, H), loop(F, X, H, resets), atol=1e-5)
    for a, b in zip(
        jax.tree.leaves(run(form)), jax.tree.leaves(run(lambda f, x, h: loop(f, x, h, resets))), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["walk", "prefix", "definition"])
def test_pieces_continue_each_other(name):
    whole = run_form(name, F, X, H)
    h, pieces = H, []
    for a, b in ((0, 6), (6, 7), (7, T)):
        pieces.append(run_form(name, F[:, a:b], X[:, a:b], h))
        h = pieces[-1][:, -1]
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=1e-5)


@pytest.mark.parametrize(("backend", "form"), [("cpu", "_walk"), ("gpu", "_prefix"), ("tpu", "_prefix")])
def test_a_cpu_walks_and_accelerators_take_the_parallel_prefix(backend, form, monkeypatch):
    taken = []
    for name in ("_walk", "_prefix"):
        monkeypatch.setattr(module, name, lambda f, x, h, reverse, name=name: taken.append(name) or x)
    monkeypatch.setattr(choice, "backend", lambda: backend)
    ones = jnp.ones((1, 5, 3))
    recurrence(ones, ones)
    assert taken == [form]


def test_the_carry_of_half_precision_inputs_is_float32():
    f, x = jnp.full((1, 64, 1), 0.99609375, jnp.bfloat16), jnp.ones((1, 64, 1), jnp.bfloat16)
    for name in ("walk", "prefix", "definition"):
        h = run_form(name, f, x)
        assert h.dtype == jnp.float32
        np.testing.assert_allclose(h[0, -1, 0], (1 - 0.99609375**64) / (1 - 0.99609375), rtol=1e-5)


@pytest.mark.parametrize("floor", [None, jnp.linspace(0, 0.9, D)], ids=["no floor", "floor"])
def test_gated_recurrence_and_its_gradients_are_those_of_the_definition(floor):
    def run(form):
        score = lambda c, f, h: sum(jnp.sum(jnp.sin(a)) for a in form(c, f, floor, h, resets_BT=RESETS))
        return jax.jit(jax.value_and_grad(score, (0, 1, 2)))(X, 2 * F, H)

    for a, b in zip(
        *(jax.tree.leaves(run(form)) for form in (gated_recurrence, gated_recurrence.definition)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


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
    for form in (wkv, wkv.definition):
        np.testing.assert_allclose(form(w, u, k, X, resets_BT=RESETS)[0], expected, atol=1e-5)


def test_a_token_s_predecessor_is_the_token_before_it():
    for form in (token_shift, token_shift.definition):
        np.testing.assert_array_equal(form(X, H), np.concatenate([H[:, None], X[:, :-1]], axis=1))


def test_wkv_of_huge_keys_is_finite_and_unchanged_by_a_common_shift():
    w, u = jnp.full(D, 0.3), jnp.zeros(D)
    k = 3 * X[::-1]
    for form in (wkv, wkv.definition):
        score = lambda k, form=form: jnp.sum(jnp.sin(form(w, u, k, X)[0]))
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
    expected = gradient(definition)
    for form in (wkv, wkv.definition):
        for a, b in zip(gradient(lambda *operands, form=form: form(*operands)[0]), expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_on_tpus_the_backward_pass_of_wkv_keeps_keys_and_values_only():
    k_BTD, one_D = jax.ShapeDtypeStruct((2, 64, 128), jnp.bfloat16), jnp.ones(128)

    def kept(platform):
        with traced_for(platform):
            values = lambda k, v: wkv(one_D, one_D, k, v)[0]
            _, pull = jax.eval_shape(lambda k, v: jax.vjp(values, k, v), k_BTD, k_BTD)
        return [a.dtype for a in jax.tree.leaves(pull) if a.size >= k_BTD.size]

    assert kept("tpu") == [jnp.bfloat16] * 2
    assert len(kept("cuda")) > 2
