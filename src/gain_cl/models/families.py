"""Know where the layers of a family are: roles, and the widths of what plays them. Torch-free at
import."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from gain_cl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

_LLAMA_LIKE = {"attn_out": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
_OF_EXPERTS = {"attn_out": "self_attn.o_proj"}
_LIKE_LLAMA = """llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 olmo2 smollm3 cohere
granite ministral3 olmo3"""
_MIXTURES = "mixtral qwen2_moe qwen3_moe olmoe deepseek_v3 gpt_oss"
ROLES: dict[str, dict[str, str]] = {
    "gpt2": {"attn_out": "attn.c_proj", "ffn_down": "mlp.c_proj"},  # Conv1D: weight is (in, out)
    **dict.fromkeys(_LIKE_LLAMA.split(), _LLAMA_LIKE),
    **dict.fromkeys(_MIXTURES.split(), _OF_EXPERTS),
    "gpt_neox": {"attn_out": "attention.dense", "ffn_down": "mlp.dense_4h_to_h"},
    "opt": {"attn_out": "self_attn.out_proj", "ffn_down": "fc2"},
    "phi": {"attn_out": "self_attn.dense", "ffn_down": "mlp.fc2"},
}
"""model_type -> role -> suffix of module names."""


def targets(
    model: nn.Module, roles: list[str], names: dict[str, str] | None = None
) -> dict[str, nn.Module]:
    """Return the layers that play the roles, by module name, in model order; see ``playing``."""
    family = getattr(getattr(model, "config", None), "model_type", "unknown")
    layers = {
        n: m
        for n, m in model.named_modules()
        if getattr(m, "weight", None) is not None and m.weight.dim() == 2
    }  # packed ones too
    return {n: layers[n] for n in playing(layers, family, roles, names)}


def playing(
    layers: Iterable[str], family: str, roles: list[str], names: dict[str, str] | None = None
) -> list[str]:
    """Return those of the linear layers (names of modules) that play the roles.

    names: role -> suffix of module names for families that ROLES does not know (model.roles).
    ConfigError lists the candidates when the family is unknown or nothing matches.
    """
    table, layers = names or ROLES.get(family), [n for n in layers if ".experts." not in n]
    there = sorted({block[1] for n in layers if (block := re.search(r"\.\d+\.(.+)$", n))})
    if names is None and table is not None and not table.keys() >= {*roles}:
        what = f"{family} is a mixture of experts: the down projections of all are one tensor"
        do = "method=gain_attn acts on its attention alone"
        raise ConfigError(f"{what}, on which no gain acts", "adapter.roles", do)
    if table is None or any(r not in table for r in roles):
        missing = ", ".join(roles if table is None else [r for r in roles if r not in table])
        named = "name the layers, e.g. model.roles={attn_out: SUFFIX, ffn_down: SUFFIX} with"
        do = f"{named} suffixes among: {', '.join(there)}"
        raise ConfigError(f"no {missing} known for model family {family!r}", "model.roles", do)
    for role in roles:
        if not any(f".{n}".endswith(f".{table[role]}") for n in layers):
            what = f"no module matches {role}={table[role]!r}"
            raise ConfigError(what, "model.roles", f"there is: {', '.join(there)}")
    return [n for n in layers if f".{n}".endswith(tuple(f".{table[r]}" for r in roles))]


def match_all(layers: Iterable[str], wanted: list[str], key: str) -> None:
    """Raise ConfigError unless each of the names is that of a module or the end of one, as PEFT
    reads them."""
    layers = list(layers)
    if missing := [w for w in wanted if not any(f".{n}".endswith(f".{w}") for n in layers)]:
        there = sorted({n.rpartition(".")[2] for n in layers if re.search(r"\.\d+\.", n)})
        what = f"no module matches {', '.join(missing)}"
        raise ConfigError(what, f"adapter.config.{key}", f"there is: {', '.join(there)}")


def input_width(layer: nn.Module) -> int:
    """Return the width of a linear layer's input. Conv1D stores its weight as (in, out), a
    quantised layer packed."""
    return _width(layer, 0)


def output_width(layer: nn.Module) -> int:
    """Return the width of a linear layer's output."""
    return _width(layer, 1)


def _width(layer: nn.Module, axis: int) -> int:
    if is_conv1d(layer):
        return int(cast("Tensor", layer.weight).shape[axis])
    return int(cast("int", (layer.in_features, layer.out_features)[axis]))


def out_in(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (out, in)."""
    weight = cast("Tensor", layer.weight)
    return weight.T if is_conv1d(layer) else weight


def is_quantised(layer: nn.Module) -> bool:
    """True if the layer is bitsandbytes' Linear4bit or Linear8bitLt: the weight is packed and can
    be computed with, not written to."""
    return type(layer).__name__ in ("Linear4bit", "Linear8bitLt")


def can_merge(layers: dict[str, nn.Module]) -> None:
    """Raise ConfigError when a layer's weight is quantised: a change below its step would be
    lost."""
    if name := next((n for n, layer in layers.items() if is_quantised(layer)), None):
        what = f"{name} is quantised: nothing can be merged into it"
        raise ConfigError(what, "model.load_in", "merge into the model without model.load_in")


def is_conv1d(layer: nn.Module) -> bool:
    """True if the layer is transformers' Conv1D (GPT-2), whose weight is the transpose of
    nn.Linear's."""
    return type(layer).__name__ == "Conv1D"
