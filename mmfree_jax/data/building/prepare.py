"""Turns documents with repetitions into a training and a held-out set that share nothing: steps for every corpus."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmfree_jax.data.building import boilerplate
from mmfree_jax.data.building.dedup import drop_repeated, near_duplicates, overlap
from mmfree_jax.data.building.text import paragraphs

# A document is a list of passages (documentation strings, paragraphs, pages). Repetitions are found passage by passage;
# training and held-out text are divided document by document.

STEPS = {
    "read": "what was read",
    "lines": f"without lines of {boilerplate.SHORTEST} characters or more that very many documents have",
    "exact": "without exact copies",
    "near": "without paragraphs of Jaccard similarity 0.7 or more to an earlier one",
    "protected": "without training paragraphs that share a quarter of their 8-word runs with held-out text",
}
REPEATED_PARAGRAPH = 100  # characters; shorter repeated paragraphs (headings, "Examples") hold a text together
SIMILARITY = 0.7  # Jaccard similarity from which a passage is a near duplicate
LARGEST_OVERLAP = 0.25  # share of a training passage's 8-word runs that held-out text may have too
LARGEST_HELD_OUT = 0.1  # share of the held-out text; one long document must not dominate the held-out loss


@dataclass(frozen=True)
class Document:
    """One source file: which package or input it is from, its name there, and its passages in order."""

    source: str
    name: str
    passages: tuple[str, ...]

    @property
    def text(self) -> str:
        """The passages with a blank line between them."""
        return "\n\n".join(self.passages)


@dataclass(frozen=True)
class Prepared:
    """Documents of each split, and UTF-8 bytes of passages left after each step: step -> source -> bytes."""

    train: tuple[Document, ...]
    valid: tuple[Document, ...]
    left: dict[str, dict[str, int]]


def utf8_bytes(texts: Iterable[str]) -> int:
    """Return the total length of `texts` in UTF-8 bytes."""
    return sum(len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in texts)


def bytes_by_source(documents: Iterable[Document]) -> dict[str, int]:
    """Count the UTF-8 bytes of the passages of each source."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.source] = sizes.get(document.source, 0) + utf8_bytes(document.passages)
    return sizes


def _keep(documents: Sequence[Document], keep: np.ndarray) -> list[Document]:
    """Keep only the passages whose flag is set (bool [passages of all documents, in order])."""
    flags = iter(keep.tolist())
    thinned = [replace(d, passages=tuple(p for p in d.passages if next(flags))) for d in documents]
    return [document for document in thinned if document.passages]


def drop_exact(documents: Iterable[Document], *, shortest: int = 0) -> list[Document]:
    """Remove passages, and long paragraphs of passages, that an earlier document has.

    A passage that loses paragraphs and is then shorter than `shortest` characters is removed too.
    """
    seen_passages: set[bytes] = set()
    seen_paragraphs: set[bytes] = set()
    result = []
    for document in documents:
        kept = []
        for passage in drop_repeated(document.passages, seen_passages):
            blocks = paragraphs(passage)
            new = drop_repeated(blocks, seen_paragraphs, shortest=REPEATED_PARAGRAPH)
            text = passage if len(new) == len(blocks) else "\n\n".join(new)
            if text and (len(text) > shortest or text is passage):
                kept.append(text)
        if kept:
            result.append(replace(document, passages=tuple(kept)))
    return result


def hold_out(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Divide documents into (train, valid). About `fraction` of the bytes are held out, chosen by a hash of the names.

    Only its name decides about a document, so it mostly stays in its split when others are added or removed. Large
    documents are held out only if the others are not enough. Raises ValueError for fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError(f"a held-out split needs at least 2 documents, not {len(documents)}")
    sizes = [utf8_bytes(document.passages) for document in documents]
    target = fraction * sum(sizes)
    large = [size > LARGEST_HELD_OUT * target for size in sizes]
    chosen: set[int] = set()
    held = 0
    names = [f"{document.source}\0{document.name}".encode("utf-8", "replace") for document in documents]
    lots = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
    for i in sorted(range(len(documents)), key=lambda i: (large[i], lots[i], i)):
        if held < target and len(chosen) < len(documents) - 1:
            chosen.add(i)
            held += sizes[i]
    train = [d for i, d in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def prepare(
    documents: Sequence[Document], *, held_out: float, shortest: int = 0, keep_boilerplate: bool = False
) -> Prepared:
    """Remove boilerplate and duplicates, hold out documents, then remove passages like theirs from the training text.

    documents: in a fixed order (the earlier of two copies is kept); held_out: share of the bytes in (0, 1);
    shortest: characters a shortened passage must have; keep_boilerplate: for text that repeats lines by convention.
    The result depends on the arguments only.
    """
    # The order matters. Boilerplate goes first, or pages that differ in nothing else would look alike. Documents are
    # held out after duplicates are gone, and at last training text that shares runs of words with held-out text is
    # removed: not the other way round, or the held-out text would shrink to what is unlike everything.
    cleaned = documents
    if not keep_boilerplate:
        keys = boilerplate.recurring([document.passages for document in documents])
        thinned = [replace(d, passages=boilerplate.without(d.passages, keys)) for d in documents]
        cleaned = [document for document in thinned if document.passages]
    exact = drop_exact(cleaned, shortest=shortest)
    passages = lambda documents: [passage for document in documents for passage in document.passages]
    unique = _keep(exact, ~near_duplicates(passages(exact), SIMILARITY))
    candidates, valid = hold_out(unique, held_out)
    train = _keep(candidates, overlap(passages(candidates), passages(valid)) <= LARGEST_OVERLAP)
    steps = {"read": documents, "lines": cleaned, "exact": exact, "near": unique, "protected": train + valid}
    left = {step: bytes_by_source(some) for step, some in steps.items()}
    return Prepared(tuple(train), tuple(valid), left)
