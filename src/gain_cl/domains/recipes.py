"""Cut the documents of a package domain out of its archive: one function a recipe, see RECIPES.

A recipe takes (name, content) pairs sorted by name and yields clean documents. Those under
MIN_CHARACTERS are dropped later. Its version is part of the run id: raise it when the text changes.
A document is the natural unit: an article, a law, a chapter.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zipfile
from bz2 import decompress as bunzip2
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from xml.etree import ElementTree

from gain_cl.domains.text import clean_text, strip_html, strip_wikitext

Members = Iterable[tuple[str, bytes]]
MIN_CHARACTERS = 200


def request_docs(members: Members) -> Iterator[dict[str, Any]]:
    """Yield the ``doc`` of each line of gzipped JSON lines (several lines share one)."""
    for _, data in members:
        for line in gzip.decompress(data).splitlines():
            yield json.loads(line)["doc"]


def medicine(members: Members) -> Iterator[str]:
    """Yield contexts of biomedical yes/no questions. Snippets repeat within and across contexts: a
    line counts once."""
    seen: set[str] = set()
    for context in dict.fromkeys(doc["context"] for doc in request_docs(members)):
        lines = []
        for line in re.sub(r"<[^<>\n]{1,20}>", " ", context).split("\n"):
            key = re.sub(r"[^a-z0-9]", "", line.lower())
            if len(line := " ".join(line.split())) >= 60 and key not in seen:
                lines.append(line)
                seen.add(key)
        yield clean_text("\n".join(lines))


def law(members: Members) -> Iterator[str]:
    """Yield licences and contracts in English, 1.2-60 kB. A text of which 35% of the 12-word
    shingles were seen is a variant and is left out."""
    seen: set[int] = set()
    for _, data in members:
        text = data.decode(errors="replace").replace("\r\n", "\n")
        if front := re.match(r"(?s)---\n(.*?)\n---\n", text):
            if re.search(r"(?m)^language:(?!\s*en\s*$)", front[1]):
                continue
            text = text[front.end() :]
        # Without comment frames and rules.
        bare = (re.sub(r"^[ \t*#=_/+|-]+|[ \t*#=_+|-]+$", "", line) for line in text.split("\n"))
        text = clean_text("\n".join(" ".join(line.split()) for line in bare))
        ascii_share = len(text.encode("ascii", "ignore")) / max(1, len(text))
        if not 1200 <= len(text.encode()) <= 60_000 or ascii_share < 0.97:
            continue
        words = re.findall(r"[a-z0-9]+", text.lower())
        # Their hashes are enough, whatever the seed of hash: two would have to collide.
        shingles = set(map(hash, zip(*(words[k:] for k in range(12)), strict=False)))
        if len(shingles & seen) > 0.35 * len(shingles):
            continue
        seen |= shingles
        yield text


def code(members: Members) -> Iterator[str]:
    """Yield Python files of a library, without migrations, locale tables and one-line modules."""
    for name, data in members:
        if re.search(r"/(locale|migrations)/", name):
            continue
        yield clean_text(data.decode(), blank_lines=2)


def maths(members: Members) -> Iterator[str]:
    """Yield competition problems with their solutions."""
    problems: dict[str, str] = {}
    for doc in request_docs(members):
        problems.setdefault(doc["problem"].strip(), doc["solution"].strip())
    for both in problems.items():  # without drawings as program text
        problem, solution = (re.sub(r"(?s)\[asy\].*?\[/asy\]", "", t).strip() for t in both)
        yield clean_text(f"Problem. {problem}\n\nSolution. {solution}")


def news(members: Members) -> Iterator[str]:
    """Yield articles: headline and paragraphs."""
    for _, data in members:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode("cp1252", errors="ignore")
        yield clean_text(re.sub(r"[ \t]{2,}|\t", " ", text))


_HOLES = re.compile(r"INLINEFORM\d+|DISPLAYFORM\d+|\$\$|\{[\w., ]+\}@|@\w+\.\w")
_CITATIONS = re.compile(r"\s*\(?\s*(?:BIBREF\d+(?:\s*[,;]\s*)?)+\s*\)?")
_NOUNS = {"SEC": "the section", "FIG": "the figure", "TAB": "the table", "EQ": "the equation"}
_REFERENCES = re.compile(
    r"(?i)(?:\b(Sections?|Figures?|Fig\.?|Tables?|Equations?|Eq\.?|Appendix|Algorithm)\s+)?"
    r"(SEC|FIG|TAB|EQ)REF\d+"
)


def science(members: Members) -> Iterator[str]:
    """Yield research papers: title, abstract, sections. Paragraphs with formula placeholders or
    author addresses are left out."""
    papers = {doc["title"]: doc for doc in request_docs(members)}
    for title, doc in papers.items():
        parts = [title, _paper_paragraph(doc["abstract"])]
        full = doc["full_text"]
        for heading, paragraphs in zip(full["section_name"], full["paragraphs"], strict=True):
            if re.match("(?i)acknowledg", heading or ""):
                continue
            whole = (p for p in paragraphs if len(p) >= 80 and not _HOLES.search(p))
            kept = [p for p in map(_paper_paragraph, whole) if p[:200] != doc["abstract"][:200]]
            if kept:
                parts += [_paper_paragraph((heading or "").split(":::")[-1]), *kept]
        yield clean_text("\n\n".join(" ".join(p.split()) for p in parts if p.strip()))


def _paper_paragraph(text: str) -> str:
    """Return a paragraph without the marks that stand for citations. References to numbered parts
    lose the number."""
    text = re.sub("@!(START|END)@", "", text)
    text = _CITATIONS.sub(lambda m: " " if m[0].endswith(" ") else "", text)
    text = _REFERENCES.sub(lambda m: m[1] or _NOUNS[m[2].upper()], text)
    return re.sub(r"\s+([,.;:)])", r"\1", text)


def politics(members: Members) -> Iterator[str]:
    """Yield speeches, without the note on the occasion that some begin with."""
    for _, data in members:
        yield clean_text(re.sub(r"^\s*\[[^\[\]]*\]\s*", "", data.decode()))


def scripture(members: Members) -> Iterator[str]:
    """Yield chapters of the King James Bible: the first triple-quoted string of a module that is
    read, not imported."""
    for _, data in members:
        # A number, a point and a space start a verse; numbers within verses are spelt out.
        shape = r"(?s)(?:^|(?<=\s))(\d{1,3})\. (.*?)(?=\s\d{1,3}\. |\Z)"
        found = re.findall(shape, re.sub(r"[\[\]]", "", data.decode().split('"""')[1]))
        verses = "\n".join(f"{number}. {' '.join(verse.split())}" for number, verse in found)
        yield from map(clean_text, re.split(r"\n(?=1\. )", verses))


