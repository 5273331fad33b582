"""Checkpoints trained elsewhere, in the place of training: stage k is the k-th of them. For
``python -m gain_cl score``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gain_cl.adapters import portable
from gain_cl.adapters.base import Adapter, compare_tensors, copied
from gain_cl.errors import DataError
from gain_cl.models import load, source
from gain_cl.system import hub

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gain_cl.models.load import Loaded


class GivenAdapter(Adapter):
    """checkpoints: folders or ORG/NAME@COMMIT, each a PEFT adapter or a whole model of the base's
    architecture and tokenizer."""

    trains = False

    def __init__(self, checkpoints: list[str]) -> None:
        self.checkpoints = checkpoints
        self.peft: Any = None
        self.base: dict[str, Tensor] = {}  # the pretrained weights, from the first ``take`` on

    def attach(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def absorb(self) -> None:
        """Fold the stage that was taken into the weights."""
        if self.peft is not None:
            from gain_cl.adapters.peft import fold

            fold(self.peft, self.loaded.model)
            self.peft = None

    def take(self, stage: int) -> None:
        """Make the model that of a stage (from 1). DataError when the checkpoint is of another
        model."""
        where = portable.place(self.checkpoints[stage - 1], portable.CHECKPOINT)
        if isinstance(where, tuple):
            repository, commit = where
            where = hub.snapshot(repository, commit, ["*config.json"])
            whole = not (where / portable.CONFIG).exists()
            model = source.SMALL_FILES + source.WEIGHTS
            files = model if whole else [portable.CONFIG, portable.WEIGHTS]
            hub.snapshot(repository, commit, files)
        # PEFT's unload leaves what an adapter wrote into the base itself: biases, some initial
        # values
        if not self.base:
            self.base = copied(dict(self.loaded.model.named_parameters()))
        self._release()
        if (where / portable.CONFIG).exists():
            self._adapter(where)
        else:
            self._weights(where)

    def _release(self) -> None:
        """Make the model the base again."""
        if self.peft is not None:
            self.peft.unload()
            self.peft = None
        _copy(self.base, self.loaded.model)

    def _adapter(self, folder: Path) -> None:
        from gain_cl.adapters.peft import attach_saved

        portable.inspect_adapter(folder)
        self.peft = attach_saved(self.loaded, folder)

    def _weights(self, folder: Path) -> None:
        source.inspect_model(folder)
        model = self.loaded.model
        if (folder / "tokenizer.json").exists() and load.tokenizer_of(folder, folder.name)[
            1
        ] != self.loaded.tokenizer_hash:
            what = "its tokenizer is not the base model's: losses per token would not compare"
            raise DataError(
                what, str(folder), "score it in a run of its own: model.path= that folder"
            )
        found = load.parameters_of(folder, str(model.dtype).removeprefix("torch."))
        compare_tensors(found, self.base, str(folder))
        if bad := next((n for n, t in found.items() if not torch.isfinite(t).all()), None):
            raise DataError(f"{bad} is not finite", str(folder), "it cannot be scored")
        _copy(found, model)


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.copy_(tensors[name])
