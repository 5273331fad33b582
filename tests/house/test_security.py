"""Secrets stay in the environment, names stay names, archives stay closed, text stays text, and
data runs no code."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from rich.console import Console

import fake_hub
import synthetic
from conftest import tiny
from gain_cl import cli
from gain_cl.compose import composition
from gain_cl.config import schema
from gain_cl.config.schema import PackageFile
from gain_cl.errors import ConfigError, DataError, GainError
from gain_cl.measure import record
from gain_cl.models import load, source
from gain_cl.paper import show
from gain_cl.runs import finish
from gain_cl.system import packages
from gain_cl.tools import export

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "src/gain_cl").rglob("*.py"))
ESCAPE = "\x1b[2J\x1b]0;owned\x07"

# --- secrets --------------------------------------------------------------------------------------

CANARIES = {
    "HF_TOKEN": "hf_CANARYhftokenCANARY",
    "WANDB_API_KEY": "CANARYwandb" + "0" * 29,
    "AWS_ACCESS_KEY_ID": "CANARYawsid01234",
    "AWS_SECRET_ACCESS_KEY": "CANARYaws/secret+0123",
    "MY_PASSWORD": "CANARYpassword",
    "HTTPS_PROXY": "http://me:CANARYproxy@127.0.0.1:9",
    "HTTP_PROXY": "http://me:CANARYproxy@127.0.0.1:9",
    "PIP_INDEX_URL": "http://me:CANARYindex@127.0.0.1:9/simple",
    "HF_ENDPOINT": "http://me:CANARYhub@127.0.0.1:9",
}
WORDS = [
    b"CANARYhftoken",
    b"CANARYwandb",
    b"CANARYaws",
    b"CANARYpassword",
    b"CANARYproxy",
    b"CANARYindex",
    b"CANARYhub",
]
NEEDLES = [
    form
    for w in WORDS
    for form in (w, base64.b64encode(w)[:-4], quote(w.decode()).encode(), w[::-1])
]

PLUGIN = """
from gain_cl import adapters
from gain_cl.adapters.full import FullAdapter
class Broken(FullAdapter):
    def absorb(self):
        pass
    def attach(self, loaded):
        raise RuntimeError("it crashed")
adapters.register("broken", Broken)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working folder; home and every cache lie in it, so that everything a command writes
    does."""
    (tmp_path / "plug.py").write_text(PLUGIN)
    return tmp_path


def gain_cl(home: Path, *argv: str, code: int, stdin: str = "", **env: str) -> bytes:
    """stdout and stderr of a command."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_", "GAIN_CL_"))}
    places = {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "GAIN_CL_CACHE": str(home / "cache"),
        "XDG_CACHE_HOME": str(home / "xdg"),
    }
    clean |= {**places, "XDG_CONFIG_HOME": str(home / "xdg"), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        [sys.executable, "-m", "gain_cl", *argv],
        cwd=home,
        env=clean,
        capture_output=True,
        timeout=300,
        input=stdin.encode(),
    )
    assert done.returncode == code, done
    return done.stdout + done.stderr


def leaks(said: bytes, home: Path) -> list[str]:
    """Where a canary got to, by whatever coding."""
    files = {str(p.relative_to(home)): p.read_bytes() for p in home.rglob("*") if p.is_file()}
    return [
        f"{n.decode()} in {name}"
        for name, data in {**files, "output": said}.items()
        for n in NEEDLES
        if n in data
    ]


RUN = [
    "debug=smoke",
    "domain=[smoke_a]",
    "sequence.controls=[]",
    "train.steps=2",
    "eval.documents=2",
    "output_dir=runs",
    "results_dir=results",
]


