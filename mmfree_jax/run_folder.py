"""The folder of a run: which config and which corpus it belongs to. Nothing here imports JAX."""

import dataclasses
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mmfree_jax.config import PLACES, ConfigError, DataConfig, ModelConfig, RunConfig, from_json, require, to_json
from mmfree_jax.data import TokenSet
from mmfree_jax.data.corpora import NAMED, CorpusPlace, resolve_corpus, resolve_data, with_contents
from mmfree_jax.files import read_object, write_atomically, write_json

CORPUS = "corpus.json"  # what the run reads, and where that was found last
MOST_PADDING = 1024  # rows beyond the tokenizer's that are accepted as padding without tokenizer_vocab


def check_data(config: RunConfig, token_set: TokenSet) -> None:
    """Raise ConfigError if a run cannot be trained on this corpus, or not evaluated although it should be.

    Called before anything is compiled.
    """
    check_vocabulary(config.model, token_set.vocab_size)
    # Packed rows are windows of one length, whose documents do not see each other: trained on in any other way they
    # would be cut in the middle.
    for one in token_set.sets:
        data, have, packed = config.data, len(one.split("train")), one.packed_sequence
        require(
            have > data.sequence,
            f"data.sequence={data.sequence} is longer than the train split of {one.path} ({have} tokens): shorten it",
        )
        require(
            packed is None or (packed == data.sequence and data.separate_documents),
            f"{one.path} is packed: it needs data.sequence={packed} and data.separate_documents=True",
        )
    if config.evaluate or config.eval_every:
        check_held_out_text(token_set)


def check_vocabulary(model: ModelConfig, have: int) -> None:
    """Raise ConfigError unless the model's vocabulary is the `have` tokens of the corpus.

    It may have up to MOST_PADDING rows of padding, or more if tokenizer_vocab says so.
    """
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


def with_padding(model: ModelConfig, have: int) -> ModelConfig:
    """Set `tokenizer_vocab` of a model whose vocabulary is padded. Raises ConfigError as `check_vocabulary` does."""
    check_vocabulary(model, have)
    return dataclasses.replace(model, tokenizer_vocab=have) if model.vocab > have else model


def check_held_out_text(token_set: TokenSet) -> None:
    """Raise ConfigError if a corpus, or the first of a mixture, has no held-out text."""
    have = len(token_set.split("valid")) if "valid" in token_set.splits else 0
    require(have > 1, f"{token_set.path} has no held-out text: build it with some, or train with evaluate=False")


# Fields that change where and how a run is computed and what it logs, but not its result, except by rounding.
HOW = (
    *("mesh", "remat", "kernels", "gather", "reduction", "unroll", "optim.accumulate"),
    *("eval_every", "diagnose_every", "stall_minutes"),
)
# Fields that change nothing as long as nothing goes wrong: a run that has diverged may be resumed with others.
RESCUES = ("skip_nonfinite", "spike_sigmas", "on_spike")


def with_corpus(config: RunConfig, token_set: TokenSet) -> RunConfig:
    """Fill in what depends on the corpus: its fingerprints and vocabulary, and absolute paths."""
    model, data = with_padding(config.model, token_set.vocab_size), with_contents(config.data, token_set)
    init = str(Path(config.init).absolute()) if config.init else ""
    return dataclasses.replace(config, model=model, data=data, init=init)


