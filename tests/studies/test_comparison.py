"""Studies of simulated records: what is paired, what is declared, and what may be said."""

from __future__ import annotations

import dataclasses
import doctest
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gain_cl
import synthetic
from gain_cl import cli
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import record
from gain_cl.studies import equal, verdicts
from gain_cl.studies.experiments import (
    Endpoint,
    Experiment,
    latin_order,
    load_experiment,
    planned_runs,
    setting_label,
    shipped_experiments,
)
from gain_cl.studies.study import (
    Block,
    Parts,
    Setting,
    Study,
    difference,
    level,
    study_of_experiment,
    study_of_runs,
)
from synthetic import config

DOMAINS = ["a", "b", "c", "d"]
CONTROLS = ["x", "y"]


def simulated(
    path: Path,
    method: str,
    lr: float,
    block: int,
    *,
    learn: float,
    forget: float,
    seed: int = 0,
    count: int = 32,
    tasks: bool = False,
) -> record.Run:
    """A run in which a domain falls by ``learn`` nats in its own stage and rises by ``forget`` by
    the end, each with the noise of its block (0.01 nats), of its documents, which all runs share,
    and of both."""
    order = [DOMAINS[i] for i in latin_order(len(DOMAINS), block)]
    shared, own = (
        np.random.default_rng(7),
        np.random.default_rng([seed, block, *f"{method}{lr}".encode()]),
    )
    learn, forget = learn + own.normal(0, 0.01), forget + own.normal(0, 0.01)
    rows = []
    for d in [*DOMAINS, *CONTROLS]:
        tokens = shared.integers(20, 33, count)
        level = 3.0 + shared.normal(0, 0.3, count)
        ease = shared.normal(0, 0.05, count)  # of a document: learned by all methods alike
        for stage in range(len(order) + 1):
            if stage:
                noise = own.normal(0, 0.01, count)
                k = order.index(d) + 1 if d in order else 0
                later = len(order) - k
                change = (
                    -(learn + ease) if stage == k else forget / later if k and stage > k else 0.0
                )
                level = level + change + noise
            parts = {
                "stage": stage,
                "domain": d,
                "split": "test",
                "document": [f"{d}{i:04d}" for i in range(count)],
            }
            rows.append(
                pd.DataFrame(
                    {**parts, "nll_nats": level * tokens, "tokens": tokens, "bytes": tokens * 4}
                )
            )
    table = pd.concat(rows, ignore_index=True)
    items = pd.DataFrame(columns=record.ITEM_COLUMNS)
    if tasks:
        gold = shared.integers(0, 2, 50)
        margins = np.array([shared.normal(0, 1, 50), shared.normal(0, 1, 50) - forget])
        of = [
            (s, i, int(gold[i]), margins[int(s > 0)][i]) for s in (0, len(order)) for i in range(50)
        ]
        items = pd.DataFrame(
            [
                {
                    "stage": s,
                    "task": "boolq@50",
                    "item": f"{i:04d}",
                    "gold": g,
                    "logprobs": [0.0, m] if g else [m, 0.0],
                }
                | {"choice_bytes": [2, 3], "choice_chars": [2, 3]}
                for s, i, g, m in of
            ]
        )
    settings = config(order, CONTROLS, tasks=["boolq@50"] if tasks else None)
    settings = settings.model_copy(
        update={
            "method": method,
            "seed": block,
            "train": settings.train.model_copy(update={"lr": lr}),
        }
    )
    stages = []
    for stage in range(len(order) + 1):
        at = table[table.stage == stage]
        scores = {
            str(d): record.DomainScore(
                nll_nats=float(r.nll_nats.sum()),
                tokens=int(r.tokens.sum()),
                bytes=int(r.bytes.sum()),
                documents=len(r),
            )
            for d, r in at.groupby("domain")
        }
        scored = (
            {"boolq@50": record.TaskScore(items=50, correct=25, correct_norm=25, fewshot=0)}
            if tasks and stage in (0, len(order))
            else {}
        )
        train = (
            record.TrainStats(
                steps=8, tokens=8192, seconds=40, lr=lr, first_loss_nats=3, last_loss_nats=2.9
            )
            if stage
            else None
        )
        name = order[stage - 1] if stage else None
        stages.append(
            record.StageRecord(
                index=stage,
                domain=name,
                domains=scores,
                tasks=scored,
                train=train,
                eval_seconds=9,
                task_seconds=1,
            )
        )
    made = record.RunRecord(
        run_id=f"smollm2-{method}-lr{lr:g}-b{block}",
        model="smollm2",
        method=method,
        sequence="offline",
        seed=block,
        trained=order,
        controls=CONTROLS,
        protocol="ppl-test-first32x32-prefix0-ctx1024",
        config=settings.model_dump(mode="json"),
        pins={"validation": {d: d for d in sorted([*DOMAINS, *CONTROLS])}},
        provenance={"device": "cpu"},
        trainable_parameters=1000 if method == "gain" else 50_000,
        total_parameters=10**6,
        peak_memory_bytes=1,
        stages=stages,
        items_sha256="",
    )
    return record.save(made, table, items, path / f"{made.run_id}.json")


