"""Continuous batching: whatever else an engine does, a request gets what it gets alone, and only while it wants it."""

import dataclasses
import functools
import threading

import jax
import numpy as np
import pytest

from mmfree_jax.config import FAMILIES, ConfigError
from mmfree_jax.inference import engine as engines
from mmfree_jax.inference.completion import Reader
from mmfree_jax.inference.engine import Engine, Request
from mmfree_jax.inference.sampling import Sampling
from tests.inference.small import served

SLOTS, CAPACITY = 3, 64
RNG = np.random.default_rng(0)
HOW = [  # prompt, tokens, settings, most likely tokens to report
    (RNG.integers(0, 300, length).tolist(), count, sampling, top)
    for length, count, sampling, top in [
        (3, 20, Sampling(temperature=0), 0),
        (17, 9, Sampling(seed=1), 2),
        (1, 1, Sampling(seed=2), 1),
        (40, 24, Sampling(temperature=0.7, top_k=40, seed=3), 0),
        (33, 5, Sampling(top_p=0.9, repetition_penalty=1.3, seed=4), 0),
        (8, 30, Sampling(temperature=0), 0),
        (20, 12, Sampling(min_p=0.02, seed=5), 0),
    ]
]


def engine(family: str, **how) -> Engine:
    return Engine(served(family), SLOTS, CAPACITY, **({"chunk": 4, "prompt_tokens": 16} | how))


def request(n: int) -> Request:
    prompt, count, sampling, top = HOW[n]
    return Request(prompt, count, sampling, Reader(None), top)


@functools.cache
def alone(family: str, n: int) -> tuple:
    """What the request n gets in an engine that does nothing else."""
    busy, one = engine(family), request(n)
    busy.submit(one)
    busy.run()
    return outcome(one)


def outcome(one: Request) -> tuple:
    found = one.listener.completion()
    assert one.listener.ended
    return found.tokens, found.logprobs, found.top, found.finish


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_gets_what_it_gets_alone_in_whatever_order_others_come(family, monkeypatch):
    monkeypatch.setattr("mmfree_jax.inference.generate.PIECE", 16)
    for order in (np.random.default_rng(seed) for seed in range(3)):
        busy, requests, left = engine(family), {}, list(order.permutation(len(HOW)))
        while left or busy.waiting or busy.decoding:
            for _ in range(order.integers(0, 3) if left else 0):
                if left:
                    requests[n] = request(n := int(left.pop()))
                    busy.submit(requests[n])
            busy.step()
        for n, one in requests.items():
            assert outcome(one) == alone(family, n)
        assert len(requests) == len(HOW)
        assert all(len(outcome(one)[0]) == HOW[n][1] for n, one in requests.items())


@pytest.mark.parametrize("family", ["matmul-free", "transformer++"])
def test_a_state_holds_what_was_read_and_nothing_of_who_had_the_slot_before(family):
    """Recurrent families read on for ever; attention up to the capacity of a slot."""
    long = RNG.integers(0, 300, CAPACITY - 4).tolist()
    busy = engine(family)
    for _ in range(2):
        found = Request(long, 4, Sampling(temperature=0), Reader(None))
        for n in range(3):
            busy.submit(request(n))
        busy.submit(found)
        busy.run()
        logits = np.asarray(jax.jit(lambda m, t: m.extend(t, m.start(1, 99))[0])(served(family), np.array([long])))
        assert found.listener.tokens[0] == logits[0, -1].argmax()
    too_long = [*long, 1]
    if family == "matmul-free":
        busy.check(too_long * 9, 4)
        return
    with pytest.raises(ConfigError, match=f"need a context of {CAPACITY + 1}, and there is room for {CAPACITY}"):
        busy.submit(Request(too_long, 4, Sampling(), Reader(None)))


@pytest.mark.parametrize("family", ["matmul-free", "bitnet"])
def test_the_prompts_own_tokens_are_scored_across_pieces(family, monkeypatch):
    monkeypatch.setattr("mmfree_jax.inference.generate.PIECE", 16)
    prompt = RNG.integers(0, 300, 35).tolist()
    for count in (0, 1, 5):
        busy, one = engine(family), Request(prompt, count, Sampling(temperature=0), Reader(None), 2, scored=True)
        busy.submit(one)
        busy.run()
        scores = one.listener.prompt
        assert scores.tokens == prompt[1:]
        logits = jax.jit(lambda m, t: m.extend(t, m.start(1, 99))[0])(served(family), np.array([prompt]))
        rows = np.asarray(jax.nn.log_softmax(logits[0, :-1]))
        np.testing.assert_allclose(scores.logprobs, rows[np.arange(34), prompt[1:]], atol=1e-5)
        assert [top[0][0] for top in scores.top] == rows.argmax(-1).tolist()
        assert len(one.listener.completion().tokens) == count
        assert one.listener.tokens == alone_tokens(family, prompt, count)


def alone_tokens(family: str, prompt: list[int], count: int) -> list[int]:
    busy, one = engine(family), Request(prompt, count, Sampling(temperature=0), Reader(None))
    busy.submit(one)
    busy.run()
    return one.listener.tokens


def test_a_cancelled_request_frees_its_place_wherever_it_is(monkeypatch):
    """In a slot, while it is read, and in the queue; the others do not notice."""
    monkeypatch.setattr("mmfree_jax.inference.generate.PIECE", 16)
    busy, requests = engine("hgrn", prompt_tokens=1), [request(n) for n in (5, 3, 6, 0, 4, 1)]
    for one in requests:
        busy.submit(one)
    for _ in range(3):
        busy.step()
    assert (busy.decoding, busy.waiting) == (1, 5)
    for n in (0, 1, 4):  # in a slot, being read, in the queue
        requests[n].cancel()
    busy.step()
    assert busy.decoding + busy.waiting == 3
    busy.run()
    for n, one in zip((5, 3, 6, 0, 4, 1), requests, strict=True):
        if one.cancelled:
            assert not one.listener.ended
        else:
            assert outcome(one) == alone("hgrn", n)


def test_a_fault_of_one_listener_is_not_one_of_the_others():
    class Faulty(Reader):
        def take(self, part):
            raise ValueError("no room")

    busy, sound = engine("hgrn"), request(0)
    faulty = dataclasses.replace(request(5), listener=Faulty(None))
    busy.submit(faulty)
    busy.submit(sound)
    busy.run()
    assert outcome(sound) == alone("hgrn", 0)
    with pytest.raises(ValueError, match="no room"):
        faulty.listener.completion()


def test_a_failed_program_is_told_to_all_who_were_in_it_and_the_next_are_served(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    busy, first, second = engine("hgrn"), request(0), request(5)
    busy.submit(first)
    with monkeypatch.context() as patch:
        patch.setattr(engines, "decode", fail)
        assert not busy.step()
    with pytest.raises(RuntimeError, match="out of memory"):
        first.listener.completion()
    busy.submit(second)
    busy.run()
    assert outcome(second) == alone("hgrn", 5)


def test_an_idle_engine_wakes_for_what_another_thread_submits():
    busy, one = engine("hgrn"), request(0)
    busy.wait(0)
    assert not busy.step()
    threading.Timer(0.1, busy.submit, [one]).start()
    busy.wait(60)
    busy.run()
    assert outcome(one) == alone("hgrn", 0)
