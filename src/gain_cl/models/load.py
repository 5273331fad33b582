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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gain_cl.config import schema
from gain_cl.errors import ConfigError, DataError, GainError
from gain_cl.models import convert, source

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gain_cl.models.compiled import Compiled


# --- with torch -----------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A model on its device with what every consumer of it needs.

    prefix_id: the one token put before every scored or trained text; separator_id: between packed
    documents; context: longest input in tokens; tokenizer_hash: sha256 of the tokenizer's
    definition; scale: of the logits (Granite, Cohere), see ``_prove_loss``; own_masks: each layer
    makes its own mask of packed documents, see forward.prove_masks; notes: for a reader.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    prefix_id: int
    separator_id: int
    context: int
    tokenizer_hash: str
    roles: dict[str, str] | None
    compiled: Compiled | None = None  # what is compiled of it, for training (compute.compile)
    scale: float = 1.0
    own_masks: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def body(self) -> nn.Module:
        """Return the model without its language-model head: token ids -> hidden states (B, T,
        D)."""
        net: Any = self.model
        found: nn.Module = getattr(net, net.base_model_prefix, None) or net.model
        return found

    def hidden(self, **inputs: Any) -> Tensor:
        """Return the hidden states (B, T, D) whose products with ``output`` are the logits: those
        of the body, times the scale of the logits."""
        hidden: Tensor = self.body(**inputs).last_hidden_state
        return hidden if self.scale == 1 else hidden * self.scale

    @property
    def head(self) -> nn.Module:
        """Return the head: hidden states -> logits, a linear layer."""
        return self.model.get_output_embeddings()

    @property
    def output(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (V, D) and bias (V,) of the head: the loss is computed from them in
        chunks."""
        head: Any = self.head
        return head.weight, getattr(head, "bias", None)

    @property
    def vocabulary(self) -> int:
        """Return the rows of the input embedding: token ids are below it."""
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.weight.shape[0])

    @property
    def softcap(self) -> float | None:
        """Return the cap: Gemma 2 squashes logits to cap * tanh(logits / cap)."""
        return getattr(self.model.config, "final_logit_softcapping", None)


def device_of(name: str, dtype: str) -> torch.device:
    """Resolve compute.device and check that it exists and computes in dtype."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.device_count() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\n|\. ", str(error))[0]  # the rest lists what this torch was built of
        what = f"{name!r} cannot be used: {reason}"
        do = "use auto, cpu, cuda, cuda:N or mps"
        raise ConfigError(what, "compute.device", do) from error
    half = device.type == "cuda" and dtype == "bfloat16"
    if half and not torch.cuda.is_bf16_supported(including_emulation=False):
        do = "use model.dtype=float32 or float16"
        raise ConfigError("this GPU does not compute in bfloat16", "model.dtype", do)
    return device


def load_tokenizer(model: schema.Model) -> tuple[PreTrainedTokenizerBase, str]:
    """Return (tokenizer, SHA-256 of its definition) of a model, whose files are fetched when
    needed."""
    return tokenizer_of(source.locate_model(model), model.name)


def tokenizer_of(folder: Path | None, where: str) -> tuple[PreTrainedTokenizerBase, str]:
    """Return (tokenizer, SHA-256 of its definition) of a model folder, or that of random models.
    Only AutoTokenizer knows the family's class, and it imports torch."""
    opened = convert.quiet_transformers().AutoTokenizer
    with _refusals(str(folder or where)):
        tokenizer = (
            byte_tokenizer()
            if folder is None
            else opened.from_pretrained(folder, trust_remote_code=False)
        )
    if not getattr(tokenizer, "is_fast", False):
        what = "the tokenizer has no fast version (tokenizer.json)"
        raise DataError(what, where, "save one with AutoTokenizer(...).save_pretrained")
    core: Any = tokenizer.backend_tokenizer
    return tokenizer, hashlib.sha256(core.to_str().encode()).hexdigest()


def parameters_of(folder: Path, dtype: str) -> dict[str, Tensor]:
    """Return the weights of a model folder by the names they have in the loaded model, on the
    CPU."""
    import torch

    with _refusals(str(folder)):
        net = _pretrained(folder, dtype=getattr(torch, dtype))
    return {name: p.detach() for name, p in net.named_parameters()}


UNREAD = re.compile(r"\.masked_bias$|rotary_emb\.inv_freq$|decoder\.version$")
"""Ends of names of buffers that old versions of transformers saved and no model reads, besides
those that it passes over itself."""


def _text_name(name: str) -> str:
    """Return the name that a tensor of a model of text and more has in its text part, else empty:
    wrappers put language_model before it, old ones before model, new ones behind."""
    if "language_model." not in name and not name.startswith("lm_head."):
        return ""
    rest = re.sub(r"^(model\.)?language_model\.(model\.)?", "", name)
    return rest if rest.startswith("lm_head.") else f"model.{rest}"


