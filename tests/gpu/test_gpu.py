"""What only a GPU can show: pytest -m gpu. GAIN_CL_GPU_TESTS=cpu rehearses these tests without one.

Whole runs come last: they take longest, and time on a GPU may end."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_adapters import ADAPTERS, ALL, REFUSED

from conftest import ListBlocks, tiny
from gain_cl import adapters, cli
from gain_cl.config import schema
from gain_cl.domains.stream import Doc
from gain_cl.errors import DataError
from gain_cl.guards.base import Guard
from gain_cl.measure import perplexity
from gain_cl.models import compiled, forward, load
from gain_cl.models.load import Loaded
from gain_cl.runs import train

REHEARSAL = os.environ.get("GAIN_CL_GPU_TESTS") == "cpu"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REHEARSAL and not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]

ROUNDING = {"float32": 2e-5, "bfloat16": 0.03}
"""dtype -> how far logits may be apart, as a share of the largest."""

GUARDED = (
    "ewc",
    "replay",
    "self_replay",
    "kl_base",
    "l2_base",
    "o_lora",
    "lora_ema",
    "lora_ewc",
    "lora_kl",
    "joint",
    "individual",
)
made = functools.cache(tiny)


def on_device(family: str, dtype: str, **keys: Any) -> Loaded:
    original: Loaded = made(family, dtype) if not keys else tiny(family, dtype, **keys)
    model = copy.deepcopy(original.model).to(DEVICE)
    return dataclasses.replace(original, model=model, device=DEVICE)


def attach(loaded: Loaded, method: str) -> adapters.base.Adapter:
    torch.manual_seed(0)
    adapter = adapters.build_adapter(ADAPTERS[method])
    adapter.attach(loaded)
    return adapter


def logits(loaded: Loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(torch.arange(1, 25, device=DEVICE).reshape(2, 12)).logits.float()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def learn(loaded: Loaded, adapter: adapters.base.Adapter, **keys: Any) -> list[dict[str, Any]]:
    micro, guard = keys.pop("micro_batch", None), keys.pop("guard", None) or Guard()
    optimizer = keys.pop("optimizer", None)
    setup = schema.Train(**{"steps": 2, "block": 16, "batch_tokens": 64, "lr": 1e-3, **keys})  # type: ignore[arg-type]
    blocks: Any = ListBlocks(np.random.default_rng(0).integers(1, 257, (32, setup.block)))
    optimizer = optimizer or train.optimizer(adapter, setup)
    return list(
        train.stage(
            loaded, adapter, guard, blocks, setup, optimizer, index=1, seed=0, micro_batch=micro
        )
    )


@pytest.mark.parametrize("method", list(ALL))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_starts_as_the_base_learns_and_folds(
    method: str, family: str, dtype: str
) -> None:
    if (method, family) in REFUSED:
        pytest.skip("refused by name")
    loaded = on_device(family, dtype)
    before = logits(loaded)
    adapter = attach(loaded, method)
    assert apart(logits(loaded), before) <= ROUNDING[dtype]
    state = {name: p.detach().clone() for name, p in adapter.parameters().items()}
    assert all(p.device.type == DEVICE.type and p.dtype == torch.float32 for p in state.values())
    rows = learn(loaded, adapter)
    assert all(np.isfinite(row["loss_nats"]) and row["grad_norm"] > 0 for row in rows)
    assert any(not torch.equal(p, state[name]) for name, p in adapter.parameters().items())
    tuned = logits(loaded)
    adapter.absorb()
    assert apart(logits(loaded), tuned) <= ROUNDING[dtype]


def test_the_gpu_agrees_with_the_cpu() -> None:
    """Losses of the same steps of gain_ffn and LoRA in fp32."""
    for method in ("gain_ffn", "lora"):
        losses, drawn = [], None
        for loaded in (on_device("llama", "float32"), copy.deepcopy(made("llama", "float32"))):
            adapter = attach(loaded, method)
            drawn = drawn or adapter.state()  # LoRA's A is drawn on the device
            adapter.load_state(drawn)
            losses.append([row["loss_nats"] for row in learn(loaded, adapter, steps=4)])
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_memory_that_runs_out_halves_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = train.loss_sum

    def greedy(loaded: Any, tokens: Any, *more: Any) -> torch.Tensor:
        if len(tokens) > 1:
            if REHEARSAL:
                raise torch.OutOfMemoryError("CUDA out of memory")
            torch.empty(
                2**44, dtype=torch.uint8, device=DEVICE
            )  # 16 TiB: the allocator itself refuses
        return real(loaded, tokens, *more)

    loaded = on_device("llama", "float32")
    whole = learn(loaded, attach(loaded, "gain_ffn"))
    monkeypatch.setattr(train, "loss_sum", greedy)
    loaded = on_device("llama", "float32")
    halved = learn(loaded, attach(loaded, "gain_ffn"))
    assert [row["micro_batch"] for row in halved] == [1, 1]
    np.testing.assert_allclose(
        [r["loss_nats"] for r in halved], [r["loss_nats"] for r in whole], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("method", "dtype", "checkpointing"),
    [
        ("gain_ffn", "float32", False),
        ("gain_ffn", "bfloat16", False),
        ("gain_ffn", "bfloat16", True),
        ("lora", "float32", True),
        ("lora", "bfloat16", False),
        ("full", "bfloat16", False),
    ],
)
def test_compiled_layers_equal_eager_ones(method: str, dtype: str, checkpointing: bool) -> None:
    """compute.compile=layers, with the loss, through the adapter's parameters."""
    tokens = np.random.default_rng(0).integers(1, 257, (4, 32))
    found = []
    for made in (False, True):
        loaded = on_device("llama", dtype)
        adapter = attach(loaded, method)
        if checkpointing:
            load.checkpoint_activations(loaded.model)
        if made:
            loaded.compiled = compiled.Compiled(
                loaded.model, "aot_eager" if REHEARSAL else "inductor"
            )
        loaded.model.train()
        loss = forward.loss_sum(loaded, tokens) / tokens.size
        loss.backward()
        grads = [p.grad.flatten() for p in adapter.parameters().values() if p.grad is not None]
        found.append((loss.item(), torch.cat(grads)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5 if dtype == "float32" else 3e-3)
    assert apart(found[1][1], found[0][1]) <= (1e-3 if dtype == "float32" else 0.1)


def test_compiled_training_goes_on_through_micro_batches_and_a_restart() -> None:
    """Losses of steps with 3 and 1 sequences a forward pass, before and after a restart."""
    losses = []
    for made in (False, True):
        loaded = on_device("llama", "float32")
        adapter = attach(loaded, "gain_ffn")
        if made:
            loaded.compiled = compiled.Compiled(
                loaded.model, "aot_eager" if REHEARSAL else "inductor"
            )
        rows = learn(loaded, adapter, micro_batch=3)
        adapter.restart()
        if loaded.compiled is not None:
            loaded.compiled.anew()
        rows += learn(loaded, adapter, micro_batch=3)
        losses.append([row["loss_nats"] for row in rows])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("method", ["gain_ffn", "full"])
def test_a_step_that_is_not_finite_changes_nothing(method: str) -> None:
    class Broken(Guard):
        def penalty(self) -> torch.Tensor:
            return next(iter(adapter.parameters().values())).sum() * float("nan")

    loaded = on_device("llama", "bfloat16")
    adapter = attach(loaded, method)
    learn(loaded, adapter)
    before, tuned = adapter.state(), logits(loaded)
    with pytest.raises(DataError, match="the gradient is not finite"):
        learn(loaded, adapter, guard=Broken())
    assert all(torch.equal(t, before[name]) for name, t in adapter.state().items())
    assert torch.equal(logits(loaded), tuned)


def test_an_optimiser_goes_on_from_its_saved_state() -> None:
    found = []
    for saved in (False, True):
        loaded = on_device("llama", "float32")
        adapter = attach(loaded, "gain_ffn")
        setup = schema.Train(steps=2, block=16, batch_tokens=64, lr=1e-3)
        optimizer = train.optimizer(adapter, setup)
        learn(loaded, adapter, optimizer=optimizer)
        if saved:
            state, optimizer = (
                train.optimizer_state(optimizer, adapter),
                train.optimizer(adapter, setup),
            )
            train.load_optimizer_state(optimizer, adapter, state)
        learn(loaded, adapter, optimizer=optimizer)
        found.append(torch.cat([p.detach().flatten() for p in adapter.parameters().values()]))
    assert apart(found[1], found[0]) <= 1e-6


def test_a_model_is_loaded_onto_the_device(tmp_path: Path) -> None:
    original = made("llama", "bfloat16")
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    settings = schema.Model(name="saved", path=str(tmp_path), dtype="bfloat16")
    loaded = load.load_model(settings, DEVICE)
    assert {p.device.type for p in loaded.model.parameters()} == {DEVICE.type}
    for name, p in original.model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name).cpu(), p)


