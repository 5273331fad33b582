"""One JSON file that proves itself: an object whose key "seal" is the hash of all its other keys.

A seal tells accidents and edits by hand. Whoever means to deceive can seal again. Torch-free.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gain_cl.system.files import write_bytes
from gain_cl.system.hashes import json_sha256


def seal_of(value: dict[str, Any]) -> str:
    """Return the seal of a JSON object, however it is spelt: of all keys but "seal"."""
    return json_sha256({k: v for k, v in value.items() if k != "seal"}, compact=True)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object (``object_pairs_hook``). ValueError: a key is given twice, and which
    value counts is unclear."""
    if len(found := dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{max(keys, key=keys.count)!r} is given twice")
    return found


def sealed_bytes(value: dict[str, Any]) -> bytes:
    """Return a JSON object with its seal as the content of a file. ValueError: a number is not
    finite."""
    whole = {**value, "seal": seal_of(value)}
    text = json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "surrogatepass")


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with its seal, atomically. StorageError when the disk refuses."""
    write_bytes(path, sealed_bytes(value))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return the object without its seal, or None when the file is missing or differs in any bit
    from what was written."""
    try:
        data = path.read_bytes()
        value = json.loads(data)
        del value["seal"]
        return value if sealed_bytes(value) == data else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
