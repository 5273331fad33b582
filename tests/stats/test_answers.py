"""Task items: every number against scikit-learn, scipy or a hand computation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from gain_cl.errors import DataError
from gain_cl.stats import answers


def table(
    gold: list[int],
    *stages: list[list[float]],
    task: str = "boolq@4",
    chars: list[list[int]] | None = None,
) -> pd.DataFrame:
    """Items of several stages, in an order that is not sorted."""
    chars = chars or [[len("no"), len("yes"), 5, 7, 11][: len(x)] for x in stages[0]]
    rows = [
        {
            "stage": s,
            "task": task,
            "item": f"{i:016x}",
            "gold": g,
            "logprobs": x,
            "choice_bytes": c,
            "choice_chars": c,
        }
        for s, logprobs in enumerate(stages)
        for i, (g, x, c) in enumerate(zip(gold, logprobs, chars, strict=True))
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0).reset_index(drop=True)


def drawn(
    count: int, stages: int = 2, choices: int = 2, seed: int = 0, drift: float = 0.3
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, choices, count)
    base = rng.normal(-3, 1, (count, choices)) + 0.7 * np.eye(choices)[gold]
    return table(
        gold.tolist(),
        *[(base + s * rng.normal(-0.1, drift, base.shape)).tolist() for s in range(stages)],
        task="t",
    )


def test_hand_values() -> None:
    frame = table([1, 0, 1, 1], [[-2.0, -1.0], [-1.0, -3.0], [-1.0, -2.0], [-4.0, -3.0]])
    a = answers.answers(frame, "boolq@4", 0)
    assert answers.correct(a).tolist() == [True, True, False, True]
    assert answers.margin(a) == pytest.approx([1, 2, -1, 1])
    assert answers.preference(a) == pytest.approx([1, -2, -1, 1])
    assert answers.auc(a) == 1.0  # the only "no" item prefers "yes" least
    assert answers.balanced_accuracy(a) == pytest.approx((1 / 1 + 2 / 3) / 2)
    found = answers.level(frame, "boolq@4", 0)
    assert found["accuracy"].value == 0.75 and found["accuracy"].n == 4
    wilson = stats.binomtest(3, 4).proportion_ci(0.95, "wilson")
    assert (found["accuracy"].low, found["accuracy"].high) == pytest.approx(
        (wilson.low, wilson.high)
    )


def test_accuracy_norm_divides_by_characters() -> None:
    frame = table([1], [[-2.0, -3.0]], chars=[[2, 6]])
    a = answers.answers(frame, "boolq@4", 0)
    assert not answers.correct(a)[0] and answers.correct_norm(a)[0]  # -2/2 < -3/6


def test_ties_take_the_first_choice() -> None:
    a = answers.answers(table([0, 1], [[-1.0, -1.0], [-1.0, -1.0]]), "boolq@4", 0)
    assert answers.correct(a).tolist() == [True, False] and answers.auc(a) == 0.5


def test_items_with_different_numbers_of_choices() -> None:
    frame = table([2, 4, 0], [[-3.0, -2.0, -1.0], [-5.0, -4.0, -3.0, -2.0, -1.5], [-1.0, -2.0]])
    a = answers.answers(frame, "boolq@4", 0)
    assert answers.correct(a).tolist() == [True, True, True]
    by_hand = [
        -1 - math.log(math.exp(-3) + math.exp(-2)),
        -1.5 - math.log(sum(math.exp(-x) for x in (5, 4, 3, 2))),
        1.0,
    ]
    assert answers.margin(a) == pytest.approx(by_hand)
    assert answers.auc(a) is None
    with pytest.raises(ValueError, match="5 choices"):
        answers.preference(a)


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(seed: int) -> None:
    frame = drawn(211, seed=seed)
    frame.logprobs = frame.logprobs.map(lambda x: np.round(x, 1).tolist())  # with ties
    a = answers.answers(frame, "t", 0)
    assert answers.auc(a) == pytest.approx(
        roc_auc_score(a.gold, a.logprobs[:, 1] - a.logprobs[:, 0]), abs=1e-12
    )
    assert answers.balanced_accuracy(a) == pytest.approx(
        balanced_accuracy_score(a.gold, a.logprobs.argmax(1)), abs=1e-12
    )
    many = answers.answers(drawn(150, choices=4, seed=seed), "t", 1)
    assert answers.balanced_accuracy(many) == pytest.approx(
        balanced_accuracy_score(many.gold, many.logprobs.argmax(1)), abs=1e-12
    )


def test_change_is_paired() -> None:
    frame = drawn(150)
    before, after = answers.answers(frame, "t", 0), answers.answers(frame, "t", 1)
    found = answers.change(frame, "t", 0, 1)
    for name, x, y in (
        ("accuracy", answers.correct(before), answers.correct(after)),
        ("accuracy_norm", answers.correct_norm(before), answers.correct_norm(after)),
        ("margin", answers.margin(before), answers.margin(after)),
    ):
        test = stats.ttest_rel(np.asarray(y, float), np.asarray(x, float))
        interval = test.confidence_interval(0.95)
        assert found[name].value == pytest.approx(np.mean(y) - np.mean(x), abs=1e-12)
        assert (found[name].low, found[name].high) == pytest.approx((interval.low, interval.high))
    assert found["auc"].value == pytest.approx(answers.auc(after) - answers.auc(before), abs=1e-12)
    assert found["balanced_accuracy"].value == pytest.approx(
        answers.balanced_accuracy(after) - answers.balanced_accuracy(before), abs=1e-12
    )
    unpaired = math.hypot(
        *(
            e.high - e.low
            for e in (answers.level(frame, "t", 0)["auc"], answers.level(frame, "t", 1)["auc"])
        )
    )
    assert found["auc"].high - found["auc"].low < 0.8 * unpaired
    assert answers.change(frame, "t", 0, 1) == found  # seeded


def test_auc_interval_against_delong() -> None:
    """The bootstrap's spread is the closed form of DeLong, DeLong and Clarke-Pearson (1988)."""
    frame = drawn(400, seed=3)
    before, after = answers.answers(frame, "t", 0), answers.answers(frame, "t", 1)

    def kernel(a: answers.Answers) -> np.ndarray:
        score, one = answers.preference(a), a.gold == 1
        return (score[one][:, None] > score[~one]) + 0.5 * (score[one][:, None] == score[~one])

    d = kernel(after) - kernel(before)
    error = math.sqrt(d.mean(1).var(ddof=1) / d.shape[0] + d.mean(0).var(ddof=1) / d.shape[1])
    found = answers.change(frame, "t", 0, 1)["auc"]
    assert found.value == pytest.approx(d.mean(), abs=1e-12)
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_balanced_accuracy_interval_against_closed_form() -> None:
    frame = drawn(400, seed=4)
    before, after = answers.answers(frame, "t", 0), answers.answers(frame, "t", 1)
    x = answers.correct(after).astype(float) - answers.correct(before)
    error = math.sqrt(sum(x[before.gold == k].var() / (before.gold == k).sum() for k in (0, 1))) / 2
    found = answers.change(frame, "t", 0, 1)["balanced_accuracy"]
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_intervals_cover() -> None:
    """Drawn again and again from one population, 95% intervals of the accuracy change hold its
    truth about 95% of the time."""
    rng, truth, hits = np.random.default_rng(0), 0.06, 0
    for _ in range(200):
        kind = rng.choice(
            3, size=100, p=[0.10, 0.04, 0.86]
        )  # wrong -> right, right -> wrong, still right
        before = [[-2.0, -1.0] if k else [-1.0, -2.0] for k in kind]
        after = [[-1.0, -2.0] if k == 1 else [-2.0, -1.0] for k in kind]
        e = answers.change(table([1] * 100, before, after), "boolq@4", 0, 1)["accuracy"]
        hits += e.low <= truth <= e.high
    assert 0.90 <= hits / 200 <= 0.99


