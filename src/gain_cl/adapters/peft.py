"""Every other parameter-efficient method, as PEFT implements it: the baseline its users know."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from gain_cl.adapters.base import Adapter
from gain_cl.errors import ConfigError

if TYPE_CHECKING:
    from gain_cl.models import Loaded


class PeftAdapter(Adapter):
    """peft_type: a name of peft.PeftType (LORA, IA3, ...); config: keyword arguments of its configuration class."""

    def __init__(self, peft_type: str, config: dict[str, Any]) -> None:
        self.peft_type, self.config = peft_type, config

    def attach(self, loaded: Loaded) -> None:
        import peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        kinds = {k.value: v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.peft_type not in kinds:
            raise ConfigError(f"PEFT has no type {self.peft_type!r}", "adapter.peft_type", f"use one of: {', '.join(sorted(kinds))}")
        known = inspect.signature(kinds[self.peft_type]).parameters
        unknown = sorted(set(self.config) - set(known))
        if unknown:
            raise ConfigError(
                f"PEFT's {self.peft_type} has no key {unknown[0]!r}", "adapter.config", f"its keys: {', '.join(sorted(known))}"
            )
        try:
            settings = kinds[self.peft_type](task_type="CAUSAL_LM", **self.config)
            self.model = loaded.model
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")  # it corrects it
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # between the two libraries
                self.peft = peft.get_peft_model(loaded.model, settings)  # changes the model in place
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"PEFT refuses: {str(error).splitlines()[0]}", f"adapter {self.peft_type} on {loaded.model.config.model_type}"
            ) from error
        if type(loaded.head) is not nn.Linear:
            raise ConfigError(
                f"{self.peft_type} changes the output head, whose loss is computed in chunks from its plain weight",
                "adapter.config.target_modules",
                "leave the head out",
            )
        if not self.parameters():
            raise ConfigError(f"{self.peft_type} trains nothing on {loaded.model.config.model_type}", "adapter.config.target_modules")

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def absorb(self) -> None:
        self.peft.merge_and_unload()
