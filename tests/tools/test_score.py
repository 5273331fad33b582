"""Checkpoints that were trained elsewhere are measured as a run's own stages are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gain_cl import api, cli
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import record
from gain_cl.tools.score import compose

THREE = "domain=[smoke_a,smoke_b,smoke_c]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("score")


@pytest.fixture(scope="module")
def made(folder: Path) -> record.Run:
    """A run whose stages are exported: adapters of the first and last, the whole model of the
    second."""
    run = api.run("debug=smoke", "method=lora", "train.lr=1e-2", THREE, *places(folder))
    for stage, to in ((1, "peft"), (2, "merged"), (3, "peft")):
        assert (
            cli.main(
                ["export", str(run.path), f"stage={stage}", f"to={to}", f"dir={folder}/{to}{stage}"]
            )
            == 0
        )
    return run


def places(folder: Path) -> list[str]:
    return [f"output_dir={folder}/runs", f"results_dir={folder}/results"]


def scored(folder: Path, *words: str) -> record.Run:
    before = set((folder / "results/runs").glob("given*.json")) | set(
        (folder / "results/runs").glob("*given*.json")
    )
    assert cli.main(["score", *words, "debug=smoke", *places(folder)]) == 0
    (path,) = set((folder / "results/runs").glob("*given*.json")) - before
    return record.load(path)


def test_adapters_and_whole_models_score_as_the_stages_they_are(
    folder: Path, made: record.Run
) -> None:
    run = scored(folder, f"{folder}/peft1", f"{folder}/merged2", f"{folder}/peft3", THREE)
    np.testing.assert_allclose(run.record.losses(), made.record.losses(), rtol=0, atol=2e-6)
    assert run.record.losses()[0].tolist() == made.record.losses()[0].tolist()
    assert np.abs(np.diff(run.record.losses(), axis=0)).min() > 1e-4
    assert [s.train for s in run.record.stages] == [
        None
    ] * 4 and run.record.trainable_parameters == 0
    assert cli.main(["verify", str(run.path)]) == 0
    assert cli.main(["show", str(run.path)]) == 0


def test_the_id_is_of_the_content_not_of_the_path(
    folder: Path, made: record.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from gain_cl.runs import plan

    if not (folder / "elsewhere").exists():
        shutil.copytree(folder / "peft1", folder / "elsewhere")
    one, two, other = (
        plan.prepare(
            compose([str(folder / f), "debug=smoke", "domain=[smoke_a]", *places(folder)])
        ).run_id
        for f in ("peft1", "elsewhere", "peft3")
    )
    assert one == two != other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no checkpoint is named"),
        (["PEFT1", "method=lora", "domain=[smoke_a]"], "nothing is trained"),
        (["PEFT1", THREE], "1 checkpoints for 3 domains"),
        (["nowhere", "domain=[smoke_a]"], "neither a folder nor ORG/NAME@COMMIT"),
        (["PEFT1", "guard=replay", "domain=[smoke_a]"], "take no guard"),
    ],
)
def test_mistakes(folder: Path, made: record.Run, words: list[str], message: str) -> None:
    from gain_cl.runs import plan

    words = [w.replace("PEFT1", str(folder / "peft1")) for w in words]
    with pytest.raises(ConfigError, match=message):
        plan.prepare(compose([*words, "debug=smoke", *places(folder)]))


def test_another_architecture_is_told(
    folder: Path, made: record.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(
        [
            "score",
            str(folder / "merged2"),
            "domain=[smoke_a]",
            "debug=smoke",
            "model.arch.num_hidden_layers=3",
            *places(folder),
        ]
    )
    assert code == 65
    assert "tensors differ in name or shape" in capsys.readouterr().err


def test_a_checkpoint_scores_the_same_whatever_was_scored_before(tmp_path: Path) -> None:
    """PEFT's unload leaves trained biases in the base: the next checkpoint must not see them."""
    import peft
    import torch

    from conftest import tiny
    from gain_cl.adapters.checkpoints import GivenAdapter

    for name, bias in (("a", "all"), ("b", "none")):
        model = peft.get_peft_model(
            tiny("gpt2").model,
            peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, bias=bias),
        )
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(tmp_path / name)

    def logits(*order: str) -> torch.Tensor:
        loaded = tiny("gpt2")
        adapter = GivenAdapter([str(tmp_path / n) for n in order])
        adapter.attach(loaded)
        for stage in range(1, len(order) + 1):
            adapter.take(stage)
        with torch.no_grad():
            return loaded.model(torch.arange(1, 9)[None]).logits

    assert torch.equal(logits("a", "b"), logits("b"))
    assert not torch.allclose(logits("b", "a"), logits("b"), atol=1e-2)


