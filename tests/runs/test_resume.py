"""An interrupted run goes on, byte for byte; what may not change between attempts; runs with more
domains."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from campaign import SMOKE, Result, Warm, evidence, leftovers, steps

from gain_cl import cli
from gain_cl.compose import composition
from gain_cl.domains.text import text_hash
from gain_cl.errors import DataError, InUseError, PreemptedError
from gain_cl.measure import record, scoring
from gain_cl.runs import inherit, resume, same
from gain_cl.runs import plan as plan_
from gain_cl.system import checkpoint, lock, signals
from gain_cl.system.files import sha256

KILL = {"GAIN_CL_FAILPOINT": "commit@6"}  # at step 2 of the second domain
TWO, THREE = "domain=[smoke_a,smoke_b]", "domain=[smoke_a,smoke_b,smoke_c]"


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as parent:
        yield parent


@pytest.fixture(scope="module")
def undisturbed(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert warm.run(folder).code == 0
    return folder


def fine(result: Result) -> str:
    assert result.code == 0, result.err
    return result.out


def refused(result: Result, code: int) -> str:
    assert result.code == code, (result.out, result.err)
    assert result.err.startswith("gain_cl: error: ") and result.err.count("\n") == 1, result.err
    return result.err


def killed(warm: Warm, folder: Path, *overrides: str) -> Path:
    assert warm.run(folder, *overrides, env=KILL).code == -signal.SIGKILL
    (run,) = (p.parent for p in folder.glob("runs/*/run.json"))
    return run


def the_record(folder: Path) -> record.RunRecord:
    (path,) = folder.glob("results/runs/*.json")
    return record.load(path).record


# --- going on -------------------------------------------------------------------------------------


SLOW = pytest.mark.slow
KINDS = [
    [],
    pytest.param(["train.optimizer=carried"], marks=SLOW),
    pytest.param(["method=lora"], marks=SLOW),
    ["method=full"],
]


@pytest.mark.parametrize("extra", KINDS, ids=lambda e: "".join(e) or "gain")
def test_killed_and_resumed(
    warm: Warm, undisturbed: Path, tmp_path: Path, extra: list[str]
) -> None:
    if extra:
        fine(warm.run(tmp_path / "undisturbed", *extra))
    good = evidence(tmp_path / "undisturbed" if extra else undisturbed)
    killed(warm, tmp_path / "killed", *extra)
    assert "resumed at stage 2 of 3 smoke_b, step 2 of 4" in fine(
        warm.run(tmp_path / "killed", *extra)
    )
    assert evidence(tmp_path / "killed") == good
    assert not leftovers(tmp_path / "killed")
    assert steps(tmp_path / "killed") == [
        (stage, step) for stage in (1, 2, 3) for step in (1, 2, 3, 4)
    ]
    made = the_record(tmp_path / "killed")
    assert len(made.provenance["attempts"]) == 2 and not made.tainted


def test_resume_never_starts_anew(warm: Warm, undisturbed: Path, tmp_path: Path) -> None:
    killed(warm, tmp_path)
    assert "resumed" not in fine(warm.run(tmp_path, "resume=never"))
    assert evidence(tmp_path) == evidence(undisturbed)
    assert len(the_record(tmp_path).provenance["attempts"]) == 1


def test_resume_must(warm: Warm, tmp_path: Path) -> None:
    assert "resume=must, but there is no checkpoint" in refused(
        warm.run(tmp_path, "resume=must"), 64
    )
    killed(warm, tmp_path)
    assert "resumed at" in fine(warm.run(tmp_path, "resume=must"))


def test_force_can_be_interrupted(warm: Warm, undisturbed: Path, tmp_path: Path) -> None:
    fine(warm.run(tmp_path))
    run = killed(warm, tmp_path, "force=true")
    assert checkpoint.steps(run / "ckpt")
    assert "resumed" not in fine(
        warm.run(tmp_path)
    )  # the old record still stands, and the new attempt is not lost
    assert "resumed at stage 2" in fine(warm.run(tmp_path, "force=true"))
    assert evidence(tmp_path) == evidence(undisturbed) and not leftovers(tmp_path)


def test_preempted(warm: Warm, undisturbed: Path, tmp_path: Path) -> None:
    where = {"patch": "injections_resume:signal_at_step,2,3"}
    assert "stopped by SIGTERM" in refused(warm.run(tmp_path, **where), 75)  # type: ignore[arg-type]
    assert "resumed at stage 2 of 3 smoke_b, step 3 of 4" in fine(warm.run(tmp_path))
    assert evidence(tmp_path) == evidence(undisturbed)


def test_bad_checkpoint_falls_back_or_stops(warm: Warm, undisturbed: Path, tmp_path: Path) -> None:
    run = killed(warm, tmp_path)
    newest, older, *rest = checkpoint.steps(run / "ckpt")
    for path in rest:  # the kill came before they were pruned
        shutil.rmtree(path)
    flip(newest / resume.ADAPTER)
    for path in (older / resume.OPTIMIZER, run / "stages/01-smoke_a" / resume.ADAPTER):
        kept = path.read_bytes()
        flip(path)
        if path.parent == older:
            assert "going back to the state before it" in fine_later(warm, tmp_path)
        path.write_bytes(kept)
    flip(older / resume.ADAPTER)
    flip(run / "stages/01-smoke_a" / resume.ADAPTER)
    message = refused(warm.run(tmp_path), 65)
    assert (
        "no good checkpoint: " in message and "has SHA-256" in message and "resume=never" in message
    )
    flip(older / resume.ADAPTER)
    flip(run / "stages/01-smoke_a" / resume.ADAPTER)
    out = fine(warm.run(tmp_path))
    assert (
        "going back to the state before it" in out
        and "resumed at stage 2 of 3 smoke_b, step 1 of 4" in out
    )
    assert evidence(tmp_path) == evidence(undisturbed)


def test_stage_0_is_scored_again_without_learning_again(
    warm: Warm, undisturbed: Path, tmp_path: Path
) -> None:
    run = killed(warm, tmp_path)
    flip(run / "stages/00-pretrained/stage.json")
    assert "resumed at stage 2 of 3 smoke_b, step 2 of 4" in fine(warm.run(tmp_path))
    assert evidence(tmp_path) == evidence(undisturbed)
    assert steps(tmp_path) == [(stage, step) for stage in (1, 2, 3) for step in (1, 2, 3, 4)]


def fine_later(warm: Warm, folder: Path) -> str:
    """What a start says that is killed before it has saved anything: what it passed over is still
    there."""
    return warm.run(folder, env={"GAIN_CL_FAILPOINT": "jsonl.after_rename@1"}).out


def flip(path: Path, bit: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def test_run_folder_of_another_configuration(warm: Warm, tmp_path: Path) -> None:
    run = killed(warm, tmp_path)
    other = plan_.prepare(composition.compose([*SMOKE, "seed=1"])).run_id
    run.rename(run.with_name(other))
    assert "the run folder is of another configuration: seed was 0, is 1" in refused(
        warm.run(tmp_path, "seed=1"), 65
    )


# --- what may not change --------------------------------------------------------------------------


def test_other_numerics_stop_or_taint(warm: Warm, tmp_path: Path) -> None:
    killed(warm, tmp_path)
    newer: dict[str, Any] = {"patch": "injections_resume:numerics,2"}
    message = refused(warm.run(tmp_path, **newer), 65)
    assert (
        "another numerics: numerics.version was 1, is 2" in message
        and "allow_change=[numerics]" in message
    )
    assert "resumed at stage 2" in fine(warm.run(tmp_path, "allow_change=[numerics]", **newer))
    made = the_record(tmp_path)
    assert made.tainted == ["numerics.version was 1, is 2"]
    assert "TAINTED: numerics.version was 1, is 2" in fine(
        warm.run(tmp_path, "allow_change=[numerics]", **newer)
    )  # finished: shown again
    (table,) = tmp_path.glob("runs/*/matrix.csv")
    assert all(
        line.endswith((",tainted", ',"numerics.version was 1, is 2"'))
        for line in table.read_text().splitlines()
    )
    fine(warm.run(tmp_path, "resume=never", **newer))  # a run of its own
    assert len(list(tmp_path.glob("results/runs/*.json"))) == 2


@pytest.mark.slow
def test_other_dtype_stops_and_a_new_run_is_possible(warm: Warm, tmp_path: Path) -> None:
    killed(warm, tmp_path)
    assert "another dtype: dtype was float32, is bfloat16" in refused(
        warm.run(tmp_path, "model.dtype=bfloat16"), 65
    )
    fine(warm.run(tmp_path, "model.dtype=bfloat16", "resume=never"))
    assert "resumed at" in fine(warm.run(tmp_path))


def doc(i: int, word: str) -> str:
    return f"document {i}: " + " ".join(f"{word}{i * k % 97}" for k in range(200))


def own_text(folder: Path) -> list[str]:
    """Overrides of a run on a domain of 60 files, folder/text/N.txt."""
    (folder / "text").mkdir()
    for i in range(60):
        (folder / f"text/{i}.txt").write_text(doc(i, "word"))
    (folder / "presets/domain").mkdir(parents=True)
    (folder / "presets/domain/mine.yaml").write_text(
        f"source:\n  kind: files\n  path: {folder}/text\n"
    )
    return ["domain=[mine,smoke_b]", "eval.documents=4", f"--config-dir={folder}/presets"]


def in_training(text: str) -> bool:
    return int(text_hash(text)[:16], 16) / 2**64 >= 0.5  # test and dev are below


def change_training_text(folder: Path) -> None:
    """One document of the training split becomes another."""
    old = next(i for i in range(60) if in_training(doc(i, "word")))
    (folder / f"text/{old}.txt").write_text(
        next(t for t in (doc(old, f"w{n}") for n in range(60)) if in_training(t))
    )


def test_other_text_stops_or_taints(warm: Warm, tmp_path: Path) -> None:
    mine = own_text(tmp_path)
    killed(warm, tmp_path / "run", *mine)
    change_training_text(tmp_path)
    message = refused(warm.run(tmp_path / "run", *mine), 65)
    assert "another data: data.domains.mine" in message and "allow_change=[data]" in message
    assert "resumed at" in fine(warm.run(tmp_path / "run", *mine, "allow_change=[data]"))
    assert the_record(tmp_path / "run").tainted[0].startswith("data.domains.mine.sha256 was ")
    assert "TAINTED: data" in fine(
        warm.run(tmp_path / "run", *mine, "allow_change=[data]")
    )  # it ended with these data: shown again


def test_other_scored_text_is_never_gone_on_with(warm: Warm, tmp_path: Path) -> None:
    """Rows of a matrix are of the same documents, whatever is allowed."""
    mine = own_text(tmp_path)
    run = killed(warm, tmp_path / "run", *mine)
    for i in range(60):
        (tmp_path / f"text/{i}.txt").write_text(doc(i, "other"))
    message = refused(warm.run(tmp_path / "run", *mine, "allow_change=[data]"), 65)
    assert (
        "the documents that are scored changed too, mine was " in message
        and run.name in message
        and "resume=never" in message
    )
    assert not list(tmp_path.glob("run/results/runs/*"))
    fine(
        warm.run(tmp_path / "run", *mine, "allow_change=[data]", "resume=never")
    )  # a run of its own, under its own id
    assert (
        the_record(tmp_path / "run").run_id != run.name and not the_record(tmp_path / "run").tainted
    )


def test_a_finished_run_is_not_the_answer_for_other_data(warm: Warm, tmp_path: Path) -> None:
    """allow_change lets an interrupted run go on; it does not make the numbers of other data those
    of these."""
    mine = own_text(tmp_path)
    fine(warm.run(tmp_path / "run", *mine))
    change_training_text(tmp_path)
    fine(warm.run(tmp_path / "run", *mine, "allow_change=[data]"))
    records = [record.load(p).record for p in tmp_path.glob("run/results/runs/*.json")]
    assert len(records) == 2 and not any(r.tainted for r in records)
    assert len({r.pins["domains"]["mine"]["sha256"] for r in records}) == 2


def test_a_tainted_run_is_no_beginning(warm: Warm, tmp_path: Path) -> None:
    """Its stages may be of other data than it began with: the longer run trains them itself."""
    mine = own_text(tmp_path)
    killed(warm, tmp_path / "run", *mine)
    change_training_text(tmp_path)
    fine(warm.run(tmp_path / "run", *mine, "allow_change=[data]"))
    for i in range(60):
        (tmp_path / f"text/{i}.txt").write_text(doc(i, "word"))
    longer = ["domain=[mine,smoke_b,smoke_c]", *mine[1:]]
    fine(warm.run(tmp_path / "run", *longer))
    fine(warm.run(tmp_path / "at once", *longer))
    made = {
        len(r.trained): r
        for r in (record.load(p).record for p in tmp_path.glob("run/results/runs/*.json"))
    }
    assert made[2].tainted and not made[3].tainted and not made[3].provenance["inherited"]
    assert [s.domains for s in made[3].stages] == [
        s.domains for s in the_record(tmp_path / "at once").stages
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device", "cuda"),
        pytest.param("tokenizer", "0" * 64, marks=SLOW),
        pytest.param("eval_batch", 3, marks=SLOW),
    ],
)
def test_other_facts_stop(warm: Warm, tmp_path: Path, key: str, value: Any) -> None:
    """As if the first attempt had been made elsewhere."""
    run = killed(warm, tmp_path)
    about = json.loads((run / "run.json").read_text())
    about["facts"][key] = value
    (run / "run.json").write_text(json.dumps(about))
    message = refused(warm.run(tmp_path), 65)
    assert (
        f"the interrupted run has another {key}: {key} was" in message and "allow_change" in message
    )
    fine(warm.run(tmp_path, f"allow_change=[{key}]"))
    assert the_record(tmp_path).tainted[0].startswith(f"{key} was")


def test_a_damaged_run_json_stops(warm: Warm, tmp_path: Path) -> None:
    run = killed(warm, tmp_path)
    (run / "run.json").write_bytes((run / "run.json").read_bytes()[:100])
    assert "run.json is missing or damaged" in refused(warm.run(tmp_path), 65)


def test_damaged_attempts_stop(warm: Warm, tmp_path: Path) -> None:
    """They tell what tainted the run: a line that is lost would hide it."""
    run = killed(warm, tmp_path)
    (run / "attempts.jsonl").write_text((run / "attempts.jsonl").read_text()[5:])
    assert "attempts.jsonl is damaged" in refused(warm.run(tmp_path), 65)


def test_the_run_json_of_others_is_read_with_care(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another version of gain_cl, or of another hand: no run of the folder fails on it."""
    monkeypatch.chdir(tmp_path)
    config = composition.compose([*SMOKE, TWO])
    plan, more = plan_.prepare(config), composition.compose([*SMOKE, THREE])
    facts = same.fixed_facts(config, plan.pins)
    facts["data"]["tokens"] = {name: name for name in more.domains}
    facts |= {"tokenizer": "t", "device": "cpu"}
    whole = {
        "run_id": "x",
        "settings": config.scientific(),
        "pins": plan.pins,
        "facts": facts,
        "environment": {},
    }
    new = plan_.prepare(more)
    inputs = SimpleNamespace(config=more, plan=new, facts=facts, environment={})
    path = tmp_path / "runs/other/run.json"
    path.parent.mkdir(parents=True)
    draw, wrong = random.Random(0), [None, 3, "x", [], {}, [1], {"a": 1}, True]
    path.write_text(json.dumps(whole))
    assert inherit._common(whole, inputs) == [
        "smoke_a",
        "smoke_b",
    ]  # else nothing below is looked at
    places = list(inside(whole))
    for _ in range(1000):
        changed = json.loads(json.dumps(whole))
        node, place = changed, draw.choice(places)
        for key in place[:-1]:
            node = node[key]
        if draw.random() < 0.3:
            del node[place[-1]]
        else:
            node[place[-1]] = draw.choice(wrong)
        path.write_text(json.dumps(changed))
        for ask in (
            lambda: plan_.adopted_run(config, plan.pins),
            lambda: inherit.common_stages(inputs),
            lambda: same.check_settings(config, path.parent),
        ):
            with suppress(DataError):
                ask()


