"""Models and tokenizers: the only door to transformers. Importing this module does not import torch.

A model is a hub repository at a commit, a local folder, a GGUF file inside a pinned package, or random weights of a
given architecture. ROLES says which layers of a family play which part; everything else asks for roles, not names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gain_cl import config as cfg
from gain_cl import presets, sources
from gain_cl.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LLAMA_LIKE = {"attn_out": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
ROLES: dict[str, dict[str, str]] = {
    "gpt2": {"attn_out": "attn.c_proj", "ffn_down": "mlp.c_proj"},  # Conv1D: weight is (in, out)
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3"], _LLAMA_LIKE),
    "gpt_neox": {"attn_out": "attention.dense", "ffn_down": "mlp.dense_4h_to_h"},
    "opt": {"attn_out": "self_attn.out_proj", "ffn_down": "fc2"},
    "phi": {"attn_out": "self_attn.dense", "ffn_down": "mlp.fc2"},
}
"""model_type -> role -> suffix of module names."""

WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
]


# --- torch-free: what a model is, and whether it can be used ---------------------------------------------------------


def pin(model: cfg.Model) -> dict[str, Any]:
    """What identifies the weights and the tokenizer, for the run id. Downloads nothing."""
    if model.path is None and model.package is None:
        return {"random": model.arch, "init_seed": model.init_seed}
    if model.package is not None and model.path is None:
        return _gguf_source(model)
    assert model.path is not None
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return {"folder": sources.folder_pin(folder, WEIGHTS + SMALL_FILES)}
    return {"hub": model.path, "revision": model.revision}


def locate(model: cfg.Model) -> Path | None:
    """The local folder of config, tokenizer and weights, fetched when needed; None for random weights."""
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if not folder.is_dir():
            if model.revision is None:
                raise ConfigError(f"{model.path} has no revision", "model.revision", "give the 40-hex commit of the hub repository")
            folder = sources.snapshot(model.path, model.revision, SMALL_FILES + WEIGHTS)
        inspect(folder)
        return folder
    if model.package is not None:
        return _from_gguf(model)
    if model.arch is None:
        raise ConfigError("the model has no path, package or arch", "model", "set model.path to a local folder or a hub id")
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    if not (folder / "config.json").exists():
        raise DataError("no config.json: not a transformers model", str(folder), "give a folder written by save_pretrained")
    return _json_object(folder / "config.json")


def inspect(folder: Path, weights: bool = True) -> dict[str, Any]:
    """Check a model folder from its JSON files and the heads of its weights alone (fast, torch-free) and return its config.

    weights: whether they must be there. DataError names the fault.
    """
    config = read_config(folder)
    architectures = config.get("architectures") or []
    _inspect_code(folder)
    if architectures and not any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        names = ", ".join(map(str, architectures))
        raise DataError(f"not a causal language model: {names}", str(folder), "use a model with a ...ForCausalLM class")
    if isinstance(quantised := config.get("quantization_config"), dict):
        kind = f"{quantised.get('quant_method', 'unknown')}{', 4 bit' if quantised.get('load_in_4bit') else ''}"
        do = "use the model it was made from: nothing can be merged into quantised weights"
        raise DataError(f"the weights are quantised ({kind})", str(folder), do)
    shapes = weight_shapes(folder)
    if weights and not any(folder.glob("model*.safetensors")):
        pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise DataError(
                f"only pickle weights ({pickles[0]})", str(folder), "convert them to safetensors: opening a pickle can run code"
            )
        raise DataError("no model*.safetensors", str(folder), "give a folder written by save_pretrained")
    rows = [s[0] for n, s in shapes.items() if n.endswith(EMBEDDINGS) and len(s) == 2] + [config.get("vocab_size")]
    _inspect_tokenizer(folder, min((r for r in rows if isinstance(r, int)), default=None))
    return config


SETTINGS = [
    "config.*json",  # config.4.0.0.json is config.json for a version of transformers
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
]
"""JSON files of a model folder in which auto_map can name code."""


def _inspect_code(folder: Path) -> None:
    """Refuse a folder that names code of its own, whatever its family: DataError.

    This is the place that decides. Every call that opens a model says trust_remote_code=False too:
    left out, transformers asks on the terminal, and a `y` on stdin runs the code.
    """
    for file in sorted(f for pattern in SETTINGS for f in folder.glob(pattern)):
        if _json_object(file).get("auto_map", {}) != {}:
            do = "gain_cl never runs it: use a natively supported model, or a copy without auto_map"
            raise DataError("the model needs code from its repository", str(file), do)


EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
"""Ends of the names of the input embedding."""


def _inspect_tokenizer(folder: Path, rows: int | None) -> None:
    """rows: of the input embedding, where known."""
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        return
    data = _json_object(tokenizer)
    vocab = (data.get("model") or {}).get("vocab") or {}
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    largest = max([*ids, *(t["id"] for t in data.get("added_tokens") or [])], default=0)
    if rows is not None and largest >= rows:
        raise DataError(f"token id {largest} has no embedding row ({rows} rows)", str(tokenizer), "this is another model's tokenizer")


def has_end_token(folder: Path) -> bool:
    """Whether the tokenizer's JSON files name an end token; True where its class may bring one of its own."""
    named = {f.name: _json_object(f) for f in (folder / "tokenizer_config.json", folder / "special_tokens_map.json") if f.exists()}
    plain = named.get("tokenizer_config.json", {}).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    return not plain or any(d.get("eos_token") for d in named.values())


