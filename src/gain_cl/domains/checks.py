"""Check that domains fit each other, the settings and the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from gain_cl.config import schema
from gain_cl.domains.domain import SPLITS, Domain
from gain_cl.domains.read import collect_documents, pin_domain
from gain_cl.domains.text import plain
from gain_cl.errors import DataError
from gain_cl.system.hashes import json_sha256


def check_texts(
    domains: Mapping[str, schema.Domain],
    train: schema.Train,
    evaluation: schema.Eval,
    controls: Collection[str],
) -> None:
    """Check local and generated text before a tokenizer is at hand. Every line is read, and bytes
    are counted where check_domains counts tokens. DataError."""
    pins: dict[str, str] = {}
    for name, domain in domains.items():
        other = pins.setdefault(json_sha256(pin_domain(domain)), name)
        if other != name:
            raise DataError(
                f"{other} and {name} are the same text",
                getattr(domain.source, "path", f"domain {name}"),
                "give each its own: a control or a second domain must be other text",
            )
    local = schema.FilesSource | schema.GeneratedSource
    found = {n: _in_bytes(d, train) for n, d in domains.items() if isinstance(d.source, local)}
    check_domains(found, train, evaluation, None, controls)


def _in_bytes(domain: schema.Domain, train: schema.Train) -> Domain:
    """Return a domain as if each byte were a token, and a leading space one a document: it has no
    more tokens. A chat template adds some, and nobody knows yet how many: a block."""
    more = 1 + train.block * (getattr(domain.source, "template", None) is not None)
    ids, texts = zip(*collect_documents(domain), strict=True)
    sizes = [len(plain(text).encode()) + more for text in texts]
    arrays = {"ids": np.array([i[:16] for i in ids], "S16"), "offsets": np.cumsum([0, *sizes])}
    found = Domain(domain.name, domain.split, "", arrays)
    if getattr(domain.source, "path", "").endswith(".txt"):
        found.notes = ["source.split_on says where the .txt is cut (null: at blank lines only)"]
    return found


def check_domains(
    domains: Mapping[str, Domain],
    train: schema.Train,
    evaluation: schema.Eval,
    vocab: int | None,
    controls: Collection[str] = (),
    tokenizer: Any = None,
    unknown_allowed: bool = False,
) -> list[str]:
    """Raise DataError for data a run cannot use; return warnings.

    vocab: rows of the model's embedding; None where bytes stand for tokens. controls: domains that
    are scored but never trained. tokenizer: its unknown tokens are counted; more than 1% are
    refused unless they are allowed. Overlap: a document (by the hash of its text) that some domain
    trains on and some domain scores.
    """
    for name, domain in domains.items():
        where, split = f"domain {name}", evaluation.split
        if vocab is not None and (largest := int(domain.arrays["tokens"].max())) >= vocab:
            what = f"token id {largest} is beyond the model's {vocab} embedding rows"
            raise DataError(what, where, "use the tokenizer that belongs to the model")
        if (have := domain.n_documents(split)) < evaluation.documents:
            what = f"{have} {split} documents, eval.documents={evaluation.documents}"
            do = f"lower eval.documents, raise split.{split} or give more documents"
            raise DataError(what, where, "; ".join([do, *domain.notes]))
        if name in controls:
            continue
        if train.dev_every and not domain.n_documents("dev"):
            what = "no dev document, but train.dev_every is set"
            raise DataError(what, where, "raise split.dev")
        tokens = domain.n_tokens("train") + domain.n_documents("train")  # with separators
        if tokens < train.block:
            most = "" if vocab else " at most"
            what = f"{tokens} training tokens{most} are less than one block of {train.block}"
            raise DataError(what, where, "give more text or a smaller train.block")
    told = [note for domain in domains.values() for note in domain.notes]
    told += _unknown(domains, tokenizer, unknown_allowed)
    ids = {name: {s: set(d.ids(s)) for s in SPLITS} for name, d in domains.items()}
    learned = {name: split["train"] for name, split in ids.items() if name not in controls}
    for a, trained in learned.items():
        for b, parts in ids.items():
            if common := trained & (parts["test"] | parts["dev"]):
                raise DataError(
                    f"{len(common)} documents are in the training split of {a} and in the test "
                    f"or dev split of {b}",
                    f"first: {min(common)}",
                    "remove them from one, or give both domains the same split",
                )
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
