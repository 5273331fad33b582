"""Models that users have, by the real command line: they work, or are refused in one true
sentence before anything runs."""

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
from test_families import FAMILIES, IDS, LINEAR, LOCAL, WIDE, our_loss, own_loss, save, small

from gain_cl import cli
from gain_cl.config import schema
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import record
from gain_cl.models import convert, forward, load

CPU = torch.device("cpu")


def run(folder: Path, here: Path, *words: str) -> int:
    return cli.main(["run", *small(folder, here, *words)])


def exported(here: Path) -> Path:
    """The merged model of the one run in a folder."""
    (made,) = (here / "runs").glob("*.json")
    words = ["to=merged", f"results_dir={here}", f"output_dir={here}", f"dir={here / 'merged'}"]
    assert cli.main(["export", made.stem, *words]) == 0
    return here / "merged"


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr."""
    return capsys.readouterr().err.strip().splitlines()[-1]


def opened(folder: Path) -> load.Loaded:
    return load.load_model(schema.Model(name="m", path=str(folder), dtype="float32"), CPU)


def test_a_tokenizer_may_know_an_image_token_beyond_the_rows(tmp_path: Path) -> None:
    """Every text-only Gemma 3 has one."""
    folder = save("gemma3_text", tmp_path / "m")
    tokenizer = load.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == 258
    assert run(folder, tmp_path, "method=gain_attn", "train.pack=mask") == 0


VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 32,
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **WIDE, **LOCAL, "head_dim": 8},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "mm_tokens_per_image": 4,
        "image_token_index": 256,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **WIDE},
        "vision_config": {"model_type": "pixtral", **VISION},
        "image_token_index": 256,
    },
    "qwen3_5": {
        "text_config": {"model_type": "qwen3_5_text", **WIDE, **LINEAR},
        "vision_config": QWEN_VISION,
    },
}


@pytest.mark.parametrize("family", WRAPPERS)
def test_the_text_part_of_a_wrapper(family: str, tmp_path: Path) -> None:
    """Its loss is the whole model's on text, it trains, and its export is a model of text."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **WRAPPERS[family])
    whole, folder = AutoModelForImageTextToText.from_config(config).eval(), tmp_path / "m"
    whole.save_pretrained(folder)
    load.byte_tokenizer().save_pretrained(folder)
    text = opened(folder)
    assert our_loss(text) == pytest.approx(own_loss(whole), abs=2e-5)
    assert not [n for n, _ in text.model.named_parameters() if "vision" in n or "visual" in n]
    lora = ["method=lora", "adapter.config.r=2", "adapter.config.target_modules=[q_proj]"]
    assert run(folder, tmp_path, *lora) == 0
    again = AutoModelForCausalLM.from_pretrained(exported(tmp_path)).eval()
    assert type(again) is type(text.model)
    assert own_loss(again) == pytest.approx(own_loss(whole), abs=0.1)


