"""The contract of an adapter. Contract tests hold every adapter to it on every model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gain_cl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gain_cl.models.load import Loaded


SHIFT = "the distance of its effective weights from the base"


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU."""
    return {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}


def compare_tensors(found: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes. DataError when they differ."""
    wrong = sorted(found.keys() ^ own.keys())
    wrong = wrong or sorted(name for name, t in found.items() if t.shape != own[name].shape)
    if wrong:
        what = f"{len(wrong)} tensors differ in name or shape, first {wrong[0]}"
        raise DataError(what, where, "it belongs to another method or model")


class Adapter(ABC):
    """Adds trainable state to a frozen model.

    After ``attach`` the model computes what it did before, and only ``parameters`` train, all of
    them fp32. The base weights stay as they are until ``absorb``.
    """

    # whether the trained state after every stage is small enough to keep, or only the last
    keep_stages = True

    trains = (
        True  # whether stages are learned; otherwise ``take`` puts on what was learned elsewhere
    )

    @abstractmethod
    def attach(self, loaded: Loaded) -> None:
        """Add to the model what trains. The global RNG is seeded by the caller: draw initial values
        from it."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what the optimiser updates, by name, fp32."""

    @abstractmethod
    def absorb(self) -> None:
        """Fold the trained state into the model's weights (computed in fp32, rounded once) and
        detach."""

    def after_step(self) -> None:
        """Called after every optimiser step; most adapters have nothing to do."""
        return

    def take(self, stage: int) -> None:
        """Make the model that of a stage (from 1), of adapters that do not train."""
        raise NotImplementedError

    def restarts(self) -> bool:
        """True if ``restart`` is possible, once attached."""
        return type(self).restart is not Adapter.restart

    def restart(self) -> None:
        """Freeze what is learned so far and begin anew on top of it (handover=restart): the
        function stays, ``parameters`` are new and the identity, ``state`` holds both. The global
        RNG is seeded by the caller."""
        raise self._cannot("handover=restart", "use handover=continue")

    def keep_base(self) -> None:
        """Called once, before training, by who will ask for ``disabled`` or ``shift``."""
        return

    def disabled(self) -> AbstractContextManager[None]:
        """Make the model compute for the block what it did before ``attach``."""
        raise self._cannot("a comparison with the pretrained model", "use another guard")

    def remarks(self, dtype: torch.dtype) -> list[str]:
        """Return what a reader of the numbers must know of the trained state, in a model of this
        dtype."""
        return []

    def shift(self) -> Tensor:
        """Return ||W - W_base||_F^2 of the effective weights, summed over the layers, with
        gradients to ``parameters``."""
        raise self._cannot(SHIFT, "use another guard")

    def lora_inputs(self) -> dict[str, list[Tensor]]:
        """Return A (r, in) of each LoRA of a layer, by the layer's name, the oldest first; the last
        one trains."""
        raise self._cannot("LoRA matrices", "use adapter.peft_type=LORA")

    def to_peft(self, loaded: Loaded) -> tuple[Any, dict[str, Tensor]]:
        """Return a configuration of PEFT's and tensors by PEFT's names that compute the same on the
        base. ConfigError when PEFT's format cannot say it."""
        raise self._no_form(f"what {type(self).__name__} learns")

    def begin_from(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Take the values of a saved adapter of PEFT's. ConfigError when its settings are not its
        own, DataError when its tensors are not."""
        raise self._cannot("adapter.init_from", "leave it out")

    def _no_form(self, what: str) -> ConfigError:
        what = f"{what} has no form among PEFT's adapters"
        return ConfigError(what, "to=peft", "to=merged works")

    def _cannot(self, what: str, do: str) -> ConfigError:
        return ConfigError(f"{type(self).__name__} does not offer {what}", "adapter", do)

    def saved(self) -> Mapping[str, Tensor]:
        """Return all that is trained, what earlier stages left frozen included: everything needed,
        with the base weights, to rebuild the model."""
        return self.parameters()

    def state(self) -> dict[str, Tensor]:
        """Return a copy of what is ``saved`` on the CPU."""
        return copied(self.saved())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Put a saved state back; DataError when names or shapes differ."""
        own = self.saved()
        compare_tensors(state, own, "adapter state")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        self.after_step()
