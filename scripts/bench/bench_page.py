"""Print a benchmark's record as the tables of docs/speed.md.

python scripts/bench/bench_page.py results/bench/NAME.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def table(bench: dict[str, Any]) -> list[str]:
    """Return the lines of a benchmark's rows: one a subject that was measured."""
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


if __name__ == "__main__":
    for name in sys.argv[1:]:
        record = json.loads(Path(name).read_text())
        print(f"<!-- {Path(name).stem} -->", *table(record), "<!-- end -->", sep="\n")
        print(*(kernels(row) for row in record["rows"] if row.get("kernels")), sep="\n")