def test_secrets_reach_nothing(home: Path) -> None:
    """A tracked run, everything that is made of it, and four ways to fail, each with its
    traceback."""
    said = gain_cl(home, "run", *RUN, "track=wandb", "track.mode=offline", code=0, **CANARIES)
    assert list((home / "runs").glob("*/wandb/offline-run-*/*.wandb")), "wandb wrote something"
    (made,) = (home / "results/runs").glob("*.json")
    said += gain_cl(home, "show", str(made), code=0, **CANARIES)
    said += gain_cl(home, "export", str(made), "to=merged", "dir=out", code=0, **CANARIES)
    said += gain_cl(home, "run", "--cfg", "job", *RUN, code=0, **CANARIES)
    loud = {**CANARIES, "GAIN_CL_DEBUG": "1"}
    said += gain_cl(home, "run", *RUN, "train.lrr=1", code=64, **loud)
    crashed = gain_cl(
        home,
        "run",
        *RUN,
        "--plugin",
        "plug.py",
        "seed=1",
        "method=full",
        "adapter.kind=broken",
        "~adapter.select",
        code=1,
        **loud,
    )
    assert b"it crashed" in crashed
    hub = ["model.path=org/name", f"model.revision={'a' * 40}"]
    unreached = gain_cl(home, "run", *RUN, *hub, code=74, **loud)
    assert b"cannot be fetched" in unreached
    fetched = gain_cl(home, "run", "domain=[medicine]", *RUN[:1], *RUN[2:], code=74, **loud)
    assert b"cannot fetch" in fetched
    for name in CANARIES:
        said += gain_cl(home, "run", *RUN, f"track.entity=${{oc.env:{name}}}", code=64, **CANARIES)
    assert not leaks(said + crashed + unreached + fetched, home)


def test_a_leak_is_found(home: Path) -> None:
    """The search above has teeth."""
    (home / "x").write_bytes(b"..." + CANARIES["HF_TOKEN"].encode())
    assert leaks(b"", home) and leaks(CANARIES["HTTPS_PROXY"].encode(), home)


@pytest.mark.parametrize(
    "key", ["track.entity", "track.tags", "model.note", "domains.smoke_a.note", "lr_tuned_on"]
)
@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:MY_SECRET}",
        "x${oc.env:MY_SECRET}y",
        "https://me:pw@host/x",
        "https://token@host/x",
    ],
)
def test_secrets_are_refused_anywhere(
    key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "CANARYanywhere")
    given = f'["{value}"]' if key == "track.tags" else f'"{value}"'
    with pytest.raises(ConfigError, match=f"{key} holds") as caught:
        composition.compose([f"{key}={given}", "sequence=smoke", "tasks=none"])
    assert "CANARY" not in str(caught.value) and "pw@" not in str(caught.value)


# --- names ----------------------------------------------------------------------------------------

NAMES = [
    "../../x",
    "/etc/x",
    "..",
    ".hidden",
    "-rf",
    "a/b",
    "a\\b",
    "",
    "x" * 101,
    "é",
    "a b",
    "a\tb",
    "$(touch x)",
    "a;b",
    "[bold]",
    "a\u202eb",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "key",
    [
        "model.name",
        "sequence.name",
        "method",
        "sequence.domains",
        "tasks.names",
        "domains.smoke_a.name",
    ],
)
def test_hostile_names(
    key: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name leads out of a folder, hides in it, or looks like an option."""
    monkeypatch.chdir(tmp_path)
    quoted = json.dumps(name, ensure_ascii=False) if "\\" not in name else f"'{name}'"
    given = f"[{quoted}]" if key in ("sequence.domains", "tasks.names") else quoted
    with pytest.raises(ConfigError) as caught:
        composition.compose(
            [
                f"{key}={given}",
                *(["sequence=smoke"] if key != "sequence.domains" else []),
                *(["tasks=none"] if key != "tasks.names" else []),
            ]
        )
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_hostile_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of a folder domain's files are only read; in a message they are one line that commands
    no terminal."""
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "my/domain").mkdir(parents=True)
    (tmp_path / "my/domain/mine.yaml").write_text("source: {kind: files, path: data}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))
    line = ["run", "--config-dir", "my", "debug=smoke", "domain=[mine]", "sequence.controls=[]"]
    for name in (
        f"a{ESCAPE}b.jsonl",
        "a\nb.jsonl",
        "$(touch pwned).jsonl",
        "-rf.jsonl",
        "[bold]x.jsonl",
        "\udcff.jsonl",
    ):
        file = folder / name
        file.write_text('{"text": 1}\n')
        before = sorted(map(str, tmp_path.iterdir()))
        assert cli.main(line) == 65
        out, err = capsys.readouterr()
        assert (
            out == ""
            and err.startswith("gain_cl: error: ")
            and err.count("\n") == 1
            and "\x1b" not in err
            and "\x07" not in err
        )
        assert {*map(str, tmp_path.iterdir())} <= {*before, str(tmp_path / "cache")}
        file.unlink()


@pytest.mark.parametrize(
    "name", ["**", "*", "[", "../../../etc/passwd", "a\0b", "x" * 5000, "~", "a\n", ESCAPE]
)
def test_hostile_run_ids(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "--results-dir", str(tmp_path), name]) in (64, 65, 74)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("field", ["run_id", "model", "method", "sequence", "trained"])
def test_a_record_cannot_name_a_path(field: str, tmp_path: Path) -> None:
    """show and export look into output_dir/run_id: a record from elsewhere must not choose another
    folder."""
    run = synthetic.run(tmp_path / "r.json", bases={"a": 20.0, "x": 30.0}, controls=["x"], count=4)
    synthetic.edit(
        run.path,
        lambda data: data.update({field: ["../../x"] if field == "trained" else "../../x"}),
    )
    with pytest.raises(DataError, match=r"'../../x' is no name"):
        record.load(run.path)


