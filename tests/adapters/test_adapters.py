"""Every adapter on every family: starts as the identity, trains only its own parameters, folds into
the weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import test_families
import torch
import yaml
from pydantic import TypeAdapter
from torch import nn

from conftest import FAMILIES, ListBlocks, tiny
from gain_cl import adapters
from gain_cl.adapters.gain import DiagonalGain, Gains, attach_gains
from gain_cl.adapters.peft import multiply_as_input
from gain_cl.config import presets, schema
from gain_cl.errors import ConfigError, DataError
from gain_cl.guards.base import Guard
from gain_cl.measure import perplexity
from gain_cl.models import families, forward, load
from gain_cl.runs import train
from gain_cl.system.files import sha256

ADAPTER: TypeAdapter[schema.Adapter] = TypeAdapter(schema.Adapter)


def shipped(method: str) -> schema.Adapter:
    """The adapter of a method's YAML: composing all of them by Hydra would take a minute."""

    def read(group: str, name: str) -> dict[str, Any]:
        text = (presets.configs_dir() / group / f"{name}.yaml").read_text()
        return dict(yaml.safe_load(text))

    row = read("method", method)
    (base,) = [
        entry["/adapter"]
        for entry in row["defaults"]
        if isinstance(entry, dict) and "/adapter" in entry
    ]
    return ADAPTER.validate_python({**read("adapter", base), **row.get("adapter", {})})


ADAPTERS = {m: shipped(m) for m in presets.names("method") if m != "given"}  # which trains nothing
NAMES = sorted(ADAPTERS, key=lambda m: (len(m), m))
ALL = {
    m: ADAPTERS[m]
    for i, m in enumerate(NAMES)
    if ADAPTERS[m] not in [ADAPTERS[n] for n in NAMES[:i]]
}
"""Each adapter that ships, under the shortest name of a method that has it (ewc: full
fine-tuning)."""

MAIN = ("gpt2", "llama", "qwen2", "gpt_neox")
CASES = [
    pytest.param(
        f, d, m, marks=[] if f in MAIN and (d == "float32" or f == "llama") else pytest.mark.slow
    )
    for f in FAMILIES
    for d in ("float32", "bfloat16")
    for m in ALL
    if d == "float32" or f in MAIN
]
contract = pytest.mark.parametrize(("family", "dtype", "method"), CASES)
FAMILY = [pytest.param(f, marks=[] if f in MAIN else pytest.mark.slow) for f in FAMILIES]

REFUSED = {
    ("oft", "gpt2"): "OFT on gpt2",
    **{
        ("ia3", family): f"IA3 on {family}"  # PEFT names no layers of these
        for family in ("cohere", "granite", "ministral3", "olmo2", "olmo3", "phi3", "smollm3")
    },
}
"""(method, family) -> what the one line of the refusal names."""

ULPS = {"float32": 1e-6, "bfloat16": 0.02}
"""dtype -> rounding, as a share of the largest logit."""

IDS = torch.arange(1, 25).reshape(2, 12)


made = functools.cache(tiny)


def copy_of(family: str, dtype: str) -> load.Loaded:
    """What tiny makes, in a fifth of the time."""
    original: load.Loaded = made(family, dtype)
    return dataclasses.replace(original, model=copy.deepcopy(original.model))


@pytest.fixture
def loaded(family: str, dtype: str, method: str) -> load.Loaded:
    """A tiny model; a pair that is refused has no contract, but says so."""
    loaded = copy_of(family, dtype)
    if (method, family) in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[method, family]):
            attach(loaded, method)
        pytest.skip("refused by name")
    return loaded


def attach(loaded: load.Loaded, method: str, seed: int = 0) -> adapters.base.Adapter:
    torch.manual_seed(seed)
    adapter = adapters.build_adapter(ADAPTERS[method])
    adapter.attach(loaded)
    return adapter


