"""Compile what a training step computes (compute.compile=layers): each layer of the model by
itself, and the softmax of the loss.

Evaluation stays as it is, step by step: the scores of stage 0, which come first, and those of runs
that compile nothing are computed in the same way. So its batches, of any shape, compile nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gain_cl.errors import ConfigError
from gain_cl.models.loss import InPlace, cross_entropy_in_place

VERSIONS = 64
"""How often torch may compile a layer's code: some of its versions compile each layer by itself."""


class Compiled:
    """The compiled layers of a model, as the adapter has left them, in training mode alone, and its
    loss. The first step settles what is compiled: once for the first layer, whose input has no
    gradient, and once for all others.

    The layers are those that gradient checkpointing knows. ConfigError when there is none.

    seconds: what the first calls took."""

    loss: InPlace

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            what = "transformers names no layers of this family"
            raise ConfigError(what, "compute.compile", "use compute.compile=none")
        self.seconds, self.backend = 0.0, backend
        self.called: set[Callable[..., Any]] = set()
        self.anew()  # what other models left counts among the versions of a layer's code
        torch.compiler.config.recompile_limit = VERSIONS
        for layer in layers:
            plain: Any = layer.forward
            layer.forward = self._in_training(layer, plain, self._compile(plain))
        self.loss = self._compile(cross_entropy_in_place)

    def anew(self) -> None:
        """Forget what is compiled, as when the adapter has changed."""
        torch.compiler.reset()
        self.called.clear()

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function compiled; its first call is timed."""
        made = torch.compile(function, fullgraph=True, backend=self.backend)

        def call(*args: Any, **keywords: Any) -> Any:
            if call in self.called:
                return made(*args, **keywords)
            begun = time.perf_counter()
            found = made(*args, **keywords)
            self.seconds += time.perf_counter() - begun
            self.called.add(call)
            return found

        return call

    @staticmethod
    def _in_training(
        layer: nn.Module, plain: Callable[..., Any], made: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Return a forward pass: the compiled one in training mode."""

        def forward(*args: Any, **keywords: Any) -> Any:
            return (made if layer.training else plain)(*args, **keywords)

        return forward


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
