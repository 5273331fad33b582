"""Contracts of configs/: every preset composes and says what it is. A new YAML needs no edit
here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from gain_cl.compose import composition
from gain_cl.config import presets, schema

ROOT = presets.configs_dir()
LIGHT = ["sequence=smoke", "tasks=none"]
RUN: dict[str, Any] = yaml.safe_load((ROOT / "run.yaml").read_text())


def read(group: str, name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / group / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", [n for n in presets.names("model") if n != "custom"])
def test_model(name: str) -> None:
    model = composition.compose([f"model={name}", *LIGHT]).model
    assert model.name == name or "defaults" in read("model", name), (
        "a model is called what its file is called"
    )
    assert model.arch is not None and model.arch["model_type"], (
        "the architecture is known without a network"
    )
    assert (
        model.prefix_token_id is not None
        or model.arch.get("bos_token_id", model.arch.get("eos_token_id")) is not None
    )
    if model.path is not None:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.path) and schema.SHA1.match(
            model.revision or ""
        )
    elif model.package is not None:
        assert model.package.sha256 and "==" in model.package.package


def test_qwen_is_the_seven_billion_one() -> None:
    assert (
        composition.compose(["model=qwen2.5", *LIGHT]).model
        == composition.compose(["model=qwen2.5_7b", *LIGHT]).model
    )


@pytest.mark.parametrize("name", presets.names("method"))
def test_method(name: str) -> None:
    more = ["domain=[law]", "adapter.checkpoints=[x]"] if name == "given" else []
    run = composition.compose([f"method={name}", *LIGHT, *more])
    assert run.method == name
    assert run.lr_tuned_on in [None, *presets.names("model")], (
        "says on which model its learning rate was chosen, if on any"
    )
    row = read("method", name)
    assert set(row) <= {
        "defaults",
        "method",
        "adapter",
        "guard",
        "train",
        "lr_tuned_on",
        "handover",
        "regime",
    }, "a method is a row of a table, no more"
    assert set(row["train"]) == {"lr"}


@pytest.mark.parametrize("name", presets.names("sequence"))
def test_sequence(name: str) -> None:
    run = composition.compose([f"sequence={name}", "tasks=none"])
    assert run.sequence.name == name
    assert list(run.domains) == run.sequence.domains + run.sequence.controls
    for domain, settings in run.domains.items():
        assert settings.name == domain


@pytest.mark.parametrize("name", presets.names("domain"))
def test_domain(name: str) -> None:
    domain = schema.Domain.model_validate({"name": name, **read("domain", name)})
    assert domain.name == name
    if domain.source.kind != "generated":
        assert domain.licence != "unknown", "the licence of the text is named"


@pytest.mark.parametrize("group", ["tasks", "track", "compute", "debug", "guard"])
def test_small_groups(group: str) -> None:
    for name in presets.names(group):
        if name == "orthogonal":
            continue  # goes with LoRA and handover=restart alone: method=o_lora
        others = [o for o in LIGHT if not o.startswith(group)]
        overrides = [f"{group}={name}", *(others if group != "debug" else [])]
        if read(group, name).get("device") == "cuda":
            overrides.append("compute.device=cpu")
        assert composition.compose(overrides)


def test_every_setting_stands_in_run_yaml() -> None:
    """A setting that changes a result has no hidden default."""
    filled_by_presets = {"method", "adapter", "guard", "sequence", "domains"}
    for key in schema.known_keys():
        section, _, rest = key.partition(".")
        if section in filled_by_presets or key in ("model.name", "model.dtype") or rest.count("."):
            continue
        node: Any = RUN
        for part in key.split("."):
            assert isinstance(node, dict) and part in node, f"run.yaml lacks {key}"
            node = node[part]


def test_every_key_of_run_yaml_is_explained() -> None:
    text = (ROOT / "run.yaml").read_text().split("\nhydra:")[0]
    body = text[text.index("\nmodel:") :]
    for line in body.splitlines():
        if re.match(r" *\w+: *[^ #]", line) and not re.match(
            r"  (project|job_type|tags|entity):", line
        ):
            assert "#" in line, f"no comment: {line.strip()}"


def test_presets_compose_in_any_order() -> None:
    run = composition.compose(["method=lora", "debug=smoke"])
    assert run == composition.compose(["debug=smoke", "method=lora"])
    assert (run.method, run.model.name, run.sequence.name, run.tasks.names) == (
        "lora",
        "tiny",
        "smoke",
        [],
    )
    assert (
        composition.compose(["debug=smoke", "model=gpt2", "train.steps=9"]).model.name == "gpt2"
    ), "the command line has the last word"


SHARED = [
    ["method=lora", "++train.lr=1e-3", "++seed=1", "++tasks.names=[boolq]"],
    ["method=lora", "train.lr=1e-4", "seed=0", "sequence.order=[1,0,2]", "sequence=smoke"],
    ["~train.lr", "method=lora", "++adapter.config.use_dora=true", "~adapter.config.bias"],
    [
        "method=lora",
        "adapter.config={r: 3}",
        "+model.roles={attn_out: x}",
        "output_dir=${oc.env:HOME}",
        "lr_tuned_on=null",
    ],
    [
        "debug=smoke",
        "method=ewc",
        "++guard.strength=2",
        "+domain@domains.law=law",
        "++domains.law.split.test=0.3",
        "hydra.verbose=true",
    ],
]


def test_runs_of_the_same_presets_compose_as_hydra_does() -> None:
    """A session puts values into presets that it has composed already: the result is that of Hydra
    from the start."""
    import hydra
    from omegaconf import OmegaConf

    with composition.session() as load:
        for words in SHARED * 2:
            assert load(words) == OmegaConf.to_container(
                hydra.compose("run", overrides=words), resolve=True
            ), words
        with pytest.raises(Exception, match=r"Could not override 'train\.lrr'"):
            load(["method=lora", "train.lrr=1"])
    with composition.composer() as compose:
        both = [compose(["debug=smoke", f"train.lr={lr}", "~track.tags"]) for lr in (1e-3, 1e-2)]
    assert [c.train.lr for c in both] == [1e-3, 1e-2]
    assert both[0] == composition.compose(["debug=smoke", "train.lr=1e-3", "~track.tags"])


PAPER = {  # shared/paper.md: W_O inputs; W_O and W_down inputs. Totals: shared/stack.md
    "gpt2_large": (774_030_080, 46_080, 230_400),
    "mistral": (7_241_732_096, 131_072, 589_824),
    "qwen2.5_7b": (7_615_616_512, 100_352, 630_784),
    "llama2_13b": (13_015_864_320, 204_800, 757_760),
    "llama2_70b": (68_976_648_192, 655_360, 2_949_120),
}


def test_parameter_counts_of_the_paper() -> None:
    from gain_cl.tools import params

    table = params.count(",".join(PAPER), "gain_attn,gain_ffn")
    assert {m: (row["total"], *row["methods"].values()) for m, row in table.items()} == PAPER


def test_parameter_counts_of_the_output_side(tmp_path: Path) -> None:
    """The other reading of S W: paper.md's middle column."""
    from gain_cl.tools import params

    (tmp_path / "method").mkdir()
    text = (ROOT / "method" / "gain_ffn.yaml").read_text()
    text = text.replace(
        "method: gain_ffn\nadapter:\n", "method: gain_out\nadapter:\n  side: output\n"
    )
    (tmp_path / "method" / "gain_out.yaml").write_text(text)
    table = params.count(",".join(PAPER), "gain_out", [tmp_path])
    assert [row["methods"]["gain_out"] for row in table.values()] == [
        92_160,
        262_144,
        200_704,
        409_600,
        1_310_720,
    ]


