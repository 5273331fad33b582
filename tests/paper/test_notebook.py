"""The notebook in examples/ runs as committed, and its table is what gain_cl.compare says of the
committed records."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import gain_cl

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/figure.ipynb"


def test_the_notebook_runs_and_tells_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    monkeypatch.delenv(
        "MPLBACKEND", raising=False
    )  # or the kernel would not draw into the notebook
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(
            name, str(tmp_path / name)
        )  # nothing of this user's own, nothing left behind
    notebook = nbformat.read(shutil.copy(NOTEBOOK, tmp_path), as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    outputs = [o.data for cell in notebook.cells for o in cell.get("outputs", []) if "data" in o]
    assert [o for o in outputs if "image/png" in o]
    (html,) = [o["text/html"] for o in outputs if "text/html" in o]
    (table,) = pd.read_html(
        io.StringIO(html), index_col=0, header=[0, 1]
    )  # the second line of the head names the index
    table.columns = table.columns.get_level_values(0)
    runs = [
        gain_cl.load(path)
        for path in (ROOT / "results/runs").glob("smollm2_healed-lora-custom-s0-*.json")
    ]
    wanted = gain_cl.compare(
        *(run for run in runs if run.record.config["train"]["tokens"] == 4096)
    ).set_index("setting")
    assert len(table) == 25 and set(wanted.index) < set(table.index)
    for setting, row in wanted.iterrows():
        for name in (
            "own_step",
            "own_step_low",
            "own_step_high",
            "backward",
            "backward_low",
            "backward_high",
        ):
            assert table.loc[setting, name] == pytest.approx(
                100 * math.expm1(row[name]), abs=0.0051
            ), (setting, name)


def test_the_notebook_is_committed_clean() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert not [
        cell
        for cell in code
        if any(place in cell.source for place in ("/work", "/home", "/root", "/Users", "~"))
    ]