def test_flips() -> None:
    right, wrong = [-2.0, -1.0], [-1.0, -2.0]
    frame = table([1] * 5, [right, right, right, wrong, wrong], [right, wrong, wrong, right, wrong])
    assert answers.flips(frame, "boolq@4", 0, 1) == answers.Flips(lost=2, gained=1, items=5)
    assert answers.change(frame, "boolq@4", 0, 1)["accuracy"].value == pytest.approx(-0.2)


# --- what cannot be known is said, not invented ---------------------------------------------------


def test_one_answer_only_has_no_ranking() -> None:
    frame = table([1, 1, 1], *[[[-2.0, -1.0], [-3.0, -1.0], [-1.0, -2.0]]] * 2)
    for found in (answers.level(frame, "boolq@4", 0), answers.change(frame, "boolq@4", 0, 1)):
        assert set(found) == {"accuracy", "accuracy_norm", "margin"}


def test_no_flip_among_few_items_is_not_certainty() -> None:
    same = [[-2.0, -1.0]] * 60 + [[-1.0, -2.0]] * 40
    moved = [[x - 0.01, y] for x, y in same]
    e = answers.change(table([1] * 60 + [0] * 40, same, moved), "boolq@4", 0, 1)
    bound = 1 - 0.025 ** (1 / 100)  # 3.6%: more changing items would likely have shown one
    assert (e["accuracy"].value, e["accuracy"].low, e["accuracy"].high) == pytest.approx(
        (0, -bound, bound)
    )
    assert e["balanced_accuracy"].low < -bound and e["balanced_accuracy"].high > bound
    assert e["margin"].value != 0
    assert (
        math.isnan(e["auc"].low) and math.isnan(e["auc"].high) and e["auc"].value == 0
    )  # a perfect ranking stays perfect


