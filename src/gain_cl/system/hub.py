"""Fetch files of hub repositories at a pinned commit: from the hub's own cache first, then the
network.

What a commit holds is asked once and remembered, so that a cache that lacks a file is never taken
for a whole one. Nothing here imports torch or transformers, or runs what it downloads.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from gain_cl.config.schema import SHA1
from gain_cl.errors import ConfigError, DataError, StorageError
from gain_cl.system.hashes import cache_dir, file_sha256, matches
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
    found = _Commit(repo, revision, repo_type, patterns)
    for name in found.names():
        found.fetch(name)
    return found.folder


def data_files(
    repo: str, revision: str | None, pattern: str, repo_type: RepoType = "dataset"
) -> Iterator[Path]:
    """Yield the local paths of the files matching ``pattern``, sorted. Each is fetched only when it
    is asked for. Errors as ``snapshot``."""
    found = _Commit(repo, revision, repo_type, [pattern])
    first = found.names()
    yield from map(found.fetch, first)
    shards = [int(part[2]) for name in first if (part := SHARD.search(name))]
    if found.listed is None and len(first) < max(shards, default=0):  # the cache has the first ones
        yield from (found.fetch(name) for name in found.ask() if name not in first)


def hub_at_hand(
    repo: str, revision: str | None, pattern: str, repo_type: RepoType = "dataset"
) -> None:
    """Raise what ``data_files`` would as soon as it can be told. The hub is asked what it has when
    that is not known, but nothing is fetched."""
    found = _Commit(repo, revision, repo_type, [pattern])
    first = found.names()[0]
    if hub_state()[0]:
        found.fetch(first)  # says what is missing


def commit(repo: str, revision: str | None, repo_type: RepoType) -> str:
    """Return ``revision`` when it is a 40-hex commit. ConfigError otherwise; it names the commit
    that the branch or tag points to, when one can tell."""
    if revision is not None and SHA1.fullmatch(revision):
        return revision
    do = "pin a 40-hex commit (the repository's history on the hub lists them)"
    with suppress(Exception):  # only a hint is lost: the error below stands either way
        name = revision or "main"
        do = f"pin the commit: revision: {_info(repo, name, repo_type).sha}"
    what = f"revision {revision!r} of {repo} is not a commit"
    raise ConfigError(what if revision else f"{repo} has no revision", "revision", do)


def _info(repo: str, revision: str, repo_type: RepoType) -> Any:
    """Ask the hub about a revision, and the files that it has."""
    from huggingface_hub import HfApi

    about: dict[str, Any] = {"repo_type": repo_type, "revision": revision, "files_metadata": True}
    return HfApi().repo_info(repo, timeout=TIMEOUT_SECONDS, **about)


def _patient(request: Callable[[], Any]) -> Any:
    """Return request(), tried again after 1 and 2 seconds while the hub is busy (HTTP 429, 5xx)."""
    for pause in (1, 2):
        try:
            return request()
        except Exception as error:  # the HTTP client's classes differ between releases
            causes = (error, error.__cause__)
            status = max(getattr(getattr(e, "response", None), "status_code", 0) for e in causes)
            if status < 500 and status != 429:
                raise
        time.sleep(pause)
    return request()


def cached_repository(repo: str, repo_type: RepoType) -> Path:
    """Return the folder of a repository in the hub's own cache."""
    from huggingface_hub import constants, file_download

    name = file_download.repo_folder_name(repo_id=repo, repo_type=repo_type)
    return Path(constants.HF_HUB_CACHE).expanduser() / name


def hub_state() -> tuple[bool, bool]:
    """Return (True if the hub may not be asked, True if there is a login)."""
    from huggingface_hub import constants, get_token

    return bool(constants.HF_HUB_OFFLINE), get_token() is not None


def hub_trouble(seconds: float) -> str:
    """Return empty when the hub answers, else why not, in words that hold no password."""
    from huggingface_hub import constants, get_session

    try:
        status = get_session().head(constants.ENDPOINT, timeout=seconds).status_code
    except Exception as error:
        return f"not reached ({type(error).__name__})"
    return f"HTTP {status}" if status >= 500 or status == 407 else ""