@pytest.mark.parametrize("name", ["gpt2", "smollm2"])
def test_layers_that_are_alike_are_counted_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two layers say of a whole model is what counting all of them gives."""
    from gain_cl.tools import params

    words = name, "gain_random_basis,full,ln_only,lora_same_modules,vera,ia3"
    short = params.count(*words)
    monkeypatch.setattr(params, "DEPTH", ())
    assert params.count(*words) == short


def test_user_presets_of_every_kind(tmp_path: Path) -> None:
    """--config-dir: a model and a domain of the user's own, in a folder with a hard name."""
    folder = tmp_path / "it's a, [folder]"
    for group in ("model", "domain"):
        (folder / group).mkdir(parents=True)
    (folder / "model" / "mine-3.1.yaml").write_text("defaults: [tiny, _self_]\nname: mine-3.1\n")
    (folder / "domain" / "notes.yaml").write_text("source: {kind: files, path: notes.txt}\n")
    run = composition.compose(
        ["model=mine-3.1", "domain=notes", "tasks=none", "eval.context=64"], [folder]
    )
    assert run.model.name == "mine-3.1"
    assert run.sequence.domains == ["notes"] and run.domains["notes"].source.kind == "files"
    assert run.domains["notes"].name == "notes", "the name is the file's when the YAML gives none"


def test_wheel_carries_the_presets(tmp_path: Path) -> None:
    """An installed package finds its presets, from any folder."""
    wheel = pytest.importorskip("hatchling.builders.wheel")
    [path] = wheel.WheelBuilder(str(ROOT.parent)).build(
        directory=str(tmp_path), versions=["standard"]
    )
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "site")
    installed = tmp_path / "site" / "gain_cl" / "configs"
    for kind in ("*.yaml", "*.safetensors"):
        assert {p.relative_to(ROOT) for p in ROOT.rglob(kind)} == {
            p.relative_to(installed) for p in installed.rglob(kind)
        }
    assert (installed.parent / "experiments/pilot.yaml").is_file()
    code = (
        "import gain_cl, sys; from gain_cl import cli; from gain_cl.config import presets; "
        "print(presets.configs_dir()); sys.exit(cli.main(['run', '--cfg', 'job']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(installed)
