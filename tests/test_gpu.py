"""What only a GPU can show: pytest -m gpu. GAIN_CL_GPU_TESTS=cpu rehearses these tests without one."""

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

from conftest import ListBlocks, tiny
from gain_cl import adapters, cli, config, evaluate, forward, models, train
from gain_cl.domains import Doc
from gain_cl.guards.base import Guard
from test_adapters import ADAPTERS, ALL, REFUSED

REHEARSAL = os.environ.get("GAIN_CL_GPU_TESTS") == "cpu"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REHEARSAL and not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]

ROUNDING = {"float32": 2e-5, "bfloat16": 0.03}
"""dtype -> how far logits may be apart, as a share of the largest."""

GUARDED = ("ewc", "replay", "self_replay", "kl_base", "l2_base", "o_lora", "lora_ema", "lora_ewc", "lora_kl", "joint", "individual")
made = functools.cache(tiny)


def on_device(family: str, dtype: str, **keys: Any) -> models.Loaded:
    original: models.Loaded = made(family, dtype) if not keys else tiny(family, dtype, **keys)
    model = copy.deepcopy(original.model).to(DEVICE)
    return dataclasses.replace(original, model=model, device=DEVICE)


def attach(loaded: models.Loaded, method: str) -> adapters.base.Adapter:
    torch.manual_seed(0)
    adapter = adapters.build(ADAPTERS[method])
    adapter.attach(loaded)
    return adapter


def logits(loaded: models.Loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(torch.arange(1, 25, device=DEVICE).reshape(2, 12)).logits.float()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def learn(loaded: models.Loaded, adapter: adapters.base.Adapter, **keys: Any) -> list[dict[str, Any]]:
    micro = keys.pop("micro_batch", None)
    setup = config.Train(**{"steps": 2, "block": 16, "batch_tokens": 64, "lr": 1e-3, **keys})  # type: ignore[arg-type]
    blocks: Any = ListBlocks(np.random.default_rng(0).integers(1, 257, (32, setup.block)))
    optimizer = train.optimizer(adapter, setup)
    return list(train.stage(loaded, adapter, Guard(), blocks, setup, optimizer, index=1, seed=0, micro_batch=micro))


@pytest.mark.parametrize("method", list(ALL))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_starts_as_the_base_learns_and_folds(method: str, family: str, dtype: str) -> None:
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
        losses = []
        for loaded in (on_device("llama", "float32"), copy.deepcopy(made("llama", "float32"))):
            torch.manual_seed(0)
            losses.append([row["loss_nats"] for row in learn(loaded, attach(loaded, method), steps=4)])
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3 if method == "lora" else 1e-4)  # B is drawn on the device


def test_memory_that_runs_out_halves_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = train.loss_sum

    def greedy(loaded: Any, tokens: Any, *more: Any) -> torch.Tensor:
        if len(tokens) > 1:
            if REHEARSAL:
                raise torch.OutOfMemoryError("CUDA out of memory")
            torch.empty(2**44, dtype=torch.uint8, device=DEVICE)  # 16 TiB: the allocator itself refuses
        return real(loaded, tokens, *more)

    loaded = on_device("llama", "float32")
    whole = learn(loaded, attach(loaded, "gain_ffn"))
    monkeypatch.setattr(train, "loss_sum", greedy)
    loaded = on_device("llama", "float32")
    halved = learn(loaded, attach(loaded, "gain_ffn"))
    assert [row["micro_batch"] for row in halved] == [1, 1]
    np.testing.assert_allclose([r["loss_nats"] for r in halved], [r["loss_nats"] for r in whole], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_layers_equal_eager_ones(dtype: str) -> None:
    tokens = np.random.default_rng(0).integers(1, 257, (4, 32))
    found = []
    for compiled in (False, True):
        loaded = on_device("llama", dtype)
        adapter = attach(loaded, "gain_ffn")
        if compiled:
            for layer in loaded.model.model.layers:
                layer.compile(fullgraph=True, backend="aot_eager" if REHEARSAL else "inductor")
        loss = forward.loss_sum(loaded, tokens) / tokens.size
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in adapter.parameters().values()])))  # type: ignore[union-attr]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5 if dtype == "float32" else 3e-3)
    assert apart(found[1][1], found[0][1]) <= (1e-3 if dtype == "float32" else 0.1)


@pytest.mark.skipif(REHEARSAL, reason="Triton needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_the_benchmark_are_the_formula(dtype: torch.dtype) -> None:
    from gain_cl.adapters.gain import _Scale
    from gain_cl.verbs.bench_kernels import Scale, SwiGLU

    torch.manual_seed(0)
    gate, up, grad = (torch.randn(3, 77, 1000, device=DEVICE).to(dtype) for _ in range(3))
    s = 1 + 0.1 * torch.randn(1000, device=DEVICE)

    def run(f: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
        own = [x.detach().clone().requires_grad_() for x in inputs]
        y = f(*own)
        y.backward(grad)
        return [y.detach().float(), *(x.grad.float() for x in own)]  # type: ignore[union-attr]

    plain = lambda a, b, s: (torch.nn.functional.silu(a.float()) * b.float() * s).to(dtype)  # noqa: E731
    for ours, reference in ((run(Scale.apply, gate, s), run(_Scale.apply, gate, s)), (run(SwiGLU.apply, gate, up, s), run(plain, gate, up, s))):
        for a, b in zip(ours, reference, strict=True):
            assert apart(a, b) <= (1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_evaluation_batch_1_equals_batch_8(family: str) -> None:
    loaded, rng = on_device(family, "float32"), np.random.default_rng(0)
    lengths = [40, 3, 17, 33, 60, 5, 29, 2, 51]
    docs = [Doc(f"{i:016x}", rng.integers(1, 257, n).astype(np.uint32), np.arange(1, n + 1) * 2) for i, n in enumerate(lengths)]
    one, eight = (evaluate.score(loaded, docs, 48, 32, batch=b) for b in (1, 8))
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
    found = [*folder.glob("results/runs/*.parquet"), *folder.glob("runs/*/stages/*/adapter.safetensors"), *folder.glob("runs/*/matrix.csv")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


@pytest.mark.parametrize("method", ["gain_ffn", "lora", "full"])
def test_a_killed_run_goes_on_byte_for_byte(method: str, tmp_path: Path) -> None:
    """With deterministic kernels, through the command line."""
    codes = []
    for folder, kill in (("one", None), ("two", "commit@6"), ("two", None)):
        words = smoke(tmp_path / folder, f"method={method}", "compute.deterministic=true", "checkpoint.every_steps=1")
        environment = {**os.environ, **({"GAIN_CL_FAILPOINT": kill} if kill else {})}
        codes.append(subprocess.run([sys.executable, "-m", "gain_cl", *words], env=environment, capture_output=True, timeout=90).returncode)
    assert codes == [0, -9, 0]
    one, two = hashes(tmp_path / "one"), hashes(tmp_path / "two")
    assert one == two
    assert len(one) >= 3
