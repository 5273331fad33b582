"""Tokenise a domain once and keep it in the cache."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import string
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gain_cl.config import schema
from gain_cl.domains import domain as domain_
from gain_cl.domains import instruct
from gain_cl.domains.read import collect, pin
from gain_cl.domains.text import Document, plain
from gain_cl.errors import DataError, StorageError
from gain_cl.system import hashes as hashes_
from gain_cl.system import signals
from gain_cl.system.files import sha256
from gain_cl.system.hashes import json_sha256
from gain_cl.system.sealed import read_sealed, sealed_bytes

FORMAT = 4  # of the token cache
_ARRAYS = ("ids", "offsets", "tokens", "ends", "prompts", "words", "word_offsets")
BATCH = 256  # documents that are tokenised at once
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]+")


# --- tokenising -----------------------------------------------------------------------------------


def prepare(
    domain: schema.Domain,
    tokenizer: Any,
    tokenizer_hash: str,
    pinned: dict[str, Any] | None = None,
    prefix_id: int | None = None,
) -> domain_.Domain:
    """The domain, tokenised: from the cache when the same text was tokenised by the same tokenizer
    before.

    tokenizer: a fast transformers tokenizer; tokenizer_hash: hash of its files; pinned: the
    domain's pin in the run id; prefix_id: the token before every text, which a chat template is not
    to repeat (None: the tokenizer's bos, else its end). DataError for bad text, or text that is not
    as pinned; StorageError when the cache cannot be written; PreemptedError between two batches.
    Safe for processes that prepare the same domain at once: the first to finish wins.
    """
    found = pin(domain)
    if pinned is not None and found != pinned:
        raise _changed(domain, "since the run began")
    identity: dict[str, Any] = {"format": FORMAT, "pin": found, "tokenizer": tokenizer_hash}
    chat = instruct.chat(domain, tokenizer, prefix_id)
    if chat is not None:
        identity["chat"] = {
            "template": chat.template,
            "special": chat.special,
            "prefix": chat.prefix_id,
        }
    folder = hashes_.cache_dir() / "tokens" / json_sha256(identity)[:32]
    loaded = _load(folder, domain, identity)
    if loaded is None:
        _build(folder, domain, tokenizer, identity, chat)
        loaded = _load(folder, domain, identity)
    if loaded is None:
        raise StorageError(
            "the token cache cannot be read back", str(folder), "check the disk, delete the folder"
        )
    return loaded


def _changed(domain: schema.Domain, when: str) -> DataError:
    where = getattr(domain.source, "path", f"domain {domain.name}")
    return DataError(
        f"the text of {domain.name} changed {when}",
        where,
        "leave the files alone while a run reads them, start again",
    )


def _load(folder: Path, domain: schema.Domain, identity: dict[str, Any]) -> domain_.Domain | None:
    """The cached domain; None when there is none, or (with a warning) when its files are not what
    was written."""
    try:
        meta = read_sealed(folder / "meta.json")
        if meta is None or json_sha256(meta["identity"]) != json_sha256(identity):
            raise ValueError("meta.json changed")
        for name in _ARRAYS:
            if hashes_.file_sha256(folder / f"{name}.npy") != meta["sha256"][name]:
                raise ValueError(f"{name}.npy changed")
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in _ARRAYS
        }
        return domain_.Domain(domain.name, domain.split, meta["hash"], arrays)
    except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if folder.exists():
            print(
                f"warning: token cache of {domain.name} is damaged ({error}); tokenising again",
                file=sys.stderr,
            )
        return None


def _build(
    folder: Path,
    domain: schema.Domain,
    tokenizer: Any,
    identity: dict[str, Any],
    chat: instruct.Chat | None,
) -> None:
    texts = collect(domain)
    if pin(domain) != identity["pin"]:
        raise _changed(domain, "while it was read")
    ids, tokens, ends, prompts, words, content = (
        [],
        [],
        [],
        [],
        [],
        hashlib.sha256(str(identity["tokenizer"]).encode()),
    )
    for start in range(0, len(texts), BATCH):
        signals.poll()
        batch = [document for _, document in texts[start : start + BATCH]]
        for (key, document), (t, e, prompt, digest) in zip(
            texts[start : start + BATCH], _tokenize(batch, tokenizer, chat), strict=True
        ):
            if len(t) > prompt:
                content.update(digest)
                ids.append(key[:16].encode())
                tokens.append(t)
                ends.append(e)
                prompts.append(prompt)
                words.append(word_hashes(plain(document)))
    if not ids:
        raise DataError(
            "no document has a token", f"domain {domain.name}", "check the text and the tokenizer"
        )
    arrays = {
        "ids": np.array(ids, dtype="S16"),
        "offsets": _offsets(tokens),
        "tokens": np.concatenate(tokens),
        "ends": np.concatenate(ends),
        "prompts": np.array(prompts, dtype=np.uint32),
        "words": np.concatenate(words),
        "word_offsets": _offsets(words),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".build-"))
        try:
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            hashes = {name: sha256(temporary / f"{name}.npy") for name in arrays}
            meta = {
                "domain": domain.name,
                "hash": content.hexdigest(),
                "sha256": hashes,
                "identity": identity,
            }
            (temporary / "meta.json").write_bytes(sealed_bytes(meta))
            temporary.chmod(0o755)  # mkdtemp makes it private
            if folder.exists() and _load(folder, domain, identity) is None:
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        except OSError:
            if not folder.exists():  # else another process finished first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"cannot write: {error.strerror or error}",
            str(folder),
            "free space or set GAIN_CL_CACHE",
        ) from error


def _offsets(parts: list[np.ndarray]) -> np.ndarray:
    """[n+1] int64: where each part begins in their concatenation, and its end."""
    return np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)


def word_hashes(text: str) -> np.ndarray:
    """[n] uint32: a hash of each word. Words as in lm-eval's decontamination: lower case, ASCII
    punctuation deleted, cut at white space; text that is written without spaces has hardly any."""
    found = _PUNCTUATION.sub("", text.lower()).split()
    return np.fromiter(map(_word_hash, found), np.uint32, len(found))


@functools.lru_cache(maxsize=1 << 20)  # a corpus repeats its words; the bound is about 150 MB
def _word_hash(word: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "little"
    )


class _Coded(NamedTuple):
    """A document as a domain keeps it, see Doc; digest: of all that its tokens are made from."""

    tokens: np.ndarray
    ends: np.ndarray
    prompt: int
    digest: bytes


def _tokenize(batch: list[Document], tokenizer: Any, chat: instruct.Chat | None) -> list[_Coded]:
    """Plain text in one piece; prompt and completion apart, so that no token holds some of both."""
    shown = [
        document if isinstance(document, str) else instruct.show(document, chat)
        for document in batch
    ]
    pieces = [
        piece for s in shown for piece in ([s] if isinstance(s, str) else [s.prompt, s.completion])
    ]
    coded, out = iter(tokenize(pieces, tokenizer)), []
    for s in shown:
        tokens, ends = next(coded)
        if isinstance(s, str):
            out.append(_Coded(tokens, ends, 0, hashlib.sha256(s.encode()).digest()))
            continue
        if chat is not None and len(tokens) and tokens[0] == chat.prefix_id:
            tokens = tokens[1:]
        rest, rest_ends = next(coded)
        counted = np.clip(rest_ends.astype(np.int64) - s.first, 0, s.last - s.first).astype(
            np.uint32
        )
        digest = bytes.fromhex(json_sha256([s.prompt, s.completion, s.first, s.last, len(tokens)]))
        both = (
            np.concatenate([tokens, rest]),
            np.concatenate([np.zeros(len(tokens), np.uint32), counted]),
        )
        out.append(_Coded(*both, len(tokens), digest))
    return out


def tokenize(texts: list[str], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, ends) of each text, uint32 [n] each, without special tokens; see Doc for ends.

    Needs a fast tokenizer, which alone knows where a token ends in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} is not a fast tokenizer",
            "",
            "use a model with a tokenizer.json",
        )
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
        ends = np.maximum.accumulate(_byte_positions(text)[stops]) if len(stops) else stops
        if len(ends):
            ends[-1] = len(text.encode())  # some tokenizers drop trailing space
        out.append((np.array(ids, dtype=np.uint32), ends.astype(np.uint32)))
    return out


def _byte_positions(text: str) -> np.ndarray:
    """[len(text) + 1] UTF-8 bytes before each character."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return np.concatenate(
        [[0], np.cumsum(1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))]
    )
