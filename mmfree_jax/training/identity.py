"""What decides the numbers of a run, as columns of the runs table: rows that differ in these are not repeats."""

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
from mmfree_jax.training.folder import HOW

LIBRARIES = ("jax", "jaxlib", "flax", "optax")
# Fields of a config that columns of `result_row` or `identity` tell, and those that decide no number.
TOLD = frozenset(
    "name steps seed init precision model.mixer model.linear model.vocab model.tokenizer_vocab model.width model.depth "
    "model.glu_width model.heads model.kv_heads model.parametrisation model.activation_bits model.gradient_bits "
    "optim.optimizer optim.lr optim.schedule optim.warmup_steps optim.decay_steps optim.weight_decay".split()
)
SILENT = frozenset("branch milestones evaluate log_every checkpoint_every keep_checkpoints diagnose_every".split())


def identity(config: RunConfig, token_set: TokenSet) -> dict[str, Any]:
    """The columns. `settings` are all other fields that decide numbers and are not as usual, as NAME=VALUE."""
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
    """Names of what is trained on; with their shares where these are more than one."""
    names = [Path(name).name for name in (config.data.corpus, *config.data.mixture)]
    if len(names) == 1:
        return names[0]
    weights = config.data.weights or (1.0,) * len(names)
    return " + ".join(f"{weight / sum(weights):.4g} {name}" for name, weight in zip(names, weights, strict=True))


def _unusual(config: RunConfig) -> Iterator[str]:
    values, usual = (json.loads(to_json(one)) for one in (config, RunConfig("usual")))
    for part, group in (("model.", "model"), ("optim.", "optim"), ("", "")):
        found, plain = (one.get(group, one) for one in (values, usual))
        for name, value in found.items():
            key = part + name
            told = key in TOLD | SILENT or {name, key} & set(HOW) or isinstance(plain[name], dict)
            if not told and value != plain[name]:
                yield f"{key}={value}"


@functools.cache
def code_version() -> str:
    """The commit of the checkout that this package lies in, with `-dirty` where files differ from it; of an installed
    package its version."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass  # no git here, or a checkout that it does not trust: the version has to do
    return importlib.metadata.version("mmfree-jax")
