"""Alpha as a front: the whole matrix of the models between the pretrained one and a run's stages,
as records like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import synthetic
from gain_cl import api, cli
from gain_cl.errors import DataError
from gain_cl.measure import record
from gain_cl.stats import matrix
from gain_cl.studies.study import loss_matrix, study_of_runs
from gain_cl.system import files
from gain_cl.tools import reopen

SMOKE = ["debug=smoke", "compute.threads=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def run(folder: Path, *overrides: str, lr: str = "3e-2") -> record.Run:
    return api.run(
        *SMOKE,
        *overrides,
        f"train.lr={lr}",
        f"output_dir={folder}/runs",
        f"results_dir={folder}/results",
    )


def interpolate(
    made: record.Run, capsys: pytest.CaptureFixture[str], alphas: str
) -> list[record.Run]:
    """The records that --records tells of."""
    capsys.readouterr()
    assert (
        cli.main(["interpolate", str(made.path), "--alpha", alphas, "--records", "--json"]) == 0
    ), capsys.readouterr()
    return [record.load(row["path"]) for row in json.loads(capsys.readouterr().out)["records"]]


def copied(found: record.Run, place: Path) -> Path:
    for path in (found.path, record.items_path(found.path)):
        (place / path.name).write_bytes(path.read_bytes())
    return place / found.path.name


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lora"],
        ["method=gain_ffn"],
        ["method=full", "checkpoint.keep_stages=all"],
        ["method=lora", "regime=individual"],
        ["method=gain_ffn", "handover=restart"],
    ],
    ids="-".join,
)
def test_the_ends_are_the_base_and_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str]
) -> None:
    made = run(folder, *overrides)
    base, half, whole = interpolate(made, capsys, "0,0.5,1")
    losses = made.record.losses()
    np.testing.assert_allclose(whole.record.losses(), losses, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        base.record.losses(), np.tile(losses[0], (len(losses), 1)), rtol=0, atol=1e-6
    )
    for name, found in matrix.summary(loss_matrix(base)).items():
        assert abs(found.value) < 1e-12, name
    between = half.record.losses()
    assert np.abs(between[1:] - losses[1:]).max() > 1e-4 and np.array_equal(between[0], losses[0])
    assert (
        cli.main(["interpolate", str(made.path), "--alpha", "0.5", "--stage", "2", "--json"]) == 0
    )
    np.testing.assert_array_equal(
        json.loads(capsys.readouterr().out)["front"][0]["loss_nats"], between[2]
    )


def test_what_a_record_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run(folder, "method=lora")
    (half,) = interpolate(made, capsys, "0.5")
    r = half.record
    assert (
        r.run_id == f"{made.record.run_id}-alpha0.5"
        and half.path.parent == made.path.parent
        and r.alpha == 0.5
    )
    assert r.provenance["interpolated"] == {
        "of": made.record.run_id,
        "alpha": 0.5,
        "record_sha256": files.sha256(made.path),
    }
    assert [s.train for s in r.stages] == [s.train for s in made.record.stages] and half.items.empty
    assert r.notes[:-1] == made.record.notes and r.notes[-1].startswith("interpolated: ")
    assert made.record.interpolated is None and made.record.alpha == 1
    assert cli.main(["show", str(half.path)]) == 0
    assert "own step" in capsys.readouterr().out
    assert cli.main(["interpolate", str(made.path), "--alpha", "0.5", "--records"]) == 0
    out = capsys.readouterr().out
    assert out == f"record: {half.path}\n"
    short = [made.record.run_id[:-2], "--results-dir", f"{folder}/results"]
    assert cli.main(["show", *short]) == 0  # the beginning means the run
    assert f"record: {made.path}" in capsys.readouterr().out.splitlines()


def test_what_is_there_is_not_computed_again(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(folder, "method=lora", "seed=3")
    (half,) = interpolate(made, capsys, "0.5")
    before = half.path.stat().st_mtime_ns
    monkeypatch.setattr(reopen.Reopened, "open", lambda *_: pytest.fail("loads the model"))
    assert interpolate(made, capsys, "0.5")[0].path.stat().st_mtime_ns == before
    synthetic.edit(made.path, lambda data: data.update(notes=["again"]))
    assert cli.main(["interpolate", str(made.path), "--alpha", "0.5", "--records"]) == 65
    assert (
        "it is not interpolated from" in (err := capsys.readouterr().err) and "move it away" in err
    )


def test_what_has_no_such_matrix_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(folder, "method=lora")
    (half,) = interpolate(made, capsys, "0.5")
    for found, argv, code, message in (
        (run(folder, "method=full", "seed=5"), [], 65, "was not kept"),
        (run(folder, "regime=joint"), [], 64, "the run is joint"),
        (half, [], 64, f"use {made.record.run_id}"),
        (made, ["--alpha", "0.12345678"], 64, "at most 6 digits"),
        (made, ["--alpha", "1e20"], 64, "makes no name"),
        (made, ["--stage", "1"], 64, "--records takes every stage"),
    ):
        assert cli.main(["interpolate", str(found.path), "--records", *argv]) == code
        err = capsys.readouterr().err
        assert message in err and len(err.strip().splitlines()) == 1


def test_numbers_of_another_numerics_do_not_mix(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(folder, "method=lora")
    monkeypatch.setattr("gain_cl.measure.provenance.NUMERICS", 99)
    assert cli.main(["interpolate", str(made.path), "--alpha", "0.7", "--records"]) == 65
    assert "scored by numerics 1, this is 99" in capsys.readouterr().err


# --- verify ---------------------------------------------------------------------------------------


Change = Callable[[dict[str, Any], pd.DataFrame], Any]


def edited(path: Path, change: Change) -> Path:
    """A record and its values changed, its hash of them, and its seal."""
    values = record.items_path(path)
    table = pd.read_parquet(values)

    def whole(data: dict[str, Any]) -> None:
        change(data, table)
        table.to_parquet(values, index=False)
        data["items_sha256"] = files.sha256(values)

    synthetic.edit(path, whole)
    return path


def shifted(data: dict[str, Any], table: pd.DataFrame, stage: int) -> None:
    """A document's loss, and the sum that it is in."""
    at = table.index[(table.stage == stage) & (table.domain == "smoke_a")][0]
    table.loc[at, "nll_nats"] += 1.0
    rows = table[(table.stage == stage) & (table.domain == "smoke_a")]
    data["stages"][stage]["domains"]["smoke_a"]["nll_nats"] = float(np.sum(rows.nll_nats))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, table: shifted(data, table, 0), "its row 0 are not those"),
        (lambda data, table: table.__setitem__("nll_nats", table.nll_nats + 1), "sums: nll_nats"),
        (
            lambda data, table: data["stages"][1]["train"].update(seconds=1e6),
            "its costs are not those",
        ),
        (
            lambda data, table: data.update(trainable_parameters=1),
            "its settings or pins are not those",
        ),
        (
            lambda data, table: data["provenance"]["interpolated"].update(record_sha256="0" * 64),
            "SHA-256 is",
        ),
    ],
)
def test_verify(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, change: Change, message: str
) -> None:
    made = run(folder, "method=lora")
    (half,) = interpolate(made, capsys, "0.5")
    copied(made, tmp_path)
    path = copied(half, tmp_path)
    assert cli.main(["verify", str(path)]) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert cli.main(["verify", str(edited(path, change))]) == 65
    assert message in capsys.readouterr().err


