"""The fixed-point model against the float32 model that it was made from."""

import jax.numpy as jnp
import numpy as np
import pytest

import mmfree_jax
from mmfree_jax.config import ModelConfig
from mmfree_jax.hardware.assembler import assemble
from mmfree_jax.hardware.instructions import CoreShape
from mmfree_jax.hardware.machine import Machine
from mmfree_jax.weights import load_model
from tests.conftest import tiny_run
from tests.hardware.small import CORES, compiled

TOKENS = np.random.default_rng(3).integers(0, 101, (4, 24)).astype(np.int32)
MUP = {"parametrisation": "mup", "base_width": 16, "base_depth": 1}


def logits(program, image, tokens_BT: np.ndarray) -> np.ndarray:
    machine = Machine(program, image, len(tokens_BT))
    return np.stack([machine.token(t_B) for t_B in tokens_BT.T], axis=1) * 2.0**-16


def nats(logits_BTV: np.ndarray, targets_BT: np.ndarray) -> float:
    largest = logits_BTV.max(-1, keepdims=True)
    total = np.log(np.exp(logits_BTV - largest).sum(-1)) + largest[..., 0]
    return float(np.mean(total - np.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]))


@pytest.mark.parametrize(
    "changes", [{}, {"output_gate": "paper"}, {"lower_bounds": False}, MUP, {"norm_eps": 1e-3}], ids=str
)
def test_logits_are_those_of_the_model_but_for_rounding(changes, tmp_path):
    model, program, image = compiled(tmp_path / "packed", **changes)
    expected = np.asarray(model(jnp.asarray(TOKENS)))
    found = logits(program, image, TOKENS)
    # A code that is rounded the other way moves all that depends on it by a 127th of its maximum.
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.02 * expected.std()
    assert abs(nats(found[:, :-1], TOKENS[:, 1:]) - nats(expected[:, :-1], TOKENS[:, 1:])) < 0.002


def test_rows_do_not_depend_on_each_other(tmp_path):
    _, program, image = compiled(tmp_path / "packed")
    together = logits(program, image, TOKENS)
    for row in range(2):
        assert np.array_equal(logits(program, image, TOKENS[row : row + 1])[0], together[row])


def test_the_state_is_what_a_token_leaves_behind(tmp_path):
    _, program, image = compiled(tmp_path / "packed")
    after, fresh = logits(program, image, TOKENS[:1, :2])[0, 1], logits(program, image, TOKENS[:1, 1:2])[0, 0]
    assert not np.array_equal(after, fresh)


def test_an_embedding_of_zeros_gives_logits_of_zero(tmp_path):
    _, program, image = compiled(tmp_path / "packed", tie_embeddings=True)
    states, embedding = 2 * 13 * 12, 101 * 13 * 6
    dark = image[:states] + bytes(embedding) + image[states + embedding :]
    assert not logits(program, dark, TOKENS).any()


def test_generation_takes_the_first_of_the_largest_logits(tmp_path):
    _, program, image = compiled(tmp_path / "packed")
    chosen = Machine(program, image).generate([5, 17], 6)
    rows = logits(program, image, np.array([[5, 17, *chosen[:-1]]]))[0]
    assert chosen == rows[1:].argmax(axis=1).tolist()


def test_the_loss_of_a_trained_model_is_within_half_a_percent(token_set, tmp_path):
    run = tiny_run("matmul-free", token_set.path, steps=60, checkpoint_every=60)
    mmfree_jax.train(run, tmp_path / "run")
    mmfree_jax.export(tmp_path / "run", tmp_path / "packed", format="packed")
    windows = token_set.split("valid")[: 32 * 33].reshape(32, 33).astype(np.int32)
    model = load_model(tmp_path / "run")
    expected = float(jnp.mean(model.nats(jnp.asarray(windows[:, :-1]), jnp.asarray(windows[:, 1:]))))
    found = nats(logits(*assemble(tmp_path / "packed", CoreShape(8, 1, 16, 32)), windows[:, :-1]), windows[:, 1:])
    assert expected < np.log(257) - 1.5  # it has learned something that rounding could spoil
    assert abs(found / expected - 1) < 0.005


def test_all_cores_compute_the_same(tmp_path):
    expected = logits(*compiled(tmp_path / "0")[1:], TOKENS)
    for n, shape in enumerate([CORES["two lanes"], CoreShape(8, 1, 37, 50), CoreShape(64, 16, 64, 64)], start=1):
        assert np.array_equal(logits(*compiled(tmp_path / str(n), shape)[1:], TOKENS), expected)


def test_the_config_of_a_packed_model_is_that_of_the_program(tmp_path):
    model, program, _ = compiled(tmp_path / "packed")
    assert isinstance(model.config, ModelConfig)
    assert (program.vocab, program.width, program.depth) == (101, 37, 2)
