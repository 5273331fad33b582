"""Portable artefacts: what is exported is loaded by PEFT, transformers and lm-eval in an
environment without gain_cl."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gain_cl
from conftest import HELPERS, tiny
from gain_cl import adapters, cli
from gain_cl.adapters import portable
from gain_cl.compose import composition, rules
from gain_cl.config import schema
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import record, scoring
from gain_cl.models import families, load
from gain_cl.runs import plan as plan_
from gain_cl.runs import run
from gain_cl.tools import export
from gain_cl.tools.reopen import Reopened

SMALL = ["debug=smoke", "compute.threads=1", "train.steps=2", "eval.documents=2"]

GAIN = {"kind": "gain", "roles": ["attn_out", "ffn_down"]}
LORA = {"kind": "peft", "peft_type": "LORA"}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
}


def settings(method: str, family: str = "llama") -> Any:
    """config.Gain and its kin, as the method's preset has it on a family."""
    rest = {"target_modules": TARGETS[family]}
    told: dict[str, Any] = {
        "gain_attn": {"kind": "gain", "roles": ["attn_out"]},
        "gain_ffn": GAIN,
        "gain_ffn_output": {**GAIN, "side": "output"},
        "multiplicative_lora": {
            "kind": "multiplicative_lora",
            "roles": ["attn_out", "ffn_down"],
            "rank": 4,
            "alpha": 8,
        },
        "lora": {**LORA, "config": {"r": 4, "lora_alpha": 8, **rest}},
        "rslora": {**LORA, "config": {"r": 4, "lora_alpha": 8, "use_rslora": True, **rest}},
        "dora": {**LORA, "config": {"r": 4, "lora_alpha": 8, "use_dora": True, **rest}},
        "ia3": {
            "kind": "peft",
            "peft_type": "IA3",
            "config": {**rest, "feedforward_modules": TARGETS[family][-1:]},
        },
        "hira": {"kind": "peft", "peft_type": "HIRA", "config": {"r": 4, **rest}},
        "vera": {"kind": "peft", "peft_type": "VERA", "config": {"r": 8, **rest}},
        "full": {"kind": "full"},
        "ln_only": {"kind": "full", "select": "norms"},
        "gain_random_basis": {**GAIN, "basis": "random"},
    }[method]
    kinds = {
        "gain": schema.Gain,
        "multiplicative_lora": schema.MultiplicativeLora,
        "peft": schema.Peft,
        "full": schema.Full,
    }
    return kinds[told["kind"]](**told)


def trained(method: str, family: str, restarts: int = 0, dtype: str = "float32") -> tuple[Any, Any]:
    """(loaded, adapter) with a state far from the identity."""
    loaded = tiny(family, dtype)
    adapter = adapters.build_adapter(settings(method, family))
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    adapter.attach(loaded)
    for turn in range(restarts + 1):
        if turn:
            adapter.restart()
        with torch.no_grad():
            for p in adapter.parameters().values():
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return loaded, adapter


IDS = (7 * torch.arange(48)[None] + 3) % 257


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


def put(adapter: Any, loaded: Any, folder: Path) -> Path:
    folder.mkdir()
    for name, data in portable.adapter_files(adapter, loaded, "base", None).items():
        (folder / name).write_bytes(data)
    return folder


def save_base(family: str, folder: Path) -> Path:
    loaded = tiny(family)
    loaded.model.config.use_cache = True
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAIN_CL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with this one's packages, but gain_cl: a .pth inside an added
    path is not read."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin/python"


