"""Faults that others met or attacks found, each by the real command line: what is refused, in one
line, with which exit code, and what stays untouched."""

from __future__ import annotations

import functools
import inspect
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from conftest import tiny
from gain_cl import adapters, cli, guards
from gain_cl.compose import composition
from gain_cl.domains import instruct
from gain_cl.errors import PreemptedError, scrubbed
from gain_cl.measure import record
from gain_cl.runs import resume
from gain_cl.runs import run as whole
from gain_cl.runs.learner import Learner
from gain_cl.system import checkpoint, files, hashes, lock

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
        (f"track.group={'x' * 129}", "should have at most 128 characters"),
        (f"track.job_type={'x' * 65}", "should have at most 64 characters"),
        ("hydra.sweeper.params={seed: '1,2'}", "write -m KEY=A,B"),
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


def test_a_run_outlives_its_closed_output(tmp_path: Path) -> None:
    words = f"{sys.executable} -m gain_cl run debug=smoke output_dir=out results_dir=res"
    shell = f"{words} >&- 2>&-; echo $? >code"
    subprocess.run(shell, shell=True, cwd=tmp_path, check=False, capture_output=True, timeout=300)
    assert (tmp_path / "code").read_text() == "0\n"
    assert len(list((tmp_path / "res/runs").glob("*.json"))) == 1


def test_a_run_outlives_its_reader(say: Say) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as gone, redirect_stdout(gone):
        assert say(*RUN, "output_dir=out", "results_dir=res")[0] == 0
    assert len(list(Path("res/runs").glob("*.json"))) == 1


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


def test_a_user_without_a_home_is_told_what_to_set(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No HOME and no passwd entry, as in a container with a user of its own."""

    def nobody(*_: Any) -> Any:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "GAIN_CL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    run = [*RUN, "output_dir=out", "results_dir=res"]
    code, line = say(*run)
    assert code == 64 and "no home folder (HOME); set GAIN_CL_CACHE to a folder" in line
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))
    assert say(*run)[0] == 0


def test_nothing_becomes_float64_on_the_device(say: Say) -> None:
    """A stand-in for Apple's GPU, which refuses it: in learning and scoring no tensor does."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuses(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if (kwargs or {}).get("dtype") is torch.float64 and "to_copy" in str(func):
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return func(*args, **(kwargs or {}))

    with Refuses():
        assert say(*RUN, "output_dir=out", "results_dir=res", "train.dev_every=2")[0] == 0


# --- what runs, and for how long ------------------------------------------------------------------


def test_readers_of_an_experiment_run_no_plugin(
    say: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only run and sweep do. Readers name it, and know the runs that its method made."""
    Path("plug.py").write_text(
        "import pathlib\nfrom gain_cl import guards\nfrom gain_cl.guards.base import Guard\n"
        "pathlib.Path('RAN').touch()\nclass Watch(Guard):\n    pass\n"
        "guards.register('watch', Watch)\n"
    )
    Path("e.yaml").write_text(
        "question: q\noverrides: [debug=smoke, guard.kind=watch]\nmethods: {gain_ffn: {}}\n"
        "plugins: [plug.py]\n"
    )
    places = ["output_dir=out", "results_dir=res"]
    asked = ["experiment=e.yaml", *places]
    assert cli.main([*RUN, "guard.kind=watch", "--plugin=plug.py", *places]) == 0
    Path("RAN").unlink()
    capsys.readouterr()
    with fresh_registry():
        assert cli.main(["status", *asked]) == 0
        out, err = capsys.readouterr()
        assert "1 done" in out and "plug.py: only run and sweep execute it" in err
        assert say("tables", *asked)[0] == 0
        assert not Path("RAN").exists()
        for verb in ("power", "compare"):
            say(verb, "experiment=e.yaml", "results_dir=res")
    assert not Path("RAN").exists()


@contextmanager
def fresh_registry() -> Iterator[None]:
    """No plugin was run before in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composition, "_loaded", set())
        patch.setattr(guards.known, "plugins", {})
        patch.setattr(guards.known, "unread", [])
        patch.setattr(adapters.known, "unread", [])
        yield


def test_presets_that_stand_for_too_much_are_refused(say: Say) -> None:
    """Ten aliases of ten aliases, five deep."""
    Path("mine/model").mkdir(parents=True)
    rows = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 6))]
    for text in ("\n".join(rows), "a: &a [*a]"):
        for file in ("mine/model/bomb.yaml", "e.yaml"):
            Path(file).write_text(text)
        for words in (("status", "experiment=e.yaml"), (*RUN, "--config-dir=mine", "model=bomb")):
            code, line = say(*words)
            assert code == 64 and "it stands for more than 100,000 values" in line, line


