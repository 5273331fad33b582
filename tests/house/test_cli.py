"""The command line: its grammar, its verbs, and one line for each mistake of a user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gain_cl import cli
from gain_cl.compose import composition
from gain_cl.config import presets
from gain_cl.errors import ConfigError

SMALL = ["sequence=smoke", "tasks=none"]


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 64) -> str:
    """The one line on stderr of a command that must fail."""
    assert cli.main(list(argv)) == code
    out, err = capsys.readouterr()
    assert err.startswith("gain_cl: error: ") and err.count("\n") == 1, err
    assert out == ""
    return err.removeprefix("gain_cl: error: ").strip()


# --- mistakes -------------------------------------------------------------------------------------

BAD = [
    # misspelt keys, with and without prefix
    ("debug=smok", "unknown debug 'smok' (debug=smok)", "did you mean smoke?"),
    ("train.lrr=1", "unknown key train.lrr", "did you mean train.lr?"),
    ("+train.lrr=1", "unknown key train.lrr", "did you mean train.lr?"),
    ("++train.lrr=1", "unknown key train.lrr", "did you mean train.lr?"),
    ("lr=1", "unknown key lr", "did you mean train.lr?"),
    ("optimizer=adam", "unknown key optimizer", "did you mean train.optimizer?"),
    ("modle=gpt2", "unknown key modle", "did you mean model?"),
    ("adapter.sidee=input", "unknown key adapter.sidee", "did you mean adapter.side?"),
    # keys of another kind: what this kind has, never the key itself
    (
        "method=full adapter.init_from=x",
        "unknown key adapter.init_from (command line)",
        "; adapter full has select",
    ),
    (
        "++guard.strength=1",
        "unknown key guard.strength (command line)",
        "; guard none has no settings",
    ),
    (
        "method=kl_base guard.fraction=0.5",
        "unknown key guard.fraction (command line)",
        "; guard kl_base has strength",
    ),
    ("method=ewc ++guard.strenght=1", "unknown key guard.strenght", "did you mean guard.strength?"),
    (
        "++domains.smoke_a.source.path=x",
        "unknown key domains.smoke_a.source.path",
        "; source generated has documents, seed",
    ),
    (
        "++domains.smoke_a.licens=x",
        "unknown key domains.smoke_a.licens",
        "did you mean domains.smoke_a.licence?",
    ),
    (
        "domains.smoke_a.source.sed=1",
        "unknown key domains.smoke_a.source.sed",
        "did you mean domains.smoke_a.source.seed?",
    ),
    ("domains.smoke_x.source.seed=1", "no such domain in this run", "did you mean smoke_"),
    ("model/foo=bar", "unknown group model/foo", "did you mean model?"),
    # unknown names
    (
        "model=gpt3",
        "unknown model 'gpt3' (model=gpt3)",
        "did you mean gpt2? there is: custom, gpt2,",
    ),
    ("method=lorra", "unknown method 'lorra'", "did you mean lora?"),
    ("domain=[lwa]", "unknown domain 'lwa'", "did you mean law?"),
    ("tasks=bolq", "unknown tasks 'bolq'", "did you mean boolq?"),
    ("tasks.names=[bolq@10]", "unknown task 'bolq'", "did you mean boolq?"),
    ("guard=ewcc", "unknown guard 'ewcc'", "there is: ema, ewc"),
    ("adapter.kind=gian", "unknown adapter 'gian'", "did you mean gain?"),
    ("method=lora adapter.peft_type=LORRA", "PEFT has no type 'LORRA'", "did you mean LORA?"),
    ("method=lora ++adapter.config.lora_alfa=1", "no key 'lora_alfa'", "did you mean lora_alpha?"),
    (
        "method=lora adapter.config.use_dora=true",
        "unknown key adapter.config.use_dora",
        "write ++adapter.config.use_dora=VALUE",
    ),
    # numbers
    ("train.lr=fast", "train.lr='fast' should be a valid number", "command line"),
    ("train.lr=0", "train.lr=0 should be greater than 0", ""),
    ("train.lr=-1e-3", "train.lr=-0.001 should be greater than 0", ""),
    ("train.lr=nan", "train.lr=nan should be a finite number", ""),
    ("train.lr=inf", "train.lr=inf should be a finite number", ""),
    ("train.lr=true", "train.lr=true is a boolean", "YAML reads no"),
    ("train.betas=[0.9]", "train.betas has too few values", ""),
    ("seed=-1", "seed=-1 should be greater than or equal to 0", ""),
    ("seed=99999999999", "seed=99999999999 should be less than", ""),
    ("seed=0.5", "seed=0.5 should be a valid integer", ""),
    # sequences
    ("domain=[law,law]", "repeated domain: law", "name each once"),
    ("domain=[law] sequence.controls=[law]", "repeated domain: law", ""),
    ("domain=[]", "sequence.domains=[] List should have at least 1 item", ""),
    ("domain=[true]", "True is no name", "quote it"),
    ("domain=[../x]", "'../x' is no name", ""),
    ("domain=[1st]", "domain '1st' begins with a digit", ""),
    ("sequence.order=[0,0,1]", "order [0, 0, 1] is not a permutation of 0..2", ""),
    # missing, interpolated
    ("model=custom", "the model has no path", "give model.path="),
    ("train.lr=???", "train.lr is missing", "give train.lr="),
    ("~train.lr", "train.lr is missing", ""),
    ("train.lr=${train.rl}", "train.lr: Interpolation key 'train.rl' not found", "command line"),
    ("train.lr=${train.eps} train.eps=${train.lr}", "Recursive interpolation", ""),
    # combinations
    (
        "train.tokens=4096 train.steps=4",
        "train.tokens and train.steps are both given",
        "set one of them to null",
    ),
    ("train.tokens=null", "neither train.tokens nor train.steps is given", ""),
    (
        "train.steps=2 train.tokens=null train.warmup=0.9",
        "train.warmup=0.9 leaves no step after it",
        "",
    ),
    ("train.block=100", "is not a multiple of train.block=100", ""),
    ("compute.micro_batch=3", "compute.micro_batch=3 does not divide", ""),
    ("eval.stride=2000", "eval.stride=2000 exceeds eval.context", ""),
    (
        "model=gpt2 eval.context=1025",
        "eval.context=1025 exceeds the context of gpt2, 1024 tokens",
        "use eval.context=1024",
    ),
    (
        "train.block=16384 train.batch_tokens=16384 train.tokens=16384",
        "exceeds the context of smollm2_healed, 8192 tokens",
        "",
    ),
    # devices and types
    ("compute.device=gpu", "compute.device='gpu' String should match", "auto|cpu|mps|cuda"),
    ("model.dtype=bf16", "model.dtype='bf16' is not possible", "did you mean bfloat16?"),
    # names
    ("model.name=../../x", "'../../x' is no name", "use 1-100 of"),
    ("sequence.name=''", "'' is no name", ""),
    (f"model.name={'x' * 300}", "is no name", ""),
    ('model.name="a\nb"', "is no name", ""),
    # model paths
    ("model.path=/no/such/folder", "neither a folder nor a hub id", "check the path"),
    ("model.path=gpt2", "neither a folder nor a hub id", "model=NAME names a preset"),
    ("model.path=org/name", "needs a revision", "give the 40-hex commit"),
    (
        "model=gpt2 model.revision=main",
        "'main' is no commit of openai-community/gpt2",
        "pin a 40-hex commit",
    ),
    # grammar
    ("train", "cannot read 'train'", "write KEY=VALUE"),
    ("train.lr=1 train.lr=2", "train.lr is given twice", ""),
    ("model=[gpt2,mistral]", "model takes the name of one preset", ""),
    ("model=null", "model takes the name of one preset", ""),
    ("model=gpt2,mistral", "several values: model=gpt2,mistral", "add -m"),
    ("domain=law,code", "several values: domain=law,code", "domain=[a,b]"),
    ("+train.lr=1", "already at 'train.lr'", "Either remove + prefix"),
    ("-m seed=1,1", "two runs of the multirun are the same: seed=1 ", "remove the repeated"),
    ("-m seed=0,1 hydra/launcher=jobllib", "unknown hydra/launcher 'jobllib'", "basic"),
    ("-m model=gpt2,gpt3", "unknown model 'gpt3'", "did you mean gpt2?"),
    ("--nope", "unrecognized arguments: --nope", "--help"),
    ("--cfg jab", "invalid choice: 'jab'", ""),
    ("--cfg job -p nope", "package 'nope' not found", ""),
    ("--config-dir /no/such", "no such folder (--config-dir /no/such)", ""),
    ("--plugin /no/such.py", "no such file (--plugin /no/such.py)", ""),
    ("track.project=https://me:pass@host/x", "track.project holds a password", "environment"),
]


@pytest.mark.parametrize(
    ("line", "what", "do"), BAD, ids=[b[0][:40].replace("\n", " ") for b in BAD]
)
def test_one_line(
    line: str,
    what: str,
    do: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = line.split(" ") if '"' not in line else [line]
    light = [
        o for o in SMALL if not any(w.startswith((o.split("=")[0] + "=", "domain=")) for w in words)
    ]
    said = refused(capsys, "run", *words, *(light if "tasks.names" not in line else light[:1]))
    assert what in said and do in said, said
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing on disk"


FILES = [
    ("model", "name: mine\n  dtype: [\n", "bad YAML: ", "mine.yaml:2"),
    ("model", "name: mine\n\tdtype: x\n", "bad YAML: ", "mine.yaml:2"),
    (
        "model",
        "name: mine\ndtype: float32\narch:\n  model_type: llama\n  model_type: gpt2\n",
        "'model_type' is given twice",
        "mine.yaml:5",
    ),
    (
        "model",
        "name: mine\ndtpye: float32\narch: {model_type: llama}\n",
        "unknown key model.dtpye",
        "mine.yaml:2); did you mean model.dtype?",
    ),
    (
        "model",
        "name: no\ndtype: float32\narch: {model_type: llama}\n",
        "False is no name",
        "mine.yaml:1); quote it",
    ),
    ("model", "name: mine\narch: {model_type: llama}\n", "model.dtype is missing", ""),
    (
        "model",
        "name: mine\ndtype: ${model.dtpye}\narch: {model_type: llama}\n",
        "'model.dtpye' not found",
        "mine.yaml:2",
    ),
    (
        "model",
        "name: ${model.dtype}\ndtype: ${model.name}\narch: {model_type: llama}\n",
        "Recursive interpolation",
        "mine.yaml:1",
    ),
    ("model", "- name\n- dtype\n", "a preset is a mapping of keys", "mine.yaml"),
    (
        "model",
        "defaults: [gpt3, _self_]\nname: mine\n",
        "unknown model 'gpt3' (model/mine.yaml)",
        "did you mean gpt2?",
    ),
    (
        "model",
        "_target_: os.system\nname: mine\ndtype: float32\narch: {model_type: llama}\n",
        "unknown key model._target_",
        "mine.yaml:1",
    ),
    (
        "model",
        "name: !!python/object/apply:os.system ['true']\n",
        "bad YAML: could not determine a constructor",
        "mine.yaml:1",
    ),
    (
        "model",
        "name: m\xe9\n".encode("latin-1"),
        "bad YAML: 'utf-8' codec",
        "mine.yaml",
    ),
    (
        "method",
        "defaults: [/adapter: gain, /guard: none]\nmethod: mine\n",
        "fills only method",
        "# @package _global_",
    ),
    (
        "method",
        "# @package _global_\ndefaults: [/adapter: gain, /guard: none, _self_]\nmethod: "
        "mine\ntrain:\n  lr: fast\n",
        "train.lr='fast'",
        "mine.yaml:5",
    ),
    (
        "sequence",
        "name: mine\ndomains: [smoke_a, smoke_x]\n",
        "unknown domain 'smoke_x'",
        "did you mean smoke_",
    ),
    (
        "sequence",
        "name: mine\ndomains: [smoke_a, no]\n",
        "False is no name",
        "mine.yaml:2); quote it",
    ),
    (
        "domain",
        "source: {kind: fils, path: x}\n",
        "domains.mine.source.kind='fils' is not possible",
        "did you mean files?",
    ),
    (
        "domain",
        "source:\n  kind: files\n  pth: x\n",
        "unknown key domains.mine.source.pth",
        "mine.yaml:3",
    ),
    (
        "domain",
        "name: other\nsource: {kind: files, path: x}\n",
        "names itself 'other'",
        "mine.yaml:1",
    ),
    (
        "domain",
        "source: {kind: hub, path: a/b, revision: main, files: '*', fields: [text], "
        "max_bytes: 9}\n",
        "no commit of a/b",
        "mine.yaml:1",
    ),
]


@pytest.mark.parametrize(
    ("group", "text", "what", "do"), FILES, ids=[f"{f[0]}-{f[2][:30]}" for f in FILES]
)
def test_one_line_for_a_users_file(
    group: str,
    text: str | bytes,
    what: str,
    do: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / group).mkdir(parents=True)
    (tmp_path / "my" / group / "mine.yaml").write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )
    words = [
        "domain=[mine]" if group == "domain" else f"{group}=mine",
        *(SMALL[1:] if group in ("domain", "sequence") else SMALL),
    ]
    said = refused(capsys, "run", "--config-dir", "my", *words)
    assert what in said and do in said, said


def test_config_dir_must_hold_presets_and_shadow_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "modle").mkdir()
    assert "no presets in the folder" in refused(capsys, "run", f"--config-dir={tmp_path}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "gpt2.yaml").write_text("name: gpt2\n")
    assert "model/gpt2.yaml has the name of another preset" in refused(
        capsys, "run", f"--config-dir={tmp_path}"
    )


def test_secrets_stay_out_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789")
    said = refused(capsys, "run", "track.name=${oc.env:HF_TOKEN}", *SMALL)
    assert "track.name holds the value of $HF_TOKEN" in said and "canary" not in said


def test_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare model.path= selects the custom model, is called after its folder, drops a commit, and
    obeys its config.json."""
    folder = tmp_path / "My model (v2)"
    folder.mkdir()
    assert "no config.json" in refused(capsys, "run", f'model.path="{folder}"', *SMALL, code=65)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "max_position_embeddings": 512, "hidden_size": 8})
    )
    assert "no model*.safetensors" in refused(
        capsys, "run", f'model.path="{folder}"', *SMALL, code=65
    )
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    words = [f'model.path="{folder}"', *SMALL]
    assert "eval.context=1024 exceeds the context of My-model--v2-, 512 tokens" in refused(
        capsys, "run", *words
    )
    run = composition.compose([*words, "eval.context=512", f"model.revision={'a' * 40}"])
    assert (run.model.name, run.model.revision, run.model.dtype, run.model.path) == (
        "My-model--v2-",
        None,
        "float32",
        str(folder),
    )
    (folder / "file").touch()
    assert "neither a folder nor" in refused(capsys, "run", f'model.path="{folder}/file"', *SMALL)
    run = composition.compose(["model=gpt2", *words, "eval.context=512"])
    assert (run.model.name, run.model.revision) == ("gpt2", None), (
        "a preset keeps its name when its weights come from a folder"
    )
    run = composition.compose(["model=smollm2", *words, "eval.context=512"])
    assert run.model.package is None, "the path stands in for the package"