def an_experiment(
    endpoints: list[dict[str, object]], blocks: int = 4, **keys: object
) -> Experiment:
    grid = {"gain": {"train.lr": [1e-2, 3e-2]}, "lora": {"train.lr": [1e-3, 3e-3]}}
    plain = {
        "name": "e",
        "question": "which?",
        "methods": grid,
        "blocks": blocks,
        "endpoints": endpoints,
        "reference": "lora",
        "skill": -14,
        **keys,
    }
    return Experiment.model_validate(plain)


LINE = {
    "gain": {1e-2: (0.10, 0.02), 3e-2: (0.20, 0.12)},
    "lora": {1e-3: (0.12, 0.05), 3e-3: (0.30, 0.25)},
}
"""method -> rate -> (learned, forgotten): both on lines, so that the truth at any skill is
known."""


def a_study(
    path: Path,
    e: Experiment,
    line: dict[str, dict[float, tuple[float, float]]] = LINE,
    seed: int = 0,
    tasks: bool = False,
) -> Study:
    runs = {}
    for method, values in e.settings():
        for block in range(e.blocks):
            learn, forget = line[method][values["train.lr"]]
            runs[setting_label(method, values), block] = simulated(
                path,
                method,
                values["train.lr"],
                block,
                learn=learn,
                forget=forget,
                seed=seed,
                tasks=tasks,
            )
    return study_of_experiment(e, runs)


