"""Every adapter on every family: starts as the identity, trains only its own parameters, folds into the weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from conftest import FAMILIES, ListBlocks, tiny
from gain_cl import adapters, build, config, evaluate, models, presets, train
from gain_cl.adapters.gain import DiagonalGain, Gains, attach_gains
from gain_cl.errors import ConfigError, DataError
from gain_cl.files import sha256
from gain_cl.guards.base import Guard

ALL = {
    **{m: build.compose(["debug=smoke", f"method={m}"]).adapter for m in presets.names("method")},  # every shipped method
    "gain_ffn_output": config.Gain(kind="gain", roles=["attn_out", "ffn_down"], side="output"),
}
IDS = torch.arange(1, 25).reshape(2, 12)


@pytest.fixture(params=list(ALL))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def attach(loaded: models.Loaded, method: str) -> adapters.base.Adapter:
    torch.manual_seed(0)
    adapter = adapters.build(ALL[method])
    adapter.attach(loaded)
    return adapter


def logits(loaded: models.Loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(IDS).logits


def shake(adapter: adapters.base.Adapter) -> None:
    """Move the trained state away from the identity."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters().values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    adapter.after_step()


def settings(**keys: object) -> config.Train:
    return config.Train(**{"steps": 2, "block": 16, "batch_tokens": 64, "lr": 1e-3, **keys})  # type: ignore[arg-type]


def run_stage(loaded: models.Loaded, adapter: adapters.base.Adapter, setup: config.Train, micro: int | None = None) -> list[dict]:
    blocks = ListBlocks(np.random.default_rng(0).integers(1, 257, (8, setup.block)))
    return list(train.stage(loaded, adapter, Guard(), blocks, setup, train.optimizer(adapter, setup), index=1, seed=0, micro_batch=micro))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_starts_as_the_base_bit_for_bit(family: str, method: str, dtype: str) -> None:
    loaded = tiny(family, dtype)
    before = logits(loaded)
    attach(loaded, method)
    assert torch.equal(logits(loaded), before)


def test_trains_only_its_own_fp32_parameters_and_all_of_them(family: str, method: str) -> None:
    loaded = tiny(family, "bfloat16")
    frozen = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    adapter = attach(loaded, method)
    own = adapter.parameters()
    assert all(p.dtype == torch.float32 and p.requires_grad for p in own.values())
    before = {n: p.detach().clone() for n, p in own.items()}
    train.loss_sum(loaded, np.arange(1, 33).reshape(2, 16)).backward()
    no_gradient = [n for n, p in own.items() if p.grad is None]
    assert not no_gradient
    for p in own.values():
        p.grad = None
    run_stage(loaded, adapter, settings(lr=1e-2, pack="stream"))
    still = [n for n, p in own.items() if torch.equal(p, before[n])]
    # a position that no text reaches and q/k of a uniform attention have exact zero gradients in these tiny models
    assert len(still) <= (0 if method != "full" else 2), still
    if method != "full":
        now = {n.replace(".base_layer", ""): p for n, p in loaded.model.named_parameters()}
        assert all(torch.equal(now[n], p) for n, p in frozen.items())


def test_absorbed_weights_compute_the_same(family: str, method: str) -> None:
    loaded = tiny(family)
    adapter = attach(loaded, method)
    shake(adapter)
    before = logits(loaded)
    adapter.absorb()
    after = logits(loaded)
    assert not any("lora" in n for n, _ in loaded.model.named_parameters())
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_the_identity_differs_from_the_shaken(family: str, method: str) -> None:
    """So that the tests above cannot pass on an adapter that does nothing."""
    loaded = tiny(family)
    before = logits(loaded)
    shake(attach(loaded, method))
    assert (logits(loaded) - before).abs().max() > 1e-3 * before.abs().max()


def test_state_rebuilds_the_model(method: str) -> None:
    loaded = tiny("llama")
    adapter = attach(loaded, method)
    shake(adapter)
    other = tiny("llama")
    fresh = attach(other, method)
    fresh.load_state(adapter.state())
    assert torch.equal(logits(other), logits(loaded))
    with pytest.raises(DataError, match="adapter state"):
        fresh.load_state({})


