"""Tokenise a domain once and keep the tokens in the cache."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gain_cl.config import schema
from gain_cl.domains import instruct
from gain_cl.domains.domain import ARRAYS, Domain
from gain_cl.domains.read import collect_documents, pin_domain
from gain_cl.domains.text import Document, plain
from gain_cl.errors import DataError, StorageError
from gain_cl.system import signals
from gain_cl.system.files import sha256
from gain_cl.system.hashes import cache_dir, file_sha256, json_sha256
from gain_cl.system.sealed import read_sealed, write_sealed

FORMAT = 5  # of the token cache
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
    to repeat (None: the tokenizer's bos, else its end). DataError for bad text, or text that is not
    as pinned. StorageError when the cache cannot be written. PreemptedError between two batches.
    Processes may prepare the same domain at once: the first to finish wins.
    """
    found = pin_domain(domain)
    if pinned is not None and found != pinned:
        raise _changed(domain, "since the run began")
    identity: dict[str, Any] = {"format": FORMAT, "pin": found, "tokenizer": tokenizer_hash}
    chat = instruct.find_chat(domain, tokenizer, prefix_id)
    if chat is not None:
        what = {"template": chat.template, "special": chat.special, "prefix": chat.prefix_id}
        identity["chat"] = what
    folder = cache_dir() / "tokens" / json_sha256(identity)[:32]
    loaded = _load_tokens(folder, domain, identity)
    if loaded is None:
        arrays, content = _tokenize_domain(domain, tokenizer, identity, chat)
        _save_tokens(folder, domain, identity, arrays, content)
        loaded = _load_tokens(folder, domain, identity)
    if loaded is None:
        do = "check the disk, delete the folder"
        raise StorageError("the token cache cannot be read back", str(folder), do)
    return loaded


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
    kept: list[tuple[bytes, _Coded, np.ndarray]] = []
    content = hashlib.sha256(str(identity["tokenizer"]).encode())
    for start in range(0, len(texts), BATCH):
        signals.poll()
        keys, batch = zip(*texts[start : start + BATCH], strict=True)
        for key, document, coded in zip(keys, batch, _code(batch, tokenizer, chat), strict=True):
            if len(coded.tokens) > coded.prompt:
                content.update(coded.digest)
                kept.append((key[:16].encode(), coded, word_hashes(plain(document))))
    if not kept:
        do = "check the text and the tokenizer"
        raise DataError("no document has a token", f"domain {domain.name}", do)
    ids, codes, words = zip(*kept, strict=True)
    tokens = [coded.tokens for coded in codes]
    arrays = {
        "ids": np.array(ids, dtype="S16"),
        "offsets": _offsets(tokens),
        "tokens": np.concatenate(tokens),
        "ends": np.concatenate([coded.ends for coded in codes]),
        "prompts": np.array([coded.prompt for coded in codes], dtype=np.uint32),
        "words": np.concatenate(words),
        "word_offsets": _offsets(words),
    }
    return arrays, content.hexdigest()


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


class _Coded(NamedTuple):
    """A document as a domain keeps it, see Doc. digest: of all that its tokens are made from."""

    tokens: np.ndarray
    ends: np.ndarray
    prompt: int
    digest: bytes


def _code(batch: Sequence[Document], tokenizer: Any, chat: instruct.Chat | None) -> list[_Coded]:
    """Return documents as tokens: plain text in one piece, prompt and completion apart, so that no
    token holds some of both."""
    shown = [d if isinstance(d, str) else instruct.show_pair(d, chat) for d in batch]
    pieces = [piece for s in shown for piece in ([s] if isinstance(s, str) else s[:2])]
    coded, out = iter(tokenize(pieces, tokenizer)), []
    for s in shown:
        tokens, ends = next(coded)
        if isinstance(s, str):
            out.append(_Coded(tokens, ends, 0, hashlib.sha256(s.encode()).digest()))
            continue
        if chat is not None and len(tokens) and tokens[0] == chat.prefix_id:
            tokens = tokens[1:]
        rest, rest_ends = next(coded)
        size = len(tokens)
        counted = np.clip(rest_ends.astype(np.int64) - s.first, 0, s.last - s.first)
        ends = np.concatenate([np.zeros(size), counted]).astype(np.uint32)
        digest = bytes.fromhex(json_sha256([*s, size]))
        out.append(_Coded(np.concatenate([tokens, rest]), ends, size, digest))
    return out


def tokenize(texts: list[str], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (token ids, ends) of each text, uint32 [n] each, without special tokens; see Doc for
    ends. DataError: the tokenizer is not a fast one, which alone knows where a token ends."""
    if not getattr(tokenizer, "is_fast", False):
        what = f"{type(tokenizer).__name__} is not a fast tokenizer"
        raise DataError(what, "", "use a model with a tokenizer.json")
    out = []
    coded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for text, ids, spans in zip(texts, coded["input_ids"], coded["offset_mapping"], strict=True):
        stops = np.array([stop for _, stop in spans], dtype=np.int64)
        ends = np.maximum.accumulate(_byte_positions(text)[stops])
        if len(ends):
            ends[-1] = len(text.encode())  # some tokenizers drop trailing space
        out.append((np.array(ids, dtype=np.uint32), ends.astype(np.uint32)))
    return out


def _byte_positions(text: str) -> np.ndarray:
    """Return [len(text) + 1], the UTF-8 bytes before each character."""
    data = np.frombuffer(text.encode(), np.uint8)
    return np.append(np.flatnonzero(data & 0xC0 != 0x80), len(data))  # 10xxxxxx begins none
