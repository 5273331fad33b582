"""Tokenise a domain once and keep the tokens in the cache."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import string
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gain_cl.config import schema
from gain_cl.domains import instruct
from gain_cl.domains.domain import ARRAYS, Domain
from gain_cl.domains.read import collect_documents, pin_domain, unread
from gain_cl.domains.text import plain
from gain_cl.errors import DataError, StorageError
from gain_cl.system import signals
from gain_cl.system.files import sha256
from gain_cl.system.hashes import cache_dir, file_sha256, json_sha256
from gain_cl.system.sealed import read_sealed, write_sealed

FORMAT = 6  # of the token cache
BATCH = 256  # documents that are tokenised at once
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]+")
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, kana, Han: no spaces between words."""
_WORD = re.compile(f"[{_SPACELESS}]|[^\\s{_SPACELESS}]+")


def prepare_domain(
    domain: schema.Domain,
    tokenizer: Any,
    tokenizer_hash: str,
    pinned: dict[str, Any] | None = None,
    prefix_id: int | None = None,
) -> Domain:
    """Return the domain, tokenised. It comes from the cache when the same text was tokenised by the
    same tokenizer before.

    tokenizer: a fast transformers tokenizer. tokenizer_hash: hash of its files. pinned: the
    domain's pin in the run id. prefix_id: the token before every text, which a chat template is not
    to repeat. DataError for bad text, or text that is not
    as pinned. StorageError when the cache cannot be written. PreemptedError between two batches.
    Processes may prepare the same domain at once: the first to finish wins.
    """
    found = pin_domain(domain)
    if pinned is not None and found != pinned:
        raise _changed(domain, "since the run began")
    identity: dict[str, Any] = {"format": FORMAT, "pin": found, "tokenizer": tokenizer_hash}
    chat = instruct.find_chat(domain, tokenizer, prefix_id)
    if chat is not None:
        special = dict(tokenizer.special_tokens_map)  # a template may name them
        identity["chat"] = {"template": chat.template, "special": special, "prefix": prefix_id}
    folder = cache_dir() / "tokens" / json_sha256(identity)[:32]
    loaded = _load_tokens(folder, domain, identity)
    if loaded is None:
        arrays, content = _tokenize_domain(domain, tokenizer, identity, chat)
        _save_tokens(folder, domain, identity, arrays, content)
        loaded = _load_tokens(folder, domain, identity)
    if loaded is None:
        do = "check the disk, delete the folder"
        raise StorageError("the token cache cannot be read back", str(folder), do)
    loaded.notes = unread(domain)
    return loaded


def in_token_cache(domain: schema.Domain) -> bool:
    """True if some tokenizer's tokens of this very text are in the cache. Its source may then be
    away."""
    meant = {"format": FORMAT, "pin": pin_domain(domain)}
    kept = map(read_sealed, (cache_dir() / "tokens").glob("*/meta.json"))
    return any(meta and {**meta["identity"], **meant} == meta["identity"] for meta in kept)


def _changed(domain: schema.Domain, when: str) -> DataError:
    """Return the error of text that changed."""
    where = getattr(domain.source, "path", f"domain {domain.name}")
    do = "leave the files alone while a run reads them, start again"
    return DataError(f"the text of {domain.name} changed {when}", where, do)


def _load_tokens(folder: Path, domain: schema.Domain, identity: dict[str, Any]) -> Domain | None:
    """Return the cached domain; None when there is none, or (with a warning) when its files are not
    what was written."""
    try:
        meta = read_sealed(folder / "meta.json")
        if meta is None or json_sha256(meta["identity"]) != json_sha256(identity):
            raise ValueError("meta.json changed")
        arrays = {}
        for name in ARRAYS:
            file = folder / f"{name}.npy"
            if file_sha256(file) != meta["sha256"][name]:
                raise ValueError(f"{file.name} changed")
            arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False)
        return Domain(domain.name, domain.split, meta["hash"], arrays)
    except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if (folder / "meta.json").exists():
            what = f"token cache of {domain.name} is damaged ({error}); tokenising again"
            print(f"warning: {what}", file=sys.stderr)
        return None


def _tokenize_domain(
    domain: schema.Domain,
    tokenizer: Any,
    identity: dict[str, Any],
    chat: instruct.Chat | None,
) -> tuple[dict[str, np.ndarray], str]:
    """Return the arrays of a domain and the hash (hex) of all that its tokens are made from."""
    texts = collect_documents(domain)
    if pin_domain(domain) != identity["pin"]:
        raise _changed(domain, "while it was read")
    kept: list[tuple[Any, ...]] = []
    content = hashlib.sha256(str(identity["tokenizer"]).encode())
    special = instruct.special_tokens(tokenizer)
    for start in range(0, len(texts), BATCH):
        signals.poll()
        batch = texts[start : start + BATCH]
        shown = [instruct.show(document, chat, special) for _, document in batch]
        for (key, document), coded in zip(batch, _code(shown, tokenizer, chat), strict=True):
            digest, *arrays = coded
            if arrays[-1].any():
                content.update(digest)
                kept.append((key[:16].encode(), *arrays, word_hashes(plain(document))))
    if not kept:
        do = "check the text and the tokenizer"
        raise DataError("no document has a token", f"domain {domain.name}", do)
    ids, *parts = zip(*kept, strict=True)
    named = dict(zip(("tokens", "ends", "scored", "words"), parts, strict=True))
    return {
        "ids": np.array(ids, dtype="S16"),
        "offsets": _offsets(named["tokens"]),
        "word_offsets": _offsets(named["words"]),
        **{name: np.concatenate(part) for name, part in named.items()},
    }, content.hexdigest()


