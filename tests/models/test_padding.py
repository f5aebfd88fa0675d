"""A vocabulary that is padded computes what one of the tokenizer's own size does, whatever the padding holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.families import CONFIGS, extend, logits, model, replace, tokens

from mmfree_jax.config import FAMILIES, ConfigError
from mmfree_jax.interop.huggingface import load_huggingface, save_huggingface

PADDED = 80


def name_of(path) -> str:
    return ".".join(str(step.key) for step in path if hasattr(step, "key"))


def padding(name: str, array):
    """The part of a parameter or gradient that belongs to no token; None where there is none."""
    if not name.startswith(("embedding", "head.kernel")):
        return None
    return array[61:] if name == "embedding" else array[:, 61:]


def padded(built):
    """The same model with a longer vocabulary; unmasked, its padding would win every time."""
    config = replace(built.config, vocab=PADDED, tokenizer_vocab=built.config.vocab)
    graph, params = nnx.split(model(config))

    def filled(path, new, old):
        if padding(name_of(path), new) is None:
            return old
        axis = 0 if name_of(path) == "embedding" else 1
        more = jnp.full_like(jax.lax.slice_in_dim(new, 61, PADDED, axis=axis), 50.0)
        return jnp.concatenate([old, more * jnp.sign(built.norm.gain[...][0])], axis)

    return nnx.merge(graph, jax.tree.map_with_path(filled, params, nnx.split(built)[1]))


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(graph, params, ids):
    mean = lambda params: nnx.merge(graph, params).loss(ids[:, :-1], ids[:, 1:], z_loss=1e-3)[0]
    return jax.value_and_grad(mean)(params)


@pytest.mark.parametrize("name", [*FAMILIES, "tied", "tied-dense", "scale-per-channel"])
def test_padding_changes_neither_loss_nor_gradients_and_receives_none(name):
    built = model(CONFIGS[name])
    more, ids = padded(built), tokens(CONFIGS[name])
    (loss, grads), (expected, own) = (loss_and_gradients(*nnx.split(m), ids) for m in (more, built))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for (path, grad), (_, one) in zip(*map(jax.tree.leaves_with_path, (grads, own)), strict=True):
        rest = padding(name_of(path), grad)
        if rest is not None:
            assert not np.any(rest), name_of(path)
            grad = grad[:61] if name_of(path) == "embedding" else grad[:, :61]
        np.testing.assert_allclose(grad, one, rtol=1e-4, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("name", ["transformer++", "matmul-free", "tied", "tied-dense"])
def test_padding_is_never_predicted(name):
    built = model(CONFIGS[name])
    more, ids = padded(built), tokens(CONFIGS[name], time=8)
    whole = logits(more, ids)
    for found in (whole, extend(more, ids, more.start(2, 8))[0]):
        assert np.isfinite(found).all()
        assert np.argmax(found, -1).max() < 61
        assert not np.any(jax.nn.softmax(found)[..., 61:])
        np.testing.assert_allclose(found[..., :61], logits(built, ids), rtol=1e-4, atol=1e-4)
    nats = jax.jit(lambda graph, params: nnx.merge(graph, params).nats(ids, ids), static_argnums=0)(*nnx.split(more))
    direct = -np.take_along_axis(np.asarray(jax.nn.log_softmax(whole)), np.asarray(ids)[..., None], 2)[..., 0]
    np.testing.assert_allclose(nats, direct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["matmul-free", "tied-dense"])
def test_padding_shows_neither_in_the_largest_logit_nor_in_the_z_loss(name):
    built, ids = model(CONFIGS[name]), tokens(CONFIGS[name], time=8)

    @functools.partial(jax.jit, static_argnums=0)
    def seen(graph, params):
        one = nnx.merge(graph, params)
        return one.activations(ids)["largest_logit"], one.loss(ids, ids, z_loss=1e-3).z_loss

    np.testing.assert_allclose(seen(*nnx.split(padded(built))), seen(*nnx.split(built)), rtol=1e-5)


@pytest.mark.parametrize("name", ["transformer++", "matmul-free", "tied-dense"])
def test_padding_is_not_exported(name, tmp_path):
    pytest.importorskip("safetensors", reason="needs the extra huggingface")
    built = model(CONFIGS[name])
    save_huggingface(padded(built), tmp_path / "hf")
    again = load_huggingface(tmp_path / "hf")
    assert again.config == built.config
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (again, built)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match=r"tokenizer_vocab=62: must be from 0 .no padding. to model\.vocab=61"):
        replace(CONFIGS["hgrn"], tokenizer_vocab=62)
