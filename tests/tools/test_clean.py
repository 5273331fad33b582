"""What `clean` shows and removes, and above all what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gain_cl import cli
from gain_cl.errors import InUseError
from gain_cl.system.lock import owned
from gain_cl.tools import clean

DAY = 86_400
ID = "tiny-gain_ffn-smoke-s0-0123456789"
OTHER = "tiny-lora-smoke-s1-abcdef0123"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/, results/ and a cache of their own; the home folder is elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "home").mkdir()
    return tmp_path


def write(*paths: str | Path, days: float = 0, content: bytes = b"0123456789") -> None:
    """Files, and every folder above them up to here, last changed so long ago."""
    then = time.time() - days * DAY
    for name in paths:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        for p in (path, *path.parents):
            if p != Path():
                os.utime(p, (then, then))


def run_folder(run_id: str = ID, days: float = 30) -> Path:
    """An unfinished run: 30 bytes in three files."""
    folder = Path("runs") / run_id
    write(
        folder / "run.json",
        folder / "ckpt/step-4/state.json",
        folder / "stages/01-a/stage.json",
        days=days,
    )
    return folder


def finish(run_id: str = ID) -> None:
    write(f"results/runs/{run_id}.json", f"results/runs/{run_id}.items.parquet")


def run(*argv: str) -> dict[str, object]:
    """The JSON of a command that must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "gain_cl", "clean", "--json", *argv],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def planned(*, days: float = 7, cache: bool = False, output: str = "runs") -> dict[str, str]:
    """path -> why"""
    return {str(i.path): i.why for i in clean.plan(Path(output), Path("results"), days, cache)}


