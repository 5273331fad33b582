"""The benchmark's bookkeeping, and one rehearsal on the CPU; a bundle from which a run needs no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench
import pytest

from gain_cl.errors import ConfigError


def test_settings_are_read_and_mistakes_named() -> None:
    settings = bench.read(
        ["model=tiny", "block=64", "subjects=forward,lora", "peers=peft_ia3,lora"]
    )
    assert (settings["model"], settings["block"], settings["subjects"]) == (
        "tiny",
        64,
        ["forward", "lora", "peft_ia3"],
    )
    with pytest.raises(ConfigError, match="unknown key 'blok=64'"):
        bench.read(["blok=64"])
    with pytest.raises(ConfigError, match="block is a whole number"):
        bench.read(["block=long"])


def test_a_row_keeps_what_was_told_before_it_was_killed(tmp_path: Path) -> None:
    told = tmp_path / "row.jsonl"
    lines = [
        {"tokens": 100, "flops_per_token": 1e10},
        {"warmups_seconds": 5.0},
        {"rounds_seconds": 2.0},
        {"rounds_seconds": 1.0},
    ]
    told.write_text("\n".join([*map(json.dumps, lines), '{"rounds_sec']))
    row = bench._gather(told)
    assert row["rounds_seconds"] == [2.0, 1.0]
    assert row["tokens_per_second"] == pytest.approx(100 / 1.5)
    assert row["model_tflops"] == pytest.approx(100 / 1.5 * 0.01)
    assert row["first_step_extra_seconds"] == pytest.approx(3.5)


def test_a_rehearsal_leaves_a_row_for_each_subject(tmp_path: Path) -> None:
    words = [
        "device=cpu",
        "model=tiny",
        "block=32",
        "rounds=2",
        "warmups=1",
        "subjects=forward,gain_ffn,nonsense",
        f"out={tmp_path}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, bench.__file__, *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["subject"]: row for row in record["rows"]}
    assert [r["subject"] for r in record["rows"]] == [
        "probe",
        "forward",
        "gain_ffn",
        "nonsense",
        "probe",
    ]
    assert rows["gain_ffn"]["status"] == "ok"
    assert len(rows["gain_ffn"]["rounds_seconds"]) == 2
    assert rows["gain_ffn"]["kernels"]
    assert rows["nonsense"]["status"] == "failed"
