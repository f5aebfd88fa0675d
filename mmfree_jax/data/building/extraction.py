"""Finds paragraphs of running English in the files of packages: HTML, manuals, comments, dictionaries, descriptions."""

import functools
import gzip
import html
import json
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mmfree_jax.data.building.text import WORD, decode, looks_english, normalise

SHORTEST, LONGEST = 60, 6_000  # characters of a paragraph; longer ones are cut at ends of sentences
_CUT = 1_500  # characters of the parts of a paragraph that is too long
# Expressions instead of parsers: packages hold every dialect and much broken markup, which a parser would refuse. A
# paragraph that is cut wrongly does not read as prose and is left out (`is_prose`).
PDF_SECONDS = 3600  # a PDF takes seconds, and minutes where others use the machine; one that takes an hour hangs
_BLANK_LINE = re.compile(r"\n\s*\n")
_SPACES = re.compile(r"\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?]) ")

_HTML_COMMENT = re.compile(r"<!--.*?-->", re.S)
_HTML_HIDDEN = re.compile(r"<(script|style|head|nav|footer|svg|template|select|button|pre)\b.*?</\1\s*>", re.S | re.I)
_HTML_BLOCK = re.compile(
    r"</?(?:address|article|aside|blockquote|body|br|caption|center|dd|div|dl|dt|fieldset|figcaption|figure|h[1-6]|header|hr"
    r"|item|li|listitem|main|note|ol|p|para|section|table|tbody|td|th|tip|title|tr|ul|verse|chapter|lg)\b[^>]*>",
    re.I,
)
_HTML_TAG = re.compile(r"<[^<>]{0,2000}>")
_RST_LINE = re.compile(r"^\s*(?:\.\. |:[\w -]+:|\|)|^\s*[=\-~^\"`*+#]{3,}\s*$")
_RST_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
_COMMENT = re.compile(r"/\*(.*?)\*/|((?:^[ \t]*//[^\n]*\n)+)", re.S | re.M)
_COMMENT_EDGE = re.compile(r"^[ \t]*(?:\*+|//[/!]?)[ \t]?", re.M)
_ADA_COMMENT = re.compile(r"(?:^[ \t]*--[^\n]*\n)+", re.M)
_LICENCE_NOTE = re.compile(r"SPDX|[Cc]opyright|WARRANT|[Ll]icen[cs]ed? under|Redistribution and use")
_KCONFIG_HELP = re.compile(r"^\s+(?:---)?help(?:---)?\n((?:[ \t]+[^\n]*\n|\n)+)", re.M)
_POD_CODE = re.compile(r"[BCFILSX]<(?:[^<>|]*\|)?([^<>]*)>")
_MAN_INLINE = re.compile(r"\\f(?:\(..|\[[^\]]*\]|.)|\\s[-+]?\d|\\[&/,|^]|\\\[[^\]]*\]|\\\(..")
_TEXINFO_BRACES = re.compile(r"@\w+\{([^{}]*)\}")


def is_prose(paragraph: str) -> bool:
    """Tell whether a paragraph is running English: long, mostly letters, a fifth function words, few identifiers."""
    words = WORD.findall(paragraph)
    return (
        len(paragraph) >= SHORTEST
        and len(words) >= 9
        and len("".join(words)) <= 9 * len(words)
        and paragraph.count("_") + 2 * paragraph.count("::") <= 0.1 * len(words)
        and looks_english(paragraph, letters=0.8, stop_words=0.2)
    )


def _cut_long(paragraph: str) -> Iterator[str]:
    if len(paragraph) <= LONGEST:
        yield paragraph
        return
    # Cut at sentences, so that the parts are text that somebody could have written.
    part: list[str] = []
    size = 0
    for sentence in _SENTENCE_END.split(paragraph):
        part.append(sentence)
        size += len(sentence)
        if size >= _CUT:
            yield " ".join(part)
            part, size = [], 0
    yield " ".join(part)