# --- archives -------------------------------------------------------------------------------------

PATHS = [
    "../../evil.txt",
    "../evil.txt",
    "{root}/evil.txt",
    "a/../../../evil.txt",
    "ok/evil.txt",
    "..\\evil.txt",
]


def hostile(kind: str, cache: Path, root: Path) -> PackageFile:
    """An archive whose members want to be written elsewhere; in a tar also links, a pipe and a
    device."""
    folder = cache / "packages" / "evil==1.0"
    folder.mkdir(parents=True)
    paths = [p.format(root=root) for p in PATHS]
    if kind == "tar":
        with tarfile.open(folder / "evil-1.0.tar.gz", "w:gz") as tar:
            for path in paths:
                info = tarfile.TarInfo(path)
                info.size = 4
                tar.addfile(info, io.BytesIO(b"evil"))
            for kind_of, target in (
                (tarfile.SYMTYPE, "/etc/passwd"),
                (tarfile.LNKTYPE, "../../outside"),
                (tarfile.FIFOTYPE, ""),
                (tarfile.CHRTYPE, ""),
            ):
                info = tarfile.TarInfo(f"link{kind_of.decode()}/evil.txt")
                info.type, info.linkname = kind_of, target
                tar.addfile(info)
    else:
        with zipfile.ZipFile(folder / f"evil-1.0.{kind}", "w") as pack:
            for path in paths:
                pack.writestr(path, "evil")
            link = zipfile.ZipInfo("link/evil.txt")
            link.external_attr = 0o120777 << 16  # a symbolic link
            pack.writestr(link, "/etc/passwd")
    return PackageFile(package="evil==1.0", members="*evil.txt", sha256=None)


