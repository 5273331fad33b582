"""Learn one domain: one loop, the same for every method.

Axes: S sequences of a step, T tokens of a sequence, B sequences of a micro-batch, D model width.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gain_cl.errors import DataError, StorageError
from gain_cl.guards.base import Batch
from gain_cl.measure.record import TrainStats
from gain_cl.models.compiled import compiling
from gain_cl.models.forward import loss_sum

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.config.schema import Train
    from gain_cl.domains import Stream
    from gain_cl.guards.base import Guard
    from gain_cl.models.load import Loaded


WINDOW, ENOUGH = 128, 32
"""A spike is judged against the last WINDOW losses of its stage, once there are ENOUGH of them."""


def rate(step: int, steps: int, lr: float, schedule: str, warmup: float, final_lr: float) -> float:
    """Return the learning rate of step 0 .. steps-1 of a stage: linear warm-up over round(warmup *
    steps) steps, then constant, or a cosine that ends at final_lr * lr on the last step."""
    rising = round(warmup * steps)
    if step < rising:
        return lr * (step + 1) / (rising + 1)
    if schedule == "constant":
        return lr
    progress = (step - rising) / max(1, steps - 1 - rising)
    return lr * (final_lr + (1 - final_lr) * (1 + math.cos(math.pi * progress)) / 2)


def optimizer(adapter: Adapter, settings: Train) -> torch.optim.AdamW:
    """Return AdamW over the adapter's fp32 parameters: one kernel on a GPU."""
    chosen = settings.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    parameters = list(adapter.parameters().values())
    fused = bool(parameters) and parameters[0].is_cuda
    return torch.optim.AdamW(parameters, fused=fused or None, **chosen)


def optimizer_state(optimizer: torch.optim.Optimizer, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return the optimiser's tensors on the CPU, named KEY/PARAMETER."""
    names = {id(p): name for name, p in adapter.parameters().items()}
    return {
        f"{key}/{names[id(p)]}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, adapter: Adapter, state: dict[str, torch.Tensor]
) -> None:
    """Put back what ``optimizer_state`` took."""
    parameters = adapter.parameters()
    for full, value in state.items():
        key, name = full.split("/", 1)
        p = parameters[name]
        moves = value.ndim > 0 or optimizer.defaults["fused"]  # else the count of steps stays here
        optimizer.state[p][key] = value.to(p.device) if moves else value


def batch_at(blocks: Stream, step: int, sequences: int) -> Batch:
    """Return the sequences of one step: a pure function of the step."""
    rows = [blocks[step * sequences + i] for i in range(sequences)]
    return Batch(*(np.stack(part) for part in zip(*rows, strict=True)))


def seed_of(*parts: int | str) -> int:
    """Return a seed that is a function of its parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@dataclass
class Progress:
    """What a stage has cost so far: JSON data, so that a checkpoint holds it. Times are of all
    attempts together."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_loss_nats: float = 0.0
    last_loss_nats: float = 0.0
    recent: list[float] = field(default_factory=list)  # losses of the last steps, at most WINDOW
    spikes: list[int] = field(default_factory=list)
    dev: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def read(cls, saved: dict[str, Any], folder: Path | None) -> Progress:
        """Return what a checkpoint says of its stage. DataError when another version of gain_cl
        wrote it."""
        try:
            return cls(**saved)
        except TypeError:
            do = "go on with the version that wrote it, or resume=never"
            what = "state.json is not of this version of gain_cl"
            raise DataError(what, str(folder), do) from None

    def stats(self, lr: float) -> TrainStats:
        """Return what the record keeps of it."""
        kept = asdict(self)
        del kept["recent"]
        return TrainStats(lr=lr, **kept)

    def add(self, row: dict[str, Any]) -> dict[str, float] | None:
        """Count a step. Return mean and sd of the losses before it when its loss is a spike above
        them."""
        loss, before = row["loss_nats"], self.recent
        if not self.steps:
            self.first_loss_nats = loss
        self.steps, self.last_loss_nats = row["step"], loss
        self.tokens += row["tokens"]
        self.seconds += row["seconds"]
        self.recent = [*before, loss][-WINDOW:]
        if len(before) < ENOUGH:
            return None
        mean, sd = statistics.fmean(before), statistics.stdev(before)
        if loss <= mean + 6 * sd:
            return None
        self.spikes.append(row["step"])
        return {"mean": mean, "sd": sd, "steps": len(before)}


def stage(
    loaded: Loaded,
    adapter: Adapter,
    guard: Guard,
    blocks: Stream,
    settings: Train,
    optimizer: torch.optim.Optimizer,
    *,
    index: int,
    seed: int,
    place: int | None = None,
    micro_batch: int | None = None,
    start: int = 0,
) -> Iterator[dict[str, Any]]:
    """Train on one domain from step ``start`` on. Yield one row per optimiser step: stage, domain,
    step (from 1), loss_nats (per token), grad_norm (before clipping), lr, tokens, seconds,
    micro_batch (sequences of a forward pass).

    place: the number from which the seed of dropout and the guard's batches follow. None: index.

    Raises DataError before the update when the loss or the gradient is not finite. When memory runs
    out, the step is repeated with half the micro-batch, which then stays. StorageError when one
    sequence is too much.
    """
    parameters, model = list(adapter.parameters().values()), loaded.model
    size, place = micro_batch or settings.sequences, place or index
    model.train()
    try:
        started = time.perf_counter()
        following = batch_at(blocks, start, settings.sequences)
        for step in range(start, settings.stage_steps):
            batch = guard.mix(following, place, step)
            drawn = seed_of("dropout", seed, place, step)
            while (losses := _gradient(loaded, guard, batch, settings, size, drawn)) is None:
                optimizer.zero_grad()
                if loaded.device.type == "cuda":
                    torch.cuda.empty_cache()
                if size == 1:
                    what = "out of memory with one sequence a forward pass"
                    do = "use compute.gradient_checkpointing=true or a smaller train.block"
                    raise StorageError(what, f"stage {index}, step {step + 1}", do)
                size = (size + 1) // 2
            gradients = [p.grad for p in parameters if p.grad is not None]
            total = torch.nn.utils.get_total_norm(gradients)
            if settings.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip, total)
            lr = rate(
                step, settings.stage_steps, settings.lr,
                settings.schedule, settings.warmup, settings.final_lr,
            )  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = lr
            told = torch.stack([*losses, total])
            _update(optimizer, told.isfinite().all())
            optimizer.zero_grad()
            adapter.after_step()
            guard.after_step()
            if step + 1 < settings.stage_steps:
                following = batch_at(blocks, step + 1, settings.sequences)
            loss, norm = _read(told)  # a GPU is waited for here alone, once its step is queued
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise _not_finite(loss, norm, batch, index, step, blocks)
            yield {
                "stage": index,
                "domain": blocks.name,
                "step": step + 1,
                "loss_nats": loss,
                "grad_norm": norm,
                "lr": lr,
                "tokens": batch.tokens_ST.size,
                "seconds": time.perf_counter() - started,
                "micro_batch": size,
            }
            started = time.perf_counter()
    finally:
        model.eval()


