"""The wandb workspace as code shows metrics that runs really send, and offline runs are uploaded
once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_track

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/wandb_dashboard.py"


def script(home: Path, *words: str, code: str = "", rc: int = 0) -> str:
    """What it prints; its errors where it is to fail. code: Python that runs before it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"} | {
        "HOME": str(home)
    }
    command = [
        sys.executable,
        "-c",
        f"import runpy, sys\n{code}\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')",
    ]
    words = ("--entity", "E", "--project", "P", *words)
    done = subprocess.run(
        [*command, *words],
        cwd=home,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == rc, done.stderr
    return done.stderr if rc else done.stdout


def shown(specification: dict[str, Any]) -> set[str]:
    """Every metric that the view names: axes, lines, bars, pictures, tables, columns of the list of
    runs."""
    found: set[str] = set()
    for section in specification["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            about = panel["config"]
            found |= {
                about[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis") if axis in about
            }
            found |= {*about.get("metrics", []), *about.get("mediaKeys", [])}
            if panel["viewType"] == "Weave":
                found.add(about["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"])
    (runs,) = specification["section"]["runSets"]
    return found | {
        c.removeprefix("summary:")
        for c in runs["runFeed"]["columnOrder"]
        if c.startswith("summary:")
    }


def sent(offline: Path) -> dict[str, Any]:
    """What an offline run holds of metrics, of rows and summary alike, and its group and kind of
    job, by wandb's own tool."""
    wandb = "import sys; from wandb.cli.cli import cli; sys.argv[0] = 'wandb'; cli()"
    command = [sys.executable, "-c", wandb, "leet", "inspect", "--json", str(offline)]
    lines = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True
    ).stdout.splitlines()
    found: dict[str, Any] = {}
    for line in map(json.loads, lines):
        part = {"history": "item", "summary": "update"}.get(line["type"])
        if line["type"] == "run":
            found |= {"group": line["run"]["run_group"], "job_type": line["run"]["job_type"]}
        found |= (
            {k.split(".")[0]: v for k, v in line[line["type"]].get(part, {}).items()}
            if part
            else {}
        )
    return found


def test_every_metric_shown_is_one_that_a_run_sends(tmp_path: Path) -> None:
    where = [
        "output_dir=runs",
        "results_dir=results",
        "compute.threads=1",
        "track=wandb",
        "track.mode=offline",
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {
        "HOME": str(tmp_path)
    }
    command = [
        sys.executable,
        "-m",
        "gain_cl",
        "run",
        "debug=smoke",
        *where,
        "track.group=study",
        "track.job_type=sweep",
    ]
    subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, timeout=300, check=True)
    (offline,) = (tmp_path / "runs").glob("*/wandb/offline-run-*")
    there = sent(offline)
    assert (there["group"], there["job_type"]) == ("study", "sweep")  # what a sweep is grouped by
    view = json.loads(script(tmp_path, "--dry-run", "debug=smoke"))
    metrics = shown(view)
    assert metrics <= set(there), metrics - set(there)
    wanted = {
        "ppl/smoke_a",
        "change_pct/smoke_control",
        "train/tokens_per_second",
        "stage",
        "matrix_image",
        "matrix",
        "backward_pct",
    }
    assert wanted <= metrics and len([m for m in metrics if m.startswith("ppl/")]) == 4
    grouping = [(g["section"], g["name"]) for g in view["section"]["runSets"][0]["grouping"]]
    assert grouping == [("run", "group"), ("config", "method.value")]


def test_every_metric_of_a_task_is_one_that_a_run_sends(tmp_path: Path) -> None:
    test_track.attempts(
        tmp_path / "run"
    )  # a run of boolq@100 with made-up answers, by the real tracker and the real wandb
    (offline,) = (tmp_path / "run/wandb").glob("offline-run-*")
    tasks = {
        m
        for m in shown(json.loads(script(tmp_path, "--dry-run", "tasks=boolq_100")))
        if m.startswith("task/")
    }
    assert (
        tasks
        == {f"task/boolq@100/{name}" for name in ("accuracy", "accuracy_change", "margin_change")}
        <= set(sent(offline))
    )


def test_errors_are_one_line(tmp_path: Path) -> None:
    none = script(tmp_path, code="sys.modules['wandb_workspaces'] = None", rc=1)
    assert (
        none.startswith("wandb_dashboard: error: ")
        and "pip install 'gain_cl[dashboard]'" in none
        and none.count("\n") == 1
    )
    away = script(tmp_path, rc=1)
    assert (
        away.startswith("wandb_dashboard: error: not saved: ")
        and "wandb login" in away
        and away.count("\n") == 1
    )
    strange = script(tmp_path, "--dry-run", "sequence=nosuch", rc=1)
    assert (
        strange.startswith("wandb_dashboard: error: unknown sequence") and strange.count("\n") == 1
    )


def test_offline_runs_are_uploaded_once(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    tool = (
        tmp_path / "bin/wandb"
    )  # stands in for wandb: says what it was given and marks it as wandb does
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "$@"\nshift\nfor d; do touch "$d/run-x.wandb.synced"; done\n')
    tool.chmod(0o755)

    def sync() -> str:
        command = [
            "make",
            "-s",
            "-C",
            str(ROOT),
            "-o",
            "setup",
            "wandb-sync",
            f"OUT={tmp_path}/my runs",
            f"BIN={tool.parent}",
        ]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    assert sync() == f"no offline run to upload in {tmp_path}/my runs\n"
    folders = [
        tmp_path / "my runs" / run / "wandb" / f"offline-run-{i}-{run}"
        for run, i in (("a", 1), ("a", 2), ("b", 1), ("c", 1))
    ]
    for folder in folders:
        folder.mkdir(parents=True)
    (tmp_path / "my runs/c/LOCK").touch()  # it is being written, or its process was killed
    (folders[2] / "run-x.wandb.synced").touch()
    left = f"left out, for it is being written or its process was killed: {folders[3]}\n"
    assert sync() == f"{left}sync {folders[0]} {folders[1]}\n"
    assert sync() == f"{left}no offline run to upload in {tmp_path}/my runs\n"
