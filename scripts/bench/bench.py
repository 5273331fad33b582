"""Tokens a second and memory of a training step, ours beside its peers.

    python -m gain_cl bench device=cuda model=qwen2.5_7b block=2048

Weights are random and made on the device, so that nothing is fetched. Each subject runs in a
process of its own and leaves one row. A row that fails, runs out of memory or out of time says so.
The record is written after every row. docs/speed.md explains the columns.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_rows
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gain_cl.errors import ConfigError, GainError
from gain_cl.measure import provenance
from gain_cl.system import files
from gain_cl.system.terminal import console
from gain_cl.tools.command import Parser

SUBJECTS = (
    "forward", "limit", "gain_ffn", "gain_ffn+compile", "gain_ffn+compile+cudnn", "lora", "peft_ia3", "peft_lora", "trl_lora",
    "trl_lora_plain", "trainer_lora", "gain_attn", "full", "evaluate",
)  # fmt: skip
"""Measured unless subjects= names others. bench_rows.py says what each one is."""

KEYS: dict[str, Any] = {
    "device": "auto",
    "model": "smollm2",
    "dtype": "auto",
    "block": 256,
    "sequences": 2,
    "subjects": ",".join(SUBJECTS),
    "peers": "",
    "warmups": 3,
    "rounds": 9,
    "seconds": 60,
    "total": 360,
    "profile": "gain_ffn",
    "name": "bench",
    "out": "results/bench",
}
"""Key -> default."""

Row = dict[str, Any]


def main(argv: list[str]) -> int:
    """Measure every subject, print the table and leave OUT/NAME.json."""
    parser = Parser(
        "bench",
        usage="python -m gain_cl bench [KEY=VALUE ...]",
        description="Speed and memory of a training step with random weights. Keys and defaults: "
        + ", ".join(f"{k}={v}" for k, v in KEYS.items() if v != ""),
    )
    parser.add_argument("given", nargs="*", metavar="KEY=VALUE", help="see above")
    measure(read(parser.parse_intermixed_args(argv).given))
    return 0


def read(given: list[str]) -> dict[str, Any]:
    """Return the settings. ConfigError for an unknown key or a value of another kind."""
    settings = dict(KEYS)
    for word in given:
        key, sign, value = word.partition("=")
        if not sign or key not in KEYS:
            raise ConfigError(f"unknown key {word!r}", "bench", f"use one of: {', '.join(KEYS)}")
        try:
            settings[key] = int(value) if isinstance(KEYS[key], int) else value
        except ValueError:
            raise ConfigError(
                f"{key} is a whole number, not {value!r}", "bench", f"for example {key}={KEYS[key]}"
            ) from None
    for key in ("subjects", "peers", "profile"):
        settings[key] = [name for name in settings[key].split(",") if name]
    settings["subjects"] += [
        name for name in settings.pop("peers") if name not in settings["subjects"]
    ]
    return settings


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure every row in turn. Return the record, which is on disk after each."""
    os.environ.setdefault(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # asking whether there is a GPU must not start it before a fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    started, path = time.monotonic(), Path(settings["out"]) / f"{settings['name']}.json"
    record: dict[str, Any] = {
        "name": settings["name"],
        "settings": settings,
        **provenance.environment(),
        "peers": {
            name: _version(name)
            for name in ("torch", "triton", "peft", "trl", "liger-kernel", "accelerate", "datasets")
        },
        "driver": _driver(),
        "rows": [],
    }
    start = Starter()
    for place, subject in enumerate(["probe", *settings["subjects"], "probe"]):
        left = settings["total"] - (time.monotonic() - started)
        if left < (
            2 if subject == "probe" else 11
        ):  # the last probe shows whether the rates drifted
            row: Row = {"subject": subject, "status": "not run: no time left"}
        else:
            row = start.row(
                {**settings, "subject": subject},
                min(settings["seconds"], left if subject == "probe" else left - 3),
            )
        record["rows"].append({"place": place, **row})
        record["elapsed_seconds"] = time.monotonic() - started
        files.write_bytes(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
        print(_line(row), flush=True)
    show(record)
    print(f"record: {path}", flush=True)
    return record


class Starter:
    """Starts a process for each row: a fork of this one, which has the libraries loaded, or a new
    Python where a fork cannot use the GPU."""

    def __init__(self) -> None:
        self.forks = hasattr(os, "fork") and sys.platform == "linux"
        if self.forks:
            bench_rows.load_libraries()

    def row(self, task: dict[str, Any], seconds: float) -> Row:
        """Return what the subject left behind within the time."""
        found = self._once(task, seconds)
        said = str(found.get("error")) + str(found.get("trace"))
        if self.forks and any(
            words in said
            for words in ("forked subprocess", "initialization error", "device-side assert")
        ):
            self.forks = False
            found = self._once(task, seconds)
        return found

    def _once(self, task: dict[str, Any], seconds: float) -> Row:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "row.jsonl"
            told.touch()
            words = json.dumps({**task, "told": str(told)})
            if self.forks:
                process: Any = multiprocessing.get_context("fork").Process(
                    target=bench_rows.child, args=(words,)
                )
                process.start()
                process.join(seconds)
                late, code = process.is_alive(), process.exitcode
            else:
                command = [sys.executable, bench_rows.__file__, words]
                process = subprocess.Popen(command, start_new_session=True)
                try:
                    late, code = False, process.wait(seconds)
                except subprocess.TimeoutExpired:
                    late, code = True, None
            if late:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(
                        process.pid, signal.SIGKILL
                    )  # each row leads a group of its own, compilers included
                process.join() if self.forks else process.wait()
            row = _gather(told)
        row = {"subject": task["subject"], **row, "wall_seconds": time.monotonic() - begun}
        if late:
            row["status"] = f"stopped after {seconds:.0f} s"
        elif code != 0 and "status" not in row:
            row["status"] = f"the process ended with {code}"
        row.setdefault("status", "said nothing")
        return row


def _gather(told: Path) -> Row:
    """Return the lines that a row wrote as one: seconds are collected, other keys replace each
    other."""
    row: Row = {}
    for line in told.read_text().splitlines():
        with contextlib.suppress(ValueError):  # cut off
            said = json.loads(line)
            for key in ("warmups_seconds", "rounds_seconds"):
                if key in said:
                    row.setdefault(key, []).append(said.pop(key))
            row |= said
    if times := row.get("rounds_seconds"):
        middle = statistics.median(times)
        row["median_seconds"] = middle
        if "tokens" in row:
            row["tokens_per_second"] = row["tokens"] / middle
            if "flops_per_token" in row:
                row["model_tflops"] = row["tokens_per_second"] * row["flops_per_token"] / 1e12
        if warm := row.get("warmups_seconds"):
            row["first_step_extra_seconds"] = sum(warm) - middle * len(warm)
    return row


def _line(row: Row) -> str:
    """Return one row in words, to be shown while the others are still to come."""
    if "gemm_tflops" in row:
        return f"{row['subject']:<28} GEMM {row['gemm_tflops']:.0f} TFLOP/s, copy {row['copy_tb_per_second']:.2f} TB/s, {row['device']}"
    if "tokens_per_second" not in row:
        return f"{row['subject']:<28} {row['status']} {str(row.get('error', ''))[:160]}"
    return f"{row['subject']:<28} {row['tokens_per_second']:>9,.0f} tokens/s, peak {row.get('peak_bytes', 0) / 1e9:.1f} GB ({row['status']})"


def show(record: dict[str, Any]) -> None:
    """Print the table: rates, shares of the forward pass and of the GEMM, memory."""
    settings, found = record["settings"], record["rows"]
    rates = [r["gemm_tflops"] for r in found if "gemm_tflops" in r]
    forward = next(
        (r["median_seconds"] for r in found if r["subject"] == "forward" and "median_seconds" in r),
        None,
    )
    what = f"{settings['model']}, {settings['sequences']} x {settings['block']} tokens, {found[0].get('dtype', '?')}, {found[0].get('device', '?')}"
    view = Table(title=what, box=SIMPLE_HEAD, pad_edge=False)
    for name in (
        "subject",
        "tokens/s",
        "range %",
        "x forward",
        "TFLOP/s",
        "of GEMM %",
        "peak GB",
        "less weights",
        "first s",
        "",
    ):
        view.add_column(name, justify="left" if name in ("subject", "") else "right", no_wrap=True)
    for row in found:
        if row["subject"] == "probe":
            continue
        if not (times := row.get("rounds_seconds")) or "tokens_per_second" not in row:
            view.add_row(row["subject"], *[""] * 8, row["status"][:24])
            continue
        middle, peak = row["median_seconds"], row.get("peak_bytes", 0)
        view.add_row(
            row["subject"],
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * (max(times) - min(times)) / middle:.0f}",
            f"{middle / forward:.2f}" if forward else "",
            f"{row.get('model_tflops', 0):.1f}",
            f"{100 * row.get('model_tflops', 0) / max(rates):.0f}" if rates else "",
            f"{peak / 1e9:.2f}",
            f"{(peak - row.get('weights_bytes', 0)) / 1e9:.2f}",
            f"{row.get('first_step_extra_seconds', 0):.1f}",
            "" if row["status"] == "ok" else row["status"][:30],
        )
    console().print(view)
    for row in found:
        if row.get("kernels"):
            console().print(
                f"{row['subject']}: kernels of a step, {sum(k['microseconds'] for k in row['kernels']):,.0f} us listed"
            )
            for kernel in row["kernels"][:12]:
                console().print(
                    f"  {kernel['microseconds']:>9,.0f} us {kernel['calls']:>5} x {kernel['name'][:90]}",
                    highlight=False,
                )


def _driver() -> str | None:
    try:
        command = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit",
            "--format=csv,noheader",
        ]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except GainError as error:
        sys.exit(f"error: {error}")