def weight_shapes(folder: Path, files: str = "model*.safetensors") -> dict[str, list[int]]:
    """Name -> shape of every tensor of the files, from their heads. DataError for a damaged file."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob(files)):
        try:
            with open(file, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                head = json.loads(f.read(size) if size < 100_000_000 else b"")
            tensors = {name: t for name, t in head.items() if name != "__metadata__"}
            whole = 8 + size + max((t["data_offsets"][1] for t in tensors.values()), default=0) == file.stat().st_size
            shapes |= {name: list(t["shape"]) for name, t in tensors.items()}
        except OSError as error:
            raise DataError(f"cannot read: {error.strerror}", str(file), "check the file and its permissions") from None
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            whole = False
        if not whole:
            raise DataError("the weights are cut off or no safetensors file", str(file), "download the model again")
    return shapes


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder."""
    try:
        data = json.loads(path.read_bytes())
        if isinstance(data, dict):
            return data
        error: Exception | str = f"a {type(data).__name__}, not an object"
    except OSError as failure:
        raise DataError(f"cannot read: {failure.strerror}", str(path), "check the file and its permissions") from None
    except (ValueError, RecursionError) as failure:
        error = failure
    raise DataError(f"{path.name} is not JSON: {error}", str(path.parent), "download the model again")


def at_hand(model: cfg.Model) -> Path | None:
    """See before torch is imported that the model can be had and used; the folder of a hub model's small files, which are
    fetched (its weights are not), else None. Errors as ``locate``."""
    if model.path is not None and not Path(model.path).expanduser().is_dir():
        folder = sources.snapshot(model.path, model.revision, SMALL_FILES)
        inspect(folder, weights=False)
        return folder
    if model.package is not None and model.path is None and _converted(_gguf_folder(model)) is None:
        _delta_file(model)
        sources.archive(model.package)
    return None


