"""A finished run verifies; a planted change of every kind is found by the check that is there for
it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save

import gain_cl
import synthetic
from gain_cl import cli
from gain_cl.measure import provenance, record
from gain_cl.system import checkpoint, files, hashes
from gain_cl.system.sealed import seal_of
from gain_cl.tools import verify

EXAMPLE = next((Path(__file__).parents[2] / "docs/example").glob("*.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(cache, folder): two finished smoke runs, the second with another seed."""
    cache, folder = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAIN_CL_CACHE", str(cache))
        for seed in (0, 1):
            places = [f"output_dir={folder}/runs", f"results_dir={folder}/results"]
            gain_cl.run("debug=smoke", "compute.threads=1", f"seed={seed}", *places)
        yield cache, folder


class Made:
    """A copy of a finished run that a test may damage. record, values, run: its places; other:
    another run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record, other = (
            next((folder / "results/runs").glob(f"*-s{seed}-*.json")) for seed in (0, 1)
        )
        self.values = record.items_path(self.record)
        self.run, self.other = folder / "runs" / self.record.stem, folder / "runs" / other.stem
        self.stages = self.run / "stages"

    def edit(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the record, as somebody who can seal it."""
        synthetic.edit(self.record, change)

    def rewrite(self, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
        """Change the values, and the record's hash of them."""
        change(pd.read_parquet(self.values)).to_parquet(self.values, index=False)
        self.edit(lambda r: r.update(items_sha256=files.sha256(self.values)))

    def reseal(self, stage: str, **changed: bytes) -> None:
        """Write a stage again with other files, so that its manifest agrees. Keys: names of files,
        _ for a dot."""
        folder = self.stages / stage
        content = {name: (folder / name).read_bytes() for name in checkpoint.manifest(folder)}
        content |= {name.replace("_", "."): data for name, data in changed.items()}
        checkpoint.save(folder, {name: data for name, data in content.items() if data})

    def verify(self) -> int:
        return cli.main(["verify", str(self.record), "--output-dir", str(self.folder / "runs")])

    def lines(self) -> dict[str, tuple[str, str]]:
        """check -> (state, finding)"""
        case = verify.Case(record.load(self.record), str(self.folder / "runs"))
        return {x["check"]: (x["state"], x["finding"]) for x in verify.examine(case)[0]}


@pytest.fixture
def run(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setenv("GAIN_CL_CACHE", str(shutil.copytree(made[0], tmp_path / "cache")))
    return Made(shutil.copytree(made[1], tmp_path / "made"))


def test_a_run_verifies(run: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.verify() == 0
    out, err = capsys.readouterr()
    assert not err and "FAILED" not in out
    assert out.splitlines()[-1] == "verified: 10 checks"
    assert run.lines()["task counts"] == ("not there", "the run has no tasks")


def test_by_run_id_as_json(run: Made, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "verify",
        run.record.stem[:-3],
        "--results-dir",
        f"{run.folder}/results",
        "--output-dir",
        f"{run.folder}/runs",
        "--json",
    ]
    assert cli.main(line) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["run_id"] == run.record.stem
    assert {c["state"] for c in told["checks"]} == {"ok", "not there"} and len(
        told["checks"]
    ) == len(verify.CHECKS)


def test_a_record_without_its_run_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path))
    assert cli.main(["verify", str(EXAMPLE), "--json", "--output-dir", str(tmp_path)]) == 0
    states = {c["check"]: c["state"] for c in json.loads(capsys.readouterr().out)["checks"]}
    recomputed = [
        "settings",
        "run id",
        "sums",
        "task counts",
        "training",
        "attempts",
    ]
    assert [name for name, state in states.items() if state == "ok"] == recomputed
    assert set(states.values()) == {"ok", "not there"}


def test_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from gain_cl import cli; code = cli.main(sys.argv[1:]); assert 'torch' "
        "not in sys.modules; sys.exit(code)"
    )
    env = {**os.environ, "GAIN_CL_CACHE": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", code, "verify", str(EXAMPLE), "--output-dir", str(tmp_path)],
        check=True,
        env=env,
    )


# --- planted changes ------------------------------------------------------------------------------

Plant = Callable[[Made], Any]


def cell(r: dict[str, Any], stage: int = 1) -> dict[str, Any]:
    score: dict[str, Any] = r["stages"][stage]["domains"]["smoke_b"]
    return score


