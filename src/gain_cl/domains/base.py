"""Domain: tokenised documents, split by hash, memory-mapped; Blocks: the endless training stream as a pure function."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import string
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from gain_cl import config, signals, sources
from gain_cl.domains import instruct
from gain_cl.domains.read import collect, pin
from gain_cl.domains.text import Document, plain
from gain_cl.errors import DataError, StorageError
from gain_cl.files import sha256

SplitName = Literal["train", "dev", "test"]
SPLITS: tuple[SplitName, ...] = ("test", "dev", "train")  # in the order of the hash
FORMAT = 3  # of the token cache
_ARRAYS = ("ids", "offsets", "tokens", "ends", "prompts", "words", "word_offsets")
BATCH = 256  # documents that are tokenised at once
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]+")


@dataclass(frozen=True)
class Doc:
    """One document. id: first 16 hex digits of the hash of its text; tokens [n] uint32 ids; ends [n] uint32: UTF-8 bytes
    of the text up to the end of each token, so that the first W tokens cover ends[W-1] bytes. prompt: how many tokens from the
    first on are a prompt, which is read and not scored; ends are then 0 in it and count the completion's bytes."""

    id: str
    tokens: np.ndarray
    ends: np.ndarray
    prompt: int = 0


class Domain:
    """The tokenised documents of a domain, sorted by hash. Splits are ranges of that order: a document is in test when its
    hash, read as a fraction, is below ``split.test``, in dev below test + dev, else in train. Never by position."""

    def __init__(self, name: str, split: config.Split, content_hash: str, arrays: Mapping[str, np.ndarray]) -> None:
        """arrays: ids [N] S16 sorted; offsets [N+1] into tokens and ends [T]; prompts [N], of which so many tokens are the prompt;
        word_offsets [N+1] into words [W] uint32."""
        self.name, self.hash = name, content_hash
        self._ids, self._offsets, self._tokens, self._ends, self._prompts, self._words, self._word_offsets = (arrays[k] for k in _ARRAYS)
        share = np.array([int(i, 16) / 2**64 for i in self._ids.tolist()])
        first, second = (int(np.searchsorted(share, bound)) for bound in (split.test, split.test + split.dev))
        self._ranges = {"test": range(first), "dev": range(first, second), "train": range(second, len(share))}

    def ids(self, split: SplitName) -> list[str]:
        """Document ids of a split, in hash order."""
        r = self._ranges[split]
        return [i.decode() for i in self._ids[r.start : r.stop].tolist()]

    def split_hash(self, split: SplitName) -> str:
        """SHA-256 (hex) of the ids of a split: equal when it holds the same documents, whatever the tokenizer."""
        return hashlib.sha256("\n".join(self.ids(split)).encode()).hexdigest()

    def n_documents(self, split: SplitName) -> int:
        return len(self._ranges[split])

    def n_tokens(self, split: SplitName) -> int:
        r = self._ranges[split]
        return int(self._offsets[r.stop] - self._offsets[r.start])

    def n_prompt_tokens(self, split: SplitName) -> int:
        """Of those tokens, how many are prompts: 0 for plain text."""
        r = self._ranges[split]
        return int(self._prompts[r.start : r.stop].sum())

    def n_bytes(self, split: SplitName) -> int:
        """UTF-8 bytes of the split's documents; of instruction data, of the completions."""
        return sum(int(doc.ends[-1]) for doc in self.split_documents(split))

    def split_documents(self, split: SplitName) -> list[Doc]:
        """Documents of a split in hash order; tokens and ends are views of the memory-mapped arrays."""
        parts = [(i, slice(int(self._offsets[i]), int(self._offsets[i + 1]))) for i in self._ranges[split]]
        return [Doc(self._ids[i].decode(), self._tokens[part], self._ends[part], int(self._prompts[i])) for i, part in parts]

    def words(self, split: SplitName) -> tuple[np.ndarray, np.ndarray]:
        """(word hashes [W] uint32, offsets [n+1] int64): document i of the split has the words offsets[i] to offsets[i+1]."""
        r = self._ranges[split]
        offsets = np.asarray(self._word_offsets[r.start : r.stop + 1])
        return self._words[offsets[0] : offsets[-1]], offsets - offsets[0]

    @property
    def largest_token(self) -> int:
        return int(self._tokens.max())

    def train_blocks(self, seed: int, block: int, separator_id: int) -> Blocks:
        """The training stream; see Blocks."""
        return Blocks(self.name, self.split_documents("train"), seed, block, separator_id)