def _update(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Take the optimiser's step where loss and gradient are finite. A GPU decides that by itself:
    its kernel leaves parameters and moments as they are where ``found_inf`` is 1."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()


def _read(told: torch.Tensor) -> tuple[float, float]:
    """Return loss and norm of the gradient. told: a loss of each micro-batch, then the norm."""
    *losses, norm = told.tolist()
    loss = 0.0
    for part in losses:  # not sum(), which rounds otherwise in newer Pythons
        loss += part
    return loss, norm


def _not_finite(
    loss: float, norm: float, batch: Batch, index: int, step: int, blocks: Stream
) -> DataError:
    """Return the error of a step, with the ids of the documents of its batch."""
    what = "loss" if not math.isfinite(loss) else "gradient"
    do = "lower train.lr; the parameters are untouched, failure.json names the batch"
    error = DataError(f"the {what} is not finite", f"stage {index}, step {step + 1}", do)
    sequences = len(batch.tokens_ST)
    error.facts = {
        "step": step + 1,
        "loss_nats": str(loss),
        "grad_norm": str(norm),
        "blocks": list(range(step * sequences, (step + 1) * sequences)),
        "documents": [blocks.ids[d] for d in sorted({*batch.documents_ST.flat}) if d >= 0],
        "stage": index,
        "domain": blocks.name,
    }
    return error


def _gradient(
    loaded: Loaded, guard: Guard, batch: Batch, settings: Train, size: int, seed: int
) -> list[torch.Tensor] | None:
    """Add the gradient of a step up in the parameters. Return what each micro-batch adds to its
    nats per token, or None when memory ran out. ConfigError when layers cannot be compiled."""
    torch.manual_seed(seed)  # dropout is a function of the step: resume needs no random state
    count, losses = max(1, int(batch.scored_ST.sum())), []
    try:
        with compiling():
            for start in range(0, len(batch.tokens_ST), size):
                tokens, documents, scored = (part[start : start + size] for part in batch)
                owners = documents if settings.pack == "mask" else None
                nats = loss_sum(loaded, tokens, owners, scored, guard.token_penalty)
                # Divided by the tokens of the whole step: micro-batches of any size add up to its
                # gradient.
                part = nats / count
                part.backward()
                losses.append(part.detach())
            penalty = guard.penalty()
            if penalty is not None:
                penalty.backward()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
    return losses


def out_of_memory(error: BaseException) -> bool:
    """True if an exception says that memory ran out, of a GPU or of the machine."""
    short = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return short or "can't allocate memory" in str(error)
