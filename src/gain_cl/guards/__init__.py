"""How the past is kept. A guard touches the stream, the loss and its own memory. The guard ``none``
does nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gain_cl.config.schema import GUARDS
from gain_cl.system.registry import Registry

if TYPE_CHECKING:
    from gain_cl.guards.base import Guard

known: Registry[Guard] = Registry(
    "guard",
    {
        "none": "guards.base:Guard",
        "ewc": "guards.ewc:EwcGuard",
        "replay": "guards.replay:ReplayGuard",
        "self_replay": "guards.replay:SelfReplayGuard",
        "kl_base": "guards.near_base:KlBaseGuard",
        "l2_base": "guards.near_base:L2BaseGuard",
        "orthogonal": "guards.near_base:OrthogonalGuard",
        "ema": "guards.near_base:EmaGuard",
    },
    GUARDS,
)
register = known.register
pin_guard, build_guard = known.pin, known.build
