"""Chunks change nothing, the z-loss is what it says, and the full logits are never made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear
from mmfree_jax.ops.cross_entropy import Head, head_logits, largest_logits
from mmfree_jax.ops.cross_entropy import head_loss as op
from mmfree_jax.ops.fast.choice import definitions
from mmfree_jax.ops.fast.cross_entropy import head_loss, head_nats

X = jax.random.normal(jax.random.key(0), (2, 11, 16))
W = 0.5 * jax.random.normal(jax.random.key(1), (16, 37))
GAIN = 1 + 0.2 * jax.random.normal(jax.random.key(2), (16,))
TARGETS = jax.random.randint(jax.random.key(3), (2, 11), 0, 37)
DENSE = Recipe(ternary=False)
MASK = (jax.random.uniform(jax.random.key(4), (2, 11)) < 0.7).astype(jnp.float32)


def plain(recipe, x, w, gain, z_loss=0.0):
    logits = bit_linear(recipe, x, Weights(w[None], gain))[0] if recipe.ternary else x @ w
    total = jax.nn.logsumexp(logits, axis=-1)
    nats = total - jnp.take_along_axis(logits, TARGETS[..., None], 2)[..., 0]
    return jnp.sum(MASK * (nats + z_loss * total**2))


@pytest.mark.parametrize("chunks", [1, 3, 11])
@pytest.mark.parametrize(("recipe", "gain"), [(DENSE, None), (Recipe(), GAIN), (Recipe(scale_axes=(-2,)), None)])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_and_gradients(recipe, gain, chunks, z_loss):
    fused = lambda x, w, gain: 2 * head_loss(Head(recipe, w, gain), x, TARGETS, MASK, z_loss, chunks).total
    direct = lambda x, w, gain: 2 * plain(recipe, x, w, gain, z_loss)
    both = [jax.jit(jax.value_and_grad(f, (0, 1, 2)))(X, W, gain) for f in (fused, direct)]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(fused(X, W, gain), both[0][0], rtol=1e-6)


def test_nats_of_each_token_sum_to_the_loss():
    nats = head_nats(Head(DENSE, W), X, TARGETS, chunks=4)
    assert nats.shape == TARGETS.shape
    np.testing.assert_allclose(jnp.sum(nats * MASK), plain(DENSE, X, W, None), rtol=1e-5)


def test_the_full_logits_are_never_made():
    x, w = jax.ShapeDtypeStruct((4, 64, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4096), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    step = jax.value_and_grad(lambda x, w, t: head_loss(Head(DENSE, w), x, t, chunks=16).total, (0, 1))
    temporary = jax.jit(step).lower(x, w, targets).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * 64 * 4096 * 4 / 2


@pytest.mark.parametrize(("recipe", "gain"), [(DENSE, None), (Recipe(columns=30), GAIN)])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_all_of_the_head_is_its_definition(recipe, gain, mask):
    """With seven columns of padding: the loss, its parts and gradients, the logits, and the largest of them."""
    targets = TARGETS % 30

    def everything():
        def found(x, w, gain):
            head = Head(recipe, w, gain, vocab=30)
            losses = op(head, x, targets, mask, 0.1)
            return losses.total, (losses, head_logits(head, x), largest_logits(head, x))

        return jax.tree.leaves(jax.jit(jax.value_and_grad(found, (0, 1, 2), has_aux=True))(X, W, gain))

    with definitions():
        expected = everything()
    for a, b in zip(everything(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
