"""Faults that others met or attacks found, each by the real command line: what is refused, in one
line, with which exit code, and what stays untouched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny
from gain_cl import cli
from gain_cl.errors import scrubbed
from gain_cl.system import files, hashes, lock

RUN = ["run", "debug=smoke"]
Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """A verb in an empty folder: (exit code, last line of stderr)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def say(*words: str) -> tuple[int, str]:
        code = cli.main([*words])
        lines = capsys.readouterr().err.strip().splitlines()
        return code, lines[-1] if lines else ""

    return say


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama."""
    folder, loaded = (
        tmp_path_factory.mktemp("models") / "llama",
        tiny("llama", max_position_embeddings=512),
    )
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the model's folder with other keys in config.json."""

    def copy(**config: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(llama, folder)
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**known, **config}))
        return folder

    return copy


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.betas=[2,3]", "train.betas=2 should be less than 1"),
        ("train.clip=inf", "train.clip=inf should be a finite number"),
        ("train.lr=1e38", "should be less than or equal to 1000"),
        ("compute.threads=1000000", "should be less than or equal to 1024"),
        ("output_dir=", "output_dir=''"),
        (f"track.tags=[{'x' * 65}]", "should have at most 64 characters"),
        (f"eval.documents=[{','.join('1' * 500)}]", "..."),
    ],
)
def test_values_that_end_a_run_later_are_refused_at_once(say: Say, word: str, said: str) -> None:
    code, line = say(*RUN, word)
    assert code == 64 and said in line and len(line) < 300
    assert list(Path().iterdir()) == []


def test_a_range_without_end_is_refused(say: Say) -> None:
    code, line = say(*RUN, "-m", "seed=range(0,1000000000)")
    assert code == 64 and "10,001 runs or more" in line


def test_home_and_equals_signs_are_read_as_they_stand(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    words = ["output_dir=~/runs", "results_dir=~/results", "track.name=lr=0.1"]
    assert say(*RUN, *words)[0] == 0
    assert list(Path().iterdir()) == []
    (run,) = (tmp_path / "home/results/runs").glob("*.json")
    assert (tmp_path / "home/runs" / run.stem / "matrix.csv").exists()
    assert json.loads(run.read_text())["config"]["track"]["name"] == "lr=0.1"


# --- secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HF_TOKEN", "DB_PASS", "GH_PAT", "PROXY_AUTH", "WANDB_API_KEY"])
def test_no_message_holds_a_secret(say: Say, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "xyzzy-hunter2")
    for key in ("seed", "track.name", "model", "sequence.domains"):
        code, line = say(*RUN, f"{key}=${{oc.env:{name}}}")
        assert code == 64 and "hunter2" not in line, line
    assert name in line or "${" in line


@pytest.mark.parametrize(
    "text",
    [
        "https://me:hunter2@host/x",
        "me:hunter2@host.org",
        "https://host/x?token=hunter2",
        "https://host/x?a=1&access_token=hunter2&b=2",
    ],
)
def test_passwords_in_addresses_are_scrubbed(say: Say, text: str) -> None:
    assert "hunter2" not in scrubbed(f"before {text} after")
    assert scrubbed(f"before {text} after").endswith("after")
    code, line = say(*RUN, f"track.name='{text}'")
    assert code == 64 and "hunter2" not in line and "holds a password" in line


def test_plain_text_stays() -> None:
    text = "a@b.org at 12:30 wrote to user@host: x=1 https://host/a?b=c tasks.names:boolq@100"
    assert scrubbed(text) == text


# --- folders that others can write ----------------------------------------------------------------


def test_a_lock_that_is_a_link_is_refused(say: Say, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    code, _ = say(*RUN, "output_dir=out", "results_dir=res")
    (run,) = Path("out").glob("tiny*")
    (run / "LOCK").symlink_to(victim)
    code, line = say(*RUN, "output_dir=out", "results_dir=res", "force=true")
    assert code == 74 and "it is a link" in line and victim.read_text() == "mine"


def test_a_run_folder_that_is_a_link_is_refused(say: Say, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_text("mine")
    say(*RUN, "output_dir=out", "results_dir=res")
    (run,) = Path("out").glob("tiny*")
    shutil.rmtree(run)
    run.symlink_to(theirs)
    words = ["output_dir=out", "results_dir=res", "force=true", "resume=never"]
    code, line = say(*RUN, *words)
    assert code == 74 and "folder is a link" in line
    assert [p.name for p in theirs.iterdir()] == ["precious"]


def test_claims_and_temporary_names_follow_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    claims = tmp_path / "claims"
    claims.mkdir()
    for name in ("run", lock.LAUNCH):
        (claims / name).symlink_to(victim)
    with pytest.raises(OSError):
        lock.claim_run(claims, "run")
    with pytest.raises(OSError), lock.one_launcher(claims):
        pass
    import socket

    (tmp_path / f".a.json.{os.getpid()}@{socket.gethostname()}.tmp").symlink_to(victim)
    files.write_bytes(tmp_path / "a.json", b"{}")
    assert victim.read_text() == "mine" and (tmp_path / "a.json").read_bytes() == b"{}"


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_size": "32"},
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "nonsense"}},
        {"hidden_act": "nonsense"},
    ],
    ids=["text", "zero", "rope", "activation"],
)
def test_a_config_that_libraries_fail_at_is_one_line(
    say: Say, copy: Callable[..., Path], keys: dict[str, Any]
) -> None:
    code, line = say(*RUN, f"model.path={copy(**keys)}")
    assert code == 65 and "transformers cannot load it: " in line, line


