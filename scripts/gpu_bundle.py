"""Make a cache folder that holds what a run of a configuration reads, and nothing else.

    python scripts/gpu_bundle.py DIR [GROUP=NAME] [KEY=VALUE] ...     # same overrides as run

A machine without network runs from it after ``. DIR/env.sh``. What the caches of this machine have
is copied, the rest fetched; texts are tokenised anew, for the cache here may hold them as an older
gain_cl stored them. Archives stay behind where their text is tokenised or their model is
converted: other versions of transformers convert its tokenizer otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from gain_cl.compose import composition
from gain_cl.config.schema import PackageSource, RunConfig
from gain_cl.errors import ConfigError, GainError
from gain_cl.models import source
from gain_cl.system import hashes
from gain_cl.tools import prepare

ENVIRONMENT = """\
# A run reads from this folder, without network: . DIR/env.sh
GAIN_CL_CACHE=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)
export GAIN_CL_CACHE HF_HUB_CACHE="$GAIN_CL_CACHE/hub" HF_HUB_OFFLINE=1
"""


def bundle(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Fill the folder. Return the report of ``prepare``. ConfigError for a folder that holds
    something else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "env.sh").exists():
        raise ConfigError("the folder is not empty and no bundle", str(folder), "name a new folder")
    here = hashes.cache_dir()
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path.home() / ".cache/huggingface/hub")
    sources = [domain.source for domain in config.domains.values()]
    packages = {s.files.package for s in sources if isinstance(s, PackageSource)}
    if config.model.package is not None:
        packages.add(config.model.package.package)
    for name in sorted(packages):
        _copy(here / "packages" / name, folder / "packages" / name)
    for converted in (here / "models").glob("*/CONVERTED.json"):
        if _json(converted)["source"] == source.pin_model(config.model):
            _copy(converted.parent, folder / "models" / converted.parent.name)
    if config.model.path is not None:
        name = "models--" + config.model.path.replace("/", "--")
        _copy(hub / name, folder / "hub" / name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "env.sh").write_text(ENVIRONMENT)
    os.environ["GAIN_CL_CACHE"] = str(folder.absolute())
    os.environ["HF_HUB_CACHE"] = str((folder / "hub").absolute())
    report = prepare.examine(config)
    for name in packages:
        shutil.rmtree(folder / "packages" / name, ignore_errors=True)
    for meta in (folder / "tokens").glob("*/meta.json"):
        if _json(meta)["identity"]["tokenizer"] != report["model"]["tokenizer"]:
            shutil.rmtree(meta.parent)
    shutil.rmtree(folder / "hashes", ignore_errors=True)  # by path
    return report


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not target.exists():
        shutil.copytree(source, target, symlinks=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or "=" in sys.argv[1]:
        sys.exit(__doc__)
    try:
        prepare.render(bundle(composition.compose(sys.argv[2:], [], []), Path(sys.argv[1])))
    except GainError as error:
        sys.exit(f"gpu_bundle: error: {error}")
