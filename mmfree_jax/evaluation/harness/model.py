"""The adapter: what lm-evaluation-harness asks of a model, answered by any model of ours."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mmfree_jax.config import require
from mmfree_jax.devices import backend
from mmfree_jax.evaluation.likelihood import Answer, Scorable, log_likelihoods, scorable
from mmfree_jax.inference.model import load_packed
from mmfree_jax.inference.packed import is_packed
from mmfree_jax.inference.sampling import GREEDY, Sampling
from mmfree_jax.inference.text import TextModel, find_begin, find_ends, find_tokenizer, load_text_model
from mmfree_jax.weights import load_model, origin

LOG = logging.getLogger(__name__)
POSITIONS = 2048  # that a model reads at most, where its folder does not say how long its training windows were
KNOWN = ("until", "max_gen_toks", "do_sample", *(field.name for field in dataclasses.fields(Sampling)))


@register_model("mmfree")
class MMFree(TemplateLM):
    """A model of ours for lm-evaluation-harness (0.4.13), `model_args` "pretrained=FOLDER".

    dtype: of the activations; auto: float32 on a CPU, bfloat16 elsewhere. max_length: tokens that the model reads at
    most; longer contexts lose their first tokens (default: the length of its training windows, else 2048).
    max_gen_toks: tokens to generate where a task does not say. The harness's batch_size, max_batch_size and device are
    accepted and not heeded: a batch has so many tokens whatever the task, and all devices of the process take part.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        max_length: int = 0,
        max_gen_toks: int = 256,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        self.path = Path(pretrained)
        self.dtype = {"auto": "float32" if backend() == "cpu" else "bfloat16"}.get(dtype, dtype)
        found = find_tokenizer(self.path)
        require(found is not None, f"the tokenizer of {self.path} is not known, and tasks are text")
        assert found is not None
        self.text_tokenizer = found
        self.begin, self.ends = find_begin(self.path, found), find_ends(self.path, found)
        trained = None if is_packed(self.path) else origin(self.path).positions
        self.max_length, self.max_gen_toks = int(max_length) or trained or POSITIONS, int(max_gen_toks)

    @functools.cached_property
    def scored(self) -> Scorable:
        """The model that scores, loaded at its first use."""
        if is_packed(self.path):
            return scorable(load_packed(self.path, self.dtype))
        model = load_model(self.path, self.dtype)
        if backend() == "gpu":  # a scan copies each layer's weights out of their stack, as in training.step
            model.unroll = model.config.depth
        return scorable(model)

    @functools.cached_property
    def writer(self) -> TextModel:
        """The model that generates, loaded at its first use."""
        return load_text_model(self.path, self.dtype)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.ends[0] if self.ends else self.text_tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: what texts begin with, else the token between documents."""
        return self.begin[0] if self.begin else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """The vocabulary, for the harness's cache of requests."""
        return self.text_tokenizer.vocab_hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text, with what its tokenizer puts in front unless add_special_tokens is False."""
        begin = [] if add_special_tokens is False else [*self.begin]
        return begin + self.text_tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Answer]:
        def done(n: int, answer: Answer) -> None:
            if requests[n][0] is not None:  # a window of a rolling likelihood has no name of its own
                self.cache_hook.add_partial("loglikelihood", requests[n][0], answer)

        pairs = [(context, continuation) for _, context, continuation in requests]
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for context, continuation in pairs)
        if cut:
            LOG.warning("%d of %d requests lose their first tokens: max_length=%d", cut, len(pairs), self.max_length)
        return log_likelihoods(self.scored, pairs, self.max_length, done)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Compute the log-probability of whole texts, in windows of which each predicts what the one before did not."""
        windows, owners = [], []
        for n, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(n)
        totals = [0.0] * len(requests)
        for n, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[n] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Complete texts, those of equal settings together by continuous batching."""
        by_settings: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(n)
        found = [""] * len(requests)
        for members in by_settings.values():
            texts = self._generate([requests[n].args[0] for n in members], requests[members[0]].args[1])
            for n, text in zip(members, texts, strict=True):
                found[n] = text
                self.cache_hook.add_partial("generate_until", requests[n].args, text)
        return found

    def _generate(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        asked: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        unknown = sorted(set(asked) - set(KNOWN))
        require(not unknown, f"generation settings {unknown} are not known here; {', '.join(KNOWN)} are")
        count = int(asked.pop("max_gen_toks"))
        room = self.max_length - count
        require(room > 0, f"max_gen_toks={count} leaves no room for a prompt in max_length={self.max_length}")
        stop = [text for text in asked.pop("until") if text]
        sampled = asked.pop("do_sample")
        sampling = asked if sampled else dataclasses.asdict(GREEDY)
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        return [one.text for one in self.writer.generate(prompts, max_tokens=count, stop=stop, **sampling)]
