"""Do packed models say the same as the models they are packed from? `python -m experiments.packed_parity`.

Every ternary family is trained for a minute (the tiny presets, on the embedded corpus), exported as a packed folder in
both layouts, and loaded from there. 1,000 prompts of 8 to 63 tokens are stretches of held-out text. To each, 32 tokens
are generated greedily by `LanguageModel`, its latent weights quantised once; and by the packed model, in batches of the
same shape. A row is a family and a layout: in how many prompts all tokens are the same, and the largest difference of a
token's log-probability. Expect 1,000, and 0 for families without attention.

Two more columns compare with other programs. Where the weights are quantised at each use, the compiler chooses anew in
which order their mean is summed; and the engine reads prompts alone and decodes 64 rows. The last bit of a float
differs then, now and then a rounded code, and seldom a token: these counts may be a few less than 1,000. About fifteen
minutes on 2 CPU cores. The table is results/packed_parity.csv.
"""

import argparse
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import mmfree_jax
from mmfree_jax.data import resolve_corpus
from mmfree_jax.inference.model import ServedModel
from mmfree_jax.inference.text import TextModel, load_text_model
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.ops.packed import CODES_IN_A_BYTE
from mmfree_jax.weights import load_model

FAMILIES = ("matmul-free", "matmul-free-rwkv4", "bitnet", "bitnet-tied", "bitnet-b1.58")
PROMPTS, TOGETHER, TOKENS = 1000, 50, 32
SHORTEST, LONGEST = 8, 63
COLUMNS = (
    "family", "layout", "prompts", "tokens", "same", "largest_logprob_difference", "same_when_quantised_at_each_use",
    "same_by_engine",
)  # fmt: skip


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packed_parity.csv")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    chosen = parser.parse_args()
    out = chosen.out
    with tempfile.TemporaryDirectory() as folder, out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for family in chosen.families:
            for row in rows(family, Path(folder) / family):
                writer.writerow(row)
                file.flush()
                print(row, flush=True)


def rows(family: str, folder: Path) -> Iterator[dict]:
    """Train a model of a family, and compare it with itself packed in each layout."""
    mmfree_jax.train(mmfree_jax.preset(f"{family}-tiny"), folder / "run")
    prompts = held_out_prompts()
    model = load_model(folder / "run")
    at_each_use, _ = greedy(model, prompts)
    model.use_codes(model.make_codes())
    tokens, logprobs = greedy(model, prompts)
    for layout in CODES_IN_A_BYTE:
        mmfree_jax.export(folder / "run", folder / layout, "float32", format="packed", layout=layout)
        served = load_text_model(folder / layout).served
        found, found_logprobs = greedy(served, prompts)
        text_model = TextModel(served)  # without ends: all completions have the same length
        by_engine = [
            one.tokens
            for part in batches(prompts)
            for one in text_model.generate(part, max_tokens=TOKENS, temperature=0)
        ]
        yield {
            "family": family,
            "layout": layout,
            "prompts": len(prompts),
            "tokens": TOKENS,
            "same": int((found == tokens).all(axis=1).sum()),
            "largest_logprob_difference": f"{np.abs(found_logprobs - logprobs).max():.1e}",
            "same_when_quantised_at_each_use": int((found == at_each_use).all(axis=1).sum()),
            "same_by_engine": int((np.array(by_engine) == tokens).all(axis=1).sum()),
        }


def held_out_prompts() -> list[list[int]]:
    """Stretches of held-out text of various lengths, those of a batch alike in none."""
    text, rng = resolve_corpus("embedded", 2048).split("valid")[:], np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST + 1, PROMPTS)
    starts = rng.integers(0, len(text) - LONGEST, PROMPTS)
    return [text[a : a + n].tolist() for a, n in zip(starts, lengths, strict=True)]


def batches(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Cut the prompts into batches."""
    for first in range(0, len(prompts), TOGETHER):
        yield prompts[first : first + TOGETHER]


def greedy(model: LanguageModel | ServedModel, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Generate batch by batch: tokens [B, N] and their log-probabilities."""
    found = []
    for part in batches(prompts):
        tokens, segments = (np.zeros((len(part), LONGEST), np.int32) for _ in range(2))
        for row, prompt in enumerate(part):
            tokens[row, LONGEST - len(prompt) :] = prompt
            segments[row, LONGEST - len(prompt) :] = 1
        found.append(_greedy(model, tokens, segments))
    chosen, logprobs = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return chosen, logprobs


@jax.jit
def _greedy(
    model: LanguageModel | ServedModel, tokens_BT: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def step(carry, _):
        logits_BV, state = carry
        token_B = jnp.argmax(logits_BV, axis=-1)
        logprob_B = jnp.max(jax.nn.log_softmax(logits_BV), axis=-1)
        logits_BTV, state = model.extend(token_B[:, None], state)
        return (logits_BTV[:, 0], state), (token_B, logprob_B)

    state = model.start(tokens_BT.shape[0], LONGEST + TOKENS)
    logits_BTV, state = model.extend(tokens_BT, state, segments_BT=segments_BT, last_only=True)
    _, (tokens_NB, logprobs_NB) = jax.lax.scan(step, (logits_BTV[:, 0], state), None, length=TOKENS)
    return tokens_NB.T, logprobs_NB.T


if __name__ == "__main__":
    main()
