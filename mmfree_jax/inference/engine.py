"""Continuous batching: requests of any length share a fixed number of slots, and join and leave while others go on.

One thread calls `Engine.step`, which reads a little of the next prompt and decodes a few tokens for all slots; any
thread submits and cancels. A request is read alone, and rows of a batch do not touch each other: its tokens are those
that it would have in an empty engine of as many slots.
"""

import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from mmfree_jax.config import require
from mmfree_jax.inference.generate import PIECE, Reading, Scored, choose_next, decode, seated, start
from mmfree_jax.inference.model import ServedModel
from mmfree_jax.inference.sampling import GREEDY, Sampling, stacked


class Part(NamedTuple):
    """Some tokens of a request, in order: its prompt's, from the second on, or chosen ones.

    top: the most likely tokens at each place with their log-probabilities, where the request asked for some.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    of_prompt: bool = False


class Listener(Protocol):
    """Who made a request. Called by the engine's thread."""

    def take(self, part: Part) -> bool:
        """Take the next tokens. Returns whether the request needs no more."""

    def end(self, error: Exception | None) -> None:
        """Learn that nothing more comes, and which error is the reason, if one is."""


@dataclasses.dataclass(eq=False)
class Request:
    """What is to be generated. top: how many of the most likely tokens to report; scored: report the prompt's tokens
    first."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    listener: Listener
    top: int = 0
    scored: bool = False
    cancelled: bool = False  # set by `cancel`, at any time: the listener hears nothing more
    given: int = 0  # tokens chosen so far
    error: Exception | None = None  # what went wrong

    def cancel(self) -> None:
        """Give it up. Its slot is free from the engine's next step on."""
        self.cancelled = True