def context_length(config: dict[str, Any]) -> int | None:
    """Longest input in tokens, from the keys of config.json or arch; None when it does not say."""
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def _from_gguf(model: cfg.Model) -> Path:
    """Dequantise a packaged GGUF file once into a safetensors folder in the cache, with the model's delta added to its weights in
    fp32; what is found there is verified."""
    folder = _gguf_folder(model)
    if _converted(folder) is not None:
        return folder
    assert model.package is not None
    delta = _delta_file(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        _quiet()
        gguf = sources.extract(model.package, Path(temporary) / "model.gguf")
        net = AutoModelForCausalLM.from_pretrained(
            temporary,
            gguf_file=gguf.name,
            dtype=torch.float32,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            temporary,
            gguf_file=gguf.name,
            trust_remote_code=False,
        )
        if delta is not None:
            add_delta(net, delta)
        if hasattr(net.config, "quantization_config"):  # save_pretrained refuses while the mark is there
            del net.config.quantization_config
        net.hf_quantizer = None  # type: ignore[assignment]
        done = Path(temporary) / "model"
        net.save_pretrained(done)
        tokenizer.save_pretrained(done)
        hashes = {p.name: sources.file_sha256(p) for p in sorted(done.iterdir())}
        (done / MANIFEST).write_text(json.dumps({"source": _gguf_source(model), "files": hashes}, indent=1, allow_nan=False))
        if _converted(folder) is None:  # nobody was faster
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(done, folder)
    return folder


def _delta_file(model: cfg.Model) -> Path | None:
    """The file of model.delta. DataError when it is not there or not as pinned."""
    if model.delta is None:
        return None
    given = Path(model.delta.file).expanduser()
    file = given if given.is_file() else presets.configs_dir() / "model" / model.delta.file
    if not file.is_file():
        raise DataError("no such file", f"model.delta.file={model.delta.file}", "give a path, or a file beside the shipped model presets")
    if sources.file_sha256(file) != model.delta.sha256:
        raise DataError("the delta is not the one that is pinned", str(file), "restore the file, or pin its sha256 in model.delta")
    return file


def add_delta(net: nn.Module, file: Path) -> None:
    """W += B A in fp32 for every layer of a delta file: MODULE.lora_A (r, in), MODULE.lora_B (out, r). DataError when it is not of
    this model."""
    import torch
    from safetensors.torch import load_file

    tensors, layers = load_file(file), dict(net.named_modules())
    with torch.no_grad():
        for name in sorted({key.rpartition(".")[0] for key in tensors}):
            layer = layers.get(name)
            if layer is None or {f"{name}.lora_A", f"{name}.lora_B"} - tensors.keys() or is_conv1d(layer):
                raise DataError(f"{name} is no linear layer of the model", str(file), "the delta is of another model")
            change_OI = tensors[f"{name}.lora_B"].float() @ tensors[f"{name}.lora_A"].float()
            weight = cast("Tensor", layer.weight)
            if weight.shape != change_OI.shape:
                raise DataError(f"{name}: {tuple(change_OI.shape)}, not {tuple(weight.shape)}", str(file), "the delta is of another model")
            weight.copy_((weight.float() + change_OI).to(weight.dtype))


def _gguf_source(model: cfg.Model) -> dict[str, Any]:
    """What identifies the converted weights."""
    assert model.package is not None
    package = {"package": model.package.package, "sha256": model.package.sha256, "member": model.package.members}
    return package if model.delta is None else {**package, "delta": model.delta.sha256}


def _gguf_folder(model: cfg.Model) -> Path:
    assert model.package is not None
    name = f"{model.package.package.replace('==', '-')}-{_digest(_gguf_source(model))[:8]}"
    return sources.cache_dir() / "models" / name


MANIFEST = "CONVERTED.json"


def _converted(folder: Path) -> dict[str, str] | None:
    """SHA-256 of each file of a converted model; None when it is not there or not what was written."""
    try:
        hashes: dict[str, str] = json.loads((folder / MANIFEST).read_text())["files"]
        whole = all(sources.file_sha256(folder / name, remember=True) == sha for name, sha in hashes.items())
    except (OSError, ValueError, KeyError, DataError):
        return None
    return hashes if whole else None


def files(model: cfg.Model) -> dict[str, str]:
    """SHA-256 of each file of a model converted from a package (its bytes depend on the converter's version); else empty."""
    return (_converted(_from_gguf(model)) or {}) if model.package is not None and model.path is None else {}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder brings a tokenizer of its own."""
    return (folder / "tokenizer.json").exists()


# --- with torch ------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A model on its device with what every consumer of it needs.

    prefix_id: the one token put before every scored or trained text; separator_id: between packed documents;
    context: longest input in tokens; tokenizer_hash: sha256 of the tokenizer's definition.
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
        return cast("Tensor", self.head.weight), cast("Tensor | None", getattr(self.head, "bias", None))

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
        raise ConfigError(f"{name!r} is no device", "compute.device", "use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"{name} is not available: torch sees {torch.cuda.device_count()} GPUs", "compute.device", "use compute.device=cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("mps is not available", "compute.device", "use compute.device=cpu")
    if device.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("this GPU does not compute in bfloat16", "model.dtype", "use model.dtype=float32 or float16")
    return device


def load_tokenizer(model: cfg.Model) -> tuple[PreTrainedTokenizerBase, str]:
    """(tokenizer, SHA-256 of its definition) of a model, whose files are fetched when needed. Only AutoTokenizer knows the
    family's class, and it imports torch."""
    _quiet()
    folder = locate(model)
    try:
        tokenizer = byte_tokenizer() if folder is None else _tokenizer(folder)
    except (ValueError, ImportError, OSError) as error:
        raise _cannot(model, error) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "the tokenizer has no fast version (tokenizer.json)", model.name, "save one with AutoTokenizer(...).save_pretrained"
        )
    return tokenizer, hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of the definition of a folder's tokenizer, as ``load_tokenizer`` gives it."""
    _quiet()
    return hashlib.sha256(_tokenizer(folder).backend_tokenizer.to_str().encode()).hexdigest()


