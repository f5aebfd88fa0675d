"""Generation: greedy tokens are those of the model itself, and a row does not depend on its batch."""

import dataclasses

import jax
import numpy as np
import pytest

from mmfree_jax.config import FAMILIES, ConfigError
from mmfree_jax.inference import generate
from mmfree_jax.inference.generate import generate_tokens, read_prompts
from mmfree_jax.inference.sampling import GREEDY, Sampling, choose, stacked
from tests.inference.small import made, served

PROMPTS = [[1, 2, 3], [7] * 20, [299], list(range(40))]


def tokens(model, prompts, count, sampling=GREEDY, chunk=8) -> np.ndarray:
    return np.concatenate([step.tokens for step in generate_tokens(model, prompts, count, sampling, chunk)], axis=1)


def by_the_model_itself(model, prompt, count):
    """The most likely tokens and their log-probabilities by `LanguageModel`, one token after another."""
    extend = jax.jit(lambda model, tokens, state: model.extend(tokens, state))
    logits, state = extend(model, np.array([prompt]), model.start(1, len(prompt) + count))
    found = []
    for _ in range(count):
        row = np.asarray(jax.nn.log_softmax(logits[0, -1]))
        found.append((int(row.argmax()), float(row.max())))
        logits, state = extend(model, np.array([[found[-1][0]]]), state)
    return [list(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_model_itself(family):
    model = made(family)
    steps = list(generate_tokens(served(family), PROMPTS, 20, GREEDY, chunk=8))
    assert [step.tokens.shape for step in steps] == [(4, 8), (4, 8), (4, 4)]
    for row, prompt in enumerate(PROMPTS):
        expected, logprobs = by_the_model_itself(model, prompt, 20)
        assert np.concatenate([step.tokens[row] for step in steps]).tolist() == expected
        found = np.concatenate([step.logprobs[row] for step in steps])
        np.testing.assert_allclose(found, logprobs, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_pieces_give_the_same(family, monkeypatch):
    expected = tokens(served(family), PROMPTS, 6)
    monkeypatch.setattr(generate, "CHUNK", 16)
    assert tokens(served(family), PROMPTS, 6).tolist() == expected.tolist()


def test_a_row_depends_on_its_seed_only():
    sampling = Sampling(seed=5, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    together = tokens(served("matmul-free"), PROMPTS, 12, sampling)
    for row, prompt in enumerate(PROMPTS):
        alone = tokens(served("matmul-free"), [prompt], 12, [dataclasses.replace(sampling, seed=5 + row)], chunk=5)
        assert alone[0].tolist() == together[row].tolist()
    other = tokens(served("matmul-free"), PROMPTS, 12, dataclasses.replace(sampling, seed=6))
    assert other[0].tolist() != together[0].tolist()


@pytest.mark.parametrize("wrong", [[[]], [[300]], [[-1]], [[1], []]])
def test_prompts_that_cannot_be_read_are_refused(wrong):
    with pytest.raises(ConfigError, match="prompt"):
        read_prompts(served("hgrn"), wrong, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


def allowed(logits, seen, sampling: Sampling) -> set[int]:
    """Tokens that may be chosen, worked out one after another as the settings are described."""
    logits = np.where(seen & (logits > 0), logits / sampling.repetition_penalty, logits)
    logits = np.where(seen & (logits <= 0), logits * sampling.repetition_penalty, logits)
    if sampling.temperature == 0:
        return {int(logits.argmax())}
    order = sorted(range(len(logits)), key=lambda n: -logits[n])[: sampling.top_k or len(logits)]
    shares = np.exp((logits[order] - logits.max()) / sampling.temperature)
    shares /= shares.sum()
    kept = [n for n in range(len(order)) if n == 0 or shares[:n].sum() < sampling.top_p]
    return {order[n] for n in kept if shares[n] >= sampling.min_p * shares[0]}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0),
        Sampling(top_k=3),
        Sampling(top_p=0.6),
        Sampling(min_p=0.2),
        Sampling(temperature=0.5, top_k=6, top_p=0.8, min_p=0.05, repetition_penalty=1.7),
    ],
    ids=str,
)
def test_exactly_the_tokens_that_the_filters_leave_are_drawn(sampling):
    rng = np.random.default_rng(0)
    logits, seen = rng.standard_normal(10).astype(np.float32), rng.uniform(size=10) < 0.4
    rows = 4000
    settings = stacked([dataclasses.replace(sampling, seed=seed) for seed in range(rows)])
    repeat = lambda a: np.broadcast_to(a, (rows, 10))
    drawn = np.asarray(jax.jit(choose)(repeat(logits), repeat(seen), np.zeros(rows, np.int32), settings))
    assert set(drawn.tolist()) == allowed(logits.astype(np.float64), seen, sampling)


def test_the_draws_have_the_models_probabilities():
    logits, rows = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32)), 20000
    settings = stacked([Sampling(seed=seed) for seed in range(rows)])
    repeat = lambda a: np.broadcast_to(a, (rows, 4))
    drawn = choose(repeat(logits), repeat(np.zeros(4, bool)), np.zeros(rows, np.int32), settings)
    shares = np.bincount(np.asarray(drawn), minlength=4) / rows
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=0.015)
