"""Pinned archives and the hub resolver, without network: a folder of wheels for pip, a hub on
127.0.0.1."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fake_hub import SHA, serve
from gain_cl.config.schema import PackageFile
from gain_cl.errors import ConfigError, DataError, StorageError
from gain_cl.system import hashes, packages
from gain_cl.system import hub as hub_files

FILES = {
    "demo/data/b.txt": b"second",
    "demo/data/a.txt": b"first",
    "demo/data/deep/c.txt": b"third",
    "demo/__init__.py": b"raise SystemExit('was run')",
}


def wheel(folder: Path, name: str = "demo-1.0-py3-none-any.whl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = "demo-1.0.dist-info"
    meta = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / name, "w") as pack:
        for member, data in {**FILES, **meta}.items():
            pack.writestr(member, data)
    return folder / name


def sdist(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "demo-1.0.tar.gz", "w:gz") as tar:
        for member, data in FILES.items():
            entry = tarfile.TarInfo(f"demo-1.0/{member}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return folder / "demo-1.0.tar.gz"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip uses as its only index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path))
    assert hashes.cache_dir() == tmp_path
    monkeypatch.delenv("GAIN_CL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hashes.cache_dir() == tmp_path / "gain_cl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hashes.cache_dir() == Path.home() / ".cache" / "gain_cl"


# --- archives -------------------------------------------------------------------------------------


def test_archive_is_fetched_once_and_read_as_pinned(
    index: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = PackageFile(package="demo==1.0", members="demo/data/*.txt", sha256=digest(wheel(index)))
    assert list(packages.members(file)) == [
        ("demo/data/a.txt", b"first"),
        ("demo/data/b.txt", b"second"),
    ]
    told = capsys.readouterr().err
    assert told == "fetching demo==1.0 ...\n"
    wheel(index).unlink()
    assert len(list(packages.members(file))) == 2  # from the cache, in silence
    assert capsys.readouterr().err == ""
    assert [p.name for p in (cache / "packages").iterdir() if not p.name.startswith(".")] == [
        "demo==1.0"
    ]
    assert not list((cache / "packages").glob(".fetch-*"))


def test_wheel_of_one_platform_is_pinned_by_its_member(index: Path) -> None:
    wheel(
        index, "demo-1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    )  # for a Python and platform that need not be ours
    pin = hashlib.sha256(b"first").hexdigest()
    file = PackageFile(package="demo==1.0", members="demo/data/a.txt", members_sha256=pin)
    assert list(packages.members(file)) == [("demo/data/a.txt", b"first")]
    with pytest.raises(DataError, match=r"sha256 of demo/data/b\.txt is not as pinned"):
        list(packages.members(file.model_copy(update={"members": "demo/data/b.txt"})))


def test_source_archive_reads_alike(cache: Path) -> None:
    path = sdist(cache / "packages" / "demo==1.0")
    file = PackageFile(package="demo==1.0", members="demo/data/*.txt", sha256=digest(path))
    assert [data for _, data in packages.members(file)] == [b"first", b"second"]


def test_other_bytes_than_pinned(index: Path, cache: Path) -> None:
    pinned = digest(wheel(index))
    file = PackageFile(package="demo==1.0", members="demo/data/*.txt", sha256="0" * 64)
    with pytest.raises(DataError, match="pinned sha256 0000"):
        list(packages.members(file))
    assert not (cache / "packages" / "demo==1.0").exists()
    # Changed since it was pinned: caught on the next read in the same process.
    file = PackageFile(package="demo==1.0", members="demo/data/*.txt", sha256=pinned)
    path = packages.archive(file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"sha256 is .*pinned is .*delete .* to fetch it again"):
        list(packages.members(file))


def test_no_such_package(index: Path) -> None:
    index.mkdir()
    with pytest.raises(
        StorageError,
        match=r"cannot fetch demo==1\.0: No matching distribution.*pip download --no-deps "
        r"demo==1\.0",
    ):
        packages.archive(PackageFile(package="demo==1.0", members="*", members_sha256="0" * 64))
    for name in ("demo", "demo>=1", "../demo==1", "demo==1 --index-url=x"):
        with pytest.raises(ConfigError, match="NAME==VERSION"):
            packages.archive(PackageFile(package=name, members="*"))


def test_only_wheels_are_fetched_without_a_hash(index: Path) -> None:
    """pip runs a source archive's build script to read its metadata: never for bytes that are not
    pinned."""
    sdist(index)
    with pytest.raises(StorageError, match="No matching distribution"):
        packages.archive(PackageFile(package="demo==1.0", members="*"))


def test_no_address_of_pip_or_the_hub_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold a password or be signed; one that is cut would not be known for one."""
    address = f"https://me:hunter2{'x' * 300}@host/simple?X-Amz-Signature=hunter2"
    failed = subprocess.CompletedProcess([], 1, "", f"WARNING: x\nERROR: HTTP 403 for {address}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(StorageError, match=r"demo==1\.0: HTTP 403 for the index;") as told:
        packages.archive(PackageFile(package="demo==1.0", members="*"))
    commit = hub_files._Commit("org/model", SHA, "model", ["*"])
    with pytest.raises(StorageError, match=r"\(OSError: 503 for the hub\)") as also, commit._told():
        raise OSError(f"503 for {address}")
    assert "hunter2" not in f"{told.value}{also.value}"


def test_damaged_archive_and_missing_member(cache: Path) -> None:
    folder = cache / "packages" / "demo==1.0"
    path = wheel(folder)
    with pytest.raises(DataError, match="no member matches nothing"):
        list(
            packages.members(
                PackageFile(package="demo==1.0", members="nothing", sha256=digest(path))
            )
        )
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="damaged archive"):
        list(packages.members(PackageFile(package="demo==1.0", members="*.txt")))


