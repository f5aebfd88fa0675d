"""Finds exact and near duplicates, vectorised in NumPy, with the same result on every machine.

Near duplicates follow Broder 1997 (MinHash) with locality-sensitive banding (Leskovec et al., Mining of Massive
Datasets, chapter 3); held-out text is protected by exact n-gram overlap, as in Brown et al. 2020, appendix C.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

SHINGLE_WORDS = 5  # words in a shingle for similarity
OVERLAP_WORDS = 8  # words in an n-gram for leakage: longer than stock phrases, shorter than a sentence
BANDS, ROWS = 32, 4  # a pair of similarity 0.7 meets in a band with probability 0.9998, one of 0.3 with 0.23
CHUNK_BYTES = 4_000_000  # text hashed at once: bounds the temporary arrays to about 200 MB
_WORD_POSITIONS = 64  # characters of a word with weights of their own; after that the weights repeat

_NOT_LETTERS = re.compile(r"[^a-z]+")


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of uint64 that spreads every input bit over the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _odd_constants(count: int, salt: int) -> np.ndarray:
    """`count` fixed pseudo-random odd multipliers, uint64."""
    return _mix(np.arange(salt, salt + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)


# Byte -> byte: letters in lower case, digits and non-ASCII bytes unchanged, everything that separates words -> 0.
_LOWER = [ord(chr(byte).lower()) if byte < 128 else byte for byte in range(256)]
_BYTES = np.array([low if low >= 128 or chr(low).isalnum() else 0 for low in _LOWER], np.uint8)
_WEIGHTS = _odd_constants(_WORD_POSITIONS, 1_000)


def _word_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash of every word of `texts`, uint64 [words], and the number of the text it is in, int64 [words]."""
    # All words of all texts at once, without a loop in Python: bytes are classified by a table, words begin where a
    # letter follows a separator, and a word's hash is the weighted sum of its bytes, found by `add.reduceat` over the
    # whole array.
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    data = _BYTES[np.frombuffer(b"\n".join([b"", *encoded, b""]), np.uint8)]
    is_start = (data != 0) & (np.concatenate(([0], data[:-1])) == 0)
    starts = np.flatnonzero(is_start)
    if not len(starts):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    places = np.arange(len(data))
    position = places - np.maximum.accumulate(np.where(is_start, places, 0))
    weighted = data.astype(np.uint64) * _WEIGHTS[position % _WORD_POSITIONS]
    text_ends = 1 + np.cumsum([len(piece) + 1 for piece in encoded])
    return _mix(np.add.reduceat(weighted, starts)), np.searchsorted(text_ends, starts, side="right")


