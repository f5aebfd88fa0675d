"""Columns of the runs table that say how a run was trained. Rows that differ in one of them are not repetitions."""

import functools
import importlib.metadata
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmfree_jax.config import RunConfig, to_json
from mmfree_jax.data import TokenSet
from mmfree_jax.run_folder import HOW, leaves

LIBRARIES = ("jax", "jaxlib", "flax", "optax")
# Fields of a config that have a column of their own, and fields that change no number.
TOLD = frozenset(
    "name steps seed init precision model.mixer model.linear model.vocab model.tokenizer_vocab model.width model.depth "
    "model.glu_width model.heads model.kv_heads model.parametrisation model.activation_bits model.gradient_bits "
    "optim.optimizer optim.lr optim.schedule optim.warmup_steps optim.decay_steps optim.weight_decay".split()
)
SILENT = frozenset("branch milestones evaluate log_every checkpoint_every keep_checkpoints diagnose_every".split())


def identity(config: RunConfig, token_set: TokenSet) -> dict[str, Any]:
    """Return the columns by name. `settings` lists every other field that changes numbers and is not at its default."""
    model, data = config.model, config.data
    # Whatever is not at its default and has no column goes into `settings`, so a new field of the config tells rows
    # apart from the day it exists: nobody has to remember to add a column.
    values, usual = (dict(leaves(json.loads(to_json(one)))) for one in (config, RunConfig("usual")))
    elsewhere = TOLD | SILENT | set(HOW)
    settings = [
        f"{key}={value}"
        for key, value in values.items()
        if key not in elsewhere and not key.startswith(("data.", "mesh.", "branch.")) and value != usual[key]
    ]
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
        "settings": " ".join(sorted(settings)) or "usual",
        "code": code_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def _mixture(config: RunConfig) -> str:
    """Names of the corpora, with their shares if there are several."""
    names = [Path(name).name for name in (config.data.corpus, *config.data.mixture)]
    if len(names) == 1:
        return names[0]
    weights = config.data.weights or (1.0,) * len(names)
    return " + ".join(f"{weight / sum(weights):.4g} {name}" for name, weight in zip(names, weights, strict=True))


@functools.cache
def code_version() -> str:
    """Return the commit of this package's checkout, with `-dirty` if files have changed; without one, its version."""
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
