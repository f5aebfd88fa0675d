import random

import numpy as np
import pytest

from mmfree_jax.data.building import dedup
from mmfree_jax.data.building.prepare import Document, drop_exact, hold_out, prepare, utf8_bytes
from tests.data.made_up import passage


def word_runs(text: str, width: int) -> set[tuple[str, ...]]:
    """Runs of words the slow way, for comparison."""
    words = "".join(c.lower() if c.isalnum() else " " for c in text).split()
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}


def jaccard(a: str, b: str) -> float:
    one, two = word_runs(a, dedup.SHINGLE_WORDS), word_runs(b, dedup.SHINGLE_WORDS)
    return len(one & two) / max(len(one | two), 1)


def edited(text: str, share: float, rng: random.Random) -> str:
    return " ".join(f"w{rng.random()}" if rng.random() < share else word for word in text.split())


def test_shingles_agree_with_sets_of_words_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    texts = [passage(rng) for _ in range(20)] + ["", "too short", "!!!", "Ünï-cödé wörds and more words here"]
    whole = dedup.shingles(texts, 4)
    monkeypatch.setattr(dedup, "CHUNK_BYTES", 500)
    hashes, offsets = dedup.shingles(texts, 4)
    np.testing.assert_array_equal(whole[0], hashes)
    for i, text in enumerate(texts):
        assert len(np.unique(hashes[offsets[i] : offsets[i + 1]])) == len(word_runs(text, 4))
    shared = dedup.shingles(["One, TWO three four!", "zero one two\nthree  four"], 4)[0]
    assert shared[0] == shared[2]


def test_signatures_estimate_jaccard_similarity() -> None:
    rng = random.Random(1)
    for share in (0.0, 0.02, 0.06, 0.3):
        pair = [text := passage(rng, 60), edited(text, share, rng)]
        signature = dedup.signatures(*dedup.shingles(pair), size=1024)
        assert (signature[0] == signature[1]).mean() == pytest.approx(jaccard(*pair), abs=0.06)


def test_near_duplicates_are_found_and_different_texts_kept() -> None:
    rng = random.Random(2)
    originals = [passage(rng) for _ in range(300)]
    copies = [edited(text, 0.01, rng) for text in originals[:100]]
    alike = np.array([jaccard(a, b) for a, b in zip(originals, copies, strict=False)])
    drop = dedup.near_duplicates(originals + copies, 0.7)
    assert not drop[:300].any()
    assert drop[300:][alike > 0.8].all()
    assert not drop[300:][alike < 0.55].any()


def test_texts_without_words_are_not_duplicates_of_each_other() -> None:
    assert not dedup.near_duplicates(["", "", "a b", "a b", "数学"]).any()
    assert len(dedup.near_duplicates([])) == 0


def test_overlap_is_the_exact_share_of_common_runs() -> None:
    rng = random.Random(3)
    reference = [passage(rng) for _ in range(10)]
    mixed = reference[0].split()[:20] + [f"new{i}" for i in range(20)]
    shares = dedup.overlap([reference[3], " ".join(mixed), passage(rng), ""], reference)
    assert shares[0] == 1.0
    assert shares[1] == pytest.approx(13 / 33)  # 20 words hold 13 runs of 8, 40 words 33
    assert shares[2] < 0.1
    assert shares[3] == 0.0


def test_exact_copies_go_whatever_their_layout_and_numbers() -> None:
    long = "a paragraph of documentation that says the same thing in many places, version 1.0, " * 2
    documents = [
        Document("p", "a", (f"first text\n\n{long}", "Examples\n\nmore")),
        Document("p", "b", (f"First   Text\n\n{long.upper()}",)),
        Document("p", "c", (f"something else\n\n{long.replace('1.0', '2.5')}",)),
        Document("p", "d", ("数学は楽しい", "統計も楽しい")),
    ]
    left = drop_exact(documents)
    assert [(d.name, d.passages) for d in left] == [
        ("a", documents[0].passages),
        ("c", ("something else",)),
        ("d", documents[3].passages),
    ]


def made_up_documents(count: int) -> list[Document]:
    rng = random.Random(4)
    return [Document("p", f"{i}.py", tuple(passage(rng) for _ in range(3))) for i in range(count)]


def test_held_out_text_is_the_asked_share_and_stays_when_documents_are_added() -> None:
    documents = made_up_documents(400)
    train, valid = hold_out(documents, 0.1)
    size = lambda some: utf8_bytes(p for d in some for p in d.passages)
    assert size(valid) / size(documents) == pytest.approx(0.1, abs=0.02)
    assert sorted(d.name for d in train + valid) == sorted(d.name for d in documents)
    later = {d.name for d in hold_out(documents[:380], 0.1)[1]}
    assert len({d.name for d in valid} & later) >= 0.9 * len(later)


def test_one_huge_document_is_not_held_out() -> None:
    documents = made_up_documents(150)
    rng = random.Random(5)
    huge = Document("p", "huge.py", tuple(passage(rng) for _ in range(2000)))
    assert all(huge not in hold_out([*documents, huge], share)[1] for share in (0.02, 0.1))


def test_preparing_leaves_no_held_out_text_in_training() -> None:
    rng = random.Random(6)
    documents = made_up_documents(200)
    leaks = [
        Document("q", f"{d.name}.copy", tuple(edited(p, 0.05, rng) + " " + passage(rng, 2) for p in d.passages))
        for d in documents
    ]
    prepared = prepare(documents + leaks, held_out=0.1)
    held = [p for d in prepared.valid for p in d.passages]
    kept = [p for d in prepared.train for p in d.passages]
    assert len(held) > 20
    known = set().union(*(word_runs(p, 8) for p in held))
    assert max(len(word_runs(p, 8) & known) / len(word_runs(p, 8)) for p in kept) <= 0.25
    assert max(jaccard(a, b) for a in kept[::7] for b in held[::7]) < 0.3
    assert prepared.left["protected"]["q"] < prepared.left["near"]["q"] <= prepared.left["read"]["q"]


def test_fewer_than_two_documents_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="at least 2 documents"):
        hold_out(made_up_documents(1), 0.1)
