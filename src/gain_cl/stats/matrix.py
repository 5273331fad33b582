"""The loss matrix of a run and every summary of it. Needs numpy, pandas and scipy alone.

L[t, d] is the loss in nats per token on domain d after stage t; t = 0 is the pretrained model,
stage k trains the k-th domain. Every summary here is linear in L, so it is written as its
coefficients C[t, d] (value = sum C * L). The same coefficients then give its interval, because each
document is scored after every stage. Within a domain the documents are the sampling units and all
stages are paired on them. Domains are independent samples.

Positive differences are worse (loss rose). As a percentage of perplexity a difference x is exp(x) -
1. Intervals cover the choice of test documents only; training noise (seeds, orders) needs more than
one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import special  # scipy.stats takes a second to import


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval (low, high; nan when n cannot give one) over n units (documents
    or items). Without arguments: there is nothing."""

    value: float = np.nan
    low: float = np.nan
    high: float = np.nan
    n: int = 0

    def map(self, f: Callable[[float], float]) -> Estimate:
        """Return the same estimate on another scale, by an increasing function."""
        return Estimate(f(self.value), f(self.low), f(self.high), self.n)


Parts = dict[str, tuple[np.ndarray, np.ndarray]]
"""Domain -> (z, tokens), a value per document. The summary is the sum over domains of sum z / sum
tokens."""


def linearised(parts: Parts) -> tuple[float, float, float]:
    """Return the summary, its standard error over documents and the degrees of freedom.

    Within a domain it is a ratio of sums over documents, sum z_i / sum tokens_i; its variance is
    the linearised one, n/(n-1) sum (z_i - g tokens_i)^2 / (sum tokens)^2 (Cochran, Sampling
    Techniques, 1977, eq. 6.13). Variances add over domains, degrees of freedom by
    Welch-Satterthwaite. The error is nan with fewer than two documents in a domain."""
    value = variance = spread = 0.0
    for z, tokens in parts.values():
        n, total = len(z), tokens.sum()
        ratio, inflate = float(np.sum(z) / total), n / (n - 1) if n > 1 else np.nan
        v = float(inflate * np.square(z - ratio * tokens).sum() / total**2)
        value, variance, spread = value + ratio, variance + v, spread + v**2 / max(n - 1, 1)
    return value, float(np.sqrt(variance)), variance**2 / spread if spread > 0 else 1.0


def t_interval(parts: Parts, confidence: float = 0.95) -> Estimate:
    """Return the summary with a t-interval over documents (linearised)."""
    value, error, df = linearised(parts)
    half = float(special.stdtrit(df, (1 + confidence) / 2)) * error  # Student's t
    return Estimate(value, value - half, value + half, sum(len(z) for z, _ in parts.values()))


