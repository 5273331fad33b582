"""Fetch files of hub repositories at a pinned commit: from the hub's own cache first, then the
network.

What a commit holds is asked once and remembered, so that a cache that lacks a file is never taken
for a whole one. Nothing here imports torch or transformers, or runs what it downloads.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from gain_cl.config.schema import SHA1
from gain_cl.errors import ConfigError, DataError, StorageError
from gain_cl.system.hashes import cache_dir, file_sha256, json_or_none, matches
from gain_cl.system.sealed import read_sealed, write_sealed

RepoType = Literal["model", "dataset"]
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
TIMEOUT_SECONDS = 5
"""How long the hub may take to answer a question."""


def snapshot(
    repo: str, revision: str | None, patterns: list[str], repo_type: RepoType = "model"
) -> Path:
    """Return the folder of ``repo`` at the commit ``revision`` that holds every file matching a
    pattern.

    Large files are checked against the hub's own SHA-256. ConfigError: revision is no 40-hex
    commit. DataError: no such repository, revision or file, no access, or other bytes than the hub
    states. StorageError: not cached and the hub cannot be reached.
    """
    found = _Commit(repo, commit(repo, revision, repo_type), repo_type, patterns)
    for name in found.whole() or found.names():
        found.fetch(name)
    return found.folder


def data_files(
    repo: str, revision: str | None, pattern: str, repo_type: RepoType = "dataset"
) -> Iterator[Path]:
    """Yield the local paths of the files matching ``pattern``, sorted. Each is fetched only when it
    is asked for. Errors as ``snapshot``."""
    found = _Commit(repo, commit(repo, revision, repo_type), repo_type, [pattern])
    done = found.whole()
    yield from (found.folder / name for name in done)
    shards = [int(part[2]) for name in done if (part := SHARD.search(name))]
    if not done or len(done) < max(shards, default=0):
        yield from (found.fetch(name) for name in found.names() if name not in done)


def hub_at_hand(
    repo: str, revision: str | None, pattern: str, repo_type: RepoType = "dataset"
) -> None:
    """Raise what ``data_files`` would as soon as it can be told. The hub is asked what it has when
    that is not known, but nothing is fetched."""
    found = _Commit(repo, commit(repo, revision, repo_type), repo_type, [pattern])
    if found.gaps() and (first := found.names()) and _offline():
        found.fetch(first[0])  # says what is missing


def commit(repo: str, revision: str | None, repo_type: RepoType) -> str:
    """Return ``revision`` when it is a 40-hex commit. ConfigError otherwise; it names the commit
    that the branch or tag points to, when one can tell."""
    if revision is not None and SHA1.fullmatch(revision):
        return revision
    sha = None
    if not _offline():
        from huggingface_hub import HfApi

        with suppress(Exception):  # only a hint is lost: the error below stands either way
            name = revision or "main"
            sha = HfApi().repo_info(repo, repo_type=repo_type, revision=name, timeout=5).sha
    what = f"revision {revision!r} of {repo} is not a commit"
    do = "pin a 40-hex commit (the repository's history on the hub lists them)"
    raise ConfigError(
        what if revision else f"{repo} has no revision",
        "revision",
        f"pin the commit: revision: {sha}" if sha else do,
    )


def snapshot_folder(repo: str, sha: str, repo_type: RepoType) -> Path:
    """Return the place of a commit in the hub's cache."""
    from huggingface_hub import constants, file_download

    name = file_download.repo_folder_name(repo_id=repo, repo_type=repo_type)
    return Path(constants.HF_HUB_CACHE).expanduser() / name / "snapshots" / sha


def hub_state() -> tuple[bool, bool]:
    """Return (True if the hub may not be asked, True if there is a login)."""
    from huggingface_hub import get_token

    return _offline(), get_token() is not None


def hub_trouble(seconds: float) -> str:
    """Return empty when the hub answers, else why not, in words that hold no password."""
    from huggingface_hub import constants, get_session

    try:
        status = get_session().head(constants.ENDPOINT, timeout=seconds).status_code
    except Exception as error:
        return f"not reached ({type(error).__name__})"
    return f"HTTP {status}" if status >= 500 or status == 407 else ""


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


