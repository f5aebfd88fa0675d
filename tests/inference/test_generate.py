"""Generation: greedy tokens are those of the model itself, and a row does not depend on its batch."""

import dataclasses

import jax
import numpy as np
import pytest

from mmfree_jax.config import FAMILIES, ConfigError
from mmfree_jax.inference import generate
from mmfree_jax.inference.sampling import FEW, Sampling, choose, stacked
from mmfree_jax.inference.text import TextModel
from tests.inference.small import made, served

PROMPTS = [[1, 2, 3], [7] * 20, [299], list(range(40))]


def generated(model, prompts, count, **sampling):
    """Completions of 4 slots; greedy ones where nothing else is said."""
    return TextModel(model).generate(prompts, max_tokens=count, **({"temperature": 0.0} | sampling))


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
    for prompt, found in zip(PROMPTS, generated(served(family), PROMPTS, 20), strict=True):
        expected, logprobs = by_the_model_itself(model, prompt, 20)
        assert found.tokens == expected
        np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_pieces_give_the_same(family, monkeypatch):
    expected = generated(served(family), PROMPTS, 6)
    monkeypatch.setattr(generate, "PIECE", 16)
    assert [row.tokens for row in generated(served(family), PROMPTS, 6)] == [row.tokens for row in expected]


def test_the_prompt_number_n_has_the_seed_after_that_of_the_one_before():
    how = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    together = generated(served("matmul-free"), PROMPTS, 12, seed=5, **how)
    for row, prompt in enumerate(PROMPTS):
        assert generated(served("matmul-free"), [prompt], 12, seed=5 + row, **how)[0].tokens == together[row].tokens
    assert generated(served("matmul-free"), PROMPTS, 12, seed=6, **how)[0].tokens != together[0].tokens


@pytest.mark.parametrize("wrong", [[[]], [[300]], [[-1]], [[1], []]])
def test_prompts_that_cannot_be_read_are_refused(wrong):
    with pytest.raises(ConfigError, match="prompt"):
        generated(served("hgrn"), wrong, 1)


def test_the_most_likely_tokens_are_reported_where_asked_for():
    bare, (found,) = (
        generated(served("matmul-free"), [[1, 2, 3]], 6),
        generated(served("matmul-free"), [[1, 2, 3]], 6, top=3),
    )
    assert (found.tokens, found.logprobs, bare[0].top) == (bare[0].tokens, bare[0].logprobs, [])
    logits = np.asarray(TextModel(served("matmul-free"))([[1, 2, 3, *found.tokens]])[0])
    for place, top in enumerate(found.top):
        row = np.asarray(jax.nn.log_softmax(logits[2 + place]))
        assert [token for token, _ in top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([logprob for _, logprob in top], np.sort(row)[::-1][:3], atol=1e-5)


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
        Sampling(temperature=0.5, top_p=0.8, min_p=0.05, repetition_penalty=1.7),
        Sampling(temperature=0.7, top_k=999, min_p=0.05),
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


MIXED = [
    Sampling(temperature=0),
    Sampling(top_k=3),
    Sampling(top_k=FEW + 1),
    Sampling(top_p=0.8),
    Sampling(min_p=0.1),
    Sampling(top_k=FEW, top_p=0.7, repetition_penalty=1.5),
]


def test_what_a_row_draws_does_not_depend_on_how_the_others_are_drawn():
    """Filters of the others decide whether anything is sorted, and nothing else."""
    rng, choose_rows = np.random.default_rng(2), jax.jit(choose)
    logits, seen = rng.standard_normal((len(MIXED), 400)).astype(np.float32), rng.uniform(size=(len(MIXED), 400)) < 0.1
    for seed in range(20):
        rows, counts = [dataclasses.replace(s, seed=seed) for s in MIXED], np.arange(len(MIXED), dtype=np.int32)
        together = np.asarray(choose_rows(logits, seen, counts, stacked(rows)))
        for n, sampling in enumerate(rows):
            same = [np.repeat(a[n : n + 1], len(MIXED), axis=0) for a in (logits, seen, counts)]
            assert np.asarray(choose_rows(*same, stacked([sampling] * len(MIXED)))).tolist() == [together[n]] * len(
                MIXED
            )