def inside(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in JSON data."""
    if place:
        yield place
    for key, value in (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    ):
        yield from inside(value, (*place, key))


def test_a_position_is_what_checkpoints_hold() -> None:
    """The keys of state.json, in order; others in it are passed over, those it lacks are as at the
    beginning."""
    keys = ["run_id", "stage", "step", "fits", "events", "seconds", "track", "changed"]
    attempt = resume.Attempt(resume.Position("x", events=["e"], seconds=5.0))
    state = attempt.move(2, 3, {"bytes": 10, "rows": 1})
    assert list(state) == keys and state["seconds"] >= 5.0
    assert resume.Position.read({**state, "progress": {}, "cells": {}}) == attempt.position
    assert resume.Position.read({"run_id": "x", "stage": 2}) == resume.Position("x", 2)


def test_states_of_another_version_are_passed_over(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "ckpt/step-2", {"state.json": b"{}"})
    with pytest.raises(DataError, match=r"state\.json is not of this version"):
        resume._state(tmp_path / "ckpt/step-2", "x", 2, 4)
    checkpoint.save(tmp_path / "stages/01-a", {"stage.json": b'{"record": {"index": 1}}'})
    with pytest.raises(DataError, match=r"stage\.json is not of this version"):
        resume.read_stage(tmp_path / "stages/01-a")


def test_other_threads_are_told(warm: Warm, tmp_path: Path) -> None:
    run = killed(warm, tmp_path)
    about = json.loads((run / "run.json").read_text())
    about["environment"]["threads"] = 64
    (run / "run.json").write_text(json.dumps(about))
    fine(warm.run(tmp_path))
    made = the_record(tmp_path)
    assert not made.tainted and any("threads was 64, is 1" in note for note in made.notes)


# --- sharing --------------------------------------------------------------------------------------


def test_stage_0_is_shared_between_methods(warm: Warm, tmp_path: Path) -> None:
    fine(warm.run(tmp_path))
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("runs/cells/*")}
    assert len(before) == 4
    fine(warm.run(tmp_path, "method=lora"))
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("runs/cells/*")} == before
    records = [record.load(p).record for p in tmp_path.glob("results/runs/*.json")]
    assert records[0].stages[0].domains == records[1].stages[0].domains
    fine(warm.run(tmp_path, "eval.documents=9"))  # another protocol: nothing is taken over
    assert len(list(tmp_path.glob("runs/cells/*"))) == 8


@pytest.mark.parametrize(
    "extra", [[], pytest.param(["train.optimizer=carried"], marks=SLOW)], ids=["fresh", "carried"]
)
def test_one_more_domain(warm: Warm, tmp_path: Path, extra: list[str]) -> None:
    """A finished run, extended, is the longer run byte for byte, and trains only what is new."""
    fine(warm.run(tmp_path / "at once", THREE, *extra))
    fine(warm.run(tmp_path / "extended", TWO, *extra))
    fine(warm.run(tmp_path / "extended", THREE, *extra))
    longer = {
        k: v
        for k, v in evidence(tmp_path / "extended").items()
        if k in evidence(tmp_path / "at once")
    }
    assert longer == evidence(tmp_path / "at once") and len(longer) >= 9
    (path,) = (
        p
        for p in (tmp_path / "extended/results/runs").glob("*.json")
        if len(record.load(p).record.trained) == 3
    )
    made = record.load(path).record
    assert list(made.provenance["inherited"]) == ["1", "2"]
    metrics = tmp_path / "extended/runs" / made.run_id / "metrics.jsonl"
    trained = [
        row["stage"]
        for row in map(json.loads, metrics.read_text().splitlines())
        if row["kind"] == "step"
    ]
    assert trained == [3] * 4


def test_an_interrupted_run_still_names_whose_stages_it_has(warm: Warm, tmp_path: Path) -> None:
    """A run that took over two stages, is killed in its third and goes on, records where they are
    from, and `verify` asks for no steps of theirs."""
    fine(warm.run(tmp_path, TWO))
    (other,) = tmp_path.glob("results/runs/*.json")
    killed = warm.run(tmp_path, THREE, env={"GAIN_CL_FAILPOINT": "commit@2"})
    assert killed.code == -9, killed.out
    fine(warm.run(tmp_path, THREE))
    (path,) = (p for p in tmp_path.glob("results/runs/*.json") if p != other)
    made = record.load(path).record
    assert made.provenance["inherited"] == {"1": other.stem, "2": other.stem}
    assert len(made.provenance["attempts"]) == 2
    words = [str(path), "--output-dir", str(tmp_path / "runs")]
    assert cli.main(["verify", *words]) == 0


def test_how_the_beginning_was_made_otherwise_is_told(warm: Warm, tmp_path: Path) -> None:
    fine(warm.run(tmp_path, TWO))
    (path,) = tmp_path.glob("runs/*/run.json")
    about = json.loads(path.read_text())
    about["environment"]["packages"]["torch"] = "1.0"
    path.write_text(json.dumps(about))
    out = fine(warm.run(tmp_path, THREE))
    assert (
        f"stages up to 2 are those of {about['run_id']}, where packages.torch was 1.0, is " in out
    )


def test_another_last_domain(warm: Warm, tmp_path: Path) -> None:
    """What two sequences begin with is trained once, although each goes on otherwise."""
    fine(warm.run(tmp_path, TWO))
    fine(warm.run(tmp_path, "domain=[smoke_a,smoke_c]"))
    made = {
        r.trained[-1]: r
        for r in (record.load(p).record for p in tmp_path.glob("results/runs/*.json"))
    }
    assert (
        list(made["smoke_c"].provenance["inherited"]) == ["1"]
        and not made["smoke_b"].provenance["inherited"]
    )


@pytest.mark.slow
def test_no_other_beginning_is_taken(warm: Warm, tmp_path: Path) -> None:
    fine(warm.run(tmp_path, TWO))
    for other in (["train.lr=1e-3"], ["seed=1"], ["resume=never"]):
        out = fine(warm.run(tmp_path, THREE, *other))
        assert "inherited" not in out
    for path in (tmp_path / "results/runs").glob("*.json"):
        assert not record.load(path).record.provenance["inherited"]


@pytest.mark.slow
def test_full_fine_tuning_keeps_its_last_stage(warm: Warm, tmp_path: Path) -> None:
    fine(warm.run(tmp_path, "method=full"))
    (run,) = (p.parent for p in tmp_path.glob("runs/*/run.json"))
    kept = {p.name: (p / resume.ADAPTER).exists() for p in run.glob("stages/*")}
    assert kept == {
        "00-pretrained": False,
        "01-smoke_a": False,
        "02-smoke_b": False,
        "03-smoke_c": True,
    }
    for stage in run.glob("stages/*"):
        checkpoint.verify(stage)
    fine(warm.run(tmp_path, "method=full", "checkpoint.keep_stages=all", "force=true"))
    assert all((p / resume.ADAPTER).exists() for p in run.glob("stages/0[1-3]*"))
    assert not leftovers(tmp_path)


# --- the parts ------------------------------------------------------------------------------------


def test_a_saved_folder_is_what_was_written(tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "ckpt" / "step-3"
    checkpoint.save(folder, {"a.json": b"{}", "b.safetensors": {"x": torch.arange(4.0)}})
    assert set(checkpoint.verify(folder)) == {"a.json", "b.safetensors"}
    assert checkpoint.read_tensors(folder, "b.safetensors")["x"].tolist() == [0, 1, 2, 3]
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {oct(0o666 & ~umask())}
    checkpoint.save(tmp_path / "linked", {"b.safetensors": folder / "b.safetensors"})
    assert sha256(tmp_path / "linked/b.safetensors") == sha256(folder / "b.safetensors")
    checkpoint.drop(folder, ["b.safetensors"])
    assert set(checkpoint.verify(folder)) == {"a.json"} and not (folder / "b.safetensors").exists()
    for bit in range(8 * (folder / checkpoint.MANIFEST).stat().st_size):
        flip(folder / checkpoint.MANIFEST, bit)
        with pytest.raises(DataError, match=r"MANIFEST|bytes|SHA-256|missing"):
            checkpoint.verify(folder)
        flip(folder / checkpoint.MANIFEST, bit)
    assert not list(tmp_path.rglob(".tmp-*"))


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_checkpoints_cost_at_most_a_fortieth(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    due = checkpoint.Due(every_minutes=1, every_steps=None)
    spent = 0.0
    for _ in range(100_000):
        now[0] += 1
        if due.now(1):
            now[0] += 30  # saving takes half a minute
            spent += 30
            due.saved(30)
    assert 0 < spent <= now[0] / 40
    assert checkpoint.Due(None, None).now(5) is False
    assert [checkpoint.Due(None, 3).now(step) for step in (1, 2, 3, 6)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_cell_that_was_changed_is_no_cell(tmp_path: Path) -> None:
    import pandas as pd

    rows = pd.DataFrame(
        {
            "document": ["a", "b"],
            "nll_nats": [0.1 + 0.2, 1e-17],
            "tokens": [3, 2**53],
            "logprobs": [[0.1], [0.2, 0.3]],
        }
    )
    name = "1" * 32
    scoring.keep_score(tmp_path, name, rows, seconds=1.5)
    found = scoring.known_score(tmp_path, name)
    assert found is not None
    pd.testing.assert_frame_equal(found[0], rows, check_exact=True)
    assert found[1] == {"seconds": 1.5}
    for bit in range(0, 8 * (tmp_path / f"{name}.json").stat().st_size, 3):
        flip(tmp_path / f"{name}.json", bit)
        again = scoring.known_score(tmp_path, name)
        assert again is None or again[0].equals(rows), bit
        flip(tmp_path / f"{name}.json", bit)
    assert scoring.known_score(tmp_path, "2" * 32) is None


def test_lock_is_held_and_released(tmp_path: Path) -> None:
    with lock.owned(tmp_path):
        assert lock.holder(tmp_path) == f"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(InUseError, match=f"process {os.getpid()} on"), lock.owned(tmp_path):
            pass
        assert lock.holder(tmp_path)
    assert lock.holder(tmp_path) is None and not (tmp_path / "LOCK").exists()
    (tmp_path / "LOCK").write_text(
        '{"pid": 1, "host": "another"}'
    )  # left by a machine that lost power
    assert lock.holder(tmp_path) is None
    with lock.owned(tmp_path):
        pass


def test_signals_ask_and_a_second_interrupt_quits() -> None:
    with signals.listening():
        signals.poll()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(PreemptedError, match="stopped by SIGUSR1") as error:
            signals.poll()
        assert error.value.exit_code == 75
        with signals.held():
            signals.poll()
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signals.asked() is None
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(listen_in_thread()))
    thread.start()
    thread.join()
    assert found == [None]


def listen_in_thread() -> str | None:
    with signals.listening():  # a notebook's worker: nothing to install, nothing to fail
        return signals.asked()