def test_a_head_of_its_own_under_a_tied_config(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save("llama", tmp_path / "m", tie_word_embeddings=False)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert run(folder, tmp_path, "method=gain_ffn", "train.lr=1e-12") == 0
    merged = exported(tmp_path)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    again = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert own_loss(again) == pytest.approx(our_loss(opened(folder)), abs=1e-5)


def test_gains_on_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save("qwen3_moe", tmp_path / "m")
    assert run(folder, tmp_path, "method=gain_ffn") == 64
    assert told(capsys) == (
        "gain_cl: error: qwen3_moe is a mixture of experts: the down projections of all are one "
        "tensor, on which no gain acts (adapter.roles); method=gain_attn acts on its attention "
        "alone"
    )
    assert run(folder, tmp_path, "method=gain_attn") == 0


@pytest.mark.parametrize(("family", "layer"), [("mamba", "in_proj"), ("bloom", "dense")])
def test_packed_documents_are_kept_apart_or_refused(
    family: str, layer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(family, tmp_path / "m")
    lora = ["method=lora", "adapter.config.r=2", f"adapter.config.target_modules=[{layer}]"]
    assert run(folder, tmp_path, *lora, "train.pack=mask") == 64
    said = f"gain_cl: error: {family} does not keep packed documents apart (train.pack=mask)"
    assert told(capsys) == f"{said}; use train.pack=stream"
    assert not list(tmp_path.glob("**/stages"))


def test_local_windows_stay_under_a_mask() -> None:
    """One mask for all layers would replace the window of Gemma 3: the proof sees it."""
    arch = {"model_type": "gemma3_text", **FAMILIES["gemma3_text"]}
    loaded = load.load_model(schema.Model(name="m", arch=arch, dtype="float32"), CPU)
    tokens = np.random.default_rng(0).integers(1, 257, (1, 64))
    one = np.zeros_like(tokens)
    with torch.no_grad():
        stream = forward.loss_sum(loaded, tokens).item()
        assert forward.loss_sum(loaded, tokens, one).item() != pytest.approx(stream, rel=1e-4)
        forward.prove_masks(loaded, 64)
        assert forward.loss_sum(loaded, tokens, one).item() == pytest.approx(stream, rel=1e-6)


def test_a_leak_between_documents_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that reads neither mask nor positions is refused."""
    arch = {"model_type": "llama", **FAMILIES["llama"]}
    loaded = load.load_model(schema.Model(name="m", arch=arch, dtype="float32"), CPU)
    hidden = loaded.hidden
    forget = lambda input_ids, **rest: hidden(input_ids=input_ids)  # noqa: E731
    monkeypatch.setattr(loaded, "hidden", forget)
    with pytest.raises(ConfigError, match="llama does not keep packed documents apart"):
        forward.prove_masks(loaded, 64)


def test_a_look_at_later_tokens_is_seen() -> None:
    arch = {"model_type": "llama", **FAMILIES["llama"]}
    loaded = load.load_model(schema.Model(name="m", arch=arch, dtype="float32"), CPU)
    for layer in loaded.body.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(DataError, match="llama looks at later tokens"):
        load._prove_loss(loaded)


@pytest.mark.parametrize(
    ("family", "wanted", "missing"),
    [
        ("phi3", "q_proj,k_proj,v_proj,o_proj", "q_proj, k_proj, v_proj"),
        ("llama", "q_proj,FAKE", "FAKE"),
    ],
)
def test_every_name_of_target_modules_matches(
    family: str, wanted: str, missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(family, tmp_path / "m")
    key = "adapter.config.target_modules"
    assert run(folder, tmp_path, "method=lora", "adapter.config.r=2", f"{key}=[{wanted}]") == 64
    error = told(capsys)
    assert f"no module matches {missing} ({key}); there is: down_proj, " in error


def test_unknown_tokens_are_counted_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = save("llama", tmp_path / "m")
    words = ["[UNK]", "[END]", *"the of and a to in is".split()]  # noqa: SIM905
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="[END]")
    tokenizer.save_pretrained(folder)
    assert run(folder, tmp_path, "method=gain_attn") == 65
    error = told(capsys)
    assert " are [UNK]: the tokenizer does not know the text (domain smoke_a); use a" in error
    assert run(folder, tmp_path, "method=gain_attn", "allow_change=[unknown]") == 0
    (made,) = (tmp_path / "runs").glob("*.json")
    notes = record.load(made).record.notes
    assert any("of smoke_a are [UNK], text that the tokenizer does not know" in n for n in notes)


def test_attention_is_what_the_family_can_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before the weights are fetched: here they are zeros of another shape."""
    folder = save("gemma2", tmp_path / "m")
    assert opened(folder).notes == ["gemma2 has no sdpa: model.attention=eager is used"]
    save_file({"x.weight": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    assert run(folder, tmp_path, "method=gain_attn", "model.attention=flash_attention_2") == 65
    assert "lash" in told(capsys)  # FlashAttention2 cannot be used due to


# --- transformers 4 and 5 -------------------------------------------------------------------------

OLD = ["transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2"]
READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
ids, found = torch.tensor(json.loads(sys.argv[1])), {"version": transformers.__version__}
for folder in sys.argv[2:]:
    net, own = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found[folder] = [net(ids, labels=ids).loss.item(), own("the <|end|> of\\n\\n it")["input_ids"]]
print(json.dumps(found))
"""


def read(folders: list[Path], library: Path | None) -> dict[str, Any]:
    """What a process with the transformers of a folder (None: ours) reads."""
    path = {"PYTHONPATH": str(library)} if library else {}
    words = [sys.executable, "-c", READ, json.dumps(IDS.tolist()), *map(str, folders)]
    done = subprocess.run(words, capture_output=True, env={**os.environ, **path}, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def as_version_4_wrote_it(folder: Path) -> None:
    """Rewrite what version 5 names otherwise."""
    config, settings = folder / "config.json", folder / "tokenizer_config.json"
    data = json.loads(config.read_text())
    data["rope_theta"] = data.pop("rope_parameters")["rope_theta"]
    config.write_text(json.dumps(data))
    told = {**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(told))


def test_an_export_keeps_the_names_of_version_4(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "m", rope_theta=1e6)
    as_version_4_wrote_it(folder)
    assert run(folder, tmp_path, "method=gain_attn") == 0
    merged = exported(tmp_path)
    data = json.loads((merged / "config.json").read_text())
    assert data["rope_theta"] == data["rope_parameters"]["rope_theta"] == 1e6
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((merged / name).read_text()) == json.loads((folder / name).read_text())


@pytest.mark.slow
def test_transformers_4_and_5_read_the_same(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """The older one from a folder of its own, which pip fills once."""
    library = pytestconfig.cache.mkdir("transformers-4.57.6")
    if not (library / "transformers").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(library)]
        if subprocess.run([*pip, *OLD], check=False).returncode:
            pytest.skip("the older transformers cannot be had here")
    changed: dict[str, dict[str, Any]] = {
        "llama": {"rope_theta": 1e6},
        "qwen3": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "phi": {"partial_rotary_factor": 0.75},
        "gpt_neox": {"rotary_emb_base": 777, "rotary_pct": 0.5},
        "gemma3_text": {"rope_theta": 5e5, "rope_local_base_freq": 2e3},
        "qwen3_moe": {},
        "gpt2": {},
    }
    folders = []
    for family, keys in changed.items():
        loaded = opened(save(family, tmp_path / family, **keys))
        loaded.model.config.use_cache = True
        folders.append(tmp_path / f"{family}-written")
        convert.save_model(loaded.model, loaded.tokenizer, folders[-1], tmp_path / family)
    old, new = read(folders, library), read(folders, None)
    assert old.pop("version").startswith("4.57.") and new.pop("version").startswith("5.")
    for folder in map(str, folders):
        assert old[folder][0] == pytest.approx(new[folder][0], abs=2e-5), folder
        assert old[folder][1] == new[folder][1], folder
