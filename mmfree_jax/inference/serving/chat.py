"""Chats: the messages of a request become a prompt by the Jinja template that comes with a model."""

import datetime
import json
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmfree_jax.config import ConfigError, require
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer
from mmfree_jax.files import read_json
from mmfree_jax.inference.serving.bodies import Refused
from mmfree_jax.inference.text import TEMPLATE, TOKENIZER_CONFIG


class ChatTemplate:
    """A chat template, run in a sandbox, and the tokenizer that knows the special tokens it writes.

    Raises ConfigError for a text that is no template.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, names: dict[str, str] | None = None):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        environment.globals |= {
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.datetime.now().astimezone().strftime(form),
            **(names or {}),
        }
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:  # nested too deeply; numbers of any length
            raise ConfigError(f"the chat template is not one: {error}") from None
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._backend.encode_special_tokens = False  # what a template writes <|so|> is the token of that name
        self._special = [str(self._backend.id_to_token(token)) for token in sorted(tokenizer.special)]

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the tokens of a chat, up to where the model's answer begins.

        Raises Refused for what the template refuses, and for a message that holds a special token: it could pretend
        to be another message.
        """
        for n, message in enumerate(messages):
            for token in self._special:
                if any(token in text for text in message.values()):
                    raise Refused(f"messages[{n}] holds the special token {token}", "messages")
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True)
        except Exception as error:  # a template is a program in a sandbox, and may fail in any way
            raise Refused(f"the model's chat template refuses the messages: {error}", "messages") from None
        return self._backend.encode(text, add_special_tokens=False).ids


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def find_chat_template(folder: Path, tokenizer: Tokenizer | None, file: Path | None = None) -> ChatTemplate | None:
    """Return the chat template of a model's folder, or the one in `file`; None where there is none.

    Raises ConfigError for one that cannot be read.
    """
    require(file is None or file.is_file(), f"{file}: no such file")
    if tokenizer is None:
        return None
    values = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    file = file or folder / TEMPLATE
    source = file.read_text(encoding="utf-8") if file.is_file() else values.get("chat_template")
    if isinstance(source, list):  # several, each with a name
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    if not source:
        return None
    plain = lambda token: token.get("content", "") if isinstance(token, dict) else token
    names = {name: plain(values[name]) for name in ("bos_token", "eos_token", "pad_token") if values.get(name)}
    return ChatTemplate(source, tokenizer, names)