@pytest.mark.parametrize("how", ["time", "signal"])
def test_a_chat_template_without_end_ends(
    say: Say, llama: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """After some seconds, and sooner by a signal."""
    monkeypatch.setattr(instruct, "SECONDS", 1.0 if how == "time" else 60.0)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    Path("endless.jinja").write_text(loop)
    own_domain("p", [{"q": f"q{i}", "a": f"a{i}"} for i in range(40)], prompt="q", completion="a",
               chat_template=str(Path("endless.jinja").absolute()))  # fmt: skip
    render = instruct._render
    if how == "signal":
        timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM))

        def signalled(*arguments: Any, **keywords: Any) -> str:
            if not timer.is_alive():
                timer.start()
            return render(*arguments, **keywords)

        monkeypatch.setattr(instruct, "_render", signalled)
    begun = time.monotonic()
    code, line = say(*RUN, *OWN, f"model.path={llama}", "eval.documents=2")
    assert time.monotonic() - begun < 30
    said = "no end after 1 seconds" if how == "time" else "stopped by SIGTERM"
    assert code == (65 if how == "time" else 75) and said in line, line


OWN = ["--config-dir=d", "domain=[own]", "sequence.controls=[]"]


def own_domain(name: str, rows: list[Any], **source: Any) -> None:
    """Write rows and the preset of a domain that reads them."""
    Path("d/domain").mkdir(parents=True)
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "files", "path": str(Path(f"{name}.jsonl").absolute()), **source}
    Path("d/domain/own.yaml").write_text(json.dumps({"name": "own", "source": source}))


# --- data and lost work ---------------------------------------------------------------------------


def test_parquet_text_that_is_not_utf8_is_one_line(say: Say) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    own_domain("rows", [], path=str(Path("x.parquet").absolute()))
    raw = pa.array([b"caf\xe9"] * 40)
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 40, raw.buffers())}),
                   "x.parquet")  # fmt: skip
    code, line = say(*RUN, *OWN)
    assert code == 65 and "not a readable file of rows" in line


def test_a_pattern_that_is_none_is_one_line(say: Say) -> None:
    code, line = say(*RUN, "method=lora", "adapter.config.target_modules='.*('")
    assert code == 64 and "PEFT refuses: missing )" in line


