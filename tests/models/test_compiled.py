"""Compiled layers and loss compute what is computed step by step, in training mode alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_adapters import ADAPTERS

from conftest import ListBlocks, tiny
from gain_cl import adapters, cli
from gain_cl.compose import composition
from gain_cl.config import schema
from gain_cl.errors import ConfigError
from gain_cl.guards.base import Guard
from gain_cl.measure import record
from gain_cl.models import compiled, forward, load, loss
from gain_cl.runs import train

TOKENS = np.random.default_rng(0).integers(1, 257, (8, 16))


def learned(
    family: str, method: str, backend: str | None, checkpointing: bool = False
) -> list[Any]:
    """Losses of four steps, the trained state, and the evaluated logits, with micro-batches of 3
    and 1; compiled, the adapter begins anew in between where it can."""
    torch.compiler.reset()
    loaded = tiny(family, **({"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3}))
    torch.manual_seed(0)
    adapter = adapters.build_adapter(ADAPTERS[method])
    adapter.attach(loaded)
    if checkpointing:
        load.checkpoint_activations(loaded.model)
    if backend:
        loaded.compiled = compiled.Compiled(loaded.model, backend)
    setup = schema.Train(steps=2, block=16, batch_tokens=64, lr=1e-2)
    blocks: Any = ListBlocks(TOKENS)
    found: list[Any] = []
    for again in (False, True):
        if again and adapter.restarts():
            torch.manual_seed(1)
            adapter.restart()
            if loaded.compiled is not None:
                loaded.compiled.anew()
        optimizer = train.optimizer(adapter, setup)
        rows = train.stage(
            loaded, adapter, Guard(), blocks, setup, optimizer, index=1, seed=0, micro_batch=3
        )
        found += [row["loss_nats"] for row in rows]
    if method == "gain_ffn":
        with adapter.disabled(), torch.no_grad():
            loaded.model.train()
            torch.manual_seed(0)
            found.append(forward.loss_sum(loaded, TOKENS).item())
    loaded.model.eval()
    adapter.absorb()
    with torch.no_grad():
        found.append(loaded.model(torch.from_numpy(TOKENS[:2])).logits.numpy())
    return found


@pytest.mark.parametrize(
    ("family", "method", "checkpointing"),
    [
        ("llama", "gain_ffn", False),
        ("gpt2", "gain_ffn", True),
        ("qwen2", "lora", True),
        ("gpt2", "lora", False),
        ("llama", "full", False),
    ],
)
def test_compiled_training_is_the_same(family: str, method: str, checkpointing: bool) -> None:
    plain, made = (learned(family, method, b, checkpointing) for b in (None, "aot_eager"))
    for a, b in zip(plain, made, strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=1e-5)


def test_evaluation_compiles_nothing() -> None:
    loaded, calls = tiny("llama"), []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph

    loaded.compiled = compiled.Compiled(loaded.model, backend)  # type: ignore[arg-type]
    with torch.no_grad():
        loaded.model(torch.from_numpy(TOKENS))
    assert not calls
    loaded.model.train()
    with torch.no_grad():
        loaded.body(torch.from_numpy(TOKENS))
    assert len(calls) == 1  # for all layers


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_place_is_the_loss(softcap: float | None, dtype: torch.dtype) -> None:
    found = []
    for form in (None, loss.cross_entropy_in_place):
        torch.manual_seed(0)
        hidden = torch.randn(50, 16).to(dtype).requires_grad_()
        weight, bias = torch.randn(97, 16).to(dtype).requires_grad_(), torch.randn(97).to(dtype)
        targets = torch.randint(0, 97, (50,))
        total = loss.sum_cross_entropy(hidden, weight, bias, targets, softcap, form)
        total.backward()
        found.append([total.detach(), hidden.grad, weight.grad])
    for a, b in zip(*found, strict=True):
        close = 1e-5 if dtype == torch.float32 else 2e-2
        assert (a - b).abs().max() <= close * a.abs().max()


def test_compiling_is_in_the_run_id_and_only_then() -> None:
    words = ["tasks=none", "debug=smoke"]
    plain = composition.compose(words, [], []).scientific()
    assert "compile" not in plain
    made = composition.compose([*words, "compute.compile=layers"], [], []).scientific()
    assert made == {**plain, "compile": "layers"}


def test_a_run_compiles_with_the_compiler_of_this_machine(tmp_path: Path) -> None:
    words = ["run", "debug=smoke", f"output_dir={tmp_path}/runs", f"results_dir={tmp_path}/results"]
    for more in ([], ["compute.compile=layers"]):
        assert cli.main([*words, *more]) == 0
    runs = [record.load(path) for path in (tmp_path / "results/runs").glob("*.json")]
    plain, made = sorted(runs, key=lambda run: run.record.config["compute"]["compile"] != "none")
    np.testing.assert_allclose(made.matrix, plain.matrix, rtol=1e-5)
    assert made.record.provenance["compile_seconds"] > 0
    assert "compile_seconds" not in plain.record.provenance


def test_a_machine_that_cannot_compile_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def refuses(*_: Any, **__: Any) -> Any:
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", refuses)
    with pytest.raises(ConfigError, match=r"torch cannot compile here.*use compute.compile=none"):
        compiled.try_compiler(torch.device("cpu"))