def _save_tokens(
    folder: Path,
    domain: schema.Domain,
    identity: dict[str, Any],
    arrays: dict[str, np.ndarray],
    content: str,
) -> None:
    """Write the arrays of a domain into the cache, one process at a time; the first one's stay.
    What has no meta.json, which comes last, is not there. StorageError: the disk refuses."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir() / "tokens.lock"):
            if _load_tokens(folder, domain, identity) is None:
                shutil.rmtree(folder, ignore_errors=True)  # who has it open keeps it
                folder.mkdir()
                for name, array in arrays.items():
                    np.save(folder / f"{name}.npy", array, allow_pickle=False)
                hashes = {name: sha256(folder / f"{name}.npy") for name in arrays}
                meta = {"domain": domain.name, "hash": content, "sha256": hashes}
                write_sealed(folder / "meta.json", {**meta, "identity": identity})
    except OSError as error:
        do = "free space or set GAIN_CL_CACHE"
        raise StorageError(f"cannot write: {error.strerror or error}", str(folder), do) from error


def _offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return [n+1] int64: where each part begins in their concatenation, and its end."""
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)


def word_hashes(text: str) -> np.ndarray:
    """Return [n] uint32, a hash of each word. Words are those of lm-eval's decontamination: lower
    case, ASCII punctuation deleted, cut at white space. In scripts without spaces each sign is
    one."""
    found = _WORD.findall(_PUNCTUATION.sub("", text.lower()))
    return np.fromiter(map(_word_hash, found), np.uint32, len(found))


@functools.lru_cache(maxsize=1 << 20)  # a corpus repeats its words; the bound is about 150 MB
def _word_hash(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _code(
    shown: list[list[instruct.Piece]], tokenizer: Any, chat: instruct.Chat | None
) -> Iterator[tuple[bytes, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield a digest of all that a document's tokens are made from, and its tokens, ends and scored
    as in Doc. A first token that a template doubles is dropped."""
    coded = iter(tokenize([piece.text for pieces in shown for piece in pieces], tokenizer))
    for pieces in shown:
        parts = [next(coded) for _ in pieces]
        if chat is not None and parts[0][0][:1].tolist() == [chat.prefix_id]:
            parts[0] = parts[0][0][1:], parts[0][1][1:]
        sizes = [len(ids) for ids, _ in parts]
        tokens, stops = map(np.concatenate, zip(*parts, strict=True))
        known = np.array([(p.scored, p.first, p.last - p.first) for p in pieces])
        earlier = known[:, 2].cumsum() - known[:, 2]
        scored, first, own, before = np.repeat(np.c_[known, earlier], sizes, axis=0).T
        ends = np.clip(stops.astype(np.int64) - first, 0, own) + before
        digest = hashlib.sha256(pieces[0].text.encode()).hexdigest()
        if len(pieces) > 1:  # turns
            bounds = [edge for piece in pieces if piece.scored for edge in piece[2:]]
            digest = json_sha256([*(piece.text for piece in pieces), *bounds, *sizes[:-1]])
        yield bytes.fromhex(digest), tokens, ends.astype(np.uint32), scored.astype(bool)


def tokenize(
    texts: list[str], tokenizer: Any, special: bool = True
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (token ids, ends) of each text, uint32 [n] each, with no special token added; see Doc
    for ends. special: those written out in a text are control tokens, except in a text with BREAK.
    DataError: the tokenizer is not a fast one, which alone knows where a token ends."""
    if not getattr(tokenizer, "is_fast", False):
        what = f"{type(tokenizer).__name__} is not a fast tokenizer"
        raise DataError(what, "", "use a model with a tokenizer.json")
    out = []
    coded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=not special,
        return_offsets_mapping=True,
        verbose=False,
    )
    for text, ids, spans in zip(texts, coded["input_ids"], coded["offset_mapping"], strict=True):
        if instruct.BREAK in text:
            out.append(_spelt(text, tokenizer))
            continue
        stops = np.array([stop for _, stop in spans], dtype=np.int64)
        ends = np.maximum.accumulate(_byte_positions(text)[stops])
        if len(ends):
            ends[-1] = len(text.encode())  # some tokenizers drop trailing space
        out.append((np.array(ids, dtype=np.uint32), ends.astype(np.uint32)))
    return out


def _spelt(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return what ``tokenize`` does for a text with BREAK in special tokens that data writes out.
    Those that the template writes are found in it, and what is between them is only text."""
    parts, size = [], 0
    written = f"({instruct.special_tokens(tokenizer).pattern})"
    for number, part in enumerate(re.split(written, text)):
        part = part.replace(instruct.BREAK, "")
        ((ids, ends),) = tokenize([part], tokenizer, special=number % 2 == 1)
        parts.append((ids, ends + size))
        size += len(part.encode())
    tokens, places = map(np.concatenate, zip(*parts, strict=True))
    return tokens, places


def _byte_positions(text: str) -> np.ndarray:
    """Return [len(text) + 1], the UTF-8 bytes before each character."""
    data = np.frombuffer(text.encode(), np.uint8)
    return np.append(np.flatnonzero(data & 0xC0 != 0x80), len(data))  # 10xxxxxx begins none
