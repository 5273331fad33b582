"""Say where a number comes from: the run id before a run, and what is recorded beside its results.
Torch-free."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from gain_cl.config.schema import RunConfig
from gain_cl.system.hashes import json_sha256

NUMERICS = 1
"""Raised whenever the same settings would give other numbers than before; part of every run id."""

GPU_NUMERICS = 2
"""Raised likewise where a GPU alone gives other numbers. Not in the run id, which is known before
the device: a run that was begun with other GPU numerics does not go on.

2: LoRA multiplies in bf16 where the model does; AdamW is one kernel."""

PACKAGES = (
    *("torch", "transformers", "tokenizers", "peft", "lm-eval", "datasets", "numpy", "scipy"),
    *("pandas", "safetensors", "gguf", "matplotlib", "pillow"),
)


def run_id(config: RunConfig, pins: dict[str, Any], numerics: int | None = None) -> str:
    """Return model-method-sequence-sSEED-HASH, where HASH (40 bits) is over the scientific
    settings, the pins and the version of the numerics."""
    names = "-".join([config.model.name, config.method, config.sequence.name])[:70]
    return f"{names}-s{config.seed}-{identity(config.scientific(), pins, numerics or NUMERICS)}"


def identity(settings: dict[str, Any], pins: dict[str, Any], numerics: int) -> str:
    """Return the HASH of a run id. settings: ``RunConfig.scientific``."""
    settings = without_places(settings, pins)
    what = {"settings": settings, "pins": pins, "numerics": numerics}
    return json_sha256(what, compact=True)[:10]


def without_places(settings: dict[str, Any], pins: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without the paths of what the pins identify by its content: where it lies
    and how its path is spelt change nothing."""
    settings = copy.deepcopy(settings)
    if "folder" in pins["model"]:
        del settings["model"]["path"]
    if "files" in pins.get("init_from", {}):
        del settings["adapter"]["init_from"]
    if "checkpoints" in pins:
        del settings["adapter"]["checkpoints"]
    for domain in settings["domains"].values():
        if domain["source"]["kind"] == "files":
            del domain["source"]["path"]
    return settings


def environment() -> dict[str, Any]:
    """Return commit, package versions and machine. No environment variable is recorded: secrets
    live there."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "numerics": NUMERICS,
        "gain_cl": version(),
        **commit(),
        "python": platform.python_version(),
        "packages": {name: _installed(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def machine() -> dict[str, Any]:
    """Return what the bits of a number may depend on besides settings and weights: the processor
    and the libraries that compute."""
    return {
        "processor": _processor(),
        "platform": platform.machine(),
        **{n: _installed(n) for n in ("torch", "transformers", "peft", "lm-eval", "bitsandbytes")},
    }


def version() -> str:
    """Return the installed version of gain_cl."""
    return _installed("gain-cl") or "uninstalled"


def commit() -> dict[str, Any]:
    """Return the git commit of the source tree that runs, and True if files differ from it. Both
    are None outside a checkout."""
    here = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # fails where the source is not tracked
        changed = bool(git("status", "--porcelain", str(here)))
        return {"commit": git("rev-parse", "HEAD"), "dirty": changed}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


@functools.cache
def code() -> str:
    """Return the SHA-256 over the source files of gain_cl."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def peak_memory() -> int:
    """Return the largest resident set of this process so far, in bytes. The caller counts GPU
    memory."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _installed(name: str) -> str | None:
    """Return the version of a package; None when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the name of the processor."""
    try:
        found = re.search(r"^model name.*?:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor()
