"""Commands around runs: one module each, with ``main(argv) -> exit code``; imported when called."""

from __future__ import annotations

import argparse
from typing import NoReturn

from gain_cl.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, exit 64."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, f"gain_cl {self.prog}", f"see python -m gain_cl {self.prog} --help")
