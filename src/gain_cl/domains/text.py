"""Small, pure functions on text: decode, normalise, strip markup. No I/O, no torch."""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from typing import NamedTuple

from gain_cl.errors import DataError


class Pair(NamedTuple):
    """A document of instruction data, of which the completion alone is trained on and scored."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """Both, joined as ``joint`` says."""
        return self.prompt + joint(self) + self.completion


Document = str | Pair


_SPACES = re.compile(r"\s+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ufeff\ufffd]")


def decode(data: bytes, where: str) -> str:
    """UTF-8 text, without a byte-order mark. DataError naming the byte and its offset, or what the
    file really is."""
    if data[:2] == b"\x1f\x8b":
        raise DataError(
            "this is gzip data, not text",
            where,
            "unpack it, or name it .jsonl.gz if it is JSON lines",
        )
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(
            "the text is UTF-16, not UTF-8", where, "convert it: iconv -f UTF-16 -t UTF-8"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if data[:3] == b"\xef\xbb\xbf" else 0)
        raise DataError(
            f"byte 0x{data[offset]:02x} at offset {offset} is not UTF-8",
            where,
            "convert the file to UTF-8",
        ) from None
    if "\0" in text:
        raise DataError(
            f"NUL byte at offset {data.index(0)}: UTF-16 or binary data",
            where,
            "convert the file to UTF-8 text",
        ) from None
    return text


def joint(pair: Pair) -> str:
    """What stands between prompt and completion without a chat template: a line end, unless white
    space is there already."""
    return "" if pair.prompt[-1:].isspace() or pair.completion[:1].isspace() else "\n"


def plain(document: Document) -> str:
    """The text of a document, prompt and completion as one."""
    return document if isinstance(document, str) else document.text


def require_text(text: object, where: str, limit: int | None = None, what: str = "text") -> str:
    """``text`` itself when it can be encoded and is not over ``limit`` UTF-8 bytes; DataError
    otherwise."""
    if not isinstance(text, str):
        raise DataError(
            f"the {what} is a {type(text).__name__}, not a string",
            where,
            "name another field or fix the data",
        )
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(
            f"unpaired surrogate U+{code:04X} at character {error.start}", where, "fix the data"
        ) from None
    if limit is not None and size > limit:
        raise DataError(
            f"a document of {size:,} bytes exceeds max_document_bytes={limit:,}",
            where,
            "split it or raise max_document_bytes",
        )
    return text


def text_hash(text: str) -> str:
    """SHA-256 (hex) of the text in NFKC, lower case, single spaces: equal for texts that differ in
    layout only.

    It names a document, drops exact duplicates and decides its split.
    """
    normal = _SPACES.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return hashlib.sha256(normal.encode()).hexdigest()


def document_hash(document: Document) -> str:
    """The text_hash of plain text; of a pair the SHA-256 (hex) of those of prompt and completion,
    whatever template shows them."""
    if isinstance(document, str):
        return text_hash(document)
    return hashlib.sha256(
        f"{text_hash(document.prompt)}:{text_hash(document.completion)}".encode()
    ).hexdigest()


def tidy(text: str, blank_lines: int = 1) -> str:
    """Unix line ends, no control characters, no trailing spaces, at most ``blank_lines`` blank
    lines in a row."""
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).replace("\xa0", " ")
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(rf"\n{{{blank_lines + 2},}}", "\n" * (blank_lines + 1), text).strip()


def strip_html(text: str) -> str:
    """Plain text of an HTML fragment: tags go, breaks and paragraphs become line ends, entities
    become characters."""
    text = re.sub(r"(?i)<\s*(br|/p|/li|/div|/tr)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^<>]*>", "", text))
    lines = (_SPACES.sub(" ", line).strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def _drop_nested(text: str, opening: str, closing: str) -> str:
    """Remove balanced ``opening`` ... ``closing`` pairs with what they hold; of an unbalanced mark
    only the mark goes."""
    marks = re.compile(f"{re.escape(opening)}|{re.escape(closing)}")
    begun: list[int] = []
    pairs: list[tuple[int, int]] = []
    for mark in marks.finditer(text):
        if mark[0] == opening:
            begun.append(mark.start())
        elif begun:
            start = begun.pop()
            while pairs and pairs[-1][0] > start:  # pairs within this one
                pairs.pop()
            pairs.append((start, mark.end()))
    kept, position = [], 0
    for start, stop in pairs:
        kept.append(text[position:start])
        position = stop
    return marks.sub("", "".join([*kept, text[position:]]))


_LINK_SECTIONS = {
    "See also",
    "References",
    "External links",
    "Further reading",
    "Notes",
    "Bibliography",
    "Footnotes",
    "Sources",
}


def strip_wikitext(text: str) -> str:
    """Readable paragraphs of MediaWiki markup: no templates, tables, references, files, categories,
    lists of links."""
    text = re.sub(r"<!--.*?-->", "", html.unescape(text), flags=re.DOTALL)
    text = re.sub(r"(?is)<ref\b[^<>]*?/>", "", text)
    text = re.sub(
        r"(?is)<(ref|math|gallery|timeline|score|syntaxhighlight|source|code|pre|imagemap|chem)\b[^<>]*>.*?</\1\s*>",
        "",
        text,
    )
    # Templates that carry words of the sentence: {{convert|99|lb|...}}, {{lang|es|adobe}},
    # {{nowrap|...}}.
    text = re.sub(
        r"(?i)\{\{\s*(?:convert|cvt)\s*\|([^|{}]*)\|([^|{}]*)(?:\|[^{}]*)?\}\}", r"\1 \2", text
    )
    text = re.sub(
        r"(?i)\{\{\s*(?:lang\s*\|[^|{}]*|nowrap|nobr|transl\s*\|[^|{}]*|lang-\w+)\s*\|([^|{}]*)(?:\|[^{}]*)?\}\}",
        r"\1",
        text,
    )
    text = _drop_nested(text, "{{", "}}")
    text = _drop_nested(text, "{|", "|}")
    # Files and categories hold links themselves: the innermost links are resolved first, then the
    # rest goes.
    link = re.compile(
        r"\[\[(?![^\[\]]*?(?:File|Image|Category|[a-z-]{2,12}):)(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]"
    )
    for _ in range(4):
        text = link.sub(r"\1", text)
    text = _drop_nested(text, "[[", "]]")
    text = re.sub(r"\[(?:https?:)?//\S+[^\S\n]*([^\]\n]*)\]?", r"\1", text)
    text = re.sub(r"<[^<>]*>", "", text)
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"__[A-Z]+__", "", text)
    blocks: list[tuple[int, str]] = []  # (level of a heading or 0, text)
    for line in text.split("\n"):
        line = _SPACES.sub(" ", line).strip()
        heading = re.fullmatch(r"(={2,6})\s*(.*?)\s*\1", line)
        if heading and heading[2] in _LINK_SECTIONS:
            break  # nothing but lists until the end of the article
        level = len(heading[1]) if heading else 0
        if level or (len(line) > 40 and not re.match(r"[*#:;|!{}]|(File|Image|Category):", line)):
            if level:  # a heading with nothing beneath it says nothing
                while blocks and blocks[-1][0] >= level:
                    blocks.pop()
            line = re.sub(
                r"\([\s,;:]*\)", "", heading[2] if heading else line
            )  # brackets a template left empty
            line = re.sub(r"[\s,;:]+\)", ")", re.sub(r"\([\s,;:]+", "(", line))
            blocks.append((level, re.sub(r"\s+([,.;:)])", r"\1", _SPACES.sub(" ", line))))
    while blocks and blocks[-1][0]:
        blocks.pop()
    return tidy("\n\n".join(block for _, block in blocks))
