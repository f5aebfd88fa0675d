"""The adapter answers as the harness's own `hf` backend does, for every family and kind of folder."""

import json
import shutil
import tomllib
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from mmfree_jax.config import FAMILIES, ConfigError
from mmfree_jax.evaluation import likelihood
from mmfree_jax.evaluation.harness import MMFree
from mmfree_jax.evaluation.likelihood import log_likelihoods, scorable
from mmfree_jax.inference.model import serve_model
from mmfree_jax.inference.packed import save_packed
from mmfree_jax.models.language_model import LanguageModel
from tests.models.families import family, model
from tests.simulated import run

HERE = Path(__file__).parent
ANSWERS = json.loads((HERE / "answers.json").read_text())
NATS = 1e-4  # an item


@pytest.fixture(scope="module")
def llama() -> MMFree:
    return MMFree(str(HERE / "llama"))


def asked(kind: str) -> tuple[list[Instance], list]:
    requests = [Instance(kind, {}, tuple(one["arguments"]), n) for n, one in enumerate(ANSWERS[kind])]
    return requests, [one["answer"] for one in ANSWERS[kind]]


def test_it_gives_the_log_likelihoods_of_the_hf_backend(llama, caplog):
    requests, expected = asked("loglikelihood")
    found = llama.loglikelihood(requests)
    assert f"of {len(requests)} requests lose their first tokens: max_length=64" in caplog.text
    np.testing.assert_allclose([one[0] for one in found], [one[0] for one in expected], atol=NATS, rtol=0)
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert {one[1] for one in found} == {True, False}  # or equality says little


def test_it_gives_the_rolling_likelihoods_of_the_hf_backend(llama):
    requests, expected = asked("loglikelihood_rolling")
    np.testing.assert_allclose(llama.loglikelihood_rolling(requests), expected, atol=NATS, rtol=0)


def test_it_generates_the_texts_of_the_hf_backend(llama):
    requests, expected = asked("generate_until")
    assert llama.generate_until(requests) == expected


def test_settings_of_generation_that_are_not_known_are_refused(llama):
    with pytest.raises(ConfigError, match=r"settings \['num_beams'\] are not known here"):
        llama.generate_until([Instance("generate_until", {}, ("the", {"num_beams": 4}), 0)])
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        llama.generate_until([Instance("generate_until", {}, ("the", {"max_gen_toks": 64}), 0)])


def test_answers_reach_the_harnesss_cache_as_they_come(llama, monkeypatch):
    kept = []
    hook = type("Hook", (), {"add_partial": lambda self, *a: kept.append(a)})()
    monkeypatch.setattr(llama, "cache_hook", hook)
    requests, _ = asked("loglikelihood")
    found = llama.loglikelihood(requests)
    assert {(one[1], one[2]) for one in kept} == {(r.args, answer) for r, answer in zip(requests, found, strict=True)}


