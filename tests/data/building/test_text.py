import pytest

from mmfree_jax.data.building import text


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("a  \nb\t \n", "a\nb"),
        ("a\n\n\n\n\nb", "a\n\nb"),
        ("a\x00\x07b\u200b\ufeff", "ab"),
        ("cafe\u0301", "caf\u00e9"),
        ("    kept\n      indentation", "    kept\n      indentation"),
        ("", ""),
        ("\n \n", ""),
    ],
)
def test_normalise_gives_one_form(raw: str, clean: str) -> None:
    assert text.normalise(raw) == clean
    assert text.normalise(clean) == clean


def test_decode_keeps_what_is_utf8_and_marks_what_is_not() -> None:
    assert text.decode("\ufeffnaïve 数学".encode()) == "naïve 数学"
    assert text.decode(b"ab\xff\xfecd") == "ab\ufffd\ufffdcd"


def test_what_no_text_holds_is_replaced_and_counted() -> None:
    assert text.repair("\ufeffnaïve 数学 \ufffd".encode()) == ("naïve 数学 \ufffd", 0)
    assert text.repair(b"ab\xff\xfecd\xc3") == ("ab\ufffd\ufffdcd\ufffd", 3)
    assert text.repair("half \ud83d and an escaped NUL \0") == ("half \ufffd and an escaped NUL \0", 1)
    assert text.repair("ab".encode("utf-16-le")) == ("a\0b\0", 2)


def test_paragraphs_are_split_at_blank_lines_and_keep_their_indentation() -> None:
    assert text.paragraphs("one\ntwo\n\n    three\n \n\nfour") == ["one\ntwo", "    three", "four"]


def test_english_is_told_from_tables_data_and_other_languages() -> None:
    english = "Return the sum of the elements of an array over a given axis, or of all of them when it is None."
    assert text.looks_english(english)
    assert text.looks_english(f"{english}\n\n>>> np.sum([0.5, 1.5])\n2.0")
    assert not text.looks_english("0.1 0.2 0.3 | 4.5 6.7 | 8.9 1.0 " * 9)
    assert not text.looks_english("Die Summe der Elemente eines Feldes wird entlang der Achse gebildet.")
    assert not text.looks_english("配列の要素の合計を返します。" * 9)
    assert not text.looks_english("")
