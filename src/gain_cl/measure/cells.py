"""Scores that are known already: one file for each (weights x domain or task x protocol x execution
environment).

The key is a hash of all that the numbers depend on, the source code of gain_cl included, so what is
found is what would be computed again, bit for bit. One mechanism lets an interrupted evaluation go
on and runs of one model share stage 0.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from gain_cl.system.failpoints import reach
from gain_cl.system.files import write_bytes


def key(what: dict[str, Any]) -> str:
    """The name of a cell. what: JSON data, all that the numbers depend on."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, allow_nan=False).encode()).hexdigest()[
        :32
    ]


def store(folder: Path, name: str, rows: pd.DataFrame, **facts: Any) -> None:
    """Write a cell: a row per document or item, and JSON facts about all of them."""
    body = {"rows": rows.to_dict("list"), "facts": facts}
    text = json.dumps(body, allow_nan=False)
    reach("cell.before")
    write_bytes(
        folder / f"{name}.json",
        json.dumps({"sha256": _hash(text), "body": text}, allow_nan=False).encode(),
    )
    reach("cell.after")


def load(folder: Path, name: str) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """The rows and facts of a cell; None when there is none, or none that is what was written."""
    try:
        outer = json.loads((folder / f"{name}.json").read_bytes())
        if outer["sha256"] != _hash(outer["body"]):
            return None
        body = json.loads(outer["body"])
        return pd.DataFrame(body["rows"]), body["facts"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