# --- grammar --------------------------------------------------------------------------------------


def test_domain_list() -> None:
    run = composition.compose(
        ["domain=[smoke_c,smoke_control]", *SMALL, "domains.smoke_c.source.documents=50"]
    )
    assert run.sequence.name == "custom"
    assert run.sequence.domains == ["smoke_c", "smoke_control"]
    assert run.sequence.controls == [], "a control that is trained controls nothing"
    assert list(run.domains) == ["smoke_c", "smoke_control"]
    assert run.domains["smoke_c"].source.documents == 50  # type: ignore[union-attr]
    run = composition.compose(
        ["domain=smoke_b", "sequence.controls=[smoke_a]", "sequence.name=mine", *SMALL]
    )
    assert (run.sequence.name, run.sequence.domains, run.sequence.controls) == (
        "mine",
        ["smoke_b"],
        ["smoke_a"],
    )


def test_keys_that_presets_leave_out() -> None:
    """The schema says which keys there are: no + is needed for one that the YAML at hand does not
    spell out."""
    run = composition.compose(
        ["domains.smoke_a.split.test=0.3", "model.roles={attn_out: x, ffn_down: y}", *SMALL]
    )
    assert run.domains["smoke_a"].split.test == 0.3
    assert run.model.roles == {"attn_out": "x", "ffn_down": "y"}


