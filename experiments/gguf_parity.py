"""Does llama.cpp compute what a trained model computes here? `python -m experiments.gguf_parity` (needs xllamacpp).

A model of each family is trained on the embedded corpus and exported; at width 512, for llama.cpp quantises activations
by blocks of 256, and one block a row would be too easy. A row is a family and a type of file. Teacher forced, at every
position of stretches of held-out text: in which share the most likely token is the same, and the mean Kullback-Leibler
divergence from the model here to llama.cpp, in nats. Greedy: of how many prompts of 64 tokens all 64 that follow are
the same, with the prompt given as token numbers and as text. llama.cpp tells no probabilities where the token that it
would choose ends within a character; such positions are left out and counted. Ten minutes on 2 CPU cores. The table is
results/gguf_parity.csv.
"""

import argparse
import csv
import dataclasses
import json
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xllamacpp

import mmfree_jax
from mmfree_jax.data import resolve_corpus
from mmfree_jax.data.tokenizers.tokenizer import Tokenizer
from mmfree_jax.inference.model import serve_model
from mmfree_jax.inference.text import TextModel, load_text_model
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.weights import load_model

CASES = {"bitnet-tied": ("tq2_0", "tq1_0", "f16", "f32"), "transformer++": ("f16", "f32")}
SIZES = {"width": 512, "glu_width": 1536, "heads": 8}
STRETCH, GIVEN, FOLLOWING = 128, 64, 64
COLUMNS = (
    "family", "type", "held_out_loss", "positions", "left_out", "same_top", "kl", "prompts", "same_from_tokens",
    "same_from_text",
)  # fmt: skip


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gguf_parity.csv")
    parser.add_argument("--families", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--types", nargs="+", help="of files; all if not given")
    parser.add_argument("--positions", type=int, default=10_160)
    parser.add_argument("--prompts", type=int, default=100)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chosen.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for family in chosen.families:
            kinds = tuple(kind for kind in CASES[family] if kind in (chosen.types or CASES[family]))
            for row in rows(family, kinds, Path(folder) / family, chosen.positions, chosen.prompts):
                writer.writerow(row)
                file.flush()
                print(row, flush=True)


def rows(family: str, kinds: tuple[str, ...], folder: Path, positions: int, prompts: int) -> Iterator[dict[str, Any]]:
    """Train a model of a family, and compare it with llama.cpp on a file of each type."""
    run = mmfree_jax.preset(f"{family}-tiny")
    # The presets' rates are of width 128: a wider model wants a lower one.
    rate = run.optim.lr * 128 / SIZES["width"]
    run = dataclasses.replace(
        run, model=dataclasses.replace(run.model, **SIZES), optim=dataclasses.replace(run.optim, lr=rate)
    )
    loss = mmfree_jax.train(run, folder / "run")["loss"]
    model, tokenizer = load_model(folder / "run"), load_text_model(folder / "run").tokenizer
    assert tokenizer is not None
    text = resolve_corpus("embedded", run.data.vocab).split("valid")[:]
    stretches = text[: positions // (STRETCH - 1) * STRETCH].reshape(-1, STRETCH)
    starts = np.linspace(0, len(text) - GIVEN, prompts).astype(int)
    given = np.stack([text[start : start + GIVEN] for start in starts])
    for kind in kinds:
        path = folder / f"{kind}.gguf"
        mmfree_jax.export(folder / "run", path, format="gguf", type=kind)
        ask = server(path)
        row = {"family": family, "type": kind, "held_out_loss": f"{loss:.4f}"}
        yield row | forced(model, stretches, tokenizer.vocab_size, ask) | greedy(model, given, tokenizer, ask)


def server(path: Path) -> Callable[..., dict[str, Any]]:
    """Start llama.cpp's server on a file; returns a function that asks it for completions."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(path), 2 * STRETCH, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 2
    running = xllamacpp.Server(settings)

    def ask(**question: Any) -> dict[str, Any]:
        body = json.dumps({"temperature": 0, **question}).encode()
        request = urllib.request.Request(
            running.listening_address + "/completion", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())

    return ask


def forced(model: LanguageModel, stretches: np.ndarray, vocab: int, ask: Callable[..., dict]) -> dict[str, Any]:
    """Compare the predictions after every token of the stretches but their last."""
    same, divergences, left_out = 0, [], 0
    for tokens in stretches.astype(np.int32):
        logits_TV = np.asarray(model(tokens[None]), np.float64)[0, :, :vocab]
        ours_TV = np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))
        for count in range(1, STRETCH):
            answer = ask(prompt=tokens[:count].tolist(), n_predict=1, n_probs=vocab)
            if "completion_probabilities" not in answer:
                left_out += 1
                continue
            listed = answer["completion_probabilities"][0]["top_logprobs"]
            theirs_V = np.full(vocab, -np.inf)
            theirs_V[[one["id"] for one in listed]] = [one["logprob"] for one in listed]
            ours_V = ours_TV[count - 1]
            same += int(theirs_V.argmax() == ours_V.argmax())
            divergences.append(float(np.sum(np.exp(ours_V) * (ours_V - theirs_V))))
    found = len(divergences)
    return {
        "positions": found,
        "left_out": left_out,
        "same_top": f"{same / found:.4f}",
        "kl": f"{np.mean(divergences):.2e}",
    }


def greedy(model: LanguageModel, given: np.ndarray, tokenizer: Tokenizer, ask: Callable[..., dict]) -> dict[str, Any]:
    """Compare greedy continuations, of prompts as token numbers and as texts."""
    ours = TextModel(serve_model(model))  # without ends: every continuation has the same length

    def counted(prompts: list[list[int]], asked: list[Any]) -> int:
        following = [one.tokens for one in ours.generate(prompts, max_tokens=FOLLOWING, temperature=0)]
        how = {"n_predict": FOLLOWING, "return_tokens": True, "ignore_eos": False}
        return sum(ask(prompt=p, **how)["tokens"] == tokens for p, tokens in zip(asked, following, strict=True))

    tokens = given.tolist()
    texts = [tokenizer.decode(one) for one in tokens]
    return {
        "prompts": len(tokens),
        "same_from_tokens": counted(tokens, tokens),
        "same_from_text": counted([tokenizer.encode(text).tolist() for text in texts], texts),
    }


if __name__ == "__main__":
    main()