class Block(NamedTuple):
    """A training sequence of T tokens, int64. documents_T: index of each token's document among ``ids`` of its stream (a
    separator belongs to the document before it); scored_T: whether the token counts in the loss."""

    tokens_T: np.ndarray
    documents_T: np.ndarray
    scored_T: np.ndarray


class Stream(Protocol):
    """An endless stream of training blocks. ids: of the documents they are made of."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def name(self) -> str: ...

    def __getitem__(self, index: int) -> Block: ...


class Mixture:
    """Several streams in turn: block i belongs to round i // D; each round takes the next block of each of the D streams, in
    an order drawn from (seed, round). After N rounds each stream has given its first N blocks, as training one by one does."""

    def __init__(self, name: str, streams: Sequence[Stream], seed: int) -> None:
        self.name, self.streams, self.seed = name, streams, seed
        self.ids = [i for stream in streams for i in stream.ids]
        self._first = np.cumsum([0, *(len(stream.ids) for stream in streams)])

    def __getitem__(self, index: int) -> Block:
        turn, place = divmod(index, len(self.streams))
        keys = [hashlib.sha256(f"{self.seed}:{self.name}:{turn}:{s.name}".encode()).digest() for s in self.streams]
        chosen = sorted(range(len(keys)), key=keys.__getitem__)[place]
        block = self.streams[chosen][turn]
        return block._replace(documents_T=block.documents_T + self._first[chosen])


class Blocks:
    """An endless stream of training blocks with random access.

    The documents, each followed by the separator token, are joined and cut into blocks of ``block`` tokens; an epoch is a
    permutation of the blocks drawn from (seed, domain name, epoch) alone (the last tokens, less than a block, are left
    out). Blocks, not documents, are shuffled, as is usual: a small budget then sees many documents even where each is
    long. Every token is scored but those of prompts. No global random state, no dependence on the model, the place in the
    sequence or evaluation.
    """

    def __init__(self, name: str, documents: list[Doc], seed: int, block: int, separator_id: int) -> None:
        self.name, self.seed, self.block, self.separator_id = name, seed, block, separator_id
        self._documents = documents
        self.ids = [d.id for d in documents]
        self._starts = np.cumsum([0, *(len(d.tokens) + 1 for d in documents)])  # separators included
        self.epoch_blocks = int(self._starts[-1]) // block
        if not self.epoch_blocks:
            raise DataError(
                f"less than one block of {block} tokens to train on",
                f"domain {name}",
                "give more text, a smaller train.block or smaller shares for test and dev",
            )
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        """The blocks in the epoch's order."""
        if epoch not in self._orders:
            # Sorting by a hash, not a generator's shuffle: the same on every numpy version, for good.
            keys = [hashlib.sha256(f"{self.seed}:{self.name}:{epoch}:{k}".encode()).digest() for k in range(self.epoch_blocks)]
            self._orders = {epoch: np.array(sorted(range(self.epoch_blocks), key=keys.__getitem__))}
        return self._orders[epoch]

    def __getitem__(self, index: int) -> Block:
        """Block ``index`` >= 0; documents are in hash order."""
        if index < 0:
            raise IndexError(index)
        epoch, place = divmod(index, self.epoch_blocks)
        start = int(self._order(epoch)[place]) * self.block
        tokens, owners, scored = np.empty(self.block, np.int64), np.empty(self.block, np.int64), np.ones(self.block, bool)
        filled = 0
        while filled < self.block:
            owner = int(np.searchsorted(self._starts, start + filled, side="right")) - 1
            skip = start + filled - int(self._starts[owner])
            part = np.asarray(self._documents[owner].tokens[skip : skip + self.block - filled], dtype=np.int64)
            stop = filled + len(part)
            tokens[filled:stop], owners[filled:stop] = part, owner
            scored[filled : filled + max(0, min(len(part), self._documents[owner].prompt - skip))] = False
            if stop < self.block:  # the document ended: its separator follows
                tokens[stop], owners[stop] = self.separator_id, owner
                stop += 1
            filled = stop
        return Block(tokens, owners, scored)


