"""Models and tokenizers: the only door to transformers. Importing this module does not import
torch.

A model is a hub repository at a commit, a local folder, a GGUF file inside a pinned package, or
random weights of a given architecture. ROLES says which layers of a family play which part;
everything else asks for roles, not names.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gain_cl.config import schema
from gain_cl.errors import ConfigError, DataError
from gain_cl.models import convert, source

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# --- with torch -----------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A model on its device with what every consumer of it needs.

    prefix_id: the one token put before every scored or trained text; separator_id: between packed
    documents; context: longest input in tokens; tokenizer_hash: sha256 of the tokenizer's
    definition.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    prefix_id: int
    separator_id: int
    context: int
    tokenizer_hash: str
    roles: dict[str, str] | None

    @property
    def body(self) -> nn.Module:
        """The model without its language-model head: token ids -> hidden states (B, T, D)."""
        return getattr(self.model, self.model.base_model_prefix)

    @property
    def head(self) -> nn.Module:
        """Hidden states -> logits, a linear layer."""
        return self.model.get_output_embeddings()

    @property
    def output(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) of the head: the loss is computed from them in chunks."""
        return cast("Tensor", self.head.weight), cast(
            "Tensor | None", getattr(self.head, "bias", None)
        )

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding: token ids are below it."""
        return int(cast("Tensor", self.model.get_input_embeddings().weight).shape[0])

    @property
    def softcap(self) -> float | None:
        """Gemma 2 squashes logits to cap * tanh(logits / cap)."""
        return getattr(self.model.config, "final_logit_softcapping", None)


def device_of(name: str, dtype: str) -> torch.device:
    """Resolve compute.device and check that it exists and computes in dtype."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"{name!r} is no device", "compute.device", "use auto, cpu, cuda, cuda:N or mps"
        ) from None
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"{name} is not available: torch sees {torch.cuda.device_count()} GPUs",
            "compute.device",
            "use compute.device=cpu",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("mps is not available", "compute.device", "use compute.device=cpu")
    if (
        device.type == "cuda"
        and dtype == "bfloat16"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ConfigError(
            "this GPU does not compute in bfloat16",
            "model.dtype",
            "use model.dtype=float32 or float16",
        )
    return device


def load_tokenizer(model: schema.Model) -> tuple[PreTrainedTokenizerBase, str]:
    """(tokenizer, SHA-256 of its definition) of a model, whose files are fetched when needed. Only
    AutoTokenizer knows the family's class, and it imports torch."""
    convert._quiet()
    folder = source.locate(model)
    try:
        tokenizer = byte_tokenizer() if folder is None else _tokenizer(folder)
    except (ValueError, ImportError, OSError) as error:
        raise _cannot(model, error) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "the tokenizer has no fast version (tokenizer.json)",
            model.name,
            "save one with AutoTokenizer(...).save_pretrained",
        )
    return tokenizer, hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of the definition of a folder's tokenizer, as ``load_tokenizer`` gives it."""
    convert._quiet()
    return hashlib.sha256(_tokenizer(folder).backend_tokenizer.to_str().encode()).hexdigest()


def _tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def parameters_of(folder: Path, dtype: str) -> dict[str, Tensor]:
    """The weights of a model folder by the names they have in the loaded model, on the CPU."""
    import torch

    convert._quiet()
    try:
        net = _pretrained(folder, dtype=getattr(torch, dtype))
    except (ValueError, ImportError, OSError) as error:
        raise DataError(
            f"transformers cannot load it: {str(error).splitlines()[0]}",
            str(folder),
            "check the folder",
        ) from error
    return {name: p.detach() for name, p in net.named_parameters()}


UNREAD = re.compile(r"\.masked_bias$|rotary_emb\.inv_freq$|decoder\.version$")
"""Ends of names of buffers that old versions of transformers saved and no model reads, besides
those that it passes over itself."""


def _pretrained(folder: Path, **keywords: Any) -> PreTrainedModel:
    """from_pretrained, which gives random values to what a checkpoint lacks: DataError when
    anything does not fit."""
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **keywords,
    )
    net, told = found
    others = [n for n in told["unexpected_keys"] if not UNREAD.search(n)]
    if wrong := [
        *sorted(told["missing_keys"]),
        *sorted(others),
        *sorted(key[0] for key in told["mismatched_keys"]),
    ]:
        what = f"{len(wrong)} tensors are missing, unknown or of another shape, first {wrong[0]}"
        raise DataError(what, str(folder), "save the model again")
    return cast("PreTrainedModel", net)


def vocabulary(model: schema.Model) -> int:
    """Rows of the input embedding as the model's configuration states them, without its weights."""
    from transformers import AutoConfig

    folder = source.locate(model)
    if folder is None:
        settings = AutoConfig.for_model(**(model.arch or {}))
    else:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return int(settings.get_text_config().vocab_size)