def logits(loaded: load.Loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(IDS).logits


def restarts(method: str) -> bool:
    return not isinstance(ADAPTERS[method], schema.Full) and method not in ("dora", "oft")


def shake(adapter: adapters.base.Adapter, size: float = 0.05) -> None:
    """Move the trained state away from the identity."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters().values():
            p.add_(size * torch.randn(p.shape, generator=generator))
    adapter.after_step()


def settings(**keys: object) -> schema.Train:
    return schema.Train(**{"steps": 2, "block": 16, "batch_tokens": 64, "lr": 1e-3, **keys})  # type: ignore[arg-type]


def run_stage(
    loaded: load.Loaded,
    adapter: adapters.base.Adapter,
    setup: schema.Train,
    micro: int | None = None,
) -> list[dict]:
    blocks = ListBlocks(np.random.default_rng(0).integers(1, 257, (8, setup.block)))
    return list(
        train.stage(
            loaded,
            adapter,
            Guard(),
            blocks,
            setup,
            train.optimizer(adapter, setup),
            index=1,
            seed=0,
            micro_batch=micro,
        )
    )


@contract
def test_starts_as_the_base(loaded: load.Loaded, method: str, dtype: str) -> None:
    before = logits(loaded)
    attach(loaded, method)
    now = logits(loaded)
    if method == "dora":  # PEFT divides a weight's length by itself, recomputed
        assert (now - before).abs().max() <= ULPS[dtype] * before.abs().max()
    else:
        assert torch.equal(now, before)


@contract
def test_trains_only_its_own_fp32_parameters_and_all_of_them(
    loaded: load.Loaded, method: str
) -> None:
    frozen = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    adapter = attach(loaded, method)
    own = adapter.parameters()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in own.values())
    before = {n: p.detach().clone() for n, p in own.items()}
    forward.loss_sum(loaded, np.arange(1, 33).reshape(2, 16)).backward()
    no_gradient = [n for n, p in own.items() if p.grad is None]
    assert not no_gradient
    for p in own.values():
        p.grad = None
    run_stage(loaded, adapter, settings(lr=1e-2, pack="stream"))
    still = [n for n, p in own.items() if torch.equal(p, before[n])]
    # a position that no text reaches and q/k of a uniform attention have exact zero gradients in
    # these tiny models
    assert len(still) <= (0 if method not in ("full", "ewc") else 2), still
    if not isinstance(ADAPTERS[method], schema.Full):
        now = {n.replace(".base_layer", ""): p for n, p in loaded.model.named_parameters()}
        assert all(torch.equal(now[n], p) for n, p in frozen.items())


@contract
def test_absorbed_weights_compute_the_same(loaded: load.Loaded, method: str, dtype: str) -> None:
    names = {n for n, _ in loaded.model.named_parameters()}
    adapter = attach(loaded, method)
    shake(adapter)
    before = logits(loaded)
    adapter.absorb()
    after = logits(loaded)
    assert {n for n, _ in loaded.model.named_parameters()} == names, "the adapter is gone"
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert (after - before).abs().max() <= (
        1e-5 if dtype == "float32" else 0.05
    ) * before.abs().max()


@contract
def test_the_identity_differs_from_the_shaken(loaded: load.Loaded, method: str) -> None:
    """So that the tests above cannot pass on an adapter that does nothing."""
    before = logits(loaded)
    shake(attach(loaded, method), 0.2)
    assert (logits(loaded) - before).abs().max() > 1e-3 * before.abs().max()


@contract
def test_state_rebuilds_the_model(
    loaded: load.Loaded, method: str, family: str, dtype: str
) -> None:
    adapter = attach(loaded, method)
    shake(adapter)
    other = copy_of(family, dtype)
    fresh = attach(other, method, seed=1)
    fresh.load_state(adapter.state())
    assert torch.equal(logits(other), logits(loaded))
    with pytest.raises(DataError, match="adapter state"):
        fresh.load_state({})


@contract
def test_restart_keeps_the_function_and_trains_the_new_part(
    loaded: load.Loaded, method: str, family: str, dtype: str
) -> None:
    adapter = attach(loaded, method)
    if not restarts(method):
        with pytest.raises(ConfigError, match="does not offer handover=restart"):
            adapter.restart()
        return
    for stage in (1, 2):
        shake(adapter)
        before, old = logits(loaded), adapter.state()
        adapter.restart()
        assert (logits(loaded) - before).abs().max() <= ULPS[dtype] * before.abs().max()
        names = adapter.parameters().keys()
        assert len(names) == len(old) / stage or isinstance(ADAPTERS[method], schema.Gain)
        run_stage(loaded, adapter, settings(lr=1e-2))
        now = adapter.state()
        kept = {n: t for n, t in now.items() if n not in names}
        assert kept and (adapter.parameters().keys() == names)
        if isinstance(ADAPTERS[method], schema.Peft):
            assert old.keys() == kept.keys()
            assert all(torch.equal(old[n], t) for n, t in kept.items()), (
                "what earlier stages learned stays"
            )
        assert not torch.equal(logits(loaded), before)
    after, state = logits(loaded), adapter.state()
    other = copy_of(family, dtype)
    fresh = attach(other, method, seed=1)
    fresh.load_state(state)
    assert torch.equal(logits(other), after)
    assert fresh.parameters().keys() == adapter.parameters().keys()
    fresh.absorb()
    assert (logits(other) - after).abs().max() <= (
        1e-5 if dtype == "float32" else 0.05
    ) * after.abs().max()


@contract
def test_disabled_is_the_base(loaded: load.Loaded, method: str) -> None:
    before = logits(loaded)
    adapter = attach(loaded, method)
    adapter.keep_base()
    shake(adapter)
    if restarts(method):
        adapter.restart()
        shake(adapter)
    tuned, names = logits(loaded), adapter.parameters().keys()
    loss = forward.loss_sum(loaded, np.arange(1, 33).reshape(2, 16))
    with adapter.disabled():
        assert torch.equal(logits(loaded), before)
    loss.backward()
    assert all(p.grad is not None for p in adapter.parameters().values()), (
        "a graph made before goes on"
    )
    assert adapter.parameters().keys() == names
    assert torch.equal(logits(loaded), tuned)


@pytest.mark.parametrize(
    ("family", "dtype", "method"), [c for c in CASES if c.values[1] == "float32"]
)  # absorbed bf16 is rounded
def test_shift_is_the_distance_of_the_absorbed_weights(loaded: load.Loaded, method: str) -> None:
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    adapter = attach(loaded, method)
    adapter.keep_base()
    if method in ("dora", "oft"):
        with pytest.raises(ConfigError, match="the distance of its effective weights"):
            adapter.shift()
        return
    shake(adapter)
    if restarts(method):
        adapter.restart()
        shake(adapter)
    shift = adapter.shift()
    shift.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters().values())
    adapter.absorb()
    explicit = sum((p - before[n]).square().sum() for n, p in loaded.model.named_parameters())
    torch.testing.assert_close(shift.detach(), explicit, rtol=1e-4, atol=1e-7)


def test_checks_know_what_adapters_can() -> None:
    """The tables of checks.py, which are read before torch is imported, say what the adapters
    do."""
    assert {
        a.peft_type for m, a in ALL.items() if isinstance(a, schema.Peft) and restarts(m)
    } == set(schema.KNOWN_CHANGE)
    assert {
        a.peft_type
        for m, a in ALL.items()
        if isinstance(a, schema.Peft) and m not in ("dora", "oft")
    } == set(schema.KNOWN_CHANGE)


def test_counts_are_the_widths() -> None:
    widths = {
        m: sum(p.numel() for p in attach(tiny("llama"), m).parameters().values())
        for m in ("gain_attn", "gain_ffn", "gain_ffn_output")
    }
    assert widths == {
        "gain_attn": 2 * 32,
        "gain_ffn": 2 * (32 + 48),
        "gain_ffn_output": 2 * (32 + 32),
    }


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_gain_is_the_diagonal_on_its_side(side: str, name: str) -> None:
    """Against explicit matrices, on a square layer, where the wrong axis would raise no error, with
    a bias."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(6, 6) if name == "linear" else Conv1D(6, 6)
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    weight_OI = (
        layer.weight.detach().clone() if name == "linear" else layer.weight.detach().T.clone()
    )  # type: ignore[operator]
    bias, x, s = layer.bias.detach().clone(), torch.randn(5, 6), 1 + torch.randn(6)  # type: ignore[operator]
    gains = Gains()
    gains.put({"layer": layer}, side)  # type: ignore[arg-type]
    with torch.no_grad():
        gains.gains["layer"].delta.copy_(s - 1)
    expected = (
        x @ (weight_OI @ torch.diag(s)).T + bias
        if side == "input"
        else (x @ weight_OI.T + bias) @ torch.diag(s)
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    gains.absorb()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_gains_equal_pefts_ia3(family: str, side: str) -> None:
    """PEFT's (IA)^3 with every target declared feedforward (input side), or none (output side), is
    the same function."""
    import peft

    loaded, other = tiny(family), tiny(family)
    gains = attach_gains(loaded.model, side=side)  # type: ignore[arg-type]
    names = sorted({n.split(".", 3)[-1] for n in gains.layers})
    reference = peft.get_peft_model(
        other.model,
        peft.IA3Config(
            target_modules=names,
            feedforward_modules=names if side == "input" else [],
            fan_in_fan_out=family == "gpt2",
        ),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in gains.parameters().items():
            s = torch.rand(p.shape, generator=generator) + 0.5
            p.copy_(s - 1)
            vector = reference.base_model.model.get_submodule(name).ia3_l["default"]
            vector.copy_((p + 1).reshape(vector.shape))
    assert torch.equal(logits(loaded), logits(other))


def test_one_step_at_a_small_rate_moves_every_gain() -> None:
    """S kept in bf16 near 1 would not move at all at this rate."""
    loaded = tiny("llama", "bfloat16")
    adapter = attach(loaded, "gain_ffn")
    run_stage(loaded, adapter, settings(steps=1, lr=1e-4, warmup=0.0))
    assert all((p != 0).all() for p in adapter.parameters().values())


def test_gradient_of_the_gain_equals_autograds() -> None:
    torch.manual_seed(0)
    gain = DiagonalGain(6, torch.device("cpu"))
    x, upstream = torch.randn(3, 150, 6, requires_grad=True), torch.randn(3, 150, 6)
    nn.init.normal_(gain.delta)
    (gain(x) * upstream).sum().backward()
    plain_x, plain_delta = (
        x.detach().clone().requires_grad_(),
        gain.delta.detach().clone().requires_grad_(),
    )
    (plain_x * (1 + plain_delta) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gain.delta.grad, plain_delta.grad, rtol=1e-5, atol=1e-5)


def test_bf16_gain_multiplies_in_fp32() -> None:
    gain = DiagonalGain(1, torch.device("cpu"))
    with torch.no_grad():
        gain.delta.fill_(0.003)  # below half a bf16 step at 1: S rounded to bf16 would do nothing
    x = torch.linspace(1, 2, 256, dtype=torch.bfloat16)[:, None]
    assert (gain(x) != x).float().mean() > 0.3


def test_merging_many_times_is_worse_than_once() -> None:
    """Why base weights stay and the state is cumulative."""
    torch.manual_seed(0)
    w = torch.randn(64, 64).bfloat16()
    parts = [1 + 0.01 * torch.randn(64) for _ in range(8)]
    exact = w.float() * torch.stack(parts).prod(0)
    step = w
    for s in parts:
        step = (step.float() * s).bfloat16()
    once = exact.bfloat16()
    error = lambda x: ((x.float() - exact).norm() / exact.norm()).item()  # noqa: E731
    assert error(step) > 2 * error(once)


def test_absorbed_model_is_an_ordinary_checkpoint(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    for family in ("gpt2", "llama", "mistral", "qwen2"):
        loaded = tiny(family)
        adapter = attach(loaded, "gain_ffn")
        shake(adapter)
        before = logits(loaded)
        adapter.absorb()
        loaded.model.save_pretrained(tmp_path / family)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        with torch.no_grad():
            difference = (again(IDS).logits - before).abs().max()
        assert difference <= 1e-5 * before.abs().max()
        assert sha256(tmp_path / family / "model.safetensors")


def test_unknown_family_lists_candidates_and_the_key() -> None:
    loaded = tiny("llama")
    loaded.model.config.model_type = "newcomer"
    with pytest.raises(ConfigError, match=r"model\.roles.*self_attn\.o_proj"):
        attach_gains(loaded.model)
    gains = attach_gains(
        loaded.model, names={"attn_out": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
    )
    assert len(gains.layers) == 4
    with pytest.raises(ConfigError, match=r"no module matches ffn_down='mlp\.up'"):
        attach_gains(loaded.model, names={"attn_out": "self_attn.o_proj", "ffn_down": "mlp.up"})


def test_peft_mistakes_are_one_line() -> None:
    for peft_type, keys, match in (
        ("LORRA", {}, "no type 'LORRA'"),
        ("LORA", {"rank": 4}, "no key 'rank'"),
        ("LORA", {"r": 4, "target_modules": ["q_proj", "nowhere"]}, "no module matches nowhere"),
        ("LORA", {"r": 4, "target_modules": ["lm_head"]}, "output head"),
    ):
        with pytest.raises(ConfigError, match=match):
            adapters.build_adapter(
                schema.Peft(kind="peft", peft_type=peft_type, config=keys)
            ).attach(tiny("llama"))


def test_full_keeps_fp32_masters_of_a_bf16_model() -> None:
    loaded = tiny("llama", "bfloat16")
    adapter = attach(loaded, "full")
    run_stage(loaded, adapter, settings(lr=1e-5))
    weights = dict(loaded.model.named_parameters())
    moved = [n for n, p in adapter.parameters().items() if not torch.equal(p, p.bfloat16().float())]
    assert len(moved) == len(adapter.parameters())  # masters keep what bf16 weights round away
    assert all(torch.equal(weights[n], p.bfloat16()) for n, p in adapter.parameters().items())


@pytest.mark.parametrize("family", FAMILY)
def test_evaluation_sees_the_adapter(family: str) -> None:
    loaded = tiny(family)
    adapter = attach(loaded, "gain_ffn")
    window = perplexity.windows(np.arange(1, 30), loaded.prefix_id, 32, 32)
    assert len(window) == 1
    before = forward.loss_sum(loaded, np.arange(1, 17)[None]).item()
    shake(adapter)
    assert forward.loss_sum(loaded, np.arange(1, 17)[None]).item() != before


def test_every_family_in_roles_is_tested() -> None:
    """Those of experts, whose feed-forward plays no role, are in the walk of test_families."""
    dense = {family for family, table in families.ROLES.items() if "ffn_down" in table}
    assert dense == set(FAMILIES)
    assert families.ROLES.keys() - dense <= set(test_families.FAMILIES)


def test_gains_can_be_taken_off() -> None:
    loaded = tiny("llama")
    before = logits(loaded)
    gains = attach_gains(loaded.model)
    with torch.no_grad():
        next(iter(gains.parameters().values())).fill_(1.0)
    assert not torch.equal(logits(loaded), before)
    gains.remove()
    assert torch.equal(logits(loaded), before)
    assert copy.deepcopy(loaded.model) is not None


def test_lora_multiplies_as_its_input_with_fp32_masters() -> None:
    """What a GPU does for a bf16 model. In fp32 nothing changes."""
    for dtype, close in (("float32", 0.0), ("bfloat16", 0.05)):
        found = []
        for own in (False, True):
            loaded = tiny("llama", dtype)
            torch.manual_seed(0)
            adapter: Any = adapters.build_adapter(ADAPTERS["lora"])
            adapter.attach(loaded)
            for name, p in adapter.parameters().items():
                p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
            if own:
                multiply_as_input(adapter._layers())
            nats = forward.loss_sum(loaded, np.arange(1, 25).reshape(2, 12))
            nats.backward()
            grads = [p.grad for p in adapter.parameters().values()]
            assert all(g is not None and g.dtype == torch.float32 for g in grads)
            found.append(torch.cat([nats.detach()[None], *map(torch.flatten, grads)]))
        far = (found[0] - found[1]).abs()
        assert far[0] <= close * found[0][0]
        assert far[1:].max() <= close * found[0][1:].abs().max()
        state = adapter.state()
        adapter.absorb()
        assert all(t.dtype == torch.float32 for t in state.values())
