"""Columns of the runs table that say how a run was trained. Rows that differ in one of them are not repeats."""

import functools
import importlib.metadata
import json
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmfree_jax.config import RunConfig, to_json
from mmfree_jax.data import TokenSet
from mmfree_jax.run_folder import HOW, leaves

LIBRARIES = ("jax", "jaxlib", "flax", "optax")
# Fields of a config that have a column in `result_row` or `identity`, and fields that change no number.
TOLD = frozenset(
    "name steps seed init precision model.mixer model.linear model.vocab model.tokenizer_vocab model.width model.depth "
    "model.glu_width model.heads model.kv_heads model.parametrisation model.activation_bits model.gradient_bits "
    "optim.optimizer optim.lr optim.schedule optim.warmup_steps optim.decay_steps optim.weight_decay".split()
)
SILENT = frozenset("branch milestones evaluate log_every checkpoint_every keep_checkpoints diagnose_every".split())


def identity(config: RunConfig, token_set: TokenSet) -> dict[str, Any]:
    """Return the columns by name. `settings` lists every other field that changes numbers and is not at its default."""
    model, data = config.model, config.data
    ternary = model.linear == "ternary"
    return {
        "optimizer": config.optim.optimizer,
        "parametrisation": model.parametrisation,
        "init": config.init or "random",
        "documents": "separate" if data.separate_documents else "joined",
        "mixture": _mixture(config),
        "train_set": token_set.fingerprint,
        "data_seed": data.seed,
        "activation_bits": model.activation_bits if ternary else None,
        "gradient_bits": model.gradient_bits if ternary else None,
        "glu_width": model.glu_width,
        "heads": model.heads,
        "kv_heads": model.kv_heads or model.heads,
        "model_vocab": model.vocab,
        "settings": " ".join(sorted(_unusual(config))) or "usual",
        "code": code_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def _mixture(config: RunConfig) -> str:
    """Names of the corpora trained on, with their shares if there are several."""
    names = [Path(name).name for name in (config.data.corpus, *config.data.mixture)]
    if len(names) == 1:
        return names[0]
    weights = config.data.weights or (1.0,) * len(names)
    return " + ".join(f"{weight / sum(weights):.4g} {name}" for name, weight in zip(names, weights, strict=True))


def _unusual(config: RunConfig) -> Iterator[str]:
    """KEY=VALUE for each other field of run, model and optimizer that differs from its default."""
    values, usual = (dict(leaves(json.loads(to_json(one)))) for one in (config, RunConfig("usual")))
    for key, value in values.items():
        told = key in TOLD | SILENT | set(HOW) or key.startswith(("data.", "mesh.", "branch."))
        if not told and value != usual[key]:
            yield f"{key}={value}"


@functools.cache
def code_version() -> str:
    """The commit of this package's checkout, with `-dirty` if files differ from it; its version if there is none."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass  # no git here, or a checkout that it does not trust: the version has to do
    try:
        return importlib.metadata.version("mmfree-jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # run from a copy that is neither installed nor a checkout