def test_the_same_answers_changed_by_nothing() -> None:
    frame = drawn(50, stages=1)
    e = answers.change(pd.concat([frame, frame.assign(stage=1)]), "t", 0, 1)
    for name in ("margin", "auc"):
        assert (e[name].value, e[name].low, e[name].high) == (0, 0, 0)
    assert e["accuracy"].value == 0 and e["accuracy"].high > 0


def test_every_item_lost() -> None:
    e = answers.change(table([1] * 20, [[-2.0, -1.0]] * 20, [[-1.0, -2.0]] * 20), "boolq@4", 0, 1)[
        "accuracy"
    ]
    assert e.value == -1 and e.low == -1 and -1 < e.high < -0.6


def test_one_item_has_no_interval() -> None:
    e = answers.change(table([1], [[-2.0, -1.0]], [[-1.0, -2.0]]), "boolq@4", 0, 1)
    assert e["accuracy"].value == -1 and math.isnan(e["accuracy"].low) and e["accuracy"].n == 1
    assert math.isnan(e["margin"].high)


def test_one_item_of_an_answer_has_no_bootstrap() -> None:
    e = answers.level(table([1, 0, 0], [[-2.0, -1.0], [-2.0, -1.0], [-1.0, -2.0]]), "boolq@4", 0)
    assert e["auc"].value == 0.75 and math.isnan(e["auc"].low)


def test_always_no_is_half_balanced() -> None:
    gold = [1] * 62 + [0] * 38
    e = answers.level(table(gold, [[-1.0, -1.5]] * 100), "boolq@4", 0)
    assert e["accuracy"].value == pytest.approx(0.38) and e["balanced_accuracy"].value == 0.5
    assert e["balanced_accuracy"].low < 0.5 < e["balanced_accuracy"].high


@pytest.mark.parametrize("fault", ["absent", "unpaired", "twice", "nan", "gold"])
def test_malformed_items_are_errors(fault: str) -> None:
    frame = table([1, 0], *[[[-2.0, -1.0], [-1.0, -2.0]]] * 2)
    last = frame.index[frame.stage == 1][0]
    match fault:
        case "absent":
            frame = frame[frame.stage == 0]
        case "unpaired":
            frame.loc[last, "item"] = "f" * 16
        case "twice":
            frame = pd.concat([frame, frame.loc[[last]]])
        case "nan":
            frame.at[last, "logprobs"] = [math.nan, -1.0]
        case "gold":
            frame.loc[last, "gold"] = 2
    with pytest.raises(DataError, match="boolq@4"):
        answers.change(frame, "boolq@4", 0, 1)


def test_without_lengths_there_is_no_accuracy_norm() -> None:
    found = answers.change(drawn(20).drop(columns="choice_chars"), "t", 0, 1)
    assert "accuracy_norm" not in found and "accuracy" in found
