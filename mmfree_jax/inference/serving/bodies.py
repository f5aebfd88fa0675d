"""Request bodies: JSON of bounded size, checked field by field. Whatever is wrong is said, and nothing is ignored."""

import dataclasses
import difflib
import json
import secrets
from typing import Any, Literal, TypeVar

from mmfree_jax.config import ConfigError
from mmfree_jax.inference.generate import TOP
from mmfree_jax.inference.sampling import Sampling

MOST_STOPS, LONGEST_STOP = 16, 1000  # stop strings of a request, and characters of one
DEFAULT_TOKENS = 16  # of /v1/completions, as OpenAI has it
ANY = "any"  # of a field that is read and changes nothing

# Fields of the OpenAI shape that this server accepts at the values at which they change nothing.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "user": (ANY,), "metadata": (ANY,), "store": (ANY,), "safety_identifier": (ANY,), "prompt_cache_key": (ANY,),
    "service_tier": (ANY,), "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,), "suffix": ("",),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "verbosity": ("medium",),
}  # fmt: skip

N = TypeVar("N", int, float)


class Refused(Exception):
    """A request that is not served. The message tells the client why; `param` names the field."""

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def as_json(self) -> dict[str, Any]:
        """Return it in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes, at most."""

    max_prompt: int = 32_768
    """Tokens of a prompt."""
    max_tokens: int = 4096
    """Tokens to generate for a choice."""
    max_choices: int = 128
    """Choices of a request: prompts times n."""
    max_queue: int = 256
    """Choices that wait for a slot."""
    max_body: int = 4_194_304
    """Bytes of a request."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What a request asks for, whatever its path. Prompts are text or token numbers, or messages of a chat."""

    prompts: list[str | list[int]]
    messages: list[dict[str, Any]]
    model: str
    n: int
    max_tokens: int | None  # None: as many as there is room for
    sampling: Sampling
    stops: list[str]
    logprobs: bool  # whether to report them
    top: int
    echo: bool
    stream: bool
    usage: bool  # whether a stream ends with the numbers of tokens


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the object that a body holds. Raises Refused for anything else."""

    def no_number(text: str) -> None:
        raise ValueError(f"{text} is not a number of JSON")

    try:
        values = json.loads(body, parse_constant=no_number)
        json.dumps(values, ensure_ascii=False).encode()  # texts with half a surrogate pair cannot be sent back
    except RecursionError:
        raise Refused("the body is nested too deeply") from None
    except ValueError as error:  # not UTF-8 and numbers of thousands of digits too
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise Refused("the body must be a JSON object")
    return values


class Fields:
    """The fields of a body, taken one by one. A field that is null counts as left out."""

    def __init__(self, values: dict[str, Any]):
        self.left = {name: value for name, value in values.items() if value is not None}
        self.known: list[str] = list(WITHOUT_EFFECT)

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field as it is."""
        self.known.append(name)
        return self.left.pop(name, default)

    def number(self, name: str, default: N, low: N, high: N) -> N:
        """Return a number of the default's type, from low to high."""
        value, kind = self.take(name, default), type(default)
        if type(value) not in ((int,) if kind is int else (int, float)):
            raise Refused(f"{name} must be {'a whole number' if kind is int else 'a number'}", name)
        if not low <= value <= high:
            raise Refused(f"{name} must be from {low} to {high}, not {value}", name)
        return kind(value)

    def flag(self, name: str) -> bool:
        """Return true or false; false where it is left out."""
        value = self.take(name, False)
        if type(value) is not bool:
            raise Refused(f"{name} must be true or false", name)
        return value

    def finish(self) -> None:
        """Refuse what is left and would have an effect elsewhere, or is not known."""
        for name, value in self.left.items():
            if name not in WITHOUT_EFFECT:
                near = difflib.get_close_matches(name, self.known, n=1)
                raise Refused(f"unknown field {name}{f'; did you mean {near[0]}?' if near else ''}", name)
            if value not in WITHOUT_EFFECT[name] and ANY not in WITHOUT_EFFECT[name]:
                raise Refused(f"{name} is not supported", name)


