"""Every other parameter-efficient method, as PEFT implements it: the baseline its users know."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gain_cl.adapters.base import SHIFT, Adapter, compare_tensors
from gain_cl.adapters.portable import (
    WEIGHTS,
    compare_settings,
    inspect_adapter,
)
from gain_cl.config.schema import KNOWN_CHANGE
from gain_cl.errors import ConfigError, DataError, GainError, suggest
from gain_cl.models import families
from gain_cl.models.loss import token_nll

if TYPE_CHECKING:
    from gain_cl.models.load import Loaded

START = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
"""dtype -> by how much of the largest logit an adapter may move the pretrained model when it is
attached: rounding, no more."""


HEAD = "changes the output head, whose loss is computed in chunks from its plain weight"


class PeftAdapter(Adapter):
    """peft_type: a name of peft.PeftType (LORA, IA3, ...); config: keyword arguments of its
    configuration class; roles: in place of config.target_modules, the layers of these roles (IA3
    scales their inputs)."""

    peft: Any  # peft.PeftModel around the model

    def __init__(
        self, peft_type: str, config: dict[str, Any], roles: list[str] | None = None
    ) -> None:
        self.peft_type, self.config, self.roles = peft_type, config, roles

    def attach(self, loaded: Loaded) -> None:
        import peft

        self.kind = config_class(self.peft_type, self.config)
        self.keywords = {"task_type": "CAUSAL_LM", **self.config}
        if self.roles is not None:
            layers = list(families.targets(loaded.model, self.roles, loaded.roles))
            self.keywords["target_modules"] = layers
            if self.peft_type == "IA3":
                self.keywords["feedforward_modules"] = layers
        for key in ("target_modules", "feedforward_modules", "modules_to_save", "exclude_modules"):
            if isinstance(wanted := self.keywords.get(key), list):
                there = [n for n, _ in loaded.model.named_modules()]
                families.match_all(there, wanted, key)
        self.model = loaded.model
        self.where = f"adapter {self.peft_type} on {loaded.model.config.model_type}"
        self.frozen: dict[str, nn.Parameter] = {}
        before = _probe(loaded)
        with _refusals(self.where):
            config = self.kind(**self.keywords)
            self.peft = peft.get_peft_model(loaded.model, config)  # changes the model in place
        self._prepare()
        if type(loaded.head) is not nn.Linear:
            what = f"{self.peft_type} {HEAD}"
            raise ConfigError(what, "adapter.config.target_modules", "leave the head out")
        if not hasattr(self.peft.base_model, "merge_and_unload"):
            what = f"{self.peft_type} cannot be folded into the weights"
            raise ConfigError(what, self.where, "use another type")
        self._check_fold(loaded)
        with _refusals(self.where):
            self._check_start(loaded, before)

    def _prepare(self) -> None:
        """Put what PEFT has just made into the model's mode and into fp32."""
        self.model.train(self.model.training)  # new modules, dropout included, are in training mode
        for p in self.parameters().values():
            p.data = p.data.float()
        first = next(self.model.parameters())
        if first.is_cuda and self.model.dtype == torch.bfloat16 and self.peft_type == "LORA":
            multiply_as_input(self._layers())

    def _check_fold(self, loaded: Loaded) -> None:
        """Check that what trains has a place among the model's own weights: ``absorb`` comes after
        hours of training."""
        from peft.utils import ModulesToSaveWrapper

        layers = [(m, m.get_base_layer()) for m in self._layers()]
        if self.peft_type == "LORA" and any(
            any(m.lora_bias.values()) and base.bias is None for m, base in layers
        ):
            what = "lora_bias learns biases of layers that have none: they cannot be folded"
            raise ConfigError(what, self.where, "leave adapter.config.lora_bias out")
        wrapped = [m for m in self.model.modules() if isinstance(m, ModulesToSaveWrapper)]
        changed = [*(m.original_module for m in wrapped), *(base for _, base in layers)]
        if any(getattr(m, "weight", None) is loaded.output[0] for m in changed):
            shared = "the input embedding, whose weight is the output head's too"
            what = f"{self.peft_type} changes {shared}: folded, it would change both"
            raise ConfigError(what, self.where, "leave the embedding out")

    def _check_start(self, loaded: Loaded, before: Tensor | None) -> None:
        """Check that the model still computes what the pretrained one does, as far as its dtype can
        tell, and exactly so when disabled."""
        if before is None:
            return
        moved = self._distance(loaded, before) / before.abs().max().item()
        if not moved <= START[loaded.model.dtype]:
            start = f"{self.peft_type} does not start as the pretrained model"
            do = "use an initial value of the adapter that changes nothing"
            what = f"{start}: its logits move by {moved:.0e} of the largest"
            raise ConfigError(what, self.where, do)
        with self.disabled():
            if self._distance(loaded, before) != 0:
                changes = "changes the pretrained weights when it is attached"
                do = "use an initial value of the adapter that leaves them"
                raise ConfigError(f"{self.peft_type} with these settings {changes}", self.where, do)

    def _distance(self, loaded: Loaded, before: Tensor) -> float:
        now = _probe(loaded)
        assert now is not None
        return (now - before).abs().max().item()

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def saved(self) -> dict[str, Tensor]:
        return {**self.frozen, **self.parameters()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        while any(self._next() in name.split(".") for name in state):
            self.restart()
        super().load_state(state)

    def _next(self) -> str:
        """Return PEFT's name of the adapter that a restart would add; the first is called
        default."""
        return f"restart{len(self.peft.peft_config)}"

    def restarts(self) -> bool:
        return self.peft_type in KNOWN_CHANGE and not self._variant() and not self._beside()

    def restart(self) -> None:
        if not self.restarts():
            raise self._cannot("handover=restart", "use handover=continue")
        old, name = self.parameters(), self._next()
        with _refusals(self.where):
            self.peft.add_adapter(name, self.kind(**self.keywords))
            self.peft.base_model.set_adapter(list(self.peft.peft_config))
        self.frozen |= old
        self._freeze()
        self._prepare()

    def _freeze(self) -> None:
        for p in self.frozen.values():
            p.requires_grad_(False)  # PEFT lets everything train that is active

    def keep_base(self) -> None:
        if beside := self._beside():
            unseen = "which no comparison with the pretrained model sees"
            what = f"{beside[0]} trains beside {self.peft_type}, {unseen}"
            raise ConfigError(what, "adapter.config", "use bias: none and no modules_to_save")

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        try:
            with self.peft.disable_adapter():
                yield
        finally:
            self._freeze()

    def shift(self) -> Tensor:
        if self.peft_type not in KNOWN_CHANGE or self._variant():
            raise self._cannot(SHIFT, "use another guard")
        terms = []
        for layer in self._layers():
            base, active = layer.get_base_layer(), layer.active_adapters
            if self.peft_type == "IA3":
                s = torch.stack([layer.ia3_l[a].flatten() for a in active]).prod(0)
                change, into = (s - 1).square(), layer.is_feedforward
                rows = families.out_in(base) if into else families.out_in(base).T
                terms.append((change * rows.float().square().sum(0)).sum())
                if not into and base.bias is not None:
                    terms.append((change * base.bias.float().square()).sum())
            elif self.peft_type == "LORA":  # tr((BA)^T BA), never the size of the weight
                b = torch.cat([layer.scaling[n] * layer.lora_B[n].weight for n in active], 1)
                a = torch.cat([layer.lora_A[n].weight for n in active])
                terms.append(((b.T @ b) * (a @ a.T)).sum())
            else:
                moved = sum(layer.get_delta_weight(n) for n in active)
                if self.peft_type == "HIRA":  # whose change is relative to the weight
                    moved = moved * base.weight.float()
                terms.append(moved.square().sum())
        return torch.stack(terms).sum()

    def lora_inputs(self) -> dict[str, list[Tensor]]:
        """Return A (r, in) of each LoRA of a layer, by the layer's name, the oldest first; the last
        one trains."""
        if self.peft_type != "LORA" or self._variant():
            raise self._cannot("LoRA matrices", "use adapter.peft_type=LORA")
        names = {id(m): n for n, m in self.model.named_modules()}
        return {
            names[id(layer)]: [layer.lora_A[a].weight for a in layer.active_adapters]
            for layer in self._layers()
        }

    def begin_from(self, tensors: dict[str, Tensor], folder: Path) -> None:
        import peft

        (config,) = self.peft.peft_config.values()
        compare_settings(inspect_adapter(folder)[0], config.to_dict(), folder)
        compare_tensors(tensors, peft.get_peft_model_state_dict(self.peft), str(folder))
        peft.set_peft_model_state_dict(self.peft, tensors)

    def to_peft(self, loaded: Loaded) -> tuple[Any, dict[str, Tensor]]:
        """Return PEFT's own adapter."""
        import peft

        if len(self.peft.peft_config) > 1:
            raise self._no_form("a chain of adapters (handover=restart)")
        (config,) = self.peft.peft_config.values()
        return copy.deepcopy(config), peft.get_peft_model_state_dict(self.peft)

    def absorb(self) -> None:
        fold(self.peft, self.model)

    def _layers(self) -> list[Any]:
        """Return PEFT's layers, in the order of the model."""
        return _layers(self.model)

    def _variant(self) -> bool:
        """True if LoRA is more than W + B A of a linear layer: DoRA and others of PEFT's variants,
        biases of B, embeddings."""
        return self.peft_type == "LORA" and any(
            m.lora_variant
            or any(m.lora_bias.values())
            or m.lora_embedding_A
            or type(m).__name__ not in ("Linear", "Linear4bit", "Linear8bitLt")
            for m in self._layers()
        )

    def _beside(self) -> list[str]:
        """Return the names of parameters that train and are none of the adapter's own: biases,
        copies of whole layers."""
        from peft.utils import ModulesToSaveWrapper

        own = {
            id(p)
            for m in self._layers()
            for part in m.adapter_layer_names
            for p in getattr(m, part).parameters()
        }
        copies = any(isinstance(m, ModulesToSaveWrapper) for m in self.model.modules())
        return [
            n
            for n, p in self.parameters().items()
            if id(p) not in own or (copies and "modules_to_save" in n)
        ]

    def _cannot(self, what: str, do: str) -> ConfigError:
        what = f"PEFT's {self.peft_type} with these settings does not offer {what}"
        return ConfigError(what, "adapter", do)


def config_class(
    peft_type: str, keys: Iterable[str], origin: Callable[[str], str] = str
) -> type[Any]:
    """Return PEFT's configuration class of a type. ConfigError for a type or key that PEFT does
    not have. origin: dotted key -> where it was set."""
    import peft

    kinds: dict[str, Any] = {k.value: v for k, v in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type not in kinds:
        do = suggest(peft_type, kinds)
        raise ConfigError(f"PEFT has no type {peft_type!r}", origin("adapter.peft_type"), do)
    known = inspect.signature(kinds[peft_type]).parameters
    for key in keys:
        if key not in known:
            what = f"PEFT's {peft_type} has no key {key!r}"
            raise ConfigError(what, origin(f"adapter.config.{key}"), suggest(key, known))
    return kinds[peft_type]


@contextlib.contextmanager
def _refusals(where: str) -> Iterator[None]:
    """Tell PEFT's errors in one line, without its warnings about what it corrects."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # it corrects it
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # by both
        try:
            yield
        except (GainError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            do = "use other layers, settings or another method"
            raise ConfigError(f"PEFT refuses: {said[:300]}", where, do) from error


def _probe(loaded: Loaded) -> Tensor | None:
    """Return the logits of four tokens, fp32; None for a model without memory."""
    if loaded.device.type == "meta":
        return None
    ids = torch.arange(4, device=loaded.device)[None]
    with torch.no_grad():
        return loaded.head(loaded.hidden(input_ids=ids)).float()


class InputDtypeLinear(nn.Linear):
    """A linear layer that multiplies in the dtype of its input; its weight stays fp32, as does the
    gradient."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def multiply_as_input(layers: list[Any]) -> None:
    """Make LoRA layers multiply in the dtype of the model, as under the autocast of PEFT's and
    TRL's users: in fp32 they would take most of a GPU's time."""
    for layer in layers:
        layer.cast_input_dtype_enabled = False
        for module in (*layer.lora_A.values(), *layer.lora_B.values()):
            if type(module) is nn.Linear:
                module.__class__ = InputDtypeLinear


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def fold(peft: Any, model: nn.Module) -> None:
    """Merge what a PeftModel put around the model into its weights, in fp32, rounded once; then
    take it off."""
    families.can_merge(dict(model.named_modules()))
    for layer in _layers(model):
        base = layer.get_base_layer()
        dtypes = {name: p.dtype for name, p in base.named_parameters(recurse=False)}
        base.float()
        with _refusals("merging"):
            layer.merge()
        for name, p in base.named_parameters(recurse=False):
            p.data = p.data.to(dtypes[name])
    peft.base_model.unload()


def attach_saved(loaded: Loaded, folder: Path) -> Any:
    """Load a saved adapter onto the base model, as PEFT does, and return a PeftModel, whose
    ``unload`` gives the base back.

    PEFT takes what does not fit: it warns of a tensor that it misses and passes over one that it
    does not know. DataError where it does, ConfigError where the model's loss is not that of its
    output head's own weight, from which it is computed here.
    """
    import peft
    from safetensors.torch import load_file

    where = f"adapter {folder}"
    with _refusals(where), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if peft.PeftConfig.from_pretrained(str(folder)).is_prompt_learning:
            what = "it trains vectors before the input, no change of the weights"
            raise ConfigError(what, where, "score one that changes weights")
        found = peft.PeftModel.from_pretrained(loaded.model, folder)
        again: Any = peft.set_peft_model_state_dict(found, load_file(folder / WEIGHTS))
    others = again.unexpected_keys  # this tells what the first time passed over
    lacking = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    if others or lacking:
        places = f"{len(others)} of its tensors have no place in it, first"
        what = f"{places} {others[0]}" if others else lacking[0][:200]
        raise DataError(f"it is not of this model: {what}", where, "name its base with model=")
    loaded.model.requires_grad_(False)
    loaded.model.eval()
    ids = torch.arange(4, device=loaded.device)[None]
    with torch.no_grad():
        hidden = loaded.hidden(input_ids=ids)[0]
        ours = token_nll(hidden, *loaded.output, ids[0], loaded.softcap)
        theirs = nn.functional.cross_entropy(
            found(input_ids=ids).logits[0].float(), ids[0], reduction="none"
        )
    if not torch.allclose(ours, theirs, rtol=START[loaded.model.dtype], equal_nan=True):
        do = "merge it (PEFT's merge_and_unload), save the whole model and score that"
        raise ConfigError(f"it {HEAD}", where, do)
    return found
