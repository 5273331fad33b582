"""The verb prepare: what it reports, what it refuses, and that a run then finds everything in the
cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gain_cl import cli, domains
from gain_cl.config import schema
from gain_cl.measure import tasks
from gain_cl.system import signals
from gain_cl.tools import prepare

PASSAGE = "River {0} -- The river {0} rises in hill {0}, it is {0} km long."
BOOLQ = [
    {"question": f"is the river {i} long", "passage": PASSAGE.format(i), "idx": i, "label": i % 2}
    for i in range(4)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "cache"


@pytest.fixture
def smoke(tmp_path: Path) -> list[str]:
    """Overrides of the smoke run, which writes below tmp_path."""
    return ["debug=smoke", f"output_dir={tmp_path / 'runs'}", f"results_dir={tmp_path / 'results'}"]


def own(tmp_path: Path, **texts: list[str]) -> list[str]:
    """Overrides that train domains of these texts, a preset each, and no control; a quarter of each
    is scored."""
    (tmp_path / "presets" / "domain").mkdir(parents=True, exist_ok=True)
    for name, chosen in texts.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": t}) + "\n" for t in chosen))
        preset = {
            "name": name,
            "source": {"kind": "files", "path": str(file)},
            "split": {"test": 0.25, "dev": 0.1},
        }
        (tmp_path / "presets" / "domain" / f"{name}.yaml").write_text(
            json.dumps(preset | {"licence": "[b]ours[/b]"})
        )
    return [
        f"domain=[{','.join(texts)}]",
        "sequence.controls=[]",
        "--config-dir",
        str(tmp_path / "presets"),
    ]


def texts(seed: int, count: int = 60) -> list[str]:
    source: dict[str, Any] = {"kind": "generated", "seed": seed, "documents": count}
    return list(domains.documents(schema.Domain(name="g", source=source)))  # type: ignore[arg-type]


def scored(chosen: list[str]) -> list[str]:
    """Those that a split of a quarter puts into test."""
    return [t for t in chosen if int(domains.text.text_hash(t), 16) / 2**256 < 0.25]


def reported(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main(["prepare", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_report(
    smoke: list[str], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prepare", *smoke]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[1] == "smoke_a: text and tokens"
    first, *_, last = out.splitlines()
    assert (
        first == "Domains (train / dev / test)"
        and last.startswith("prepared: 4 domains, ")
        and last.endswith(f"tokens, cache {cache}")
    )
    for part in (
        "smoke_control (control)",
        "93 / 40 / 67",
        "generated",
        "Apache-2.0",
        "(not finished yet)",
    ):
        assert part in out
    assert (
        not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()
    )  # nothing was trained


def test_the_report_as_json_is_what_a_run_finds_in_the_cache(
    smoke: list[str], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = reported(capsys, *smoke)
    kept = sorted((p, p.stat().st_mtime_ns) for p in cache.rglob("*.npy"))
    assert cli.main(["run", *smoke]) == 0
    made = json.loads(next((tmp_path / "results" / "runs").glob("*.json")).read_text())
    assert (
        sorted((p, p.stat().st_mtime_ns) for p in cache.rglob("*.npy")) == kept
    )  # nothing was tokenised again
    assert report["run"]["id"] == made["run_id"] and not report["run"]["finished"]
    assert (
        report["model"]["tokenizer"] == made["pins"]["tokenizer"]
        and report["model"]["embedding_rows"] == 257
    )
    assert {name: d["hash"] for name, d in report["domains"].items()} == made["pins"]["tokens"]
    for name, d in report["domains"].items():
        assert (
            d["trained"] == (name != "smoke_control")
            and d["documents"]["test"] + d["documents"]["dev"] + d["documents"]["train"] == 200
        )
    share = report["domains"]["smoke_a"]["learned_share"]
    assert share == 4 * 256 / report["domains"]["smoke_a"]["tokens"]["train"]
    capsys.readouterr()
    assert reported(capsys, *smoke)["run"]["finished"]


def test_a_planted_near_duplicate_is_reported(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = texts(1), texts(2)
    planted = f"{scored(a)[0].upper()} And one more sentence, so that it is another document."
    if planted in scored([planted]):
        planted += " Or two."
    argv = [*smoke, *own(tmp_path, a=a, b=[*b, planted])]
    report = reported(capsys, *argv)
    ids = [domains.text.text_hash(t)[:16] for t in (scored(a)[0], planted)]
    (pair,) = report["near_duplicates"]
    assert pair["share"] == 1.0 and [
        pair["domain"],
        pair["document"],
        pair["in_domain"],
        pair["in_document"],
    ] == ["a", ids[0], "b", ids[1]]
    assert cli.main(["prepare", *argv, "eval.documents=12"]) == 0
    out = capsys.readouterr().out
    assert "[b]ours[/b]" in out
    assert (
        "note: a: 1 of 12 scored documents have a near duplicate in training data (worst 1.00 "
        "of its 5-grams, domain b)" in out
    )


def test_a_planted_benchmark_item_is_reported(
    smoke: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "docs", lambda task, source, split=None: BOOLQ)
    learned = "and so the river 3 RISES in hill 3; it is 3 km long. question: is it not"
    a = [t if t in scored([t]) else f"{t} {learned}" for t in texts(1)]
    argv = [*smoke, *own(tmp_path, a=a, b=texts(2)), "tasks.names=[boolq]"]
    law, other = reported(capsys, *argv)["benchmark_overlap"]
    assert (law["task"], law["domain"], law["items"], law["long_enough"], len(law["found"])) == (
        "boolq",
        "a",
        4,
        4,
        1,
    )
    assert (other["domain"], other["found"]) == ("b", {})
    assert cli.main(["prepare", *argv]) == 0
    assert (
        "note: boolq: 1 items share a 13-gram with training documents (a 1)"
        in capsys.readouterr().out
    )


# --- what cannot be used --------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int) -> str:
    """The last line on stderr, after lines that tell of progress; stdout stays empty."""
    assert cli.main(["prepare", *argv]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("gain_cl: error: ") == 1
    return err.splitlines()[-1].removeprefix("gain_cl: error: ")


def test_data_that_cannot_be_used(
    smoke: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = own(tmp_path, a=texts(1), b=texts(1)[1:])
    line = refused(capsys, *smoke, *both, "domains.b.split.test=0.6", code=65)
    assert "documents are in the training split of a and in the test or dev split of b" in line
    assert "test documents, eval.documents=500 (domain smoke_a)" in refused(
        capsys, *smoke, "eval.documents=500", code=65
    )
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nno\n')
    assert "bad JSON" in refused(capsys, *smoke, *both, code=65)
    assert "model.prefix_token_id=257 has no embedding row (257 rows)" in refused(
        capsys, *smoke, "model.prefix_token_id=257", code=65
    )


def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean train.lr?" in refused(capsys, "train.lrr=1", code=64)
    assert refused(capsys, "--nope", code=64).startswith(
        "unrecognized arguments: --nope (gain_cl prepare)"
    )


def test_a_mistake_is_told_without_torch() -> None:
    checked = (
        "assert cli.main(['prepare', 'seed=-1']) == 64\nassert not {'torch', 'lm_eval'} & "
        "set(sys.modules)"
    )
    program = f"import sys; from gain_cl import cli\n{checked}"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_asked_to_stop(
    smoke: list[str],
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = domains.prepare_domain

    def and_ask(*given: Any) -> Any:
        monkeypatch.setattr(signals, "_asked", "SIGUSR1")
        return before(*given)

    monkeypatch.setattr(prepare.texts, "prepare_domain", and_ask)
    assert (
        refused(capsys, *smoke, code=75)
        == "stopped by SIGUSR1 (what is done is kept); run the same command to go on"
    )
    assert not list(cache.rglob("*.npy")) and signals.asked() is None
    monkeypatch.setattr(prepare.texts, "prepare_domain", before)
    assert cli.main(["prepare", *smoke]) == 0


def test_a_run_reads_all_from_a_bundle_without_network(tmp_path: Path, smoke: list[str]) -> None:
    """In a network namespace of its own, where the system allows that. No cache but the bundle's is
    filled."""
    gain_cl, folder = [sys.executable, "-m", "gain_cl"], tmp_path / "bundle"
    make = [*gain_cl, "prepare", f"bundle={folder}", "--json"]
    done = subprocess.run([*make, *smoke], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["cache"] == str(folder)
    before = sorted(p.relative_to(folder) for p in folder.rglob("*"))
    assert len([p for p in before if p.parts[0] == "tokens" and len(p.parts) == 2]) == 4
    alone = ["unshare", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []
    moved = folder.rename(tmp_path / "elsewhere")
    script = '. "$0"/env.sh && exec "$@"'
    run = [*alone, "bash", "-c", script, str(moved), *gain_cl, "run", *smoke]
    subprocess.run(run, check=True, capture_output=True)
    after = sorted(p.relative_to(moved) for p in moved.rglob("*"))
    assert [p for p in after if p.parts[0] == "tokens"] == [
        p for p in before if p.parts[0] == "tokens"
    ]
    assert not (tmp_path / "cache" / "tokens").exists()
    refused = subprocess.run(
        [*gain_cl, "prepare", f"bundle={tmp_path}", *smoke], capture_output=True, text=True
    )
    assert refused.returncode == 64
    assert "not empty and no bundle" in refused.stderr
