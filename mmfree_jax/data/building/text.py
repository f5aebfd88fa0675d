"""Pure functions that clean and classify text, shared by all corpus builders."""

import re
import unicodedata

# Function words of running English: prose has 30-50 % of them, API reference 10-30 %, tables and listings almost none.
STOP_WORDS = frozenset(
    "the of and to in a is that for it as be on with are this by or not can if an from at which will you was "
    "have has but when all one use used no may their they its what so up out were more other do any your some "
    "than into only must should does these each between such then there where how we".split()
)
_NOT_TEXT = re.compile(r"[\ud800-\udfff]")  # surrogates: bytes that are not UTF-8, and unpaired ones in JSON
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b\ufeff\ufffe\uffff]")
_TRAILING_SPACE = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n\s*?(?=[ \t]*\S)")
WORD = re.compile(r"[A-Za-z']+")


def decode(data: bytes) -> str:
    """Decode UTF-8. A byte-order mark is dropped, and bytes that are not UTF-8 become U+FFFD."""
    return data.decode("utf-8-sig", "replace")


def repair(data: bytes | str) -> tuple[str, int]:
    """Return the text, with U+FFFD for what is not UTF-8, and the number of wrong characters.

    data: bytes, or text that was read with `surrogateescape`. NUL bytes stay, but count as wrong: no text file has any,
    unless it is UTF-16 without a mark.
    """
    text = data.decode("utf-8-sig", "surrogateescape") if isinstance(data, bytes) else data
    nuls = data.count(b"\0") if isinstance(data, bytes) else 0
    try:
        text.encode()
        return text, nuls
    except UnicodeEncodeError:
        text, replaced = _NOT_TEXT.subn("\ufffd", text)
        return text, nuls + replaced


def normalise(text: str) -> str:
    """Return a canonical form: NFC, `\\n` line ends, no control characters or trailing space, one blank line at
    most."""
    # One form of what looks the same, or duplicates would differ in characters that nobody sees.
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = _CONTROL.sub("", text)
    text = _TRAILING_SPACE.sub("", text.expandtabs(4) if "\t" in text else text)
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


def paragraphs(text: str) -> list[str]:
    """Return the blocks of `text` between blank lines, with their indentation."""
    return [block for block in _PARAGRAPH_BREAK.split(text) if block.strip()]


def looks_english(text: str, *, letters: float = 0.6, stop_words: float = 0.1) -> bool:
    """Return whether `text` is English, possibly with code in it, and not a table, data or another language.

    letters: least share of the characters that are ASCII letters or white space. stop_words: least share of the words
    that are English function words.
    """
    words = WORD.findall(text)
    plain = len("".join(words)) + text.count(" ") + text.count("\n")
    function_words = sum(map(STOP_WORDS.__contains__, map(str.lower, words)))
    return plain / max(len(text), 1) >= letters and function_words / max(len(words), 1) >= stop_words