def _pretrained(folder: Path, **keywords: Any) -> PreTrainedModel:
    """Return the model of a folder, or the text part of one that reads more. from_pretrained gives
    random values to what a checkpoint lacks: DataError when anything does not fit."""
    import torch
    from safetensors.torch import load_file

    where: Path | None
    where, kind = folder, convert.quiet_transformers().AutoModelForCausalLM
    if source.read_config(folder).get("text_config"):
        parts = (load_file(file) for file in sorted(folder.glob("model*.safetensors")))
        tensors = {_text_name(name): t for part in parts for name, t in part.items()}
        tensors.pop("", None)
        keywords |= {"config": _config(None, folder), "state_dict": tensors}
        keywords["config"].tie_word_embeddings = "lm_head.weight" not in tensors
        with torch.device("meta"):
            where, kind = None, type(_from_config(keywords["config"]))
    net, told = kind.from_pretrained(
        where,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **keywords,
    )
    others = [n for n in told["unexpected_keys"] if not UNREAD.search(n)]
    shaped = sorted(key[0] for key in told["mismatched_keys"])
    if wrong := [*sorted(told["missing_keys"]), *sorted(others), *shaped]:
        what = f"{len(wrong)} tensors are missing, unknown or of another shape, first {wrong[0]}"
        raise DataError(what, str(folder), "save the model again")
    return cast("PreTrainedModel", net)


def vocabulary(model: schema.Model) -> int:
    """Return the rows of the input embedding as the model's configuration states them, without its
    weights."""
    return int(_config(model.arch, source.locate_model(model)).vocab_size)


def special_tokens(
    model: schema.Model, tokenizer: PreTrainedTokenizerBase, rows: int
) -> tuple[int, int]:
    """Return (prefix, separator) token ids. DataError when there is none, or when an id is not
    below ``rows`` of the embedding. A token that was added to the vocabulary (an image's) may lie
    beyond: text that holds it is refused."""
    own: Any = tokenizer
    vocabulary = own.backend_tokenizer.get_vocab(with_added_tokens=False)
    if (largest := max(vocabulary.values(), default=0)) >= rows:
        what = f"token ids reach {largest}, the model has {rows} embedding rows"
        raise DataError(what, model.name, "this is another model's tokenizer")
    ends: list[Any] = [model.separator_token_id, tokenizer.eos_token_id]
    separator = next((i for i in ends if i is not None), None)
    starts: list[Any] = [model.prefix_token_id, tokenizer.bos_token_id, separator]
    prefix = next((i for i in starts if i is not None), None)
    if separator is None or prefix is None:
        do = "set model.separator_token_id and model.prefix_token_id"
        raise DataError("the tokenizer has no end token", model.name, do)
    for key, value in {"prefix_token_id": prefix, "separator_token_id": separator}.items():
        if not 0 <= value < rows:
            what = f"model.{key}={value} has no embedding row ({rows} rows)"
            raise DataError(what, model.name, f"set model.{key} below {rows}")
    return prefix, separator


def load_model(model: schema.Model, device: torch.device) -> Loaded:
    """Load weights and tokenizer: every parameter frozen, eval mode, no KV cache. model.load_in:
    linear layers quantised."""
    folder = source.locate_model(model)
    net, notes = _open(model, folder, device)
    tokenizer, digest = load_tokenizer(model)
    net.requires_grad_(False).eval()
    net.config.use_cache = False
    head: Any = net.get_output_embeddings()
    embedding: Any = net.get_input_embeddings()
    if net.config.tie_word_embeddings and head.weight is not embedding.weight:
        net.config.tie_word_embeddings = False  # its file holds a head of its own
    if model.load_in is None:
        cast("Any", net).to(device)
    context = source.context_length(net.config.to_dict()) or 1024
    loaded = Loaded(net, tokenizer, device, 0, 0, context, digest, model.roles, notes=notes)
    tokens = special_tokens(model, tokenizer, loaded.vocabulary)
    loaded.prefix_id, loaded.separator_id = tokens
    with _refusals(model.path or model.name):
        _prove_loss(loaded)
    return loaded