def _tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def parameters_of(folder: Path, dtype: str) -> dict[str, Tensor]:
    """The weights of a model folder by the names they have in the loaded model, on the CPU."""
    import torch

    _quiet()
    try:
        net = _pretrained(folder, dtype=getattr(torch, dtype))
    except (ValueError, ImportError, OSError) as error:
        raise DataError(f"transformers cannot load it: {str(error).splitlines()[0]}", str(folder), "check the folder") from error
    return {name: p.detach() for name, p in net.named_parameters()}


UNREAD = re.compile(r"\.masked_bias$|rotary_emb\.inv_freq$|decoder\.version$")
"""Ends of names of buffers that old versions of transformers saved and no model reads, besides those that it passes over itself."""


def _pretrained(folder: Path, **keywords: Any) -> PreTrainedModel:
    """from_pretrained, which gives random values to what a checkpoint lacks: DataError when anything does not fit."""
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
    if wrong := [*sorted(told["missing_keys"]), *sorted(others), *sorted(key[0] for key in told["mismatched_keys"])]:
        what = f"{len(wrong)} tensors are missing, unknown or of another shape, first {wrong[0]}"
        raise DataError(what, str(folder), "save the model again")
    return cast("PreTrainedModel", net)


def vocabulary(model: cfg.Model) -> int:
    """Rows of the input embedding as the model's configuration states them, without its weights."""
    from transformers import AutoConfig

    folder = locate(model)
    if folder is None:
        settings = AutoConfig.for_model(**(model.arch or {}))
    else:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return int(settings.get_text_config().vocab_size)