def geography(members: Members) -> Iterator[str]:
    """Yield a text for each country or territory: "Field: text" lines under the section names."""
    for _, data in members:
        country = json.loads(data)
        named = country.get("Government", {}).get("Country name", {})
        name = strip_html(named.get("conventional short form", {}).get("text", "none"))
        lines = [] if name == "none" else [name, ""]
        for section, fields in country.items():
            told = [
                f"{field.strip()}: {text}" for field, v in fields.items() if (text := _field(v))
            ]
            lines += [section, *told, ""] if told else []
        yield clean_text("\n".join(lines))


def _field(value: Any) -> str:
    """Return the text of a fact and of the facts within it."""
    if isinstance(value, str):
        return strip_html(value)
    if not isinstance(value, dict):
        return ""
    told = ((key.strip(), _field(inner)) for key, inner in value.items())
    return "; ".join(text if key == "text" else f"{key}: {text}" for key, text in told if text)


def neutral(members: Members) -> Iterator[str]:
    """Yield news of 2016-17 and speeches of the House of Commons from zipped CSV tables. Rows in
    which lost characters became "?" are left out."""
    for name, data in members:
        if not re.search(r"/(NewsArticles|parlspeech[^/]*)\.zip$", name):
            continue
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            table = packed.read(packed.infolist()[0]).decode(errors="replace")
        for row in csv.DictReader(io.StringIO(table)):
            text = f"{row['title']}\n\n{row['text']}" if "title" in row else row["text"]
            if "\ufffd" not in text and not re.search(r'[a-z"]\?[A-Za-z]|\?\?', text):
                yield clean_text(text)


def encyclopedia(members: Members) -> Iterator[str]:
    """Yield articles of a MediaWiki dump (bzip2 XML), without redirects."""
    for _, data in members:
        for page in ElementTree.fromstring(bunzip2(data)).iterfind("{*}page"):
            title, text = page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
            if page.find("{*}redirect") is None and page.findtext("{*}ns") == "0":
                yield clean_text(f"{title}\n\n{strip_wikitext(text)}")


Recipe = Callable[[Members], Iterator[str]]
VERSIONS: dict[Recipe, int] = {
    medicine: 2,
    law: 2,
    code: 1,
    maths: 1,
    news: 1,
    science: 2,
    politics: 1,
    scripture: 1,
    geography: 1,
    encyclopedia: 2,
    neutral: 1,
}
RECIPES = {recipe.__name__: (recipe, version) for recipe, version in VERSIONS.items()}