def test_members_stay_within_a_folder_and_match_from_the_end(cache: Path) -> None:
    wheel(cache / "packages" / "demo==1.0")

    def found(glob: str) -> list[str]:
        return [
            name for name, _ in packages.members(PackageFile(package="demo==1.0", members=glob))
        ]

    assert found("data/*.txt") == ["demo/data/a.txt", "demo/data/b.txt"]
    assert found("data/*/*.txt") == ["demo/data/deep/c.txt"]
    assert found("*.py") == ["demo/__init__.py"]
    with pytest.raises(DataError, match="no member matches"):
        found("ata/*.txt")


def test_extract_writes_one_named_file(cache: Path, tmp_path: Path) -> None:
    wheel(cache / "packages" / "demo==1.0")
    file = PackageFile(package="demo==1.0", members="demo/data/a.txt")
    assert packages.extract(file, tmp_path / "x" / "out.bin").read_bytes() == b"first"
    with pytest.raises(DataError, match="2 members match"):
        packages.extract(file.model_copy(update={"members": "data/*.txt"}), tmp_path / "y")


def test_read_only_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="GAIN_CL_CACHE"):
        packages.archive(PackageFile(package="demo==1.0", members="*"))


# --- hashes ---------------------------------------------------------------------------------------


def test_folder_pin_follows_names_and_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.json").write_text("1")
    (folder / "notes.md").write_text("ignored")
    first = hashes.folder_pin(folder, ["*.json"])
    (folder / "notes.md").write_text("still ignored")
    assert hashes.folder_pin(folder, ["*.json"]) == first
    (folder / "a.json").write_text("22")
    changed = hashes.folder_pin(folder, ["*.json"])
    (folder / "a.json").rename(folder / "b.json")
    assert len({first, changed, hashes.folder_pin(folder, ["*.json"])}) == 3
    with pytest.raises(DataError, match=r"no file matches \*\.bin"):
        hashes.folder_pin(folder, ["*.bin"])


