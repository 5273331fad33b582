"""Uncertainty of summaries and of comparisons: intervals, tests, verdicts, power. Needs
numpy and scipy alone.

Over documents and items: bootstrap_t, for what one run or two paired runs say. It covers the choice
of test documents only. Over blocks (order k and seed k, all methods in each): blocks, t_test and
tost on one paired difference a block. They cover training noise, and the choice of documents too if
its error is given. Answers right or wrong: mcnemar. What n cannot give is nan.

All take Parts (LossMatrix.contributions). Those of the items of a task are {task: (x, ones)}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import scipy  # scipy.stats takes a second to import: it is loaded when it is first used

from gain_cl.stats.matrix import Estimate, Parts, linearised

Verdict = Literal["better", "worse", "equivalent", "inconclusive"]
Kind = Literal["difference", "equivalence"]

RESAMPLES = 2000
# losses, margins and shares are of order 1 in float64: a smaller spread is rounding, not a
# measurement
ROUNDING = 1e-12


class Error(NamedTuple):
    """A standard error with its degrees of freedom. Without arguments: not known.

    least: a floor under the standard error. It is the error that the shared documents alone give
    the mean over blocks. Blocks that agree by chance cannot make an interval narrower than that."""

    standard_error: float = np.nan
    df: float = np.nan
    least: float = 0.0


# --- over documents and items ---------------------------------------------------------------------


def combined(parts: Sequence[Parts], weights: Sequence[float]) -> Parts:
    """Return the parts of sum_k weights[k] * summary k: [1, -1] for a paired difference, 1 / K each
    for a mean over blocks. A domain that a summary leaves out counts as zero there. ValueError: the
    documents differ in number or length."""
    total: Parts = {}
    for part, weight in zip(parts, weights, strict=True):
        for domain, (z, tokens) in part.items():
            before, length = total.get(domain, (0.0, tokens))
            if not np.array_equal(length, tokens):
                raise ValueError(f"{domain}: the documents differ between the summaries")
            total[domain] = before + weight * z, tokens
    return total


@lru_cache(maxsize=32)
def _counts(seed: int, domain: str, n: int, resamples: int) -> np.ndarray:
    """Return (resamples, n) how often each unit is drawn. It depends on these four alone: whatever
    is compared meets the same draws."""
    draws = np.random.default_rng([seed, n, *domain.encode()]).integers(n, size=(resamples, n))
    return np.stack([np.bincount(d, minlength=n).astype(np.uint8) for d in draws])


def _sample(parts: Parts, seed: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (resamples,) deviations from the summary and their variances (linearised)."""
    deviations, variances = np.zeros((2, resamples))
    for domain, (z, tokens) in parts.items():
        n, e = len(z), z - np.sum(z) / tokens.sum() * tokens
        table = np.stack([e, tokens, e * e, e * tokens, tokens * tokens], axis=1)
        ce, ct, cee, cet, ctt = (_counts(seed, domain, n, resamples) @ table).T
        # The resample's ratio minus the ratio: small, so its squares below lose no digits.
        d = ce / ct
        deviations += d
        squares = np.maximum(cee - 2 * d * cet + d * d * ctt, 0)
        variances += n / max(n - 1, 1) * squares / ct**2
    return deviations, variances


def error(parts: Parts) -> Error:
    """Return the standard error over documents (linearised)."""
    return Error(*linearised(parts)[1:])


def shared_error(parts: Sequence[Parts]) -> Error:
    """Return the error over documents that averaging over blocks does not remove: the root of the
    mean covariance over documents of two blocks. The rest of the documents' noise shows between the
    blocks. parts: one of each block. Of one block it is its error."""
    k, alone = len(parts), float(np.mean([error(p).standard_error ** 2 for p in parts]))
    together, df, _ = error(combined(parts, [1 / k] * k))
    return Error(
        float(np.sqrt(max(together**2 - (alone - together**2) / max(k - 1, 1), 0.0))), df, together
    )


