"""Every other parameter-efficient method, as PEFT implements it: the baseline its users know."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gain_cl.adapters.base import Adapter
from gain_cl.config.schema import KNOWN_CHANGE
from gain_cl.errors import ConfigError, DataError, suggest
from gain_cl.models import families
from gain_cl.models.loss import token_nll

if TYPE_CHECKING:
    from gain_cl.models.load import Loaded

START = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
"""dtype -> by how much of the largest logit an adapter may move the pretrained model when it is
attached: rounding, no more."""


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
            self.keywords |= {
                "target_modules": layers,
                **({"feedforward_modules": layers} if self.peft_type == "IA3" else {}),
            }
        self.model, self.where = (
            loaded.model,
            f"adapter {self.peft_type} on {loaded.model.config.model_type}",
        )
        self.frozen: dict[str, nn.Parameter] = {}
        before = _probe(loaded)
        with _refusals(self.where):
            self.peft = peft.get_peft_model(
                loaded.model, self.kind(**self.keywords)
            )  # changes the model in place
        self._prepare()
        if type(loaded.head) is not nn.Linear:
            raise ConfigError(
                f"{self.peft_type} changes the output head, whose loss is computed in chunks from "
                "its plain weight",
                "adapter.config.target_modules",
                "leave the head out",
            )
        if not hasattr(self.peft.base_model, "merge_and_unload"):
            raise ConfigError(
                f"{self.peft_type} cannot be folded into the weights",
                self.where,
                "use another type",
            )
        if not self.parameters():
            raise ConfigError(
                f"{self.peft_type} trains nothing",
                self.where,
                "choose other adapter.config.target_modules",
            )
        self._check_fold(loaded)
        with _refusals(self.where):
            self._check_start(loaded, before)

    def _prepare(self) -> None:
        """Put what PEFT has just made into the model's mode and into fp32."""
        self.model.train(
            self.model.training
        )  # new modules are in training mode, dropout included, wherever the model is
        for p in self.parameters().values():
            p.data = p.data.float()

    def _check_fold(self, loaded: Loaded) -> None:
        """That what trains has a place among the model's own weights: ``absorb`` comes after hours
        of training."""
        from peft.utils import ModulesToSaveWrapper

        if self.peft_type == "LORA" and any(
            any(m.lora_bias.values()) and m.get_base_layer().bias is None for m in self._layers()
        ):
            what = (
                "lora_bias learns biases of layers that have none: they cannot be folded into "
                "the weights"
            )
            raise ConfigError(what, self.where, "leave adapter.config.lora_bias out")
        copied = [
            m.original_module for m in self.model.modules() if isinstance(m, ModulesToSaveWrapper)
        ]
        if any(
            getattr(m, "weight", None) is loaded.output[0]
            for m in [*copied, *(m.get_base_layer() for m in self._layers())]
        ):
            what = (
                f"{self.peft_type} changes the input embedding, whose weight is the output "
                "head's too: folded, it would change both"
            )
            raise ConfigError(what, self.where, "leave the embedding out")

    def _check_start(self, loaded: Loaded, before: Tensor | None) -> None:
        """That the model still computes what the pretrained one does, as far as its dtype can tell,
        and exactly so when disabled."""
        if before is None:
            return
        moved = self._distance(loaded, before) / before.abs().max().item()
        if not moved <= START[loaded.model.dtype]:
            what = (
                f"{self.peft_type} does not start as the pretrained model: its logits move by "
                f"{moved:.0e} of the largest"
            )
            raise ConfigError(
                what, self.where, "use an initial value of the adapter that changes nothing"
            )
        with self.disabled():
            if self._distance(loaded, before) != 0:
                what = (
                    f"{self.peft_type} with these settings changes the pretrained weights when "
                    "it is attached"
                )
                raise ConfigError(
                    what, self.where, "use an initial value of the adapter that leaves them"
                )

    def _distance(self, loaded: Loaded, before: Tensor) -> float:
        now = _probe(loaded)
        assert now is not None
        return (now - before).abs().max().item()

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        return {
            **{
                name: p.detach().to("cpu", copy=True).contiguous()
                for name, p in self.frozen.items()
            },
            **super().state(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        while any(self._next() in name.split(".") for name in state):
            self.restart()
        if missing := sorted(self.frozen.keys() - state.keys()):
            raise DataError(
                f"{len(missing)} tensors are missing, first {missing[0]}",
                "adapter state",
                "it belongs to another method",
            )
        super().load_state({name: t for name, t in state.items() if name not in self.frozen})
        with torch.no_grad():
            for name, p in self.frozen.items():
                p.copy_(state[name])

    def _next(self) -> str:
        """PEFT's name of the adapter that a restart would add; the first is called default."""
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
            raise ConfigError(
                f"{beside[0]} trains beside {self.peft_type}, which no comparison with the "
                "pretrained model sees",
                "adapter.config",
                "use bias: none and no modules_to_save",
            )

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        try:
            with self.peft.disable_adapter():
                yield
        finally:
            self._freeze()

    def shift(self) -> Tensor:
        terms = []
        for layer in self._layers():
            weight_OI = _out_in(layer.get_base_layer())
            if self.peft_type == "IA3":
                s = torch.stack([layer.ia3_l[a].flatten() for a in layer.active_adapters]).prod(0)
                change = (s - 1).square()
                rows = weight_OI if layer.is_feedforward else weight_OI.T
                terms.append((change * rows.float().square().sum(0)).sum())
                bias = layer.get_base_layer().bias
                if not layer.is_feedforward and bias is not None:
                    terms.append((change * bias.float().square()).sum())
                continue
            pairs = self._pairs(layer)
            b, a = (
                torch.cat([b for b, _ in pairs], 1),
                torch.cat([a for _, a in pairs]),
            )  # the sum of the products is one product
            if self.peft_type == "HIRA":
                terms.append((weight_OI.float() * (b @ a)).square().sum())
            else:
                terms.append(
                    ((b.T @ b) * (a @ a.T)).sum()
                )  # tr((BA)^T BA), never the size of the weight
        return torch.stack(terms).sum()

    def _pairs(self, layer: Any) -> list[tuple[Tensor, Tensor]]:
        """(B (out, r), A (r, in)) of each active adapter, the oldest first, with B A the change of
        the layer's weight (of HiRA: the change relative to it)."""
        pairs = []
        for name in layer.active_adapters:
            if self.peft_type == "LORA" and not self._variant():
                pairs.append(
                    (layer.scaling[name] * layer.lora_B[name].weight, layer.lora_A[name].weight)
                )
            elif self.peft_type == "HIRA":
                pairs.append((layer.hira_B[name], layer.hira_A[name]))
            elif self.peft_type == "VERA":
                b, a = (
                    layer.vera_B[name][: layer.out_features],
                    layer.vera_A[name][:, : layer.in_features],
                )
                pairs.append(
                    (layer.vera_lambda_b[name][:, None] * b, layer.vera_lambda_d[name][:, None] * a)
                )
            else:
                raise self._cannot(
                    "the distance of its effective weights from the base", "use another guard"
                )
        return pairs

    def lora_inputs(self) -> dict[str, list[Tensor]]:
        """A (r, in) of each LoRA of a layer, by the layer's name, the oldest first; the last one
        trains."""
        if self.peft_type != "LORA" or self._variant():
            raise self._cannot("LoRA matrices", "use adapter.peft_type=LORA")
        names = {id(m): n for n, m in self.model.named_modules()}
        return {
            names[id(layer)]: [layer.lora_A[a].weight for a in layer.active_adapters]
            for layer in self._layers()
        }

    def absorb(self) -> None:
        fold(self.peft, self.model)

    def _layers(self) -> list[Any]:
        """PEFT's layers, in the order of the model."""
        return _layers(self.model)

    def _variant(self) -> bool:
        """Whether LoRA is more than W + B A of a linear layer: DoRA and others of PEFT's variants,
        biases of B, embeddings."""
        return self.peft_type == "LORA" and any(
            m.lora_variant
            or any(m.lora_bias.values())
            or m.lora_embedding_A
            or type(m).__name__ not in ("Linear", "Linear4bit", "Linear8bitLt")
            for m in self._layers()
        )

    def _beside(self) -> list[str]:
        """Names of parameters that train and are none of the adapter's own: biases, copies of whole
        layers."""
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
        return ConfigError(
            f"PEFT's {self.peft_type} with these settings does not offer {what}", "adapter", do
        )


def config_class(
    peft_type: str, keys: Iterable[str], origin: Callable[[str], str] = str
) -> type[Any]:
    """Return PEFT's configuration class of a type. ConfigError for a type or key that PEFT does
    not have. origin: dotted key -> where it was set."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds: dict[str, Any] = {k.value: v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
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
    """PEFT's errors in one line, without its warnings about what it corrects."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # it corrects it
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated"
        )  # between the two libraries
        try:
            yield
        except (
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            NotImplementedError,
            AssertionError,
            RuntimeError,
        ) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"PEFT refuses: {said[:300]}", where, "use other layers, settings or another method"
            ) from error


