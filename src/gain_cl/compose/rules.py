"""Refuse combinations of settings that make no sense."""

from __future__ import annotations

from collections.abc import Callable

from gain_cl.config.schema import (
    JOINT,
    KNOWN_CHANGE,
    Full,
    Given,
    Peft,
    RunConfig,
)
from gain_cl.errors import ConfigError

Origin = Callable[[str], str]  # dotted key -> where it was set


BESIDE = ("bias", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias")
"""Keys of PEFT's configurations that let more train than the adapter's own matrices."""


def _combination(config: RunConfig, origin: Origin) -> None:
    """Settings that are fine one by one and make no sense together: each refusal says why."""
    adapter, guard, restart = config.adapter, config.guard.kind, config.handover == "restart"
    lora = (
        isinstance(adapter, Peft)
        and adapter.peft_type == "LORA"
        and not adapter.config.get("use_dora")
    )
    unknown_change = isinstance(adapter, Peft) and (
        adapter.peft_type not in KNOWN_CHANGE or bool(adapter.config.get("use_dora"))
    )
    beside = (
        [k for k in BESIDE if adapter.config.get(k) not in (None, False, "none", [])]
        if isinstance(adapter, Peft)
        else []
    )
    refusals: list[tuple[bool, str, str, str]] = [
        (
            restart and guard == "ewc",
            "handover=restart with guard ewc: its penalty is about parameters of the stage "
            "before, which restart replaces",
            "handover",
            "use handover=continue",
        ),
        (
            guard == "ewc" and config.train.pack == "mask",
            "guard ewc with train.pack=mask: its Fisher information would be of sequences whose "
            "documents see each other",
            "train.pack",
            "use train.pack=stream",
        ),
        (
            guard == "self_replay" and getattr(adapter, "init_from", None) is not None,
            "guard self_replay with adapter.init_from: it samples from the model as training "
            "begins, which is not the pretrained one",
            "guard.kind",
            "use another guard",
        ),
        (
            restart and config.train.optimizer == "carried",
            "handover=restart with train.optimizer=carried: the moments are of parameters that "
            "no longer train",
            "handover",
            "use train.optimizer=fresh",
        ),
        (
            restart and isinstance(adapter, Full),
            "handover=restart: full fine-tuning has no adapter to freeze, the weights "
            "themselves move",
            "handover",
            "use handover=continue",
        ),
        (
            restart and unknown_change,
            f"handover=restart: of PEFT's types only {', '.join(KNOWN_CHANGE)} (and no DoRA) can "
            "keep the old beside a new one",
            "handover",
            "use handover=continue",
        ),
        (
            guard == "orthogonal" and not (lora and (restart or len(config.stages) == 1)),
            "guard orthogonal keeps the LoRA of a stage orthogonal to those of the stages before",
            "guard.kind",
            "use it with adapter.peft_type=LORA and handover=restart",
        ),
        (
            config.regime != "sequential" and guard in ("ewc", "replay", "orthogonal"),
            f"regime={config.regime} with guard {guard}: there is no stage before to keep",
            "guard.kind",
            "use guard=none",
        ),
        (
            config.regime != "sequential" and (restart or config.train.optimizer == "carried"),
            f"regime={config.regime}: nothing is handed over from stage to stage",
            "regime",
            "use handover=continue and train.optimizer=fresh",
        ),
        (
            guard == "l2_base" and unknown_change,
            "guard l2_base needs the change of the weights, which is known for "
            f"{', '.join(KNOWN_CHANGE)} of PEFT's types (no DoRA)",
            "guard.kind",
            "use guard=kl_base",
        ),
        (
            bool(beside) and (restart or guard in ("kl_base", "l2_base")),
            f"adapter.config.{beside[0] if beside else ''} trains more than the adapter, which "
            "handover=restart and guards that compare "
            "with the pretrained model do not see",
            "adapter.config",
            "leave it out",
        ),
        (
            isinstance(adapter, Given)
            and (guard != "none" or restart or config.regime != "sequential"),
            "checkpoints that were trained elsewhere take no guard, handover or regime",
            "guard.kind",
            "leave them out",
        ),
        (
            isinstance(adapter, Given) and len(adapter.checkpoints) != len(config.stages),
            f"{len(adapter.checkpoints) if isinstance(adapter, Given) else 0} checkpoints for "
            f"{len(config.stages)} domains",
            "sequence.domains",
            "name the domain that each checkpoint learned, in order: domain=[a,b]",
        ),
        (
            JOINT in config.sequence.domains,
            "a domain is called joint, which is the name of the stage of joint training",
            "sequence.domains",
            "give it another name",
        ),
    ]
    for wrong, what, key, do in refusals:
        if wrong:
            raise ConfigError(what, origin(key), do)
