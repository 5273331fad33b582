"""Where a number comes from: the run id before a run, and what is recorded beside its results.
Torch-free."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import platform
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

PACKAGES = (
    "torch", "transformers", "tokenizers", "peft", "lm-eval", "datasets", "numpy", "scipy", "pandas", "safetensors", "gguf",
    "matplotlib", "pillow",
)  # fmt: skip


def run_id(config: RunConfig, pins: dict[str, Any]) -> str:
    """model-method-sequence-sSEED-HASH; HASH over the scientific settings, the pins and NUMERICS
    (40 bits)."""
    names = "-".join([config.model.name, config.method, config.sequence.name])[:70]
    return f"{names}-s{config.seed}-{identity(config.scientific(), pins, NUMERICS)}"


def identity(settings: dict[str, Any], pins: dict[str, Any], numerics: int) -> str:
    """HASH of a run id. settings: ``RunConfig.scientific``."""
    settings = without_places(settings, pins)
    what = {"settings": settings, "pins": pins, "numerics": numerics}
    return json_sha256(what, compact=True)[:10]


def without_places(settings: dict[str, Any], pins: dict[str, Any]) -> dict[str, Any]:
    """Settings but for the paths of what the pins identify by its content: where it lies changes
    nothing."""
    settings = copy.deepcopy(settings)
    if (
        "folder" in pins["model"]
    ):  # its content is pinned: where it lies and how the path is spelt change nothing
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
    """Commit, package versions and machine. No environment variable is recorded: secrets live
    there."""
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
    """What the bits of a number may depend on besides settings and weights: the processor and the
    libraries that compute."""
    return {
        "processor": _processor(),
        "platform": platform.machine(),
        **{n: _installed(n) for n in ("torch", "transformers", "peft", "lm-eval", "bitsandbytes")},
    }


def version() -> str:
    """The installed version of gain_cl."""
    return _installed("gain-cl") or "uninstalled"


def commit() -> dict[str, Any]:
    """Git commit of the source tree that runs, and whether files differ from it; None outside a
    checkout."""
    here = Path(__file__).resolve().parents[1]
    try:
        git = ["git", "-C", str(here)]
        sha = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        tracked = (
            subprocess.run(
                [*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10
            ).returncode
            == 0
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", str(here)],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return (
        {"commit": sha, "dirty": bool(changes.strip())}
        if tracked
        else {"commit": None, "dirty": None}
    )


@functools.cache
def code() -> str:
    """SHA-256 over the source files of gain_cl."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes (GPU memory is counted by the
    caller)."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()
