"""A corpus by name or path -> an opened token set; named corpora live in the cache, one for each vocabulary."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mmfree_jax.config import DataConfig, require
from mmfree_jax.data import card as cards
from mmfree_jax.data.distributions import TIERS
from mmfree_jax.data.embedded import SHORTEST, Package, extract_packages, installed_packages, installed_versions
from mmfree_jax.data.prepare import Document, Prepared, prepare
from mmfree_jax.data.token_set import Mixture, TokenSet
from mmfree_jax.data.token_writer import write_token_set
from mmfree_jax.data.tokenization import Tokenizer, train_bpe
from mmfree_jax.files import locked

EMBEDDED = "embedded"
NAMED = (EMBEDDED, *TIERS)
BUILDER = 2  # raise it when the same packages would give another corpus
HELD_OUT = 0.042  # of the bytes: about 240 thousand tokens of the embedded corpus at vocabulary 2048
WAIT_S = 600.0  # for another process that is building the same corpus
Progress = Callable[[str], None]


class Known(NamedTuple):
    """Where a run found one of its corpora."""

    name: str  # as in the run's config
    path: str  # of the token set, absolute
    fingerprint: str


_STEPS = {
    "found": "all documentation strings",
    "long": f"those of more than {SHORTEST} characters",
    "read": "those that read as English",
    "exact": "without exact copies of passages and of long paragraphs",
    "near": "without passages of Jaccard similarity 0.7 or more to an earlier one",
    "protected": "without training passages that share a quarter of their 8-word runs with held-out text",
}
_DESCRIPTION = (
    "Documentation strings of installed Python packages: technical English with code in it. A document is one source "
    "file; training and held-out text are divided by document. The text belongs to the packages' authors and stays on "
    "this machine."
)


def _quiet(message: str) -> None:
    """Progress that nobody watches."""


def cache_folder() -> Path:
    """`$MMFREE_JAX_CACHE`, else `~/.cache/mmfree_jax`."""
    named = os.environ.get("MMFREE_JAX_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mmfree_jax"


def _cache_name(vocab_size: int) -> str:
    identity = json.dumps([BUILDER, HELD_OUT, list(installed_versions().items())])
    return f"{EMBEDDED}-{vocab_size}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def collect(
    packages: Sequence[Package], processes: int | None = None
) -> tuple[list[Document], dict[str, dict[str, int]]]:
    """Documents of the packages, and bytes left per source after the steps `found` and `long`."""
    documents = []
    left: dict[str, dict[str, int]] = {"found": {}, "long": {}}
    for package, files in zip(packages, extract_packages(packages, processes), strict=True):
        left["found"][package.name] = sum(file.found_bytes for file in files)
        left["long"][package.name] = sum(file.found_bytes - file.short_bytes for file in files)
        for (name, _), file in zip(package.files, files, strict=True):
            if file.passages:
                documents.append(Document(package.name, name, file.passages))
    return documents, left


def embedded_card(packages: Sequence[Package], prepared: Prepared, left: dict[str, dict[str, int]]) -> dict:
    """The data card of the embedded corpus, without what the writer adds."""
    counts: dict[str, int] = {}
    for document in prepared.train + prepared.valid:
        counts[document.source] = counts.get(document.source, 0) + 1
    every = left | prepared.left
    steps = {p.name: {step: every[step].get(p.name, 0) for step in _STEPS} for p in packages}
    rows = [cards.source_row(p.name, p.version, p.licence, counts.get(p.name, 0), steps[p.name]) for p in packages]
    return {"name": EMBEDDED, "builder": BUILDER, "description": _DESCRIPTION, "steps": _STEPS, "sources": rows}


def build_embedded(
    path: Path,
    vocab_size: int,
    *,
    packages: Sequence[Package] | None = None,
    tokenizer: Tokenizer | None = None,
    processes: int | None = None,
    progress: Progress = _quiet,
) -> TokenSet:
    """Build the corpus of `packages` (the installed ones) at `path`, which must not exist.

    tokenizer: instead of one of `vocab_size` tokens trained on the text.
    """
    began = time.monotonic()
    say = lambda message: progress(f"{message} [{time.monotonic() - began:.0f} s]")
    packages = installed_packages() if packages is None else packages
    say(f"reading the documentation of {len(packages)} packages")
    documents, left = collect(packages, processes)
    say(f"removing repetitions from {len(documents)} documents")
    prepared = prepare(documents, held_out=HELD_OUT, shortest=SHORTEST, keep_boilerplate=True)
    train, valid = ([document.text for document in some] for some in (prepared.train, prepared.valid))
    if tokenizer is None:
        say(f"training a tokenizer of {vocab_size} tokens")
        tokenizer = train_bpe(train, vocab_size)
    say("writing tokens")
    card = embedded_card(packages, prepared, left)
    result = write_token_set(path, {"train": train, "valid": valid}, tokenizer, card)
    say(f"{len(result.split('train')):,} training and {len(result.split('valid')):,} held-out tokens at {path}")
    return result


def _cached_embedded(cache: Path, vocab_size: int, progress: Progress) -> TokenSet:
    path = cache / _cache_name(vocab_size)
    if not path.exists():
        with locked(cache / f"{path.name}.building", WAIT_S):
            if not path.exists():  # another process may have built it while this one waited
                return build_embedded(path, vocab_size, progress=progress)
    return TokenSet.open(path)


def tier_folder(tier: str, vocab_size: int, cache: Path | None = None) -> Path:
    """Where a tier is built unless told otherwise, and where runs that name it look for it."""
    return (cache or cache_folder()) / f"tier-{tier}-{vocab_size}"


def _built_tier(tier: str, vocab_size: int, cache: Path | None) -> TokenSet:
    path = tier_folder(tier, vocab_size, cache)
    if not path.exists():
        raise FileNotFoundError(
            f"corpus {tier!r} with {vocab_size} tokens has not been built here (there is no {path}): "
            f"python launch.py corpus build {tier} --vocab {vocab_size}"
        )
    return TokenSet.open(path)


def resolve_corpus(
    name_or_path: str | Path, vocab_size: int = 2048, cache: Path | None = None, progress: Progress = _quiet
) -> TokenSet:
    """The corpus "embedded" (built on first use, about half a minute), a tier that was built, or the set at a path.

    vocab_size: of a named corpus; a token set at a path has its own. Raises FileNotFoundError for a path without a set,
    and for a tier that has to be built first, with the command.
    """
    name = str(name_or_path)
    if name == EMBEDDED:
        return _cached_embedded(cache or cache_folder(), vocab_size, progress)
    if name in TIERS:
        return _built_tier(name, vocab_size, cache)
    if not Path(name).exists():
        known = ", ".join(map(repr, NAMED))
        raise FileNotFoundError(f"no corpus {name!r}: use {known} or the folder of a token set")
    return TokenSet.open(name)


def _corpus_of_run(name: str, vocab_size: int, progress: Progress, known: Known | None) -> TokenSet:
    """The corpus of a name, or the one that the run found under this name before.

    The latter if the name is a path that does not exist here, or that of a named corpus whose content has changed.
    """
    if known is None or Path(name).name != Path(known.name).name or (name not in NAMED and Path(name).exists()):
        return resolve_corpus(name, vocab_size, progress=progress)
    try:
        found = TokenSet.open(known.path)
    except FileNotFoundError:
        found = None
    if found is not None and found.fingerprint == known.fingerprint:
        return found
    try:
        return resolve_corpus(name, vocab_size, progress=progress)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; the run read it from {known.path}, which is gone") from None


def located(data: DataConfig, token_set: TokenSet) -> DataConfig:
    """The config with the fingerprints of its corpora (`contents`), and with absolute paths to them.

    Raises ConfigError for a token set that is not of as many corpora.
    """
    names, sets = (data.corpus, *data.mixture), token_set.sets
    require(len(names) == len(sets), f"data.corpus and data.mixture name {len(names)} corpora, not {len(sets)}")
    corpus, *mixture = (
        name if name in NAMED else os.path.abspath(one.path) for name, one in zip(names, sets, strict=True)
    )
    contents = tuple(one.fingerprint for one in sets)
    return dataclasses.replace(data, corpus=corpus, mixture=tuple(mixture), contents=contents)


def resolve_data(data: DataConfig, progress: Progress = _quiet, known: tuple[Known, ...] = ()) -> TokenSet:
    """What a run reads: its corpus, or the mixture of it with others. Raises as `resolve_corpus` and `Mixture` do.

    known: where a resumed run found its corpora before. They are used for a path that does not exist here, and for a
    named corpus that has changed since.
    """
    names = (data.corpus, *data.mixture)
    places = known if len(known) == len(names) else (None,) * len(names)
    sets = [_corpus_of_run(name, data.vocab, progress, place) for name, place in zip(names, places, strict=True)]
    return Mixture(sets, data.weights or [1.0] * len(sets)) if data.mixture else sets[0]
