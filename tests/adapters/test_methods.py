"""Methods against independent references: plain PEFT training loops, PEFT's own configuration
classes, docs/methods.md."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from conftest import ListBlocks, tiny
from gain_cl import adapters
from gain_cl.adapters.peft import PeftAdapter
from gain_cl.compose import checks, composition
from gain_cl.config import presets, schema
from gain_cl.errors import ConfigError
from gain_cl.guards.base import Guard
from gain_cl.runs import train

ROOT = Path(__file__).parents[2]
ROLES = ["attn_out", "ffn_down"]
LAYERS = "all-linear"


def peft_adapter(peft_type: str, roles: list[str] | None = None, **keys: Any) -> schema.Peft:
    return schema.Peft(kind="peft", peft_type=peft_type, config=keys, roles=roles)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *((m, "llama") for m in ("lora", "ia3", "dora", "oft")),
        *((m, f) for m in ("lora", "ia3") for f in ("gpt2", "qwen2", "gpt_neox")),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_losses_equal_a_plain_peft_loop(method: str, family: str) -> None:
    """get_peft_model, AdamW and cross entropy on the same batches: the losses of ten steps
    agree."""
    import peft

    row = yaml.safe_load((presets.configs_dir() / "method" / f"{method}.yaml").read_text())[
        "adapter"
    ]
    tokens = np.random.default_rng(0).integers(1, 257, (20, 16))

    keys = (
        dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0) if family == "gpt2" else {}
    )
    loaded = tiny(family, **keys)
    torch.manual_seed(5)
    adapter = adapters.build_adapter(peft_adapter(row["peft_type"], **row["config"]))
    adapter.attach(loaded)
    setup = schema.Train(
        steps=10, block=16, batch_tokens=32, lr=1e-2, schedule="constant", warmup=0.0, clip=None
    )
    optimizer = train.optimizer(adapter, setup)
    steps = train.stage(
        loaded, adapter, Guard(), ListBlocks(tokens), setup, optimizer, index=1, seed=0
    )  # type: ignore[arg-type]
    ours = [step["loss_nats"] for step in steps]

    other = tiny(family, **keys)
    torch.manual_seed(5)
    kind = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config, "OFT": peft.OFTConfig}[row["peft_type"]]
    model = peft.get_peft_model(other.model, kind(task_type="CAUSAL_LM", **row["config"]))
    plain = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-2,
        betas=(0.9, 0.999),
        weight_decay=0.0,
    )
    theirs = []
    for step in range(10):
        targets = torch.from_numpy(tokens[2 * step : 2 * step + 2])
        inputs = torch.cat([torch.full((2, 1), other.prefix_id), targets[:, :-1]], dim=1)
        loss = F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        plain.zero_grad()
        loss.backward()
        plain.step()
        theirs.append(loss.item())
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    assert abs(theirs[-1] - theirs[0]) > 1e-3, "it has learned something"


def real_classes() -> dict[str, Any]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def test_common_keys_are_those_of_their_classes() -> None:
    """What is not looked up in PEFT when a run is composed is right, and is what presets use."""
    classes, kinds = real_classes(), checks.COMMON_TYPES.split()
    known = {key for kind in kinds for key in inspect.signature(classes[kind]).parameters}
    assert set(checks.COMMON_KEYS.split()) <= known
    for name in presets.names("method"):
        method = yaml.safe_load((ROOT / "configs/method" / f"{name}.yaml").read_text())
        if (adapter := method.get("adapter", {})).get("config"):
            assert adapter["peft_type"] in kinds
            assert set(adapter["config"]) <= set(checks.COMMON_KEYS.split()), name
    assert set(checks.NO_WEIGHTS.split()) <= set(classes)


@pytest.mark.parametrize("peft_type", sorted(checks.NO_WEIGHTS.split()))
def test_types_that_cannot_be_absorbed_are_refused(peft_type: str) -> None:
    with pytest.raises(
        ConfigError, match=f"PEFT's {peft_type} cannot be absorbed into the weights"
    ):
        checks.check_peft(peft_adapter(peft_type), str)


SMALL: dict[str, dict[str, Any]] = {
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "VBLORA": {"num_vectors": 8, "vector_length": 8},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
}
"""Keys that a tiny model needs."""

OTHER_START = {"C3A", "FOURIERFT", "UNILORA", "VBLORA"}
"""Types that, at PEFT's defaults, do not begin as the pretrained model."""