def special_tokens(model: cfg.Model, tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[int, int]:
    """(prefix, separator) token ids; DataError when there is none, or when an id is not below ``rows`` of the embedding."""
    if max(tokenizer.get_vocab().values()) >= rows:
        raise DataError(
            f"token ids reach {max(tokenizer.get_vocab().values())}, the model has {rows} embedding rows",
            model.name,
            "this is another model's tokenizer",
        )
    separator = _first(model.separator_token_id, tokenizer.eos_token_id)
    prefix = _first(model.prefix_token_id, tokenizer.bos_token_id, separator)
    if separator is None or prefix is None:
        raise DataError("the tokenizer has no end token", model.name, "set model.separator_token_id and model.prefix_token_id")
    for key, value in (("prefix_token_id", prefix), ("separator_token_id", separator)):
        if not 0 <= value < rows:
            raise DataError(f"model.{key}={value} has no embedding row ({rows} rows)", model.name, f"set model.{key} below {rows}")
    return prefix, separator


def load(model: cfg.Model, device: torch.device) -> Loaded:
    """Load weights and tokenizer; every parameter frozen, eval mode, no KV cache. model.load_in: linear layers quantised."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _quiet()
    folder = locate(model)
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
            net = _pretrained(folder, dtype=dtype, attn_implementation=model.attention, **_quantised(model, device))
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
    context = context_length(net.config.to_dict()) or 1024
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


def _quantised(model: cfg.Model, device: torch.device) -> dict[str, Any]:
    """What from_pretrained is told for model.load_in (bitsandbytes): 4bit is QLoRA's NF4 with double quantisation
    (arXiv 2305.14314), computing in model.dtype; 8bit is LLM.int8 (arXiv 2208.07339)."""
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


def meta(model: cfg.Model) -> PreTrainedModel:
    """The model without memory for its weights (meta device), from the config.json of a local folder, arch, or the config.json of
    the hub."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _quiet()
    local = model.path is not None and Path(model.path).expanduser().is_dir()
    if model.arch is not None and not local:
        settings = AutoConfig.for_model(**model.arch)
    else:
        folder = (None if local else at_hand(model)) or locate(model)
        assert folder is not None
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    return net.requires_grad_(False)


def weightless(model: cfg.Model) -> Loaded:
    """What an adapter can be attached to, to see what it refuses and trains: ``meta``, and no text."""
    import torch

    no_text: Any = None
    return Loaded(meta(model), no_text, torch.device("meta"), 0, 0, 1, "", model.roles)


def targets(model: nn.Module, roles: list[str], names: dict[str, str] | None = None) -> dict[str, nn.Module]:
    """The layers that play the roles, by module name, in model order; see ``playing``."""
    family = getattr(getattr(model, "config", None), "model_type", "unknown")
    layers = {n: m for n, m in model.named_modules() if getattr(m, "weight", None) is not None and m.weight.dim() == 2}  # packed ones too
    return {n: layers[n] for n in playing(layers, family, roles, names)}


def playing(layers: Iterable[str], family: str, roles: list[str], names: dict[str, str] | None = None) -> list[str]:
    """Those of the linear layers (names of modules) that play the roles.

    names: role -> suffix of module names for families that ROLES does not know (model.roles). ConfigError lists the
    candidates when the family is unknown or nothing matches.
    """
    table, layers = names or ROLES.get(family), list(layers)
    there = sorted({block[1] for n in layers if (block := re.search(r"\.\d+\.(.+)$", n))})
    if table is None or any(r not in table for r in roles):
        missing = ", ".join(roles if table is None else [r for r in roles if r not in table])
        raise ConfigError(
            f"no {missing} known for model family {family!r}",
            "model.roles",
            f"name the layers, e.g. model.roles={{attn_out: SUFFIX, ffn_down: SUFFIX}} with suffixes among: {', '.join(there)}",
        )
    for role in roles:
        if not any(f".{n}".endswith(f".{table[role]}") for n in layers):
            raise ConfigError(f"no module matches {role}={table[role]!r}", "model.roles", f"there is: {', '.join(there)}")
    return [n for n in layers if f".{n}".endswith(tuple(f".{table[r]}" for r in roles))]


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
    """Recompute activations in the backward pass: less memory, a third more time, the same numbers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # the old name warns
    enable({"use_reentrant": False})


def input_width(layer: nn.Module) -> int:
    """Width of a linear layer's input; Conv1D stores its weight as (in, out), a quantised layer packed."""
    return int(cast("Tensor", layer.weight).shape[0]) if is_conv1d(layer) else int(cast("int", layer.in_features))


def output_width(layer: nn.Module) -> int:
    return int(cast("Tensor", layer.weight).shape[1]) if is_conv1d(layer) else int(cast("int", layer.out_features))


def is_quantised(layer: nn.Module) -> bool:
    """bitsandbytes' Linear4bit or Linear8bitLt: the weight is packed and can be computed with, not written to."""
    return type(layer).__name__ in ("Linear4bit", "Linear8bitLt")


def can_merge(layers: dict[str, nn.Module]) -> None:
    """ConfigError when a layer's weight is quantised: a change below its step would be lost."""
    if name := next((n for n, layer in layers.items() if is_quantised(layer)), None):
        raise ConfigError(
            f"{name} is quantised: nothing can be merged into it", "model.load_in", "merge into the model without model.load_in"
        )


def is_conv1d(layer: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2), whose weight is the transpose of nn.Linear's."""
    return type(layer).__name__ == "Conv1D"


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
    """Losses are computed from hidden states in chunks; prove on four tokens that this is what the model itself does."""
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


def _cannot(model: cfg.Model, error: Exception) -> DataError:
    reason = str(error).splitlines()[0]
    if any(word in reason.lower() for word in ("attention", "attn")):
        return DataError(f"the model does not support model.attention={model.attention}", model.name, "use model.attention=eager")
    return DataError(
        f"transformers cannot load it: {reason}", model.path or model.name, "check that it is a causal language model for this version"
    )


def _first(*values: int | None) -> int | None:
    return next((v for v in values if v is not None), None)


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