def test_the_harness_knows_it_by_name_and_by_entry_point():
    assert get_model("mmfree") is MMFree
    points = tomllib.loads((HERE.parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = points["lm_eval.models"]["mmfree"].partition(":")
    assert getattr(import_module(module), name) is MMFree


def family_model(name: str) -> LanguageModel:
    return model(family(name, vocab=300))


def made_up(count: int, longest: int) -> list[likelihood.Request]:
    """Requests of all lengths, several with the same input."""
    rng = np.random.default_rng(0)
    draw = lambda most: rng.integers(1, 257, rng.integers(1, most)).tolist()
    requests = [(draw(longest), draw(20)) for _ in range(count)]
    return requests + [(context, [token]) for context, _ in requests[:5] for token in range(1, 7)]


def alone(logits, request: likelihood.Request) -> tuple[float, bool]:
    """The answer by the whole model on the request by itself; what follows a token does not change its logits."""
    context, continuation = request
    tokens = np.zeros((1, 80), np.int32)
    tokens[0, : len(context) + len(continuation)] = [*context, *continuation]
    places = slice(len(context) - 1, len(context) + len(continuation) - 1)
    logits_TV = np.asarray(jax.nn.log_softmax(logits(tokens)[0], axis=-1), np.float64)[places]
    return logits_TV[range(len(continuation)), continuation].sum(), bool((logits_TV.argmax(-1) == continuation).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_together_requests_get_the_answers_that_they_get_alone(name, monkeypatch):
    monkeypatch.setattr(likelihood, "SHORTEST", 64)
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 256)
    monkeypatch.setattr(likelihood, "PLACES", 64)
    made, requests = family_model(name), made_up(24, 44)
    found = log_likelihoods(scorable(made), requests, 128)
    served = log_likelihoods(scorable(serve_model(made)), requests, 128)
    jitted = nnx.jit(lambda whole, tokens: whole(tokens))
    expected = [alone(lambda tokens: jitted(made, tokens), one) for one in requests]
    # Where sums are rounded in another order, a code of an activation may come out as its neighbour.
    nats = NATS if made.config.linear == "dense" else 5e-3
    for answers in (found, served):
        np.testing.assert_allclose([a[0] for a in answers], [a[0] for a in expected], atol=nats, rtol=1e-6)
        assert np.mean([a[1] == b[1] for a, b in zip(answers, expected, strict=True)]) == 1


def test_equal_inputs_are_read_once_and_rows_are_few_shapes():
    requests = made_up(300, 200)
    inputs = likelihood.unique_inputs(requests, 256)
    assert len(inputs) < len(requests)
    assert sum(len(one.targets) for one in inputs) == sum(len(continuation) for _, continuation in requests)
    batches = list(likelihood.batches(inputs))
    used, room = sum(len(one.tokens) for one in inputs), sum(one.tokens_BT.size for one in batches)
    assert used > 0.85 * room
    assert len({one.tokens_BT.shape for one in batches}) <= 4
    for one in batches:  # every place is scored once for its request
        assert len(set(zip(one.requests_N, one.places_N, one.targets_N, strict=True))) == len(one.places_N)


def test_what_cannot_be_scored_is_refused_and_long_requests_lose_their_beginning():
    for request, why in ((([], [1]), "need a token each"), (([1], [1] * 9), "has 9 tokens, and the model reads 8")):
        with pytest.raises(ConfigError, match=why):
            likelihood.unique_inputs([request], 8)
    (one,) = likelihood.unique_inputs([(range(20), [100, 101])], 8)
    assert one.tokens == (*range(13, 20), 100)  # and 101 is predicted from them
    assert one.targets == [(0, 6, 100), (0, 7, 101)]


def test_a_packed_folder_answers_as_the_model_it_was_packed_from(tmp_path):
    made = family_model("bitnet")
    text = (HERE / "llama" / "tokenizer.json").read_text()
    save_packed(made, tmp_path / "packed", stored="float32", layout="planes", tokenizer_json=text, end=[0], beside=[])
    found = MMFree(str(tmp_path / "packed"))
    requests, _ = asked("loglikelihood")
    pairs = [found._encode_pair(*one.args) for one in requests if one.args[0]]
    whole = log_likelihoods(scorable(made), pairs, found.max_length)
    answers = found.loglikelihood([one for one in requests if one.args[0]])
    np.testing.assert_allclose([a[0] for a in answers], [a[0] for a in whole], atol=2e-2, rtol=1e-4)


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    shutil.copytree(HERE / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"the tokenizer of .* is not known, and tasks are text"):
        MMFree(str(tmp_path / "llama"))


def test_every_device_takes_batches_and_the_answers_are_those_of_one():
    said, _ = run("-m", "tests.evaluation.devices_program", str(HERE / "llama"))
    found = json.loads(said.splitlines()[-1])
    assert found["used"] == list(range(8))
    np.testing.assert_allclose([a[0] for a in found["several"]], [a[0] for a in found["one"]], rtol=1e-6)