class _Commit:
    """Files of a repository at a commit that match patterns. listed: name -> SHA-256 of large
    files, as the hub gave it once; None when it was never asked."""

    def __init__(
        self, repo: str, revision: str | None, repo_type: RepoType, patterns: list[str]
    ) -> None:
        self.repo, self.repo_type, self.patterns = repo, repo_type, patterns
        self.sha = commit(repo, revision, repo_type)
        place = cached_repository(repo, repo_type)
        self.folder = place / "snapshots" / self.sha
        self.note = cache_dir() / "hub" / place.name / f"{self.sha}.json"
        self.listed: dict[str, str | None] | None = (read_sealed(self.note) or {}).get("files")

    def names(self) -> list[str]:
        """Return the names that match, sorted: as the hub gave them, or those in a cache that
        somebody else filled and that looks whole."""
        if self.listed is None and not self.gaps():
            return self.local(self.patterns)
        return self.ask()

    def ask(self) -> list[str]:
        """Return the names that match, sorted. The hub is asked when they are not known."""
        if self.listed is None:
            with self._told():
                about = _patient(lambda: _info(self.repo, self.sha, self.repo_type))
            files = about.siblings or []
            self.listed = {f.rfilename: f.lfs.sha256 if f.lfs else None for f in files}
            write_sealed(self.note, {"files": self.listed})
        found = sorted(name for name in self.listed if matches(name, self.patterns))
        if not found:
            what = f"{self.repo} has no file matching {', '.join(self.patterns)}"
            some = ", ".join(sorted(self.listed)[:12])
            raise DataError(what, f"revision {self.sha[:12]}", f"it has: {some}")
        return found

    def fetch(self, name: str) -> Path:
        """Return the path of a file, fetched when it is not cached, and checked."""
        path = self.folder / name
        if not path.exists():
            from huggingface_hub import hf_hub_download

            about: dict[str, Any] = {"repo_type": self.repo_type, "revision": self.sha}
            about["etag_timeout"] = TIMEOUT_SECONDS
            with self._told():
                _patient(lambda: hf_hub_download(self.repo, name, **about))
        stated = (self.listed or {}).get(name)
        if stated and file_sha256(path, remember=True) != stated:
            do = f"delete {path} to fetch it again"
            raise DataError(f"sha256 of {name} is not what the hub states", str(path), do)
        return path

    def local(self, patterns: list[str]) -> list[str]:
        """Return the names that are cached, sorted."""
        names = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*"))
        return sorted(n for n in names if matches(n, patterns) and (self.folder / n).is_file())

    def gaps(self) -> list[str]:
        """Return what is surely missing from the cache; empty when it looks whole. Of the shards of
        a data set the first ones are enough."""
        have = self.local(["*"])
        # Patterns without which nothing works; the other files of a model are optional.
        always, ends = ("config.json", "tokenizer*"), (".safetensors", ".parquet")
        needed = [p for p in self.patterns if p in always or p.endswith(ends)] or self.patterns
        gaps = [p for p in needed if not any(matches(n, [p]) for n in have)]
        for name in have:
            if name.endswith(ends) and (part := SHARD.search(name)):
                number, count = int(part[1]), int(part[2])
                wanted = range(number) if name.endswith(".parquet") else range(1, count + 1)
                shards = [f"{name[: part.start()]}-{i:05d}-of-{part[2]}" for i in wanted]
                gaps += [s for s in shards if not any(h.startswith(s) for h in have)]
        return list(dict.fromkeys(gaps))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell in one line what the hub refuses, or that it does not answer."""
        from huggingface_hub import errors

        kind = " --repo-type dataset" if self.repo_type == "dataset" else ""
        words = [f"hf download {self.repo}{kind} --revision {self.sha}"]
        command = " ".join([*words, *(f'--include "{p}"' for p in self.patterns)])
        login = "`hf auth login` or set HF_TOKEN"
        answers = {
            errors.GatedRepoError: ("is gated", f"accept its terms on its hub page, then {login}"),
            errors.RevisionNotFoundError: (f"has no revision {self.sha}", "pin another commit"),
            errors.RepositoryNotFoundError: ("is not on the hub, or private", f"if so, {login}"),
        }
        try:
            yield
        except Exception as error:  # the HTTP client's classes differ between releases
            for refusal, (what, do) in answers.items():
                if isinstance(error, refusal):
                    raise DataError(f"{self.repo} {what}", "", do) from error
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if status < 500 and status != 429:
                what = f"the hub answers HTTP {status} for {self.repo}"
                raise DataError(what, "", f"{login} if access is refused") from error
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            reason = re.sub(r"https?://\S+", "the hub", reason)[:300]  # signed, or with a password
            what = f"{self.repo} is not wholly in the local hub cache and cannot be fetched"
            where = f"missing: {', '.join(self.gaps()[:4]) or 'further files'}"
            do = f"on a machine with network run: {command}"
            raise StorageError(f"{what} ({reason})", where, do) from error