class Engine:
    """A model that generates for many requests at once.

    slots: requests that decode together. capacity: tokens of a prompt and its completion together that attention can
    hold, for each slot; recurrent mixers have no limit and ignore it. chunk: tokens decoded between two chances to join
    or leave. prompt_tokens: about how many tokens of prompts are read between two chunks, so that those who decode
    never wait for long.
    """

    def __init__(
        self, model: ServedModel, slots: int, capacity: int = 0, *, chunk: int = 8, prompt_tokens: int = PIECE
    ):
        self.model, self.capacity, self.chunk, self.prompt_tokens = model, capacity, chunk, prompt_tokens
        self.bounded = model.config.mixer == "attention"
        self._slots: list[Request | None] = [None] * slots
        self._queue: collections.deque[Request] = collections.deque()
        self._reading: tuple[Request, Reading] | None = None
        self._progress = start(model, slots, capacity)
        self._submitted = threading.Condition()
        self._settings = stacked([GREEDY] * slots)

    @property
    def slots(self) -> int:
        """How many requests can decode together."""
        return len(self._slots)

    @property
    def waiting(self) -> int:
        """How many requests have no slot yet."""
        return len(self._queue) + (self._reading is not None)

    @property
    def decoding(self) -> int:
        """How many slots are taken."""
        return sum(request is not None for request in self._slots)

    def check(self, prompt: Sequence[int], max_tokens: int) -> None:
        """Raise ConfigError for a prompt that cannot be read, or with its completion not be held."""
        V, needed = self.model.config.vocab, len(prompt) + max_tokens
        require(len(prompt) > 0, "a prompt is empty: it needs at least one token")
        require(all(0 <= token < V for token in prompt), f"a prompt has a token outside of 0 to {V - 1}")
        require(
            not self.bounded or needed <= self.capacity,
            f"a prompt of {len(prompt)} tokens and a completion of {max_tokens} need a context of {needed}, and there "
            f"is room for {self.capacity}",
        )

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue. Raises as `check`."""
        self.check(request.prompt, request.max_tokens)
        with self._submitted:
            self._queue.append(request)
            self._submitted.notify()

    def wait(self, timeout: float) -> None:
        """Wait until something is submitted, for `timeout` seconds at most."""
        with self._submitted:
            if not self._queue:
                self._submitted.wait(timeout)

    def step(self) -> bool:
        """Let cancelled requests go, read of waiting prompts, decode a chunk. Returns whether there is more to do."""
        try:
            self._let_go()
            self._read()
            self._decode()
        except Exception as error:
            self._fail(error)
        return bool(self.waiting or self.decoding)

    def run(self) -> None:
        """Generate until nothing is left to do."""
        while self.step():
            pass

    def close(self, error: Exception) -> None:
        """Tell every request that waits that it will not be served."""
        with self._submitted:
            waiting = [self._queue.popleft() for _ in range(len(self._queue))]
        for request in waiting:
            request.listener.end(error)

    def _let_go(self) -> None:
        """Take cancelled requests out, wherever they are."""
        with self._submitted:
            kept = [request for request in self._queue if not request.cancelled]
            self._queue.clear()
            self._queue.extend(kept)
        if self._reading and self._reading[0].cancelled:
            self._reading = None
        for slot, request in enumerate(self._slots):
            if request is not None and request.cancelled:
                self._seat(slot, None)

    def _read(self) -> None:
        """Read pieces of prompts, one prompt after the other, while there is a slot for them."""
        left = self.prompt_tokens
        while left > 0 and None in self._slots and (self._reading or self._queue):
            if self._reading is None:
                request = self._queue.popleft()
                self._reading = request, Reading(self.model, request.prompt, self.capacity, request.scored)
            request, reading = self._reading
            left -= reading.read_piece()
            if reading.done:
                self._join(request, reading)
                self._reading = None

    def _join(self, request: Request, reading: Reading) -> None:
        """Give a request that has been read a slot, if it needs one for more than a token."""
        enough = not request.max_tokens
        if reading.scores is not None:
            scores = Scored(*(np.concatenate(arrays) for arrays in zip(*reading.scores, strict=True)))
            enough |= self._give(request, scores, of_prompt=True)
        if not enough and request.max_tokens == 1:
            chosen = jax.device_get(choose_next(reading.progress(), stacked([request.sampling])))
            enough = self._give(request, Scored(*(a[0] for a in chosen)))
        if enough:
            request.listener.end(request.error)
            return
        slot = self._slots.index(None)
        self._progress = seated(self._progress, reading.progress(), slot)
        self._seat(slot, request)

    def _decode(self) -> None:
        """Decode a chunk for all slots, and give each request its tokens."""
        if not self.decoding:
            return
        requests = [request for request in self._slots if request is not None]
        with_top = any(request.top for request in requests)
        greedy = not with_top and all(request.sampling.temperature == 0 for request in requests)
        self._progress, chosen = decode(self.model, self._progress, self._settings, self.chunk, with_top, greedy)
        chosen = jax.device_get(chosen)
        for slot, request in enumerate(self._slots):
            if request is None:
                continue
            wanted = min(self.chunk, request.max_tokens - request.given)
            if self._give(request, Scored(*(a[slot, :wanted] for a in chosen))):
                self._seat(slot, None)
                request.listener.end(request.error)

    def _give(self, request: Request, scored: Scored, of_prompt: bool = False) -> bool:
        """Give a request tokens of its own. Returns whether it needs no more, or cannot take them."""
        tops = zip(scored.top_tokens[:, : request.top], scored.top_logprobs[:, : request.top], strict=True)
        top = [list(zip(t.tolist(), p.tolist(), strict=True)) for t, p in tops] if request.top else []
        try:
            enough = request.listener.take(Part(scored.tokens.tolist(), scored.logprobs.tolist(), top, of_prompt))
        except Exception as error:  # a fault of one request is not one of the others
            request.error, enough = error, True
        request.given += 0 if of_prompt else len(scored.tokens)
        return enough or request.given >= request.max_tokens

    def _seat(self, slot: int, request: Request | None) -> None:
        self._slots[slot] = request
        self._settings = stacked([GREEDY if one is None else one.sampling for one in self._slots])

    def _fail(self, error: Exception) -> None:
        """Tell every request that has begun, and start afresh: a program that failed has used up its arguments."""
        begun = [request for request in self._slots if request is not None]
        begun += [self._reading[0]] if self._reading else []
        slots = self.slots
        self._reading, self._slots, self._settings = None, [None] * slots, stacked([GREEDY] * slots)
        for request in begun:
            request.listener.end(error)
        self._progress = start(self.model, slots, self.capacity)