FOUR = [
    {
        "name": "learns",
        "metric": "own_step",
        "of": "gain",
        "minus": "lora",
        "kind": "equivalence",
        "margin": 5,
    },
    {"name": "forgets", "metric": "backward", "of": "gain", "minus": "lora", "at": "matched"},
    {"name": "keeps", "metric": "backward", "of": "gain"},
    {"name": "boolq", "metric": "margin:boolq@50", "of": "gain", "minus": "lora"},
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return a_study(tmp_path_factory.mktemp("study"), an_experiment(FOUR), tasks=True)


def test_levels_and_differences_are_the_truth(study: Study) -> None:
    gain, lora = study.chosen["gain"], study.chosen["lora"]
    own = level(gain, "own_step")
    assert (
        own is not None and own.blocks == 4 and own.estimate.value == pytest.approx(-0.10, abs=0.02)
    )
    back = difference(gain, lora, "backward")
    assert back is not None and back.estimate.low < 0.02 - 0.05 < back.estimate.high
    by_hand = np.mean([gain.value("backward", k) - lora.value("backward", k) for k in study.blocks])
    assert back.estimate.value == pytest.approx(by_hand, abs=1e-12)
    assert back.estimate.high - back.estimate.low < 0.06  # documents cancel: their ease is shared


def test_equal_skill_is_read_off_both_fronts(study: Study) -> None:
    found = equal.match_skill(study, "gain", "lora", skill=-0.15)
    truth = (0.02 + 0.05) - (0.05 + 0.2 * 0.03 / 0.18)  # on each line at 0.15 learned
    assert found.differences.mean() == pytest.approx(truth, abs=0.03)
    unreached = equal.match_skill(study, "gain", "lora", skill=-0.28)
    assert (
        math.isnan(equal.interval_of(unreached).value)
        and "gain does not reach the own step" in unreached.reason
    )


def test_one_setting_is_no_front(study: Study) -> None:
    """It would be given for any lesser skill what it forgot at its own."""
    settings = [s for s in study.settings if s.method == "gain" or s is study.chosen["lora"]]
    found = equal.match_skill(dataclasses.replace(study, settings=settings), "gain", "lora")
    assert found.reason == "one setting of lora: no front to read" and math.isnan(
        equal.interval_of(found).value
    )


def test_a_skill_below_every_setting_of_a_method_is_not_read(study: Study) -> None:
    """What learned more would be said to forget as much at less."""
    found = equal.match_skill(
        study, "gain", "lora", skill=-0.11
    )  # gain's least is 0.10 learned, lora's 0.12
    assert found.reason.startswith(
        "lora has no setting that learns as little as -10.4%: its least is -1"
    )
    assert math.isnan(equal.interval_of(found).value)


def test_every_block_must_have_settings_on_both_sides(tmp_path: Path) -> None:
    runs = {}
    for method, rate, learn in (
        ("gain", 1e-2, 0.05),
        ("gain", 3e-2, 0.3),
        ("lora", 1e-3, 0.05),
        ("lora", 3e-3, 0.3),
    ):
        for block in range(3):
            more = (
                0.25 if (method, rate, block) == ("lora", 1e-3, 2) else learn
            )  # over the blocks its mean is still below the skill
            runs[setting_label(method, {"train.lr": rate}), block] = simulated(
                tmp_path, method, rate, block, learn=more, forget=0.1
            )
    study = study_of_experiment(an_experiment([], blocks=3), runs)
    assert equal.match_skill(study, "gain", "lora", skill=-0.15).reason.startswith(
        "lora has no setting that learns as little as -13.9%"
    )


def test_verdicts_over_blocks(study: Study) -> None:
    judged = {j.endpoint.name: j for j in verdicts.judge(study)}
    assert judged["learns"].verdict == "equivalent"  # 0.02 nats apart, margin 5%
    assert judged["keeps"].verdict in (
        "worse",
        "inconclusive",
    )  # it forgets 0.02 nats: never better
    assert judged["boolq"].compared is not None and judged["boolq"].compared.estimate.n == 50
    assert all(j.tests.difference >= 0 for j in judged.values())


def test_a_clear_difference_is_a_verdict(tmp_path: Path) -> None:
    line = {
        "gain": {1e-2: (0.1, 0.0), 3e-2: (0.3, 0.01)},
        "lora": {1e-3: (0.1, 0.2), 3e-3: (0.3, 0.3)},
    }
    judged = verdicts.judge(a_study(tmp_path, an_experiment(FOUR[:2]), line))
    assert [j.verdict for j in judged] == ["equivalent", "better"]


def test_without_a_positive_control_nothing_is_decided(tmp_path: Path) -> None:
    line = {
        "gain": {1e-2: (0.2, 0.0), 3e-2: (0.3, 0.01)},
        "lora": {1e-3: (0.2, 0.05), 3e-3: (0.3, 0.06)},
    }
    study = a_study(tmp_path, an_experiment(FOUR[:3]), line)
    setting, most, reached = verdicts.positive_control(study)
    assert not reached and setting is not None and setting.method == "lora" and most is not None
    judged = verdicts.judge(study)
    assert {j.verdict for j in judged} == {
        "inconclusive"
    } and "no setting forgets by 10%" in judged[0].why


def test_one_block_decides_nothing(tmp_path: Path) -> None:
    line = {
        "gain": {1e-2: (0.1, 0.0), 3e-2: (0.3, 0.01)},
        "lora": {1e-3: (0.1, 0.2), 3e-3: (0.3, 0.3)},
    }
    judged = verdicts.judge(a_study(tmp_path, an_experiment(FOUR[:3], blocks=1), line))
    assert {j.verdict for j in judged} == {"inconclusive"} and "one block" in judged[0].why
    assert (
        judged[1].compared is not None and judged[1].compared.estimate.high < 0
    )  # over documents, shown as such


def test_two_blocks_decide_nothing(tmp_path: Path) -> None:
    """What three of the same show."""
    line = {
        "gain": {1e-2: (0.1, 0.0), 3e-2: (0.3, 0.01)},
        "lora": {1e-3: (0.1, 0.2), 3e-3: (0.3, 0.3)},
    }
    backward = [{"name": "forgets", "metric": "backward", "of": "gain", "minus": "lora"}]
    (two,) = verdicts.judge(a_study(tmp_path / "two", an_experiment(backward, blocks=2), line))
    assert (two.verdict, two.why) == (
        "inconclusive",
        "two blocks: a verdict takes 3",
    ) and two.tests.difference < 0.05
    (three,) = verdicts.judge(a_study(tmp_path / "three", an_experiment(backward, blocks=3), line))
    assert three.verdict == "better"


def test_a_method_without_runs_is_said(tmp_path: Path) -> None:
    e = an_experiment(FOUR[:2])
    run = simulated(tmp_path, "gain", 1e-2, 0, learn=0.1, forget=0.2)
    study = study_of_experiment(e, {("gain lr=0.01", 0): run})
    assert study.absent == {"gain": 7, "lora": 8}
    assert [j.why for j in verdicts.judge(study)] == [
        "no finished run of the chosen setting of lora",
        "no finished run of lora",
    ]


CLEAR = {
    "gain": {1e-2: (0.1, 0.0), 3e-2: (0.3, 0.01)},
    "lora": {1e-3: (0.1, 0.2), 3e-3: (0.3, 0.3)},
}


def test_an_unfinished_experiment_decides_nothing(tmp_path: Path) -> None:
    """Looking after every block until something shows up, or leaving out the runs that diverged, is
    no test."""
    e = an_experiment(FOUR[:2])
    study = a_study(tmp_path, e, CLEAR)
    assert {j.verdict for j in verdicts.judge(study)} == {"better", "equivalent"}
    runs = {(s.label, k): run for s in study.settings for k, run in enumerate(s.runs.values())}
    del runs["lora lr=0.003", 3]
    judged = verdicts.judge(study_of_experiment(e, runs))
    assert {j.verdict for j in judged} == {"inconclusive"} and judged[
        0
    ].why == "1 run of its methods is not finished"
    assert (
        judged[0].compared is not None and judged[0].tests.equivalence < 0.05
    )  # shown, but no verdict


def test_what_diverged_is_no_positive_control(tmp_path: Path) -> None:
    """A setting that learned nothing and lost everything shows no forgetting."""
    line = {
        "gain": {1e-2: (0.2, 0.0), 3e-2: (0.3, 0.01)},
        "lora": {1e-3: (0.2, 0.05), 3e-3: (-2.0, 3.0)},
    }
    study = a_study(tmp_path, an_experiment(FOUR[:1], blocks=2), line)
    setting, _, reached = verdicts.positive_control(study)
    assert not reached and setting is not None and setting.label != "lora lr=0.003"


def test_no_common_block_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        simulated(tmp_path / "runs", "gain", 1e-2, 0, learn=0.1, forget=0.2),
        simulated(tmp_path / "runs", "lora", 1e-3, 1, learn=0.1, forget=0.2),
    ]
    assert (
        "no block has runs of both" in equal.match_skill(study_of_runs(runs), "gain", "lora").reason
    )
    assert (
        cli.main(["compare", *(r.record.run_id for r in runs), "--results-dir", str(tmp_path)]) == 0
    )
    assert "no block has runs of both" in " ".join(capsys.readouterr().out.split())