def special_tokens(
    model: schema.Model, tokenizer: PreTrainedTokenizerBase, rows: int
) -> tuple[int, int]:
    """(prefix, separator) token ids; DataError when there is none, or when an id is not below
    ``rows`` of the embedding."""
    if max(tokenizer.get_vocab().values()) >= rows:
        raise DataError(
            f"token ids reach {max(tokenizer.get_vocab().values())}, the model has {rows} "
            "embedding rows",
            model.name,
            "this is another model's tokenizer",
        )
    separator = _first(model.separator_token_id, tokenizer.eos_token_id)
    prefix = _first(model.prefix_token_id, tokenizer.bos_token_id, separator)
    if separator is None or prefix is None:
        raise DataError(
            "the tokenizer has no end token",
            model.name,
            "set model.separator_token_id and model.prefix_token_id",
        )
    for key, value in (("prefix_token_id", prefix), ("separator_token_id", separator)):
        if not 0 <= value < rows:
            raise DataError(
                f"model.{key}={value} has no embedding row ({rows} rows)",
                model.name,
                f"set model.{key} below {rows}",
            )
    return prefix, separator


def load(model: schema.Model, device: torch.device) -> Loaded:
    """Load weights and tokenizer; every parameter frozen, eval mode, no KV cache. model.load_in:
    linear layers quantised."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    convert._quiet()
    folder = source.locate(model)
    dtype = getattr(torch, model.dtype)
    if folder is None:
        assert model.arch is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(model.init_seed)
            try:
                net = AutoModelForCausalLM.from_config(
                    AutoConfig.for_model(**model.arch),
                    dtype=dtype,
                    attn_implementation=model.attention,
                    trust_remote_code=False,
                )
            except (ValueError, ImportError) as error:
                raise _cannot(model, error) from error
    else:
        try:
            net = _pretrained(
                folder,
                dtype=dtype,
                attn_implementation=model.attention,
                **_quantised(model, device),
            )
        except (ValueError, ImportError, OSError) as error:
            raise _cannot(model, error) from error
    tokenizer, tokenizer_hash = load_tokenizer(model)
    net.requires_grad_(False)
    net.eval()
    net.config.use_cache = False
    if model.load_in is None:
        net.to(device)
    rows = net.get_input_embeddings().weight.shape[0]
    prefix, separator = special_tokens(model, tokenizer, rows)
    context = source.context_length(net.config.to_dict()) or 1024
    loaded = Loaded(
        model=net,
        tokenizer=tokenizer,
        device=device,
        prefix_id=prefix,
        separator_id=separator,
        context=context,
        tokenizer_hash=tokenizer_hash,
        roles=model.roles,
    )
    _check_head(loaded)
    return loaded


def _quantised(model: schema.Model, device: torch.device) -> dict[str, Any]:
    """What from_pretrained is told for model.load_in (bitsandbytes): 4bit is QLoRA's NF4 with
    double quantisation (arXiv 2305.14314), computing in model.dtype; 8bit is LLM.int8 (arXiv
    2208.07339)."""
    import torch
    from transformers import BitsAndBytesConfig

    if model.load_in is None:
        return {}
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if model.load_in == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        )
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def meta(model: schema.Model) -> PreTrainedModel:
    """The model without memory for its weights (meta device), from the config.json of a local
    folder, arch, or the config.json of the hub."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    convert._quiet()
    local = model.path is not None and Path(model.path).expanduser().is_dir()
    if model.arch is not None and not local:
        settings = AutoConfig.for_model(**model.arch)
    else:
        folder = (None if local else source.at_hand(model)) or source.locate(model)
        assert folder is not None
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    return net.requires_grad_(False)


def weightless(model: schema.Model) -> Loaded:
    """What an adapter can be attached to, to see what it refuses and trains: ``meta``, and no
    text."""
    import torch

    no_text: Any = None
    return Loaded(meta(model), no_text, torch.device("meta"), 0, 0, 1, "", model.roles)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout while it lasts; the mode of every module is restored."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass: less memory, a third more time, the same
    numbers."""
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )  # the old name warns
    enable({"use_reentrant": False})


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """256 bytes and an end token (id 0): for random models, which have no text of their own."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    core = Tokenizer(BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def _check_head(loaded: Loaded) -> None:
    """Losses are computed from hidden states in chunks; prove on four tokens that this is what the
    model itself does."""
    import torch

    ids = torch.arange(4, device=loaded.device)[None]
    with torch.inference_mode():
        logits = loaded.model(ids).logits.float()
        ours = loaded.head(loaded.body(ids).last_hidden_state).float()
        if loaded.softcap:
            ours = loaded.softcap * torch.tanh(ours / loaded.softcap)
    if not torch.allclose(ours, logits, rtol=1e-2, atol=1e-2):
        raise DataError(
            f"{loaded.model.config.model_type} transforms its logits in an unknown way",
            loaded.model.config.model_type,
            "support it in models.Loaded",
        )


def _cannot(model: schema.Model, error: Exception) -> DataError:
    reason = str(error).splitlines()[0]
    if any(word in reason.lower() for word in ("attention", "attn")):
        return DataError(
            f"the model does not support model.attention={model.attention}",
            model.name,
            "use model.attention=eager",
        )
    return DataError(
        f"transformers cannot load it: {reason}",
        model.path or model.name,
        "check that it is a causal language model for this version",
    )


def _first(*values: int | None) -> int | None:
    return next((v for v in values if v is not None), None)