def everything(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# --- what goes ------------------------------------------------------------------------------------


def test_abandoned_run(capsys: pytest.CaptureFixture[str], places: Path) -> None:
    folder = run_folder()
    before = everything(places)
    assert cli.main(["clean"]) == 0
    out = capsys.readouterr().out
    assert (
        str(folder) in out
        and "30 bytes" in out
        and "30.0" in out
        and "abandoned run: has no record" in out
    )
    assert out.endswith("30 bytes; --yes removes it\n")
    assert everything(places) == before
    assert cli.main(["clean", "--yes"]) == 0
    assert capsys.readouterr().out.endswith("removed 30 bytes\n")
    assert everything(Path("runs")) == set()


def test_a_run_is_abandoned_days_after_its_last_write() -> None:
    folder = run_folder(days=30)
    assert planned(days=29) and not planned(days=31)
    write(folder / "stages/01-a/deep/down.json", days=0)
    for p in (folder, folder / "stages"):  # only the file itself tells
        os.utime(p, (0, 0))
    assert not planned(days=29)


def test_a_finished_run_keeps_everything() -> None:
    folder = run_folder(days=400)
    finish()
    before = everything(folder)
    assert run("--yes")["items"] == [] and everything(folder) == before


def test_leftovers_older_than_a_day() -> None:
    folder = run_folder(days=2)
    write("runs/cells/.x.json.9.tmp", "runs/.tmp-a/b", days=2)
    write(folder / "stages/.tmp-mine/a", "runs/.tmp-new", days=0.5)
    assert sorted(planned()) == ["runs/.tmp-a", "runs/cells/.x.json.9.tmp"]
    run("--yes")
    left = everything(Path("runs"))
    assert not [n for n in left if "tmp" in n and "new" not in n and "mine" not in n]
    assert {f"{ID}/ckpt/step-4/state.json", f"{ID}/stages/.tmp-mine/a", ".tmp-new"} <= left


def test_caches_only_when_asked() -> None:
    keys = [
        "packages/demo==1.0/demo.whl",
        "models/demo-1.0-01234567/model.safetensors",
        f"tokens/{'a' * 32}/tokens.npy",
    ]
    keys += [f"hashes/{'b' * 64}.json", f"hub/models--a--b/{'c' * 40}.json"]
    write(*(f"cache/{k}" for k in keys))
    write(
        "cache/packages/.fetch-abcdefgh/x",
        "cache/tokens/.build-abcdefgh/x",
        "cache/models/tmpabcd1234/x",
        days=2,
    )
    write(f"runs/cells/{'d' * 32}.json", run_folder(days=0) / "LOCK")
    assert not planned()
    shown = planned(cache=True)
    caches = {
        str(Path("cache").absolute() / name)
        for name in ("packages", "models", "tokens", "hashes", "hub")
    }
    assert caches | {"runs/cells"} <= set(shown) and len(shown) == 9
    assert shown[str(Path("cache").absolute() / "packages")] == "cache: made again when needed"
    found = run("--cache", "--yes")
    assert found["removed_bytes"] == found["bytes"] == 90
    assert everything(Path("cache")) == {"packages", "models", "tokens", "hashes", "hub"}
    assert everything(Path("runs/cells")) == set()


@pytest.mark.slow
def test_what_a_real_run_leaves_is_known(places: Path) -> None:
    """Its caches go by name, a finished run keeps everything, and what is left can still be
    shown."""
    command = [sys.executable, "-m", "gain_cl"]
    settings = ["debug=smoke", "train.steps=1", "output_dir=runs", "results_dir=results"]
    subprocess.run(
        [*command, "run", *settings],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    [record] = Path("results/runs").glob("*.json")
    assert clean.RUN_ID.fullmatch(record.stem)
    before = {name: everything(places / name) for name in (f"runs/{record.stem}", "results")}
    assert {p.name for p in Path("runs").iterdir()} == {record.stem, "cells"} and everything(
        Path("cache")
    )
    assert run("--cache", "--yes", "--days", "0")["items"]
    assert everything(Path("runs/cells")) == set() and {
        p.parent for p in Path("cache").rglob("*")
    } == {Path("cache")}
    assert {name: everything(places / name) for name in before} == before
    subprocess.run([*command, "show", record.stem], check=True, capture_output=True)


# --- what stays -----------------------------------------------------------------------------------


def test_a_run_in_use_stays(capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(days=30)
    before = everything(folder)
    with owned(folder):
        for p in (folder, folder / "LOCK"):
            os.utime(p, (0, 0))
        assert cli.main(["clean", "--yes"]) == 0
        assert "nothing to remove" in capsys.readouterr().out
        assert everything(folder) == before | {"LOCK"}


def test_a_run_started_between_showing_and_removing_stays() -> None:
    run_folder()
    (item,) = clean.plan(Path("runs"), Path("results"))
    with owned(Path("runs") / ID), pytest.raises(InUseError):
        item.remove()
    assert Path(f"runs/{ID}/ckpt/step-4/state.json").exists()


def test_a_run_whose_record_is_elsewhere_stays() -> None:
    write(run_folder() / "matrix.csv", days=30)
    assert run("--yes")["items"] == []
    assert everything(Path(f"runs/{ID}/ckpt"))


def test_records_inside_a_run_folder_stay() -> None:
    folder = run_folder()
    write(folder / "results/runs/x.json", days=30)
    assert run("--yes", "--results-dir", str(folder / "results"))["items"] == []
    assert (folder / "results/runs/x.json").exists()


def test_other_folders_stay() -> None:
    """A marker is not enough, nor is a name."""
    run_folder()
    write(
        "runs/thesis/stages/one.tex",
        "runs/LOCK",
        f"runs/{OTHER}/notes.txt",
        "runs/debug/x",
        days=400,
    )
    write(
        "cache/models/mine/model.bin",
        "cache/packages/notes.txt",
        "cache/mine/x",
        "runs/cells/notes.txt",
        days=400,
    )
    kept = everything(Path("cache")) | {
        "thesis/stages/one.tex",
        "LOCK",
        f"{OTHER}/notes.txt",
        "debug/x",
        "cells/notes.txt",
    }
    run("--yes", "--cache")
    assert kept <= everything(Path("cache")) | everything(Path("runs"))
    assert not Path(f"runs/{ID}").exists()


def test_links_are_not_followed(places: Path) -> None:
    write(
        "precious/ckpt/a",
        "precious/run.json",
        f"precious/{'a' * 32}.json",
        "precious/demo==1.0",
        days=400,
    )
    outside = everything(places / "precious")
    folder = run_folder()
    (folder / "ckpt/link").symlink_to(places / "precious")
    (folder / "stages/root").symlink_to("/")
    (Path("runs") / OTHER).symlink_to(places / "precious")
    for name in ("runs/.tmp-link", "runs/cells", "cache/packages"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(places / "precious")
    for link in (folder / "ckpt/link", folder / "stages/root", Path("runs/.tmp-link")):
        os.utime(link, (0, 0), follow_symlinks=False)
    for p in (folder / "ckpt", folder / "stages", folder):
        os.utime(p, (0, 0))
    run("--yes", "--cache")
    assert everything(places / "precious") == outside and os.listdir("/")
    assert everything(Path("runs")) == {OTHER, "cells"} and Path("cache/packages").is_symlink()


HOSTILE = [
    ".tmp-\n[red]-rf",
    ".tmp--rf",
    ".tmp-\x1b[31mred",
    ".tmp-ünï\u202ecode",
    ".tmp-" + "x" * 240,
    ".tmp-$(touch gone); *",
    ".tmp-\udcff",
]


def test_hostile_names(capfd: pytest.CaptureFixture[str]) -> None:
    run_folder(days=0)
    for name in HOSTILE:
        write(Path("runs") / name / "-rf", days=2)
    for name in ("-rf", "..-s0-0123456789", "a\n-s0-0123456789", "-s0-0123456789", " "):
        write(Path("runs") / name / "run.json", days=400)
    kept = {
        "-rf/run.json",
        "..-s0-0123456789/run.json",
        "a\n-s0-0123456789/run.json",
        "-s0-0123456789/run.json",
        " /run.json",
    }
    assert cli.main(["clean"]) == 0
    out = capfd.readouterr().out
    assert "--yes removes it" in out and "\x1b[31m" not in out and "\u202e" not in out
    flat = "".join(out.split())
    assert (
        r".tmp-\n[red]-rf" in flat
        and r".tmp-\x1b[31mred" in flat
        and r"\u202e" in flat
        and r"\udcff" in flat
    )
    assert len(run("--yes")["items"]) == len(HOSTILE)  # type: ignore[arg-type]
    left = everything(Path("runs"))
    assert kept <= left and not [n for n in left if n.startswith(".tmp")]
    assert not Path("gone").exists()


@pytest.mark.parametrize(
    "folder", ["/", "/tmp/..", "home", "home/..", "src", "results/runs", "file"]
)
def test_refused_folders(folder: str, capsys: pytest.CaptureFixture[str], places: Path) -> None:
    write(
        f"home/{ID}/run.json",
        f"results/runs/{ID}/run.json",
        f"{ID}/run.json",
        "src/main.py",
        "file",
        days=400,
    )
    before = everything(places)
    assert cli.main(["clean", "--yes", "--output-dir", folder]) == 64
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gain_cl: error: ") and err.count("\n") == 1
    assert everything(places) == before


@pytest.mark.parametrize("cache", ["/", "home"])
def test_refused_caches(
    cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("home/packages/demo==1.0/x")
    monkeypatch.setenv("GAIN_CL_CACHE", cache)
    assert cli.main(["clean", "--yes", "--cache"]) == 64
    assert "name the folder of gain_cl alone" in capsys.readouterr().err
    assert Path("home/packages/demo==1.0/x").exists()


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "week"])
def test_refused_ages(days: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder()
    assert cli.main(["clean", "--yes", "--days", days]) == 64
    assert "--days" in capsys.readouterr().err and Path(f"runs/{ID}/run.json").exists()


def test_nothing_there(capsys: pytest.CaptureFixture[str], places: Path) -> None:
    assert cli.main(["clean", "--yes", "--cache"]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    assert everything(places) == {"home"}  # nothing was made either


def test_what_cannot_be_removed_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(clean, "_remove", refuse)
    assert cli.main(["clean", "--yes"]) == 74
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Permission denied (runs/" in err
    assert Path(f"runs/{ID}/run.json").exists()


def test_a_removal_cut_short_leaves_a_run_that_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints go first and at once: no reader meets half of one."""
    folder = run_folder()
    (item,) = clean.plan(Path("runs"), Path("results"))

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        item.remove()
    assert (
        not (folder / "ckpt").exists()
        and (folder / "run.json").exists()
        and (folder / "stages/01-a/stage.json").exists()
    )
    assert [p.name for p in folder.iterdir() if p.name.startswith(".tmp-clean-")]


# --- showing --------------------------------------------------------------------------------------


def test_json_without_yes_removes_nothing() -> None:
    run_folder()
    found = run()
    [item] = found["items"]  # type: ignore[misc]
    assert item == {
        "path": f"runs/{ID}",
        "bytes": 30,
        "days": 30.0,
        "why": "abandoned run: has no record",
    }
    assert found["bytes"] == 30 and found["removed_bytes"] == 0
    assert Path(f"runs/{ID}").exists()
