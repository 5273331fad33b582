"""Check that domains fit each other, the settings and the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations

from gain_cl.config import schema
from gain_cl.domains import domain as domain_
from gain_cl.errors import DataError

# --- checks ---------------------------------------------------------------------------------------


def check(
    domains: Mapping[str, domain_.Domain],
    train: schema.Train,
    evaluation: schema.Eval,
    vocab: int,
    controls: Collection[str] = (),
) -> list[str]:
    """Raise DataError for data a run cannot use; return warnings.

    vocab: rows of the model's embedding. controls: domains that are scored but never trained.
    Overlap: a document (by the hash of its text) that some domain trains on and some domain scores.
    """
    trained = {name: d for name, d in domains.items() if name not in controls}
    for name, domain in domains.items():
        if domain.largest_token >= vocab:
            do = "use the tokenizer that belongs to the model"
            raise DataError(
                f"token id {domain.largest_token} is beyond the model's {vocab} embedding rows",
                f"domain {name}",
                do,
            )
        have, split = domain.n_documents(evaluation.split), evaluation.split
        if have < evaluation.documents:
            do = f"lower eval.documents, raise split.{split} or give more documents"
            raise DataError(
                f"{have} {split} documents, eval.documents={evaluation.documents}",
                f"domain {name}",
                do,
            )
        if train.dev_every and name in trained and not domain.n_documents("dev"):
            raise DataError(
                "no dev document, but train.dev_every is set", f"domain {name}", "raise split.dev"
            )
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
                what = (
                    f"{len(common)} documents are in the training split of {a} and in the test "
                    f"or dev split of {b}"
                )
                raise DataError(
                    what,
                    f"first: {min(common)}",
                    "remove them from one, or give both domains the same split",
                )
    shared = [(a, b, len(learned[a] & learned[b])) for a, b in combinations(learned, 2)]
    return [f"{n} training documents are in both {a} and {b}" for a, b, n in shared if n]
