"""Typed command lines: a frozen dataclass in, one clear line out when the user's input is wrong."""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro
from tyro import _errors as events

from mmfree_jax.config import ConfigError, require
from mmfree_jax.files import url_of

# tyro turns the dataclass into flags and help. Its errors are panels of several lines; the hook that it offers hands us
# the same facts as objects (`tyro._errors`, private: pyproject.toml pins the versions that have it).

T = TypeVar("T")


def parse(
    kind: type[T],
    arguments: list[str],
    prog: str,
    default: Any = tyro.MISSING_NONPROP,
    urls: Sequence[str] = (),
) -> T:
    """Parse the arguments of a command into `kind`. `--help` prints and exits.

    urls: paths that may also be a URL. Raises ConfigError, in one line, for a missing, unknown or wrong argument.
    """

    def refuse(event: events.ParseErrorEvent) -> None:
        raise ConfigError(explain(event, prog, list(flags(kind))))

    with events.on_parse_error(refuse):
        options = tyro.cli(kind, args=arguments, prog=prog, default=default)
    for field in dataclasses.fields(cast(Any, options)):
        value = getattr(options, field.name)
        for path in value if isinstance(value, tuple) else (value,):
            # As a path of this machine it would be a folder of that name, and what is written there in no bucket.
            url = url_of(path) if isinstance(path, Path) and field.name not in urls else ""
            require(not url, f"{field.name} {url} is a URL: give a path of this machine")
    return options


def explain(event: events.ParseErrorEvent, prog: str, known: Sequence[str]) -> str:
    """Say in one line what is wrong with a command line, and which of the `known` flags may have been meant."""
    see = f"(see {prog} --help)"
    match event:
        case events.MissingArgs(missing_arguments=missing, unrecognized_tokens=unknown):
            names = ", ".join(one.arg.display_name() for one in missing)
            also = f" (and these are unknown: {' '.join(unknown)})" if unknown else ""
            return f"{names} {'is' if len(missing) == 1 else 'are'} required{also}"
        case events.UnrecognizedArgs(tokens=tokens):
            near = next((nearest_flags(token, known) for token in tokens if token.startswith("--")), [])
            meant = f"(did you mean {' or '.join(near)}?)" if near else see
            return f"unknown: {' '.join(tokens)} {meant}"
        case events.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{argument.display_name()}: {value!r} is none of {', '.join(choices)} {see}"
        case events.InstantiationFailure(message=message, argument=argument):
            name = f"{argument.display_name()}: " if argument is not None else ""
            return f"{name}{' '.join(message.split())} {see}"
        case events.BadValue(argument=argument):
            return f"{argument.display_name()} needs a value {see}"
        case _:
            return f"wrong usage {see}"


def flags(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield every flag of a command, such as `--optim.warmup-steps`."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        inner = typing.get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(inner):
            unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from flags(inner, prefix if unnamed else f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}".replace("_", "-")


def nearest_flags(unknown: str, known: Sequence[str]) -> list[str]:
    """Return the known flags that an unknown one may stand for: the nearest, at most three that are equally near.

    A flag is near if it is spelled alike, or if its last word is made of the unknown flag's initials (learning-rate:
    optim.lr) or is one of its parts (batch-size: data.batch).
    """
    group, _, word = unknown.removeprefix("--").replace("_", "-").split("=")[0].rpartition(".")
    # `group` and `word` of --optim.learning-rate are optim and learning-rate; its initials are lr.
    initials = "".join(part[:1] for part in word.split("-"))

    def score(flag: str) -> float:
        flag_group, _, flag_word = flag.removeprefix("--").rpartition(".")
        similarity = difflib.SequenceMatcher(None, word, flag_word).ratio()
        if "-" in word and (flag_word == initials or flag_word in word.split("-")):
            similarity = max(similarity, 0.9)
        return similarity + (0.3 if group == flag_group else 0.0)

    best = max(map(score, known), default=0.0)
    return [flag for flag in known if score(flag) >= max(best, 1.0 if group else 0.75)][:3]
