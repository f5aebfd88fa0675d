"""The held-out mean and its standard error, worked out by hand."""

import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.config import MeshConfig
from mmfree_jax.evaluation import loss as evaluation
from mmfree_jax.evaluation.loss import evaluate
from mmfree_jax.sharding import make_mesh


class Split:
    """Held-out text: a token that is no target, then blocks of 16 sequences x 4 of 1s and of 3s, and 21 9s, so that a
    sequence is not full and most of a batch has nothing in it."""

    tokens = np.array([9] + [1] * 64 + [3] * 64 + [9] * 21)

    def __getitem__(self, where):
        return self.tokens[where]

    def __len__(self):
        return len(self.tokens)


TEXT = SimpleNamespace(split=lambda _: Split(), bytes_per_token=lambda _: 2.0)


def nats_are_tokens(params, tokens_BT, mask_BT):
    """A model that loses as many nats as its target's number."""
    return jnp.sum(jnp.where(mask_BT, tokens_BT[:, 1:], 0), axis=1), jnp.sum(mask_BT, axis=1)


@pytest.mark.parametrize("batch", [16, 32, 80])
def test_the_mean_is_over_targets_and_the_standard_error_over_blocks_of_16_sequences(batch, monkeypatch):
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", batch)  # as on 1, 2 and 5 devices
    found = evaluate(nats_are_tokens, make_mesh(MeshConfig()), None, TEXT, 4)
    assert found["tokens"] == 149
    mean = (64 + 192 + 189) / 149
    assert found["loss"] == mean
    assert found["bpb"] == pytest.approx(mean / math.log(2) / 2)
    residuals = 64 - 64 * mean, 192 - 64 * mean, 189 - 21 * mean  # of three blocks
    assert found["loss_se"] == pytest.approx(math.sqrt(3 / 2 * sum(r**2 for r in residuals)) / 149)
