"""The folder of a run: which config it belongs to, and whether the corpus suits it. Nothing here imports JAX."""

import dataclasses
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mmfree_jax.config import PLACES, ConfigError, DataConfig, ModelConfig, RunConfig, from_json, require, to_json
from mmfree_jax.data import TokenSet
from mmfree_jax.data.corpora import NAMED, Known, located, resolve_corpus, resolve_data
from mmfree_jax.files import read_json, write_atomically, write_json

CORPUS = "corpus.json"  # what the run reads and where that was last
MOST_PADDING = 1024  # rows beyond the tokenizer's that are padding without being asked for


def check_data(config: RunConfig, token_set: TokenSet) -> None:
    """Check that the run can be trained on this corpus, and evaluated on it if it will be, before anything is compiled.

    Raises ConfigError.
    """
    check_vocabulary(config.model, token_set)
    for one in token_set.sets:
        _check_training_text(config.data, one)
    if config.evaluate or config.eval_every:
        check_held_out_text(token_set)


def check_vocabulary(model: ModelConfig, token_set: TokenSet) -> None:
    """Check that the model's vocabulary is the corpus's, with at most MOST_PADDING rows of padding unless asked for.

    Raises ConfigError.
    """
    have = token_set.vocab_size
    require(
        model.vocab >= have,
        f"model.vocab={model.vocab} is smaller than the {have} tokens of the corpus: set model.vocab to {have}, or "
        "to a multiple above it",
    )
    require(
        model.tokenizer_vocab in (0, have),
        f"model.tokenizer_vocab={model.tokenizer_vocab}, but the corpus has {have} tokens: leave it out",
    )
    require(
        model.tokenizer_vocab == have or model.vocab - have < MOST_PADDING,
        f"model.vocab={model.vocab}, but the corpus has {have} tokens: set model.vocab to that or to a multiple above "
        f"it; or set model.tokenizer_vocab={have}, if so much padding is meant",
    )


def with_padding(model: ModelConfig, token_set: TokenSet) -> ModelConfig:
    """The model, told how much of its vocabulary is padding. Raises ConfigError as `check_vocabulary` does."""
    check_vocabulary(model, token_set)
    have = token_set.vocab_size
    return dataclasses.replace(model, tokenizer_vocab=have) if model.vocab > have else model


def check_held_out_text(token_set: TokenSet) -> None:
    """Check that a corpus, or the first of a mixture, has held-out text. Raises ConfigError."""
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


# Fields that change where and how a run is computed, and what is reported on the way, but no result except by rounding.
HOW = (
    *("mesh", "remat", "kernels", "gather", "reduction", "unroll", "optim.accumulate"),
    *("eval_every", "diagnose_every"),
)


def with_corpus(config: RunConfig, token_set: TokenSet) -> RunConfig:
    """The run's config for this corpus: with the corpus's fingerprints and vocabulary, and absolute paths."""
    model, data = with_padding(config.model, token_set), located(config.data, token_set)
    init = str(Path(config.init).absolute()) if config.init else ""
    return dataclasses.replace(config, model=model, data=data, init=init)


def with_saved_choices(config: RunConfig, folder: Path) -> RunConfig:
    """The run's config with what was chosen when it began, from the config.json in its folder or its trunk's.

    These are the precision that "auto" stood for and, once there is a checkpoint, the weights to start from.
    """
    saved = saved_run(folder)
    if saved is not None and saved.init and not config.init:
        config = dataclasses.replace(config, init=saved.init)
    trunk = [folder.parent / config.branch.run] if config.branch else []
    for path in (one / "config.json" for one in (*trunk, folder)):
        if config.precision == "auto" and path.exists():
            config = dataclasses.replace(config, precision=read_run(path).precision)
    return config


def saved_run(folder: Path) -> RunConfig | None:
    """The config of the run in a folder, if it has made a checkpoint; else None."""
    saved = folder / "checkpoints"
    has_any = saved.is_dir() and any(entry.name.isdigit() for entry in saved.iterdir())
    return read_run(folder / "config.json") if has_any and (folder / "config.json").exists() else None


