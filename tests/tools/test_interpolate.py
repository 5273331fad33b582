"""The models between the pretrained one and a run's; and records of them, which an older version
made (``interpolate --records``): they are read, and never taken for a run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import synthetic
from gain_cl import api, cli
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import record
from gain_cl.studies.study import study_of_runs
from gain_cl.tools import command

SMOKE = ["debug=smoke", "compute.threads=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def run(folder: Path, *overrides: str, lr: str = "3e-2") -> record.Run:
    places = f"output_dir={folder}/runs", f"results_dir={folder}/results"
    return api.run(*SMOKE, *overrides, f"train.lr={lr}", *places)


@pytest.mark.parametrize(
    "overrides",
    [["method=lora", "regime=individual"], ["method=gain_ffn", "handover=restart"]],
    ids="-".join,
)
def test_the_ends_are_the_base_and_the_stage(
    folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str]
) -> None:
    made = run(folder, *overrides)
    line = ["interpolate", str(made.path), "--alpha", "0,0.5,1", "--stage", "2", "--json"]
    capsys.readouterr()
    assert cli.main(line) == 0
    base, half, whole = (row["loss_nats"] for row in json.loads(capsys.readouterr().out)["front"])
    losses = made.record.losses()
    np.testing.assert_allclose(base, losses[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(whole, losses[2], rtol=0, atol=1e-6)
    assert np.abs(np.subtract(half, losses[2])).max() > 1e-4
    assert cli.main(line[:-1]) == 0
    assert "alpha 0.5" in capsys.readouterr().out


def between(made: record.Run, alpha: float) -> record.Run:
    """A record as the older version wrote it."""
    origin = record.Interpolated(of=made.record.run_id, alpha=alpha, record_sha256="0" * 64)
    told = {**made.record.provenance, "interpolated": origin.model_dump()}
    update = {"run_id": origin.run_id, "provenance": told}
    path = made.path.with_name(f"{origin.run_id}.json")
    return record.save(made.record.model_copy(update=update), made.documents, made.items, path)


def test_records_of_an_older_version(folder: Path) -> None:
    slow, fast = (run(folder, "method=lora", lr=lr) for lr in ("1e-2", "3e-2"))
    half, whole = between(fast, 0.5), between(fast, 1)
    study = study_of_runs([fast, half])
    assert [(s.label, s.trained) for s in study.settings] == [
        ("lora", True),
        ("lora alpha=0.5", False),
    ]
    assert study_of_runs([half, slow]).settings[0].label == "lora lr=0.03 alpha=0.5"
    with pytest.raises(DataError, match="are the same"):
        study_of_runs([fast, whole])
    for verb in ("interpolate", "verify"):
        with pytest.raises(ConfigError, match=f"use {fast.record.run_id}"):
            command.load_run(command.Parser(verb, *command.RUN).read([str(half.path)]))


@pytest.mark.parametrize(
    "made", [{"of": "x"}, "half", {"of": "x", "alpha": 0.5, "record_sha256": ""}], ids=str
)
def test_a_malformed_origin_is_one_line(folder: Path, tmp_path: Path, made: Any) -> None:
    found = run(folder, "method=lora")
    for path in (found.path, record.items_path(found.path)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / found.path.name
    synthetic.edit(path, lambda data: data["provenance"].update(interpolated=made))
    with pytest.raises(DataError, match="not a run record"):
        record.load(path)