def test_cfg_job_shows_what_will_run(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert cli.main(["run", "--cfg", "job", "debug=smoke", "method=lora", "domain=[smoke_b]"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["sequence"]["domains"] == ["smoke_b"] and set(shown["domains"]) == {
        "smoke_b",
        "smoke_control",
    }
    assert shown["method"] == "lora" and shown["model"]["name"] == "tiny"


@pytest.mark.parametrize("flag", ["--help", "-h", "--info=searchpath", "--hydra-help"])
def test_help(flag: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\n")
    assert cli.main(["run", flag, "--config-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert {"--help": "mine", "-h": "domain=[law,medicine]"}.get(flag, "") in out


def test_verbs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main([]) == 64
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out.count("params") == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gain_cl 0.")
    assert "did you mean show?" in refused(capsys, "shw")
    assert "no run 'abc'" in refused(capsys, "show", "abc")
    assert "no record" in refused(capsys, "show", "abc.json", code=65)
    assert "unknown model 'gpt3'" in refused(capsys, "params", "model=gpt3")
    assert "unrecognized arguments: gpt2" in refused(capsys, "params", "gpt2")

    def interrupt(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_carry_out", interrupt)
    capsys.readouterr()
    assert cli.main(["run", *SMALL]) == 130
    assert capsys.readouterr() == ("", "")


def test_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAIN_CL_DEBUG", "1")
    assert cli.main(["run", "train.lrr=1"]) == 64
    assert "Traceback" in capsys.readouterr().err


def test_params_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "the model has no path" in refused(capsys, "params", "model=custom")


def test_params_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["params", "--json", "model=tiny", "method=gain_attn,lora,full"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table == {
        "tiny": {
            "total": 115_072,
            "methods": {
                "gain_attn": 128,
                "lora": table["tiny"]["methods"]["lora"],
                "full": 115_072,
            },
        }
    }
    assert cli.main(["params", "model=tiny", "method=gain_ffn"]) == 0
    assert "115,072" in capsys.readouterr().out


def test_params_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Methods as rows, whole lines in a pipe: no number is cut, no model left out."""
    from gain_cl.tools import params

    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it

    numbers = {"full": 124_439_808, "gain_ffn": 46_080, "oft": "PEFT refuses: no Conv1D"}
    params.print_counts(
        {
            f"a_model_of_some_name_{i:02d}": {"total": 68_976_648_192, "methods": numbers}
            for i in range(12)
        }
    )
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if not line.startswith(("oft on", "─"))]
    assert max(map(len, rows)) <= 120 and "…" not in "".join(lines)
    heads = [line.split() for line in rows if line.startswith("method")]
    assert len(heads) == 3 and [m for h in heads for m in h[1:]] == [
        f"a_model_of_some_name_{i:02d}" for i in range(12)
    ]
    assert [row.split()[0] for row in rows[1:6]] == ["method", "total", "full", "gain_ffn", "oft"]
    assert (
        sum(line.count("124,439,808") for line in lines)
        == sum(line.count("refused") for line in rows)
        == 12
    )
    assert "oft on a_model_of_some_name_11: PEFT refuses: no Conv1D" in lines


def test_params_leave_out_what_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["params", "--json", "model=tiny"]) == 0
    assert set(json.loads(capsys.readouterr().out)["tiny"]["methods"]) == set(
        presets.names("method")
    ) - {"given"}


# --- processes ------------------------------------------------------------------------------------


def python(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
    )


def test_torch_is_not_imported() -> None:
    """Help, configurations and mistakes answer at once."""
    code = """
import sys
from gain_cl import cli
for argv in (["run", "--help"], ["run", "--cfg", "job"], ["run", "train.lrr=1"], ["run", "tasks=boolq", "tasks.names=[x]"], ["--help"]):
    cli.main(argv)
heavy = {"torch", "transformers", "peft", "datasets", "lm_eval", "wandb"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "gain_cl", "run", "train.lrr=1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert (
        done.stderr
        == "gain_cl: error: unknown key train.lrr (command line); did you mean train.lr?\n"
    )
    assert time.monotonic() - begun < 5 * (1 + os.getloadavg()[0] / (os.cpu_count() or 1)), (
        "5 s on an idle machine"
    )
    assert not list(tmp_path.iterdir())


# --- whole runs -----------------------------------------------------------------------------------

PLUGIN = """
from gain_cl import adapters, guards
from gain_cl.adapters.gain import GainAdapter
from gain_cl.guards.base import Guard

class Louder(GainAdapter):
    def __init__(self, roles, factor, side="input"):
        super().__init__(roles, side)
        self.factor = factor

class Watch(Guard):
    def __init__(self, every=1):
        self.every = every

adapters.register("louder", Louder)
guards.register("watch", Watch)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """--plugin and --config-dir of an adapter, a guard and a method of the user's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plug.py").write_text(PLUGIN)
    for group in ("method", "adapter", "guard"):
        (tmp_path / "my" / group).mkdir(parents=True)
    (tmp_path / "my/adapter/louder.yaml").write_text("kind: louder\nroles: [attn_out]\nfactor: 2\n")
    (tmp_path / "my/guard/watch.yaml").write_text("kind: watch\n")
    (tmp_path / "my/method/louder.yaml").write_text(
        "# @package _global_\ndefaults: [/adapter: louder, /guard: watch, _self_]\nmethod: "
        "louder\ntrain: {lr: 1e-3}\n"
    )
    return ["--plugin", "plug.py", "--config-dir", "my", "method=louder"]


def test_plugin_keywords(plugin: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "; it takes: roles, factor, side" in refused(
        capsys, "run", *plugin, *SMALL, "++adapter.factr=3"
    )
    assert "missing a required argument: 'factor'" in refused(
        capsys, "run", *plugin, *SMALL, "~adapter.factor"
    )
    assert "unexpected keyword argument 'evry'" in refused(
        capsys, "run", *plugin, *SMALL, "++guard.evry=3"
    )
    Path("plug.py").write_text("import nothing_of_that_name")
    Path("other.py").write_text("import nothing_of_that_name")
    assert "the plugin fails: ModuleNotFoundError" in refused(
        capsys, "run", "--plugin", "other.py", *SMALL
    )


def test_multirun_of_whole_runs(
    plugin: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A multirun carries on after a failure and exits with its code; a finished run is printed
    again; show finds it."""
    words = ["debug=smoke", "train.steps=2", "eval.documents=2", *plugin]
    broken = "domains.smoke_b.source.documents=1"  # fewer test documents than are to be scored
    assert (
        cli.main(
            [
                "run",
                "-m",
                *words,
                "domain=[smoke_a],[smoke_b]",
                "sequence.controls=[smoke_c]",
                "++domains.smoke_c.split.test=0.2",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out.splitlines()
    records = [Path(line.removeprefix("record: ")) for line in out if line.startswith("record: ")]
    assert (
        len(records) == 2
        and all(r.is_file() for r in records)
        and out[-1] == f"record: {records[1]}"
    )

    assert (
        cli.main(
            [
                "run",
                *words,
                "domain=[smoke_a]",
                "sequence.controls=[smoke_c]",
                "domains.smoke_c.split.test=0.2",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"record: {records[0]}"
    assert cli.main(["show", "--results-dir", "runs/debug", records[0].stem]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"record: {records[0]}"

    assert (
        cli.main(
            [
                "run",
                "-m",
                *words,
                "domain=[smoke_b],[smoke_b,smoke_a]",
                "sequence.controls=[]",
                broken,
            ]
        )
        == 65
    )
    assert "2 of 2 runs failed" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were started" in refused(capsys, "run", "-m", *words, "seed=0,1")


def test_from_python() -> None:
    import gain_cl

    assert callable(gain_cl.run) and callable(gain_cl.load) and callable(gain_cl.attach_gains)
    with pytest.raises(ConfigError, match="unknown model 'gpt3'"):
        gain_cl.run("model=gpt3")
    with pytest.raises(AttributeError):
        _ = gain_cl.nothing


def test_plugin_of_an_installed_package(tmp_path: Path) -> None:
    """An entry point of group gain_cl.plugins registers like a plugin file."""
    info = tmp_path / "myplug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: myplug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gain_cl.plugins]\nmyplug = myplug\n")
    (tmp_path / "myplug.py").write_text(PLUGIN)
    code = (
        "from gain_cl.compose.composition import compose; from gain_cl.runs import plan; c = "
        "compose(['debug=smoke', 'guard.kind=watch']); print(plan.prepare(c).pins['plugins'])"
    )
    done = python("-c", code, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "'adapter': None" in done.stdout and "'guard': '" in done.stdout