@pytest.mark.parametrize(
    "peft_type", sorted(set(real_classes()) - set(checks.NO_WEIGHTS.split()) - {"BOFT"})
)  # which builds a C++ extension
@pytest.mark.filterwarnings("ignore")
def test_any_other_type_keeps_the_contract_or_is_refused(peft_type: str) -> None:
    ids, before = torch.arange(1, 25).reshape(2, 12), tiny("llama")
    keys = dict(SMALL.get(peft_type, {}))
    if peft_type != "LN_TUNING":
        keys["target_modules"] = ["q_proj", "v_proj", "down_proj"]
    if peft_type == "IA3":
        keys["feedforward_modules"] = ["down_proj"]
    settings = peft_adapter(peft_type, **keys)
    checks.check_peft(settings, str)
    loaded, other = tiny("llama"), tiny("llama")
    adapter, fresh = adapters.build_adapter(settings), adapters.build_adapter(settings)
    if peft_type in OTHER_START:
        with pytest.raises(
            ConfigError, match=f"{peft_type} does not start as the pretrained model"
        ):
            adapter.attach(loaded)
        return
    torch.manual_seed(0)
    adapter.attach(loaded)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters().values():
            assert p.dtype == torch.float32
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
        base, tuned = before.model(ids).logits, loaded.model(ids).logits
        assert (tuned - base).abs().max() > 1e-4
        with adapter.disabled():
            assert torch.equal(loaded.model(ids).logits, base)
        torch.manual_seed(1)
        fresh.attach(other)
        fresh.load_state(adapter.state())
        assert torch.equal(other.model(ids).logits, tuned)
        adapter.absorb()
        assert (loaded.model(ids).logits - tuned).abs().max() <= 2e-5 * tuned.abs().max()


def test_dropout_is_off_outside_training() -> None:
    """PEFT makes its modules in training mode, whatever mode the model is in."""
    loaded = tiny("llama")
    adapter = adapters.build_adapter(
        peft_adapter("LORA", r=4, target_modules=LAYERS, lora_dropout=0.5)
    )
    adapter.attach(loaded)
    adapter.restart()
    assert not any(m.training for m in loaded.model.modules())


def test_roles_name_the_layers_of_gains() -> None:
    for family, suffixes in (
        ("llama", ("o_proj", "down_proj")),
        ("gpt2", ("attn.c_proj", "mlp.c_proj")),
    ):
        loaded = tiny(family)
        adapter = adapters.build_adapter(peft_adapter("LORA", ROLES, r=2))
        adapter.attach(loaded)
        assert isinstance(adapter, PeftAdapter)
        names = list(adapter.lora_inputs())
        assert len(names) == 4 and all(n.endswith(suffixes) for n in names)
        (inputs,) = {
            tuple(a.shape for a in matrices)
            for n, matrices in adapter.lora_inputs().items()
            if n.endswith(suffixes[0])
        }
        assert inputs == ((2, 32),)


def test_roles_of_ia3_mean_inputs() -> None:
    """IA3 by roles is gain_ffn: as many parameters, and the same function."""
    loaded, other = tiny("gpt2"), tiny("gpt2")
    ia3 = adapters.build_adapter(peft_adapter("IA3", ROLES))
    ia3.attach(loaded)
    gains = adapters.build_adapter(schema.Gain(kind="gain", roles=["attn_out", "ffn_down"]))
    gains.attach(other)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p, delta in zip(ia3.parameters().values(), gains.parameters().values(), strict=True):
            delta.copy_(torch.randn(delta.shape, generator=generator))
            p.copy_((1 + delta).reshape(p.shape))
        ids = torch.arange(1, 25).reshape(2, 12)
        assert torch.equal(loaded.model(ids).logits, other.model(ids).logits)


