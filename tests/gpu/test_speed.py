"""docs/speed.md shows what the committed benchmarks measured, the lab book what the runs did."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from gain_cl.measure import record
from gain_cl.stats import matrix
from gain_cl.studies import experiments, study

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/speed.md").read_text()


def table(bench: dict[str, Any]) -> list[str]:
    """Return the lines of a benchmark's table, as docs/speed.md shows them."""
    rates = [row["gemm_tflops"] for row in bench["rows"] if "gemm_tflops" in row]
    done = [row for row in bench["rows"] if "tokens_per_second" in row]
    forward = [r["median_seconds"] for r in done if r["subject"] == "forward"]
    lines = []
    for row in done:
        middle, times = row["median_seconds"], row["rounds_seconds"]
        cells = [
            f"`{row['subject']}`",
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * (max(times) - min(times)) / middle:.0f}",
            f"{middle / forward[0]:.2f}" if forward else "",
            f"{row['model_tflops']:.0f}",
            f"{100 * row['model_tflops'] / max(rates):.0f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
            f"{(row['peak_bytes'] - row['weights_bytes']) / 1e9:.1f}",
            f"{row['first_step_extra_seconds']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def kernels(row: dict[str, Any]) -> str:
    """Return the line of a profiled step: milliseconds by kind of kernel, of the 30 longest."""
    kinds = dict.fromkeys(("matrix products", "attention", "other"), 0.0)
    for kernel in row["kernels"]:
        product, attention = kernel["name"].startswith("nvjet"), "cudnn" in kernel["name"]
        kind = "matrix products" if product else "attention" if attention else "other"
        kinds[kind] += kernel["microseconds"] / 1e3
    cells = [f"{1e3 * row['median_seconds']:.0f}", *(f"{ms:.0f}" for ms in kinds.values())]
    return f"| `{row['subject']}` | {' | '.join(cells)} |"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results/bench").glob("*.json")), ids=lambda p: p.stem
)
def test_the_page_shows_the_benchmark(path: Path) -> None:
    bench = json.loads(path.read_text())
    part = PAGE[PAGE.index(f"<!-- {path.stem} -->") :].partition("<!-- end -->")[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    profiled = [kernels(row) for row in bench["rows"] if row.get("kernels")]
    assert rows == table(bench)
    assert [line for line in profiled if line in PAGE] == profiled
    assert not re.findall(r'"/[^"]*/[^"]*"|file://', path.read_text())  # no path of a machine


def test_the_lab_book_shows_the_runs_on_the_gpu() -> None:
    log = (ROOT / "experiments/LOG.md").read_text()
    log = log[log.index("## 2026-11-27: a first look on a GPU") :]
    cells = experiments.cells(experiments.load("gpu"), [f"results_dir={ROOT}/results"])
    done = [cell for cell in cells if cell.state == "done"]
    assert len(done) >= 8
    for cell in done:
        run = record.load(cell.record)
        found = matrix.summary(study.loss_matrix(run))
        shown = [f"{run.record.method} {run.record.config['train']['lr']:.1e}"]
        for name in ("learned", "own_step", "backward", "from_base", "controls_from_base"):
            nats = found[name].value
            shown.append(f"{nats:+.3f} ({100 * math.expm1(nats):+.1f}%)")
        assert f"| {' | '.join(shown)} |" in log
