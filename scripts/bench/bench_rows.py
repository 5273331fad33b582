"""The subjects of the benchmark, one process each. Every step is timed between two synchronised clocks.

A subject is BASE or BASE+FLAG+FLAG. Bases: forward (a bare forward pass with its loss), limit (frozen forward and backward to the
inputs: what no adapter can beat), probe (a matrix product and a copy), evaluate (the perplexity of documents), methods of configs/method through our own training loop,
and peers: peft_ia3, peft_lora, peft_lora_hfloss (a plain loop), trainer_lora, trl_lora (as shipped), trl_lora_plain (without
gradient checkpointing), trl_liger. Flags: compile (compute.compile=layers), graphs (each layer by CUDA graphs), cudnn (its attention
first), triton (the gain's product in one kernel), swiglu (SiLU, product and gain in one kernel), liger (its norm, rotary embedding
and SwiGLU), ckpt (activations computed again).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

PEERS = (
    "peft_ia3",
    "peft_lora",
    "peft_lora_hfloss",
    "trainer_lora",
    "trl_lora",
    "trl_lora_plain",
    "trl_liger",
    "trl_liger_plain",
)
FLAGS = ("compile", "graphs", "cudnn", "triton", "swiglu", "liger", "ckpt")
RANK = 16
Tell = Callable[..., None]


def library(name: str) -> Any:
    """Import a library that is measured here. Peers are no dependencies of gain_cl."""
    return importlib.import_module(name)


def load_libraries() -> None:
    """Import what every row needs, before the processes part. Nothing here may start the GPU."""
    for name in (
        "torch",
        "transformers",
        "peft",
        "gain_cl.compose.composition",
        "gain_cl.runs.train",
        "gain_cl.measure.perplexity",
        "gain_cl.adapters.peft",
    ):
        with contextlib.suppress(ImportError):
            library(name)
    models = (
        "transformers.models.qwen2.modeling_qwen2",
        "transformers.models.llama.modeling_llama",
    )
    for name in (*models, "datasets", "trl.trainer.sft_trainer"):
        with contextlib.suppress(
            Exception
        ):  # of another version than they expect: their own row tells
            library(name)


def child(words: str) -> None:
    """Measure one row, tell it line by line, end the process."""
    with contextlib.suppress(OSError):
        os.setsid()
    task = json.loads(words)

    def tell(**said: Any) -> None:
        with open(task["told"], "a", encoding="utf-8") as file:
            file.write(json.dumps(said, allow_nan=False) + "\n")

    try:
        with contextlib.suppress(Told):
            _row(task, tell)
        tell(status="ok")
        code = 0
    except BaseException as error:
        memory = "out of memory" in str(error).lower()
        tell(
            status="out of memory" if memory else "failed",
            error=f"{type(error).__name__}: {error}"[:400],
            trace=traceback.format_exc()[-3000:],
        )
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _row(task: dict[str, Any], tell: Tell) -> None:
    import torch

    device = device_of(task["device"])
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1)
    dtype = (
        task["dtype"]
        if task["dtype"] != "auto"
        else "bfloat16"
        if device.type == "cuda"
        else "float32"
    )
    tell(device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", dtype=dtype)
    base, *flags = task["subject"].split("+")
    if wrong := set(flags) - set(FLAGS):
        raise ValueError(f"unknown flag {sorted(wrong)[0]}")
    if base == "probe":
        tell(**probe(device, getattr(torch, dtype)))
        return
    Bench(task, base, flags, device, dtype, tell).run()


def device_of(name: str) -> Any:
    """Return the device of a name; a GPU with its index, which torch.cuda.set_device asks for."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", 0) if name == "cuda" else torch.device(name)


