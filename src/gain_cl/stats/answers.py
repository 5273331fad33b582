"""Answers to the items of a task: accuracy, margin, ranking and flips of one stage and between two.
Needs numpy, pandas and scipy alone.

The input is the table of items of a record (record.ITEM_COLUMNS; logprobs: log p of each choice in
nats). A change compares the same items before and after, so its interval is paired over items. It
covers the choice of items only: training noise (seeds, orders) needs more than one run. A value
that a task does not have is left out, such as the ranking of items that all have one answer. An
interval that n items cannot give is nan (see matrix.Estimate).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy  # scipy.stats takes a second to import: it is loaded when it is first used

from gain_cl.errors import DataError
from gain_cl.stats.matrix import Estimate, t_interval

RESAMPLES = 2000
"""Of the bootstrap. 95% bounds move by about 2% of the interval's width from seed to seed."""
SEED = 0


class Answers(NamedTuple):
    """The items of one task at one stage, sorted by id. items, gold: (I,). logprobs, chars: (I, C)
    with C the most choices of an item. An item with fewer has -inf in logprobs and 1 in chars.
    right: (I,) True where the answer is right, for items without choices, whose C is 0."""

    items: np.ndarray
    gold: np.ndarray
    logprobs: np.ndarray
    chars: np.ndarray | None
    right: np.ndarray | None = None

    @property
    def binary(self) -> bool:
        """True if every item has the same two choices by position, such as no and yes."""
        return self.logprobs.shape[1] == 2


def answers(items: pd.DataFrame, task: str, stage: int) -> Answers:
    """Return the items of a task at a stage. DataError: there are none, one occurs twice, or its
    values are malformed."""
    rows = items[(items.task == task) & (items.stage == stage)].sort_values("item")
    again = "run again with force=true"
    if not len(rows):
        do = "score the task at that stage (tasks.stages)"
        raise DataError(f"no items of {task} at stage {stage}", "record", do)
    if rows["item"].duplicated().any():
        raise DataError(f"{task} has an item twice at stage {stage}", "record", again)
    gold = rows["gold"].to_numpy(dtype=np.int64)
    if (gold < 0).all():  # no choices
        if "right" not in rows or rows["right"].isna().any():
            raise DataError(f"{task} counts no right answers", "record", "read its metrics there")
        right = rows["right"].to_numpy(dtype=bool)
        return Answers(rows["item"].to_numpy(), gold, np.empty((len(gold), 0)), None, right)
    try:
        counts = rows["logprobs"].map(len).to_numpy()
        logprobs, chars = _table(rows["logprobs"], -np.inf), None
        sound = (counts > np.maximum(gold, 1)) & (np.isfinite(logprobs).sum(1) == counts)
        if "choice_chars" in rows and rows["choice_chars"].notna().all():
            chars = _table(rows["choice_chars"], 1.0)
            sound &= (chars.shape == logprobs.shape) & (chars > 0).all(1)
        if not (sound & (gold >= 0)).all():
            raise ValueError
    except (TypeError, ValueError):  # no lists, no numbers in them, or impossible ones
        raise DataError(f"malformed items of {task} at stage {stage}", "record", again) from None
    return Answers(rows["item"].to_numpy(), gold, logprobs, chars)


def _table(lists: pd.Series, fill: float) -> np.ndarray:
    """Return lists as (rows, longest list) float64, short ones filled up."""
    return np.array(list(zip_longest(*lists, fillvalue=fill)), dtype=np.float64).T.copy()


# --- values per item, (I,) ------------------------------------------------------------------------


def correct(a: Answers) -> np.ndarray:
    """Return (I,) True where the most likely choice is the right one (lm-eval's acc), or the answer
    is right where there are no choices. Of equal choices the first counts."""
    return np.asarray(a.logprobs.argmax(1) == a.gold) if a.right is None else a.right


def correct_norm(a: Answers) -> np.ndarray | None:
    """Return the same by log-likelihood per character of the choice (lm-eval's acc_norm); None
    without the lengths."""
    return None if a.chars is None else correct(a._replace(logprobs=a.logprobs / a.chars))


def margin(a: Answers) -> np.ndarray:
    """Return (I,) the log-odds of the right choice in nats: log p(gold) - log sum p(others).
    Positive where it is preferred."""
    right = np.arange(len(a.gold)), a.gold
    others = a.logprobs.copy()
    others[right] = -np.inf
    return np.asarray(a.logprobs[right] - scipy.special.logsumexp(others, axis=1))


def preference(a: Answers) -> np.ndarray:
    """Return (I,) the log-odds of choice 1 against choice 0 (yes against no) in nats, whichever is
    right. ValueError: the task is not binary."""
    if not a.binary:
        raise ValueError(f"{a.logprobs.shape[1]} choices")
    return np.asarray(a.logprobs[:, 1] - a.logprobs[:, 0])


# --- one number per stage -------------------------------------------------------------------------


def auc(a: Answers) -> float | None:
    """Return the chance that an item whose answer is choice 1 prefers it more than an item whose
    answer is choice 0 (ties count half). It shows what the model knows apart from a leaning to one
    answer. None unless the task is binary and has both answers."""
    if not a.binary or len(np.unique(a.gold)) < 2:
        return None
    return float(_auc(*(preference(a)[a.gold == k] for k in (1, 0))))


