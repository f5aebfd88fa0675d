"""Finds the token set of a corpus by name or path. Named corpora are in the cache, one for each vocabulary."""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

from mmfree_jax.config import DataConfig, require
from mmfree_jax.data.building.distributions import TIERS
from mmfree_jax.data.building.embedded import EMBEDDED, build_embedded, embedded_name
from mmfree_jax.data.reading.token_set import Mixture, TokenSet
from mmfree_jax.files import cache_folder, locked
from mmfree_jax.output import Say, quiet

NAMED = (EMBEDDED, *TIERS)
WAIT_S = 600.0  # for another process that is building the same corpus


class CorpusPlace(NamedTuple):
    """Where a run found one of its corpora."""

    name: str  # as in the run's config
    path: str  # of the token set, absolute
    fingerprint: str


def tier_folder(tier: str, vocab_size: int) -> Path:
    """Return the default folder of a tier, where runs look for it."""
    return cache_folder() / f"tier-{tier}-{vocab_size}"


def resolve_corpus(name_or_path: str | Path, vocab_size: int = 2048, progress: Say = quiet) -> TokenSet:
    """Open the corpus "embedded" (built on first use, in about half a minute), a tier, or the token set at a path.

    vocab_size: of a named corpus; a token set at a path has its own. Raises FileNotFoundError for a path without a set,
    and for a tier that has to be built first, with the command.
    """
    name = str(name_or_path)
    path = Path(name)
    if name == EMBEDDED:
        path = cache_folder() / embedded_name(vocab_size)
        if not path.exists():
            with locked(path.with_name(f"{path.name}.building"), WAIT_S):
                if not path.exists():  # another process may have built it while this one waited
                    return build_embedded(path, vocab_size, progress=progress)
    elif name in TIERS:
        path = tier_folder(name, vocab_size)
        if not path.exists():
            raise FileNotFoundError(
                f"corpus {name!r} with {vocab_size} tokens has not been built here (there is no {path}): "
                f"mmfree corpus build {name} --vocab {vocab_size}"
            )
    elif not path.exists():
        known = ", ".join(map(repr, NAMED))
        raise FileNotFoundError(f"no corpus {name!r}: use {known} or the folder of a token set")
    return TokenSet.open(path)


def _corpus_of_run(name: str, vocab_size: int, progress: Say, place: CorpusPlace | None) -> TokenSet:
    """Open the corpus of a name, or the one that the run found under this name before.

    The latter if the name is a path that does not exist here, or a named corpus whose content has changed.
    """
    if place is None or Path(name).name != Path(place.name).name or (name not in NAMED and Path(name).exists()):
        return resolve_corpus(name, vocab_size, progress=progress)
    try:
        found = TokenSet.open(place.path)
    except FileNotFoundError:
        found = None
    if found is not None and found.fingerprint == place.fingerprint:
        return found
    try:
        return resolve_corpus(name, vocab_size, progress=progress)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; the run read it from {place.path}, which is gone") from None


def with_contents(data: DataConfig, token_set: TokenSet) -> DataConfig:
    """Fill in the fingerprints of the corpora (`contents`) and absolute paths to them.

    Raises ConfigError if the token set has another number of corpora.
    """
    names, sets = (data.corpus, *data.mixture), token_set.sets
    require(len(names) == len(sets), f"data.corpus and data.mixture name {len(names)} corpora, not {len(sets)}")
    corpus, *mixture = (
        name if name in NAMED else os.path.abspath(one.path) for name, one in zip(names, sets, strict=True)
    )
    contents = tuple(one.fingerprint for one in sets)
    return dataclasses.replace(data, corpus=corpus, mixture=tuple(mixture), contents=contents)


def resolve_data(data: DataConfig, progress: Say = quiet, places: tuple[CorpusPlace, ...] = ()) -> TokenSet:
    """Open what a run reads: its corpus, or a mixture of several. Raises as `resolve_corpus` and `Mixture` do.

    places: where a resumed run found its corpora before. These are used for a path that does not exist here, and for a
    named corpus that has changed since.
    """
    # A run that was moved finds its corpora where it found them last, as long as they hold the same.
    names = (data.corpus, *data.mixture)
    found = places if len(places) == len(names) else (None,) * len(names)
    sets = [_corpus_of_run(name, data.vocab, progress, place) for name, place in zip(names, found, strict=True)]
    return Mixture(sets, data.weights or [1.0] * len(sets)) if data.mixture else sets[0]
