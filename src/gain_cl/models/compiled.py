"""Compile what a training step computes (compute.compile=layers): each layer of the model by
itself, and the softmax of the loss.

Evaluation stays as it is, step by step: the scores of stage 0, which come first, and those of runs
that compile nothing are computed in the same way. So its batches, of any shape, compile nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gain_cl.errors import ConfigError
from gain_cl.models.loss import InPlace, cross_entropy_in_place

if TYPE_CHECKING:
    from gain_cl.models.load import Loaded

MOST_VERSIONS = 64
"""Versions of a layer that are compiled: for the first layer, whose input has no gradient, and the
others, for each number of sequences, and twice at each handover=restart."""


def compile_training(loaded: Loaded, backend: str = "inductor") -> None:
    """Compile every layer, as the adapter has left it, and the loss, for training mode alone. What
    is compiled is settled by the first step.

    The layers are those that gradient checkpointing knows. ConfigError when there is none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    torch._dynamo.config.recompile_limit = MOST_VERSIONS
    layers = [m for m in loaded.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        family = loaded.model.config.model_type
        what = f"{family} has no layers that transformers calls by that name"
        raise ConfigError(what, "compute.compile", "use compute.compile=none")
    for layer in layers:
        made = torch.compile(layer.forward, fullgraph=True, backend=backend)
        layer.forward = _in_training(layer, layer.forward, made)
    loaded.compiled_loss = _compiled_loss(backend)


def _in_training(
    layer: nn.Module, plain: Callable[..., Any], made: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a forward pass: the compiled one in training mode."""

    def forward(*args: Any, **keywords: Any) -> Any:
        return (made if layer.training else plain)(*args, **keywords)

    return forward


def _compiled_loss(backend: str) -> InPlace:
    made = torch.compile(cross_entropy_in_place, fullgraph=True, backend=backend)

    def loss(
        logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, wanted: bool
    ) -> torch.Tensor:
        for tensor in (logits, targets):  # one version for any number of rows
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return made(logits, targets, softcap, wanted)

    return loss


def try_compiler(device: torch.device) -> None:
    """Compile one product. ConfigError when this machine cannot, before anything is trained."""
    with compiling():
        torch.compile(lambda x: 2 * x + 1)(torch.ones(64, device=device))


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Tell in one line why the block could not be compiled."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        lines = str(error).split("Set TORCHDYNAMO_VERBOSE")[0].split()
        what = f"torch cannot compile here: {type(error).__name__}: {' '.join(lines)[:300]}"
        do = "install what it names (a C++ compiler; triton on a GPU), or use compute.compile=none"
        raise ConfigError(what, "compute.compile", do) from error


def seconds() -> float:
    """Return how long this process has compiled so far."""
    if "torch._dynamo" not in sys.modules:
        return 0.0
    return torch._dynamo.utils.calculate_time_spent()["total_wall_time"]
