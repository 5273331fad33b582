"""The loss matrix of a run and every summary of it. numpy and scipy only.

L[t, d] is the loss in nats per token on domain d after stage t; t = 0 is the pretrained model, stage k trains the
k-th domain. Every summary here is linear in L, so it is written as its coefficients C[t, d] (value = sum C * L).
The same coefficients then give its interval, because each document is scored after every stage: within a domain the
documents are the sampling units and all stages are paired on them; domains are independent samples.

Positive differences are worse (loss rose). As a percentage of perplexity a difference x is exp(x) - 1. Intervals
cover the choice of test documents only; training noise (seeds, orders) needs more than one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval (low, high; nan when n cannot give one) over n units (documents or items)."""

    value: float
    low: float
    high: float
    n: int

    def map(self, f: Callable[[float], float]) -> Estimate:
        """The same estimate on another scale, by an increasing function."""
        return Estimate(f(self.value), f(self.low), f(self.high), self.n)


class LossMatrix:
    """L[t, d] with the documents behind it.

    nll_nats[d]: (stages + 1, documents of d), sum of -ln p of each document after each stage; tokens[d]: (documents of
    d,) scored tokens, the same after every stage. trained: domains in training order; controls: never trained. regime: joint
    has one stage, which trains all of them; individual has a stage for each, begun from the pretrained model.
    """

    def __init__(
        self,
        nll_nats: dict[str, np.ndarray],
        tokens: dict[str, np.ndarray],
        trained: list[str],
        controls: list[str],
        regime: Literal["sequential", "joint", "individual"] = "sequential",
    ) -> None:
        self.trained, self.controls, self.regime = list(trained), list(controls), regime
        self.domains = self.trained + self.controls
        self.nll_nats = {d: np.asarray(nll_nats[d], dtype=np.float64) for d in self.domains}
        self.tokens = {d: np.asarray(tokens[d], dtype=np.float64) for d in self.domains}
        self.stages = 1 if regime == "joint" else len(self.trained)
        for d in self.domains:
            if self.nll_nats[d].shape != (self.stages + 1, len(self.tokens[d])):
                raise ValueError(f"{d}: {self.nll_nats[d].shape} values for {self.stages + 1} stages x {len(self.tokens[d])} documents")
        self.loss = np.stack([self.nll_nats[d].sum(1) / self.tokens[d].sum() for d in self.domains], axis=1)

    @classmethod
    def from_documents(
        cls,
        documents: pd.DataFrame,
        trained: list[str],
        controls: list[str],
        regime: Literal["sequential", "joint", "individual"] = "sequential",
    ) -> LossMatrix:
        """From the document table of a record (record.DOCUMENT_COLUMNS); ValueError on a missing or unpaired cell."""
        nll, tokens = {}, {}
        for d in [*trained, *controls]:
            rows = documents[documents.domain == d]
            if rows.split.nunique() > 1:
                raise ValueError(f"{d}: documents of several splits: {', '.join(sorted(rows.split.unique()))}")
            table = rows.pivot(index="stage", columns="document", values="nll_nats")
            if list(table.index) != list(range(2 if regime == "joint" else len(trained) + 1)) or table.isna().to_numpy().any():
                raise ValueError(f"{d}: not every document is scored after every stage")
            counts = rows.pivot(index="stage", columns="document", values="tokens")
            if not (counts.nunique() == 1).all():
                raise ValueError(f"{d}: the scored tokens of a document differ between stages")
            nll[d], tokens[d] = table.to_numpy(), counts.iloc[0].to_numpy()
        return cls(nll, tokens, trained, controls, regime)

    def estimate(self, coefficients: np.ndarray, confidence: float = 0.95) -> Estimate:
        """sum C * L with a t-interval over documents.

        Within a domain sum_t C[t, d] L[t, d] is a ratio of sums over documents, z_i / tokens_i with z_i = sum_t C[t, d]
        nll[t, d, i]; its variance is the linearised one, n/(n-1) sum (z_i - g tokens_i)^2 / (sum tokens)^2 (Cochran,
        Sampling Techniques, 1977, eq. 6.13). Variances add over domains, degrees of freedom by Welch-Satterthwaite.
        """
        value, variance, spread, n = 0.0, 0.0, 0.0, 0
        for j, d in enumerate(self.domains):
            c = coefficients[:, j]
            if not c.any():
                continue
            z, tokens = c @ self.nll_nats[d], self.tokens[d]
            size, total = len(tokens), tokens.sum()
            ratio = z.sum() / total
            value, n = value + ratio, n + size
            if size < 2:
                variance = np.nan
                continue
            v = size / (size - 1) * np.square(z - ratio * tokens).sum() / total**2
            variance, spread = variance + v, spread + v**2 / (size - 1)
        if not variance >= 0:
            return Estimate(float(value), np.nan, np.nan, n)
        df = variance**2 / spread if spread > 0 else 1.0
        half = float(stats.t.ppf((1 + confidence) / 2, df)) * float(np.sqrt(variance))
        return Estimate(float(value), float(value - half), float(value + half), n)

    def cell(self, stage: int, domain: str) -> Estimate:
        """Loss of one cell with its interval."""
        return self.estimate(self._unit(stage, domain))

    def _unit(self, stage: int, domain: str) -> np.ndarray:
        c = np.zeros_like(self.loss)
        c[stage, self.domains.index(domain)] = 1.0
        return c

    def _mean(self, later: list[int], earlier: list[int], domains: list[str]) -> np.ndarray:
        """Coefficients of mean over domains of L[later, d] - L[earlier, d]."""
        c = np.zeros_like(self.loss)
        for a, b, d in zip(later, earlier, domains, strict=True):
            j = self.domains.index(d)
            c[a, j] += 1 / len(domains)
            c[b, j] -= 1 / len(domains)
        return c