class LossMatrix:
    """L[t, d] with the documents behind it.

    nll_nats[d]: (stages + 1, documents of d) sum of -ln p of each document after each stage.
    tokens[d]: (documents of d,) scored tokens, the same after every stage. nbytes[d]: UTF-8 bytes
    of the scored text; None where nobody gave them. trained: domains in training order. controls:
    domains that are never trained. regime: joint has one stage, which trains all of them.
    individual has a stage for each, which begins from the pretrained model.
    """

    def __init__(
        self,
        nll_nats: dict[str, np.ndarray],
        tokens: dict[str, np.ndarray],
        trained: list[str],
        controls: list[str],
        regime: Literal["sequential", "joint", "individual"] = "sequential",
        nbytes: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.trained, self.controls, self.regime = list(trained), list(controls), regime
        self.domains = self.trained + self.controls

        def arrays(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {d: np.asarray(given[d], dtype=np.float64) for d in self.domains}

        self.nll_nats, self.tokens = arrays(nll_nats), arrays(tokens)
        self.nbytes = None if nbytes is None else arrays(nbytes)
        self.stages = 1 if regime == "joint" else len(self.trained)
        for d in self.domains:
            count = len(self.tokens[d])
            if self.nll_nats[d].shape != (self.stages + 1, count):
                shape = self.nll_nats[d].shape
                raise ValueError(
                    f"{d}: {shape} values for {self.stages + 1} stages x {count} documents"
                )
            if self.nbytes is not None and len(self.nbytes[d]) != count:
                raise ValueError(
                    f"{d}: bytes of {len(self.nbytes[d])} documents, tokens of {count}"
                )
        self.loss = np.stack(
            [self.nll_nats[d].sum(1) / self.tokens[d].sum() for d in self.domains], axis=1
        )

    @classmethod
    def from_documents(
        cls,
        documents: pd.DataFrame,
        trained: list[str],
        controls: list[str],
        regime: Literal["sequential", "joint", "individual"] = "sequential",
    ) -> LossMatrix:
        """Return the matrix of a record's table of documents (record.DOCUMENT_COLUMNS). Documents
        are sorted by id, so two runs that scored the same ones have them in the same order.
        ValueError: a document is missing at a stage, or its tokens or bytes differ between
        stages."""
        nll = {}
        counts: dict[str, dict[str, np.ndarray]] = {
            c: {} for c in ("tokens", "bytes") if c in documents
        }
        for d in [*trained, *controls]:
            rows = documents[documents.domain == d]
            if rows.split.nunique() > 1:
                raise ValueError(
                    f"{d}: documents of several splits: {', '.join(sorted(rows.split.unique()))}"
                )
            table = rows.pivot(index="stage", columns="document", values="nll_nats")
            if (
                list(table.index) != list(range(2 if regime == "joint" else len(trained) + 1))
                or table.isna().to_numpy().any()
            ):
                raise ValueError(f"{d}: not every document is scored after every stage")
            nll[d] = table.to_numpy()
            for what, found in counts.items():
                count = rows.pivot(index="stage", columns="document", values=what)
                if not (count.nunique() == 1).all():
                    raise ValueError(f"{d}: the scored {what} of a document differ between stages")
                found[d] = count.iloc[0].to_numpy()
        return cls(nll, counts["tokens"], trained, controls, regime, counts.get("bytes"))

    @property
    def bits_per_byte(self) -> np.ndarray:
        """Return (stages + 1, domains) sum NLL / (ln 2 * UTF-8 bytes of the scored text). Lower is
        better. It is comparable across tokenizers, which nats per token are not (The Pile,
        2101.00027). ValueError: the bytes are unknown."""
        if self.nbytes is None:
            raise ValueError("the bytes of the scored documents are not known")
        return np.stack(
            [self.nll_nats[d].sum(1) / (np.log(2) * self.nbytes[d].sum()) for d in self.domains],
            axis=1,
        )

    def contributions(self, coefficients: np.ndarray) -> Parts:
        """Return (z, tokens), both (documents,), of every domain with a coefficient that is not 0,
        where z_i = sum_t C[t, d] nll[t, d, i] in nats. sum C * L is the sum over these domains of
        sum z / sum tokens. Nothing else is needed to resample documents."""
        columns = ((d, coefficients[:, j]) for j, d in enumerate(self.domains))
        return {d: (c @ self.nll_nats[d], self.tokens[d]) for d, c in columns if c.any()}

    def estimate(self, coefficients: np.ndarray, confidence: float = 0.95) -> Estimate:
        """Return sum C * L with its interval over documents."""
        return t_interval(self.contributions(coefficients), confidence)

    def mean_change(
        self, later: int | Sequence[int], earlier: int | Sequence[int], domains: list[str]
    ) -> np.ndarray:
        """Return the coefficients of the mean over domains of L[later, d] - L[earlier, d]. later,
        earlier: a stage for each domain, or one for all."""
        c, columns = np.zeros_like(self.loss), [self.domains.index(d) for d in domains]
        c[later, columns] += 1 / len(domains)
        c[earlier, columns] -= 1 / len(domains)
        return c


Coefficients = np.ndarray | None  # (stages + 1, domains), or None where the summary does not exist


def learned(m: LossMatrix) -> Coefficients:
    """Return learned: the mean over trained domains of L[k, k] - L[0, k]. Negative is good. For
    each domain it is the sum of its zero-shot part and its own step. Of the means, learned =
    own_step + (T - 1) / T * zero_shot, which leaves out the first domain. Joint training learns
    every domain in stage 1."""
    stages = 1 if m.regime == "joint" else range(1, m.stages + 1)
    return m.mean_change(stages, 0, m.trained)


def own_step(m: LossMatrix) -> Coefficients:
    """Return the own step (plasticity): the mean over trained domains of L[k, k] - L[k-1, k], which
    is what the domain's own stage changed. A domain that is learned alone begins from the
    pretrained model: its own step is what it learned."""
    if m.regime == "joint":
        return None
    if m.regime == "individual":
        return learned(m)
    return m.mean_change(range(1, m.stages + 1), range(m.stages), m.trained)


def zero_shot(m: LossMatrix) -> Coefficients:
    """Return the zero-shot part: the mean over domains k >= 2 of L[k-1, k] - L[0, k], which is what
    stages on other domains changed before a domain's own (the negative of zero-shot forward
    transfer, GEM's FWT, 1706.08840, with the pretrained model as b)."""
    if m.stages < 2 or m.regime != "sequential":
        return None
    return m.mean_change(range(1, m.stages), 0, m.trained[1:])


def backward(m: LossMatrix) -> Coefficients:
    """Return the backward change: the mean over all but the last domain of L[T, k] - L[k, k].
    Positive is forgetting. It is the negative of BWT (GEM, 1706.08840, eq. 3) on R = -L."""
    if m.stages < 2 or m.regime != "sequential":
        return None
    return m.mean_change(m.stages, range(1, m.stages), m.trained[:-1])


def backward_net(m: LossMatrix) -> Coefficients:
    """Return the backward change minus the controls' mean change over the same stages. It is
    forgetting beyond a drift that text never trained on shares (a damaged base that repairs itself
    improves the controls too)."""
    c = backward(m)
    if c is None or not m.controls:
        return None
    for k in range(1, m.stages):
        c = c - m.mean_change(m.stages, k, m.controls) / (m.stages - 1)
    return c


def from_base(m: LossMatrix) -> Coefficients:
    """Return the change from base: the mean over trained domains of L[T, k] - L[0, k]."""
    if m.regime == "individual":
        return None
    return m.mean_change(m.stages, 0, m.trained)


def controls_from_base(m: LossMatrix) -> Coefficients:
    """Return the controls' change: the mean over control domains of L[T, c] - L[0, c]. Where
    domains were learned alone, it is the mean over their models too."""
    if not m.controls:
        return None
    ends = range(1, m.stages + 1) if m.regime == "individual" else [m.stages]
    return np.asarray(np.mean([m.mean_change(k, 0, m.controls) for k in ends], axis=0))


def forgetting_by_age(m: LossMatrix) -> dict[int, np.ndarray]:
    """Return forgetting by stages since learned: age a -> coefficients of the mean over domains k
    with k + a <= T of L[k+a, k] - L[k, k], a = 1 .. T - 1. Positive is forgetting. The higher the
    age, the fewer and earlier the domains (T - a of them, at T - 1 the first alone), so a slope
    mixes age with domain and position. Empty unless domains were learned one after the other."""
    if m.regime != "sequential":
        return {}
    counts = {a: m.stages - a for a in range(1, m.stages)}
    return {
        a: m.mean_change(range(a + 1, m.stages + 1), range(1, n + 1), m.trained[:n])
        for a, n in counts.items()
    }


def forward_transfer(m: LossMatrix) -> Coefficients:
    """Return zero-shot forward transfer: the mean over domains k >= 2 of L[0, k] - L[k-1, k], the
    negative of zero_shot. Positive is good. It is not among METRICS, which are all better below 0:
    see published."""
    c = zero_shot(m)
    return None if c is None else -c


METRICS: tuple[Callable[[LossMatrix], Coefficients], ...] = (
    learned,
    own_step,
    zero_shot,
    backward,
    backward_net,
    from_base,
    controls_from_base,
)


def summary(m: LossMatrix) -> dict[str, Estimate]:
    """Return every metric that exists for this matrix, by function name, in nats per token."""
    return {f.__name__: m.estimate(c) for f in METRICS if (c := f(m)) is not None}


def published(m: LossMatrix) -> dict[str, float]:
    """Return what other definitions give for the same matrix, in nats per token, with R[t, k] =
    -L[t, k] where they have accuracy. Signs are theirs. Trained domains only. Empty unless domains
    were learned one after the other. Of a single stage TRACE alone says something. Not all are
    linear in L, so there are no intervals. docs/metrics.md works one matrix through.

    forward_transfer: this project's own (see the function of that name). Positive is good.
    gem_bwt (Lopez-Paz and Ranzato 2017, 1706.08840, eq. 3): mean over k < T of R[T, k] - R[k, k].
        Positive is good. Their code divides by T; this follows the paper.
    gem_fwt (the same, eq. 4): mean over k >= 2 of R[k-1, k] - b[k]. Their b is the model before any
        training. Here it is the pretrained model, R[0, k]. Positive is good.
    chaudhry_forgetting (Chaudhry et al. 2018, 1801.10112; compute_fgt in facebookresearch/agem):
        mean over k < T of max over l in 1 .. T-1 of R[l, k], minus R[T, k]. The best may be of a
        stage before the domain's own. Row 0 is left out. Positive is worse; never below -gem_bwt.
    trace_op (Wang et al. 2023, 2310.06762), at T: mean over k <= T of R[T, k]: a level, no change.
    trace_bwt (the same): mean over k <= T of R[T, k] - R[k, k], with the 0 of the last domain:
        (T - 1) / T of gem_bwt. Positive is good.
    avalanche_forgetting (ContinualAI/avalanche, evaluation/metrics/forgetting_bwt.py, with the loss
        for its accuracy): after the last stage, mean over earlier experiences of the value just
        after their own training minus the last value. Positive is worse.
    avalanche_bwt: its negative.
    avalanche_forward_transfer (forward_transfer.py there): mean over experiences from the second of
        the value just before their training minus the value before any training.
    """
    if m.regime != "sequential":
        return {}
    r = -m.loss[:, : m.stages]  # (stages + 1, trained domains)
    after, before, last = np.diagonal(r, -1), np.diagonal(r), r[-1]  # R[k, k], R[k-1, k], R[T, k]
    found = {"trace_op": last.mean(), "trace_bwt": (last - after).mean()}
    if m.stages > 1:
        forgotten, transferred = (after - last)[:-1].mean(), (before - r[0])[1:].mean()
        found |= {"forward_transfer": transferred, "gem_bwt": -forgotten, "gem_fwt": transferred}
        found |= {"chaudhry_forgetting": (r[1:-1].max(axis=0) - last)[:-1].mean()}
        found |= {
            "avalanche_forgetting": forgotten,
            "avalanche_bwt": -forgotten,
            "avalanche_forward_transfer": transferred,
        }
    return {name: float(value) for name, value in found.items()}
