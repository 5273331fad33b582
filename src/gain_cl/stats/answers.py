"""What task items say: accuracies, margins, ranking and flips, per stage and between two stages.
numpy and scipy only.

Input is the item table of a record (record.ITEM_COLUMNS; logprobs: log p of each choice in nats). A
change compares the same items before and after, so its interval is paired over items: it covers the
choice of items only; training noise (seeds, orders) needs more than one run. What is undefined for
a task (a ranking of items that all have one answer) is left out, never a number; an interval that n
cannot give is nan (see matrix.Estimate).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import special, stats

from gain_cl.errors import DataError
from gain_cl.stats.matrix import Estimate

RESAMPLES = (
    2000  # of the bootstrap; 95% bounds move by about 2% of the interval's width from seed to seed
)
SEED = 0


class Answers(NamedTuple):
    """Items of one task at one stage, sorted by id. items, gold: (I,); logprobs, chars: (I, C), C
    the most choices an item has; where an item has fewer, logprobs is -inf and chars 1."""

    items: np.ndarray
    gold: np.ndarray
    logprobs: np.ndarray
    chars: np.ndarray | None

    @property
    def binary(self) -> bool:
        """Every item has the same two choices by position, such as no and yes."""
        return bool(self.logprobs.shape[1] == 2)


def answers(items: pd.DataFrame, task: str, stage: int) -> Answers:
    """The items of a task at a stage. DataError: there are none, one occurs twice, or its values
    are malformed."""
    rows = items[(items.task == task) & (items.stage == stage)].sort_values("item")
    if not len(rows):
        raise DataError(
            f"no items of {task} at stage {stage}",
            "record",
            "score the task at that stage (tasks.stages)",
        )
    if rows["item"].duplicated().any():
        raise DataError(
            f"{task} has an item twice at stage {stage}", "record", "run again with force=true"
        )
    gold = rows["gold"].to_numpy(dtype=np.int64)
    try:
        counts = rows["logprobs"].map(len).to_numpy()
        logprobs = _table(rows["logprobs"], -np.inf)
        known = "choice_chars" in rows and rows["choice_chars"].notna().all()
        chars = _table(rows["choice_chars"], 1.0) if known else None
    except (TypeError, ValueError):  # no lists, or no numbers in them
        counts, logprobs, chars = np.zeros(1), np.zeros((0, 0)), None
    sound = (
        (counts >= 2).all()
        and (gold >= 0).all()
        and (gold < counts).all()
        and (np.isfinite(logprobs).sum(1) == counts).all()
    )
    if not sound or (
        chars is not None and (chars.shape != logprobs.shape or not (chars > 0).all())
    ):
        raise DataError(
            f"malformed items of {task} at stage {stage}", "record", "run again with force=true"
        )
    return Answers(rows["item"].to_numpy(), gold, logprobs, chars)


def _table(lists: pd.Series, fill: float) -> np.ndarray:
    """(rows, longest list) float64, short lists filled up."""
    counts = lists.map(len).to_numpy()
    table = np.full((len(lists), counts.max()), fill, dtype=np.float64)
    table[np.arange(table.shape[1]) < counts[:, None]] = np.concatenate(
        [np.asarray(x, dtype=np.float64) for x in lists]
    )
    return table


# --- values per item, (I,) ------------------------------------------------------------------------


def correct(a: Answers) -> np.ndarray:
    """Whether the most likely choice is the right one (lm-eval's acc; the first of equals)."""
    right: np.ndarray = a.logprobs.argmax(1) == a.gold
    return right


def correct_norm(a: Answers) -> np.ndarray | None:
    """The same by log-likelihood per character of the choice (lm-eval's acc_norm); None without the
    lengths."""
    if a.chars is None:
        return None
    right: np.ndarray = (a.logprobs / a.chars).argmax(1) == a.gold
    return right


def margin(a: Answers) -> np.ndarray:
    """Log-odds of the right choice among the choices, in nats: log p(gold) - log sum p(others);
    positive: preferred."""
    rows = np.arange(len(a.gold))
    others = a.logprobs.copy()
    others[rows, a.gold] = -np.inf
    odds: np.ndarray = a.logprobs[rows, a.gold] - special.logsumexp(others, axis=1)
    return odds


def preference(a: Answers) -> np.ndarray:
    """Log-odds of choice 1 against choice 0 (yes against no), in nats, whichever is right. Binary
    tasks only."""
    if not a.binary:
        raise ValueError(f"{a.logprobs.shape[1]} choices")
    odds: np.ndarray = a.logprobs[:, 1] - a.logprobs[:, 0]
    return odds


# --- one number per stage -------------------------------------------------------------------------


def auc(a: Answers) -> float | None:
    """Chance that an item whose answer is choice 1 prefers it more than one whose answer is choice
    0 (ties count half): what the model knows apart from a leaning to one answer. None unless the
    task is binary and has both answers."""
    if not a.binary or len(np.unique(a.gold)) < 2:
        return None
    score, one = preference(a), a.gold == 1
    return float(_auc(score[one], score[~one]))


def _auc(ones: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """Mann-Whitney U / (m n) along the last axis."""
    m, n = ones.shape[-1], zeros.shape[-1]
    ranks = stats.rankdata(np.concatenate([ones, zeros], axis=-1), axis=-1)[..., :m]
    share: np.ndarray = (ranks.sum(-1) - m * (m + 1) / 2) / (m * n)
    return share


def balanced_accuracy(a: Answers) -> float | None:
    """Mean over the right answers' positions of the accuracy on their items: a model that always
    says the same scores 1 / positions. None when all items have the same answer."""
    kinds = np.unique(a.gold)
    if len(kinds) < 2:
        return None
    right = correct(a)
    return float(np.mean([right[a.gold == k].mean() for k in kinds]))


def level(items: pd.DataFrame, task: str, stage: int) -> dict[str, Estimate]:
    """accuracy, accuracy_norm (Wilson intervals), margin (t), auc, balanced_accuracy (bootstrap) of
    one stage, with 95% intervals over items; what is undefined is left out."""
    a = answers(items, task, stage)
    found = {"accuracy": _share(correct(a)), "margin": _mean(margin(a))}
    if (normed := correct_norm(a)) is not None:
        found["accuracy_norm"] = _share(normed)
    if (value := auc(a)) is not None:
        found["auc"] = _ranked(value, [preference(a)], a.gold)
    if (value := balanced_accuracy(a)) is not None:
        found["balanced_accuracy"] = _balanced(value, correct(a).astype(np.float64), a.gold, 0.0)
    return found


# --- between two stages ---------------------------------------------------------------------------


def change(items: pd.DataFrame, task: str, from_stage: int, to_stage: int) -> dict[str, Estimate]:
    """Later minus earlier of accuracy, accuracy_norm, margin (paired t over items), auc and
    balanced_accuracy (paired bootstrap over items within each answer, seeded), with 95% intervals;
    what is undefined is left out."""
    before, after = _pair(items, task, from_stage, to_stage)
    found = {
        "accuracy": _paired_share(correct(before), correct(after)),
        "margin": _mean(margin(after) - margin(before)),
    }
    one, two = correct_norm(before), correct_norm(after)
    if one is not None and two is not None:
        found["accuracy_norm"] = _paired_share(one, two)
    early, late = auc(before), auc(after)
    if early is not None and late is not None:
        found["auc"] = _ranked(late - early, [preference(before), preference(after)], before.gold)
    early, late = balanced_accuracy(before), balanced_accuracy(after)
    if early is not None and late is not None:
        found["balanced_accuracy"] = _balanced(
            late - early, correct(after).astype(np.float64) - correct(before), before.gold, -1.0
        )
    return found


class Flips(NamedTuple):
    """Items whose answer turned from right to wrong, from wrong to right, and all items."""

    lost: int
    gained: int
    items: int


def flips(items: pd.DataFrame, task: str, from_stage: int, to_stage: int) -> Flips:
    """How many answers changed: a still accuracy may hide many."""
    before, after = (correct(a) for a in _pair(items, task, from_stage, to_stage))
    return Flips(int((before & ~after).sum()), int((~before & after).sum()), len(before))


def _pair(
    items: pd.DataFrame, task: str, from_stage: int, to_stage: int
) -> tuple[Answers, Answers]:
    before, after = answers(items, task, from_stage), answers(items, task, to_stage)
    if not np.array_equal(before.items, after.items) or not np.array_equal(before.gold, after.gold):
        raise DataError(
            f"{task} has other items at stage {to_stage} than at stage {from_stage}",
            "record",
            "run again with force=true",
        )
    return before, after


# --- intervals ------------------------------------------------------------------------------------


def _mean(x: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean with a t-interval."""
    n, value = len(x), float(x.mean())
    if n < 2:
        return Estimate(value, np.nan, np.nan, n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * x.std(ddof=1) / np.sqrt(n))
    return Estimate(value, value - half, value + half, n)


def _share(right: np.ndarray) -> Estimate:
    """A share with its Wilson interval, which does not shrink to a point at 0 and 1."""
    found = stats.binomtest(int(right.sum()), len(right)).proportion_ci(0.95, method="wilson")
    return Estimate(float(right.mean()), float(found.low), float(found.high), len(right))


def _constant(x: np.ndarray, lowest: float, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of the mean of which n values in lowest..1 are all the same: the share of others that
    n items can hide (Clopper-Pearson, two-sided) times how far off they can be. A zero spread was
    seen, which is not certainty."""
    hidden = 1 - ((1 - confidence) / 2) ** (1 / len(x))
    return float(x[0] - hidden * (x[0] - lowest)), float(x[0] + hidden * (1 - x[0]))


def _paired_share(before: np.ndarray, after: np.ndarray) -> Estimate:
    """Difference of two shares on the same items: paired t."""
    x = after.astype(np.float64) - before
    return (
        _mean(x)
        if np.ptp(x) > 0 or len(x) < 2
        else Estimate(float(x[0]), *_constant(x, -1.0), len(x))
    )


def _bootstrap(
    value: float, samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], n: int
) -> Estimate:
    """Percentile interval of a statistic of independent samples (the items of each answer, by
    index)."""
    if min(len(s) for s in samples) < 2:
        return Estimate(value, np.nan, np.nan, n)
    batch = max(1, 2_000_000 // n)  # 16 MB of float64 a batch
    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        batch=batch,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    return Estimate(
        value, float(found.confidence_interval.low), float(found.confidence_interval.high), n
    )


def _ranked(value: float, scores: list[np.ndarray], gold: np.ndarray) -> Estimate:
    """AUC of one stage, or of the second minus the first; an item keeps its scores of both stages
    when drawn."""

    def statistic(ones: np.ndarray, zeros: np.ndarray, axis: int) -> np.ndarray:
        ones, zeros = (np.moveaxis(x, axis, -1).astype(np.int64) for x in (ones, zeros))
        return sum((1 if s is scores[-1] else -1) * _auc(s[ones], s[zeros]) for s in scores)  # type: ignore[return-value]

    found = _bootstrap(
        value, (np.flatnonzero(gold == 1), np.flatnonzero(gold == 0)), statistic, len(gold)
    )
    same = len(scores) == 2 and np.array_equal(
        scores[0], scores[1]
    )  # bit for bit the same answers: a change of exactly nothing
    if found.low == found.high and not same:  # no resample differs: the spread is unseen
        return Estimate(value, np.nan, np.nan, found.n)
    return found


def _balanced(value: float, x: np.ndarray, gold: np.ndarray, lowest: float) -> Estimate:
    """Mean over answers of the mean of x on their items. x: right or wrong (lowest 0), or the
    change of it (-1)."""
    groups = tuple(x[gold == k] for k in np.unique(gold))
    if all(np.ptp(g) == 0 for g in groups):
        low, high = np.mean([_constant(g, lowest) for g in groups], axis=0)
        return Estimate(value, float(low), float(high), len(x))

    def statistic(*resampled: np.ndarray, axis: int) -> np.ndarray:
        mean: np.ndarray = sum(g.mean(axis) for g in resampled) / len(resampled)
        return mean

    return _bootstrap(value, groups, statistic, len(x))