def test_other_items_are_refused(tmp_path: Path) -> None:
    a, b = (
        simulated(tmp_path, m, 1e-2, 0, learn=0.1, forget=0.2, tasks=True) for m in ("gain", "lora")
    )
    b.items.loc[0, "item"] = "other"
    with pytest.raises(DataError, match="boolq@50 has other items"):
        study_of_runs([a, b])


def test_a_task_scored_at_one_end_has_no_change(tmp_path: Path) -> None:
    a = simulated(tmp_path, "gain", 1e-2, 0, learn=0.1, forget=0.2, tasks=True)
    setting = study_of_runs([a]).settings[0]
    assert level(setting, "margin:boolq@50").blocks == 1
    a.record.stages[0].tasks.clear()
    for metric in ("margin:boolq@50", "accuracy:nosuch"):
        assert level(setting, metric).blocks == 0 and math.isnan(
            level(setting, metric).estimate.value
        )


class Drawn(Setting):
    """A setting whose numbers are drawn, not read: documents are shared by all settings and blocks,
    noise is of setting and block."""

    trained = True

    def parts(self, metric: str, block: Block) -> Parts | None:
        own = np.random.default_rng([*repr((self.label, block, metric)).encode()])
        shared = np.random.default_rng([block[0], metric == "backward"]).normal(0, 0.05, 96)
        x = self.values["x"] if metric == "own_step" else self.values["y"]
        tokens = np.full(96, 32)
        return {"d": (32 * (x + own.normal(0, 0.01) + shared + own.normal(0, 0.02, 96)), tokens)}