def nats(table: pd.DataFrame) -> pd.DataFrame:
    """One document's loss, a millionth higher."""
    return table.assign(nll_nats=table.nll_nats.where(table.index != 5, table.nll_nats * 1.000001))


def shifted(m: Made) -> None:
    """A token moves from one document to the next at one stage: every sum stays."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        first, second = table.index[(table.stage == 2) & (table.domain == "smoke_a")][:2]
        table.loc[first, "tokens"] -= 1
        table.loc[second, "tokens"] += 1
        return table

    m.rewrite(change)


def other_counts(m: Made) -> None:
    """A token moves from one document to the next at every stage."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        for _, rows in table[table.domain == "smoke_c"].groupby("stage"):
            table.loc[rows.index[:2], "tokens"] += [-1, 1]
        return table

    m.rewrite(change)


def other_documents(m: Made) -> None:
    """Documents with the same numbers and other names, at every stage."""
    m.rewrite(
        lambda t: t.assign(
            document=t.document.where(t.domain != "smoke_c", t.document.str.replace("0", "1"))
        )
    )


def fewer(m: Made) -> None:
    """A document is left out at every stage, and every sum agrees."""
    table = pd.read_parquet(m.values)
    gone = table[
        (table.domain == "smoke_b")
        & (table.document == table[table.domain == "smoke_b"].document.iloc[0])
    ]
    m.rewrite(lambda t: t.drop(gone.index))
    for _, row in gone.iterrows():
        m.edit(
            lambda r, row=row: cell(r, row.stage).update(
                documents=7, tokens=cell(r, row.stage)["tokens"] - row.tokens
            )
        )
        m.edit(
            lambda r, row=row: cell(r, row.stage).update(
                bytes=cell(r, row.stage)["bytes"] - row.bytes
            )
        )
    left = pd.read_parquet(m.values)
    for stage in range(4):
        total = float(left[(left.domain == "smoke_b") & (left.stage == stage)].nll_nats.sum())
        m.edit(lambda r, stage=stage, total=total: cell(r, stage).update(nll_nats=total))


def renamed(m: Made) -> None:
    """A record copied under another id."""
    for path in (m.record, m.values):
        path.rename(path.with_name(path.name.replace("-s0-", "-s7-")))
    m.record = next(m.record.parent.glob("*-s7-*.json"))


def swapped(m: Made) -> None:
    a, b, between = m.stages / "01-smoke_a", m.stages / "02-smoke_b", m.stages.parent / "between"
    a.rename(between), b.rename(a), between.rename(b)


