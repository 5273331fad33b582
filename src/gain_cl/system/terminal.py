"""Write for a terminal: a console of known width, names that others chose. Torch-free."""

from __future__ import annotations

import os
from typing import Any

from gain_cl import errors


def console() -> Any:
    """Return rich's Console. It is 120 wide where the output is no terminal and COLUMNS is not
    set."""
    from rich.console import Console

    found = Console()
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = 120
    return found


def printable(text: object) -> str:
    """Return a name that others chose as one line without control characters."""
    return errors.printable(str(text)).replace("\n", "\\n")
