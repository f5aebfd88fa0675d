"""Boilerplate: licence notes, navigation, page footers. They are recognised because very many documents have them."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from mmfree_jax.data.building.dedup import text_key

# Lines shared between pages are how CCNet removes navigation and notices from a web crawl (Wenzek et al. 2020, arXiv
# 1911.00359, section 3.1). Exact deduplication of paragraphs would keep one copy of each, and would not find them
# inside paragraphs that differ otherwise.

SHORTEST = 40  # characters; shorter lines ("The default is true.") recur in ordinary language
FEWEST, SHARE = 50, 1 / 2_000  # a line is boilerplate if at least this many, and this share, of documents have it
_BREAK = re.compile(r"((?<=[.!?:]) |\n)")


def lines(text: str) -> list[str]:
    """Cut `text` after every end of a line or sentence; joined, the pieces are `text` again."""
    parts = _BREAK.split(text)
    return [part + after for part, after in zip(parts[::2], [*parts[1::2], ""], strict=True)]


def recurring(documents: Sequence[Sequence[str]]) -> set[bytes]:
    """Return keys (`dedup.text_key`) of lines that very many documents have. A document is a list of passages."""
    counts: Counter[bytes] = Counter()
    for passages in documents:
        every = (line for passage in passages for line in lines(passage))
        # A set for each document: a line that one page repeats a thousand times is no boilerplate of the corpus.
        counts.update({text_key(line) for line in every if len(line) >= SHORTEST})
    fewest = max(FEWEST, SHARE * len(documents))
    return {key for key, count in counts.items() if count >= fewest}


def without(passages: Iterable[str], keys: set[bytes]) -> tuple[str, ...]:
    """Remove the lines with these keys, and passages of which less than SHORTEST characters are left."""
    kept = []
    for passage in passages:
        pieces = lines(passage)
        rest = [line for line in pieces if len(line) < SHORTEST or text_key(line) not in keys]
        text = passage if len(rest) == len(pieces) else "".join(rest).rstrip()
        if text is passage or len(text) >= SHORTEST:
            kept.append(text)
    return tuple(kept)