@pytest.mark.slow
def test_an_interrupted_score_goes_on_wherever_its_checkpoints_lie(
    folder: Path, made: record.Run, tmp_path: Path
) -> None:
    import os
    import subprocess
    import sys

    words = [
        f"{folder}/peft1",
        f"{folder}/peft3",
        "domain=[smoke_a,smoke_b]",
        "debug=smoke",
        "eval.documents=4",
        *places(tmp_path),
    ]
    env = {**os.environ, "GAIN_CL_FAILPOINT": "stage.after@2"}
    assert (
        subprocess.run(
            [sys.executable, "-m", "gain_cl", "score", *words], env=env, capture_output=True
        ).returncode
        == -9
    )
    words[0] = os.path.relpath(words[0])
    assert cli.main(["score", *words]) == 0


def _peft(folder: Path, config: Any, family: str = "llama", **keys: Any) -> Path:
    """An adapter that PEFT itself has made and saved, far from the identity."""
    import peft
    import torch

    from conftest import tiny

    model = peft.get_peft_model(tiny(family, **keys).model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def _take(folder: Path, **keys: Any) -> Any:
    from conftest import tiny
    from gain_cl.adapters.checkpoints import GivenAdapter

    loaded = tiny("llama", **keys)
    adapter = GivenAdapter([str(folder)])
    adapter.attach(loaded)
    adapter.take(1)
    return loaded


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_another_model_is_told(tmp_path: Path) -> None:
    """PEFT passes over the tensors that have no place, and leaves untouched what none is for."""
    import peft
    from safetensors.torch import load_file, save_file

    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])
    deep = _peft(tmp_path / "deep", lora, num_hidden_layers=3)
    _take(deep, num_hidden_layers=3)
    with pytest.raises(DataError, match=r"4 of its tensors have no place in it, first .*layers\.2"):
        _take(deep)
    with pytest.raises(DataError, match=r"missing adapter keys.*layers\.3"):
        _take(deep, num_hidden_layers=4)
    file = deep / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {n.removeprefix("base_model.model."): t for n, t in tensors.items()},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(DataError, match="it is not of this model"):
        _take(deep, num_hidden_layers=3)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_our_loss_would_not_see_is_refused(tmp_path: Path) -> None:
    """Trained vectors before the input act in PEFT's wrapper, a LoRA of the head beside its weight:
    the base would be scored."""
    import peft

    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ConfigError, match="vectors before the input"):
        _take(_peft(tmp_path / "prefix", prefix))
    head = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="changes the output head"):
        _take(_peft(tmp_path / "head", head))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beside", ["lm_head", "embed_tokens", "norm"])
def test_whole_layers_saved_with_an_adapter_count(tmp_path: Path, beside: str) -> None:
    """Our loss of the adapter equals cross entropy of PEFT's own model."""
    import peft
    import torch

    from conftest import tiny
    from gain_cl.models import forward

    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=[beside]
    )
    folder = _peft(tmp_path / "a", lora)
    tokens = np.arange(1, 25).reshape(2, 12)
    loaded, base = _take(folder), tiny("llama")
    with torch.no_grad():
        ours = forward.loss_sum(loaded, tokens).item()
        other = peft.PeftModel.from_pretrained(tiny("llama").model, folder)
        inputs = torch.cat(
            [torch.full((2, 1), loaded.prefix_id), torch.from_numpy(tokens[:, :-1])], dim=1
        )
        logits = other(input_ids=inputs).logits.flatten(0, 1)
        theirs = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(tokens.reshape(-1)), reduction="sum"
        ).item()
        assert (
            ours
            == pytest.approx(theirs, rel=1e-6)
            != pytest.approx(forward.loss_sum(base, tokens).item(), rel=1e-4)
        )


def test_a_whole_model_and_an_adapter_of_the_hub_are_scored(tmp_path: Path) -> None:
    """A repository without adapter files is a model; one with them is an adapter, whatever its
    other files."""
    import subprocess
    import sys

    import peft

    from conftest import tiny
    from fake_hub import SHA, serve

    loaded = tiny("llama")
    for name in ("base", "hub/models/org/whole"):
        loaded.model.save_pretrained(tmp_path / name)
        loaded.tokenizer.save_pretrained(tmp_path / name)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    _peft(tmp_path / "hub/models/org/adapter", lora)
    code = (
        "from conftest import tiny; from gain_cl.adapters.checkpoints import GivenAdapter\n"
        "import torch; loaded = tiny('llama'); ids = torch.arange(8)[None]\n"
        f"adapter = GivenAdapter(['org/whole@{SHA}', 'org/adapter@{SHA}']); adapter.attach(loaded)\n"
        "with torch.no_grad():\n"
        "  base = loaded.model(ids).logits; adapter.take(1); whole = loaded.model(ids).logits\n"
        "  adapter.take(2); print(torch.equal(base, whole), torch.equal(base, loaded.model(ids).logits))"
    )
    with serve(tmp_path / "hub") as (address, log):
        env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf")}
        env |= {"GAIN_CL_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        env |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
        )
    assert done.stdout.split() == ["True", "False"], done.stderr
    assert not any("adapter_model" in line for line in log if "org/whole" in line)