def _chunks(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Ranges of texts of about CHUNK_BYTES characters each (a longer text is a range of its own)."""
    ranges, start, size = [], 0, 0
    for stop, text in enumerate(texts, 1):
        size += len(text)
        if size >= CHUNK_BYTES or stop == len(texts):
            ranges.append((start, stop))
            start, size = stop, 0
    return ranges


def shingles(texts: Sequence[str], width: int = SHINGLE_WORDS) -> tuple[np.ndarray, np.ndarray]:
    """Hash the runs of `width` words inside each text; case, punctuation and layout do not count.

    Returns hashes uint64 [shingles] in text order and offsets int64 [len(texts) + 1]: text i owns
    `hashes[offsets[i]:offsets[i + 1]]`. A text with fewer words than `width` owns none.
    """
    # A run's hash is a weighted sum of its words' hashes, computed for all runs at once by `width` shifted additions.
    # Runs that begin in one text and end in another are dropped.
    weights = _odd_constants(width, 2_000)
    hashes, counts = [np.zeros(0, np.uint64)], [np.zeros(1, np.int64)]
    for start, stop in _chunks(texts):
        words, owner = _word_hashes(texts[start:stop])
        runs = max(len(words) - width + 1, 0)
        inside = owner[:runs] == owner[len(owner) - runs :]
        total = np.zeros(runs, np.uint64)
        for i, weight in enumerate(weights):
            total += words[i : i + runs] * weight
        hashes.append(_mix(total[inside]))
        counts.append(np.bincount(owner[:runs][inside], minlength=stop - start))
    return np.concatenate(hashes), np.cumsum(np.concatenate(counts))


def signatures(hashes: np.ndarray, offsets: np.ndarray, size: int = BANDS * ROWS) -> np.ndarray:
    """Compute MinHash signatures, uint32 [texts, size]: the share of equal places estimates the Jaccard similarity."""
    # Multiplying by an odd constant permutes the hashes. The smallest one after a random permutation is equally likely
    # to be any shingle, so two texts share it with a probability equal to their Jaccard similarity.
    texts = len(offsets) - 1
    filled = np.flatnonzero(np.diff(offsets))
    result = np.full((size, texts), np.iinfo(np.uint32).max, np.uint32)
    if len(filled):
        for place, multiplier in enumerate(_odd_constants(size, 3_000)):
            scrambled = (hashes * multiplier >> np.uint64(32)).astype(np.uint32)
            result[place, filled] = np.minimum.reduceat(scrambled, offsets[filled])
    return result.T


def near_duplicates(texts: Sequence[str], threshold: float = 0.7) -> np.ndarray:
    """Find the texts that nearly repeat an earlier one (Jaccard similarity about `threshold` or more), bool [texts].

    Chains are cut at their first member: a text like one that was itself dropped is dropped too.
    """
    hashes, offsets = shingles(texts)
    signature = signatures(hashes, offsets)
    empty = np.diff(offsets) == 0
    drop = np.zeros(len(texts), bool)
    # Texts that agree in all ROWS places of a band are candidates. Sorting by the band's key puts them next to each
    # other; each is compared with the first text of its group, by all places of the signature.
    for band in range(BANDS):
        rows = signature[:, band * ROWS : (band + 1) * ROWS]
        key = _mix((rows.astype(np.uint64) * _odd_constants(ROWS, 4_000)).sum(axis=1, dtype=np.uint64))
        order = np.argsort(key, kind="stable")
        is_first = np.concatenate(([True], key[order][1:] != key[order][:-1]))[: len(order)]
        first = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
        pairs = np.flatnonzero(~is_first & ~drop[order] & ~empty[order])
        for some in np.array_split(pairs, len(pairs) // 50_000 + 1):
            alike = (signature[first[some]] == signature[order[some]]).mean(axis=1)
            drop[order[some[alike >= threshold]]] = True
    return drop


def overlap(texts: Sequence[str], reference: Sequence[str]) -> np.ndarray:
    """Return the share of each text's runs of OVERLAP_WORDS words that `reference` has too, float64 [texts]."""
    # Prefix sums turn a flag for each run into counts for each text: a difference of two places.
    known = np.unique(shingles(reference, OVERLAP_WORDS)[0])
    hashes, offsets = shingles(texts, OVERLAP_WORDS)
    found = np.concatenate(([0], np.cumsum(np.isin(hashes, known, kind="sort"))))
    return (found[offsets[1:]] - found[offsets[:-1]]) / np.maximum(np.diff(offsets), 1)


def text_key(text: str) -> bytes:
    """Return a key shared by texts with the same ASCII letters in order; case, digits, markup and layout do not count.

    A text with hardly any ASCII letters (another script, a table of numbers) is keyed by all its characters.
    """
    letters = _NOT_LETTERS.sub("", text.lower())
    plain = letters if 2 * len(letters) >= len(text.replace(" ", "")) else text
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def drop_repeated(blocks: Sequence[str], seen: set[bytes], *, shortest: int = 0) -> list[str]:
    """Return the blocks whose key is not in `seen`, and add the keys. Blocks under `shortest` characters stay."""
    kept = []
    for block in blocks:
        key = text_key(block) if len(block) >= shortest else None
        if key is None or key not in seen:
            kept.append(block)
        if key is not None:
            seen.add(key)
    return kept
