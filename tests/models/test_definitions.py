"""The models by the definitions of their ops against the models as they run. In float64, where nothing is amplified."""

import jax
import numpy as np
import pytest
from flax import nnx
from models.families import CONFIGS, in_float64, tokens

from mmfree_jax.ops.fast.choice import definitions

NAMES = [*CONFIGS]


@pytest.mark.parametrize("name", NAMES)
def test_loss_logits_and_gradients_are_those_of_the_definitions(name):
    """With documents, a mask and a z-loss; the model reads through caches and states in test_decoding.py."""
    with jax.enable_x64(True):
        built = in_float64(CONFIGS[name])
        graph, params = nnx.split(built)
        ids = tokens(built.config, time=14)
        segments, mask = np.sort(np.asarray(ids[:, :-1]) % 3, axis=1), np.arange(13)[None] < np.array([[13], [9]])

        def everything():
            def loss(params):
                model = nnx.merge(graph, params)
                losses = model.loss(ids[:, :-1], ids[:, 1:], mask, segments_BT=segments, z_loss=1e-2)
                return losses.total, (losses, model(ids, segments_BT=None), model.nats(ids, ids))

            return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))

        found = everything()
        with definitions():
            expected = everything()
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9 * np.abs(b).max())
