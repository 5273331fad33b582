"""Turn a GGUF file, and a delta beside it, into an ordinary folder of transformers."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gain_cl.config import presets, schema
from gain_cl.errors import DataError
from gain_cl.models import families
from gain_cl.system import hashes, packages

if TYPE_CHECKING:
    from torch import Tensor, nn


def from_gguf(model: schema.Model) -> Path:
    """Dequantise a packaged GGUF file once into a safetensors folder in the cache, with the model's
    delta added to its weights in fp32; what is found there is verified."""
    folder = gguf_folder(model)
    if converted_files(folder) is not None:
        return folder
    assert model.package is not None
    delta = delta_file(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        import torch

        transformers = quiet_transformers()
        gguf = packages.extract(model.package, Path(temporary) / "model.gguf")
        net = transformers.AutoModelForCausalLM.from_pretrained(
            temporary, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            temporary, gguf_file=gguf.name, trust_remote_code=False
        )
        if delta is not None:
            add_delta(net, delta)
        if hasattr(net.config, "quantization_config"):  # save_pretrained refuses the mark
            del net.config.quantization_config
        net.hf_quantizer = None
        done = Path(temporary) / "model"
        net.save_pretrained(done)
        tokenizer.save_pretrained(done)
        digests = {p.name: hashes.file_sha256(p) for p in sorted(done.iterdir())}
        about = {"source": gguf_source(model), "files": digests, "transformers": _major()}
        (done / MANIFEST).write_text(json.dumps(about, indent=1, allow_nan=False))
        if converted_files(folder) is None:  # nobody was faster
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(done, folder)
    return folder


def delta_file(model: schema.Model) -> Path | None:
    """Return the file of model.delta. DataError when it is not there or not as pinned."""
    if model.delta is None:
        return None
    given = Path(model.delta.file).expanduser()
    file = given if given.is_file() else presets.configs_dir() / "model" / model.delta.file
    hashes.check_pinned(file, model.delta.sha256, "restore it, or pin its sha256 in model.delta")
    return file


def add_delta(net: nn.Module, file: Path) -> None:
    """Add B A to W in fp32 for every layer of a delta file: MODULE.lora_A (r, in), MODULE.lora_B
    (out, r). DataError when it is not of this model."""
    import torch
    from safetensors.torch import load_file

    tensors, layers = load_file(file), dict(net.named_modules())
    with torch.no_grad():
        for name in sorted({key.rpartition(".")[0] for key in tensors}):
            layer, other = layers.get(name), "the delta is of another model"
            a, b = (tensors.get(f"{name}.lora_{part}") for part in "AB")
            if layer is None or a is None or b is None or families.is_conv1d(layer):
                raise DataError(f"{name} is no linear layer of the model", str(file), other)
            change_OI, weight = b.float() @ a.float(), cast("Tensor", layer.weight)
            if weight.shape != change_OI.shape:
                what = f"{name}: {tuple(change_OI.shape)}, not {tuple(weight.shape)}"
                raise DataError(what, str(file), other)
            weight.copy_((weight.float() + change_OI).to(weight.dtype))


def gguf_source(model: schema.Model) -> dict[str, Any]:
    """Return what identifies the converted weights."""
    assert model.package is not None
    package = {
        "package": model.package.package,
        "sha256": model.package.sha256,
        "member": model.package.members,
    }
    return package if model.delta is None else {**package, "delta": model.delta.sha256}


def gguf_folder(model: schema.Model) -> Path:
    assert model.package is not None
    name = (
        f"{model.package.package.replace('==', '-')}-{hashes.json_sha256(gguf_source(model))[:8]}"
    )
    return hashes.cache_dir() / "models" / name


MANIFEST = "CONVERTED.json"
TOKENIZER_FILES = [
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
]


def converted_files(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 of each file of a converted model, or None when it is not there, not what
    was written, or by another major version of transformers, which names things otherwise."""
    try:
        about = json.loads((folder / MANIFEST).read_text())
        digests: dict[str, str] = about["files"]
        whole = about.get("transformers", _major()) == _major() and all(
            hashes.file_sha256(folder / name, remember=True) == sha for name, sha in digests.items()
        )
    except (OSError, ValueError, KeyError, DataError):
        return None
    return digests if whole else None


def _major() -> str:
    return version("transformers").partition(".")[0]


def save_model(net: Any, tokenizer: Any, folder: Path, base: Path | None) -> None:
    """Write a checkpoint that transformers 4 and 5 read alike.

    What version 5 writes is completed by the base's own keys and tokenizer files (base: its folder)
    and by the names of version 4, which reads no rope_parameters and would take its defaults.
    """
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    own, file = {}, folder / "config.json"
    if base is not None:
        for pattern in TOKENIZER_FILES:
            for found in base.glob(pattern):
                shutil.copyfile(found, folder / found.name)
        own = json.loads((base / "config.json").read_text())
        own = own.get("text_config", own)
    new = json.loads(file.read_text())
    rope = new.get("rope_parameters") or {}
    main = rope.get("full_attention") or rope  # by kind of layer, or one for all
    neox = "gpt_neox" in new["model_type"]
    scaling = {k: v for k, v in main.items() if k not in ("rope_theta", "partial_rotary_factor")}
    named = {
        "torch_dtype": new.get("dtype"),
        "rotary_emb_base" if neox else "rope_theta": main.get("rope_theta"),
        "rope_scaling": scaling if main.get("rope_type", "default") != "default" else None,
        "rotary_pct" if neox else "partial_rotary_factor": main.get("partial_rotary_factor"),
        "rope_local_base_freq": (rope.get("sliding_attention") or {}).get("rope_theta"),
    }
    named |= {alias: new.get(key) for alias, key in net.config.attribute_map.items()}
    both = {**own, **new, **{k: v for k, v in named.items() if v is not None}}
    opened, plain = quiet_transformers().AutoConfig, file.read_text()
    read = opened.from_pretrained(folder, trust_remote_code=False).to_dict()
    try:
        file.write_text(json.dumps(both, indent=2, sort_keys=True, allow_nan=False) + "\n")
        again = opened.from_pretrained(folder, trust_remote_code=False).to_dict()
        same = all(again.get(key) == value for key, value in read.items())
    except Exception:  # an infinite value; or what a library raises over a key it does not expect
        same = False
    if not same:  # a family that version 4 does not know
        file.write_text(plain)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = extra
        del settings["extra_special_tokens"]
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def model_files(model: schema.Model) -> dict[str, str]:
    """Return the SHA-256 of each file of a model converted from a package (its bytes depend on the
    converter's version); else empty."""
    packaged = model.package is not None and model.path is None
    return (converted_files(from_gguf(model)) or {}) if packaged else {}


def quiet_transformers() -> Any:
    """Return transformers, which tells errors alone from here on."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