def outside(python: Path, script: str, *args: object, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GAIN_CL_CACHE")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "hf")}
    done = subprocess.run(
        [str(python), "-c", script, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=540,
        env=env,
        cwd=cwd,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


METHODS = [
    "gain_attn",
    "gain_ffn",
    "gain_ffn_output",
    "lora",
    "dora",
    "ia3",
    "hira",
    "vera",
]

VANILLA = """
import importlib.util, json, sys
where = importlib.util.find_spec("gain_cl")  # its presets lie among the packages, a folder without code
assert where is None or importlib.util.find_spec("gain_cl.api") is None, "not a clean environment"
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = (7 * torch.arange(48)[None] + 3) % 257
out = {}
for base, adapter, merged in json.loads(sys.argv[1]):
    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        found = [model(ids).logits, model.merge_and_unload()(ids).logits]
        if merged:
            found.append(AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()(ids).logits)
    out[adapter] = torch.cat(found)
from safetensors.torch import save_file
save_file(out, sys.argv[2])
"""


PAIRS = [(family, method) for family in TARGETS for method in METHODS]


@pytest.mark.slow
def test_vanilla_libraries_without_gain_cl(clean: Path, tmp_path: Path) -> None:
    """PeftModel.from_pretrained, merge_and_unload, and the merged folder in transformers: the
    logits of gain_cl's model."""
    jobs, ours = [], {}
    bases = {family: save_base(family, tmp_path / family) for family in TARGETS}
    for family, method in PAIRS:
        loaded, adapter = trained(method, family)
        folder = put(adapter, loaded, tmp_path / f"{family}-{method}")
        ours[str(folder)] = logits(loaded.model)
        adapter.absorb()
        loaded.model.save_pretrained(tmp_path / f"{family}-{method}-merged")
        jobs.append([str(bases[family]), str(folder), str(tmp_path / f"{family}-{method}-merged")])
    outside(clean, VANILLA, json.dumps(jobs), tmp_path / "out.safetensors", cwd=tmp_path)
    found = load_file(tmp_path / "out.safetensors")
    assert len(found) == len(PAIRS)
    for base, folder, _ in jobs:
        theirs, unmerged = found[folder], ours[folder]
        moved = (logits(tiny(Path(base).name).model) - unmerged).abs().max()
        assert moved > 1e-3, folder  # the adapter does something
        assert torch.equal(theirs[0], unmerged[0]), folder
        torch.testing.assert_close(theirs, unmerged.expand_as(theirs), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["gain_ffn", "gain_ffn_output"])
def test_after_handover_restart(method: str, family: str, tmp_path: Path) -> None:
    """Three stages, each on top of the frozen ones before: one adapter with the same function."""
    from peft import PeftModel

    loaded, adapter = trained(method, family, restarts=2)
    folder = put(adapter, loaded, tmp_path / "adapter")
    theirs = logits(PeftModel.from_pretrained(tiny(family).model, folder))
    torch.testing.assert_close(theirs, logits(loaded.model), rtol=1e-5, atol=2e-6)
    assert (
        logits(trained(method, family)[0].model) - theirs
    ).abs().max() > 1e-3  # one stage alone is something else


def test_gains_on_a_bf16_base_are_bit_equal(tmp_path: Path) -> None:
    """A gain on a bf16 model acts in fp32 and is rounded once: PEFT's IA3 does the same, bit for
    bit."""
    from peft import PeftModel

    for method in ("gain_ffn", "gain_ffn_output"):
        loaded, adapter = trained(method, "llama", dtype="bfloat16")
        folder = put(adapter, loaded, tmp_path / method)
        assert torch.equal(
            logits(PeftModel.from_pretrained(tiny("llama", "bfloat16").model, folder)),
            logits(loaded.model),
        )


NO_FORM = ["full", "ln_only", "gain_random_basis", "multiplicative_lora"]


@pytest.mark.parametrize(("method", "restarts"), [*[(m, 0) for m in NO_FORM], ("lora", 1)])
def test_no_form_in_peft(method: str, restarts: int) -> None:
    loaded, adapter = trained(method, "llama", restarts)
    with pytest.raises(ConfigError, match="to=merged works"):
        portable.adapter_files(adapter, loaded, "base", None)


@pytest.mark.slow
def test_the_same_bytes_again() -> None:
    loaded, adapter = trained("ia3", "llama")
    script = (
        "import os, sys; sys.path[:0] = sys.argv[1].split(os.pathsep); import test_export as "
        "t; l, a = t.trained('ia3', 'llama');"
    )
    script += (
        "import hashlib; print([hashlib.sha256(d).hexdigest() for d in t.portable.adapter_files(a, "
        "l, 'base', None).values()])"
    )
    import hashlib

    ours = [
        hashlib.sha256(d).hexdigest()
        for d in portable.adapter_files(adapter, loaded, "base", None).values()
    ]
    env = {**os.environ, "PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, HELPERS], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.strip() == str(ours)


# --- lm-eval's command line -----------------------------------------------------------------------

TASK = """\
task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""

LM_EVALS = [("llama", "gain_ffn"), ("gpt2", "gain_ffn_output")]
"""Few: at each start lm-eval reads 14,000 tasks."""

LM_EVAL = """
import importlib.util, json, sys
where = importlib.util.find_spec("gain_cl")
assert where is None or importlib.util.find_spec("gain_cl.api") is None, "not a clean environment"
import torch
torch.set_num_threads(1)
from lm_eval.__main__ import cli_evaluate
for model, out in json.loads(sys.argv[1]):
    sys.argv = ["lm_eval", "--model", "hf", "--model_args", model, "--tasks", "animals", "--include_path", "tasks"]
    sys.argv += ["--device", "cpu", "--batch_size", "4", "--log_samples", "--output_path", out]
    cli_evaluate()
"""


@pytest.mark.slow
def test_lm_evals_command_line(clean: Path, tmp_path: Path) -> None:
    """`lm_eval --model hf --model_args pretrained=BASE,peft=DIR`, and with the merged folder:
    gain_cl's own scores, item by item."""
    from gain_cl.measure import tasks

    rows = [
        {"text": f"The {a} said {i}:", "choices": [" yes", " no", f" {a}"], "label": i % 3}
        for i, a in enumerate(["cat", "dog", "heron", "toad"] * 3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/animals.yaml").write_text(TASK.replace("DATA", str(tmp_path / "rows.jsonl")))
    jobs, ours = [], {}
    for family, method in LM_EVALS:
        base = save_base(family, tmp_path / family)
        loaded, adapter = trained(method, family)
        name = f"{family}-{method}"
        folder = put(adapter, loaded, tmp_path / name)
        asked = schema.Tasks(names=["animals"], include_path=str(tmp_path / "tasks"))
        found = tasks.TaskSet(asked, loaded.tokenizer)
        scored = found.score(loaded, "animals")[1]
        by_row = {item.row: i for i, item in enumerate(found.items["animals"])}
        ours[name] = np.array([scored.logprobs[by_row[row]] for row in range(len(rows))])
        adapter.absorb()
        loaded.model.save_pretrained(tmp_path / f"{name}-merged")
        loaded.tokenizer.save_pretrained(tmp_path / f"{name}-merged")
        long = "dtype=float32,softmax_dtype=float32"
        jobs.append([f"pretrained={base},peft={folder},{long}", f"out/{name}/peft"])
        jobs.append([f"pretrained={tmp_path / name}-merged,{long}", f"out/{name}/merged"])
    outside(clean, LM_EVAL, json.dumps(jobs), cwd=tmp_path)
    for name, expected in ours.items():
        for kind in ("peft", "merged"):
            (samples,) = (tmp_path / "out" / name / kind).rglob("samples_animals*.jsonl")
            lines = sorted(
                map(json.loads, samples.read_text().splitlines()), key=lambda s: s["doc_id"]
            )
            theirs = np.array([[float(r[0]) for r in line["filtered_resps"]] for line in lines])
            np.testing.assert_allclose(
                theirs, expected, rtol=0, atol=1e-5, err_msg=f"{name} {kind}"
            )


# --- the verb -------------------------------------------------------------------------------------


SHORT = ["train.block=32", "train.batch_tokens=64", "eval.context=64"]


def go(folder: Path, *overrides: str) -> record.Run:
    return gain_cl.run(
        *SMALL, f"output_dir={folder}/runs", f"results_dir={folder}/results", *overrides
    )


def with_record(made: record.Run, **update: Any) -> record.Run:
    """A run whose record says something else."""
    told = made.record.model_copy(update=update)
    return record.Run(told, made.documents, made.items, made.path)


def write(made: record.Run, *words: object) -> int:
    return cli.main(
        [
            "export",
            str(made.path),
            *map(str, words),
            "--output-dir",
            str(made.path.parents[2] / "runs"),
        ]
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, _cache: Any) -> record.Run:
    folder = tmp_path_factory.mktemp("first")
    return go(
        folder,
        f"model.path={save_base('llama', folder / 'tiny-llama')}",
        "train.block=32",
        "train.batch_tokens=64",
        "eval.context=64",
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gain_ffn", "lora"])
def test_what_the_verb_writes_is_what_the_run_scored(
    method: str, clean: Path, tmp_path: Path
) -> None:
    """From the command line to libraries without gain_cl: the loss of the run's own scored
    documents, and both forms alike."""
    base = save_base("gpt2", tmp_path / "tiny-gpt2")
    made = go(
        tmp_path,
        f"model.path={base}",
        *SHORT,
        f"method={method}",
        "train.lr=3e-2",
        "domain=[smoke_a,smoke_b]",
    )
    for to in ("peft", "merged"):
        assert write(made, f"to={to}", f"dir={tmp_path / to}") == 0
    job = [str(base), str(tmp_path / "peft"), str(tmp_path / "merged")]
    outside(clean, VANILLA, json.dumps([job]), tmp_path / "out.safetensors", cwd=tmp_path)
    theirs = load_file(tmp_path / "out.safetensors")[job[1]]
    torch.testing.assert_close(theirs, theirs[:1].expand_as(theirs), rtol=1e-5, atol=2e-6)
    loaded = load.load_model(
        schema.RunConfig.model_validate(made.record.config).model, torch.device("cpu")
    )
    assert (logits(loaded.model) - theirs[0]).abs().max() > 1e-3
    from transformers import AutoModelForCausalLM

    loaded.model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(loaded.model)[0], theirs[2], rtol=0, atol=1e-7)
    assert _loss(made, loaded) == pytest.approx(
        made.record.stages[-1].domains["smoke_a"].nll_nats, rel=1e-5
    )


def _loss(made: record.Run, loaded: Any) -> float:
    """nats, of smoke_a as the run scores it."""
    from gain_cl import domains
    from gain_cl.measure import perplexity

    settings = schema.RunConfig.model_validate(made.record.config)
    domain = domains.prepare_domain(
        settings.domains["smoke_a"], loaded.tokenizer, loaded.tokenizer_hash
    )
    return perplexity.total(scoring.score_domain(loaded, domain, settings.eval, 16)).nll_nats


@pytest.mark.parametrize("method", ["gain_ffn", "lora", "full"])
def test_merged_is_the_model_that_was_scored(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain transformers load of the exported folder scores the last stage as the run did."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = go(tmp_path, f"method={method}")
    assert write(made, "to=merged", f"dir={tmp_path / 'merged'}") == 0
    printed = capsys.readouterr().out
    assert float(
        re.findall(r"merge error in float32: (\S+) nats per token, on 384 tokens", printed)[0]
    ) == pytest.approx(0, abs=1e-6)
    rounded = float(re.findall(r"merge error in bfloat16: (\S+) nats", printed)[0])
    assert (rounded == 0) == (method == "full")  # its weights are rounded either way
    loaded = load.load_model(
        composition.compose([*SMALL, f"method={method}"], [], []).model, torch.device("cpu")
    )
    loaded.model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
        == loaded.tokenizer.get_vocab()
    )
    assert _loss(made, loaded) == pytest.approx(
        made.record.stages[-1].domains["smoke_a"].nll_nats, rel=1e-5
    )


PLUGIN = """
import torch
from torch import nn
from gain_cl import adapters, models
from gain_cl.adapters.base import Adapter

class Shift(Adapter):
    def __init__(self, fold: bool) -> None:
        self.fold = fold
    def attach(self, loaded) -> None:
        self.layers = models.targets(loaded.model, ["attn_out"], loaded.roles)
        self.shifts = {n: nn.Parameter(torch.zeros(models.output_width(m))) for n, m in self.layers.items()}
        self.hooks = [m.register_forward_hook(lambda _, x, out, n=n: out + self.shifts[n]) for n, m in self.layers.items()]
    def parameters(self):
        return self.shifts
    def absorb(self) -> None:
        for name, layer in self.layers.items():
            if self.fold:
                layer.bias = nn.Parameter(self.shifts[name].detach().clone(), requires_grad=False)
        for hook in self.hooks:
            hook.remove()

adapters.register("shift", Shift)
"""


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (
            "true",
            "self_attn.o_proj.bias is not a parameter of both the folded model and a "
            "LlamaForCausalLM",
        ),
        ("false", "what it does is no change of the weights"),
    ],
)
def test_a_checkpoint_that_would_be_another_model_is_not_written(
    fold: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers builds the model from its configuration, without the bias; and an absorb may
    forget what was learned."""
    (tmp_path / "shift.py").write_text(PLUGIN)
    words = [
        "++adapter.kind=shift",
        f"++adapter.fold={fold}",
        "~adapter.select",
        "train.lr=1",
        "domain=[smoke_a]",
        "method=full",
    ]
    places = [
        f"output_dir={tmp_path}/runs",
        f"results_dir={tmp_path}/results",
        "--plugin",
        f"{tmp_path}/shift.py",
    ]
    assert cli.main(["run", *SMALL, *words, *places]) == 0, capsys.readouterr().err
    path = capsys.readouterr().out.splitlines()[-1].removeprefix("record: ")
    assert cli.main(["export", path, "to=merged", f"dir={tmp_path}/merged"]) in (64, 65)
    assert message in capsys.readouterr().err and not (tmp_path / "merged").exists()


def test_merged_is_rounded_once(
    first: record.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dtype in ("float32", "bfloat16"):
        assert (
            write(first, "to=merged", "stage=2", f"dtype={dtype}", f"dir={tmp_path / dtype}") == 0
        )
    full, half = (
        load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16")
    )
    assert (
        all(torch.equal(half[n], t.bfloat16()) for n, t in full.items())
        and full.keys() == half.keys()
    )
    assert json.loads((tmp_path / "bfloat16/config.json").read_bytes())["dtype"] == "bfloat16"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_the_card_says_what_it_is(
    first: record.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write(first, "to=peft", "stage=2", f"dir={tmp_path / 'a'}") == 0
    card = (tmp_path / "a/README.md").read_text()
    plain = card.replace("\\", "")
    stage = first.record.stages[2]
    for fact in (
        "after smoke_a, smoke_b",
        "stage 2 of 3",
        first.record.run_id,
        first.record.protocol,
        first.record.pins["model"]["folder"],
        f"| smoke_c | {first.record.stages[0].domains['smoke_c'].perplexity:.4g} | "
        f"{stage.domains['smoke_c'].perplexity:.4g} |",
        f"{first.record.trainable_parameters:,} of",
    ):
        assert fact in plain, fact
    for row in re.findall(r"\| (?:float32|bfloat16|float16) \| (\S+) \| (\S+) \| (\S+) \|", card):
        assert float(row[1]) - float(row[0]) == pytest.approx(float(row[2]), abs=2e-6)
    assert len(re.findall(r"\| (?:float32|bfloat16|float16) \| \d", card)) >= 2
    for name in ("README.md", portable.CONFIG):
        assert (
            str(Path.home()) not in (text := (tmp_path / "a" / name).read_text())
            and "/tmp" not in text
        )


def test_text_of_a_record_commands_no_markdown(first: record.Run) -> None:
    hostile = "[x](http://evil) <script> | `a` \n# head **b**"
    told = {"tainted": [hostile], "provenance": {**first.record.provenance, "commit": hostile}}
    made = export.Exported(Path("x"), None, [])
    card = export.card(Reopened(with_record(first, **told)), 1, "peft float32", made)
    assert "<script>" not in card and "](" not in card and "\n# head" not in card
    assert r"\[x\]\(http://evil\) \<script\> \|" in card


def test_refusals(first: record.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("")
    for words, code, said in (
        (["to=merged", "stage=9"], 64, "stage '9' is not among 1..3"),
        (["to=merged", f"dir={tmp_path / 'taken'}"], 64, "the folder is not empty"),
        (["to=gguf"], 64, "argument --to: invalid choice: 'gguf'"),
        ([], 64, "the following arguments are required: --to"),
        (["to=peft", "dtyp=float16"], 64, "did you mean dtype?"),
        (["to=peft", "dtype=float16"], 64, "an adapter is fp32"),
        (["to=peft", "stage=x"], 64, "stage 'x' is not among 1..3"),
    ):
        assert write(first, *words) == code
        error = capsys.readouterr().err
        assert error.startswith("gain_cl: error: ") and error.count("\n") == 1 and said in error, (
            error
        )
    assert (
        cli.main(
            [
                "export",
                str(first.path),
                "to=peft",
                f"dir={tmp_path / 'x'}",
                "--output-dir",
                str(tmp_path),
            ]
        )
        == 65
    )
    assert "the trained state of this stage is not there" in capsys.readouterr().err


def test_a_changed_state_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = go(tmp_path, "sequence.domains=[smoke_a]")
    (state,) = (tmp_path / "runs").glob("*/stages/01-*/adapter.safetensors")
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    assert write(made, "to=peft", f"dir={tmp_path / 'x'}") == 65
    assert "SHA-256" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("method", "what"),
    [("full", "adapter full"), ("gain_random_basis", "random basis"), ("ln_only", "select=norms")],
)
def test_methods_without_a_peft_form(
    method: str, what: str, first: record.Run, tmp_path: Path
) -> None:
    adapter = {"adapter": settings(method).model_dump(mode="json")}
    made = with_record(first, config={**first.record.config, **adapter})
    with pytest.raises(ConfigError, match=rf"{what}.*to=merged works"):
        export.export(made, "peft", tmp_path / "x", output_dir=str(first.path.parents[2] / "runs"))


def test_earlier_stage_of_full_is_gone_and_said(tmp_path: Path) -> None:
    made = go(tmp_path, "method=full")
    with pytest.raises(DataError, match="was not kept"):
        export.export(made, "merged", tmp_path / "x", 1)


def model_of(family: str) -> schema.Model:
    return schema.Model(name=family, arch={"model_type": family}, dtype="float32")


# --- begin from an adapter ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(first: record.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    assert write(first, "to=peft", "stage=2", f"dir={folder}") == 0
    return folder


def again(made: record.Run, *words: str) -> schema.RunConfig:
    base = made.record.config["model"]["path"]
    return composition.compose([*SMALL, f"model.path={base}", *SHORT, *words], [], [])


def test_round_trip(first: record.Run, saved: Path) -> None:
    """What begins from the export of stage 2 computes what stage 2 computed, bit for bit."""
    settings = again(first, f"adapter.init_from={saved}")
    state = load_file(
        next((first.path.parents[2] / "runs").glob("*/stages/02-*/adapter.safetensors"))
    )
    found = []
    for of in (settings.adapter, schema.Gain(**GAIN)):
        loaded = load.load_model(settings.model, torch.device("cpu"))
        adapter = adapters.build_adapter(of)
        adapter.attach(loaded)
        portable.begin(of, adapter, loaded)
        if of is not settings.adapter:
            adapter.load_state(state)
        found.append(logits(loaded.model))
        assert all(p.requires_grad for p in adapter.parameters().values())
    assert torch.equal(*found)
    assert not torch.equal(
        found[0], logits(load.load_model(settings.model, torch.device("cpu")).model)
    )


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_round_trip_through_peft(method: str, tmp_path: Path) -> None:
    loaded, adapter = trained(method, "llama")
    folder = put(adapter, loaded, tmp_path / "adapter")
    of = settings(method).model_copy(update={"init_from": str(folder)})
    portable.check_init(of)
    fresh, begun = tiny("llama"), adapters.build_adapter(of)
    begun.attach(fresh)
    portable.begin(of, begun, fresh)
    assert torch.equal(logits(fresh.model), logits(loaded.model))
    assert begun.parameters().keys() == adapter.parameters().keys()


def test_stage_0_stays_the_base(first: record.Run, saved: Path, tmp_path: Path) -> None:
    words = [
        f"adapter.init_from={saved}",
        f"output_dir={tmp_path}/runs",
        f"results_dir={tmp_path}/results",
        "train.lr=1e-12",
    ]
    settings = again(first, *words)
    made = run.execute(settings, plan := plan_.prepare(settings))
    assert made.record.stages[0].domains == first.record.stages[0].domains
    a, b = (
        made.record.stages[1].domains["smoke_a"].nll_nats,
        first.record.stages[2].domains["smoke_a"].nll_nats,
    )
    assert (
        a == pytest.approx(b, rel=1e-9) and a != made.record.stages[0].domains["smoke_a"].nll_nats
    )
    assert plan.pins["init_from"]["files"].keys() == {portable.CONFIG, portable.WEIGHTS}
    assert cli.main(["verify", str(made.path), "--output-dir", f"{tmp_path}/runs"]) == 0


def test_its_bytes_are_in_the_run_id_and_its_place_is_not(
    first: record.Run, saved: Path, tmp_path: Path
) -> None:
    import shutil

    moved = shutil.copytree(saved, tmp_path / "moved")
    ids = [plan_.prepare(again(first, f"adapter.init_from={p}")).run_id for p in (saved, moved)]
    tensors = load_file(moved / portable.WEIGHTS)
    save_file({n: t + 1e-3 for n, t in tensors.items()}, moved / portable.WEIGHTS)
    ids += [
        plan_.prepare(again(first, f"adapter.init_from={moved}")).run_id,
        plan_.prepare(again(first)).run_id,
    ]
    assert ids[0] == ids[1] and len(set(ids)) == 3


def _altered(saved: Path, to: Path, **keys: Any) -> Path:
    to.mkdir()
    told = json.loads((saved / portable.CONFIG).read_bytes()) | keys
    (to / portable.CONFIG).write_text(json.dumps(told))
    (to / portable.WEIGHTS).write_bytes((saved / portable.WEIGHTS).read_bytes())
    return to


def test_what_cannot_be_begun_from(first: record.Run, saved: Path, tmp_path: Path) -> None:
    """Before torch: one line that names what differs."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/adapter_config.json").write_text('{"peft_type": "IA3"}')
    (tmp_path / "pickle/adapter_model.bin").write_bytes(b"")
    lora = _altered(saved, tmp_path / "lora", peft_type="LORA")
    cut = _altered(saved, tmp_path / "cut")
    (cut / portable.WEIGHTS).write_bytes((saved / portable.WEIGHTS).read_bytes()[:-4])
    for words, said in (
        ([f"adapter.init_from={tmp_path / 'none'}"], "neither a folder nor ORG/NAME@COMMIT"),
        (["adapter.init_from=org/name@main"], "neither a folder nor ORG/NAME@COMMIT"),
        ([f"adapter.init_from={tmp_path / 'empty'}"], "not a PEFT adapter"),
        ([f"adapter.init_from={tmp_path / 'pickle'}"], "only pickle weights"),
        ([f"adapter.init_from={lora}"], "a LORA adapter, not IA3"),
        ([f"adapter.init_from={cut}"], "cut off"),
        (
            [f"adapter.init_from={saved}", "adapter.side=output"],
            "it scales the input of model.layers.0",
        ),
        ([f"adapter.init_from={saved}", "adapter.basis=random"], "not adapter.basis=random"),
    ):
        with pytest.raises((ConfigError, DataError)) as error:
            again(first, *words)
        assert said in str(error.value), str(error.value)


def test_a_peft_config_that_differs_is_named(tmp_path: Path) -> None:
    loaded, adapter = trained("lora", "llama")
    folder = put(adapter, loaded, tmp_path / "adapter")
    other = settings("lora").model_copy(
        update={"init_from": str(folder), "config": {**settings("lora").config, "lora_alpha": 9}}
    )
    with pytest.raises(
        ConfigError, match=r"saved with lora_alpha=8, adapter.config.lora_alpha is 9"
    ):
        portable.check_init(other)
    told = _altered(
        folder, tmp_path / "rs", use_rslora=True
    )  # a key that the run leaves to PEFT's default
    of = settings("lora").model_copy(update={"init_from": str(told)})
    fresh, begun = tiny("llama"), adapters.build_adapter(of)
    begun.attach(fresh)
    with pytest.raises(ConfigError, match="use_rslora=True"):
        portable.begin(of, begun, fresh)
    fewer = settings("lora").model_copy(
        update={
            "init_from": str(folder),
            "config": {**settings("lora").config, "target_modules": ["q_proj"]},
        }
    )
    fresh, begun = tiny("llama"), adapters.build_adapter(fewer)
    begun.attach(fresh)
    with pytest.raises(DataError, match="tensors differ"):
        portable.begin(fewer, begun, fresh)


def test_nothing_of_it_needs_torch(saved: Path, first: record.Run) -> None:
    script = (
        "import sys; from gain_cl.compose import composition; from gain_cl.runs import plan; from "
        "gain_cl.tools import export; from gain_cl.adapters import portable;"
    )
    script += (
        "plan.prepare(composition.compose(sys.argv[1:], [], [])); assert 'torch' not in sys.modules"
    )
    words = [*SMALL, f"model.path={first.record.config['model']['path']}", *SHORT]
    subprocess.run([sys.executable, "-c", script, *words, f"adapter.init_from={saved}"], check=True)


# --- quantised bases ------------------------------------------------------------------------------


def test_load_in_is_refused_where_it_cannot_be(
    first: record.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        again(first, "model.load_in=4bit", "compute.device=cpu")
    with pytest.raises(ConfigError, match="random weights"):
        composition.compose([*SMALL, "model.load_in=4bit"], [], [])
    with pytest.raises(ConfigError, match="cannot be trained themselves"):
        again(first, "model.load_in=4bit", "method=full")
    monkeypatch.setattr(rules, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'gain_cl\[quant\]'"):
        again(first, "model.load_in=8bit", "compute.device=cuda")


def test_nothing_is_merged_into_a_quantised_model(first: record.Run, tmp_path: Path) -> None:
    model = {**first.record.config["model"], "load_in": "4bit"}
    made = with_record(first, config={**first.record.config, "model": model})
    with pytest.raises(ConfigError, match="is not merged"):
        export.export(
            made, "merged", tmp_path / "x", output_dir=str(first.path.parents[2] / "runs")
        )
    done = export.export(
        made, "peft", tmp_path / "y", output_dir=str(first.path.parents[2] / "runs")
    )
    assert (
        done.gap is None
        and "nothing is merged into quantised weights" in (tmp_path / "y/README.md").read_text()
    )


def test_a_packed_layer_refuses_absorb() -> None:
    class Linear4bit(torch.nn.Linear):
        pass

    loaded = tiny("llama")
    for layer in families.targets(loaded.model, ["attn_out", "ffn_down"]).values():
        layer.__class__ = Linear4bit
    adapter = adapters.build_adapter(schema.Gain(**GAIN))
    adapter.attach(loaded)
    with pytest.raises(ConfigError, match="is quantised: nothing can be merged"):
        adapter.absorb()