def flipped(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def other_scores(m: Made) -> None:
    table = pd.read_parquet(m.stages / "02-smoke_b/scores.parquet")
    m.reseal("02-smoke_b", scores_parquet=nats(table).to_parquet(index=False))


def told_otherwise(m: Made) -> None:
    told = json.loads((m.stages / "02-smoke_b/stage.json").read_bytes())
    told["record"]["domains"]["smoke_a"]["nll_nats"] *= 1.000001
    m.reseal("02-smoke_b", stage_json=json.dumps(told).encode())


def tensors(m: Made, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    state = load_file(m.stages / "02-smoke_b/adapter.safetensors")
    change(state)
    m.reseal("02-smoke_b", adapter_safetensors=save(state))


def steps(m: Made, change: Callable[[list[str], int], Any]) -> None:
    """Change metrics.jsonl. change(lines, index of a step)."""
    path = m.run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    change(lines, next(i for i, line in enumerate(lines) if '"kind": "step"' in line))
    path.write_text("\n".join(lines) + "\n")


def token_array(m: Made, name: str) -> Path:
    """A file of the cached tokens of smoke_a."""
    metas = (m.folder.parent / "cache/tokens").glob("*/meta.json")
    return next(p for p in metas if json.loads(p.read_bytes())["domain"] == "smoke_a").with_name(
        name
    )


def begun(m: Made, change: Callable[[dict[str, Any]], None]) -> None:
    first = json.loads((m.run / "run.json").read_bytes())
    change(first)
    (m.run / "run.json").write_text(json.dumps(first))


def taint(r: dict[str, Any]) -> None:
    r["provenance"]["attempts"][0]["changed"] = ["model.pin was A, is B"]


PLANTED: dict[str, tuple[str, Plant]] = {
    "a copy under another id": ("settings: its name was tiny-gain_ffn-smoke-s7-", renamed),
    "another seed": (
        "settings: seed was 3, is 0",
        lambda m: m.edit(lambda r: r.update(seed=3)),
    ),
    "another protocol": (
        "settings: protocol was ppl-test-first64x9",
        lambda m: m.edit(lambda r: r.update(protocol=r["protocol"].replace("x8", "x9"))),
    ),
    "an invalid setting": (
        "config.train.lr",
        lambda m: m.edit(lambda r: r["config"]["train"].update(lr=-1)),
    ),
    "an unknown setting": (
        "config.train.speed",
        lambda m: m.edit(lambda r: r["config"]["train"].update(speed=1)),
    ),
    "a setting": (
        "run id: the id of its settings and pins was",
        lambda m: m.edit(lambda r: r["config"]["train"].update(clip=2.0)),
    ),
    "a pin": (
        "run id: the id of its settings and pins was",
        lambda m: m.edit(lambda r: r["pins"]["domains"]["smoke_a"].update(seed=9)),
    ),
    "the numerics version": (
        "run id: the id of its settings and pins was",
        lambda m: m.edit(lambda r: r["provenance"].update(numerics=2)),
    ),
    "a row of no cell": (
        "sums: scored documents was 128, is 129",
        lambda m: m.rewrite(lambda t: pd.concat([t, t.iloc[:1].assign(domain="smoke_z")])),
    ),
    "a cell without rows": (
        "sums: smoke_b: not every document is scored after every stage",
        lambda m: m.rewrite(lambda t: t[(t.stage != 1) | (t.domain != "smoke_b")]),
    ),
    "a row twice": (
        "sums: Index contains duplicate entries",
        lambda m: m.rewrite(lambda t: pd.concat([t, t.iloc[:1]])),
    ),
    "a digit of a sum": (
        "sums: smoke_b at stage 1.nll_nats was",
        lambda m: m.edit(lambda r: cell(r).update(nll_nats=cell(r)["nll_nats"] + 1e-7)),
    ),
    "a count of tokens": (
        "sums: smoke_b at stage 1.tokens was 513, is 512",
        lambda m: m.edit(lambda r: cell(r).update(tokens=cell(r)["tokens"] + 1)),
    ),
    "a count of bytes": (
        "sums: smoke_b at stage 1.bytes was 511, is 512",
        lambda m: m.edit(lambda r: cell(r).update(bytes=cell(r)["bytes"] - 1)),
    ),
    "a document's loss": ("sums: smoke_a at stage 0.nll_nats was", lambda m: m.rewrite(nats)),
    "a missing document": (
        "sums: smoke_a: not every document is scored after every stage",
        lambda m: m.rewrite(lambda t: t.iloc[1:]),
    ),
    "other tokens at one stage": (
        "sums: smoke_a: the scored tokens of a document differ between stages",
        shifted,
    ),
    "fewer documents": ("sums: documents of smoke_b was 7, is 8", fewer),
    "steps": (
        "training: steps and rate of stage 2 was (5, 0.01), is (4, 0.01)",
        lambda m: m.edit(lambda r: r["stages"][2]["train"].update(steps=5)),
    ),
    "a rate": (
        "training: steps and rate of stage 2 was (4, 0.5), is (4, 0.01)",
        lambda m: m.edit(lambda r: r["stages"][2]["train"].update(lr=0.5)),
    ),
    "training tokens": (
        "training: tokens of stage 2 was 1000, is 1024",
        lambda m: m.edit(lambda r: r["stages"][2]["train"].update(tokens=1000)),
    ),
    "no training": (
        "training: whether stage 2 was trained was False, is True",
        lambda m: m.edit(lambda r: r["stages"][2].update(train=None)),
    ),
    "a taint": (
        "attempts: what tainted it was",
        lambda m: m.edit(lambda r: r.update(tainted=["dtype was A, is B"])),
    ),
    "a taint removed": ("attempts: what tainted it was", lambda m: m.edit(taint)),
    "an attempt": (
        "attempts: attempts was",
        lambda m: m.edit(
            lambda r: r["provenance"]["attempts"].append(r["provenance"]["attempts"][0])
        ),
    ),
    "another run's matrix": ("matrix file:", lambda m: shutil.copy(m.other / "matrix.csv", m.run)),
    "a bit of a trained state": (
        "stages: adapter.safetensors has SHA-256",
        lambda m: flipped(m.stages / "02-smoke_b/adapter.safetensors"),
    ),
    "a bit of a manifest": (
        "stages: MANIFEST.json is not",
        lambda m: flipped(m.stages / "02-smoke_b/MANIFEST.json", 30),
    ),
    "stages that changed places": ("stages: 01-smoke_a.", swapped),
    "a stage of another run": (
        "stages: 02-smoke_b.",
        lambda m: shutil.copytree(
            m.other / "stages/02-smoke_b", m.stages / "02-smoke_b", dirs_exist_ok=True
        ),
    ),
    "a stage too many": (
        "stages: stages.04-smoke_d is only in one of them",
        lambda m: shutil.copytree(m.stages / "02-smoke_b", m.stages / "04-smoke_d"),
    ),
    "a stage too few": (
        "stages: stages.02-smoke_b is only in one of them",
        lambda m: shutil.rmtree(m.stages / "02-smoke_b"),
    ),
    "stage.json": ("stages: 02-smoke_b.record.domains.smoke_a.nll_nats was", told_otherwise),
    "stage.json without its record": (
        "stages: stage.json is not of this",
        lambda m: m.reseal("02-smoke_b", stage_json=b"{}"),
    ),
    "scores of a stage": ("stages: 02-smoke_b.document was", other_scores),
    "a smaller trained state": (
        "stages: parameters after 02-smoke_b was 512, is 448",
        lambda m: tensors(m, lambda s: s.pop(min(s, key=lambda k: s[k].size))),
    ),
    "parameters": (
        "stages: parameters after 01-smoke_a was 511, is 512",
        lambda m: m.edit(lambda r: r.update(trainable_parameters=511)),
    ),
    "a step too few": (
        "metrics: steps of stage 1 was [1, 2, 3, 4], is [2, 3, 4]",
        lambda m: steps(m, lambda lines, i: lines.pop(i)),
    ),
    "a step twice": (
        "metrics: steps of stage 1 was [1, 2, 3, 4], is [1, 1, 2, 3, 4]",
        lambda m: steps(m, lambda lines, i: lines.insert(i, lines[i])),
    ),
    "a loss": (
        "metrics: losses and tokens of stage 1 was",
        lambda m: steps(
            m,
            lambda lines, i: lines.__setitem__(
                i, lines[i].replace('"loss_nats": 5', '"loss_nats": 4')
            ),
        ),
    ),
    "run.json of other settings": (
        "beginning: id was",
        lambda m: begun(m, lambda first: first["settings"].update(seed=4)),
    ),
    "run.json of other data": (
        "beginning: tokens.smoke_b was",
        lambda m: begun(m, lambda first: first["facts"]["data"]["tokens"].update(smoke_b="0" * 64)),
    ),
    "a bit of the cached documents": (
        "cached documents: SHA-256 was",
        lambda m: flipped(token_array(m, "ids.npy")),
    ),
    "a bit of the tokens": (
        "cached documents: SHA-256 was",
        lambda m: flipped(token_array(m, "tokens.npy")),
    ),
    "a pin of tokens": (
        "beginning: tokens.smoke_a was ffff",
        lambda m: m.edit(lambda r: r["pins"]["tokens"].update(smoke_a="f" * 64)),
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_change_is_found(
    run: Made, capsys: pytest.CaptureFixture[str], planted: str
) -> None:
    found, plant = PLANTED[planted]
    plant(run)
    assert run.verify() == 65
    out, err = capsys.readouterr()
    assert err.startswith(f"gain_cl: error: {found}"), err
    assert err.count("\n") == 1 and "verified" not in out
    assert "FAILED" in out or found.startswith("config.")


@pytest.mark.parametrize("plant", [other_documents, other_counts])
def test_other_documents_than_the_text_has(run: Made, plant: Plant) -> None:
    """Consistent in the record and its values: only the text itself shows it."""
    plant(run)
    failed = {name: finding for name, (state, finding) in run.lines().items() if state == "FAILED"}
    assert failed.keys() == {"stages", "cached documents"}
    assert failed["cached documents"].startswith("first documents of smoke_c was")


def test_tokens_of_another_format(run: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.tokens, "FORMAT", 0)
    assert run.lines()["cached documents"][0] == "not there"


def test_values_of_another_run(run: Made, capsys: pytest.CaptureFixture[str]) -> None:
    flipped(run.values, 200)
    assert run.verify() == 65
    assert "per-item values are not those the record was written with" in capsys.readouterr().err


def test_a_run_that_is_made_again_meanwhile(run: Made) -> None:
    """Its folder then holds another attempt than the one that the record is of."""
    checkpoint.save(run.run / "ckpt/step-2", {"state.json": b"{}"})
    lines = run.lines()
    names = "stages", "metrics", "matrix file", "beginning"
    assert {lines[name][0] for name in names} == {"not there"}
    assert "under way" in lines["stages"][1]


def test_a_tainted_run_has_the_id_of_its_first_attempt(run: Made) -> None:
    told = ["model.pin was A, is B"]

    def change(r: dict[str, Any]) -> None:
        taint(r)
        r.update(tainted=told)
        r["pins"]["model"]["init_seed"] = 5

    run.edit(change)
    attempts = [json.loads(line) for line in (run.run / "attempts.jsonl").read_text().splitlines()]
    (run.run / "attempts.jsonl").write_text(json.dumps({**attempts[0], "changed": told}) + "\n")
    lines = run.lines()
    assert lines["run id"][0] == lines["attempts"][0] == "ok"
    first = json.loads((run.run / "run.json").read_bytes())
    (run.run / "run.json").write_text(
        json.dumps({**first, "settings": {**first["settings"], "seed": 4}})
    )
    assert run.lines()["run id"][0] == "FAILED"


def test_a_setting_that_came_later(run: Made) -> None:
    """Another version of gain_cl derived the id without it."""
    run.edit(lambda r: r["config"]["train"].pop("pack"))
    run.edit(lambda r: r.update(run_id=r["run_id"][:-10] + "0" * 10))
    with pytest.raises(verify.Absent, match=r"train\.pack"):
        list(verify.run_id(verify.Case(record.load(run.record))))


# --- tasks ----------------------------------------------------------------------------------------


def with_tasks(run: Made) -> Made:
    """Twenty items of a task after stages 0 and 3, counted by hand."""
    rng = np.random.default_rng(0)
    gold, chars = rng.integers(0, 2, 20), rng.integers(2, 5, (20, 2))
    rows, scores = [], {}
    for stage in (0, 3):
        logprobs = -rng.random((20, 2)) * 5
        right = int(sum(int(p[1] > p[0]) == g for p, g in zip(logprobs, gold, strict=True)))
        normed = int(
            sum(
                int(p[1] / c[1] > p[0] / c[0]) == g
                for p, c, g in zip(logprobs, chars, gold, strict=True)
            )
        )
        scores[stage] = {"items": 20, "correct": right, "correct_norm": normed, "fewshot": 0}
        rows += [
            {
                "kind": "item",
                "stage": stage,
                "task": "boolq@20",
                "item": f"{i:02d}",
                "gold": gold[i],
                "logprobs": logprobs[i].tolist(),
            }
            | {"choice_bytes": chars[i].tolist(), "choice_chars": chars[i].tolist()}
            for i in range(20)
        ]
    run.rewrite(
        lambda t: pd.concat(
            [
                t.drop(columns=["logprobs", "choice_bytes", "choice_chars"], errors="ignore"),
                pd.DataFrame(rows),
            ]
        )
    )
    run.edit(lambda r: r["config"]["tasks"].update(names=["boolq@20"], stages="ends"))
    run.edit(
        lambda r: [
            r["stages"][stage]["tasks"].update({"boolq@20": score})
            for stage, score in scores.items()
        ]
    )
    return run


def test_tasks_are_counted_again(run: Made) -> None:
    lines = with_tasks(run).lines()
    assert lines["task counts"][0] == "ok"


def item(
    key: str, change: Callable[[Any], Any], stage: int = 3
) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Change a value of the fourth item."""

    def rewrite(table: pd.DataFrame) -> pd.DataFrame:
        at = table.index[(table.kind == "item") & (table.stage == stage) & (table["item"] == "03")][
            0
        ]
        table.at[at, key] = change(table.at[at, key])
        return table

    return rewrite


def score(r: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = r["stages"][3]["tasks"]["boolq@20"]
    return found


TASKS: dict[str, tuple[str, str, Plant]] = {
    "right answers": (
        "task counts",
        "boolq@20 at stage 3.correct was",
        lambda m: m.edit(lambda r: score(r).update(correct=score(r)["correct"] - 1)),
    ),
    "by length": (
        "task counts",
        "boolq@20 at stage 3.correct_norm was",
        lambda m: m.edit(lambda r: score(r).update(correct_norm=score(r)["correct_norm"] - 1)),
    ),
    "items": (
        "task counts",
        "boolq@20 at stage 3.items was 21, is 20",
        lambda m: m.edit(lambda r: score(r).update(items=21)),
    ),
    "a limit": (
        "task counts",
        "boolq@20 at stage 3.limited was True, is False",
        lambda m: m.edit(lambda r: score(r).update(limited=True)),
    ),
    "a log-likelihood": (
        "task counts",
        "boolq@20 at stage 3.correct was",
        lambda m: m.rewrite(item("logprobs", lambda v: v[::-1])),
    ),
    "a length": (
        "task counts",
        "malformed items",
        lambda m: m.rewrite(item("choice_chars", lambda v: [0, 1])),
    ),
    "not finite": (
        "task counts",
        "malformed items",
        lambda m: m.rewrite(item("logprobs", lambda v: [float("nan"), -1.0])),
    ),
    "other items": (
        "task counts",
        "items of boolq@20 at stage 3 was",
        lambda m: m.rewrite(item("item", lambda v: "zz")),
    ),
    "other answers": (
        "task counts",
        "boolq@20 at stage 0.correct was",
        lambda m: m.rewrite(item("gold", lambda v: 1 - v, stage=0)),
    ),
    "a score too few": (
        "task counts",
        "tasks at stage 3 was set(), is {'boolq@20'}",
        lambda m: m.edit(lambda r: r["stages"][3]["tasks"].clear()),
    ),
    "an item of no score": (
        "task counts",
        "answered items was 40, is 41",
        lambda m: m.rewrite(lambda t: pd.concat([t, t.iloc[-1:].assign(stage=2)])),
    ),
}


@pytest.mark.parametrize("planted", TASKS)
def test_a_planted_change_of_a_task_is_found(run: Made, planted: str) -> None:
    check, found, plant = TASKS[planted]
    plant(with_tasks(run))
    state, finding = run.lines()[check]
    assert state == "FAILED" and found in finding, finding


# --- hostile records ------------------------------------------------------------------------------


def test_a_record_of_any_shape_is_no_traceback(run: Made) -> None:
    """Values of pins, settings and provenance may be anything: a check fails or has nothing to
    compare with."""
    draw, whole = random.Random(0), run.record.read_bytes()
    failed = 0
    for _ in range(60):
        data = json.loads(whole)
        at, key = data, draw.choice(["pins", "config", "provenance"])
        while isinstance(at[key], dict | list) and at[key] and draw.random() < 0.85:
            at = at[key]
            key = draw.choice(list(at)) if isinstance(at, dict) else draw.randrange(len(at))
        at[key] = draw.choice(
            [None, 0, -1, 1e300, "", "\x1b[2J", [], {}, [[]], {"kind": "package"}, True]
        )
        data["seal"] = seal_of(data)
        run.record.write_text(json.dumps(data))
        try:
            case = verify.Case(record.load(run.record), str(run.folder / "runs"))
        except gain_cl.errors.DataError:
            continue
        lines, failure = verify.examine(case)
        assert len(lines) == len(verify.CHECKS)
        failed += failure is not None
        assert failure is None or (failure.exit_code in (65, 74) and "\n" not in str(failure))
    assert failed > 5


def test_provenance_names_what_draws() -> None:
    assert {"matplotlib", "pillow"} <= provenance.environment()["packages"].keys()


def test_files_are_hashed_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit flips on the disk and time and size stay: what a run remembers of the file is not
    believed where it counts."""
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"0123")
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    before = hashes.file_sha256(path, remember=True)
    path.write_bytes(b"0124")
    os.utime(path, ns=times)
    (note,) = (tmp_path / "cache/hashes").glob("*.json")  # as if no time had changed at all
    now = path.stat()
    known = [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]
    note.write_text(json.dumps({"stat": known, "sha256": before}))
    look = (
        "from gain_cl.system import hashes as sources; from pathlib import Path; "
        f"print(sources.file_sha256(Path({str(path)!r}), remember=True))"
    )
    seen = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        for code in (look, look.replace("; print(", "\nwith sources.doubting(): print("))
    ]
    assert seen[0] == before != seen[1]