def _auc(ones: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    """Return Mann-Whitney U / (m n) along the last axis."""
    u = scipy.stats.mannwhitneyu(ones, zeros, axis=-1, method="asymptotic").statistic
    return np.asarray(u / (ones.shape[-1] * zeros.shape[-1]))


def balanced_accuracy(a: Answers) -> float | None:
    """Return the mean over the positions of right answers of the accuracy on their items. A model
    that always says the same scores 1 / positions. None when all items have the same answer."""
    right, kinds = correct(a), np.unique(a.gold)
    return float(np.mean([right[a.gold == k].mean() for k in kinds])) if len(kinds) > 1 else None


def level(items: pd.DataFrame, task: str, stage: int) -> dict[str, Estimate]:
    """Return accuracy, accuracy_norm (Wilson intervals), margin, balanced_accuracy (t) and auc
    (bootstrap) of one stage, with 95% intervals over items. What is undefined is left out."""
    return _estimates(answers(items, task, stage))


def change(items: pd.DataFrame, task: str, from_stage: int, to_stage: int) -> dict[str, Estimate]:
    """Return later minus earlier of accuracy, accuracy_norm, margin, balanced_accuracy (paired t
    over items) and auc (seeded bootstrap of pairs within each answer), with 95% intervals. What is
    undefined is left out."""
    return _estimates(*_pair(items, task, from_stage, to_stage))


def _estimates(*stages: Answers) -> dict[str, Estimate]:
    """Return the estimates of one stage, or of the second minus the first of two."""
    gold, one = stages[0].gold, len(stages) == 1

    def value(of: Callable[[Answers], np.ndarray | float | None]) -> Any:
        """Return the value of the stage or the difference; None where a stage has none."""
        found = [of(a) for a in stages]
        if any(v is None for v in found):
            return None
        values = np.asarray(found, np.float64)
        return values[0] if one else values[1] - values[0]

    def share(right: np.ndarray) -> Estimate:
        return _share(right) if one else _mean([right], -1.0)

    right = value(correct)
    found = {"accuracy": share(right)}
    if stages[0].right is None:
        found["margin"] = _mean([value(margin)])
    if (normed := value(correct_norm)) is not None:
        found["accuracy_norm"] = share(normed)
    if (ranked := value(auc)) is not None:
        found["auc"] = _ranked(float(ranked), [preference(a) for a in stages], gold)
    if value(balanced_accuracy) is not None:
        groups = [right[gold == k] for k in np.unique(gold)]
        found["balanced_accuracy"] = _mean(groups, 0.0 if one else -1.0)
    return found


# --- between two stages ---------------------------------------------------------------------------


class Flips(NamedTuple):
    """The number of items whose answer turned from right to wrong, from wrong to right, and of all
    items."""

    lost: int
    gained: int
    items: int


def flips(items: pd.DataFrame, task: str, from_stage: int, to_stage: int) -> Flips:
    """Return how many answers changed. An accuracy that does not move may hide many."""
    before, after = (correct(a) for a in _pair(items, task, from_stage, to_stage))
    return Flips(int((before & ~after).sum()), int((~before & after).sum()), len(before))


def _pair(
    items: pd.DataFrame, task: str, from_stage: int, to_stage: int
) -> tuple[Answers, Answers]:
    """Return the same items at both stages. DataError: they are not the same."""
    before, after = answers(items, task, from_stage), answers(items, task, to_stage)
    if not all(np.array_equal(b, a) for b, a in zip(before[:2], after[:2], strict=True)):
        what = f"{task} has other items at stage {to_stage} than at stage {from_stage}"
        raise DataError(what, "record", "run again with force=true")
    return before, after


# --- intervals ------------------------------------------------------------------------------------


def _share(right: np.ndarray) -> Estimate:
    """Return a share with its Wilson interval, which does not shrink to a point at 0 and 1."""
    n = len(right)
    low, high = scipy.stats.binomtest(int(right.sum()), n).proportion_ci(0.95, method="wilson")
    return Estimate(float(right.mean()), float(low), float(high), n)


def _mean(groups: list[np.ndarray], lowest: float | None = None) -> Estimate:
    """Return the mean over groups of items of the mean of their values, with its t-interval over
    items (matrix.linearised: variances add over groups).

    lowest: the values are in lowest..1. Where those of each group are all the same no spread was
    seen, which does not mean that there is none: n items can hide a share of others
    (Clopper-Pearson, two-sided), and these can be as far off as the range allows."""
    parts = {str(k): (x / len(groups), np.ones(len(x))) for k, x in enumerate(groups)}
    found = t_interval(parts)
    if lowest is None or any(len(x) < 2 or np.ptp(x) > 0 for x in groups):
        return found
    first, n = np.array([(x[0], len(x)) for x in groups]).T
    hidden = 1 - 0.025 ** (1 / n)
    low, high = (float(np.mean(first + hidden * (end - first))) for end in (lowest, 1))
    return Estimate(found.value, low, high, found.n)


def _ranked(value: float, scores: list[np.ndarray], gold: np.ndarray) -> Estimate:
    """Return the AUC of one stage, or of the second minus the first, with its percentile interval.
    Items are drawn again within each answer and bring their scores, (I,) preferences, of each
    stage."""

    def statistic(ones: np.ndarray, zeros: np.ndarray, axis: int) -> np.ndarray:
        ones, zeros = (np.moveaxis(x, axis, -1).astype(np.int64) for x in (ones, zeros))
        found = [_auc(s[ones], s[zeros]) for s in scores]
        return found[0] if len(scores) == 1 else found[1] - found[0]

    n, sides = len(gold), [np.flatnonzero(gold == k) for k in (1, 0)]
    if min(map(len, sides)) < 2:
        return Estimate(value, n=n)
    low, high = scipy.stats.bootstrap(
        sides,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // n),  # 16 MB of float64 a batch
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    # Bit for bit the same answers change by exactly nothing.
    if low == high and not (len(scores) == 2 and np.array_equal(scores[0], scores[1])):
        return Estimate(value, n=n)  # no resample differs: the spread is unseen
    return Estimate(value, float(low), float(high), n)
