"""Answers: what the engine tells about the choices of a request becomes the objects that OpenAI's clients read."""

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from mmfree_jax.data.tokenizers.tokenizer import BYTE_TOKEN
from mmfree_jax.inference.completion import Detokeniser, Reader, Top
from mmfree_jax.inference.engine import Part
from mmfree_jax.inference.serving.bodies import Call
from mmfree_jax.inference.text import TextModel

REASONS = {"end": "stop", "stop": "stop", "length": "length"}


class Piece(NamedTuple):
    """What is new of a choice. first, last: the numbers of its tokens. finish: empty until nothing follows."""

    place: int  # of the choice
    text: str
    first: int
    last: int
    finish: str
    error: Exception | None = None


class Choice(Reader):
    """One completion of a request. The engine's thread writes it; pieces reach the server's event loop by a queue."""

    def __init__(self, model: TextModel, call: Call, index: int, prompt: Sequence[int], queue: asyncio.Queue[Piece]):
        # Clients that score a prompt ask for one token more, and count on it: it is told even if it ends the text.
        ends = () if call.logprobs and call.max_tokens == 1 else model.ends
        super().__init__(model.tokenizer, ends, call.stops)
        self.index, self.tokens_of_prompt, self.first_at = index, list(prompt), 0.0
        self._queue, self._loop = queue, asyncio.get_running_loop()
        self._told, self._sent = 0, 0  # characters and tokens

    def take(self, part: Part) -> bool:
        """Take tokens, and tell the loop of them."""
        enough = super().take(part)
        self.first_at = self.first_at or time.monotonic()
        self._tell()
        return enough

    def end(self, error: Exception | None) -> None:
        """Tell the loop that it has all."""
        super().end(error)
        self._tell(REASONS[self.finish], error)

    def _tell(self, finish: str = "", error: Exception | None = None) -> None:
        text = self.certain()
        piece = Piece(self.index, text[self._told :], self._sent, len(self.tokens), finish, error)
        self._told, self._sent = len(text), len(self.tokens)
        if piece.text or finish:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
        else:
            self._sent = piece.first  # these tokens go with the text that they become


class Answer:
    """The answer to a call, in one object or as a stream of them. The pieces of `choices` arrive in `queue`."""

    def __init__(self, model: TextModel, name: str, call: Call, choices: list[Choice], queue: asyncio.Queue[Piece]):
        self.model, self.call, self.choices, self.queue = model, call, choices, queue
        self.chat = bool(call.messages)
        made = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.head = {"id": made, "created": int(time.time()), "model": name}

    async def whole(self) -> dict[str, Any]:
        """Wait for all choices, and return the answer. Raises what went wrong in the engine."""
        async for piece in self._pieces():
            if piece.error is not None:
                raise piece.error
        choices = [self._whole_choice(choice) for choice in self.choices]
        kind = "chat.completion" if self.chat else "text_completion"
        return self.head | {"object": kind, "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the objects of a stream as the tokens come. Raises what goes wrong in the engine."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = self.head | {"object": kind} | ({"usage": None} if self.call.usage else {})
        for choice in self.choices:
            if self.chat:
                yield head | {"choices": [_chunk(choice.index, {"role": "assistant", "content": ""})]}
        async for piece in self._pieces():
            if piece.error is not None:
                raise piece.error
            yield head | {"choices": [self._piece(piece)]}
        if self.call.usage:
            yield head | {"choices": [], "usage": self._usage()}

    async def _pieces(self) -> AsyncIterator[Piece]:
        left = len(self.choices)
        while left:
            piece = await self.queue.get()
            yield piece
            left -= bool(piece.finish)

    def _usage(self) -> dict[str, int]:
        read = sum(len(choice.tokens_of_prompt) for choice in self.choices[:: self.call.n])
        made = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        piece = Piece(choice.index, choice.certain(), 0, len(choice.tokens), REASONS[choice.finish])
        if self.chat:
            message = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            return _finished(choice.index, message, self._chat_logprobs(choice, 0, piece.last), piece.finish)
        return self._piece(piece)

    def _piece(self, piece: Piece) -> dict[str, Any]:
        choice, finish = self.choices[piece.place], piece.finish or None
        if self.chat:
            scores = self._chat_logprobs(choice, piece.first, piece.last)
            return _finished(piece.place, {"delta": {"content": piece.text} if piece.text else {}}, scores, finish)
        echoed = self.call.echo and piece.first == 0
        text = (self._prompt_text(choice) if echoed else "") + piece.text
        return _finished(piece.place, {"text": text}, self._logprobs(choice, piece, echoed), finish)

    def _prompt_text(self, choice: Choice) -> str:
        prompt = self.call.prompts[choice.index // self.call.n]
        if isinstance(prompt, str):
            return prompt
        return "" if self.model.tokenizer is None else self.model.tokenizer.decode(prompt)

    def _logprobs(self, choice: Choice, piece: Piece, echoed: bool) -> dict[str, Any] | None:
        """The log-probabilities of a completion's tokens; with `echo` the prompt's too, whose first token has none."""
        if not self.call.logprobs:
            return None
        part = slice(piece.first, piece.last)
        tokens = choice.tokens[part]
        logprobs: list[float | None] = [*choice.logprobs[part]]
        top: list[Top | None] = [*choice.top[part]]
        shift = len(self._prompt_text(choice)) if self.call.echo else 0
        offsets = [shift + offset for offset in choice.offsets[part]]
        if echoed and choice.prompt is not None:
            own, prompt = choice.tokens_of_prompt, choice.prompt
            tokens, offsets = own + tokens, self._offsets(own) + offsets
            logprobs, top = [None, *prompt.logprobs, *logprobs], [None, *prompt.top, *top]
        named = lambda row: None if row is None else {self._name(token): value for token, value in row}
        return {
            "tokens": [self._name(token) for token in tokens],
            "token_logprobs": logprobs,
            "top_logprobs": [named(row) for row in top] if self.call.top else None,
            "text_offset": offsets,
        }

    def _offsets(self, tokens: list[int]) -> list[int]:
        if self.model.tokenizer is None:
            return [0] * len(tokens)
        words, found = Detokeniser(self.model.tokenizer), []
        for token in tokens:
            found.append(len(words.text))
            words.add(token)
        return found

    def _name(self, token: int) -> str:
        """A text for a token that no other token has: its own, or its bytes where they are no text by themselves."""
        content, tokenizer = self._bytes(token), self.model.tokenizer
        if tokenizer is None or not BYTE_TOKEN.fullmatch(tokenizer.backend.id_to_token(token) or ""):
            try:
                return content.decode()
            except UnicodeDecodeError:  # a part of a character
                pass
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _bytes(self, token: int) -> bytes:
        return str(token).encode() if self.model.tokenizer is None else self.model.tokenizer.bytes_of(token)

    def _chat_logprobs(self, choice: Choice, first: int, last: int) -> dict[str, Any] | None:
        if not self.call.logprobs:
            return None

        def one(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self._name(token), "logprob": logprob, "bytes": list(self._bytes(token))}

        tops: Any = choice.top[first:last] if self.call.top else itertools.repeat([])
        rows: Any = zip(choice.tokens[first:last], choice.logprobs[first:last], tops, strict=False)
        content = [one(token, p) | {"top_logprobs": [one(*pair) for pair in top]} for token, p, top in rows]
        return {"content": content, "refusal": None}


def _chunk(index: int, delta: dict[str, str]) -> dict[str, Any]:
    return _finished(index, {"delta": delta}, None, None)


def _finished(index: int, content: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