@pytest.mark.parametrize("kind", ["tar", "whl", "zip"])
def test_archives_write_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members are read in memory whatever their names are; links are not followed; extract writes
    the file it was told."""
    here = tmp_path / "a/b/c"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("GAIN_CL_CACHE", str(here / "cache"))
    file = hostile(kind, here / "cache", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = list(packages.members(file))
    assert len(found) == len(PATHS) + (kind != "tar")
    assert {data for _, data in found} == {b"evil"} | (
        {b"/etc/passwd"} if kind != "tar" else set()
    ), "a link is its own text, never its target"
    assert sorted(tmp_path.rglob("*")) == before
    one = file.model_copy(update={"members": "ok/evil.txt"})
    assert packages.extract(one, here / "out").read_bytes() == b"evil"
    assert set(tmp_path.rglob("*")) == {*before, here / "out"}


# --- text -----------------------------------------------------------------------------------------

HOSTILE = [
    "[bold]x[/]",
    "[/]",
    "[link=file:///etc/passwd]x[/link]",
    "=cmd()",
    "+1",
    "@x",
    "a,b\"c'd",
    "<script>",
    "\\input{x}",
    "$x$ & % # _",
    "| a |",
]


def test_notes_reach_the_terminal_as_text(tmp_path: Path) -> None:
    run = synthetic.run(
        tmp_path / "r.json",
        bases={"a": 20.0, "x": 30.0},
        controls=["x"],
        count=4,
        notes=[*HOSTILE, f"{ESCAPE}clear", "\x9b2J", "a\rb"],
    )
    out = io.StringIO()
    show.render(run, out=Console(file=out, width=120, force_terminal=True, color_system=None))
    said = out.getvalue()
    assert all(f"note: {text}" in said for text in HOSTILE), "brackets are no markup"
    assert r"note: \x1b[2J\x1b]0;owned\x07clear" in said and r"\x9b2J" in said and r"a\rb" in said
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(said)


def test_the_matrix_file_holds_names_and_numbers_only(tmp_path: Path) -> None:
    """Nothing that a spreadsheet would compute: each cell is a number, a name (which begins with
    neither = + - nor @) or a head."""
    run = synthetic.run(
        tmp_path / "r.json", bases={"a": 20.0, "x": 30.0}, controls=["x"], count=4, notes=HOSTILE
    )
    cells = [c for line in finish.matrix_csv(run).splitlines() for c in line.split(",")]
    assert cells and not [c for c in cells if c[:1] in "=+-@\t\r" and c]


@pytest.mark.parametrize("text", [ESCAPE, "a\x00b", "a\x9bb", "a\u202eb", "\ud800"])
def test_control_characters_are_refused_in_a_configuration(text: str, tmp_path: Path) -> None:
    """A preset of somebody else's could otherwise command the terminal of who runs it."""
    (tmp_path / "model").mkdir()
    escaped = "".join(f"\\u{ord(c):04x}" for c in text)
    (tmp_path / "model/mine.yaml").write_text(
        f'name: mine\ndtype: float32\narch: {{model_type: llama}}\nnote: "{escaped}"\n'
    )
    with pytest.raises(ConfigError) as caught:
        composition.compose(["model=mine", "sequence=smoke", "tasks=none"], [tmp_path])
    assert str(caught.value).isprintable()


def test_errors_quote_data_as_text() -> None:
    assert str(DataError(f"no field '{ESCAPE}'", "a\n\tb\u202e", "\ud800 \xa0")) == (
        r"no field '\x1b[2J\x1b]0;owned\x07' (a b\u202e); \ud800"
    )


# --- code -----------------------------------------------------------------------------------------

TARGETS = {
    "model": "name: mine\ndtype: float32\narch: {model_type: llama}\n_target_: os.system\n",
    "model arch": "name: mine\ndtype: float32\narch: {model_type: llama, x: {_target_: "
    "os.system}}\n",
    "domain": "source: {kind: generated, seed: 1, _target_: os.system}\n",
    "guard": "kind: none\n_target_: os.system\n",
    "adapter": "kind: gain\nroles: [attn_out]\n_target_: os.system\n",
    "tasks": "names: []\n_partial_: true\n",
    "sequence": "name: mine\ndomains: [smoke_a]\n_args_: [x]\n",
}


@pytest.mark.parametrize("place", TARGETS)
def test_target_is_an_unknown_key_anywhere(place: str, tmp_path: Path) -> None:
    group = place.split()[0]
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_text(TARGETS[place])
    words = [
        "domain=[mine]" if group == "domain" else f"{group}=mine",
        *(["sequence=smoke"] if group not in ("domain", "sequence") else []),
    ]
    with pytest.raises(ConfigError, match=r"unknown key .*_(target|partial|args)_") as caught:
        composition.compose([*words, *(["tasks=none"] if group != "tasks" else [])], [tmp_path])
    assert "mine.yaml" in str(caught.value)


