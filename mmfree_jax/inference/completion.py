"""What follows a prompt, as it comes: tokens become text, and the text ends where it should."""

import dataclasses
from collections.abc import Sequence

from mmfree_jax.data.tokenizers.tokenizer import BYTE_TOKEN, Tokenizer
from mmfree_jax.inference.engine import Part

UNFINISHED = "\ufffd"  # what a decoder gives for bytes that begin a character

Top = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    text: without the end of the document or the stop string (empty without a tokenizer). tokens, logprobs: what was
    chosen, and the log-probability of each under the model, before temperature and filters. finish: "end" (the model
    ended the document), "stop" (a stop string), or "length" (max_tokens). top: where asked for, the most likely tokens
    at each place and their log-probabilities.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish: str
    top: list[Top] = dataclasses.field(default_factory=list)


class Detokeniser:
    """The text of tokens that come one by one: `text` and then `rest`, which is what decoding all at once gives.

    Only tokens since the last two places are decoded again at which the text could be cut: where neither a character
    nor a run of byte tokens, which decoders judge as a whole even across special ones, is unfinished. The tokens
    before the last such place are the context that says, for one, whether a word begins with a blank.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.text = ""  # of whole characters; no later token changes it
        self._tokenizer, self._told = tokenizer, ""  # the text of the context
        self._window: list[int] = []
        self._context = 0  # how many tokens of the window are context

    def add(self, token: int) -> None:
        """Take the next token."""
        self._window.append(token)
        if token in self._tokenizer.special or BYTE_TOKEN.fullmatch(self._tokenizer.backend.id_to_token(token) or ""):
            return
        whole = self._tokenizer.decode(self._window)
        if len(whole) > len(self._told) and not whole.endswith(UNFINISHED):
            self.text += whole[len(self._told) :]
            self._window = self._window[self._context :]
            self._context, self._told = len(self._window), self._tokenizer.decode(self._window)

    def rest(self) -> str:
        """The text of the tokens whose characters are not finished, if nothing follows them."""
        return self._tokenizer.decode(self._window)[len(self._told) :]


class Reader:
    """The tokens of one completion, until it ends; an engine's listener.

    ends: tokens that end the text. stops: strings that do.
    """

    def __init__(self, tokenizer: Tokenizer | None, ends: Sequence[int] = (), stops: Sequence[str] = ()):
        self.finish, self.ended = "", False
        self.error: Exception | None = None
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[Top] = []
        self.offsets: list[int] = []  # where in the text each token begins
        self.prompt: Part | None = None  # the scores of the prompt, where asked for
        self._words = None if tokenizer is None else Detokeniser(tokenizer)
        self._ends, self._stops = frozenset(ends), tuple(stops)
        self._cut: int | None = None  # where a stop string begins
        self._searched = 0

    def take(self, part: Part) -> bool:
        """Take more tokens; those after the end are left out. Returns whether it has ended."""
        if part.of_prompt:
            self.prompt = part
            return False
        for place, (token, logprob) in enumerate(zip(part.tokens, part.logprobs, strict=True)):
            if token in self._ends:
                self.finish = "end"
                break
            self._append(token, logprob, part.top[place] if part.top else None)
            if self.finish:
                break
        return bool(self.finish)

    def end(self, error: Exception | None) -> None:
        """Learn that no token comes any more."""
        self.error, self.ended, self.finish = error, True, self.finish or "length"
        if self._words is not None:
            self._words.text += self._words.rest()
            self._search()

    def certain(self) -> str:
        """The text that no later token can change: without an unfinished character, or what may begin a stop string."""
        text = "" if self._words is None else self._words.text[: self._cut]
        if self.ended or self._cut is not None:
            return text
        starts = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(starts, default=0)]

    def completion(self) -> Completion:
        """Return the whole. Raises what went wrong in the engine, if something did."""
        if self.error is not None:
            raise self.error
        return Completion(self.certain(), self.tokens, self.logprobs, self.finish, self.top)

    def _append(self, token: int, logprob: float, top: Top | None) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if top is not None:
            self.top.append(top)
        if self._words is not None:
            self.offsets.append(len(self._words.text))
            self._words.add(token)
            self._search()

    def _search(self) -> None:
        """Find the first stop string in what is new of the text, or begins in what is not."""
        assert self._words is not None
        if self._cut is not None or not self._stops:
            return
        text, first = self._words.text, max(0, self._searched - max(map(len, self._stops)) + 1)
        places = [place for stop in self._stops if (place := text.find(stop, first)) >= 0]
        self._searched = len(text)
        if places:
            self._cut, self.finish = min(places), "stop"
