"""docs/speed.md shows what the committed benchmarks measured, the lab book what the runs did."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import bench_page
import pytest

from gain_cl.measure import record
from gain_cl.stats import matrix
from gain_cl.studies import experiments, study

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/speed.md").read_text()


NAMES = re.findall(r"<!-- ((?!end)[\w.-]+) -->", PAGE)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_benchmark(name: str) -> None:
    path = ROOT / f"results/bench/{name}.json"
    bench = json.loads(path.read_text())
    part = PAGE[PAGE.index(f"<!-- {name} -->") :].partition("<!-- end -->")[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    profiled = [bench_page.kernels(row) for row in bench["rows"] if row.get("kernels")]
    assert rows == bench_page.table(bench)
    assert [line for line in profiled if line in PAGE] == profiled
    assert not re.findall(r'"/[^"]*/[^"]*"|file://', path.read_text())  # no path of a machine


def test_the_lab_book_shows_the_runs_on_the_gpu() -> None:
    log = (ROOT / "experiments/LOG.md").read_text()
    log = log[log.index("## 2026-11-27: a first look on a GPU") :]
    cells = experiments.planned_runs(
        experiments.load_experiment("gpu"), [f"results_dir={ROOT}/results"]
    )
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