HYDRA = {
    "callback": "callbacks: {x: {_target_: pathlib.Path.touch, self: {_target_: pathlib.Path, "
    "_args_: [pwned]}}}",
    "launcher": "launcher: {_target_: pathlib.Path}",
    "nested": "sweeper: {params: {x: {_target_: pathlib.Path}}}",
    "log handler": "job_logging: {handlers: {x: {(): pathlib.Path}}, root: {handlers: [x]}}",
    "environment": "job: {env_set: {LD_PRELOAD: x.so}}",
}


@pytest.mark.parametrize("what", HYDRA)
@pytest.mark.parametrize(
    "argv",
    [["run"], ["run", "-m", "seed=0,1"], ["run", "--cfg", "job"]],
    ids=["run", "multirun", "cfg"],
)
def test_a_preset_makes_hydra_call_nothing(
    what: str,
    argv: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Hydra instantiates what its own section names: without the check the first of these makes a
    file in a multirun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my/method").mkdir(parents=True)
    head = (
        "# @package _global_\ndefaults: [/adapter: gain, /guard: none, _self_]\nmethod: "
        "mine\nadapter: {roles: [attn_out]}\n"
    )
    (tmp_path / "my/method/mine.yaml").write_text(
        f"{head}train: {{lr: 1e-3}}\nhydra:\n  {HYDRA[what]}\n"
    )
    assert cli.main([*argv, "--config-dir", "my", "debug=smoke", "method=mine"]) == 64
    assert "a preset sets what Hydra would call" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["my"]


def test_other_launchers_of_hydra_may_be_chosen() -> None:
    assert composition.jobs(["hydra/launcher=basic", "seed=0,1", "sequence=smoke", "tasks=none"])


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def forbidden(name: str, call: ast.Call) -> bool:
    """Calls that run what data says, beyond those tests/test_architecture.py refuses."""
    keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
    first = call.args[0] if call.args else None
    last = name.rpartition(".")[2]
    if name in (
        "hydra.utils.instantiate",
        "hydra.utils.call",
        "runpy.run_path",
        "tempfile.mktemp",
        "os.popen",
        "compile",
        "joblib.load",
    ):
        return True
    if last in (
        "instantiate",
        "get_class",
        "get_method",
        "get_object",
        "unsafe_load",
        "full_load",
        "read_pickle",
        "to_pickle",
        "extractall",
        "unpack_archive",
    ):
        return True
    if name.startswith(
        (
            "torch.hub.",
            "torch.save",
            "os.exec",
            "os.spawn",
            "subprocess.getoutput",
            "pickle.",
            "marshal.",
        )
    ):
        return True
    if (
        name.startswith("yaml.")
        and last in ("load", "compose", "parse", "scan", "load_all")
        and "SafeLoader" not in keywords.get("Loader", "")
    ):
        return True
    if name.startswith("subprocess.") and last in (
        "run",
        "Popen",
        "call",
        "check_call",
        "check_output",
    ):
        return isinstance(first, ast.Constant | ast.JoinedStr)  # a list is no shell command
    if name in ("np.load", "numpy.load", "np.save", "numpy.save"):
        return keywords.get("allow_pickle") != "False"
    if last == "extract":
        return name != "packages.extract"
    if "AutoModel" in name and last == "from_pretrained":
        return keywords.get("use_safetensors") != "True" and "gguf_file" not in keywords
    if name == "importlib.import_module":
        return not isinstance(first, ast.Constant | ast.JoinedStr) or not ast.unparse(first).strip(
            "f'\""
        ).startswith("gain_cl.")
    return False


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "src/gain_cl")))
def test_no_call_runs_what_data_says(path: Path) -> None:
    assert not [
        f"{name} in line {call.lineno}" for name, call in calls(path) if forbidden(name, call)
    ]
    strings = [
        n.value
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Constant) and isinstance(n.value, str)
    ]
    assert path.name == "composition.py" or "_target_" not in strings, (
        "names map to classes in code"
    )


