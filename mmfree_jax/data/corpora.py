"""A corpus by name or path -> an opened token set; named corpora live in the cache, one for each vocabulary."""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

from mmfree_jax.config import DataConfig, require
from mmfree_jax.data.building.build import Progress, quiet
from mmfree_jax.data.building.distributions import TIERS
from mmfree_jax.data.building.embedded import EMBEDDED, build_embedded, embedded_name
from mmfree_jax.data.reading.token_set import Mixture, TokenSet
from mmfree_jax.files import locked

NAMED = (EMBEDDED, *TIERS)
WAIT_S = 600.0  # for another process that is building the same corpus


class Known(NamedTuple):
    """Where a run found one of its corpora."""

    name: str  # as in the run's config
    path: str  # of the token set, absolute
    fingerprint: str


def cache_folder() -> Path:
    """`$MMFREE_JAX_CACHE`, else `~/.cache/mmfree_jax`."""
    named = os.environ.get("MMFREE_JAX_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mmfree_jax"


def _cached_embedded(cache: Path, vocab_size: int, progress: Progress) -> TokenSet:
    path = cache / embedded_name(vocab_size)
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
    name_or_path: str | Path, vocab_size: int = 2048, cache: Path | None = None, progress: Progress = quiet
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


def resolve_data(data: DataConfig, progress: Progress = quiet, known: tuple[Known, ...] = ()) -> TokenSet:
    """What a run reads: its corpus, or the mixture of it with others. Raises as `resolve_corpus` and `Mixture` do.

    known: where a resumed run found its corpora before. They are used for a path that does not exist here, and for a
    named corpus that has changed since.
    """
    names = (data.corpus, *data.mixture)
    places = known if len(known) == len(names) else (None,) * len(names)
    sets = [_corpus_of_run(name, data.vocab, progress, place) for name, place in zip(names, places, strict=True)]
    return Mixture(sets, data.weights or [1.0] * len(sets)) if data.mixture else sets[0]
