"""Hash files, and remember what was hashed."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gain_cl.errors import ConfigError, DataError
from gain_cl.system.files import sha256, write_bytes


def cache_dir() -> Path:
    """Return $GAIN_CL_CACHE, else $XDG_CACHE_HOME/gain_cl, else ~/.cache/gain_cl (not created
    here)."""
    if own := os.environ.get("GAIN_CL_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "gain_cl"
    except RuntimeError:  # no HOME, and the user is not in passwd
        raise ConfigError("no home folder", "HOME", "set GAIN_CL_CACHE to a folder") from None


def json_sha256(value: Any, compact: bool = False) -> str:
    """Return the SHA-256 of JSON data, keys sorted, in hexadecimal. ValueError: a number is not
    finite.

    compact: without spaces between the parts, as run ids and the seals of records hash it.
    """
    separators = (",", ":") if compact else None
    text = json.dumps(value, sort_keys=True, separators=separators, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _sha256(path: str, *stamp: int) -> str:
    return sha256(Path(path))


_trusting = True


@contextlib.contextmanager
def doubting() -> Iterator[None]:
    """Trust nothing for the block."""
    global _trusting
    before, _trusting = _trusting, False
    try:
        yield
    finally:
        _trusting = before


def file_sha256(path: Path, remember: bool = False) -> str:
    """Return the SHA-256 of a file, computed once per (path, size, mtime, ctime, inode) in this
    process. cp -p, rsync and tar bring back an mtime, nothing brings back a ctime. remember: also
    across processes, in the cache (for model weights of many gigabytes). DataError when the file
    cannot be read."""
    path = Path(path).absolute()
    try:
        real = path.resolve(strict=True)
        stat = real.stat()
        known = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if not remember:
            return _sha256(str(real), *known)
        note = cache_dir() / "hashes" / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
        seen = json_or_none(note) if _trusting else None
        if isinstance(seen, dict) and seen.get("stat") == known and "sha256" in seen:
            return str(seen["sha256"])
        digest = _sha256(str(real), *known)
        write_bytes(note, json.dumps({"stat": known, "sha256": digest}, allow_nan=False).encode())
        return digest
    except OSError as error:
        what = f"cannot read: {error.strerror or error}"
        raise DataError(what, str(path), "check the path and its permissions") from None


def check_pinned(path: Path, pinned: str | None, do: str) -> None:
    """Raise DataError where a file has another SHA-256 than is pinned. do: what to do then."""
    if pinned is not None and (found := file_sha256(path)) != pinned:
        raise DataError(f"sha256 is {found[:12]}…, pinned is {pinned[:12]}…", str(path), do)


def json_or_none(path: Path) -> Any:
    """Return a parsed JSON file of a cache, or None when it is missing or malformed."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def folder_pin(path: Path, patterns: list[str]) -> str:
    """One SHA-256 over the relative names and content hashes of the files under ``path`` that match
    a pattern."""
    path = Path(path)
    names = (p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file())
    content = [
        f"{name}\0{file_sha256(path / name, remember=True)}\n"
        for name in names
        if matches(name, patterns)
    ]
    if not content:
        raise DataError(f"no file matches {', '.join(patterns)}", str(path), "check the path")
    return hashlib.sha256(os.fsencode("".join(content))).hexdigest()


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if a name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