@pytest.mark.parametrize(
    "line",
    ["hydra.utils.instantiate(c)", "subprocess.run('ls')", "subprocess.run(f'ls {x}')", "np.load(p)", "np.load(p, allow_pickle=True)",
     "tar.extractall(d)", "pack.extract(n)", "tempfile.mktemp()", "yaml.unsafe_load(t)", "yaml.compose(t)", "torch.hub.load('x')",
     "importlib.import_module(name)",
     "importlib.import_module(f'{x}.y')", "AutoModelForCausalLM.from_pretrained(p)", "pd.read_pickle(p)"],
)  # fmt: skip
def test_the_rule_has_teeth(line: str, tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(line)
    assert next(forbidden(name, call) for name, call in calls(file))


def test_records_are_written_without_nan() -> None:
    """JSON that is written to disk says allow_nan=False."""
    loose = []
    for path in MODULES:
        for name, call in calls(path):
            if name in ("json.dump", "json.dumps") and not any(
                k.arg == "allow_nan" and ast.unparse(k.value) == "False" for k in call.keywords
            ):
                loose.append(f"{path.name}:{call.lineno}")
    assert not loose


@pytest.mark.parametrize("stage", [None, 1])
def test_export_of_a_record_from_elsewhere(stage: int | None, tmp_path: Path) -> None:
    """Its configuration is validated before anything is loaded; its weights are looked for under
    its own run id."""
    run = synthetic.run(tmp_path / "r.json", bases={"a": 20.0, "x": 30.0}, controls=["x"], count=4)
    with pytest.raises(GainError, match="the trained state of this stage is not there"):
        export.export(run, "merged", tmp_path / "out", stage, str(tmp_path))
    assert not (tmp_path / "out").exists()


# --- code in a model folder ------------------------------------------------------------------

CODE = {
    "AutoConfig": ("config.json", {"AutoConfig": "evil.Evil"}),
    "AutoConfig of a version": ("config.4.0.0.json", {"AutoConfig": "evil.Evil"}),
    "AutoModelForCausalLM": ("config.json", {"AutoModelForCausalLM": "evil.Evil"}),
    "AutoTokenizer, fast": ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.Evil"]}),
    "AutoTokenizer, slow": ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", None]}),
    "AutoTokenizer, a list": ("tokenizer_config.json", [None, "evil.Evil"]),
}
"""Who would run the code, the file that names it, and its auto_map there."""

YES = "y\n" * 20


def plant(folder: Path, kind: str, family: str = "llama") -> Path:
    """Write a whole model whose files name code; return the file that the code would leave."""
    loaded = tiny("llama")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    marker = folder.parent / "it_ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    file, auto_map = CODE[kind]
    whole = json.loads((folder / "config.json").read_text()) | {"model_type": family}
    if file == "config.4.0.0.json":
        (folder / file).write_text(json.dumps(whole))
        whole = whole | {"configuration_files": [file]}
    (folder / "config.json").write_text(json.dumps(whole))
    told = json.loads((folder / file).read_text()) | {"auto_map": auto_map}
    if file == "tokenizer_config.json":
        told["tokenizer_class"] = "Evil"
    (folder / file).write_text(json.dumps(told))
    return marker


def refused_code(said: bytes, marker: Path, file: str) -> None:
    """One line names the file; nobody was asked, and the code left no mark."""
    assert said.startswith(b"gain_cl: error: the model needs code from its repository (")
    assert f"{file}); gain_cl never runs it".encode() in said and said.count(b"\n") == 1
    assert not marker.exists()


@pytest.mark.parametrize("kind", CODE)
def test_code_in_a_model_folder_never_runs(kind: str, tmp_path: Path) -> None:
    marker = plant(tmp_path / "m", kind)
    said = gain_cl(tmp_path, "run", *RUN, "model.path=m", code=65, stdin=YES)
    refused_code(said, marker, f"m/{CODE[kind][0]}")


def test_code_in_a_model_of_an_unknown_family_never_runs(tmp_path: Path) -> None:
    marker = plant(tmp_path / "m", "AutoConfig", family="mystery")
    said = gain_cl(tmp_path, "run", *RUN, "model.path=m", code=65, stdin=YES)
    refused_code(said, marker, "m/config.json")


def test_code_in_a_scored_checkpoint_never_runs(tmp_path: Path) -> None:
    marker = plant(tmp_path / "m", "AutoTokenizer, fast")
    words = [w for w in RUN if not w.startswith("train.")]
    said = gain_cl(tmp_path, "score", "m", *words, code=65, stdin=YES)
    refused_code(said, marker, "m/tokenizer_config.json")


def test_code_in_a_scored_snapshot_never_runs(tmp_path: Path) -> None:
    """A hub checkpoint is opened after torch is there, and passes the same check first."""
    from gain_cl.adapters.checkpoints import GivenAdapter

    marker = plant(tmp_path / "m", "AutoTokenizer, fast")
    adapter = GivenAdapter([str(tmp_path / "m")])
    adapter.attach(tiny("llama"))
    with pytest.raises(DataError, match="the model needs code from its repository"):
        adapter.take(1)
    assert not marker.exists()


def test_code_in_a_hub_repository_never_runs(tmp_path: Path) -> None:
    """The snapshot passes the same check; the code is not even fetched."""
    marker = plant(tmp_path / "hub/models/org/evil", "AutoTokenizer, fast")
    argv = ["run", *RUN, "model.path=org/evil", f"model.revision={fake_hub.SHA}"]
    with fake_hub.serve(tmp_path / "hub") as (address, log):
        said = gain_cl(tmp_path, *argv, code=65, stdin=YES, HF_ENDPOINT=address)
    refused_code(said, marker, "tokenizer_config.json")
    assert not any("evil.py" in line for line in log)


def test_a_model_folder_is_refused_before_torch(tmp_path: Path) -> None:
    plant(tmp_path / "m", "AutoTokenizer, fast")
    code = (
        "import sys; from gain_cl import cli\n"
        f"assert cli.main({['run', *RUN, 'model.path=m']!r}) == 65\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


@pytest.fixture
def answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is asked says yes, and code would be copied to a folder of the test."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.mark.parametrize("kind", CODE)
def test_the_second_wall_holds(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answered: None,
) -> None:
    """Were such a folder not refused, no call that opens it would run its code."""
    import torch

    marker = plant(tmp_path / "m", kind)
    monkeypatch.setattr(source, "_inspect_code", lambda folder: None)
    given = schema.Model(name="m", path=str(tmp_path / "m"), dtype="float32")
    for call in (
        lambda: load.load_model(given, torch.device("cpu")),
        lambda: load.load_tokenizer(given),
        lambda: load.tokenizer_of(tmp_path / "m", "m"),
        lambda: load.parameters_of(tmp_path / "m", "float32"),
        lambda: load.vocabulary(given),
        lambda: load.meta_model(given),
    ):
        with contextlib.suppress(DataError, ValueError):
            call()
        assert not marker.exists()


@pytest.mark.parametrize("kind", CODE)
def test_the_planted_code_would_run(kind: str, tmp_path: Path, answered: None) -> None:
    """The tests above have teeth: where code is trusted, each of these folders runs its own."""
    import transformers

    marker = plant(tmp_path / "m", kind)
    with contextlib.suppress(Exception):
        opened = getattr(transformers, kind.split()[0].strip(","))
        opened.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert marker.exists()


def test_code_that_an_architecture_names_never_runs(tmp_path: Path, answered: None) -> None:
    """model.arch may hold auto_map too: the family's own class is taken."""
    import torch

    marker = plant(tmp_path / "m", "AutoModelForCausalLM")
    auto_map = {"AutoModelForCausalLM": f"{tmp_path / 'm'}--evil.Evil"}
    arch = {**tiny("llama").model.config.to_dict(), "auto_map": auto_map}
    given = schema.Model(name="m", arch=arch, dtype="float32")
    load.load_model(given, torch.device("cpu"))
    load.meta_model(given)
    assert not marker.exists()