@pytest.mark.skipif(REHEARSAL, reason="Triton needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_the_benchmark_are_the_formula(dtype: torch.dtype) -> None:
    from bench_kernels import Scale, SwiGLU

    from gain_cl.adapters.gain import _Scale

    torch.manual_seed(0)
    gate, up, grad = (torch.randn(3, 77, 1000, device=DEVICE).to(dtype) for _ in range(3))
    s = 1 + 0.1 * torch.randn(1000, device=DEVICE)

    def run(f: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
        own = [x.detach().clone().requires_grad_() for x in inputs]
        y = f(*own)
        y.backward(grad)
        return [y.detach().float(), *(x.grad.float() for x in own)]  # type: ignore[union-attr]

    plain = lambda a, b, s: (torch.nn.functional.silu(a.float()) * b.float() * s).to(dtype)  # noqa: E731
    for ours, reference in (
        (run(Scale.apply, gate, s), run(_Scale.apply, gate, s)),
        (run(SwiGLU.apply, gate, up, s), run(plain, gate, up, s)),
    ):
        for a, b in zip(ours, reference, strict=True):
            assert apart(a, b) <= (1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_evaluation_batch_1_equals_batch_8(family: str) -> None:
    loaded, rng = on_device(family, "float32"), np.random.default_rng(0)
    lengths = [40, 3, 17, 33, 60, 5, 29, 2, 51]
    docs = [
        Doc(f"{i:016x}", rng.integers(1, 257, n).astype(np.uint32), np.arange(1, n + 1) * 2)
        for i, n in enumerate(lengths)
    ]
    one, eight = (perplexity.score(loaded, docs, 48, 32, batch=b) for b in (1, 8))
    np.testing.assert_allclose(one.nll_nats, eight.nll_nats, rtol=1e-5)


def smoke(folder: Path, *words: str) -> list[str]:
    return [
        "run", "debug=smoke", f"compute={'cpu' if REHEARSAL else 'cuda'}", f"output_dir={folder}/runs", f"results_dir={folder}/results", *words,
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["gain_ffn", "lora", *GUARDED])
def test_the_whole_procedure(method: str, tmp_path: Path) -> None:
    assert cli.main(smoke(tmp_path, f"method={method}")) == 0
    assert list((tmp_path / "results/runs").glob("*.json"))


def hashes(folder: Path) -> dict[str, str]:
    """Of scores and trained weights."""
    found = [
        *folder.glob("results/runs/*.parquet"),
        *folder.glob("runs/*/stages/*/adapter.safetensors"),
        *folder.glob("runs/*/matrix.csv"),
    ]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.mark.parametrize("method", ["gain_ffn", "lora", "full"])
def test_a_killed_run_goes_on_byte_for_byte(method: str, tmp_path: Path) -> None:
    """With deterministic kernels, through the command line."""
    codes = []
    for folder, kill in (("one", None), ("two", "commit@6"), ("two", None)):
        words = smoke(
            tmp_path / folder,
            f"method={method}",
            "compute.deterministic=true",
            "checkpoint.every_steps=1",
        )
        environment = {**os.environ, **({"GAIN_CL_FAILPOINT": kill} if kill else {})}
        codes.append(
            subprocess.run(
                [sys.executable, "-m", "gain_cl", *words],
                env=environment,
                capture_output=True,
                timeout=240,
            ).returncode
        )
    assert codes == [0, -9, 0]
    one, two = hashes(tmp_path / "one"), hashes(tmp_path / "two")
    assert one == two
    assert len(one) >= 3
