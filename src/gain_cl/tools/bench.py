"""Measure the speed and memory of a step beside its peers. The benchmark is a script of the
checkout, for its peers (TRL, Liger) are no dependencies of gain_cl."""

from __future__ import annotations

import subprocess
import sys

from gain_cl.config import presets
from gain_cl.errors import ConfigError


def main(argv: list[str]) -> int:
    """Carry out scripts/bench/bench.py. ConfigError: it is not there."""
    script = presets.configs_dir().parent / "scripts/bench/bench.py"
    if not script.is_file():
        do = "clone the repository and call it there"
        raise ConfigError("the benchmark is not part of an installed package", "bench", do)
    return subprocess.call([sys.executable, str(script), *argv])