def probe(device: Any, dtype: Any) -> dict[str, float]:
    """Return the rates of a large matrix product of random numbers and of a copy (bytes read and
    written)."""
    import torch

    cuda = device.type == "cuda"
    size, length = (8192, 2**31) if cuda else (512, 2**24)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    source = torch.randint(0, 100, (length,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def rate(work: Callable[[], Any], times: int) -> float:
        for _ in range(3):
            work()
        _settle(device)
        begun = time.perf_counter()
        for _ in range(times):
            work()
        _settle(device)
        return times / (time.perf_counter() - begun)

    return {
        "gemm_tflops": rate(lambda: a @ b, 30) * 2 * size**3 / 1e12,
        "copy_tb_per_second": rate(lambda: target.copy_(source), 20) * 2 * length / 1e12,
    }


def _settle(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """One subject on one model."""

    def __init__(
        self, task: dict[str, Any], base: str, flags: list[str], device: Any, dtype: str, tell: Tell
    ) -> None:
        import torch

        from gain_cl.compose import composition

        self.task, self.base, self.flags, self.device, self.tell = task, base, flags, device, tell
        self.block, self.sequences = task["block"], task["sequences"]
        method = base if base not in ("forward", "limit", "evaluate", *PEERS) else "gain_ffn"
        words = [
            f"model={task['model']}", f"method={method}", f"model.dtype={dtype}", "tasks=none", "train.tokens=null",
            "train.steps=1000000", f"train.block={self.block}", f"train.batch_tokens={self.block * self.sequences}",
        ]  # fmt: skip
        self.config = composition.compose(words, [], [])
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.init()
        begun = time.perf_counter()
        self.loaded = random_model(self.config.model, device)
        _settle(device)
        self.model: Any = self.loaded.model
        rows = np.random.default_rng(0).integers(
            0, self.loaded.vocabulary, (16, self.sequences, self.block)
        )
        self.batches_NST = rows
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        tell(
            weights_bytes=weights,
            tokens=self.block * self.sequences,
            make_weights_seconds=time.perf_counter() - begun,
        )

    def run(self) -> None:
        """Change the model as the flags say, then time steps."""
        import torch

        if "liger" in self.flags:
            self._liger()
        stream = self._steps()
        if "ckpt" in self.flags:
            from gain_cl.models import load

            load.checkpoint_activations(self.model)
        if "compile" in self.flags or "graphs" in self.flags:
            self._compile()
        with self._attention(), contextlib.closing(stream):
            for i in range(self.task["warmups"] + self.task["rounds"]):
                if i == self.task["warmups"] and self.device.type == "cuda":
                    self.tell(warm_peak_bytes=torch.cuda.max_memory_allocated(self.device))
                _settle(self.device)
                begun = time.perf_counter()
                next(stream)
                _settle(self.device)
                self._told(i, time.perf_counter() - begun)
                if i == 0:
                    self.tell(trainable=self.trainable, flops_per_token=self._flops())
            self._memory()
            if self.task["subject"] in self.task["profile"]:
                self.tell(kernels=self._kernels(lambda: next(stream)))

    def _told(self, i: int, seconds: float) -> None:
        self.tell(**{"warmups_seconds" if i < self.task["warmups"] else "rounds_seconds": seconds})

    def _memory(self) -> None:
        import torch

        from gain_cl.measure import provenance

        if self.device.type == "cuda":
            self.tell(
                peak_bytes=torch.cuda.max_memory_allocated(self.device),
                reserved_bytes=torch.cuda.max_memory_reserved(self.device),
            )
        else:
            self.tell(peak_bytes=provenance.peak_memory())

    # --- what is done in a step ------------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[Any]:
        """Return an endless stream, a step each."""
        self.trainable = 0
        if self.base == "forward":
            return self._forward()
        if self.base == "limit":
            return self._limit()
        if self.base == "evaluate":
            return self._evaluate()
        if self.base.startswith("peft_"):
            return self._plain()
        if self.base in PEERS:
            return self._trainer()
        return self._ours()

    def _batches(self) -> Iterator[Any]:
        while True:
            yield from self.batches_NST

    def _forward(self) -> Iterator[Any]:
        import torch

        from gain_cl.measure.perplexity import evaluating
        from gain_cl.models import forward

        made = "compile" in self.flags  # training mode, for only that is compiled
        for tokens in self._batches():
            with torch.no_grad() if made else evaluating(self.model):
                self.model.train(made)
                yield forward.loss_sum(self.loaded, tokens).item()

    def _evaluate(self) -> Iterator[Any]:
        """Score a document of one block a row, as a run does after every stage."""
        from gain_cl.domains.stream import Doc
        from gain_cl.measure import perplexity

        for tokens in self._batches():
            ends = np.arange(1, self.block + 1, dtype=np.uint32)
            rows = [Doc(str(i), row, ends, 0) for i, row in enumerate(tokens)]
            yield perplexity.score(self.loaded, rows, None, self.block, batch=self.sequences)

    def _limit(self) -> Iterator[Any]:
        from gain_cl.models import forward
        from gain_cl.models.loss import sum_cross_entropy

        embed = self.model.get_input_embeddings()
        self.model.train()
        for tokens in self._batches():
            ids = forward.on_device(tokens, self.loaded)
            inputs = embed(ids).detach().requires_grad_()
            hidden = self.loaded.body(
                inputs_embeds=inputs, use_cache=False
            ).last_hidden_state.flatten(0, 1)
            loss = (
                sum_cross_entropy(
                    hidden,
                    *self.loaded.output,
                    ids.flatten(),
                    self.loaded.softcap,
                    self.loaded.compiled and self.loaded.compiled.loss,
                )
                / ids.numel()
            )
            loss.backward()
            yield loss.item()

    def _ours(self) -> Iterator[Any]:
        """Return the training loop of a run with its method."""
        from gain_cl import adapters
        from gain_cl.domains.stream import Block
        from gain_cl.guards.base import Guard
        from gain_cl.runs import train

        rows = self.batches_NST.reshape(-1, self.block)
        nobody, scored = np.zeros(self.block, np.int64), np.ones(self.block, bool)

        class Blocks:
            name, ids = "random", ()

            def __getitem__(self, index: int) -> Any:
                return Block(rows[index % len(rows)], nobody, scored)

        self.adapter = adapters.build_adapter(self.config.adapter)
        self.adapter.attach(self.loaded)
        self.trainable = sum(p.numel() for p in self.adapter.parameters().values())
        if "triton" in self.flags:
            from gain_cl.adapters import gain

            gain._Scale = library("bench_kernels").Scale
        if "swiglu" in self.flags:
            self._swiglu()
        settings, blocks = self.config.train, Blocks()
        optimizer = train.optimizer(self.adapter, settings)
        stream: Any = train.stage(
            self.loaded, self.adapter, Guard(), blocks, settings, optimizer, index=1, seed=0
        )  # type: ignore[arg-type]
        return stream

    def _peft(self) -> Any:
        """Return the model inside PEFT's, as its users make it."""
        from gain_cl.models import families

        peft = library("peft")
        if "ia3" in self.base:
            layers = list(families.targets(self.model, ["attn_out", "ffn_down"], self.loaded.roles))
            settings = peft.IA3Config(
                task_type="CAUSAL_LM", target_modules=layers, feedforward_modules=layers
            )
        else:
            settings = self._lora()
        made = peft.get_peft_model(self.model, settings)
        self.trainable = sum(p.numel() for p in made.parameters() if p.requires_grad)
        return made

    def _lora(self) -> Any:
        words = {
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
            "bias": "none",
        }
        return library("peft").LoraConfig(task_type="CAUSAL_LM", **words)

    def _plain(self) -> Iterator[Any]:
        """Return the steps of a plain loop around PEFT, with our chunked loss or (hfloss) the model's."""
        import torch

        from gain_cl.models import forward

        made = self._peft()
        made.train()
        own = [p for p in made.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(own, lr=1e-3, weight_decay=0.0)

        def steps() -> Iterator[Any]:
            for tokens in self._batches():
                if self.base.endswith("hfloss"):
                    ids = torch.from_numpy(tokens).to(self.device)
                    loss = made(input_ids=ids, labels=ids, use_cache=False).loss
                else:
                    loss = forward.loss_sum(self.loaded, tokens) / tokens.size
                loss.backward()
                torch.nn.utils.clip_grad_norm_(own, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                yield loss.item()

        return steps()

    def _trainer(self) -> Iterator[Any]:
        """Run HF's Trainer or TRL's SFTTrainer. It has a loop of its own: a step is timed from the end
        of the one before."""
        import tempfile

        transformers = library("transformers")
        steps = self.task["warmups"] + self.task["rounds"]
        words = {
            "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": self.sequences, "max_steps": steps + 2, "report_to": "none",
            "save_strategy": "no", "logging_strategy": "no", "learning_rate": 1e-3, "max_grad_norm": 1.0, "disable_tqdm": True,
            "use_cpu": self.device.type == "cpu", "bf16": self.device.type == "cuda", "seed": 0,
        }  # fmt: skip
        rows = [
            [int(t) for t in row]
            for _ in range(1 + steps // 16)
            for row in self.batches_NST.reshape(-1, self.block)
        ]
        bench = self

        class Clock(transformers.TrainerCallback):  # type: ignore[misc]
            """Tells the time of every step; leaves the loop at the last."""

            def __init__(self) -> None:
                self.last, self.done = time.perf_counter(), 0

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                _settle(bench.device)
                now = time.perf_counter()
                if self.done < steps:
                    bench._told(self.done, now - self.last)
                self.last, self.done = now, self.done + 1
                if self.done == steps:
                    bench._memory()
                    control.should_training_stop = True

        if self.base == "trainer_lora":
            made = self._peft()
            data = [{"input_ids": row, "labels": row} for row in rows]
            settings = transformers.TrainingArguments(**words, gradient_checkpointing=False)
            trainer = transformers.Trainer(made, settings, train_dataset=data, callbacks=[Clock()])
        else:
            trl, datasets = library("trl"), library("datasets")
            from gain_cl.models import load

            datasets.disable_progress_bars()
            words |= {"max_length": self.block} | (
                {"gradient_checkpointing": False} if self.base.endswith("plain") else {}
            )
            if "liger" in self.base:
                words["use_liger_kernel"] = True
            tokenizer = load.byte_tokenizer()
            tokenizer.pad_token = tokenizer.eos_token
            trainer = trl.SFTTrainer(
                self.model,
                trl.SFTConfig(**words),
                train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
                processing_class=tokenizer,
                peft_config=self._lora(),
                callbacks=[Clock()],
            )
            self.trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        self.tell(
            trainable=self.trainable,
            flops_per_token=self._flops(),
            trainer={
                k: getattr(trainer.args, k, None)
                for k in ("gradient_checkpointing", "loss_type", "use_liger_kernel", "bf16")
            },
        )
        with self._attention():
            trainer.train()
        raise_if = getattr(trainer.state, "global_step", steps)
        if raise_if < steps:
            raise RuntimeError(f"the trainer stopped after {raise_if} steps")
        return _finished()

    # --- what is changed ---------------------------------------------------------------------------------------------------

    def _layers(self) -> Any:
        from torch import nn

        return max((m for m in self.model.modules() if isinstance(m, nn.ModuleList)), key=len)

    def _compile(self) -> None:
        import torch

        from gain_cl.models import compiled

        if "graphs" not in self.flags:
            self.loaded.compiled = compiled.Compiled(self.model)
            return
        torch._dynamo.config.recompile_limit = 64
        for layer in self._layers():
            layer.compile(fullgraph=True, mode="reduce-overhead")

    def _attention(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context that orders attention kernels."""
        if "cudnn" not in self.flags:
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        order = [
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ]
        return sdpa_kernel(order, set_priority=True)

    def _liger(self) -> None:
        apply = library("liger_kernel.transformers.monkey_patch")._apply_liger_kernel_to_instance
        apply(
            self.model,
            rope=True,
            rms_norm=True,
            swiglu="swiglu" not in self.flags,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )

    def _swiglu(self) -> None:
        """Compute SiLU(gate) * up * s in one kernel, in place of the hook on the down projection."""
        from torch.nn import functional as F

        kernels, own = library("bench_kernels"), self.adapter  # type: ignore[attr-defined]
        for layer in self._layers():
            mlp = layer.mlp
            name = next(n for n, m in own.layers.items() if m is mlp.down_proj)
            mlp.down_proj._forward_pre_hooks.clear()

            def fused(x: Any, mlp: Any = mlp, gain: Any = own.gains[name]) -> Any:
                return F.linear(
                    kernels.SwiGLU.apply(mlp.gate_proj(x), mlp.up_proj(x), gain.s()),
                    mlp.down_proj.weight,
                )

            mlp.forward = fused

    # --- counts ------------------------------------------------------------------------------------------------------------

    def _flops(self) -> float:
        """Return the operations of a token by formula (activations that are computed again do not count): forward 2P + A, gains 4P + 3A, LoRA
        4P + 3A + 6 P_lora, full 6P + 3A; P parameters of matrix products with the head, A = 2 x layers x width x T of attention."""
        arch = self.model.config.get_text_config()
        heads, width = arch.num_attention_heads, arch.hidden_size
        q = heads * (getattr(arch, "head_dim", None) or width // heads)
        a = 2 * arch.num_hidden_layers * q * self.block
        p = _matmul_parameters(self.loaded)
        if self.base in ("forward", "evaluate"):
            return float(2 * p + a)
        if self.base.startswith("full"):
            return float(6 * p + 3 * a)
        return float(
            4 * p
            + 3 * a
            + (6 * self.trainable if "lora" in self.base or "liger" in self.base else 0)
        )

    def _kernels(self, step: Callable[[], Any]) -> list[dict[str, Any]]:
        """Return the longest kernels of a step."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [
            ProfilerActivity.CPU,
            *([ProfilerActivity.CUDA] if self.device.type == "cuda" else []),
        ]
        with profile(activities=kinds, acc_events=True) as found:
            step()
            _settle(self.device)
        key = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        averages = found.key_averages()
        if self.device.type == "cuda":
            averages = [e for e in averages if "cuda" in str(e.device_type).lower()]
        rows = sorted(averages, key=lambda e: -getattr(e, key, 0.0))[:30]
        return [
            {"name": e.key, "microseconds": float(getattr(e, key, 0.0)), "calls": int(e.count)}
            for e in rows
        ]


def _finished() -> Iterator[Any]:
    """Stand for a stream whose steps were already told."""
    raise Told


class Told(Exception):
    """The row has told everything by itself."""


def _matmul_parameters(loaded: Any) -> int:
    """Count the parameters of the frozen matrices that a token is multiplied with: those of the layers and the head."""
    from gain_cl.models import families

    ignored = ("lora_", "ia3_")
    layers = [
        m.weight.numel()
        for n, m in loaded.model.named_modules()
        if (
            families.is_conv1d(m)
            or (type(m).__name__ == "Linear" and type(m).__module__.startswith("torch"))
        )
        and m is not loaded.head
        and not any(word in n for word in ignored)
    ]
    return sum(layers) + loaded.output[0].numel()


def random_model(model: Any, device: Any) -> Any:
    """Return a Loaded of random weights made on the device, without text."""
    import torch

    from gain_cl.models import load, source

    transformers = library("transformers")
    dtype = getattr(torch, model.dtype)
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(**model.arch)
    with torch.device(device):
        net = transformers.AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=model.attention
        )
    net.to(device=device, dtype=dtype)
    net.requires_grad_(False)
    net.eval()
    net.config.use_cache = False
    none: Any = None
    return load.Loaded(
        net, none, device, 0, 0, source.context_length(settings.to_dict()) or 1024, "", model.roles
    )


if __name__ == "__main__":
    child(sys.argv[1])