def test_files_that_are_no_model_are_refused_before_torch(
    say: Say, copy: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy()
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    good, text = load_file(weights), tokenizer.read_text()
    run = [*RUN, f"model.path={folder}"]

    tokenizer.write_text("{}")
    assert "transformers cannot load it" in say(*run)[1]
    tokenizer.write_text(text)

    import torch

    save_file({n: t.to(torch.int8) for n, t in good.items()}, weights, {"format": "pt"})
    assert "holds whole numbers (I8)" in say(*run)[1]
    nan = {n: t * float("nan") if "down_proj" in n else t for n, t in good.items()}
    save_file(nan, weights, {"format": "pt"})
    assert "logits are not finite" in say(*run)[1]

    weights.rename(folder.parent / "part.safetensors")
    shutil.copy(folder.parent / "part.safetensors", folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    for outside in ("../part.safetensors", "part.safetensors", str(folder.parent / "p")):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(good, outside)}))
        code, line = say(*run)
        assert code == 65 and "not in model*.safetensors of this folder" in line

    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "not a regular file" in say(*run)[1]


def test_weights_that_changed_with_their_times_kept_are_another_run(
    say: Say, copy: Callable[..., Path]
) -> None:
    folder = copy()
    weights = folder / "model.safetensors"
    run = [*RUN, f"model.path={folder}", "output_dir=out", "results_dir=res"]
    assert say(*run)[0] == 0
    before, data = weights.stat(), bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert say(*run)[0] == 0
    assert len(list(Path("res/runs").glob("*.json"))) == 2


