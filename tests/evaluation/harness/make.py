"""Make the reference of test_adapter.py: `python -m tests.evaluation.harness.make`, with torch and transformers.

llama/ is a small model of ours with weights that tell tokens apart, exported as a Llama, with its tokenizer.
answers.json has requests and what lm-evaluation-harness's own `hf` backend answers on it, in float32 on a CPU.
"""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmfree_jax.data.tokenizers.tokenizer import END_OF_DOCUMENT, train_bpe
from mmfree_jax.interop.huggingface import Origin, save_huggingface
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.presets import model_preset

HERE = Path(__file__).parent
WORDS = "the loss of a model falls with compute while data and parameters grow together in time".split()
POSITIONS = 64


def text(seed: int, words: int) -> str:
    """Made-up text."""
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(words))


def save_model(folder: Path) -> None:
    """Write the model and its tokenizer."""
    tokenizer = train_bpe([text(n, 60) + ' It\'s "2 + 2 = 5".\n\ncafé, 日本語 ½\n' for n in range(9)], 300)
    sizes = {"vocab": 300, "width": 32, "glu_width": 64, "depth": 2, "heads": 4, "kv_heads": 2}
    config = dataclasses.replace(model_preset("transformer++", "tiny"), **sizes)
    model, rng = LanguageModel(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        drawn = 1 + rng.standard_normal(leaf.shape) / 8 if "gain" in path else rng.standard_normal(leaf.shape) / 5
        leaf[...] = jnp.asarray(drawn, jnp.float32)
    end = tokenizer.end_of_document
    save_huggingface(model, folder, "float32", origin=Origin(bos=end, eos=end, positions=POSITIONS))
    tokenizer.save(folder / "tokenizer.json")
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_DOCUMENT, "eos_token": END_OF_DOCUMENT}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")


def requests() -> dict[str, list]:
    """Arguments of requests by kind: usual ones, and those at whose edges adapters differ."""
    choices = [" the", " loss", " of", " a", " model"]
    likelihoods = [[f"{text(n, 3 + 2 * n)} and", choice] for n in range(6) for choice in choices]  # answers of a token
    likelihoods += [[text(50 + n, 2 + 3 * n), " " + text(70 + n, 1 + n)] for n in range(8)]
    likelihoods += [
        ["", "the loss of a model"],  # an empty context
        ["the loss ", "of a model"],  # the blank moves to the continuation
        ["the loss   ", " of"],
        ["the mod", "el falls"],  # a boundary inside of a word
        ["It's \"2 + 2 =", ' 5".\n\n'],
        ["日本", "語 ½ café"],
        ["a\n\n", "b"],
        [text(90, 200), " " + text(91, 3)],  # longer than the model reads
        [text(92, 10), " " + text(93, 12)],
    ]
    rolling = [[text(100 + n, words)] for n, words in enumerate((1, 5, 30, 63, 64, 65, 150))] + [["日本語 ½ café\n"]]
    greedy = {"until": ["\n\n", " while"], "max_gen_toks": 12, "do_sample": False}
    generated = [[text(120 + n, 2 + 4 * n), greedy] for n in range(5)]
    generated += [
        [text(130, 120), {"until": [], "max_gen_toks": 20}],
        [text(131, 4), {"until": "a", "max_gen_toks": 9}],
    ]
    return {"loglikelihood": likelihoods, "loglikelihood_rolling": rolling, "generate_until": generated}


def main() -> None:
    """Write model and answers."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    shutil.rmtree(HERE / "llama", ignore_errors=True)
    save_model(HERE / "llama")
    model = HFLM(str(HERE / "llama"), dtype="float32", device="cpu", batch_size=4)

    def ask(kind: str, arguments: list) -> list:
        asked = [Instance(kind, {}, tuple(one), n) for n, one in enumerate(arguments)]
        return getattr(model, kind)(asked, disable_tqdm=True)

    every, found = requests(), {}
    # Continuations that greedy decoding gives: those of one token whose bytes are a text.
    contexts = [text(150 + n, 3 + n) for n in range(30)]
    first = ask("generate_until", [[one, {"until": [], "max_gen_toks": 1}] for one in contexts])
    pairs = zip(contexts, first, strict=True)
    every["loglikelihood"] += [[context, token] for context, token in pairs if token and "\ufffd" not in token]
    for kind, arguments in every.items():
        answers = ask(kind, arguments)
        found[kind] = [{"arguments": a, "answer": b} for a, b in zip(arguments, answers, strict=True)]
    (HERE / "answers.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