def _open(
    model: schema.Model, folder: Path | None, device: torch.device
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model of a folder, or one of random weights on a device (meta: without memory),
    and what a reader must know. A family without sdpa computes attention by eager."""
    import torch

    def opened(attention: str) -> PreTrainedModel:
        keys = {"dtype": getattr(torch, model.dtype), "attn_implementation": attention}
        if folder is not None and device.type != "meta":
            return _pretrained(folder, **keys, **_placed(model, device))
        place = "meta" if device.type == "meta" else "cpu"
        with torch.random.fork_rng(devices=[]), torch.device(place):
            torch.manual_seed(model.init_seed)
            return _from_config(_config(model.arch, folder), **keys)

    with _refusals(model.path or model.name):
        try:
            return opened(model.attention), []
        except ValueError as error:  # in these words transformers says that a family has none
            if model.attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
                raise
        net = opened("eager")
    return net, [f"{net.config.model_type} has no sdpa: model.attention=eager is used"]


def _config(arch: dict[str, Any] | None, folder: Path | None) -> Any:
    """Return the configuration of a model folder, or of an arch; of its text part, if it has
    others."""
    opened = convert.quiet_transformers().AutoConfig
    if folder is None:
        config = opened.for_model(**(arch or {}))
    else:
        config = opened.from_pretrained(folder, trust_remote_code=False)
    return getattr(config, "text_config", config)


def _from_config(config: Any, **keys: Any) -> PreTrainedModel:
    """Return a model of random weights."""
    opened = convert.quiet_transformers().AutoModelForCausalLM
    net: PreTrainedModel = opened.from_config(config, trust_remote_code=False, **keys)
    return net


def _placed(model: schema.Model, device: torch.device) -> dict[str, Any]:
    """Return what from_pretrained is told of the device, so that weights go to a GPU one by one,
    and for model.load_in (bitsandbytes): 4bit is QLoRA's NF4
    with double quantisation (arXiv 2305.14314), computing in model.dtype; 8bit is LLM.int8 (arXiv
    2208.07339)."""
    if model.load_in is None:
        return {"device_map": {"": device}} if device.type == "cuda" else {}
    keys: dict[str, Any] = {"load_in_8bit": True}
    if model.load_in == "4bit":
        keys = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        keys |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": model.dtype}
    settings = convert.quiet_transformers().BitsAndBytesConfig(**keys)
    return {"quantization_config": settings, "device_map": {"": device}}


def meta_model(model: schema.Model) -> PreTrainedModel:
    """Return the model without memory for its weights (meta device), from the config.json of a
    local folder, arch, or the config.json of the hub."""
    import torch

    local = model.path is not None and Path(model.path).expanduser().is_dir()
    folder = None
    if local or model.arch is None:
        folder = source.model_at_hand(model) or source.locate_model(model)
    net, _ = _open(model, folder, torch.device("meta"))
    return net.requires_grad_(False)


def weightless(model: schema.Model) -> Loaded:
    """Return what an adapter can be attached to, to see what it refuses and trains: ``meta_model``,
    and no text."""
    import torch

    no_text: Any = None
    return Loaded(meta_model(model), no_text, torch.device("meta"), 0, 0, 1, "", model.roles)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Turn dropout off for the block. The mode of every module is restored."""
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
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})  # the old name warns


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of 256 bytes and an end token (id 0), for random models, which have no
    text of their own."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    core = Tokenizer(BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def _prove_loss(loaded: Loaded) -> None:
    """Read the number that scales the logits, and prove on four tokens that losses from hidden
    states are those of the model itself, and that no token is seen before its turn. DataError."""
    import torch

    family, net = loaded.model.config.model_type, loaded.model
    for key in ("logit_scale", "lm_head_multiplier"):
        loaded.scale = getattr(net.config, key, None) or loaded.scale
    if divisor := getattr(net.config, "logits_scaling", None):  # of one family it multiplies
        loaded.scale = float(divisor) if family == "hyperclovax" else 1 / divisor
    ids = torch.arange(4, device=loaded.device)[None]
    with torch.inference_mode():
        hidden = loaded.hidden(input_ids=ids)
        logits, ours = (  # Apple's GPU has no float64
            x.float().cpu().double()
            for x in (net(ids, use_cache=False).logits, loaded.head(hidden))
        )
        changed = (loaded.hidden(input_ids=ids * (ids < 3)) - hidden)[:, :3].abs().mean()
        if not (logits.isfinite().all() and ours.isfinite().all()):
            what = "the model's logits are not finite: its weights are damaged"
            raise DataError(what, family, "download the model again")
        if loaded.softcap:
            ours = loaded.softcap * torch.tanh(ours / loaded.softcap)
    largest = float(logits.abs().max())
    if ours.shape != logits.shape or not float((ours - logits).abs().max()) <= 1e-2 * largest:
        what = f"{family} transforms its logits in an unknown way"
        raise DataError(what, family, "use another model")
    if changed > 2e-2 * hidden.abs().mean():
        what = f"{family} looks at later tokens: it is no causal language model"
        raise DataError(what, family, "use another model")


@contextlib.contextmanager
def _refusals(where: str) -> Iterator[None]:
    """Tell in one line what transformers refuses."""
    try:
        yield
    except (GainError, MemoryError):
        raise
    except Exception as error:  # what a library raises over files of others is anybody's guess
        if "out of memory" in str(error).lower():
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        reason = reason.partition(" Model type should be one of")[0]
        what = f"transformers cannot load it: {reason}"
        do = "check that it is a causal language model for this version"
        raise DataError(what, where, do) from error