def test_what_is_loaded_is_hashed_in_truth(
    say: Say, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that flips on the disk changes no time at all: what is remembered of the file stays."""
    folder = copy()
    weights = folder / "model.safetensors"
    run = [*RUN, f"model.path={folder}", "output_dir=out", "results_dir=res"]
    assert say(*run)[0] == 0
    key = weights.resolve()
    note = (
        hashes.cache_dir()
        / "hashes"
        / f"{hashes.hashlib.sha256(os.fsencode(key)).hexdigest()}.json"
    )
    assert note.exists()
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    stat = weights.stat()
    known = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    note.write_text(json.dumps({**json.loads(note.read_text()), "stat": known}))
    code, line = say(*run, "force=true")
    assert code == 65 and "what was remembered of them is wrong" in line
    assert say(*run)[0] == 0  # told once, and hashed anew
    assert len(list(Path("res/runs").glob("*.json"))) == 2


# --- printing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "reader gone"])
def test_a_run_outlives_its_output(tmp_path: Path, how: str) -> None:
    words = f"{sys.executable} -m gain_cl run debug=smoke output_dir=out results_dir=res"
    shell = f"{words} >&- 2>&-; echo $? >code"
    if how == "reader gone":
        shell = f"({words}; echo $? >code) 2>&1 | head -c 1"
    subprocess.run(shell, shell=True, cwd=tmp_path, check=False, capture_output=True, timeout=300)
    assert (tmp_path / "code").read_text() == "0\n"
    assert len(list((tmp_path / "res/runs").glob("*.json"))) == 1


def test_help_into_a_closed_pipe_says_nothing(tmp_path: Path) -> None:
    shell = f"{sys.executable} -m gain_cl run --help | head -c 1"
    done = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, timeout=300)
    assert done.stderr == b""


# --- launchers and platforms ----------------------------------------------------------------------


def test_several_ranks_are_told_once(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, line = say(*RUN)
    assert code == 64 and line.startswith("gain_cl: error: 2 processes were started")
    monkeypatch.setenv("RANK", "1")
    assert say(*RUN) == (64, "")
    assert list(Path().iterdir()) == []


def test_a_system_without_posix_locks_is_told_before_work(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    code, line = say(*RUN)
    assert code == 64 and "run it under WSL" in line
    assert say("sweep", "experiment=smoke", "output_dir=o", "results_dir=r")[0] == 64


# --- data and lost work ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a", "text": "b"}', "'text' is given twice"),
        ('{"text": "a", "more": {"x": 1, "x": 2}}', "'x' is given twice"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "bad JSON"),
    ],
    ids=["key", "inner key", "nested"],
)
def test_rows_that_two_readers_read_differently(say: Say, line: str, said: str) -> None:
    Path("d/domain").mkdir(parents=True)
    Path("rows.jsonl").write_text(f"{line}\n")
    Path("d/domain/own.yaml").write_text(
        "name: own\n"
        f"source: {{kind: files, path: {Path('rows.jsonl').absolute()}, field: text}}\n"
        "split: {dev: 0.1, test: 0.1}\n"
    )
    code, told = say(*RUN, "--config-dir", "d", "domain=[own]", "sequence.controls=[]")
    assert code in (64, 65) and said in told, told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question: a\nquestion: b\n", "'question' is given twice"),
        (
            "a: &a [x]\n" + "".join(f"k{i}: [*a, *a]\n" for i in range(60)),
            "more than 100 aliases",
        ),
    ],
)
def test_experiments_are_read_as_presets_are(say: Say, text: str, said: str) -> None:
    Path("mine.yaml").write_text(text)
    code, line = say("status", "experiment=mine.yaml")
    assert code == 64 and said in line


def test_a_record_in_which_a_key_stands_twice_is_refused(say: Say) -> None:
    """Its last value is the sealed one. Who reads the first reads another number."""
    assert say(*RUN, "output_dir=out", "results_dir=res")[0] == 0
    (path,) = Path("res/runs").glob("*.json")
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7,\n "seed": 0', 1))
    code, line = say("show", str(path))
    assert code == 65 and "'seed' is given twice" in line


def test_a_damaged_view_is_made_again(say: Say) -> None:
    run = [*RUN, "output_dir=out", "results_dir=res"]
    assert say(*run)[0] == 0
    (matrix,), (image,) = Path("out").glob("*/matrix.csv"), Path("out").glob("*/matrix.png")
    good = matrix.read_bytes(), image.read_bytes()
    matrix.write_bytes(good[0].replace(b"1", b"2"))
    image.write_bytes(good[1][:-40])
    assert say(*run)[0] == 0
    assert matrix.read_bytes() == good[0] and image.read_bytes().endswith(good[1][-8:])


def test_a_taint_outlives_attempts_jsonl(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changed between attempts stands in hashed files, not in a list for readers alone."""
    from gain_cl.errors import PreemptedError
    from gain_cl.runs import run as whole

    run = [*RUN, "output_dir=out", "results_dir=res"]
    score, calls = whole.score, []

    def stops(index: int, *rest: Any) -> Any:
        calls.append(index)
        if len(calls) == 3:
            raise PreemptedError("stopped")
        return score(index, *rest)

    monkeypatch.setattr(whole, "score", stops)
    assert say(*run)[0] == 75
    calls[:] = []
    calls.append(0)
    assert say(*run, "compute.eval_batch=3", "allow_change=[eval_batch]")[0] == 75
    (attempts,) = Path("out").glob("*/attempts.jsonl")
    attempts.write_text(attempts.read_text().splitlines(keepends=True)[0])
    monkeypatch.setattr(whole, "score", score)
    assert say(*run)[0] == 0
    (path,) = Path("res/runs").glob("*.json")
    assert any("eval_batch" in what for what in json.loads(path.read_text())["tainted"])


def test_a_hang_ends_and_the_run_goes_on(tmp_path: Path) -> None:
    """A step that never ends: exit 74, the stacks in failure.json, the lock free; the same command
    then goes on. A run whose step ends is left alone."""
    hang = tmp_path / "hang.py"
    hang.write_text(
        "import pathlib, time\n"
        "from gain_cl.runs import train\n"
        "step = train.stage\n"
        "def stage(*a, **k):\n"
        "    for row in step(*a, **k):\n"
        "        yield row\n"
        "        mark = pathlib.Path('hung')\n"
        "        if k['index'] == 2 and not mark.exists():\n"
        "            mark.touch()\n"
        "            time.sleep(300)\n"
        "train.stage = stage\n"
    )
    words = [sys.executable, "-m", "gain_cl", *RUN, "output_dir=out", "results_dir=res"]
    words += [f"--plugin={hang}", "compute.hang_minutes=0.2", "compute.threads=1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=200)
    assert done.returncode == 74, done.stderr
    assert b"no step or batch ended in 0.2 minutes" in done.stderr
    (run,) = (tmp_path / "out").glob("tiny*")
    told = json.loads((run / "failure.json").read_text())
    assert told["exit_code"] == 74 and any("hang.py" in line for line in told["stacks"])
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