def prose(blocks: Iterable[str]) -> list[str]:
    """Return the blocks that are prose, each on one line; cut those that are too long."""
    lines = (_SPACES.sub(" ", normalise(block)).strip() for block in blocks)
    return [part for line in lines if len(line) >= SHORTEST for part in _cut_long(line) if is_prose(part)]


def from_html(text: str) -> Iterator[str]:
    """Yield blocks of HTML, XHTML, DocBook or OSIS; scripts, navigation and listings are left out."""
    text = _HTML_HIDDEN.sub("\n\n", _HTML_COMMENT.sub(" ", text)).replace("\n", " ")
    text = _HTML_TAG.sub("", _HTML_BLOCK.sub("\n\n", text))
    yield from html.unescape(text).split("\n\n")


def from_rst(text: str) -> Iterator[str]:
    """Yield paragraphs of reStructuredText, without directives, fields and literal blocks."""
    for block in _BLANK_LINE.split(text):
        # Indented blocks are listings, unless they begin with a capital: then they are the body of a directive.
        if not re.match(r"(?: {4}|\t)(?!\s*[A-Z])", block):
            lines = [line for line in block.split("\n") if not _RST_LINE.match(line)]
            yield _RST_ROLE.sub(r"\1", " ".join(lines)).replace("``", "").replace("`", "")


def from_pod(text: str) -> Iterator[str]:
    """Yield paragraphs of Perl documentation."""
    inside = True
    for block in _BLANK_LINE.split(text):
        if block.startswith("="):
            inside = not block.startswith("=cut")
        elif inside and not block.startswith((" ", "\t")):
            yield _POD_CODE.sub(r"\1", _POD_CODE.sub(r"\1", block))


def from_man(text: str) -> Iterator[str]:
    """Yield paragraphs of a manual page in troff."""
    held: list[str] = []
    verbatim = False
    for line in text.split("\n"):
        macro = re.match(r"[.']\s*(\S*)\s*(.*)", line)
        name, rest = macro.groups() if macro else ("", line)
        verbatim = (verbatim or name in ("nf", "EX")) and name not in ("fi", "EE")
        if verbatim or name.startswith('\\"'):
            continue
        # Macros that change the font are part of a sentence; all others end the paragraph.
        if macro and name not in ("B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "Xr", "Ar", "Fl", "Em", "Pa", "Nm"):
            yield " ".join(held)
            held = []
        else:
            held.append(rest.replace('"', ""))
    yield " ".join(held)


def from_texinfo(text: str) -> Iterator[str]:
    """Yield paragraphs of Texinfo."""
    text = re.sub(r"^@(?!itemx?\b).*$", "", text, flags=re.M)
    # Commands such as @code{x} stand for their argument; line commands such as @node are not text.
    for _ in range(3):  # braces inside braces
        text = _TEXINFO_BRACES.sub(r"\1", text)
    yield from _BLANK_LINE.split(re.sub(r"@itemx? ?", "", text).replace("@@", "@"))


def from_source(text: str, language: str) -> Iterator[str]:
    """Yield paragraphs of the comments in "c" and its relatives or "ada", without licence headers; of help texts in
    "kconfig"; of entries in a GNU "changelog"."""
    if language == "c":
        found = [_COMMENT_EDGE.sub("", m.group(1) or m.group(2) or "") for m in _COMMENT.finditer(text)]
    elif language == "ada":
        marks = re.compile(r"^[ \t]*-+ ?|-+[ \t]*$", re.M)
        found = [marks.sub("", match.group()) for match in _ADA_COMMENT.finditer(text)]
    elif language == "kconfig":
        found = [match.group(1) for match in _KCONFIG_HELP.finditer(text)]
    else:
        found = [re.sub(r"^\s*\* ", "", block) for block in _BLANK_LINE.split(text.replace("\n\t", "\n"))]
    for comment in found:
        if language in ("kconfig", "changelog") or not _LICENCE_NOTE.search(comment, 0, 2_000):
            yield from _BLANK_LINE.split(comment)


def _strings(value: Any, keys: tuple[str, ...]) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str) and key in keys:
                yield inner
            else:
                yield from _strings(inner, keys)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, keys)