def resampled(parts: Parts, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Return (1 + resamples,) values for fronts: the summary, then as it is when documents are
    drawn again within each domain."""
    return linearised(parts)[0] + np.insert(_sample(parts, seed, resamples)[0], 0, 0.0)


def bootstrap_t(
    parts: Parts, seed: int = 0, resamples: int = RESAMPLES, confidence: float = 0.95
) -> Estimate:
    """Return the summary with its studentised bootstrap interval over documents, in the unit and
    sign of z / tokens.

    Documents are drawn with replacement within each domain; value and standard error are computed
    in each resample, and the quantiles of t* = (g* - g) / se* give [g - t*_high se, g - t*_low se]
    (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 12.5). Deviation: a quantile is
    never taken nearer to 0 than Student's t. The bootstrap corrects for skewness, which t ignores
    (93% for 95% with 32 skewed documents), but it also shortens tails that look heavy, and 32
    documents cannot tell how heavy (92-93%). The longer of both covers at 94-96%, 2-13% wider than
    t. nan bounds: fewer than two documents in a domain, no spread, or so few units that differ that
    resamples without spread reach into the tails.
    """
    value, se, df = linearised(parts)
    n, tails = sum(len(z) for z, _ in parts.values()), (1 + np.array([-1, 1]) * confidence) / 2
    if not se > ROUNDING:
        return Estimate(value, n=n)
    deviations, variances = _sample(parts, seed, resamples)
    spread = variances > 1e-9 * se**2  # else all drawn units agree up to rounding
    t = deviations / np.sqrt(np.where(spread, variances, 1))
    t = np.where(spread, t, np.copysign(np.inf, deviations))
    with np.errstate(invalid="ignore"):  # between two infinite values
        low, high = np.quantile(t, tails, method="weibull")
    if not np.isfinite(low + high):
        return Estimate(value, n=n)
    student = scipy.stats.t.ppf(tails, df)
    low, high = min(low, student[0]), max(high, student[1])
    return Estimate(value, float(value - high * se), float(value - low * se), n)


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p that answers lost and gained are equally likely (McNemar 1947;
    binomial on the flips alone); 1 without flips."""
    return float(scipy.stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


# --- over blocks ----------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """A mean with its standard error (nan when the blocks cannot give one). df, share: degrees of
    freedom and share of the variance, of blocks and of documents."""

    value: float
    se: float
    df: np.ndarray
    share: np.ndarray

    def tail(self, t: float) -> float:
        """Return the chance of t or more under the null."""
        return float(np.dot(self.share, scipy.stats.t.sf(t, self.df)))


def _fit(differences: np.ndarray, documents: Error | None) -> _Blocks:
    """Return the mean of the blocks' differences with the parts of its error."""
    x, (w, df, least) = np.asarray(differences, dtype=np.float64), documents or Error(0.0, 1.0)
    n, value = len(x), float(x.mean()) if len(x) else np.nan
    if n < 2 or not x.std(ddof=1) > ROUNDING + 1e-9 * np.abs(x).max() or not w >= 0:
        return _Blocks(value, np.nan, np.ones(2), np.full(2, np.nan))
    v = float(x.var(ddof=1) / n)
    variances = np.array([v, max(w**2, least**2 - v)])
    whole = float(variances.sum())
    return _Blocks(
        value, whole**0.5, np.where(variances > 0, [n - 1, df], n - 1), variances / whole
    )


def blocks(
    differences: np.ndarray, confidence: float = 0.95, documents: Error | None = None
) -> Estimate:
    """Return the mean of the blocks' paired differences with its t-interval. The tests below use
    the same error.

    documents: their shared_error. Then the interval holds for other documents too, and should:
    blocks share their documents, so that noise does not shrink with more blocks. The variances add
    (crossed random effects, Clark 1973). Tail probabilities of the two degrees of freedom are
    weighted by the variances (Cochran & Cox 1957 weigh the quantiles): 94.5-97% for 95% with 3 to 8
    blocks, where Satterthwaite's gives 92% with 3 blocks and a size of 0.037 for 0.0125. Never less
    than the error over documents alone, which few blocks fall below by chance. nan with fewer than
    two blocks, and with identical ones: runs that cannot differ say nothing about runs that
    could."""
    fit, half = _fit(differences, documents), np.nan
    if fit.se > 0:
        low, high = sorted(scipy.stats.t.ppf((1 + confidence) / 2, fit.df))
        half = fit.se * scipy.optimize.brentq(
            lambda t: fit.tail(t) - (1 - confidence) / 2, low - 1e-6, high + 1e-6
        )
    return Estimate(fit.value, fit.value - half, fit.value + half, len(differences))


def t_test(differences: np.ndarray, documents: Error | None = None) -> float:
    """Return the two-sided p of the paired t-test against 0. Errors are as in blocks."""
    fit = _fit(differences, documents)
    return 2 * fit.tail(abs(fit.value) / fit.se)


def tost(differences: np.ndarray, margin: float, documents: Error | None = None) -> float:
    """Return the p of equivalence, |true mean| < margin: the larger of the two one-sided t-tests
    (Schuirmann 1987). Errors are as in blocks."""
    fit = _fit(differences, documents)
    return fit.tail((margin - abs(fit.value)) / fit.se)


# --- verdicts -------------------------------------------------------------------------------------


def holm(p: dict[str, float], together: int | None = None) -> dict[str, float]:
    """Return p adjusted for a family of tests (Holm 1979). A nan counts in the size of the family
    and stays nan. together: at most so many of the null hypotheses can be true at once (Shaffer
    1986, procedure 1), all of them if None."""
    adjusted, worst = dict(p), 0.0
    for i, name in enumerate(sorted((n for n in p if not np.isnan(p[n])), key=p.__getitem__)):
        worst = max(worst, min(1.0, p[name] * min(len(p) - i, together or len(p))))
        adjusted[name] = worst
    return adjusted


class Tests(NamedTuple):
    """p of a difference (t_test) and of equivalence (tost; nan without a margin) of one
    endpoint."""

    difference: float
    equivalence: float


def adjusted(family: dict[str, Tests]) -> dict[str, Tests]:
    """Return both tests of every declared endpoint, adjusted together: a false claim in the table
    with probability alpha at most. Of an endpoint's two nulls (nothing; beyond the margin) one is
    true at most, so a family pays for its endpoints, not for all tests."""
    raw = {f"{k} {name}": p for name, tests in family.items() for k, p in tests._asdict().items()}
    p = holm(raw, together=len(family))
    return {name: Tests(p[f"difference {name}"], p[f"equivalence {name}"]) for name in family}


def verdict(
    value: float, p: Tests, kind: Kind, lower_is_better: bool = True, alpha: float = 0.05
) -> Verdict:
    """Return what adjusted tests allow to say of a difference ``value``. A certain difference
    within the margin passes both tests. Both are true then, and the kind that the endpoint was
    declared with says which was asked. Neither: inconclusive (nan included)."""
    different, equivalent = p.difference < alpha, p.equivalence < alpha
    if equivalent and (kind == "equivalence" or not different):
        return "equivalent"
    if different:
        return "better" if (value < 0) == lower_is_better else "worse"
    return "inconclusive"


# --- power: what n can show -----------------------------------------------------------------------


def detectable(sd: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the smallest true mean difference that the two-sided paired t-test over n blocks finds
    with this power, in the unit of sd, the standard deviation of a block's difference (noncentral
    t)."""
    t = scipy.stats.t.ppf(1 - alpha / 2, n - 1)

    def found(shift: float) -> float:  # scipy says nan where the tail of the wrong sign vanishes
        nct = scipy.stats.nct(n - 1, shift)
        return float(nct.sf(t) + np.nan_to_num(nct.cdf(-t)))

    return _root(found, power, 3 * t + 5) * sd / np.sqrt(n)


def detectable_equivalence(sd: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the smallest margin within which TOST over n blocks places a true difference of 0 with
    this power, in the unit of sd: the mean is normal, sd's estimate an independent chi, over which
    the power is averaged."""
    chi2 = scipy.stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, n - 1)
    spread = np.sqrt(chi2 / max(n - 1, 1))
    needed = scipy.stats.t.ppf(1 - alpha, n - 1) * spread  # in standard errors

    def found(margin: float) -> float:
        return float(np.mean(np.maximum(2 * scipy.stats.norm.cdf(margin - needed) - 1, 0)))

    return _root(found, power, needed[-1] + 10) * sd / np.sqrt(n)


def _root(found: Callable[[float], float], wanted: float, highest: float) -> float:
    """Return where ``found`` rises to ``wanted`` between 0 and ``highest``; nan if it does not."""
    if not found(highest) > wanted:
        return np.nan
    return float(scipy.optimize.brentq(lambda x: found(x) - wanted, 0, highest))
