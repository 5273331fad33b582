"""Scores that are known already: one file for each (weights x domain or task x protocol x execution
environment).

The key is a hash of all that the numbers depend on, the source code of gain_cl included, so what is
found is what would be computed again, bit for bit. One mechanism lets an interrupted evaluation go
on and runs of one model share stage 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from gain_cl.system.failpoints import reach
from gain_cl.system.hashes import json_sha256
from gain_cl.system.sealed import read_sealed, write_sealed


def key(what: dict[str, Any]) -> str:
    """The name of a cell. what: JSON data, all that the numbers depend on."""
    return json_sha256(what)[:32]


def store(folder: Path, name: str, rows: pd.DataFrame, **facts: Any) -> None:
    """Write a cell: a row per document or item, and JSON facts about all of them."""
    reach("cell.before")
    write_sealed(folder / f"{name}.json", {"rows": rows.to_dict("list"), "facts": facts})
    reach("cell.after")


def load(folder: Path, name: str) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """The rows and facts of a cell; None when there is none, or none that is what was written."""
    cell = read_sealed(folder / f"{name}.json")
    return None if cell is None else (pd.DataFrame(cell["rows"]), cell["facts"])