def test_verify_without_its_run(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (half,) = interpolate(run(folder, "method=lora"), capsys, "0.5")
    assert cli.main(["verify", str(copied(half, tmp_path)), "--json"]) == 0
    states = {c["check"]: c["state"] for c in json.loads(capsys.readouterr().out)["checks"]}
    assert states["beginning"] == "not there" and {
        states[c] for c in ("run id", "sums", "same documents", "training")
    } == {"ok"}


@pytest.mark.parametrize(
    "made", [{"of": "x"}, "half", {"of": "x", "alpha": 0.5, "record_sha256": ""}], ids=str
)
def test_a_malformed_origin_is_one_line(folder: Path, tmp_path: Path, made: Any) -> None:
    path = copied(run(folder, "method=lora"), tmp_path)
    with pytest.raises(DataError, match="not a run record"):
        record.load(edited(path, lambda data, table: data["provenance"].update(interpolated=made)))


# --- compare --------------------------------------------------------------------------------------


def compared(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["compare", *argv, "--json"]) == 0, capsys.readouterr()
    return dict(json.loads(capsys.readouterr().out))


def test_records_by_name_are_settings_by_alpha(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow, fast = (run(folder, "method=lora", lr=lr) for lr in ("1e-2", "3e-2"))
    (half,) = interpolate(fast, capsys, "0.5")
    (whole,) = interpolate(fast, capsys, "1")
    found = compared(capsys, *(str(x.path) for x in (half, slow, fast)))
    assert [s["setting"] for s in found["settings"]] == [
        "lora lr=0.03",
        "lora lr=0.03 alpha=0.5",
        "lora lr=0.01",
    ]
    study = study_of_runs([fast, half])
    assert [(s.label, s.trained) for s in study.settings] == [
        ("lora", True),
        ("lora alpha=0.5", False),
    ]
    assert study_of_runs([half, slow]).settings[0].label == "lora lr=0.03 alpha=0.5"
    with pytest.raises(DataError, match="are the same"):
        study_of_runs([fast, whole])


def test_an_experiment_with_alphas(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpolated models are further settings of their methods, on their fronts; what they do
    is no positive control."""
    monkeypatch.setenv("COLUMNS", "120")
    text = (
        "question: q\noverrides: [debug=smoke, compute.threads=1]\nmethods: {gain_ffn: "
        "{train.lr: [0.8]}, lora: {train.lr: [0.003]}}\n"
    )
    (tmp_path / "e.yaml").write_text(text)
    line = [
        f"experiment={tmp_path}/e.yaml",
        f"results_dir={tmp_path}/results",
        f"output_dir={tmp_path}/runs",
    ]
    gain, lora = (
        run(tmp_path, "method=gain_ffn", lr="0.8"),
        run(tmp_path, "method=lora", lr="0.003"),
    )
    interpolate(gain, capsys, "0.25,0.5,1")
    interpolate(lora, capsys, "0.25,64")
    plain, found = compared(capsys, *line), compared(capsys, *line, "--alphas")
    one, other = "gain_ffn lr=0.8", "lora lr=0.003"
    assert [s["setting"] for s in plain["settings"]] == [one, other] and not plain["notes"]
    all_of = [
        one,
        f"{one} alpha=0.25",
        f"{one} alpha=0.5",
        other,
        f"{other} alpha=0.25",
        f"{other} alpha=64",
    ]
    assert [s["setting"] for s in found["settings"]] == all_of and any(
        "did not declare" in note for note in found["notes"]
    )
    assert found["positive_control"] == plain["positive_control"]
    ((there, here),) = zip(plain["equal_skill"], found["equal_skill"], strict=True)
    assert (
        here["difference"]["value"] is not None and here["skill"] != there["skill"]
    )  # read off other fronts
    assert cli.main(["compare", *line, "--alphas", "--equal", "tokens"]) == 0
    assert f"{other} alpha=0.25" in capsys.readouterr().out
    assert cli.main(["compare", str(gain.path), str(lora.path), "--alphas"]) == 64
    (lora.path.parent / f"{lora.record.run_id}-alpha0.5.json").write_text("{}")
    assert cli.main(["compare", *line, "--alphas"]) == 65