def test_counts_are_the_widths() -> None:
    widths = {
        m: sum(p.numel() for p in attach(tiny("llama"), m).parameters().values()) for m in ("gain_attn", "gain_ffn", "gain_ffn_output")
    }
    assert widths == {"gain_attn": 2 * 32, "gain_ffn": 2 * (32 + 48), "gain_ffn_output": 2 * (32 + 32)}


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_gain_is_the_diagonal_on_its_side(side: str, name: str) -> None:
    """Against explicit matrices, on a square layer, where the wrong axis would raise no error, with a bias."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(6, 6) if name == "linear" else Conv1D(6, 6)
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    weight_OI = layer.weight.detach().clone() if name == "linear" else layer.weight.detach().T.clone()  # type: ignore[operator]
    bias, x, s = layer.bias.detach().clone(), torch.randn(5, 6), 1 + torch.randn(6)  # type: ignore[operator]
    gains = Gains({"layer": layer}, side)  # type: ignore[arg-type]
    with torch.no_grad():
        gains.gains["layer"].delta.copy_(s - 1)
    expected = x @ (weight_OI @ torch.diag(s)).T + bias if side == "input" else (x @ weight_OI.T + bias) @ torch.diag(s)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    gains.absorb()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_gains_equal_pefts_ia3(family: str, side: str) -> None:
    """PEFT's (IA)^3 with every target declared feedforward (input side), or none (output side), is the same function."""
    import peft

    loaded, other = tiny(family), tiny(family)
    gains = attach_gains(loaded.model, side=side)  # type: ignore[arg-type]
    names = sorted({n.split(".", 3)[-1] for n in gains.layers})
    reference = peft.get_peft_model(
        other.model,
        peft.IA3Config(target_modules=names, feedforward_modules=names if side == "input" else [], fan_in_fan_out=family == "gpt2"),
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
    plain_x, plain_delta = x.detach().clone().requires_grad_(), gain.delta.detach().clone().requires_grad_()
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
    gains = attach_gains(loaded.model, names={"attn_out": "self_attn.o_proj", "ffn_down": "mlp.down_proj"})
    assert len(gains.layers) == 4
    with pytest.raises(ConfigError, match=r"no module matches ffn_down='mlp\.up'"):
        attach_gains(loaded.model, names={"attn_out": "self_attn.o_proj", "ffn_down": "mlp.up"})


def test_peft_mistakes_are_one_line() -> None:
    for peft_type, keys, match in (
        ("LORRA", {}, "no type 'LORRA'"),
        ("LORA", {"rank": 4}, "no key 'rank'"),
        ("LORA", {"r": 4, "target_modules": ["nowhere"]}, "PEFT refuses"),
        ("LORA", {"r": 4, "target_modules": ["lm_head"]}, "output head"),
    ):
        with pytest.raises(ConfigError, match=match):
            adapters.build(config.Peft(kind="peft", peft_type=peft_type, config=keys)).attach(tiny("llama"))


def test_full_keeps_fp32_masters_of_a_bf16_model() -> None:
    loaded = tiny("llama", "bfloat16")
    adapter = attach(loaded, "full")
    run_stage(loaded, adapter, settings(lr=1e-5))
    weights = dict(loaded.model.named_parameters())
    moved = [n for n, p in adapter.parameters().items() if not torch.equal(p, p.bfloat16().float())]
    assert len(moved) == len(adapter.parameters())  # masters keep what bf16 weights round away
    assert all(torch.equal(weights[n], p.bfloat16()) for n, p in adapter.parameters().items())


def test_evaluation_sees_the_adapter(family: str) -> None:
    loaded = tiny(family)
    adapter = attach(loaded, "gain_ffn")
    window = evaluate.windows(np.arange(1, 30), loaded.prefix_id, 32, 32)
    assert len(window) == 1
    before = train.loss_sum(loaded, np.arange(1, 17)[None]).item()
    shake(adapter)
    assert train.loss_sum(loaded, np.arange(1, 17)[None]).item() != before


def test_every_family_in_roles_is_tested() -> None:
    assert set(models.ROLES) == set(FAMILIES)


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
