"""Perplexity of a model on documents.

The protocol (its name is in every record): the first W tokens of each document, one prefix token
before the first so that every token is scored, windows of at most ``context`` inputs; each window
scores ``stride`` new tokens given up to ``context`` inputs before them, the last one fewer. With
stride = context these are the windows of lm-eval's rolling log-likelihood. Of instruction data the
W tokens are the completion's first, given the prompt, which is cut on the left where both exceed
``context`` (a stride below it leaves room for the prompt of a long completion). Documents are never
packed or joined. What is returned are sums per document; ratios come later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch

from gain_cl.errors import DataError
from gain_cl.measure.record import DomainScore
from gain_cl.models import load
from gain_cl.models.loss import token_divergence, token_nll
from gain_cl.system import signals

if TYPE_CHECKING:
    from gain_cl.config.schema import Eval
    from gain_cl.domains import Doc
    from gain_cl.models.load import Loaded


class Window(NamedTuple):
    """inputs: token ids; the last next tokens, ``targets``, are scored for document ``owner``."""

    owner: int
    inputs: np.ndarray
    targets: np.ndarray


def protocol(settings: Eval, prefix_id: int) -> str:
    """Name of the measure: two numbers are comparable only if their protocols are equal."""
    window = f"first{settings.window}" if settings.window else "whole"
    stride = f"-stride{settings.stride}" if settings.stride else ""
    return f"ppl-{settings.split}-{window}x{settings.documents}-prefix{prefix_id}-ctx{settings.context}{stride}"


def windows(
    tokens: np.ndarray, prefix_id: int, context: int, stride: int, owner: int = 0, prompt: int = 0
) -> list[Window]:
    """Cut one document so that every token after the first ``prompt`` ones is scored exactly
    once."""
    stream = np.concatenate([[prefix_id], tokens]).astype(
        np.int64
    )  # stream[i] predicts stream[i + 1]
    cuts = []
    for start in range(prompt, len(tokens), stride):
        end = min(start + stride, len(tokens))
        cuts.append(Window(owner, stream[max(0, end - context) : end], stream[start + 1 : end + 1]))
    return cuts


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode of every module is restored, no random number is
    drawn."""
    with load.eval_mode(model), torch.no_grad():
        yield


def score(
    loaded: Loaded,
    documents: list[Doc],
    window: int | None,
    context: int,
    stride: int | None = None,
    batch: int = 16,
) -> pd.DataFrame:
    """One row per document: document (id), nll_nats (float64), tokens, bytes (UTF-8), of the scored
    text alone."""

    def nll_N(part: list[Window]) -> torch.Tensor:
        targets_N = torch.from_numpy(np.concatenate([w.targets for w in part])).to(loaded.device)
        return token_nll(_hidden(loaded, part), *loaded.output, targets_N, loaded.softcap)

    with evaluating(loaded.model):
        nll, scored = _sums(nll_N, loaded.prefix_id, documents, window, context, stride, batch)
    if not np.isfinite(
        nll
    ).all():  # pandas' sums would skip it, and a NaN would become a good score
        broken = documents[int(np.flatnonzero(~np.isfinite(nll))[0])].id
        do = "check the weights; if they were trained here, lower train.lr"
        raise DataError(
            f"the loss of {(~np.isfinite(nll)).sum()} documents is not finite",
            f"first document {broken}",
            do,
        )
    ends = [int(d.ends[d.prompt + n - 1]) for d, n in zip(documents, scored, strict=True)]
    return pd.DataFrame(
        {"document": [d.id for d in documents], "nll_nats": nll, "tokens": scored, "bytes": ends}
    )


def divergence(
    base: Loaded,
    tuned: Loaded,
    documents: list[Doc],
    window: int | None,
    context: int,
    stride: int | None = None,
    batch: int = 16,
) -> pd.DataFrame:
    """KL(base || tuned) over the whole vocabulary at every token that ``score`` scores, each model
    computing as it is. One row per document: document (id), kl_nats (float64 sum over its tokens),
    tokens."""

    def kl_N(part: list[Window]) -> torch.Tensor:
        return token_divergence(
            _hidden(tuned, part), *tuned.output, (_hidden(base, part), *base.output), tuned.softcap
        )

    with evaluating(base.model), evaluating(tuned.model):
        kl, scored = _sums(kl_N, base.prefix_id, documents, window, context, stride, batch)
    if not np.isfinite(kl).all():
        raise DataError(
            "the divergence from the base is not finite",
            "KL",
            "check the weights; if they were trained here, lower train.lr",
        )
    return pd.DataFrame({"document": [d.id for d in documents], "kl_nats": kl, "tokens": scored})


def _sums(
    measure: Callable[[list[Window]], torch.Tensor],
    prefix_id: int,
    documents: list[Doc],
    window: int | None,
    context: int,
    stride: int | None,
    batch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(sum of what is measured, float64; scored tokens) of each document. measure: windows -> a
    number for each of their targets."""
    texts = [d.tokens[: d.prompt + window if window else None] for d in documents]
    cuts = [
        w
        for i, (d, tokens) in enumerate(zip(documents, texts, strict=True))
        for w in windows(tokens, prefix_id, context, stride or context, i, d.prompt)
    ]
    cuts.sort(
        key=lambda w: -len(w.inputs)
    )  # longest first: little padding, and memory runs out at once if at all
    sums = np.zeros(len(texts), dtype=np.float64)
    scored = np.zeros(len(texts), dtype=np.int64)
    for start in range(0, len(cuts), batch):
        signals.poll()
        part = cuts[start : start + batch]
        owner = np.repeat([w.owner for w in part], [len(w.targets) for w in part])
        np.add.at(sums, owner, measure(part).double().cpu().numpy())
        np.add.at(scored, owner, 1)
    assert (scored == [len(t) - d.prompt for d, t in zip(documents, texts, strict=True)]).all()
    return sums, scored


def _hidden(loaded: Loaded, part: list[Window]) -> torch.Tensor:
    """(N, D) states that predict the targets of the windows, the first window the longest."""
    inputs = np.full((len(part), len(part[0].inputs)), loaded.prefix_id, dtype=np.int64)
    for row, w in zip(inputs, part, strict=True):
        row[: len(w.inputs)] = w.inputs  # padded on the right: causal attention never sees it
    hidden_BTD = loaded.body(
        input_ids=torch.from_numpy(inputs).to(loaded.device), use_cache=False
    ).last_hidden_state
    return torch.cat(
        [
            h[len(w.inputs) - len(w.targets) : len(w.inputs)]
            for h, w in zip(hidden_BTD, part, strict=True)
        ]
    )


def total(rows: pd.DataFrame) -> DomainScore:
    """The sums over documents."""
    return DomainScore(
        nll_nats=float(rows.nll_nats.sum()),
        tokens=int(rows.tokens.sum()),
        bytes=int(rows.bytes.sum()),
        documents=len(rows),
    )
