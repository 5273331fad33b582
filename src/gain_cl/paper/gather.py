"""The records of an experiment, fit to be printed: what may not enter a table is named, not left
out in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gain_cl.config.schema import RunConfig
from gain_cl.errors import DataError, GainError
from gain_cl.measure import provenance, record
from gain_cl.measure.record import Run
from gain_cl.studies import experiments, study
from gain_cl.studies.experiments import Cell, Experiment
from gain_cl.studies.study import Study

COMPUTING = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "lm-eval",
    "datasets",
    "numpy",
    "safetensors",
)
"""Packages that numbers come from."""

SHARED = {
    "schema": lambda r: r.schema_version,
    "packages": lambda r: {name: r.provenance.get("packages", {}).get(name) for name in COMPUTING},
    "dtype": lambda r: (r.config["model"]["dtype"], r.config["model"].get("load_in")),
    "device type": lambda r: str(r.provenance.get("device", "")).split(":")[0],
}
"""What the runs of one model in one table must share; not the commit, which a study may outlive."""


@dataclass(frozen=True)
class Book:
    """An experiment and what is known of it. studies: one for each model; runs: by run id; gaps:
    cells that may not be printed, and why (only of a partial book); words: of the command line that
    asks for it, but where results lie."""

    experiment: Experiment
    cells: list[Cell]
    studies: dict[str, Study]
    runs: dict[str, Run]
    results: Path
    gaps: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(c.model for c in self.cells))

    def ids(self, model: str, setting: str) -> list[str]:
        """Runs of a setting, by block."""
        mine = [c for c in self.cells if (c.model, c.label) == (model, setting)]
        return [c.run_id for c in mine if c.run_id in self.runs]


def gather(
    experiment: Experiment,
    more: list[str] | None = None,
    partial: bool = False,
    given: str | None = None,
) -> Book:
    """given: how the experiment was named (default: its name).

    DataError names every cell that is missing, failed, running, stale, tainted, limited, damaged or
    unlike the others; partial: such cells are left out and listed."""
    cells = experiments.cells(experiment, more)
    runs: dict[str, Run] = {}
    gaps: list[str] = []
    for c in cells:
        name = f"{c.model} {c.label} block {c.block}"
        try:
            if c.state == "done":
                run = record.load(c.record)
                fault = (
                    _fault(run)
                    if run.record.run_id == c.run_id
                    else f"the record of {run.record.run_id} under another name"
                )
                if fault is None:
                    runs[c.run_id] = run
                else:
                    gaps.append(f"{name} is {fault} ({c.run_id})")
            else:
                gaps.append(f"{name} is {_absent(c)} ({c.run_id})")
        except GainError as error:
            gaps.append(f"{name}: {error.what} ({error.where})")
    for model in dict.fromkeys(c.model for c in cells):
        gaps += _mixed(runs, [c for c in cells if c.model == model and c.run_id in runs])
    if gaps and not partial:
        several = f"; {len(gaps) - 5} more" if len(gaps) > 5 else ""
        what = (
            f"{len(gaps)} of {len(cells)} cells may not enter a table: "
            f"{'; '.join(gaps[:5])}{several}"
        )
        raise DataError(
            what,
            f"experiment {experiment.name}",
            "run or mend them, or give partial=true to show gaps",
        )
    there = [c for c in cells if c.run_id in runs]
    studies = study.studies(experiment, there)
    words = [w for w in more or [] if w.partition("=")[0] not in ("results_dir", "output_dir")]
    return Book(
        experiment,
        cells,
        studies,
        runs,
        cells[0].record.parent.parent,
        gaps,
        [f"experiment={given or experiment.name}", *words],
    )


def _fault(run: Run) -> str | None:
    """Why a finished run may not be printed."""
    r = run.record
    if r.tainted:
        return f"tainted: {', '.join(r.tainted)}"
    if r.config["tasks"].get("limit") is not None or any(
        t.limited for s in r.stages for t in s.tasks.values()
    ):
        return "limited: tasks.limit is for debugging"
    if r.provenance.get("numerics") not in (None, provenance.NUMERICS):
        return (
            f"stale: of numerics {r.provenance['numerics']}, this program has {provenance.NUMERICS}"
        )
    return None


def _absent(c: Cell) -> str:
    """missing, failed, ...; stale, where the same settings were run with other data, model files or
    numerics."""
    for path in sorted(c.record.parent.glob(f"{c.run_id.rpartition('-')[0]}-*.json")):
        try:
            other = record.load(path).record
        except GainError:
            continue
        if other.interpolated is None and _settings(other.config) == _settings(
            c.config.model_dump(mode="json")
        ):
            return f"stale: {other.run_id} was made of other data, model files or numerics"
    return c.state


def _settings(config: dict[str, Any]) -> Any:
    try:
        return RunConfig.model_validate(config).scientific()
    except ValueError:
        return config


def _mixed(runs: dict[str, Run], cells: list[Cell]) -> list[str]:
    """Cells that are unlike most of the others in what all must share; they are taken out of
    runs."""
    found = []
    for what, of in SHARED.items():
        values = {c.run_id: of(runs[c.run_id].record) for c in cells if c.run_id in runs}
        if len({repr(v) for v in values.values()}) <= 1:
            continue
        usual = Counter(repr(v) for v in values.values()).most_common(1)[0][0]
        for run_id, value in values.items():
            if repr(value) != usual:
                found.append(f"mixed {what}: {run_id} has {_words(value)}")
                del runs[run_id]
    return found


def _words(value: Any) -> str:
    return (
        ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    )
