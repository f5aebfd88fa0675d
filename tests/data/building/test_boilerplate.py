import random

from mmfree_jax.data.building import boilerplate
from mmfree_jax.data.building.prepare import Document, prepare
from tests.data.made_up import passage, sentence

NOTICE = "Copyright 2020 The Authors. This page is free to copy for everyone who keeps this notice on it."
FOOTER = "Home | Documentation | Download the newest release | Contact us"
SHORT = "The default is true."


def pages(count: int, seed: int = 0) -> list[list[str]]:
    """Documents of three paragraphs; the notice stands alone, the footer on a line of the last paragraph."""
    rng = random.Random(seed)
    text = lambda: passage(rng, 3).replace("\n    ", " ")
    return [[text(), NOTICE.replace("2020", str(year)), f"{text()} {SHORT}\n{FOOTER}"] for year in range(count)]


def test_lines_are_cut_without_loss() -> None:
    texts = ["One. Two! Three?\nFour: five.six\n\n end. ", "", "\n", "no end"]
    assert ["".join(boilerplate.lines(text)) for text in texts] == texts
    assert boilerplate.lines(texts[0])[:4] == ["One. ", "Two! ", "Three?\n", "Four: "]


def test_what_stands_in_very_many_documents_goes_and_the_rest_stays_to_the_letter() -> None:
    documents = pages(boilerplate.FEWEST)
    keys = boilerplate.recurring(documents)
    found = [boilerplate.without(passages, keys) for passages in documents]
    assert found == [(first, last.removesuffix(f"\n{FOOTER}")) for first, _, last in documents]


def test_what_stands_in_fewer_or_many_times_in_one_stays() -> None:
    assert boilerplate.recurring(pages(boilerplate.FEWEST - 1)) == set()
    assert boilerplate.recurring([[NOTICE] * 1000, ["something else"]]) == set()


def test_the_bar_rises_with_the_number_of_documents() -> None:
    rng = random.Random(1)
    others = [[sentence(rng)] for _ in range(int(boilerplate.FEWEST / boilerplate.SHARE))]
    assert boilerplate.recurring(pages(boilerplate.FEWEST) + others[: -boilerplate.FEWEST])
    assert boilerplate.recurring(pages(boilerplate.FEWEST) + others) == set()


def test_preparing_removes_every_copy_and_the_card_says_how_much() -> None:
    documents = [Document("a", str(i), tuple(p)) for i, p in enumerate(pages(60))]
    kept, cleared = (prepare(documents, held_out=0.2, keep_boilerplate=keep) for keep in (True, False))
    texts = lambda prepared: [document.text for document in prepared.train + prepared.valid]
    assert sum(NOTICE[15:] in text for text in texts(kept)) == 1  # exact deduplication leaves one
    assert sum(FOOTER in text for text in texts(kept)) == 60
    assert not any(NOTICE[15:] in text or FOOTER in text for text in texts(cleared))
    assert all(SHORT in text for text in texts(cleared))
    left = {step: sizes["a"] for step, sizes in cleared.left.items()}
    gone = sum(len(NOTICE.replace("2020", str(i))) + len(f"\n{FOOTER}") for i in range(60))
    assert left["read"] - left["lines"] == gone
