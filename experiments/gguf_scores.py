"""Does llama.cpp score items as the harness's adapter does? `python -m experiments.gguf_scores` (needs xllamacpp).

A model of each family is trained for a few minutes and exported, at width 512 as in gguf_parity.py. An item is held-out
text and four continuations of two tokens, of which one is the text's own. Scores are the sums of the tokens'
log-probabilities: here by the adapter's `log_likelihoods` on the run, there by llama.cpp in process, token by token.
Of each type of file: the largest and the mean difference of a continuation in nats, the mean with its interval by item
(95 %, bootstrapped); in which share of the items both choose the same continuation; and each side's accuracy. llama.cpp
tells no probabilities where the token that it would choose ends within a character; such items are left out and
counted. Goals: F32 transformer++ within 5e-3 nats, TQ2_0 the same choice of at least 98 % of the items. A quarter of an
hour on 2 CPU cores. The table is results/gguf_scores.csv.
"""

import argparse
import csv
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mmfree_jax
from experiments.gguf_parity import SIZES, server
from mmfree_jax.data import resolve_corpus
from mmfree_jax.evaluation.comparison import paired
from mmfree_jax.evaluation.likelihood import log_likelihoods, scorable
from mmfree_jax.weights import load_model

CASES = {"transformer++": ("f32",), "bitnet-tied": ("tq2_0", "f32")}
GIVEN, FOLLOWING, CHOICES = 40, 2, 4
COLUMNS = (
    "family", "type", "items", "left_out", "largest", "mean_size", "mean", "low", "high", "same_choice",
    "accuracy_here", "accuracy_there",
)  # fmt: skip
Tokens = list[int]
Item = tuple[Tokens, list[Tokens]]  # context and continuations, the right one first


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gguf_scores.csv")
    parser.add_argument("--families", nargs="+", default=list(CASES))
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chosen.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for family in chosen.families:
            for row in rows(family, CASES[family], Path(folder) / family, chosen.items, chosen.steps):
                writer.writerow(row)
                file.flush()
                print(row, flush=True)


def rows(family: str, kinds: tuple[str, ...], folder: Path, count: int, steps: int) -> Iterator[dict[str, Any]]:
    """Train a model of a family, and compare its scores with llama.cpp's on a file of each type."""
    run = mmfree_jax.preset(f"{family}-tiny")
    optim = dataclasses.replace(run.optim, lr=run.optim.lr * 128 / SIZES["width"], warmup_steps=20, decay_steps=50)
    data = dataclasses.replace(run.data, sequence=128, batch=8)
    model = dataclasses.replace(run.model, **SIZES, depth=2)
    run = dataclasses.replace(run, model=model, optim=optim, data=data, steps=steps, evaluate=False)
    mmfree_jax.train(run, folder / "run", print)
    asked = items(resolve_corpus("embedded", run.data.vocab).split("valid")[:], count)
    requests = [(context, one) for context, continuations in asked for one in continuations]
    ours = np.array([one[0] for one in log_likelihoods(scorable(load_model(folder / "run")), requests, 2048)])
    for kind in kinds:
        path = folder / f"{kind}.gguf"
        mmfree_jax.export(folder / "run", path, format="gguf", type=kind)
        ask = remembered(server(path))
        theirs = np.array([[score(ask, context, one) for one in continuations] for context, continuations in asked])
        yield {"family": family, "type": kind} | compared(ours.reshape(-1, CHOICES), theirs)


def items(text: np.ndarray, count: int) -> list[Item]:
    """Cut items out of a text: continuations of other places make the wrong choices."""
    starts = np.linspace(0, len(text) - GIVEN - FOLLOWING, count).astype(int)
    others = np.random.default_rng(0).integers(0, len(text) - FOLLOWING, (count, CHOICES - 1))
    stretch = lambda start: text[start : start + FOLLOWING].tolist()
    return [
        (text[start : start + GIVEN].tolist(), [stretch(start + GIVEN), *map(stretch, wrong)])
        for start, wrong in zip(starts, others, strict=True)
    ]


def remembered(ask: Callable[..., dict[str, Any]]) -> Callable[[tuple[int, ...]], dict[int, float]]:
    """Ask for the log-probabilities of what follows a prompt, of each prompt once; empty where none are told."""

    @functools.cache
    def following(prompt: tuple[int, ...]) -> dict[int, float]:
        answer = ask(prompt=list(prompt), n_predict=1, n_probs=2048)
        told = answer.get("completion_probabilities", [{"top_logprobs": []}])[0]["top_logprobs"]
        return {one["id"]: one["logprob"] for one in told}

    return following


def score(ask: Callable[[tuple[int, ...]], dict[int, float]], context: Tokens, continuation: Tokens) -> float:
    """Sum llama.cpp's log-probabilities of a continuation; NaN where it does not tell one."""
    places = enumerate(continuation)
    return sum(ask((*context, *continuation[:n])).get(token, np.nan) for n, token in places)


def compared(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Compare scores [items, continuations], the right one first."""
    told = ~np.isnan(theirs).any(axis=1)
    left_out, ours, theirs = int((~told).sum()), ours[told], theirs[told]
    apart = theirs - ours
    mean = paired(theirs.mean(axis=1), ours.mean(axis=1))
    chosen, chosen_there = ours.argmax(axis=1), theirs.argmax(axis=1)
    return {
        "items": len(ours),
        "left_out": left_out,
        "largest": f"{np.abs(apart).max():.2e}",
        "mean_size": f"{np.abs(apart).mean():.2e}",
        **{name: f"{value:.2e}" for name, value in (("mean", mean.difference), ("low", mean.low), ("high", mean.high))},
        "same_choice": f"{(chosen == chosen_there).mean():.4f}",
        "accuracy_here": f"{(chosen == 0).mean():.3f}",
        "accuracy_there": f"{(chosen_there == 0).mean():.3f}",
    }


if __name__ == "__main__":
    main()