Coefficients = np.ndarray | None  # (stages + 1, domains), or None where the summary does not exist


def learned(m: LossMatrix) -> Coefficients:
    """Learned: mean over trained domains of L[k, k] - L[0, k]; negative is good. For each domain the sum of its zero-shot
    part and its own step; of the means, learned = own_step + (T - 1) / T * zero_shot, which leaves out the first domain. Joint
    training learns every domain in stage 1."""
    stages = [1] * len(m.trained) if m.regime == "joint" else list(range(1, m.stages + 1))
    return m._mean(stages, [0] * len(m.trained), m.trained)


def own_step(m: LossMatrix) -> Coefficients:
    """Own step (plasticity): mean over trained domains of L[k, k] - L[k-1, k]: what the domain's own stage changed. Alone, a
    domain is learned from the pretrained model: its own step is what it learned."""
    if m.regime == "joint":
        return None
    if m.regime == "individual":
        return learned(m)
    stages = list(range(1, m.stages + 1))
    return m._mean(stages, [k - 1 for k in stages], m.trained)


def zero_shot(m: LossMatrix) -> Coefficients:
    """Zero-shot part: mean over domains k >= 2 of L[k-1, k] - L[0, k]: what stages on other domains changed before a
    domain's own (the negative of zero-shot forward transfer; GEM's FWT, 1706.08840, with the pretrained model as b)."""
    if m.stages < 2 or m.regime != "sequential":
        return None
    stages = list(range(2, m.stages + 1))
    return m._mean([k - 1 for k in stages], [0] * len(stages), m.trained[1:])


def backward(m: LossMatrix) -> Coefficients:
    """Backward change: mean over all but the last domain of L[T, k] - L[k, k]; positive is forgetting. The negative of
    BWT (GEM, 1706.08840, eq. 3) on R = -L."""
    if m.stages < 2 or m.regime != "sequential":
        return None
    earlier = m.trained[:-1]
    return m._mean([m.stages] * len(earlier), list(range(1, m.stages)), earlier)


def backward_net(m: LossMatrix) -> Coefficients:
    """Backward change minus the controls' mean change over the same stages: forgetting beyond a drift that text never
    trained on shares (a damaged base that repairs itself improves the controls too)."""
    c = backward(m)
    if c is None or not m.controls:
        return None
    for k in range(1, m.stages):
        c = c - m._mean([m.stages] * len(m.controls), [k] * len(m.controls), m.controls) / (m.stages - 1)
    return c


def from_base(m: LossMatrix) -> Coefficients:
    """Change from base: mean over trained domains of L[T, k] - L[0, k]."""
    if m.regime == "individual":
        return None
    return m._mean([m.stages] * len(m.trained), [0] * len(m.trained), m.trained)


def controls_from_base(m: LossMatrix) -> Coefficients:
    """Controls: mean over control domains of L[T, c] - L[0, c]; of domains learned alone, the mean over their models too."""
    if not m.controls:
        return None
    if m.regime == "individual":
        ends = range(1, m.stages + 1)
        return sum((m._mean([k] * len(m.controls), [0] * len(m.controls), m.controls) for k in ends), np.zeros_like(m.loss)) / m.stages
    return m._mean([m.stages] * len(m.controls), [0] * len(m.controls), m.controls)


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
    """Every metric that exists for this matrix, by function name, in nats per token."""
    return {f.__name__: m.estimate(c) for f in METRICS if (c := f(m)) is not None}