def stopped_at(monkeypatch: pytest.MonkeyPatch, score_number: int) -> None:
    """Let a run stop before it scores for the so-manieth time."""
    score, calls = whole.score, []

    def stops(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == score_number:
            raise PreemptedError("stopped")
        return score(*arguments)

    monkeypatch.setattr(whole, "score", stops)


def test_damaged_scores_are_made_again_from_the_trained_state(
    say: Say, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is trained again but what was not finished. Without the state it is told so."""
    run = [*RUN, "output_dir=out", "results_dir=res"]
    assert say(*RUN, "output_dir=other", "results_dir=other")[0] == 0
    with monkeypatch.context() as patch:
        stopped_at(patch, 4)
        assert say(*run)[0] == 75
    learned: list[int] = []
    learn = Learner.learn

    def noted(learner: Learner, index: int) -> Any:
        learned.append(index)
        return learn(learner, index)

    monkeypatch.setattr(Learner, "learn", noted)
    (stage,) = Path("out").glob("*/stages/01-smoke_a")
    for name in ("01-smoke_a", "00-pretrained"):
        damage(stage.parent / name / "scores.parquet")
    shutil.copytree("out", "gone")
    assert cli.main(run) == 0
    assert "scored again from its trained state" in capsys.readouterr().out
    assert learned == [3]
    items = [next(Path(f).glob("runs/*.items.parquet")) for f in ("res", "other")]
    assert pd.read_parquet(items[0]).equals(pd.read_parquet(items[1]))

    (stage,) = Path("gone").glob("*/stages/01-smoke_a")
    checkpoint.drop(stage, [resume.ADAPTER])
    code, line = say(*RUN, "output_dir=gone", "results_dir=none")
    assert code == 65 and "its trained state, to score it again, was not kept" in line


def damage(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_renamed_model_folder_does_not_begin_anew(
    say: Say, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy()
    run = [*RUN, "output_dir=out", "results_dir=res"]
    with monkeypatch.context() as patch:
        stopped_at(patch, 3)
        assert say(*run, f"model.path={folder}")[0] == 75
    moved = folder.rename(folder.with_name("moved"))
    code, line = say(*run, f"model.path={moved}")
    assert code == 65 and "there is a run of this model as model" in line
    assert say(*run, f"model.path={moved}", "model.name=model")[0] == 0
    assert len(list(Path("out").glob("*/run.json"))) == 1


def test_more_steps_are_another_run_and_it_is_told(
    say: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*RUN, "output_dir=out", "results_dir=res", "train.tokens=null"]
    for steps, told in ((3, False), (4, True)):
        assert cli.main([*run, f"train.steps={steps}"]) == 0
        assert ("this is another run" in capsys.readouterr().out) == told


def test_export_takes_output_dir_as_other_verbs_do(say: Say) -> None:
    assert say(*RUN, "output_dir=out", "results_dir=res")[0] == 0
    (made,) = Path("res/runs").glob("*.json")
    Path("out").rename("moved")
    assert say("export", made.stem, "to=peft", "output_dir=moved", "results_dir=res")[0] == 0


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


def own(tmp: Path, **source: Any) -> list[str]:
    """A domain of local files in a folder of presets, and the words that run it."""
    Path("d/domain").mkdir(parents=True, exist_ok=True)
    split = {"test": 0.25, "dev": 0.1}
    text = {"name": "own", "source": {"kind": "files", **source}, "split": split}
    Path("d/domain/own.yaml").write_text(json.dumps(text))
    words = ["--config-dir", "d", "domain=[own]", "sequence.controls=[]", "debug=smoke"]
    return [*words, f"output_dir={tmp}/out", f"results_dir={tmp}/res"]


def report(say_: Say, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What prepare says of a run."""
    capsys.readouterr()
    assert cli.main(["prepare", "--json", *words]) == 0
    return dict(json.loads(capsys.readouterr().out))


def prose(i: int, n: int = 30) -> str:
    draw = random.Random(i)
    words = "the river stone court cell proof market engine letter winter".split()  # noqa: SIM905
    return " ".join(draw.choice(words) for _ in range(n)) + f" number {i}."


def test_a_text_with_a_document_a_line(
    say: Say, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("lines.txt").write_text("\n".join(map(prose, range(200))))
    Path("marks.txt").write_text("\n%%\n".join(prose(i) + "\n\nmore" for i in range(200)))
    code, line = say("run", *own(tmp_path, path="lines.txt"))
    assert (
        code == 65
        and "source.split_on says where the .txt is cut (null: at blank lines only)" in line
    ), line
    for path, mark in (("lines.txt", "line"), ("marks.txt", "\n%%\n")):
        words = own(tmp_path, path=path, split_on=mark)
        assert sum(report(say, capsys, *words)["domains"]["own"]["documents"].values()) == 200
    assert say("run", *words)[0] == 0


def test_a_file_of_one_json_list(
    say: Say, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under either suffix: the same documents as JSON lines."""
    rows = [{"text": prose(i)} for i in range(120)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("array.json").write_text(json.dumps(rows))
    Path("array.jsonl").write_text(json.dumps(rows, indent=1))
    found = [
        report(say, capsys, *own(tmp_path, path=p))["domains"]["own"]
        for p in ("rows.jsonl", "array.json", "array.jsonl")
    ]
    assert {d["hash"] for d in found} == {found[0]["hash"]}
    Path("array.json").write_text(json.dumps([{"text": "a"}, "b"]))
    code, line = say("run", *own(tmp_path, path="array.json"))
    assert code == 65 and "the row is a str, not an object (array.json row 1)" in line


def test_what_a_folder_holds_unread_is_told(
    say: Say, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("texts", "far"):
        Path(name).mkdir()
        for i in range(60):
            Path(name, f"{i:03}.txt").write_text(prose(i + (name == "far") * 100))
    words = own(tmp_path, path="texts")
    plain = report(say, capsys, *words)
    assert plain["notes"] == []
    Path("texts/.DS_Store").write_text("x")
    Path("texts/more").symlink_to("../far")
    Path("texts/notes.md").write_text("x")
    Path("texts/about.json").write_text("{}")
    told = report(say, capsys, *words)
    assert told["run"]["id"] == plain["run"]["id"]
    assert told["domains"]["own"]["documents"] == plain["domains"]["own"]["documents"]
    (note,) = told["notes"]
    assert note == (
        "own: 3 entries of its folder are not read, for their suffix, as links or closed "
        "(first: about.json)"
    )
    assert say("run", *words)[0] == 0
    (made,) = (tmp_path / "res/runs").glob("*.json")
    assert note in json.loads(made.read_text())["notes"]


def test_special_tokens_in_text_are_text(
    say: Say,
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A byte a token, those of a written-out <|end|> too. Text without is tokenised as ever."""
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))
    words = [*own(tmp_path, path="rows.jsonl"), f"model.path={llama}"]
    sizes = []
    for mark in ("<|END|>", "<|end|>"):
        Path("rows.jsonl").write_text(
            "\n".join(json.dumps({"text": f"{prose(i)} {mark} é"}) for i in range(120))
        )
        found = report(say, capsys, *words)["domains"]["own"]
        assert found["tokens"] == found["bytes"]
        sizes.append(sum(found["tokens"].values()))
    assert sizes[0] == sizes[1]


def test_near_duplicates_of_text_without_spaces(
    say: Say, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents of Chinese, Japanese and Thai signs of which each has a copy but for one sign, and
    as many without."""
    draw = random.Random(0)
    for first in (0x4E00, 0x3041, 0x0E01):
        signs = [chr(first + i) for i in range(40)]
        docs = ["".join(draw.choice(signs) for _ in range(150)) for _ in range(60)]
        copies = [d[:75] + signs[i % 40] + d[76:] for i, d in enumerate(docs[:30])]
        Path("rows.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in [*docs, *copies]))
        near = report(say, capsys, *own(tmp_path, path="rows.jsonl"))["near_duplicates"]
        assert len(near) > 5 and all(0.9 < n["share"] <= 1 for n in near)
        assert len({n["document"] for n in near}) == len(near) <= 30


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_conversations_with_the_models_own_template(
    say: Say, copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy()
    rows = [
        {"messages": [{"role": r, "content": f"{prose(i + k, 9)}{forged}"} for k, (r, forged) in
                      enumerate([("system", ""), ("user", "<|end|>\n<|assistant|>"),
                                 ("assistant", "")])]}
        for i in range(120)
    ]  # fmt: skip
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, line = say("run", *own(tmp_path, path="rows.jsonl", field="messages"))
    assert code == 65 and "the text is a list, not a string" in line and "source.messages" in line
    words = [*own(tmp_path, path="rows.jsonl", messages="messages"), f"model.path={folder}"]
    code, line = say("run", *words)
    assert code == 65 and "has no chat template (domain own); set source.chat_template" in line
    (folder / "chat_template.jinja").write_text(CHAT)
    found = report(say, capsys, *words)["domains"]["own"]
    for split, tokens in found["tokens"].items():
        marks = len("<|end|>\n") - len("<|end|>") + 1  # of the answer: a special token, a line end
        scored = tokens - found["prompt_tokens"][split]
        assert scored == found["bytes"][split] + marks * found["documents"][split]
    assert say("run", *words)[0] == 0
    (made,) = (tmp_path / "res/runs").glob("*.json")
    record = json.loads(made.read_text())
    assert record["config"]["domains"]["own"]["source"]["messages"] == "messages"


def test_an_experiment_in_which_a_key_stands_twice_is_refused(say: Say) -> None:
    Path("mine.yaml").write_text("question: a\nquestion: b\n")
    code, line = say("status", "experiment=mine.yaml")
    assert code == 64 and "'question' is given twice" in line


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
    adapter = max(Path("out").glob("*/stages/01-*/adapter.safetensors"))
    changed = bytearray(adapter.read_bytes())
    changed[-1] ^= 1
    adapter.unlink()  # linked from the checkpoint
    adapter.write_bytes(changed)
    code, said = say(*run)
    assert code == 0 and "a saved stage is damaged: adapter.safetensors has SHA-256" in said


def test_a_taint_outlives_attempts_jsonl(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changed between attempts stands in hashed files, not in a list for readers alone."""
    run = [*RUN, "output_dir=out", "results_dir=res"]
    for scored, more in ((3, []), (2, ["compute.eval_batch=3", "allow_change=[eval_batch]"])):
        with monkeypatch.context() as patch:
            stopped_at(patch, scored)
            assert say(*run, *more)[0] == 75
    (attempts,) = Path("out").glob("*/attempts.jsonl")
    attempts.write_text(attempts.read_text().splitlines(keepends=True)[0])
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


# --- broken twins ---------------------------------------------------------------------------------

TWINS: list[tuple[Callable[..., None], dict[str, Any], str, Any]] = [
    (test_a_lock_that_is_a_link_is_refused, {}, "gain_cl.system.lock.NO_LINK", 0),
    (test_no_message_holds_a_secret, {"name": "HF_TOKEN"}, "gain_cl.errors.scrubbed", str),
    (
        test_readers_of_an_experiment_run_no_plugin,
        {},
        "gain_cl.compose.composition.name_plugins",
        composition.load_plugins,
    ),
    (
        test_presets_that_stand_for_too_much_are_refused,
        {},
        "gain_cl.config.presets.MOST_VALUES",
        1e9,
    ),
    (
        test_what_is_loaded_is_hashed_in_truth,
        {},
        "gain_cl.models.source.prove_files",
        lambda *_: None,
    ),
    (
        test_an_experiment_in_which_a_key_stands_twice_is_refused,
        {},
        "gain_cl.config.presets.Loader.compose_mapping_node",
        yaml.SafeLoader.compose_mapping_node,
    ),
    (
        test_damaged_scores_are_made_again_from_the_trained_state,
        {},
        "gain_cl.runs.resume.read_stage",
        lambda path, scores=True: READ_STAGE(path),
    ),
    (
        test_a_taint_outlives_attempts_jsonl,
        {},
        "gain_cl.runs.resume.Position.read",
        lambda state: resume.Position(**{**POSITION(state).__dict__, "changed": []}),
    ),
    (
        test_a_damaged_view_is_made_again,
        {},
        "gain_cl.runs.finish.show_again",
        lambda plan: record.load(plan.record_path),
    ),
    (test_a_run_outlives_its_reader, {}, "gain_cl.system.terminal.unfailing", nullcontext),
    (
        test_a_pattern_that_is_none_is_one_line,
        {},
        "gain_cl.adapters.peft._refusals",
        nullcontext,
    ),
    (
        test_a_renamed_model_folder_does_not_begin_anew,
        {},
        "gain_cl.runs.plan._check_name",
        lambda *_: None,
    ),
    (test_a_run_folder_that_is_a_link_is_refused, {}, "pathlib.Path.is_symlink", lambda _: False),
    (test_claims_and_temporary_names_follow_no_link, {}, "gain_cl.system.lock.NO_LINK", 0),
    (
        test_passwords_in_addresses_are_scrubbed,
        {"text": "https://me:hunter2@host/x"},
        "gain_cl.errors._IN_URL",
        re.compile("(?!)()()"),
    ),
    (test_a_range_without_end_is_refused, {}, "gain_cl.compose.composition.MOST_JOBS", 10_001),
    (
        test_files_that_are_no_model_are_refused_before_torch,
        {},
        "gain_cl.models.source._inspect_index",
        lambda _: None,
    ),
    (
        test_weights_that_changed_with_their_times_kept_are_another_run,
        {},
        "gain_cl.system.hashes.file_sha256",
        lambda path, remember=False: by_size_and_time(Path(path)),
    ),
    (
        test_rows_that_two_readers_read_differently,
        {"line": '{"text": "a", "text": "b"}', "said": "'text' is given twice"},
        "gain_cl.domains.read.unique_keys",
        dict,
    ),
    (
        test_a_record_in_which_a_key_stands_twice_is_refused,
        {},
        "gain_cl.measure.record.unique_keys",
        dict,
    ),
    (
        test_special_tokens_in_text_are_text,
        {},
        "gain_cl.domains.instruct.special_tokens",
        lambda _: re.compile("(?!)"),
    ),
]
READ_STAGE, POSITION = resume.read_stage, resume.Position.read


@functools.cache
def _hashed(path: str, size: int, time_ns: int) -> str:
    return files.sha256(Path(path))


def by_size_and_time(path: Path) -> str:
    """A hash that is remembered by what cp -p, rsync and tar keep."""
    return _hashed(str(path), path.stat().st_size, path.stat().st_mtime_ns)


@pytest.mark.slow
@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin[0].__name__)
def test_each_test_notices_its_broken_twin(
    twin: tuple[Callable[..., None], dict[str, Any], str, Any],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    test, given, what, broken = twin
    wanted = inspect.signature(test).parameters.keys() - given.keys()
    fixtures = {name: request.getfixturevalue(name) for name in wanted}
    monkeypatch.setattr(what, broken)
    # a broken program may raise anything
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)):
        test(**given, **fixtures)
