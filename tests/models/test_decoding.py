"""Reading in pieces, packing documents and padding change no logit. In float64, where equal means equal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.families import CONFIGS, extend, in_float64, logits, model, tokens

from mmfree_jax.config import FAMILIES

NAMES = [*FAMILIES, "grouped-queries"]
EVERY = pytest.mark.parametrize("name", NAMES)


def read(built, ids, pieces, segments=None, capacity=32):
    """Logits of ids read piece by piece."""
    state, out = built.start(ids.shape[0], capacity), []
    for a, b in pieces:
        part, state = extend(built, ids[:, a:b], state, None if segments is None else segments[:, a:b])
        out.append(part)
    assert state.position_B.tolist() == [pieces[-1][1]] * ids.shape[0]
    return jnp.concatenate(out, 1)


@EVERY
def test_prefill_in_pieces_then_single_tokens_equal_the_whole(name):
    with jax.enable_x64(True):
        built = in_float64(CONFIGS[name])
        ids = tokens(built.config, time=12)
        pieces = [(0, 5), (5, 10), (10, 11), (11, 12)]
        np.testing.assert_allclose(read(built, ids, pieces), logits(built, ids), atol=1e-10)


@pytest.mark.parametrize("name", ["transformer++", "hgrn"])
def test_decoding_in_float32(name):
    """Without a quantiser nothing amplifies the last bits."""
    built = model(CONFIGS[name])
    ids = tokens(built.config, time=8)
    whole = logits(built, ids)
    np.testing.assert_allclose(read(built, ids, [(0, 6), (6, 7), (7, 8)]), whole, atol=2e-5)


@EVERY
def test_packed_documents_equal_separate_sequences(name):
    """One row changes document inside a piece, the other where a piece ends."""
    with jax.enable_x64(True):
        built = in_float64(CONFIGS[name])
        ids = tokens(built.config, time=12)
        segments = jnp.array([[4] * 5 + [9] * 7, [2] * 6 + [1] * 6], jnp.int32)
        packed, unaware = logits(built, ids, segments_BT=segments), logits(built, ids)
        np.testing.assert_allclose(packed[0, :5], unaware[0, :5], atol=1e-10)
        for row, first in ((0, 5), (1, 6)):
            alone = logits(built, jnp.roll(ids, -first, axis=1))[row, : 12 - first]  # what follows it is not seen
            np.testing.assert_allclose(packed[row, first:], alone, atol=1e-10)
            assert float(jnp.abs(packed - unaware)[row, first:].max()) > 1e-3, "the first document should matter"
        np.testing.assert_allclose(read(built, ids, [(0, 6), (6, 12)], segments), packed, atol=1e-10)


@EVERY
def test_no_gradient_crosses_a_document(name):
    built = model(CONFIGS[name])
    graph, params = nnx.split(built)
    ids, segments = jnp.arange(10)[None], jnp.array([[1] * 4 + [2] * 6])

    def second(params):
        return nnx.merge(graph, params).hidden(ids, segments_BT=segments)[:, 4:].sum()

    rate = jax.jit(jax.grad(second))(params)["embedding"].get_value()
    assert float(jnp.abs(rate[:4]).max()) == 0
    assert float(jnp.abs(rate[4:10]).max(-1).min()) > 0


@EVERY
@pytest.mark.parametrize("in_cache", [True, False])
def test_left_padding_is_invisible(name, in_cache):
    """Two prompts of different lengths in one batch, then one more token each, as if each were alone; whether padding
    takes room in the cache, or has positions below zero."""
    with jax.enable_x64(True):
        built = in_float64(CONFIGS[name])
        ids = tokens(built.config, time=9)
        segments = jnp.array([[0] * 4 + [1] * 4, [1] * 8], jnp.int32)
        start = built.start(2, 16 if in_cache else 9)
        start = start if in_cache else dataclasses.replace(start, position_B=jnp.array([-4, 0], jnp.int32))
        prompt, state = extend(built, ids[:, :8], start, segments)
        after, _ = extend(built, ids[:, 8:], state)
        alone = logits(built, ids.at[0].set(jnp.roll(ids[0], -4)))
        np.testing.assert_allclose(prompt[0, 4:], alone[0, :4], atol=1e-10)
        np.testing.assert_allclose(after[0, 0], alone[0, 4], atol=1e-10)
        np.testing.assert_allclose(after[1, 0], alone[1, 8], atol=1e-10)


def test_last_only_is_the_last_of_all():
    built = model(CONFIGS["matmul-free"])
    ids = tokens(built.config, time=6)
    last, _ = extend(built, ids, built.start(2), last_only=True)
    np.testing.assert_allclose(last[:, 0], extend(built, ids, built.start(2))[0][:, -1], atol=1e-5)


def test_a_full_cache_gives_no_number():
    built = model(CONFIGS["transformer++"])
    ids = tokens(built.config, time=6)
    full, state = extend(built, ids[:, :4], built.start(2, 4))
    assert np.isfinite(full).all()
    assert np.isnan(extend(built, ids[:, 4:5], state)[0]).all()


def test_the_recurrent_state_does_not_grow():
    for name in ("matmul-free", "matmul-free-rwkv4"):
        sizes = {c: sum(a.size for a in jax.tree.leaves(model(CONFIGS[name]).start(1, c))) for c in (1, 4096)}
        assert sizes[1] == sizes[4096]
