"""Check that domains fit each other, the settings and the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations
from typing import Any

from gain_cl.config import schema
from gain_cl.domains.domain import SPLITS, Domain, SplitName
from gain_cl.domains.read import documents, pin_domain
from gain_cl.domains.text import document_hash, plain
from gain_cl.errors import DataError
from gain_cl.system.hashes import json_sha256


def check_texts(
    domains: Mapping[str, schema.Domain],
    train: schema.Train,
    evaluation: schema.Eval,
    controls: Collection[str],
) -> None:
    """Check local and generated text before a tokenizer is at hand. Every line is read. What is too
    small or shared is found by bytes and hashes, where check_domains counts tokens. DataError."""
    pins: dict[str, str] = {}
    for name, domain in domains.items():
        other = pins.setdefault(json_sha256(pin_domain(domain)), name)
        if other != name:
            raise DataError(
                f"{other} and {name} are the same text",
                getattr(domain.source, "path", f"domain {name}"),
                "give each its own: a control or a second domain must be other text",
            )
    sizes = {
        name: _sizes(domain)
        for name, domain in domains.items()
        if isinstance(domain.source, schema.FilesSource | schema.GeneratedSource)
    }
    for name, split in sizes.items():
        _check_count(name, len(split[evaluation.split]), evaluation)
        # A byte a token, and a leading space and a separator a document. A chat template adds
        # tokens, and nobody knows yet how many.
        most = sum(split["train"].values()) + 2 * len(split["train"])
        templated = getattr(domains[name].source, "chat_template", None) is not None
        if name not in controls and not templated:
            _check_block(name, most, train, " at most")
    _check_apart(sizes, controls)


def check_domains(
    domains: Mapping[str, Domain],
    train: schema.Train,
    evaluation: schema.Eval,
    vocab: int,
    controls: Collection[str] = (),
    tokenizer: Any = None,
    unknown_allowed: bool = False,
) -> list[str]:
    """Raise DataError for data a run cannot use; return warnings.

    vocab: rows of the model's embedding. controls: domains that are scored but never trained.
    tokenizer: its unknown tokens are counted; more than 1% are refused unless they are allowed.
    Overlap: a document (by the hash of its text) that some domain trains on and some domain scores.
    """
    for name, domain in domains.items():
        where, largest = f"domain {name}", domain.largest_token
        if largest >= vocab:
            what = f"token id {largest} is beyond the model's {vocab} embedding rows"
            raise DataError(what, where, "use the tokenizer that belongs to the model")
        _check_count(name, domain.n_documents(evaluation.split), evaluation)
        if name in controls:
            continue
        if train.dev_every and not domain.n_documents("dev"):
            what = "no dev document, but train.dev_every is set"
            raise DataError(what, where, "raise split.dev")
        _check_block(name, domain.n_tokens("train") + domain.n_documents("train"), train)
    told = _unknown(domains, tokenizer, unknown_allowed)
    ids = {name: {s: set(d.ids(s)) for s in SPLITS} for name, d in domains.items()}
    _check_apart(ids, controls)
    learned = {name: split["train"] for name, split in ids.items() if name not in controls}
    shared = [(a, b, len(learned[a] & learned[b])) for a, b in combinations(learned, 2)]
    return told + [f"{n} training documents are in both {a} and {b}" for a, b, n in shared if n]


def _unknown(domains: Mapping[str, Domain], tokenizer: Any, allowed: bool) -> list[str]:
    """Count the tokens that stand for text the tokenizer does not know. Return notes. DataError for
    more than 1% of a domain's: what is learned of them is no language."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return []
    told = []
    for name, domain in domains.items():
        tokens = domain.arrays["tokens"]
        if not (count := int((tokens == unknown).sum())):
            continue
        what = f"{count:,} of {len(tokens):,} tokens of {name} are {tokenizer.unk_token}"
        if count > 0.01 * len(tokens) and not allowed:
            do = "use a model that knows this script, or allow_change=[unknown]"
            raise DataError(f"{what}: the tokenizer does not know the text", f"domain {name}", do)
        told.append(f"{what}, text that the tokenizer does not know")
    return told


def _check_count(name: str, have: int, evaluation: schema.Eval) -> None:
    """Raise DataError when a domain has fewer documents than are scored."""
    split, wanted = evaluation.split, evaluation.documents
    if have < wanted:
        do = f"lower eval.documents, raise split.{split} or give more documents"
        raise DataError(f"{have} {split} documents, eval.documents={wanted}", f"domain {name}", do)


def _check_block(name: str, tokens: int, train: schema.Train, most: str = "") -> None:
    """Raise DataError when a domain's training text is less than a block."""
    if tokens < train.block:
        what = f"{tokens} training tokens{most} are less than one block of {train.block}"
        raise DataError(what, f"domain {name}", "give more text or a smaller train.block")


def _check_apart(
    ids: Mapping[str, Mapping[SplitName, Collection[str]]], controls: Collection[str]
) -> None:
    """Raise DataError when a document is trained on and scored. ids: domain -> split -> its
    documents."""
    for a in (name for name in ids if name not in controls):
        for b, split in ids.items():
            if common := set(ids[a]["train"]) & {*split["test"], *split["dev"]}:
                raise DataError(
                    f"{len(common)} documents are in the training split of {a} and in the test "
                    f"or dev split of {b}",
                    f"first: {min(common)[:16]}",
                    "remove them from one, or give both domains the same split",
                )


def _sizes(domain: schema.Domain) -> dict[SplitName, dict[str, int]]:
    """Return split -> hash -> UTF-8 bytes of a domain's documents, split as Domain does."""
    found: dict[SplitName, dict[str, int]] = {split: {} for split in SPLITS}
    bounds = domain.split.test, domain.split.test + domain.split.dev
    for text in documents(domain):
        key = document_hash(text)
        share = int(key[:16], 16) / 2**64
        found[SPLITS[sum(share >= b for b in bounds)]][key] = len(plain(text).encode())
    return found