def note_corpus(config: RunConfig, token_set: TokenSet, folder: Path) -> None:
    """Write corpus.json: what the run reads and where, so that later commands work from any working directory."""
    names = (config.data.corpus, *config.data.mixture)
    sets = [
        Known(name, os.path.abspath(one.path), one.fingerprint) for name, one in zip(names, token_set.sets, strict=True)
    ]
    facts = {name: getattr(token_set, name) for name in ("vocab_size", "vocab_hash", "end_of_document")}
    write_json(folder / CORPUS, {"sets": [one._asdict() for one in sets], **facts})


def corpus_facts(folder: Path) -> dict[str, Any]:
    """What `note_corpus` wrote; empty for a folder without it, as older runs have."""
    return read_json(folder / CORPUS) if (folder / CORPUS).exists() else {}


def known_corpora(folder: Path) -> tuple[Known, ...]:
    """Where the run of a folder found its corpora."""
    return tuple(Known(**one) for one in corpus_facts(folder).get("sets", ()))


def held_out_corpus(folder: Path, data: DataConfig, asked: str) -> TokenSet:
    """The corpus to evaluate the run of a folder on: the one `asked` for, or the run's own, wherever it lies now.

    Raises ConfigError where the run's own has changed, and for a corpus of another tokenizer.
    """
    facts = corpus_facts(folder)
    if asked:
        found = resolve_corpus(asked, data.vocab)
    else:
        own = dataclasses.replace(data, mixture=(), weights=(), contents=())
        found = resolve_data(own, known=known_corpora(folder)[:1])
        trained_on = data.contents[0] if data.contents else found.fingerprint
        require(
            found.fingerprint == trained_on,
            f"{found.path} holds {found.fingerprint[:16]}, but {folder} was trained on {trained_on[:16]}: give the "
            "corpus to evaluate on with --corpus",
        )
    require(
        facts.get("vocab_hash", found.vocab_hash) == found.vocab_hash,
        f"{found.path} was made with another tokenizer than the corpus that {folder} was trained on",
    )
    return found


def claim(config: RunConfig, folder: Path) -> None:
    """Write config.json into a new folder. In a folder that holds a run, check that it is this run, else ConfigError.

    A resumed run may change where and how it is computed (`HOW`), and its config.json with it. That of a finished run
    stays as it is.
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
    """How `config` differs from the run in `folder`, in words; empty if there is none, or if only `HOW` differs.

    A field that only one of the two has filled in is no difference: the other has not begun, or is of an older version.
    """
    path = folder / "config.json"
    if not path.exists():
        return ""
    held, config, free = _anywhere(read_run(path)), _anywhere(config), set(HOW)
    free |= {"precision"} if "auto" in (held.precision, config.precision) else set()
    free |= {"model.tokenizer_vocab"} if 0 in (held.model.tokenizer_vocab, config.model.tokenizer_vocab) else set()
    old, new = held.data, config.data
    if old.contents and new.contents and old.contents != new.contents:
        return f"its data are {_content(old)}, not {_content(new)}"
    free |= set() if old.contents and new.contents else {"data.contents"}
    if old.contents == new.contents != () or (saved_run(folder) and not (folder / "result.json").exists()):
        free |= {f"data.{name}" for name in PLACES}  # its checkpoints hold the fingerprint, too
    return differences(held, config, free)


def _content(data: DataConfig) -> str:
    """Names and fingerprints, for a message."""
    return ", ".join(f"{n} ({c[:16]})" for n, c in zip((data.corpus, *data.mixture), data.contents, strict=True))


def _anywhere(config: RunConfig) -> RunConfig:
    """The config with absolute paths."""
    data = config.data
    corpus, *mixture = (name if name in NAMED else os.path.abspath(name) for name in (data.corpus, *data.mixture))
    init = str(Path(config.init).absolute()) if config.init else ""
    return dataclasses.replace(config, data=dataclasses.replace(data, corpus=corpus, mixture=tuple(mixture)), init=init)


def differences(held: Any, wanted: Any, free: Collection[str] = ()) -> str:
    """The first four fields in which two configs differ, and how. Fields in `free` may differ."""
    old, new = (dict(leaves(json.loads(to_json(c)))) for c in (held, wanted))
    bound = [key for key in old.keys() | new.keys() if key not in free and key.partition(".")[0] not in free]
    changed = [key for key in bound if old.get(key) != new.get(key)]
    return ", ".join(f"{key} is {old.get(key)}, not {new.get(key)}" for key in sorted(changed)[:4])


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of each field of a config that was read as JSON."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
