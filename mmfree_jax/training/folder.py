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
MOST_PADDING = 1024  # tokens of padding that nobody has to ask for: vocabularies are padded to multiples of up to that


def check_data(config: RunConfig, token_set: TokenSet) -> None:
    """Refuse a corpus that the run cannot be trained on, or evaluated where it will be. Raises ConfigError before
    anything is compiled."""
    check_vocabulary(config.model, token_set)
    for one in token_set.sets:
        _check_training_text(config.data, one)
    if config.evaluate or config.eval_every:
        check_held_out_text(token_set)


def check_vocabulary(model: ModelConfig, token_set: TokenSet) -> None:
    """Raises ConfigError for a corpus with more tokens than the model's vocabulary, or with so many fewer that they are
    hardly meant to be padded."""
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
        f"it; or say model.tokenizer_vocab={have}, if so much padding is meant",
    )


def with_padding(model: ModelConfig, token_set: TokenSet) -> ModelConfig:
    """The model, with what of its vocabulary is padding."""
    check_vocabulary(model, token_set)
    return (
        dataclasses.replace(model, tokenizer_vocab=token_set.vocab_size)
        if model.vocab > token_set.vocab_size
        else model
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


def settled(config: RunConfig, token_set: TokenSet) -> RunConfig:
    """The run as it begins with this corpus: with what the corpus holds, and paths that lead there from anywhere."""
    model, data = with_padding(config.model, token_set), located(config.data, token_set)
    init = str(Path(config.init).absolute()) if config.init else ""
    return dataclasses.replace(config, model=model, data=data, init=init)


def going_on(config: RunConfig, folder: Path) -> RunConfig:
    """The run with what it began with, in its folder or in that of its trunk: the precision that "auto" stood for, and
    the weights that it needs no more where it has a checkpoint of its own."""
    held = begun(folder)
    if held is not None and held.init and not config.init:
        config = dataclasses.replace(config, init=held.init)
    trunk = begun(folder.parent / config.branch.run) if config.branch else None
    for one in (trunk, held):
        if one is not None and config.precision == "auto":
            config = dataclasses.replace(config, precision=one.precision)
    return config


def begun(folder: Path) -> RunConfig | None:
    """The run of a folder that has made a checkpoint; None where there is none."""
    saved = folder / "checkpoints"
    has_any = saved.is_dir() and any(entry.name.isdigit() for entry in saved.iterdir())
    return read_run(folder / "config.json") if has_any and (folder / "config.json").exists() else None


def note_corpus(config: RunConfig, token_set: TokenSet, folder: Path) -> None:
    """Write down what the run reads and where: what is asked of it later must not need the same working directory."""
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
    """What the run of a folder is evaluated on: its own corpus, wherever that lies by now, or the one that is `asked`.

    Raises ConfigError where its own has changed, and for one of another tokenizer.
    """
    facts = corpus_facts(folder)
    if asked:
        found = resolve_corpus(asked, data.vocab)
    else:
        found = resolve_data(
            dataclasses.replace(data, mixture=(), weights=(), contents=()), known=known_corpora(folder)[:1]
        )
        require(
            not data.contents or found.fingerprint == data.contents[0],
            f"{found.path} holds {found.fingerprint[:16]}, but {folder} was trained on {(*data.contents, '')[0][:16]}: "
            "say with --corpus what to evaluate on",
        )
    require(
        facts.get("vocab_hash", found.vocab_hash) == found.vocab_hash,
        f"{found.path} was made with another tokenizer than the corpus that {folder} was trained on",
    )
    return found


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
    """How `config` differs from the run that `folder` holds; empty if it is that run, but for `HOW`, or none.

    What only one of the two says, because the other has not begun or was written before it was said, is no difference.
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
    if old.contents == new.contents != () or (begun(folder) and not (folder / "result.json").exists()):
        free |= {f"data.{name}" for name in PLACES}  # its checkpoints tell the content, too
    return differences(held, config, free)


def _content(data: DataConfig) -> str:
    """Names and fingerprints, for a message."""
    return ", ".join(f"{n} ({c[:16]})" for n, c in zip((data.corpus, *data.mixture), data.contents, strict=True))


def _anywhere(config: RunConfig) -> RunConfig:
    """The same with absolute paths."""
    data = config.data
    corpus, *mixture = (name if name in NAMED else os.path.abspath(name) for name in (data.corpus, *data.mixture))
    init = str(Path(config.init).absolute()) if config.init else ""
    return dataclasses.replace(config, data=dataclasses.replace(data, corpus=corpus, mixture=tuple(mixture)), init=init)


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