# --- tokenising --------------------------------------------------------------------------------------------------------


def prepare(
    domain: config.Domain, tokenizer: Any, tokenizer_hash: str, pinned: dict[str, Any] | None = None, prefix_id: int | None = None
) -> Domain:
    """The domain, tokenised: from the cache when the same text was tokenised by the same tokenizer before.

    tokenizer: a fast transformers tokenizer; tokenizer_hash: hash of its files; pinned: the domain's pin in the run id;
    prefix_id: the token before every text, which a chat template is not to repeat (None: the tokenizer's bos, else its end).
    DataError for bad text, or text that is not as pinned; StorageError when the cache cannot be written; PreemptedError
    between two batches. Safe for processes that prepare the same domain at once: the first to finish wins.
    """
    found = pin(domain)
    if pinned is not None and found != pinned:
        raise _changed(domain, "since the run began")
    identity: dict[str, Any] = {"format": FORMAT, "pin": found, "tokenizer": tokenizer_hash}
    chat = instruct.chat(domain, tokenizer, prefix_id)
    if chat is not None:
        identity["chat"] = {"template": chat.template, "special": chat.special, "prefix": chat.prefix_id}
    folder = sources.cache_dir() / "tokens" / _digest(identity)[:32]
    loaded = _load(folder, domain, identity)
    if loaded is None:
        _build(folder, domain, tokenizer, identity, chat)
        loaded = _load(folder, domain, identity)
    if loaded is None:
        raise StorageError("the token cache cannot be read back", str(folder), "check the disk, delete the folder")
    return loaded


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _changed(domain: config.Domain, when: str) -> DataError:
    where = getattr(domain.source, "path", f"domain {domain.name}")
    return DataError(f"the text of {domain.name} changed {when}", where, "leave the files alone while a run reads them, start again")


