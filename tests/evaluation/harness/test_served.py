"""Our own server, scored by the harness through its client for OpenAI's API."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from mmfree_jax.evaluation.harness import MMFree
from mmfree_jax.inference.engine import Engine
from mmfree_jax.inference.serving.app import Service
from mmfree_jax.inference.text import TextModel
from tests.evaluation.harness.test_adapter import HERE, asked
from tests.inference.serving.test_server import LIMITS, Running


@pytest.fixture(scope="module")
def llama() -> MMFree:
    return MMFree(str(HERE / "llama"))


def through_the_client(llama: MMFree, model: TextModel, requests: list[Instance]) -> list[tuple[float, bool]]:
    """The answers to requests of the harness's `local-completions`, which sends tokens."""
    running = Running(Service(model, "llama", Engine(model.served, 4, 128), LIMITS, None, ""))
    try:
        client = LocalCompletionsAPI(running.url + "/v1/completions", None, model="llama", max_length=65, max_retries=1)
        # Its tokenizers come from packages that tests do not need: it gets the model's own.
        own, end = llama.text_tokenizer, llama.eot_token_id
        encode = lambda text: own.encode(text).tolist()
        client.tokenizer = SimpleNamespace(encode=encode, decode=own.decode, eot_token=end)
        client.tokenizer_backend, client.tokenized_requests = "tiktoken", True
        return client.loglikelihood(requests, disable_tqdm=True)
    finally:
        running.stop()


def test_a_served_model_gets_the_scores_that_the_adapter_gives(llama):
    every, expected = asked("loglikelihood")
    whole = lambda one: len(llama.tok_encode("".join(one.args))) <= 64  # the client cuts longer ones in its own way
    chosen = [n for n, one in enumerate(every) if whole(one)][::2]
    found = through_the_client(llama, llama.writer, [every[n] for n in chosen])
    np.testing.assert_allclose([one[0] for one in found], [expected[n][0] for n in chosen], atol=1e-4, rtol=0)
    assert [one[1] for one in found] == [expected[n][1] for n in chosen]


def test_a_text_after_which_the_model_ends_loses_none_of_its_tokens(llama):
    """The client asks for one token after the prompt and drops the last that it is told of."""
    (one,) = llama.writer.generate(["the loss of a"], max_tokens=1, temperature=0)
    ending = dataclasses.replace(llama.writer, ends=(one.tokens[0],))
    requests = [Instance("loglikelihood", {}, ("the loss", " of a"), 0)]
    (found,), (expected,) = through_the_client(llama, ending, requests), llama.loglikelihood(requests)
    assert found == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert len(llama.tok_encode(" of a")) > 1