def test_roles_and_target_modules_are_refused_together() -> None:
    words = ["debug=smoke", "method=lora_same_modules"]
    with pytest.raises(
        ConfigError,
        match=r"both adapter.roles and adapter.config.target_modules.*target_modules=null",
    ):
        composition.compose([*words, f"++adapter.config.target_modules={LAYERS}"])
    composition.compose([*words, "++adapter.config.target_modules=null"])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initial_values_that_change_the_pretrained_weights_are_refused(init: str) -> None:
    with pytest.raises(ConfigError, match="changes the pretrained weights when it is attached"):
        adapters.build_adapter(
            peft_adapter("LORA", r=4, target_modules=LAYERS, init_lora_weights=init)
        ).attach(tiny("llama"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_modules": ["q_proj"], "lora_bias": True}, "biases of layers that have none"),
        ({"target_modules": ["embed_tokens"]}, "the output head's too"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            "the output head's too",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_could_not_be_folded_afterwards_is_refused_beforehand(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        adapters.build_adapter(peft_adapter("LORA", r=4, **keys)).attach(
            tiny("llama", tie_word_embeddings=True)
        )


def test_any_other_type_from_the_command_line() -> None:
    """As docs/methods.md has it: the keys of the preset's own type go first."""
    text = (ROOT / "docs/methods.md").read_text()
    (words,) = re.findall(r"`(method=lora adapter\.peft_type=[^`]+)`", text)
    adapter = composition.compose(["debug=smoke", *words.split()]).adapter
    assert isinstance(adapter, schema.Peft) and adapter.peft_type == "LOHA"
    adapters.build_adapter(adapter).attach(tiny("llama"))


def test_an_adapter_that_does_not_start_as_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="LORA does not start as the pretrained model"):
        adapters.build_adapter(
            peft_adapter("LORA", r=4, target_modules=LAYERS, init_lora_weights=False)
        ).attach(tiny("llama"))


def test_lora_that_is_more_than_a_product_neither_restarts_nor_shifts() -> None:
    for keys in ({"use_dora": True}, {"bias": "all"}):
        loaded = tiny("gpt2")
        adapter = adapters.build_adapter(peft_adapter("LORA", r=4, target_modules=LAYERS, **keys))
        adapter.attach(loaded)
        with pytest.raises(
            ConfigError, match="PEFT's LORA with these settings does not offer handover=restart"
        ):
            adapter.restart()
    with pytest.raises(ConfigError, match=r"bias trains beside LORA.*bias: none"):
        adapter.keep_base()


def test_every_method_has_its_section() -> None:
    headings = re.findall(r"^### `(\w+)`", (ROOT / "docs/methods.md").read_text(), flags=re.M)
    assert sorted(headings) == presets.names("method")


def test_the_counts_in_the_documentation_are_those_of_params(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every method of `python -m gain_cl params model=smollm2`, none of which it may stumble
    over."""
    import json

    from gain_cl import cli

    assert cli.main(["params", "model=smollm2", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)["smollm2"]["methods"]
    sections = re.split(r"^### `", (ROOT / "docs/methods.md").read_text(), flags=re.M)[1:]
    told = {
        s.split("`")[0]: [
            int(n.replace(",", "")) for n in re.findall(r"\[([\d,]+)\]", s.split("\n## ")[0])
        ]
        for s in sections
    }
    assert counted == {
        method: (numbers or [0])[0] for method, numbers in told.items() if method != "given"
    }  # which trains nothing
    rates = {
        s.split("`")[0]: re.findall(r"[Rr]ate,? (\d(?:\.\d)?e-\d)", s.split("\n## ")[0])
        for s in sections
    }
    for method, found in rates.items():
        row = yaml.safe_load((presets.configs_dir() / "method" / f"{method}.yaml").read_text())
        assert [float(r) for r in found] in ([], [row["train"]["lr"]]), method


def test_rsloras_scale() -> None:
    """alpha / sqrt(r), not alpha / r."""
    moved = {}
    for rs in (False, True):
        loaded = tiny("llama")
        torch.manual_seed(0)
        adapter = adapters.build_adapter(
            peft_adapter("LORA", r=4, lora_alpha=8, use_rslora=rs, target_modules=LAYERS)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapter.attach(loaded)
        with torch.no_grad():
            for p in adapter.parameters().values():
                p.fill_(0.1)
        moved[rs] = adapter.shift().item()
    assert moved[True] == pytest.approx(4 * moved[False], rel=1e-6)  # (sqrt(r))^2
