"""Combinations of settings that are fine one by one and make no sense together: rows of data."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from gain_cl.config.schema import JOINT, KNOWN_CHANGE, Given, Peft, RunConfig
from gain_cl.errors import ConfigError

Origin = Callable[[str], str]
"""Dotted key -> where it was set."""

BESIDE = ("bias", "modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias")
"""Keys of PEFT's configurations that let more train than the adapter's own matrices."""

RULES = (
    (
        "handover=restart guard=ewc",
        "handover=restart with guard ewc: its penalty is about parameters of the stage before, "
        "which restart replaces",
        "handover",
        "use handover=continue",
    ),
    (
        "guard=ewc pack=mask",
        "guard ewc with train.pack=mask: its Fisher information would be of sequences whose "
        "documents see each other",
        "train.pack",
        "use train.pack=stream",
    ),
    (
        "guard=self_replay begun",
        "guard self_replay with adapter.init_from: it samples from the model as training begins, "
        "which is not the pretrained one",
        "guard.kind",
        "use another guard",
    ),
    (
        "handover=restart optimizer=carried",
        "handover=restart with train.optimizer=carried: the moments are of parameters that no "
        "longer train",
        "handover",
        "use train.optimizer=fresh",
    ),
    (
        "handover=restart adapter=full",
        "handover=restart: full fine-tuning has no adapter to freeze, the weights themselves move",
        "handover",
        "use handover=continue",
    ),
    (
        "handover=restart unknown_change",
        f"handover=restart: of PEFT's types only {', '.join(KNOWN_CHANGE)} (and no DoRA) can keep "
        "the old beside a new one",
        "handover",
        "use handover=continue",
    ),
    (
        "guard=orthogonal not_o_lora",
        "guard orthogonal keeps the LoRA of a stage orthogonal to those of the stages before",
        "guard.kind",
        "use it with adapter.peft_type=LORA and handover=restart",
    ),
    (
        "past other_regime",
        "regime={c.regime} with guard {c.guard.kind}: there is no stage before to keep",
        "guard.kind",
        "use guard=none",
    ),
    (
        "handed_over other_regime",
        "regime={c.regime}: nothing is handed over from stage to stage",
        "regime",
        "use handover=continue and train.optimizer=fresh",
    ),
    (
        "guard=l2_base unknown_change",
        "guard l2_base needs the change of the weights, which is known for "
        f"{', '.join(KNOWN_CHANGE)} of PEFT's types (no DoRA)",
        "guard.kind",
        "use guard=kl_base",
    ),
    (
        "compared beside",
        "adapter.config.{beside} trains more than the adapter, which handover=restart and guards "
        "that compare with the pretrained model do not see",
        "adapter.config",
        "leave it out",
    ),
    (
        "roles layers",
        "both adapter.roles and adapter.config.{layers} name the layers",
        "adapter.roles",
        "add adapter.config.{layers}=null, or leave the roles out",
    ),
    (
        "adapter=given guarded",
        "checkpoints that were trained elsewhere take no guard, handover or regime",
        "guard.kind",
        "leave them out",
    ),
    (
        "uneven",
        "{uneven} checkpoints for {stages} domains",
        "sequence.domains",
        "name the domain that each checkpoint learned, in order: domain=[a,b]",
    ),
    (
        "joint_domain",
        "a domain is called joint, which is the name of the stage of joint training",
        "sequence.domains",
        "give it another name",
    ),
    (
        "load_in weightless",
        "model.load_in={load_in}: {c.model.name} has random weights, there is nothing to quantise",
        "model.load_in",
        "leave it out",
    ),
    (
        "load_in adapter=full",
        "model.load_in={load_in}: quantised weights cannot be trained themselves",
        "model.load_in",
        "use gains or an adapter of PEFT's",
    ),
    (
        "load_in guard=l2_base",
        "model.load_in={load_in} with guard l2_base: it needs the weights, which are packed",
        "model.load_in",
        "use guard=kl_base",
    ),
    (
        "load_in no_gpu",
        "model.load_in={load_in} needs a CUDA GPU",
        "model.load_in",
        "leave it out",
    ),
    (
        "load_in no_bitsandbytes",
        "model.load_in={load_in} needs bitsandbytes",
        "model.load_in",
        "pip install 'gain_cl[quant]'",
    ),
)
"""(facts that are true together, why they make no sense, the setting to look at, what to do).
Braces name the configuration, c, or a fact."""


def check(config: RunConfig, origin: Origin) -> None:
    """Raise ConfigError for the first row whose facts are all true."""
    facts = find_facts(config)
    for when, what, key, do in RULES:
        if all(map(facts.get, when.split())):
            raise ConfigError(
                what.format(c=config, **facts), origin(key), do.format(c=config, **facts)
            )


def find_facts(c: RunConfig) -> dict[str, Any]:
    """Return fact -> something true if it holds."""
    peft = c.adapter if isinstance(c.adapter, Peft) else Peft(kind="peft", peft_type="", config={})
    chosen = [k for k, v in peft.config.items() if v not in (None, False, "none", [])]
    unknown = peft.peft_type not in ("", *KNOWN_CHANGE) or "use_dora" in chosen
    restart, guard, stages = c.handover == "restart", c.guard.kind, len(c.stages)
    o_lora = peft.peft_type == "LORA" and not unknown and (restart or stages == 1)
    given = len(c.adapter.checkpoints) if isinstance(c.adapter, Given) else stages
    layers = ("target_modules", "feedforward_modules")
    settings = (
        f"handover={c.handover}",
        f"guard={guard}",
        f"adapter={c.adapter.kind}",
        f"pack={c.train.pack}",
        f"optimizer={c.train.optimizer}",
    )
    return dict.fromkeys(settings, True) | {
        "begun": getattr(c.adapter, "init_from", None),
        "unknown_change": unknown,
        "not_o_lora": not o_lora,
        "past": guard in ("ewc", "replay", "orthogonal"),
        "other_regime": c.regime != "sequential",
        "handed_over": restart or c.train.optimizer == "carried",
        "compared": restart or guard in ("kl_base", "l2_base"),
        "beside": next((k for k in BESIDE if k in chosen), None),
        "roles": peft.roles,
        "layers": next((k for k in layers if peft.config.get(k) is not None), None),
        "guarded": guard != "none" or restart or c.regime != "sequential",
        "uneven": given != stages and str(given),
        "stages": stages,
        "joint_domain": JOINT in c.sequence.domains,
        "load_in": c.model.load_in,
        "no_gpu": c.compute.device in ("cpu", "mps"),
        "no_bitsandbytes": find_spec("bitsandbytes") is None,
        "weightless": c.model.path is None and c.model.package is None,
    }