def parse_call(values: dict[str, Any], kind: Literal["completion", "chat"], limits: Limits) -> Call:
    """Check the body of a request. Raises Refused, naming the field, for one that cannot be served as it says."""
    fields, chat = Fields(values), kind == "chat"
    prompts = [] if chat else _prompts(fields.take("prompt"))
    messages = _messages(fields.take("messages")) if chat else []
    echo = not chat and fields.flag("echo")
    stream = fields.flag("stream")
    logprobs, top = _logprobs(fields, chat)
    call = Call(
        prompts,
        messages,
        _text(fields.take("model", ""), "model"),
        _choices(fields, max(1, len(prompts)), limits.max_choices),
        _max_tokens(fields, chat, 0 if echo else 1, limits.max_tokens),
        _sampling(fields),
        _stops(fields.take("stop", [])),
        logprobs,
        top,
        echo,
        stream,
        _usage(fields.take("stream_options", {}), stream),
    )
    fields.finish()
    return call


def _choices(fields: Fields, prompts: int, most: int) -> int:
    n = fields.number("n", 1, 1, most)
    if n * prompts > most:
        raise Refused(f"{prompts} prompts times n={n} are more than {most} choices", "n")
    if fields.number("best_of", n, 1, most) != n:
        raise Refused("best_of is not supported: it must be n", "best_of")
    return n


def _max_tokens(fields: Fields, chat: bool, least: int, most: int) -> int | None:
    """The tokens to generate for a choice; None: as many as there is room for."""
    names = ("max_tokens", "max_completion_tokens") if chat else ("max_tokens",)
    given = [fields.number(name, least, least, most) for name in names if name in fields.left]
    fields.known += names
    return given[-1] if given else None if chat else min(DEFAULT_TOKENS, most)


def _logprobs(fields: Fields, chat: bool) -> tuple[bool, int]:
    """Whether to report log-probabilities, and of how many of the most likely tokens."""
    if not chat:
        asked = "logprobs" in fields.left
        return asked, fields.number("logprobs", 0, 0, TOP)
    logprobs, top = fields.flag("logprobs"), fields.number("top_logprobs", 0, 0, TOP)
    if top and not logprobs:
        raise Refused("top_logprobs needs logprobs", "top_logprobs")
    return logprobs, top


def _prompts(value: Any) -> list[str | list[int]]:
    is_tokens = lambda one: isinstance(one, list) and one != [] and all(type(token) is int for token in one)
    if isinstance(value, str) or is_tokens(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, str) or is_tokens(one) for one in value):
        return value
    raise Refused("prompt must be a text, token numbers, or a list of either, and not empty", "prompt")


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise Refused("messages must be a list of at least one message", "messages")
    return [_message(one, f"messages[{n}]") for n, one in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise Refused(f"{where} must be an object with a role and a content", where)
    content = value.get("content", "")
    if isinstance(content, list):
        texts = [one.get("text") for one in content if isinstance(one, dict) and one.get("type") == "text"]
        whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "".join(map(str, texts)) if whole else None
    if not isinstance(content, str):
        raise Refused(f"{where}.content must be a text, or a list of parts of type text", where)
    name = {"name": _text(value["name"], f"{where}.name")} if value.get("name") is not None else {}
    return {"role": value["role"], "content": content, **name}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Refused(f"{name} must be a text", name)
    return value


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in stops)
    if not good or len(stops) > MOST_STOPS:
        raise Refused(f"stop must be a text of 1 to {LONGEST_STOP} characters, or at most {MOST_STOPS} of them", "stop")
    return stops


def _usage(value: Any, stream: bool) -> bool:
    if not isinstance(value, dict) or value.keys() - {"include_usage", "include_obfuscation"}:
        raise Refused("stream_options must be an object with include_usage", "stream_options")
    if value and not stream:
        raise Refused("stream_options needs stream", "stream_options")
    return value.get("include_usage") is True


def _sampling(fields: Fields) -> Sampling:
    """The settings of the first choice; `Sampling` checks their ranges."""
    names = [field.name for field in dataclasses.fields(Sampling) if field.name != "seed"]
    top = 2.0**31 - 1
    values: dict[str, Any] = {name: fields.number(name, getattr(Sampling, name), -1, int(top)) for name in names}
    seed = fields.number("seed", secrets.randbits(32), -(2**63), 2**63)
    try:
        return Sampling(**values, seed=seed % 2**32)
    except ConfigError as error:
        raise Refused(str(error), str(error).partition("=")[0]) from None