@pytest.mark.slow
def test_a_planted_null_gives_no_winner() -> None:
    """Two methods on the same true front, 200 experiments of 4 blocks, through judge: a winner in
    at most 5% (and three standard errors of that share)."""
    won, line = 0, [(-0.10, 0.02), (-0.20, 0.12), (-0.30, 0.22)]
    e = an_experiment(FOUR[:2])
    for seed in range(200):
        places: Any = {(seed, tuple("abcd"[k:] + "abcd"[:k])): None for k in range(4)}
        settings = [Drawn(m, {"x": x, "y": y}, places) for m in ("gain", "lora") for x, y in line]
        chosen = {"gain": settings[0], "lora": settings[3]}
        study = Study("null", "", settings, chosen, "lora", e.endpoints, 10.0, -0.15, 0.05)
        won += any(j.verdict in ("better", "worse") for j in verdicts.judge(study))
    assert won <= 0.05 * 200 + 3 * math.sqrt(200 * 0.05 * 0.95)


def test_runs_that_measure_different_things_are_refused(tmp_path: Path) -> None:
    a = simulated(tmp_path, "gain", 1e-2, 0, learn=0.1, forget=0.2)
    b = simulated(tmp_path, "lora", 1e-2, 0, learn=0.1, forget=0.2)
    b.record.protocol = "ppl-test-first64x32-prefix0-ctx1024"
    with pytest.raises(
        DataError,
        match=f"different protocol cannot be compared \\({a.record.run_id} and "
        f"{b.record.run_id}\\)",
    ):
        study_of_runs([a, b])


def test_runs_by_name_are_grouped_into_blocks(tmp_path: Path) -> None:
    runs = [
        simulated(tmp_path, m, lr, k, learn=0.1, forget=0.1)
        for m, lr in (("gain", 1e-2), ("gain", 3e-2), ("lora", 1e-3))
        for k in (0, 1)
    ]
    study = study_of_runs(runs)
    assert [s.label for s in study.settings] == ["gain lr=0.01", "gain lr=0.03", "lora"]
    assert len(study.blocks) == 2 and study.reference == "lora" and not study.endpoints


# --- in a notebook --------------------------------------------------------------------------------


def test_compare_gives_a_row_for_each_setting(tmp_path: Path) -> None:
    runs = [
        simulated(tmp_path, m, lr, k, learn=0.1, forget=0.05)
        for m, lr in (("gain", 1e-2), ("lora", 1e-3))
        for k in (0, 1, 2)
    ]
    table = gain_cl.compare(*runs[:4], runs[4].path, str(runs[5].path))
    assert list(table["setting"]) == ["gain", "lora"] and list(table["blocks"]) == [3, 3]
    assert list(table["trainable_parameters"]) == [1000, 50_000]
    study = study_of_runs(runs)
    for (_, row), setting in zip(table.iterrows(), study.settings, strict=True):
        for metric in ("own_step", "backward", "backward_net", "from_base", "controls_from_base"):
            found = level(setting, metric)
            assert found is not None
            e = found.estimate
            assert (row[metric], row[f"{metric}_low"], row[f"{metric}_high"]) == (
                e.value,
                e.low,
                e.high,
            )
    assert len(table.columns) == 3 + 3 * 5


