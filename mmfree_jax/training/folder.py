"""The folder of a run: which config it belongs to, and whether the corpus suits it. Nothing here imports JAX."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mmfree_jax.config import ConfigError, DataConfig, ModelConfig, RunConfig, from_json, require, to_json
from mmfree_jax.data import TokenSet
from mmfree_jax.files import write_atomically


def check_data(config: RunConfig, token_set: TokenSet) -> None:
    """Refuse a corpus that the run cannot be trained on, or evaluated where it will be. Raises ConfigError before
    anything is compiled."""
    check_vocabulary(config.model, token_set)
    for one in token_set.sets:
        _check_training_text(config.data, one)
    if config.evaluate or config.eval_every:
        check_held_out_text(token_set)


def check_vocabulary(model: ModelConfig, token_set: TokenSet) -> None:
    """Raises ConfigError for a corpus with another number of tokens than the model's."""
    require(
        model.vocab == token_set.vocab_size,
        f"model.vocab={model.vocab}, but the corpus has {token_set.vocab_size} tokens: set model.vocab to that",
    )


def check_held_out_text(token_set: TokenSet) -> None:
    """Raises ConfigError for a corpus that nothing can be evaluated on; of a mixture the first part counts alone."""
    have = len(token_set.split("valid")) if "valid" in token_set.splits else 0
    require(have > 1, f"{token_set.path} has no held-out text: build it with some, or train with evaluate=False")


def _check_training_text(data: DataConfig, token_set: TokenSet) -> None:
    have = len(token_set.split("train"))
    require(
        have > data.sequence,
        f"data.sequence={data.sequence} is longer than the train split of {token_set.path} ({have} tokens): shorten it",
    )
    packed = token_set.packed_sequence
    require(
        packed is None or (packed == data.sequence and data.separate_documents),
        f"{token_set.path} is packed: it needs data.sequence={packed} and data.separate_documents=True",
    )


# Fields that change where and how a run is computed and what is looked at on the way, not what but for rounding.
HOW = (
    *("mesh", "remat", "kernels", "gather", "reduction", "unroll", "optim.accumulate"),
    *("eval_every", "diagnose_every"),
)


def claim(config: RunConfig, folder: Path) -> None:
    """Write config.json into a new folder; check it in one that holds a run. Raises ConfigError if it is another.

    A run may go on where and how it is told now (`HOW`: another mesh, less memory), which then stands in its
    config.json. A finished one keeps what it was computed with.
    """
    if why := changes(config, folder):
        raise ConfigError(f"{folder} holds another run ({why}): choose another folder")
    path, text = folder / "config.json", to_json(config) + "\n"
    ended = (folder / "result.json").exists()
    if not path.exists() or (not ended and path.read_text(encoding="utf-8") != text):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def read_run(path: Path) -> RunConfig:
    """A run's config.json. Raises ConfigError that names the file."""
    return from_json(RunConfig, path.read_text(encoding="utf-8"), str(path))


def changes(config: RunConfig, folder: Path) -> str:
    """How `config` differs from the run that `folder` holds; empty if it is that run, but for `HOW`, or none."""
    path = folder / "config.json"
    if not path.exists():
        return ""
    held = read_run(path)
    return differences(held, config, HOW)


def differences(held: Any, wanted: Any, free: Collection[str] = ()) -> str:
    """The first few fields in which two configs of one kind differ, and how; but for those that are `free`."""
    old, new = (dict(_leaves(json.loads(to_json(c)))) for c in (held, wanted))
    bound = [key for key in old.keys() | new.keys() if key not in free and key.partition(".")[0] not in free]
    changed = [key for key in bound if old.get(key) != new.get(key)]
    return ", ".join(f"{key} is {old.get(key)}, not {new.get(key)}" for key in sorted(changed)[:4])


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
