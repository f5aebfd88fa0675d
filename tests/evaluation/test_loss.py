"""The held-out mean, its standard error by document and the loss by position, worked out by hand."""

import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.config import MeshConfig
from mmfree_jax.evaluation import loss as evaluation
from mmfree_jax.evaluation.loss import Text, by_reach, document_sums, evaluate, ratio_standard_error
from mmfree_jax.sharding import make_mesh

# A token that is no target, then documents of 64 1s, of 64 3s and of 21 9s: windows of 4 do not end where they do.
TOKENS = np.array([9] + [1] * 64 + [3] * 64 + [9] * 21)
STARTS = np.array([0, 65, 129])


class Split:
    name = "valid"

    def __getitem__(self, where):
        return TOKENS[where]

    def __len__(self):
        return len(TOKENS)

    def document_starts(self):
        return STARTS


SET = SimpleNamespace(
    split=lambda _: Split(), text_bytes=lambda _: 300, sets=[SimpleNamespace(fingerprint="made-up")]
)  # two bytes a token


def nats_are_tokens(params, tokens_BT):
    """A model that loses as many nats as its target's number."""
    return jnp.asarray(tokens_BT[:, 1:], jnp.float32)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_the_mean_is_over_targets_and_the_standard_error_over_documents(batch, monkeypatch):
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", batch)  # one batch, and many in flight
    found = evaluate(nats_are_tokens, make_mesh(MeshConfig()), None, SET, 4)
    assert (found["tokens"], found["documents"]) == (149, 3)
    mean = (64 + 192 + 189) / 149
    assert found["loss"] == mean
    assert found["bpb"] == pytest.approx(mean / math.log(2) / 2)
    residuals = 64 - 64 * mean, 192 - 64 * mean, 189 - 21 * mean
    assert found["loss_se"] == pytest.approx(math.sqrt(3 / 2 * sum(r**2 for r in residuals)) / 149)


def test_documents_that_lie_in_no_target_count_for_nothing():
    assert ratio_standard_error(np.array([4.0, 0.0]), np.array([2.0, 0.0])) is None
    pair = ratio_standard_error(np.array([4.0, 6.0]), np.array([2.0, 2.0]))
    assert pair == ratio_standard_error(np.array([4.0, 0.0, 6.0]), np.array([2.0, 0.0, 2.0]))


def nats_are_places(params, tokens_BT):
    """A model that loses as many nats as its target's place in the window, from 1."""
    return jnp.broadcast_to(jnp.arange(1, tokens_BT.shape[1]), (len(tokens_BT), tokens_BT.shape[1] - 1)) * 1.0


def test_the_loss_by_position_is_by_how_many_tokens_a_target_is_predicted_from():
    tokens = np.array([0, 1, 1, 0, 1, 1, 1, 0, 1])  # 0 ends documents; windows of 6 and of what is left, 2
    text = Text(tokens, np.array([0, 1, 4, 8]), 9)
    joined = by_reach(document_sums(nats_are_places, make_mesh(MeshConfig()), None, text, 6))
    assert [(row["seen_from"], row["seen_to"], row["loss"], row["tokens"]) for row in joined] == [
        (1, 1, 1.0, 2),
        (2, 3, (2 + 3 + 2) / 3, 3),
        (4, 7, (4 + 5 + 6) / 3, 3),
    ]
    # Apart, the fourth input, a 0, begins a document: places 4 to 6 see 1 to 3 tokens. So does the second one's last.
    apart = by_reach(document_sums(nats_are_places, make_mesh(MeshConfig()), None, text, 6, separator=0))
    assert [(row["seen_from"], row["loss"], row["tokens"]) for row in apart] == [
        (1, (1 + 4 + 1 + 2) / 4, 4),
        (2, (2 + 3 + 5 + 6) / 4, 4),
    ]
