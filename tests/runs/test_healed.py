"""The default model: a delta on a packaged model. The page about it is true to its record."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gain_cl.compose import composition
from gain_cl.config import schema
from gain_cl.errors import DataError
from gain_cl.measure import record
from gain_cl.models import convert, load, source

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/healed.md").read_text()
RUN = record.load(ROOT / "results/runs/smollm2-lora-custom-s0-16cea97c22.json")


def test_the_curve_is_the_record_s() -> None:
    rows = [
        tuple(map(float, row))
        for row in re.findall(
            r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.replace(",", ""), flags=re.M
        )
    ]
    train = RUN.record.stages[1].train
    assert (
        train is not None and train.tokens == 163_840 and "163,840 tokens of neutral text" in PAGE
    )
    found = [
        (
            d["step"] * 1024,
            d["nll_nats"] / d["tokens"],
            d["controls_nll_nats"] / d["controls_tokens"],
        )
        for d in train.dev
    ]
    assert [(t, round(own, 3), round(c, 3)) for t, own, c in found] == rows
    late = [c for t, _, c in rows if t >= 81_920]
    assert max(late) - min(late) < 0.016


def test_the_controls_are_the_record_s() -> None:
    for domain, first, last in (
        ("geography", "18.53", "16.47"),
        ("encyclopedia", "11.09", "10.74"),
    ):
        before, after = (RUN.record.stages[s].domains[domain].perplexity for s in (0, 1))
        assert (f"{before:.2f}", f"{after:.2f}") == (first, last)
        assert re.search(
            rf"{first}\s+(in perplexity )?to\s+{last}|{domain} from {first} to {last}|{first} "
            rf"to {last}",
            " ".join(PAGE.split()),
        )
        assert f"({100 * (after / before - 1):.1f}%)" in PAGE


def test_the_recipe_is_the_run_s() -> None:
    settings = RUN.record.config
    words = re.search(r"python -m gain_cl run (.*?)\npython", PAGE, flags=re.S)
    assert words is not None
    composed = composition.compose(words[1].replace("\\\n", " ").split())
    for part in ("method", "adapter", "train", "sequence", "seed"):
        assert composed.model_dump(mode="json")[part] == settings[part], part
    assert (
        composed.eval.window == settings["eval"]["window"]
        and settings["model"]["name"] == "smollm2"
    )


def small() -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    arch = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
    }
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**arch, num_attention_heads=2, num_key_value_heads=2)
    )


def test_a_delta_is_added_in_fp32(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    net, name = small(), "model.layers.0.mlp.down_proj"
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    a, b = torch.randn(2, 24).half(), torch.randn(16, 2).half()
    save_file({f"{name}.lora_A": a, f"{name}.lora_B": b}, tmp_path / "d.safetensors")
    convert.add_delta(net, tmp_path / "d.safetensors")
    for k, p in net.named_parameters():
        expected = before[k] + b.float() @ a.float() if k == f"{name}.weight" else before[k]
        assert torch.equal(p, expected), k


@pytest.mark.parametrize("broken", ["name", "shape", "half"])
def test_another_model_s_delta_is_refused(broken: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    name = "model.layers.7.mlp.down_proj" if broken == "name" else "model.layers.0.mlp.down_proj"
    tensors = {
        f"{name}.lora_A": torch.zeros(2, 23 if broken == "shape" else 24),
        f"{name}.lora_B": torch.zeros(16, 2),
    }
    if broken == "half":
        del tensors[f"{name}.lora_B"]
    save_file(tensors, tmp_path / "d.safetensors")
    with pytest.raises(DataError, match="the delta is of another model"):
        convert.add_delta(small(), tmp_path / "d.safetensors")


def test_the_delta_is_pinned(tmp_path: Path) -> None:
    healed = composition.compose(["tasks=none"]).model
    assert healed.name == "smollm2_healed" and healed.delta is not None
    assert (
        source.pin_model(healed)["delta"] == healed.delta.sha256
        and convert.delta_file(healed) is not None
    )
    other = healed.model_copy(
        update={"delta": schema.Delta(file=healed.delta.file, sha256="0" * 64)}
    )
    with pytest.raises(DataError, match="pinned is 0000"):
        convert.delta_file(other)
    with pytest.raises(DataError, match="No such file"):
        convert.delta_file(
            healed.model_copy(
                update={"delta": schema.Delta(file="nosuch.safetensors", sha256="0" * 64)}
            )
        )


def test_where_a_delta_lies_does_not_matter_to_the_id() -> None:
    """The run id covers bytes, not places; without a delta the settings are those of before there
    were any."""
    healed = composition.compose(["tasks=none"])
    assert (
        healed.model.delta is not None
        and healed.scientific()["model"]["delta"] == healed.model.delta.sha256
    )
    assert "delta" not in composition.compose(["tasks=none", "model=smollm2"]).scientific()["model"]


@pytest.mark.data
@pytest.mark.slow
def test_the_shipped_model_is_the_run_s(tmp_path: Path) -> None:
    """Scoring the shipped model gives what the run that made it recorded, but for float16 (a few
    documents: seconds)."""
    import numpy as np
    import torch

    from gain_cl import domains
    from gain_cl.measure import scoring

    asked = composition.compose(
        ["tasks=none", "domain=[medicine]", "eval.documents=8", "eval.window=64"]
    )
    loaded = load.load_model(asked.model, torch.device("cpu"))
    geography = asked.domains["geography"]
    text = domains.prepare_domain(
        geography,
        loaded.tokenizer,
        loaded.tokenizer_hash,
        domains.pin_domain(geography),
        loaded.prefix_id,
    )
    rows = scoring.score_domain(loaded, text, asked.eval, 8)
    kept = (
        RUN.documents[(RUN.documents.stage == 1) & (RUN.documents.domain == "geography")]
        .set_index("document")
        .nll_nats
    )
    assert np.allclose(rows.nll_nats, kept[rows.document], rtol=2e-4)


def test_a_delta_without_a_package_is_refused() -> None:
    from gain_cl.errors import ConfigError

    with pytest.raises(ConfigError, match="delta is for a model from a package"):
        composition.compose(
            [
                "model=gpt2",
                "tasks=none",
                "++model.delta.file=x.safetensors",
                f"++model.delta.sha256={'0' * 64}",
            ]
        )
