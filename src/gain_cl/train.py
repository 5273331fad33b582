"""Learning one domain: one loop, the same for every method.

Axes: S sequences of a step, T tokens of a sequence, B sequences of a micro-batch, D model width.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gain_cl.errors import DataError
from gain_cl.guards.base import Batch
from gain_cl.loss import sum_cross_entropy

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.config import Train
    from gain_cl.domains import Blocks
    from gain_cl.guards.base import Guard
    from gain_cl.models import Loaded


def rate(step: int, steps: int, lr: float, schedule: str, warmup: float, final_lr: float) -> float:
    """Learning rate of step 0 .. steps-1 of a stage: linear warm-up over round(warmup * steps) steps, then constant, or
    a cosine that ends at final_lr * lr on the last step."""
    rising = round(warmup * steps)
    if step < rising:
        return lr * (step + 1) / (rising + 1)
    if schedule == "constant":
        return lr
    progress = (step - rising) / max(1, steps - 1 - rising)
    return lr * (final_lr + (1 - final_lr) * (1 + math.cos(math.pi * progress)) / 2)


def optimizer(adapter: Adapter, settings: Train) -> torch.optim.AdamW:
    """AdamW over the adapter's fp32 parameters."""
    parameters = list(adapter.parameters().values())
    return torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)


def batch_at(blocks: Blocks, step: int, sequences: int) -> Batch:
    """The sequences of one step: a pure function of the step."""
    rows = [blocks[step * sequences + i] for i in range(sequences)]
    return Batch(np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows]))


def seed_of(*parts: int | str) -> int:
    """A seed that is a function of its parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def stage(
    loaded: Loaded,
    adapter: Adapter,
    guard: Guard,
    blocks: Blocks,
    settings: Train,
    optimizer: torch.optim.Optimizer,
    *,
    index: int,
    seed: int,
    micro_batch: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Train on one domain, yielding one row per optimiser step: step (from 1), loss_nats (per token), grad_norm (before
    clipping), lr, tokens, seconds. Raises DataError before the update when the loss or the gradient is not finite.
    """
    parameters = list(adapter.parameters().values())
    model = loaded.model
    model.train()
    try:
        for step in range(settings.stage_steps):
            started = time.perf_counter()
            torch.manual_seed(seed_of("dropout", seed, index, step))  # dropout is a function of the step: resume needs no RNG state
            batch = guard.mix(batch_at(blocks, step, settings.sequences), index, step)
            count = batch.tokens_ST.size
            loss = 0.0
            size = micro_batch or settings.sequences
            for start in range(0, settings.sequences, size):
                rows = slice(start, start + size)
                part = loss_sum(loaded, batch.tokens_ST[rows], batch.documents_ST[rows] if settings.pack == "mask" else None) / count
                part.backward()  # divided by the tokens of the whole step, so micro-batches of any size add up to its gradient
                loss += part.item()
            penalty = guard.penalty()
            if penalty is not None:
                penalty.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if not math.isfinite(loss) or not math.isfinite(norm.item()):
                what = "loss" if not math.isfinite(loss) else "gradient"
                raise DataError(
                    f"the {what} is not finite", f"stage {index}, step {step + 1}", "lower train.lr; the parameters are untouched"
                )
            if settings.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip, norm)
            lr = rate(step, settings.stage_steps, settings.lr, settings.schedule, settings.warmup, settings.final_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            adapter.after_step()
            yield {
                "step": step + 1,
                "loss_nats": loss,
                "grad_norm": norm.item(),
                "lr": lr,
                "tokens": count,
                "seconds": time.perf_counter() - started,
            }
    finally:
        model.eval()


def loss_sum(loaded: Loaded, tokens_BT: np.ndarray, documents_BT: np.ndarray | None = None) -> torch.Tensor:
    """Sum of -ln p over all tokens, each sequence starting after the prefix token, as in evaluation.

    documents_BT: a token attends only within its own document, and positions restart there; None: to all before it.
    """
    inputs_BT = np.concatenate([np.full((len(tokens_BT), 1), loaded.prefix_id), tokens_BT[:, :-1]], axis=1)
    extra: dict[str, torch.Tensor] = {}
    if documents_BT is not None:
        same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
        seen_BTT = torch.from_numpy(np.tril(same_BTT)).to(loaded.device)
        floor = torch.finfo(loaded.model.dtype).min
        extra["attention_mask"] = torch.zeros(seen_BTT.shape, dtype=loaded.model.dtype, device=loaded.device).masked_fill(~seen_BTT, floor)[
            :, None
        ]
        extra["position_ids"] = torch.from_numpy(_positions(documents_BT)).to(loaded.device)
    hidden_BTD = loaded.body(input_ids=torch.from_numpy(inputs_BT).to(loaded.device), use_cache=False, **extra).last_hidden_state
    targets_N = torch.from_numpy(tokens_BT.reshape(-1)).to(loaded.device)
    return sum_cross_entropy(hidden_BTD.flatten(0, 1), *loaded.output, targets_N, loaded.softcap)


def _positions(documents_BT: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... from the start of each document's part of a sequence."""
    starts = np.ones_like(documents_BT, dtype=bool)
    starts[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    index = np.broadcast_to(np.arange(documents_BT.shape[1]), documents_BT.shape)
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
