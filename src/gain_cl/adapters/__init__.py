"""What may move. An adapter touches the model once: it adds what trains, and can fold it into the
weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gain_cl.config.schema import ADAPTERS
from gain_cl.system.registry import Registry

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter

known: Registry[Adapter] = Registry(
    "adapter",
    {
        "gain": "adapters.gain:GainAdapter",
        "multiplicative_lora": "adapters.gain:MultiplicativeLoraAdapter",
        "full": "adapters.full:FullAdapter",
        "peft": "adapters.peft:PeftAdapter",
        "given": "adapters.checkpoints:GivenAdapter",
    },
    ADAPTERS,
)
register = known.register
pin_adapter, build_adapter = known.pin, known.build
