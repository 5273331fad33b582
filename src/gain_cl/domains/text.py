"""Decode, normalise and hash text, and strip its markup: pure functions without I/O."""

from __future__ import annotations

import functools
import hashlib
import html
import re
import unicodedata
from typing import NamedTuple

from gain_cl.errors import DataError


class Turn(NamedTuple):
    """What one side of a conversation says. The assistant's turns are trained on and scored, no
    others."""

    role: str
    content: str


Document = str | tuple[Turn, ...]
PAIR = ("user", "assistant")
"""The roles of a prompt and its completion."""


_SPACES = re.compile(r"\s+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ufeff\ufffd]")


def decode(data: bytes, where: str) -> str:
    """Return UTF-8 data as text, without a byte-order mark. DataError: it is something else. The
    message names the byte and its offset."""
    do = "convert the file to UTF-8 text (iconv -f UTF-16, if it is UTF-16); unpack what is packed"
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        what = f"byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8"
        raise DataError(what, where, do) from None
    if "\0" in text:
        raise DataError(f"NUL byte at offset {data.index(0)}: not UTF-8 text", where, do)
    return text.removeprefix("\ufeff")


def joined(first: str, second: str) -> str:
    """Return two texts as they stand without a chat template: a line end between them, unless
    white space is there already."""
    apart = not first or first[-1:].isspace() or second[:1].isspace()
    return first + ("" if apart else "\n") + second


def plain(document: Document) -> str:
    """Return the text of a document, its turns as one."""
    if isinstance(document, str):
        return document
    return functools.reduce(joined, (turn.content for turn in document))


def require_text(text: object, where: str, limit: int | None = None, what: str = "text") -> str:
    """Return ``text`` itself. DataError: it is no string, cannot be encoded, or is over ``limit``
    UTF-8 bytes."""
    if not isinstance(text, str):
        is_a = f"the {what} is a {type(text).__name__}, not a string"
        raise DataError(is_a, where, "name another field or fix the data (turns: source.messages)")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        lone = f"unpaired surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        raise DataError(lone, where, "fix the data") from None
    if limit is not None and size > limit:
        long = f"a document of {size:,} bytes exceeds max_document_bytes={limit:,}"
        raise DataError(long, where, "split it or raise max_document_bytes")
    return text


def text_hash(text: str) -> str:
    """Return the SHA-256 (hex) of the text in NFKC, lower case, single spaces. It is equal for
    texts that differ in layout only.

    It names a document, drops exact duplicates and decides the split.
    """
    normal = _SPACES.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return hashlib.sha256(normal.encode()).hexdigest()


def document_hash(document: Document) -> str:
    """Return the text_hash of plain text, and of turns the SHA-256 (hex) of those of their
    contents, whatever template shows them. Roles count where they are not a prompt's and its
    completion's."""
    if isinstance(document, str):
        return text_hash(document)
    roles, contents = zip(*document, strict=True)
    parts = [*(() if roles == PAIR else roles), *map(text_hash, contents)]
    return hashlib.sha256(":".join(parts).encode()).hexdigest()