def test_remembered_hash_is_not_trusted_after_a_change(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = hashes.file_sha256(path, remember=True)
    assert first == hashes.file_sha256(path, remember=True) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert hashes.file_sha256(path, remember=True) == hashlib.sha256(b"two").hexdigest()


# --- the hub --------------------------------------------------------------------------------------

CALLS = """
import json, sys, time
from itertools import islice
from gain_cl.system import hub as sources
from gain_cl.errors import GainError
for call in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        verb, repo, revision, patterns, kind = call
        if verb == "snapshot":
            folder = sources.snapshot(repo, revision, patterns, kind)
            found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        else:
            found = [p.name for p in islice(sources.data_files(repo, revision, patterns[0], kind), 2)]
        out = {"ok": found}
    except GainError as error:
        out = {"error": str(error), "code": error.exit_code}
    print(json.dumps({**out, "seconds": time.monotonic() - start}))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def hub(calls: list[list[Any]], home: Path, **environment: str) -> list[dict[str, Any]]:
    """Each call's outcome, in a fresh process: the hub's library reads its environment when it is
    imported."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    clean |= {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(calls)],
        env=clean,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def repository(root: Path, kind: str, name: str, files: dict[str, str]) -> None:
    for path, text in files.items():
        target = root / kind / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


MODEL = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "model.safetensors": "weights",
    "README.md": "no",
    "pytorch_model.bin": "no",
}
PATTERNS = ["config.json", "tokenizer*", "*.safetensors"]
DATA = {f"data/train-0000{i}-of-00003.parquet": f"part {i}" for i in range(3)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    for name in ("org/model", "org/gated", "org/busy", "org/flipped"):
        repository(root, "models", name, MODEL)
    repository(root, "datasets", "org/data", DATA)
    return root


def test_snapshot_online_then_from_the_cache(site: Path, tmp_path: Path) -> None:
    wanted = ["config.json", "model.safetensors", "tokenizer.json"]
    with serve(site) as (address, log):
        calls = [
            ["snapshot", "org/model", SHA, PATTERNS, "model"],
            ["snapshot", "org/model", SHA, ["*.gguf"], "model"],
            ["files", "org/data", SHA, ["data/train-*.parquet"], "dataset"],
            ["snapshot", "org/busy", SHA, PATTERNS, "model"],
        ]
        first, absent, files, busy = hub(calls, tmp_path / "hf", HF_ENDPOINT=address)
        assert first["ok"] == wanted
        assert (
            "no file matching *.gguf" in absent["error"]
            and "README.md" in absent["error"]
            and absent["code"] == 65
        )
        assert files["ok"] == ["train-00000-of-00003.parquet", "train-00001-of-00003.parquet"]
        assert not any(
            "train-00002" in line for line in log
        )  # only as many files as were asked for
        assert busy["ok"] == wanted, busy  # one 503 is not the end
        asked = len(log)
        assert hub([calls[0]], tmp_path / "hf", HF_ENDPOINT=address)[0]["ok"] == wanted
        assert len(log) == asked  # the cache comes first
    offline = {"HF_HUB_OFFLINE": "1"}
    whole, part = hub([calls[0], calls[2]], tmp_path / "hf", **offline)
    assert whole["ok"] == wanted and part["ok"] == files["ok"]


def test_hub_refusals_are_one_line(site: Path, tmp_path: Path) -> None:
    with serve(site) as (address, _):
        calls = [
            ["snapshot", "org/gated", SHA, PATTERNS, "model"],
            ["snapshot", "org/private", SHA, PATTERNS, "model"],
            ["snapshot", "org/model", "f" * 40, PATTERNS, "model"],
            ["snapshot", "org/model", "main", PATTERNS, "model"],
            ["snapshot", "org/model", None, PATTERNS, "model"],
            ["snapshot", "org/flipped", SHA, PATTERNS, "model"],
        ]
        gated, private, revision, branch, none, flipped = hub(
            calls, tmp_path / "hf", HF_ENDPOINT=address
        )
    assert "gated" in gated["error"] and "HF_TOKEN" in gated["error"] and gated["code"] == 65
    assert "org/private is not on the hub, or private" in private["error"]
    assert f"no revision {'f' * 40}" in revision["error"]
    assert (
        f"'main' of org/model is not a commit (revision); pin the commit: revision: {SHA}"
        in branch["error"]
        and branch["code"] == 64
    )
    assert SHA in none["error"]
    assert "is not what the hub states" in flipped["error"] and flipped["code"] == 65


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}],
    ids=["offline", "unreachable"],
)
def test_not_cached_and_no_hub(tmp_path: Path, environment: dict[str, str]) -> None:
    start = time.monotonic()
    model, data, branch = hub(
        [
            ["snapshot", "org/model", SHA, PATTERNS, "model"],
            ["files", "org/data", SHA, ["data/*.parquet"], "dataset"],
            ["snapshot", "org/model", "main", PATTERNS, "model"],
        ],
        tmp_path / "hf",
        **environment,
    )
    assert model["code"] == data["code"] == 74 and branch["code"] == 64
    assert (
        f'hf download org/model --revision {SHA} --include "config.json" --include "tokenizer*"'
        in model["error"]
    )
    assert (
        f'hf download org/data --repo-type dataset --revision {SHA} --include "data/*.parquet"'
        in data["error"]
    )
    assert time.monotonic() - start < 15 and model["seconds"] < 5


def test_cache_seeded_by_hand(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE over a cache tree that gain_cl did not write: used when whole, refused when
    surely not."""
    hub_cache = tmp_path / "hf" / "hub"
    for name, files in {
        "models--org--whole": MODEL,
        "models--org--noweights": {"config.json": "{}", "tokenizer.json": "{}"},
        "models--org--shards": {
            **{n: text for n, text in MODEL.items() if n != "model.safetensors"},
            "model.safetensors.index.json": "{}",
            "model-00001-of-00002.safetensors": "w",
        },
        "models--org--two": {
            **{n: text for n, text in MODEL.items() if n != "model.safetensors"},
            "model.safetensors.index.json": "{}",
            "model-00001-of-00002.safetensors": "w",
            "model-00002-of-00002.safetensors": "w",
        },
        "datasets--org--first": {
            "data/train-00000-of-00003.parquet": "x",
            "data/train-00001-of-00003.parquet": "x",
        },
        "datasets--org--last": {"data/train-00002-of-00003.parquet": "x"},
    }.items():
        for path, text in files.items():
            target = hub_cache / name / "snapshots" / SHA / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    calls = [
        ["snapshot", f"org/{name}", SHA, PATTERNS, "model"]
        for name in ("whole", "noweights", "shards", "two")
    ]
    calls += [
        ["files", f"org/{name}", SHA, ["data/*.parquet"], "dataset"] for name in ("first", "last")
    ]
    whole, noweights, shards, two, first, last = hub(calls, tmp_path / "hf", HF_HUB_OFFLINE="1")
    assert "model.safetensors" in whole["ok"]
    assert "missing: *.safetensors" in noweights["error"]
    assert "missing: model-00002-of-00002" in shards["error"]
    assert "model-00001-of-00002.safetensors" in two["ok"], two  # shards of a model begin with 1
    assert first["ok"] == ["train-00000-of-00003.parquet", "train-00001-of-00003.parquet"]
    assert "missing: data/train-00000-of-00003" in last["error"]