def with_saved_choices(config: RunConfig, folder: Path) -> RunConfig:
    """Fill in what was chosen when the run began, from the config.json in its folder or its trunk's.

    That is the precision that "auto" stood for and, once there is a checkpoint, the weights that the run started from.
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
    """Return the config of the run in a folder if it has made a checkpoint; else None."""
    saved = folder / "checkpoints"
    has_any = saved.is_dir() and any(entry.name.isdigit() for entry in saved.iterdir())
    return read_run(folder / "config.json") if has_any and (folder / "config.json").exists() else None


def note_corpus(config: RunConfig, token_set: TokenSet, folder: Path) -> None:
    """Write corpus.json: what the run reads, and where, so that later commands work from any working directory."""
    # Absolute paths: a run may be started in one working directory and evaluated from another.
    names = (config.data.corpus, *config.data.mixture)
    sets = [
        CorpusPlace(name, os.path.abspath(one.path), one.fingerprint)
        for name, one in zip(names, token_set.sets, strict=True)
    ]
    facts = {name: getattr(token_set, name) for name in ("vocab_size", "vocab_hash", "end_of_document")}
    write_json(folder / CORPUS, {"sets": [one._asdict() for one in sets], **facts})


def corpus_facts(folder: Path) -> dict[str, Any]:
    """Return what `note_corpus` wrote; empty for a folder without it, such as that of an older run."""
    return read_object(folder / CORPUS) if (folder / CORPUS).exists() else {}


def corpus_places(folder: Path) -> tuple[CorpusPlace, ...]:
    """Return where a run found its corpora."""
    sets, names = corpus_facts(folder).get("sets", []), set(CorpusPlace._fields)
    good = isinstance(sets, list) and all(isinstance(one, dict) and one.keys() == names for one in sets)
    good = good and all(isinstance(value, str) for one in sets for value in one.values())
    require(good, f"{folder / CORPUS} does not say where the corpora of the run are: remove it")
    return tuple(CorpusPlace(**one) for one in sets)


def held_out_corpus(folder: Path, data: DataConfig, corpus: str) -> TokenSet:
    """Return the corpus to evaluate a run on: `corpus` if it is given, or the run's own, wherever it lies now.

    Raises ConfigError if the run's own has changed, and for a corpus of another tokenizer.
    """
    # Vocabularies are compared by their hash: equal sizes say nothing, and a loss in other tokens would look like a
    # result.
    facts = corpus_facts(folder)
    if corpus:
        found = resolve_corpus(corpus, data.vocab)
    else:
        own = dataclasses.replace(data, mixture=(), weights=(), contents=())
        found = resolve_data(own, places=corpus_places(folder)[:1])
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
    """Write config.json into the folder. Raises ConfigError if the folder holds another run.

    A resumed run may change where and how it is computed (`HOW`), and its config.json with it. The file of a finished
    run stays as it is.
    """
    if why := changes(config, folder):
        raise ConfigError(f"{folder} holds another run ({why}): choose another folder")
    # The file is rewritten only where it changes: a finished run may lie on a disk that is read-only by now.
    path, text = folder / "config.json", to_json(config) + "\n"
    ended = (folder / "result.json").exists()
    if not path.exists() or (not ended and path.read_text(encoding="utf-8") != text):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


def read_run(path: Path) -> RunConfig:
    """Read a run's config.json. Raises ConfigError that names the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    return from_json(RunConfig, text, str(path))


def changes(config: RunConfig, folder: Path) -> str:
    """Describe how `config` differs from the run in `folder`; empty if there is no run, or if only `HOW` differs.

    A field that only one of the two has filled in does not count: the other has not begun, or is of an older version.
    """
    path = folder / "config.json"
    if not path.exists():
        return ""
    # A run is the same run if it would compute the same. So fields that only say how are free, and so are those that
    # one side has not filled in yet.
    held, config, free = _anywhere(read_run(path)), _anywhere(config), {*HOW, *RESCUES}
    free |= {"precision"} if "auto" in (held.precision, config.precision) else set()
    free |= {"model.tokenizer_vocab"} if 0 in (held.model.tokenizer_vocab, config.model.tokenizer_vocab) else set()
    old, new = held.data, config.data
    if old.contents and new.contents and old.contents != new.contents:
        names = lambda data: ", ".join(
            f"{name} ({content[:16]})"
            for name, content in zip((data.corpus, *data.mixture), data.contents, strict=True)
        )
        return f"its data are {names(old)}, not {names(new)}"
    free |= set() if old.contents and new.contents else {"data.contents"}
    if old.contents == new.contents != () or (saved_run(folder) and not (folder / "result.json").exists()):
        free |= {f"data.{name}" for name in PLACES}  # its checkpoints hold the fingerprint, too
    return differences(held, config, free)


def _anywhere(config: RunConfig) -> RunConfig:
    """The config with absolute paths, so that equal places compare equal."""
    data = config.data
    corpus, *mixture = (name if name in NAMED else os.path.abspath(name) for name in (data.corpus, *data.mixture))
    init = str(Path(config.init).absolute()) if config.init else ""
    return dataclasses.replace(config, data=dataclasses.replace(data, corpus=corpus, mixture=tuple(mixture)), init=init)


def differences(saved: Any, requested: Any, free: Collection[str] = ()) -> str:
    """Describe the first four fields in which two configs differ. Fields in `free` may differ."""
    old, new = (dict(leaves(json.loads(to_json(c)))) for c in (saved, requested))
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