def unix_lines(text: str) -> str:
    """Return the text with Unix line ends and no other change: a user's text is not ours to
    clean."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def clean_text(text: str, blank_lines: int = 1) -> str:
    """Return the text with Unix line ends, without control characters and trailing spaces, with at
    most ``blank_lines`` blank lines in a row."""
    text = _CONTROL.sub("", unix_lines(text)).replace("\xa0", " ")
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(rf"\n{{{blank_lines + 2},}}", "\n" * (blank_lines + 1), text).strip()


def strip_html(text: str) -> str:
    """Return the plain text of an HTML fragment: tags go, breaks and paragraphs become line ends,
    entities become characters."""
    text = re.sub(r"(?i)<\s*(br|/p|/li|/div|/tr)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^<>]*>", "", text))
    lines = (_SPACES.sub(" ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def _drop_nested(text: str, opening: str, closing: str) -> str:
    """Return the text without balanced ``opening`` ... ``closing`` pairs and what they hold, the
    innermost first. Of an unbalanced mark only the mark goes."""
    mark = f"{re.escape(opening)}|{re.escape(closing)}"
    pair = f"(?s){re.escape(opening)}(?:(?!{mark}).)*{re.escape(closing)}"
    found = 1
    while found:
        text, found = re.subn(pair, "", text)
    return re.sub(mark, "", text)


_LINK_SECTIONS = (
    "See also|References|External links|Further reading|Notes|Bibliography|Footnotes|Sources"
)
_MARKUP = (
    ("(?s)<!--.*?-->", ""),
    (r"(?is)<ref\b[^<>]*?/>", ""),
    (
        r"(?is)<(ref|math|gallery|timeline|score|syntaxhighlight|source|code|pre|imagemap|chem)\b"
        r"[^<>]*>.*?</\1\s*>",
        "",
    ),
    # Templates that carry words of the sentence: {{convert|99|lb|...}}, {{lang|es|adobe}},
    # {{nowrap|...}}.
    (r"(?i)\{\{\s*(?:convert|cvt)\s*\|([^|{}]*)\|([^|{}]*)(?:\|[^{}]*)?\}\}", r"\1 \2"),
    (
        r"(?i)\{\{\s*(?:lang\s*\|[^|{}]*|nowrap|nobr|transl\s*\|[^|{}]*|lang-\w+)\s*\|([^|{}]*)"
        r"(?:\|[^{}]*)?\}\}",
        r"\1",
    ),
)
"""(pattern, what it becomes), in this order."""
_LINK = re.compile(
    r"\[\[(?![^\[\]]*?(?:File|Image|Category|[a-z-]{2,12}):)(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]"
)


def strip_wikitext(text: str) -> str:
    """Return the readable paragraphs of MediaWiki markup, without templates, tables, references,
    files, categories and lists of links."""
    text = html.unescape(text)
    for pattern, by in _MARKUP:
        text = re.sub(pattern, by, text)
    text = _drop_nested(text, "{{", "}}")
    text = _drop_nested(text, "{|", "|}")
    # Files and categories hold links themselves: the innermost links are resolved first, then the
    # rest goes.
    for _ in range(4):
        text = _LINK.sub(r"\1", text)
    text = _drop_nested(text, "[[", "]]")
    text = re.sub(r"\[(?:https?:)?//\S+[^\S\n]*([^\]\n]*)\]?", r"\1", text)
    text = re.sub(r"__[A-Z]+__", "", re.sub(r"'{2,}", "", re.sub("<[^<>]*>", "", text)))
    blocks: list[tuple[int, str]] = []  # (level of a heading or 0, text)
    for line in text.split("\n"):
        line = _SPACES.sub(" ", line).strip()
        heading = re.fullmatch(r"(={2,6})\s*(.*?)\s*\1", line)
        if heading and re.fullmatch(_LINK_SECTIONS, heading[2]):
            break  # nothing but lists until the end of the article
        level = len(heading[1]) if heading else 0
        if level or (len(line) > 40 and not re.match(r"[*#:;|!{}]|(File|Image|Category):", line)):
            if level:  # a heading with nothing beneath it says nothing
                while blocks and blocks[-1][0] >= level:
                    blocks.pop()
            # Brackets that a template left empty go.
            line = re.sub(r"\([\s,;:]*\)", "", heading[2] if heading else line)
            line = re.sub(r"[\s,;:]+\)", ")", re.sub(r"\([\s,;:]+", "(", line))
            blocks.append((level, re.sub(r"\s+([,.;:)])", r"\1", _SPACES.sub(" ", line))))
    while blocks and blocks[-1][0]:
        blocks.pop()
    return clean_text("\n\n".join(block for _, block in blocks))
