"""Boiler plate: licence notes, navigation, page furniture, known by standing in very many documents.

Lines shared between pages are how CCNet removes navigation and notices from a web crawl (Wenzek et al. 2020, arXiv
1911.00359, section 3.1). Exact deduplication of paragraphs alone keeps one copy of each, and does not see them inside
paragraphs that differ otherwise.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from mmfree_jax.data.building.dedup import text_key

SHORTEST = 40  # characters; shorter lines ("The default is true.") recur because they are language
FEWEST, SHARE = 50, 1 / 2_000  # a line is boiler plate in this many documents, and this share of them
_BREAK = re.compile(r"((?<=[.!?:]) |\n)")


def lines(text: str) -> list[str]:
    """`text` cut after every line end and sentence end; joined again it is the same."""
    parts = _BREAK.split(text)
    return [part + after for part, after in zip(parts[::2], [*parts[1::2], ""], strict=True)]


def _keys(passages: Iterable[str]) -> Iterator[bytes]:
    return (text_key(line) for passage in passages for line in lines(passage) if len(line) >= SHORTEST)


def recurring(documents: Sequence[Sequence[str]]) -> set[bytes]:
    """Keys (`dedup.text_key`) of the lines that stand in very many of the documents, which are lists of passages."""
    counts: Counter[bytes] = Counter()
    for passages in documents:
        counts.update(set(_keys(passages)))
    fewest = max(FEWEST, SHARE * len(documents))
    return {key for key, count in counts.items() if count >= fewest}


def without(passages: Iterable[str], keys: set[bytes]) -> tuple[str, ...]:
    """The passages without the lines of those keys; what is left of a passage under SHORTEST characters goes too."""
    kept = []
    for passage in passages:
        pieces = lines(passage)
        rest = [line for line in pieces if len(line) < SHORTEST or text_key(line) not in keys]
        text = passage if len(rest) == len(pieces) else "".join(rest).rstrip()
        if text is passage or len(text) >= SHORTEST:
            kept.append(text)
    return tuple(kept)