def _probe(loaded: Loaded) -> Tensor | None:
    """Logits of four tokens, fp32; None for a model without memory."""
    if loaded.device.type == "meta":
        return None
    with torch.no_grad():
        return loaded.head(
            loaded.body(torch.arange(4, device=loaded.device)[None]).last_hidden_state
        ).float()


def _out_in(layer: nn.Module) -> Tensor:
    """The weight as (out, in)."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if families.is_conv1d(layer) else weight


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
    """PEFT's own loading of a saved adapter onto the base model: a PeftModel, whose ``unload``
    gives the base back.

    PEFT takes what does not fit: it warns of a tensor that it misses and passes over one that it
    does not know. DataError where it does, ConfigError where the model's loss is not that of its
    output head's own weight, from which it is computed here.
    """
    import peft
    from safetensors.torch import load_file

    from gain_cl.adapters.portable import WEIGHTS

    where = f"adapter {folder}"
    with _refusals(where), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if peft.PeftConfig.from_pretrained(str(folder)).is_prompt_learning:
            raise ConfigError(
                "it trains vectors before the input, no change of the weights",
                where,
                "score one that changes weights",
            )
        found = peft.PeftModel.from_pretrained(loaded.model, folder)
        again: Any = peft.set_peft_model_state_dict(
            found, load_file(folder / WEIGHTS)
        )  # which tells what the first time passed over
    lacking = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    if again.unexpected_keys or lacking:
        others = again.unexpected_keys
        what = (
            f"{len(others)} of its tensors have no place in it, first {others[0]}"
            if others
            else lacking[0][:200]
        )
        raise DataError(f"it is not of this model: {what}", where, "name its base with model=")
    loaded.model.requires_grad_(False)
    loaded.model.eval()
    ids = torch.arange(4, device=loaded.device)[None]
    with torch.no_grad():
        hidden = loaded.body(ids).last_hidden_state[0]
        ours = token_nll(hidden, *loaded.output, ids[0], loaded.softcap)
        theirs = nn.functional.cross_entropy(
            found(input_ids=ids).logits[0].float(), ids[0], reduction="none"
        )
    if not torch.allclose(ours, theirs, rtol=START[loaded.model.dtype], equal_nan=True):
        what = "it changes the output head, whose loss is computed in chunks from its plain weight"
        raise ConfigError(
            what, where, "merge it (PEFT's merge_and_unload), save the whole model and score that"
        )
    return found
