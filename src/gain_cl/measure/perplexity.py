"""Measure the perplexity of a model on documents.

The protocol (its name is in every record) takes the first W tokens of each document, with one
prefix token before the first so that every token is scored, in windows of at most ``context``
inputs. Each window scores ``stride`` new tokens given up to ``context`` inputs before them, the
last window fewer. With stride = context these are the windows of lm-eval's rolling log-likelihood.
Of instruction data the W tokens are the first that the assistant says, given what stands before
them, which is cut on the left where it exceeds ``context`` (a stride below it leaves room for the
prompt of a long completion). Documents are never packed or joined. Sums per document are returned.
Ratios come later.
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
    from gain_cl.domains import Doc
    from gain_cl.models.load import Loaded


DIVERGED = "check the weights; if they were trained here, lower train.lr"


class Window(NamedTuple):
    """A forward pass. inputs: token ids. targets: the next tokens of the last inputs. scored: which
    of them count for document ``owner``."""

    owner: int
    inputs: np.ndarray
    targets: np.ndarray
    scored: np.ndarray


def windows(
    tokens: np.ndarray,
    prefix_id: int,
    context: int,
    stride: int,
    owner: int = 0,
    scored: np.ndarray | None = None,
) -> list[Window]:
    """Cut one document so that every token that is scored (None: all) is so exactly once."""
    scored = np.ones(len(tokens), bool) if scored is None else scored
    stream = np.concatenate([[prefix_id], tokens]).astype(np.int64)  # [i] predicts [i + 1]
    cuts = []
    for start in range(int(scored.argmax()), len(tokens), stride):
        end = min(start + stride, len(tokens))
        inputs, targets = stream[max(0, end - context) : end], stream[start + 1 : end + 1]
        cuts.append(Window(owner, inputs, targets, scored[start:end]))
    return cuts


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Hold eval mode without gradients. The mode of every module is restored. No random number is
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
    """Score documents. Return one row per document: document (id), nll_nats (float64), tokens,
    bytes (UTF-8), of the scored text alone. DataError: a loss is not finite."""

    def nll_N(part: list[Window]) -> torch.Tensor:
        targets_N = torch.from_numpy(np.concatenate([w.targets for w in part])).to(loaded.device)
        return token_nll(_hidden(loaded, part), *loaded.output, targets_N, loaded.softcap)

    with evaluating(loaded.model):
        nll, scored = _sums(nll_N, loaded.prefix_id, documents, window, context, stride, batch)
    broken = np.flatnonzero(~np.isfinite(nll))
    if len(broken):  # pandas' sums would skip it, and a NaN would become a good score
        what = f"the loss of {len(broken)} documents is not finite"
        raise DataError(what, f"first document {documents[broken[0]].id}", DIVERGED)
    ends = [
        int(d.ends[np.flatnonzero(d.scored)[n - 1]]) for d, n in zip(documents, scored, strict=True)
    ]
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
    """Measure KL(base || tuned) over the whole vocabulary at every token that ``score`` scores.
    Each model computes as it is. Return one row per document: document (id), kl_nats (float64 sum
    over its tokens), tokens. DataError: it is not finite."""

    def kl_N(part: list[Window]) -> torch.Tensor:
        return token_divergence(
            _hidden(tuned, part), *tuned.output, (_hidden(base, part), *base.output), tuned.softcap
        )

    with evaluating(base.model), evaluating(tuned.model):
        kl, scored = _sums(kl_N, base.prefix_id, documents, window, context, stride, batch)
    if not np.isfinite(kl).all():
        raise DataError("the divergence from the base is not finite", "KL", DIVERGED)
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
    """Return (sum of what is measured, float64; scored tokens) of each document. measure: windows
    -> a number for each of their targets."""
    cuts: list[Window] = []
    scored = np.zeros(len(documents), dtype=np.int64)
    for i, d in enumerate(documents):
        places = np.flatnonzero(d.scored)[:window]
        size = places[-1] + 1
        read = d.tokens[:size], prefix_id, context, stride or context, i, d.scored[:size]
        own = windows(*read)
        scored[i] = sum(int(w.scored.sum()) for w in own)
        assert scored[i] == len(places)
        cuts += own
    cuts.sort(key=lambda w: -len(w.inputs))  # little padding; memory runs out at once if at all
    sums = np.zeros(len(documents), dtype=np.float64)
    for start in range(0, len(cuts), batch):
        signals.poll()
        part = cuts[start : start + batch]
        owner = np.repeat([w.owner for w in part], [len(w.targets) for w in part])
        counted = np.concatenate([w.scored for w in part])
        np.add.at(sums, owner[counted], measure(part).cpu().numpy()[counted])  # no float64 on MPS
    return sums, scored


def _hidden(loaded: Loaded, part: list[Window]) -> torch.Tensor:
    """Return (N, D) states that predict the targets of the windows, the first window the
    longest."""
    inputs = np.full((len(part), len(part[0].inputs)), loaded.prefix_id, dtype=np.int64)
    for row, w in zip(inputs, part, strict=True):
        row[: len(w.inputs)] = w.inputs  # padded on the right: causal attention never sees it
    ids = torch.from_numpy(inputs).to(loaded.device)
    hidden_BTD = loaded.hidden(input_ids=ids, use_cache=False)
    pairs = zip(hidden_BTD, part, strict=True)
    return torch.cat([h[: len(w.inputs)][-len(w.targets) :] for h, w in pairs])


def total(rows: pd.DataFrame) -> DomainScore:
    """Return the sums over documents."""
    return DomainScore(
        nll_nats=float(rows.nll_nats.sum()),
        tokens=int(rows.tokens.sum()),
        bytes=int(rows.bytes.sum()),
        documents=len(rows),
    )