def _load(folder: Path, domain: config.Domain, identity: dict[str, Any]) -> Domain | None:
    """The cached domain; None when there is none, or (with a warning) when its files are not what was written."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta.pop("seal") != _digest(meta) or _digest(meta["identity"]) != _digest(identity):
            raise ValueError("meta.json changed")
        for name in _ARRAYS:
            if sources.file_sha256(folder / f"{name}.npy") != meta["sha256"][name]:
                raise ValueError(f"{name}.npy changed")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        return Domain(domain.name, domain.split, meta["hash"], arrays)
    except FileNotFoundError:
        return None
    except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if folder.exists():
            print(f"warning: token cache of {domain.name} is damaged ({error}); tokenising again", file=sys.stderr)
        return None


def _build(folder: Path, domain: config.Domain, tokenizer: Any, identity: dict[str, Any], chat: instruct.Chat | None) -> None:
    texts = collect(domain)
    if pin(domain) != identity["pin"]:
        raise _changed(domain, "while it was read")
    ids, tokens, ends, prompts, words, content = [], [], [], [], [], hashlib.sha256(str(identity["tokenizer"]).encode())
    for start in range(0, len(texts), BATCH):
        signals.poll()
        batch = [document for _, document in texts[start : start + BATCH]]
        for (key, document), (t, e, prompt, digest) in zip(texts[start : start + BATCH], _tokenize(batch, tokenizer, chat), strict=True):
            if len(t) > prompt:
                content.update(digest)
                ids.append(key[:16].encode())
                tokens.append(t)
                ends.append(e)
                prompts.append(prompt)
                words.append(word_hashes(plain(document)))
    if not ids:
        raise DataError("no document has a token", f"domain {domain.name}", "check the text and the tokenizer")
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
            meta = {"domain": domain.name, "hash": content.hexdigest(), "sha256": hashes, "identity": identity}
            sealed = {**meta, "seal": _digest(meta)}
            (temporary / "meta.json").write_text(json.dumps(sealed, indent=1, allow_nan=False), encoding="utf-8")
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
        raise StorageError(f"cannot write: {error.strerror or error}", str(folder), "free space or set GAIN_CL_CACHE") from error


def _offsets(parts: list[np.ndarray]) -> np.ndarray:
    """[n+1] int64: where each part begins in their concatenation, and its end."""
    return np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)


def word_hashes(text: str) -> np.ndarray:
    """[n] uint32: a hash of each word. Words as in lm-eval's decontamination: lower case, ASCII punctuation deleted, cut at
    white space; text that is written without spaces has hardly any."""
    found = _PUNCTUATION.sub("", text.lower()).split()
    return np.fromiter(map(_word_hash, found), np.uint32, len(found))


@functools.lru_cache(maxsize=1 << 20)  # a corpus repeats its words; the bound is about 150 MB
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "little")


class _Coded(NamedTuple):
    """A document as a domain keeps it, see Doc; digest: of all that its tokens are made from."""

    tokens: np.ndarray
    ends: np.ndarray
    prompt: int
    digest: bytes


def _tokenize(batch: list[Document], tokenizer: Any, chat: instruct.Chat | None) -> list[_Coded]:
    """Plain text in one piece; prompt and completion apart, so that no token holds some of both."""
    shown = [document if isinstance(document, str) else instruct.show(document, chat) for document in batch]
    pieces = [piece for s in shown for piece in ([s] if isinstance(s, str) else [s.prompt, s.completion])]
    coded, out = iter(tokenize(pieces, tokenizer)), []
    for s in shown:
        tokens, ends = next(coded)
        if isinstance(s, str):
            out.append(_Coded(tokens, ends, 0, hashlib.sha256(s.encode()).digest()))
            continue
        if chat is not None and len(tokens) and tokens[0] == chat.prefix_id:
            tokens = tokens[1:]
        rest, rest_ends = next(coded)
        counted = np.clip(rest_ends.astype(np.int64) - s.first, 0, s.last - s.first).astype(np.uint32)
        digest = hashlib.sha256(json.dumps([s.prompt, s.completion, s.first, s.last, len(tokens)], allow_nan=False).encode()).digest()
        both = np.concatenate([tokens, rest]), np.concatenate([np.zeros(len(tokens), np.uint32), counted])
        out.append(_Coded(*both, len(tokens), digest))
    return out


def tokenize(texts: list[str], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, ends) of each text, uint32 [n] each, without special tokens; see Doc for ends.

    Needs a fast tokenizer, which alone knows where a token ends in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer", "", "use a model with a tokenizer.json")
    out = []
    coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
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
    return np.concatenate([[0], np.cumsum(1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))])


# --- checks ------------------------------------------------------------------------------------------------------------


def check(
    domains: Mapping[str, Domain], train: config.Train, evaluation: config.Eval, vocab: int, controls: Collection[str] = ()
) -> list[str]:
    """Raise DataError for data a run cannot use; return warnings.

    vocab: rows of the model's embedding. controls: domains that are scored but never trained. Overlap: a document (by the
    hash of its text) that some domain trains on and some domain scores.
    """
    trained = {name: d for name, d in domains.items() if name not in controls}
    for name, domain in domains.items():
        if domain.largest_token >= vocab:
            do = "use the tokenizer that belongs to the model"
            raise DataError(f"token id {domain.largest_token} is beyond the model's {vocab} embedding rows", f"domain {name}", do)
        have, split = domain.n_documents(evaluation.split), evaluation.split
        if have < evaluation.documents:
            do = f"lower eval.documents, raise split.{split} or give more documents"
            raise DataError(f"{have} {split} documents, eval.documents={evaluation.documents}", f"domain {name}", do)
        if train.dev_every and name in trained and not domain.n_documents("dev"):
            raise DataError("no dev document, but train.dev_every is set", f"domain {name}", "raise split.dev")
    for name, domain in trained.items():
        tokens = domain.n_tokens("train") + domain.n_documents("train")
        if tokens < train.block:
            what = f"{tokens} training tokens are less than one block of {train.block}"
            raise DataError(what, f"domain {name}", "give more text or a smaller train.block")
    learned = {name: set(d.ids("train")) for name, d in trained.items()}
    scored = {name: set(d.ids("test")) | set(d.ids("dev")) for name, d in domains.items()}
    for a, train_ids in learned.items():
        for b, test_ids in scored.items():
            if common := train_ids & test_ids:
                what = f"{len(common)} documents are in the training split of {a} and in the test or dev split of {b}"
                raise DataError(what, f"first: {min(common)}", "remove them from one, or give both domains the same split")
    shared = [(a, b, len(learned[a] & learned[b])) for a, b in combinations(learned, 2)]
    return [f"{n} training documents are in both {a} and {b}" for a, b, n in shared if n]
