"""Whole runs of a tiny random model on three generated domains: what a record must hold whatever
the method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gain_cl
from conftest import tiny
from gain_cl import cli
from gain_cl.compose import composition
from gain_cl.config import schema
from gain_cl.errors import ConfigError, DataError, InUseError
from gain_cl.measure import provenance, record
from gain_cl.models import convert, load, source
from gain_cl.runs import plan as plan_
from gain_cl.runs import run

SMALL = ["debug=smoke", "compute.threads=1"]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GAIN_CL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def go(folder: Path, *overrides: str) -> record.Run:
    return gain_cl.run(
        *SMALL, f"output_dir={folder}/runs", f"results_dir={folder}/results", *overrides
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, _cache: Any) -> record.Run:
    return go(tmp_path_factory.mktemp("first"))


def test_matrix_is_complete(first: record.Run) -> None:
    assert first.matrix.shape == (4, 4)
    assert list(first.matrix.columns) == ["smoke_a", "smoke_b", "smoke_c", "smoke_control"]
    assert list(first.matrix.index) == ["0 pretrained", "1 smoke_a", "2 smoke_b", "3 smoke_c"]
    assert np.isfinite(first.matrix.to_numpy()).all()
    assert (
        np.diagonal(first.matrix.to_numpy()[1:]) < first.matrix.to_numpy()[0, :3]
    ).all()  # each domain was learned


def test_sums_equal_the_documents(first: record.Run) -> None:
    for stage in first.record.stages:
        for name, score in stage.domains.items():
            rows = first.documents[
                (first.documents.stage == stage.index) & (first.documents.domain == name)
            ]
            assert score.nll_nats == pytest.approx(rows.nll_nats.sum(), rel=1e-15)
            assert (score.tokens, score.bytes, score.documents) == (
                rows.tokens.sum(),
                rows.bytes.sum(),
                len(rows),
            )
            assert score.documents == 8


def test_rerun_is_equal_to_the_last_digit(first: record.Run, tmp_path: Path) -> None:
    again = go(tmp_path)
    assert again.record.run_id == first.record.run_id
    assert again.documents.equals(first.documents)
    for a, b in zip(first.record.stages, again.record.stages, strict=True):
        assert a.domains == b.domains
    states = [
        load_file(
            Path(r.record.config["output_dir"])
            / r.record.run_id
            / "stages/03-smoke_c/adapter.safetensors"
        )
        for r in (first, again)
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_golden_losses(first: record.Run) -> None:
    """Another value means that numbers changed: say why in CHANGELOG.md and raise
    provenance.NUMERICS. The tolerance is for other processors; on one machine type and thread count
    reruns are equal to the last digit (above)."""
    golden = np.array(
        json.loads((Path(__file__).parent / "golden_smoke.json").read_text())["loss_nats"]
    )
    np.testing.assert_allclose(first.record.losses(), golden, rtol=1e-5)


@pytest.mark.parametrize("method", ["gain_attn", "lora", "full"])
def test_every_method_starts_from_the_same_row(
    first: record.Run, method: str, tmp_path: Path
) -> None:
    other = go(tmp_path, f"method={method}")
    assert other.record.stages[0].domains == first.record.stages[0].domains
    assert other.record.stages[1].domains != first.record.stages[1].domains
    assert other.record.trainable_parameters != first.record.trainable_parameters
    assert [s.train.tokens for s in other.record.stages[1:] if s.train] == [
        s.train.tokens for s in first.record.stages[1:] if s.train
    ]


def test_evaluating_more_does_not_change_training(first: record.Run, tmp_path: Path) -> None:
    """Other evaluation documents, dev perplexities within the stages: the trained state has the
    same bits."""
    other = go(tmp_path, "eval.documents=5", "train.dev_every=2", "compute.eval_batch=3")
    assert other.record.run_id != first.record.run_id
    stats = other.record.stages[1].train
    assert stats is not None and [d["step"] for d in stats.dev] == [2, 4]
    states = [
        load_file(
            Path(r.record.config["output_dir"])
            / r.record.run_id
            / "stages/03-smoke_c/adapter.safetensors"
        )
        for r in (first, other)
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_micro_batches_give_the_same_run(first: record.Run, tmp_path: Path) -> None:
    other = go(tmp_path, "compute.micro_batch=1", "compute.gradient_checkpointing=true")
    assert other.record.run_id == first.record.run_id  # execution only
    change, expected = (r.record.losses()[1:] - r.record.losses()[0] for r in (other, first))
    np.testing.assert_allclose(
        change, expected, rtol=1e-2
    )  # of what training did, not of the loss itself


def test_optimizer_state_between_stages(first: record.Run, tmp_path: Path) -> None:
    carried = go(tmp_path, "train.optimizer=carried")
    assert (
        carried.record.stages[1].domains == first.record.stages[1].domains
    )  # nothing to carry yet
    assert carried.record.stages[2].domains != first.record.stages[2].domains


def test_order_of_domains_does_not_change_their_data(tmp_path: Path, first: record.Run) -> None:
    """A domain trained first in another sequence gives the same state: data order knows nothing of
    the position."""
    alone = go(tmp_path, "domain=[smoke_a]", "sequence.controls=[]")
    state = load_file(
        Path(alone.record.config["output_dir"])
        / alone.record.run_id
        / "stages/01-smoke_a/adapter.safetensors"
    )
    same = load_file(
        Path(first.record.config["output_dir"])
        / first.record.run_id
        / "stages/01-smoke_a/adapter.safetensors"
    )
    assert all(torch.equal(state[k], same[k]) for k in state)


def test_finished_run_is_printed_again_and_force_runs_it(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = ["run", *SMALL, f"output_dir={tmp_path}/runs", f"results_dir={tmp_path}/results"]
    assert cli.main(line) == 0
    path = next((tmp_path / "results/runs").glob("*.json"))
    out = capfd.readouterr().out
    assert out.rstrip().endswith(f"record: {path}")
    assert "demonstration: too small to decide between methods" in out
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    code = (
        f"import sys; from gain_cl import cli; code = cli.main({line!r}); assert 'torch' not "
        "in sys.modules; sys.exit(code)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
        == 0
    )
    assert path.stat().st_mtime_ns == written
    assert cli.main([*line, "force=true"]) == 0
    assert path.stat().st_mtime_ns != written
    one, two = json.loads(before), json.loads(path.read_text())
    assert [s["domains"] for s in one["stages"]] == [s["domains"] for s in two["stages"]]


def test_record_holds_its_origin(first: record.Run) -> None:
    r = first.record
    assert r.pins["model"] == {"random": r.config["model"]["arch"], "init_seed": 0}
    assert set(r.pins["domains"]) == set(r.pins["tokens"]) == set(r.trained + r.controls)
    assert len(r.pins["tokenizer"]) == 64
    assert {
        "commit",
        "dirty",
        "packages",
        "processor",
        "threads",
        "device",
        "python",
        "numerics",
    } <= set(r.provenance)
    assert r.protocol == "ppl-test-first64x8-prefix0-ctx256"
    assert r.peak_memory_bytes > 0


def test_no_secret_reaches_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = {
        "HF_TOKEN": "hf_canary1",
        "WANDB_API_KEY": "canary2" * 6,
        "AWS_SECRET_ACCESS_KEY": "canary3",
    }
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    go(tmp_path)
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert written
    assert not [name for name, value in canaries.items() if value.encode() in written]


@pytest.mark.slow
def test_execution_settings_are_not_in_the_run_id() -> None:
    """The tested list: every section is scientific unless named here."""
    execution = {
        "compute.threads=3", "compute.micro_batch=1", "compute.eval_batch=2", "compute.device=cpu", "compute.deterministic=true",
        "compute.gradient_checkpointing=true", "track.project=x", "output_dir=/tmp/x", "results_dir=/tmp/y", "force=true", "lr_tuned_on=x",
        "checkpoint.every_minutes=3", "checkpoint.every_steps=1", "checkpoint.keep_stages=last", "resume=never", "allow_change=[dtype]",
    }  # fmt: skip
    scientific = {
        "model.dtype=bfloat16", "model.init_seed=1", "model.attention=eager", "model.prefix_token_id=3", "model.separator_token_id=3",
        "adapter.side=output", "train.lr=1e-3", "train.steps=5", "train.block=32", "train.batch_tokens=128", "train.pack=mask",
        "train.schedule=constant", "train.warmup=0.5", "train.final_lr=0", "train.eps=1e-6", "train.weight_decay=0.1", "train.clip=2",
        "train.optimizer=carried", "eval.documents=9", "eval.window=63", "eval.context=128", "eval.stride=16", "eval.split=dev", "seed=1",
        "sequence.order=[1,0,2]", "train.betas=[0.8,0.99]", "train.dev_every=2", "tasks.names=[boolq@5]", "adapter.roles=[attn_out]",
         "sequence.controls=[]", "domains.smoke_a.source.seed=99", "domains.smoke_a.split.test=0.3",
    }  # fmt: skip

    def run_id(*overrides: str) -> str:
        return plan_.prepare(composition.compose(["debug=smoke", *overrides], [], [])).run_id

    base = run_id()
    assert {o for o in execution if run_id(o) != base} == set()
    ids = {o: run_id(o) for o in scientific}
    assert {o for o, i in ids.items() if i == base} == set()
    assert len(set(ids.values())) == len(ids)
    sections = set(schema.RunConfig.model_fields)
    executing = {
        "compute",
        "track",
        "checkpoint",
        "resume",
        "allow_change",
        "output_dir",
        "results_dir",
        "force",
        "plugins",
        "lr_tuned_on",
    }
    assert set(schema.EXECUTION) == executing < sections


def test_tokens_and_task_settings_are_in_the_run_id() -> None:
    def run_id(*overrides: str) -> str:
        task = (
            [] if any(o.startswith("tasks.names") for o in overrides) else ["tasks.names=[boolq@5]"]
        )
        return plan_.prepare(composition.compose(["debug=smoke", *task, *overrides], [], [])).run_id

    task = [
        "tasks.batch_size=4",
        "tasks.stages=all",
        "tasks.limit=3",
        "tasks.names=[boolq@6]",
        "tasks.names=[piqa@5]",
    ]
    ids = [run_id(), *(run_id(o) for o in task), run_id("train.steps=null", "train.tokens=1024")]
    assert len(set(ids)) == len(ids)


def test_run_id_is_of_content_not_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder and the same texts by other spellings are the same run; other content is
    another."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "net")
    (tmp_path / "my/domain").mkdir(parents=True)
    (tmp_path / "texts.txt").write_text(
        "\n\n".join(f"Paragraph {i} of a text about nothing. " * 60 for i in range(40))
    )

    def run_id(model: str, text: str) -> str:
        (tmp_path / "my/domain/mine.yaml").write_text(
            f"name: mine\nsource: {{kind: files, path: {text}}}\n"
        )
        words = [
            f"model.path={model}",
            "domain=[mine]",
            "sequence.controls=[]",
            "tasks=none",
            "train.block=32",
            "eval.context=64",
        ]
        return plan_.prepare(composition.compose(words, ["my"], [])).run_id

    one = run_id("net", "texts.txt")
    assert (
        one
        == run_id("./net", str(tmp_path / "texts.txt"))
        == run_id(str(tmp_path / "net"), "./texts.txt")
    )
    (tmp_path / "texts.txt").write_text((tmp_path / "texts.txt").read_text() + "more")
    assert one != run_id("net", "texts.txt")


def test_changed_plugin_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from gain_cl import guards\nfrom gain_cl.guards.base import Guard\nclass "
        "Own(Guard):\n    pass\nguards.register('own', Own)\n"
    )
    ids = []
    for text in (code, code + "# changed\n"):
        (tmp_path / f"plug{len(ids)}.py").write_text(text)
        ids.append(
            plan_.prepare(
                composition.compose(
                    ["debug=smoke", "guard.kind=own"], [], [tmp_path / f"plug{len(ids)}.py"]
                )
            ).run_id
        )
    assert ids[0] != ids[1]


def test_non_finite_score_is_never_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gain_cl.measure import perplexity

    monkeypatch.setattr(
        perplexity, "token_nll", lambda hidden, *_: torch.full((len(hidden),), float("nan"))
    )
    with pytest.raises(
        DataError,
        match=r"the loss of 8 documents is not finite .*; check the weights; if they were trained "
        r"here, lower",
    ):
        go(tmp_path)
    assert not list(tmp_path.glob("results/**/*"))
    (failure,) = tmp_path.glob("runs/*/failure.json")
    assert "is not finite" in json.loads(failure.read_text())["error"]


def test_two_owners(first: record.Run, tmp_path: Path) -> None:
    settings = composition.compose(
        [*SMALL, f"output_dir={tmp_path}/runs", f"results_dir={tmp_path}/results"], [], []
    )
    plan = plan_.prepare(settings)
    hold = f"with owned(Path({str(plan.folder)!r})): print('held', flush=True); time.sleep(60)"
    holder = f"import time\nfrom pathlib import Path\nfrom gain_cl.system.lock import owned\n{hold}"
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            with pytest.raises(InUseError, match=rf"process {process.pid} on") as error:
                run.execute(settings, plan)
            assert error.value.exit_code == 73
        finally:
            process.kill()
    run.execute(settings, plan)  # a dead owner holds nothing


def test_unwritable_results_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert (
        cli.main(
            ["run", *SMALL, f"output_dir={tmp_path}/file/runs", f"results_dir={tmp_path}/results"]
        )
        == 74
    )
    assert capsys.readouterr().err.startswith("gain_cl: error: cannot write")


def test_a_model_folder_of_ones_own(tmp_path: Path) -> None:
    """model.path= on a local folder: any family, its own tokenizer."""
    loaded = tiny("gpt2")
    loaded.model.save_pretrained(tmp_path / "my-gpt2")
    loaded.tokenizer.save_pretrained(tmp_path / "my-gpt2")
    smoke = [
        "train.tokens=256",
        "train.block=32",
        "train.batch_tokens=128",
        "eval.documents=4",
        "eval.window=32",
        "eval.context=64",
    ]
    made = gain_cl.run(
        f"model.path={tmp_path}/my-gpt2",
        "sequence=smoke",
        "tasks=none",
        *smoke,
        f"output_dir={tmp_path}/runs",
        f"results_dir={tmp_path}/results",
    )
    assert made.record.model == "my-gpt2" and "folder" in made.record.pins["model"]
    assert any("was chosen on smollm2, not on my-gpt2" in n for n in made.record.notes)


OTHER_TYPE = [
    "method=oft",
    *(
        f"~adapter.config.{k}"
        for k in ("oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms")
    ),
]
OTHER_TYPE += ["~adapter.config.module_dropout", "~adapter.config.bias"]


def gpt2(folder: Path) -> list[str]:
    """Overrides of a run on a tiny GPT-2 in a folder."""
    loaded = tiny("gpt2")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return [
        f"model.path={folder}",
        "train.block=32",
        "train.batch_tokens=64",
        "eval.context=64",
        "eval.window=32",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=oft"], "PEFT refuses: .*OFT on gpt2"),
        ([*OTHER_TYPE, "adapter.peft_type=OSF"], "trains nothing on this model"),
        (["method=lora", "adapter.config.target_modules=[wte]"], "changes the input embedding"),
    ],
    ids=["OFT", "OSF", "embedding"],
)
def test_what_cannot_be_attached_is_refused_before_anything(
    words: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        go(tmp_path, *gpt2(tmp_path / "net"), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net"], "a mistake leaves nothing on disk"


def test_a_folder_counts_before_the_architecture_of_a_preset(tmp_path: Path) -> None:
    """model=tiny is a Llama, and OFT fits it; the folder is a GPT-2."""
    with pytest.raises(ConfigError, match="OFT on gpt2"):
        go(tmp_path, "model=tiny", *gpt2(tmp_path / "net"), "method=oft")


def test_what_needs_weights_to_attach_runs(tmp_path: Path) -> None:
    """Without weights PEFT cannot make this adapter and a plugin fails: that proves nothing."""
    words = ["domain=[smoke_a]", "sequence.controls=[]", "train.steps=1"]
    assert (
        go(tmp_path, *words, *OTHER_TYPE, "adapter.peft_type=FROD").record.trainable_parameters > 0
    )
    code = (
        "from gain_cl import guards\nfrom gain_cl.guards.base import Guard\nclass Reads(Guard):\n"
        "    def attach(self, loaded, adapter, seed):\n        assert "
        "loaded.tokenizer.eos_token_id == 0\nguards.register('reads', Reads)\n"
    )
    (tmp_path / "plug.py").write_text(code)
    assert (
        go(tmp_path, *words, "guard.kind=reads", f"++plugins=['{tmp_path}/plug.py']").record.method
        == "gain_ffn"
    )


# --- the hub, without a hub -----------------------------------------------------------------------

QWEN = "d149729398750b98c0af14eb82c78cfe92750796"


def command(home: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-m", "gain_cl", "run", *overrides],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=300,
    )


def test_qwen_from_a_seeded_hub_cache(tmp_path: Path) -> None:
    """A tiny Qwen2 under the real id and revision: the command line of the README, start to finish,
    offline."""
    repository = tmp_path / "hf/hub/models--Qwen--Qwen2.5-7B"
    snapshot = repository / "snapshots" / QWEN
    loaded = tiny(
        "qwen2", "bfloat16", vocab_size=300
    )  # its tokenizer class adds a token of its own
    loaded.model.save_pretrained(snapshot)
    loaded.tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(QWEN)
    overrides = [
        "model=qwen2.5",
        "method=gain_ffn",
        "sequence=smoke",
        "tasks=none",
        "train.tokens=128",
        "train.block=32",
        "train.batch_tokens=64",
    ]
    overrides += [
        "eval.documents=4",
        "eval.window=32",
        "eval.context=64",
        f"output_dir={tmp_path}/runs",
        f"results_dir={tmp_path}/results",
    ]
    done = command(tmp_path / "hf", *overrides)
    assert done.returncode == 0, done.stderr
    made = gain_cl.load(done.stdout.rstrip().splitlines()[-1].removeprefix("record: "))
    assert made.record.model == "qwen2.5_7b" and made.record.config["model"]["dtype"] == "bfloat16"
    assert made.record.pins["model"] == {"hub": "Qwen/Qwen2.5-7B", "revision": QWEN}
    assert any("was chosen on smollm2, not on qwen2.5_7b" in n for n in made.record.notes)
    assert made.record.trainable_parameters == 2 * (32 + 48)


def test_qwen_without_cache_and_network_is_one_line(tmp_path: Path) -> None:
    for environment in ({}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = command(
            tmp_path,
            "model=qwen2.5",
            "sequence=smoke",
            "tasks=none",
            f"output_dir={tmp_path}/runs",
            **environment,
        )
        assert done.returncode in (65, 74)
        line = [x for x in done.stderr.splitlines() if x.startswith("gain_cl: error:")]
        assert len(line) == 1 and "Traceback" not in done.stderr
        assert "hf download Qwen/Qwen2.5-7B" in line[0] and QWEN in line[0]


# --- models that cannot be used: one line from their JSON files -----------------------------------


def save(folder: Path, **changes: Any) -> Path:
    loaded = tiny("llama")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))
    return folder


def test_unusable_models(tmp_path: Path) -> None:
    good = save(tmp_path / "good")
    assert source.inspect_model(good)["model_type"] == "llama"
    with pytest.raises(DataError, match="not a causal language model: BertModel"):
        source.inspect_model(save(tmp_path / "bert", architectures=["BertModel"]))
    with pytest.raises(DataError, match="needs code from its repository"):
        source.inspect_model(
            save(tmp_path / "remote", model_type="mystery", auto_map={"AutoModel": "x.Y"})
        )
    pickled = save(tmp_path / "pickle")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"only pickle weights \(pytorch_model.bin\)"):
        source.inspect_model(pickled)
    (pickled / "pytorch_model.bin").unlink()
    with pytest.raises(DataError, match=r"no model\*\.safetensors"):
        source.inspect_model(pickled)
    (pickled / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is not JSON"):
        source.inspect_model(pickled)
    (pickled / "config.json").unlink()
    with pytest.raises(DataError, match=r"no config\.json"):
        source.inspect_model(pickled)


def test_a_folder_that_opens_other_files_is_refused(tmp_path: Path) -> None:
    """transformers would put on an adapter that lies there, and read another config."""
    beside = save(tmp_path / "beside")
    (beside / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="an adapter lies in the model's folder"):
        source.inspect_model(beside)
    other = save(tmp_path / "other", configuration_files=["config.4.0.0.json"])
    with pytest.raises(DataError, match=r"another file in the place of config\.json"):
        source.inspect_model(other)


def test_end_token_and_prefix(tmp_path: Path) -> None:
    folder = save(tmp_path / "endless")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.exists():
            data = json.loads(path.read_text())
            path.write_text(json.dumps({k: v for k, v in data.items() if k != "eos_token"}))
    model = schema.Model(name="endless", path=str(folder), dtype="float32")
    with pytest.raises(DataError, match="no end token"):
        load.load_model(model, torch.device("cpu"))
    ready = load.load_model(
        model.model_copy(update={"prefix_token_id": 5, "separator_token_id": 6}),
        torch.device("cpu"),
    )
    assert (ready.prefix_id, ready.separator_id) == (5, 6)
    with pytest.raises(DataError, match="token ids reach 256, the model has 100 embedding rows"):
        load.special_tokens(model, ready.tokenizer, 100)
    with pytest.raises(DataError, match="prefix_token_id=999 has no embedding row"):
        load.load_model(
            model.model_copy(update={"prefix_token_id": 999, "separator_token_id": 6}),
            torch.device("cpu"),
        )


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_weights_must_be_the_models(family: str, tied: bool, tmp_path: Path) -> None:
    """What a checkpoint lacks would get random values: it is refused, whatever the family; what no
    model reads is passed over."""
    tiny(family, tie_word_embeddings=tied).model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    layer = next(n for n, t in good.items() if t.dim() == 2 and ".1." in n)
    head = [n for n in good if n in ("lm_head.weight", "embed_out.weight")]
    assert bool(head) is not tied

    def parameters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        save_file(tensors, file, {"format": "pt"})
        return load.parameters_of(tmp_path, "float32")

    old = {
        "x.0.attn.masked_bias": torch.ones(1),
        "x.0.rotary_emb.inv_freq": torch.ones(4),
        "model.decoder.version": torch.ones(1),
    }
    assert all(torch.equal(t, good[n]) for n, t in parameters({**good, **old}).items() if n in good)
    wrong: list[tuple[str, dict[str, torch.Tensor]]] = [
        (layer, {n: t for n, t in good.items() if n != layer}),
        (layer, {**good, layer: torch.ones(3, 3)}),
        ("v_head.weight", {**good, "v_head.weight": torch.ones(3)}),
        *(
            ("lm_head.weight", {k: t for k, t in good.items() if k != n}) for n in head
        ),  # GPT-NeoX has another name for it in files
    ]
    for name, tensors in wrong:
        with pytest.raises(
            DataError, match=rf"1 tensors .* first (\w+\.)?{name} \(.*; save the model again"
        ):
            parameters(tensors)


def test_a_run_on_weights_with_a_gap_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "net")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        DataError,
        match=r"2 tensors are missing, unknown or of another shape, first "
        r"model\.layers\.1\.mlp\.up_proj\.weight",
    ):
        load.load_model(
            schema.Model(name="gap", path=str(folder), dtype="float32"), torch.device("cpu")
        )


def test_chunked_head_is_checked_against_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.Loaded, "softcap", property(lambda self: 0.01))
    with pytest.raises(DataError, match="transforms its logits in an unknown way"):
        tiny("llama")


def test_devices() -> None:
    assert load.device_of("cpu", "float32").type == "cpu"
    with pytest.raises(ConfigError, match="'toaster' cannot be used"):
        load.device_of("toaster", "float32")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="'cuda' cannot be used"):
            load.device_of("cuda", "float32")
    if not torch.backends.mps.is_available():
        with pytest.raises(ConfigError, match=r"'mps' cannot be used: .{9,100} \(compute.device\)"):
            load.device_of("mps", "float32")


def test_converted_model_is_verified(tmp_path: Path) -> None:
    loaded = tiny("llama")
    loaded.model.save_pretrained(tmp_path)
    hashes = {"model.safetensors": record.sha256(tmp_path / "model.safetensors")}
    assert convert.converted_files(tmp_path) is None  # no manifest
    (tmp_path / convert.MANIFEST).write_text(json.dumps({"source": {}, "files": hashes}))
    assert convert.converted_files(tmp_path) == hashes
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert convert.converted_files(tmp_path) is None


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("model", "among"), [("smollm2_healed", 5), ("smollm2", 1)])
def test_default_model_from_its_package(
    model: str, among: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default model, and as shipped, as a user gets it: loads, predicts English, and its prefix
    is the pretraining separator."""
    monkeypatch.delenv("GAIN_CL_CACHE", raising=False)
    assert composition.compose([]).model.name == "smollm2_healed"
    loaded = load.load_model(composition.compose([f"model={model}"]).model, torch.device("cpu"))
    assert loaded.prefix_id == loaded.separator_id == 0
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = loaded.model(ids).logits[0, -1].topk(among).indices
    assert "Paris" in [loaded.tokenizer.decode([i]).strip() for i in best]


def test_environment_is_recorded_without_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_CANARY", "canary-value")
    assert "canary-value" not in json.dumps(provenance.environment())