class _Commit:
    """Files of a repository at a commit that match patterns."""

    def __init__(self, repo: str, sha: str, repo_type: RepoType, patterns: list[str]) -> None:
        self.repo, self.sha, self.repo_type, self.patterns = repo, sha, repo_type, patterns
        self.folder = snapshot_folder(repo, sha, repo_type)
        self.note = cache_dir() / "hub" / self.folder.parents[1].name / f"{sha}.json"

    def listed(self) -> dict[str, str | None] | None:
        """Return name -> SHA-256 of large files, as the hub gave it once; None when it was never
        asked."""
        return (read_sealed(self.note) or {}).get("files")

    def names(self) -> list[str]:
        """Return the names that match, sorted; the hub is asked when they are not known."""
        listed = self.listed()
        if listed is None:
            from huggingface_hub import HfApi

            info = self._call(
                lambda: HfApi().repo_info(
                    self.repo,
                    repo_type=self.repo_type,
                    revision=self.sha,
                    files_metadata=True,
                    timeout=TIMEOUT_SECONDS,
                )
            )
            listed = {f.rfilename: f.lfs.sha256 if f.lfs else None for f in info.siblings or []}
            write_sealed(self.note, {"files": listed})
        found = sorted(name for name in listed if matches(name, self.patterns))
        if not found:
            what = f"{self.repo} has no file matching {', '.join(self.patterns)}"
            some = ", ".join(sorted(listed)[:12])
            raise DataError(what, f"revision {self.sha[:12]}", f"it has: {some}")
        return found

    def fetch(self, name: str) -> Path:
        """Return the path of a listed file, fetched when it is not cached, and checked."""
        path = self.folder / name
        if not path.exists():
            from huggingface_hub import hf_hub_download

            self._call(
                lambda: hf_hub_download(
                    self.repo,
                    name,
                    repo_type=self.repo_type,
                    revision=self.sha,
                    etag_timeout=TIMEOUT_SECONDS,
                )
            )
        stated = (self.listed() or {}).get(name)
        if stated and file_sha256(path, remember=True) != stated:
            do = f"delete {path} to fetch it again"
            raise DataError(f"sha256 of {name} is not what the hub states", str(path), do)
        return path

    def whole(self) -> list[str]:
        """Return the names that are cached, sorted, where a cache that somebody else filled looks
        whole; else nothing."""
        return [] if self.listed() is not None or self.gaps() else self.local(self.patterns)

    def local(self, patterns: list[str]) -> list[str]:
        """Return the names that are cached, sorted."""
        names = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*"))
        return sorted(n for n in names if matches(n, patterns) and (self.folder / n).is_file())

    def gaps(self) -> list[str]:
        """Return what is surely missing from the cache when no listing is known; empty when it
        looks whole."""
        have = self.local(["*"])
        # Patterns without which nothing works; the other files of a model are optional.
        always, ends = ("config.json", "tokenizer*"), (".safetensors", ".parquet")
        needed = [p for p in self.patterns if p in always or p.endswith(ends)] or self.patterns
        gaps = [p for p in needed if not any(matches(n, [p]) for n in have)]
        for name in have:
            named: list[str] = []
            if name.endswith(".safetensors.index.json"):
                shards = (json_or_none(self.folder / name) or {}).get("weight_map", {}).values()
                named = [(PurePosixPath(name).parent / shard).as_posix() for shard in shards]
                named = [n for n in named if matches(n, self.patterns)]
            elif name.endswith(".parquet") and (part := SHARD.search(name)):
                before = name[: part.start()]  # of 00003-of-00041 0 to 2 must be there
                named = [f"{before}-{i:05d}-of-{part[2]}" for i in range(int(part[1]))]
            gaps += sorted(n for n in named if not any(h.startswith(n) for h in have))
        return list(dict.fromkeys(gaps))

    def _call(self, request: Callable[[], Any], attempts: int = 3) -> Any:
        """Return request(), tried again after 1 and 2 seconds when the hub is busy. Every failure
        becomes one line for the user."""
        kind = " --repo-type dataset" if self.repo_type == "dataset" else ""
        words = [f"hf download {self.repo}{kind} --revision {self.sha}"]
        command = " ".join([*words, *(f'--include "{p}"' for p in self.patterns)])
        do = f"on a machine with network run: {command}"
        if _offline():
            what = f"{self.repo} is not wholly in the local hub cache and HF_HUB_OFFLINE is set"
            gaps = ", ".join(self.gaps()[:4]) or "further files"
            raise StorageError(what, f"missing: {gaps}", do)
        failure = ""
        for attempt in range(attempts):
            try:
                return request()
            except Exception as error:  # the HTTP client's classes differ between releases
                failure, again = _verdict(error, self.repo, self.sha, command)
            if not again:
                break
            if attempt + 1 < attempts:
                time.sleep(2**attempt)
        what = f"{self.repo} is not in the local hub cache and the hub cannot be reached"
        raise StorageError(f"{what} ({failure})", "", do)


def _verdict(error: Exception, repo: str, sha: str, command: str) -> tuple[str, bool]:
    """Return the name of the failure, and True if it may be tried again, when the hub did not
    answer. Raise the line for the user when it did."""
    from huggingface_hub import errors

    name, login = type(error).__name__, "`hf auth login` or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    away = isinstance(error, ConnectionError | TimeoutError)
    match error:
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
            return type(error.__cause__ or error).__name__, False  # the library has tried by itself
        case errors.GatedRepoError():
            do = f"accept its terms on its hub page, then {login}; then: {command}"
            raise DataError(f"{repo} is gated", "", do)
        case errors.RevisionNotFoundError():
            what = f"{repo} has no revision {sha}"
            raise DataError(what, "", "pin a commit of its history")
        case errors.RepositoryNotFoundError():
            what = f"the hub knows no repository {repo}, or it is private"
            raise DataError(what, "", f"check the name; if private, {login}")
        case errors.HfHubHTTPError() if status >= 500 or status == 429:
            return f"HTTP {status}", True
        case errors.HfHubHTTPError():
            what = f"the hub answers HTTP {status} for {repo}"
            raise DataError(what, "", f"{login} if access is refused; then: {command}")
        case OSError() if error.errno is not None and not away:
            what = f"cannot store {repo}: {error.strerror}"
            raise StorageError(what, "", "free space or set HF_HOME")
    clients = ("httpx", "httpcore", "requests", "urllib3")
    if isinstance(error, OSError) or type(error).__module__.startswith(clients):
        return name, "Connect" not in name  # nobody there: waiting does not help
    raise error