def from_api_description(text: str) -> Iterator[str]:
    """Yield the descriptions in a machine-readable API description (JSON), which may hold HTML."""
    for description in _strings(json.loads(text), ("documentation", "description")):
        yield from from_html(description)


def from_pdf(data: bytes) -> Iterator[str]:
    """Yield paragraphs of a PDF, by `pdftotext`. Raises FileNotFoundError when that program is missing."""
    with tempfile.NamedTemporaryFile(suffix=".pdf") as file:
        file.write(data)
        file.flush()
        command = ["pdftotext", "-q", "-enc", "UTF-8", file.name, "-"]  # fails on damaged PDFs
        done = subprocess.run(command, capture_output=True, timeout=PDF_SECONDS, check=False)
    text = re.sub(r"(\w)-\n(\w)", r"\1\2", decode(done.stdout).replace("\f", "\n\n"))
    yield from _BLANK_LINE.split(text)


def from_sword(files: Mapping[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, paragraphs) of each block of a SWORD module: (offset, size, full size) into zlib streams."""
    for name in sorted(files):
        if name.endswith((".bzs", ".czs", ".vzs")):
            for number, (offset, size, _) in enumerate(struct.iter_unpack("<III", files[name])):
                packed = files[name[:-1] + "z"][offset : offset + size]
                if packed:
                    block = decode(zlib.decompress(packed)).replace("</verse>", "\n\n<p>")
                    yield f"{name}#{number}", prose(from_html(block))


_BY_ENDING: dict[str, Callable[[str], Iterable[str]]] = {
    **dict.fromkeys((".html", ".htm", ".xhtml", ".page", ".xhp", ".docbook"), from_html),
    **dict.fromkeys((".rst", ".rst.txt"), from_rst),
    **dict.fromkeys((".txt", ".md", ".org", ".info", ".dict"), _BLANK_LINE.split),
    **dict.fromkeys((".texi", ".texinfo"), from_texinfo),
    ".pod": from_pod,
}
_COMMENTED: dict[str, Callable[[str], Iterable[str]]] = {
    **dict.fromkeys(
        (".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".go", ".rs", ".js", ".ts", ".s", ".dts"),
        functools.partial(from_source, language="c"),
    ),
    **dict.fromkeys((".adb", ".ads"), functools.partial(from_source, language="ada")),
}


def _reader(name: str, comments: bool) -> Callable[[str], Iterable[str]] | None:
    base = name.rsplit("/", 1)[-1].lower()
    if re.search(r"/man/man\d/", name):
        return from_man
    if comments and base.startswith("kconfig"):
        return functools.partial(from_source, language="kconfig")
    if comments and base.startswith("changelog"):
        return functools.partial(from_source, language="changelog")
    if ("/botocore/data/" in name and base == "service-2.json") or "/discovery_cache/documents/" in name:
        return from_api_description
    # Comments of code are read only where a source is known for comments that explain (`Source.comments`).
    readers = _BY_ENDING | (_COMMENTED if comments else {})
    return next((reader for ending, reader in readers.items() if base.endswith(ending)), None)


def paragraphs_of(name: str, data: bytes, *, comments: bool = False, pdf: bool = False) -> list[str]:
    """Return the prose of one file, read as its name says; [] for kinds of files that hold none.

    comments: read the comments of source code too; pdf: read PDFs. Compressed files (.gz, .dz) are opened.
    """
    if name.endswith((".gz", ".dz")):
        name, data = name[:-3], gzip.decompress(data)
    if pdf and name.endswith(".pdf"):
        return prose(from_pdf(data))
    reader = _reader(name, comments)
    return prose(reader(decode(data))) if reader else []