def test_what_compare_cannot_compare(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        gain_cl.compare()
    lone = synthetic.run(tmp_path / "r.json", bases={"a": 20.0}, controls=[], with_items=False)
    (row,) = gain_cl.compare(lone).to_dict("records")
    assert row["blocks"] == 1 and row["own_step_low"] < row["own_step"] < row["own_step_high"]
    assert math.isnan(row["backward"]) and math.isnan(
        row["controls_from_base_high"]
    )  # one domain, no control
    with pytest.raises(DataError, match="cannot be compared"):
        gain_cl.compare(lone, simulated(tmp_path, "lora", 1e-3, 0, learn=0.1, forget=0.05))


def test_the_example_of_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, method, forget in (("A", "gain", 0.02), ("B", "lora", 0.05)):
        made = simulated(tmp_path, method, 1e-3, 0, learn=0.1, forget=forget)
        record.save(made.record, made.documents, made.items, Path(f"results/runs/{name}.json"))
    found = doctest.DocTestFinder(recurse=False).find(gain_cl.compare, "compare", globs={})
    assert doctest.DocTestRunner().run(found[0]).failed == 0


# --- experiments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_latin_orders_are_balanced(size: int) -> None:
    """Each domain once in each place, and each follows each other equally often (Williams)."""
    rows = [latin_order(size, k) for k in range(size if size % 2 == 0 else 2 * size)]
    assert rows[0] == list(range(size))
    assert all(
        sorted(column) == sorted(list(range(size)) * (len(rows) // size))
        for column in zip(*rows, strict=True)
    )
    follows = [(r[i], r[i + 1]) for r in rows for i in range(size - 1)]
    assert {follows.count(pair) for pair in set(follows)} == {len(rows) // size} and len(
        set(follows)
    ) == size * (size - 1)


@pytest.mark.parametrize("path", sorted(shipped_experiments().glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_composes(path: Path, tmp_path: Path) -> None:
    e = load_experiment(path.stem)
    small = e.model_copy(
        update={
            "blocks": min(e.blocks, 2),
            "models": e.models[-1:],
            "methods": {m: {k: v[:1] for k, v in g.items()} for m, g in e.methods.items()},
        }
    )
    cells = planned_runs(small, [f"results_dir={tmp_path}", f"output_dir={tmp_path}"])
    assert {c.state for c in cells} == {"missing"} and len({c.run_id for c in cells}) == len(cells)


def test_presets_and_plugins_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment names them, so that whoever runs it need not."""
    monkeypatch.chdir(tmp_path)
    Path("mine/method").mkdir(parents=True)
    Path("mine/method/mild.yaml").write_text(
        "# @package _global_\ndefaults: [gain_ffn, _self_]\nmethod: mild\ntrain: {lr: 1.0e-4}\n"
    )
    Path("plug.py").write_text("")
    Path("e.yaml").write_text(
        "question: q\nconfig_dirs: [mine]\nplugins: [plug.py]\noverrides: "
        "[debug=smoke]\nmethods: {mild: {}}\n"
    )
    (cell,) = planned_runs(load_experiment("e.yaml"))
    assert cell.config.train.lr == 1e-4 and cell.overrides[-2:] == [
        "--config-dir=mine",
        "--plugin=plug.py",
    ]
    assert cli.main(["run", *cell.overrides, "compute.threads=1"]) == 0 and cell.record.exists()


def test_models_repeat_an_experiment_and_once_is_of_block_0(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(
        "question: q\nblocks: 2\nmodels: [smollm2, smollm2_healed]\noverrides: [tasks=none, "
        "train.tokens=512]\nonce: [tasks=boolq]\n"
        "methods: {gain_ffn: {}, lora: {}}\n"
    )
    cells = planned_runs(
        load_experiment(str(tmp_path / "e.yaml")),
        [f"results_dir={tmp_path}", f"output_dir={tmp_path}"],
    )
    assert [(c.model, c.block, c.method) for c in cells] == [
        (model, block, method)
        for model in ("smollm2", "smollm2_healed")
        for block in (0, 1)
        for method in ("gain_ffn", "lora")
    ]
    assert [c.config.tasks.names for c in cells] == [["boolq"]] * 2 + [[]] * 2 + [["boolq"]] * 2 + [
        []
    ] * 2
    assert all(c.config.train.tokens == 512 and c.config.seed == c.block for c in cells)


def test_blocks_have_their_order_and_seed(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(
        "question: q\nblocks: 3\noverrides: [debug=smoke]\nmethods: {gain_ffn: {train.lr: "
        "[0.01]}, lora: {adapter.config.r: [1, 2]}}\n"
    )
    cells = planned_runs(load_experiment(str(tmp_path / "e.yaml")), [f"results_dir={tmp_path}"])
    assert len(cells) == 9 and [c.overrides[-2:] for c in cells[:1]] == [
        ["seed=0", "sequence.order=[0,1,2]"]
    ]
    assert cells[3].overrides[-2:] == ["seed=1", "sequence.order=[1,2,0]"]


BOTH = """question: q
methods: {gain_ffn: {}, lora: {seed: [1, 2]}}
endpoints: [{name: e, metric: backward, of: lora, minus: gain_ffn, at: matched}]
"""
BAD = {
    "question: [": "bad YAML",
    "- a\n": "a mapping of keys",
    "question: q\nmethods: {}\n": "methods",
    "question: q\nmethods: {gain_ffn: {}}\nblocks: 0\n": "blocks",
    "question: q\nmethods: {gain_ffn: {}}\nreference: lora\n": "lora is not among the methods",
    "question: q\nmethods: {gain_ffn: {}}\ntypo: 1\n": "typo",
    "question: q\nmethods: {gain_ffn: {}}\nendpoints: [{name: e, metric: forgeting, of: "
    "gain_ffn}]\n": "endpoints.0.metric: String should match pattern",
    "question: q\nmethods: {gain_ffn: {}}\nendpoints: [{name: e, metric: own_step, of: "
    "gain_ffn, kind: equivalence}]\n": "needs margin",
    "question: q\nmethods: {gain_ffn: {train.lr: []}}\n": "methods.gain_ffn.train.lr: List should have at least 1 item",
    BOTH: "declare skill",
    f"skill: -10\n{BOTH}": "give both as many",
    "question: q\nmethods: {lora: {}}\nendpoints: [{name: e, metric: 'accuracy:boolq', "
    "of: lora, margin: 2}]\n": "2 points are 0.02",
    "question: q\nmethods: {gain_fn: {}}\n": "experiment bad: method=gain_fn",
    "question: q\nmethods: {gain_ffn: {}}\noverrides: [trian.tokens=4]\n": "experiment bad: "
    "command line",
    "question: q\noverrides: [debug=smoke]\nmethods: {gain_ffn: {train.lr: [0.01, "
    "0.010]}}\n": "two settings are the same run",
    "question: q\nmethods: {gain_ffn: {}}\nendpoints: [{name: e, metric: 'margin:bolq', "
    "of: gain_ffn}]\n": "do not score 'bolq'",
    "question: q\nmethods: {gain_ffn: {}}\nchosen: {gain_ffn: {train.lr: 1}}\n": "has no setting",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_bad_experiments_are_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    for verb in ("status", "compare", "power"):
        assert cli.main([verb, f"experiment={tmp_path}/bad.yaml"]) == 64
        err = capsys.readouterr().err
        assert BAD[text] in err and err.count("\n") == 1 and "bad" in err


def test_unknown_experiments_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "experiment=pilto"]) == 64
    assert "did you mean pilot?" in capsys.readouterr().err
    assert cli.main(["compare", "experiment=pilot", "experiment=pilot"]) == 64


def test_endpoint_needs_a_sensible_match() -> None:
    with pytest.raises(ValueError, match="at: matched"):
        Endpoint(name="e", metric="own_step", of="gain", minus="lora", at="matched")


# --- the verbs ------------------------------------------------------------------------------------


def test_compare_runs_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        simulated(tmp_path / "runs", m, lr, k, learn=x, forget=y)
        for m, line in LINE.items()
        for lr, (x, y) in line.items()
        for k in (0, 1)
    ]
    names = [r.record.run_id for r in runs]
    assert cli.main(["compare", *names, "--results-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (
        "positive control, some setting forgets by 10%: reached" in out
        and "backward change at equal own step" in out
    )
    assert "exploratory" in out and "2 blocks" in out
    assert cli.main(["compare", *names, "--results-dir", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["setting"] for s in found["settings"]] == [
        "gain lr=0.01",
        "gain lr=0.03",
        "lora lr=0.001",
        "lora lr=0.003",
    ]
    assert found["positive_control"] and found["skill"][0]["method"] == "gain"
    assert len(found["settings"][0]["own step %"]) == 3  # value, low, high
    assert cli.main(["compare", names[0]]) == 64
    assert cli.main(["compare", names[0], "nosuch", "--results-dir", str(tmp_path)]) == 64


def test_status_and_power_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e.yaml").write_text(
        "question: q\nblocks: 2\noverrides: [debug=smoke]\nmethods: {gain_ffn: {}, lora: {}}\n"
    )
    line = [
        f"experiment={tmp_path}/e.yaml",
        f"results_dir={tmp_path}",
        f"output_dir={tmp_path}/runs",
    ]
    assert cli.main(["status", *line, "--missing"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 4 and all(
        c.startswith("python -m gain_cl run method=") for c in commands
    )
    import shlex

    for command in commands:
        assert cli.main(shlex.split(command)[3:]) == 0
    capsys.readouterr()
    assert cli.main(["status", *line, "--json"]) == 0
    assert {r["state"] for r in json.loads(capsys.readouterr().out)["runs"]} == {"done"}
    assert cli.main(["compare", *line]) == 0
    assert "NOT reached" in capsys.readouterr().out
    assert cli.main(["power", *line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cost"]["hours"] == 0 and found["effects"][0]["noise"] == "pilot of 2 blocks"
    assert cli.main(["power", *line, "--block-sd", "-1"]) == 64
    se = found["effects"][1]["document_se"]
    assert (
        cli.main(["power", *line, "eval.documents=16", "--pilot", f"{tmp_path}/e.yaml", "--json"])
        == 0
    )  # twice the documents
    assert json.loads(capsys.readouterr().out)["effects"][1]["document_se"] == pytest.approx(
        se / math.sqrt(2)
    )


def test_power_from_stated_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three blocks find 3.3 sd, five 1.7 (shared/paper.md), less what the documents add."""
    (tmp_path / "e.yaml").write_text(
        "question: q\nblocks: 3\noverrides: [debug=smoke]\nmethods: {gain_ffn: {}, lora: {}}\n"
    )
    stated = ["--block-sd", "0.01", "--document-se", "1e-9", "--speed", "100"]
    assert (
        cli.main(
            ["power", f"experiment={tmp_path}/e.yaml", f"results_dir={tmp_path}", *stated, "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    shown = {
        int(k): math.log1p(v / 100) / 0.01 for k, v in found["effects"][0]["detectable"].items()
    }
    assert (
        shown[3] == pytest.approx(3.3, abs=0.1)
        and shown[5] == pytest.approx(1.7, abs=0.1)
        and shown[8] == pytest.approx(1.2, abs=0.1)
    )
    run = 3 * 4 * 256 / 100 + 4 * 4 * 8 * 64 / 200
    assert found["cost"]["hours"] == pytest.approx(6 * run / 3600)


def test_an_experiment_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no experiment"):
        load_experiment(str(tmp_path / "x.yaml"))


# --- equal cost -----------------------------------------------------------------------------------


def test_at_equal_cost(study: Study) -> None:
    """Norms on a line with what is forgotten: at equal norm the truth is known. Parameters do not
    vary within a method."""
    norms = {
        run.record.run_id: {1e-2: 1.0, 3e-2: 4.0, 1e-3: 0.5, 3e-3: 2.0}[s.values["train.lr"]]
        for s in study.settings
        for run in s.runs.values()
    }
    found = equal.match_cost(study, "gain", "lora", "norm", "backward", norms)
    assert found.skill == pytest.approx(math.sqrt(2))  # of 1..4 and 0.5..2 the middle of 1..2
    gain = 0.02 + 0.10 * math.log(math.sqrt(2)) / math.log(4)
    lora = 0.05 + 0.20 * math.log(2 * math.sqrt(2)) / math.log(4)
    assert (
        found.differences.mean() == pytest.approx(gain - lora, abs=0.02)
        and found.over_blocks.low < gain - lora < found.over_blocks.high
    )
    assert (
        "do not differ in parameters"
        in equal.match_cost(study, "gain", "lora", "parameters", "backward", {}).reason
    )
    assert "diagnose RUN" in equal.match_cost(study, "gain", "lora", "norm", "backward", {}).reason
