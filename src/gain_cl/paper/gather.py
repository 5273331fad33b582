"""The records of an experiment, fit to be printed: what may not enter a table is named, not left
out in silence."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gain_cl.errors import DataError, GainError
from gain_cl.measure import provenance, record
from gain_cl.measure.record import Run
from gain_cl.studies.experiments import Experiment, Planned, planned_runs
from gain_cl.studies.shared import COMPUTED, unlike
from gain_cl.studies.study import Study, studies_of


@dataclass(frozen=True)
class Book:
    """An experiment and what is known of it. studies: one for each model; runs: by run id; gaps:
    runs that may not be printed, and why (only of a partial book); words: of the command line that
    asks for it, but where results lie."""

    experiment: Experiment
    planned: list[Planned]
    studies: dict[str, Study]
    runs: dict[str, Run]
    results: Path
    gaps: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    @property
    def printed(self) -> list[Planned]:
        """Return the planned runs whose records may be printed."""
        return [c for c in self.planned if c.run_id in self.runs]


def gather(
    experiment: Experiment,
    more: list[str] | None = None,
    partial: bool = False,
    given: str | None = None,
) -> Book:
    """Return the book of an experiment. given: how it was named (default: its name).

    DataError names every run that is missing, failed, running, stale, tainted, limited, damaged or
    unlike the others; partial: such runs are left out and listed."""
    planned, more = planned_runs(experiment, more), more or []
    runs: dict[str, Run] = {}
    gaps: list[str] = []
    for c in planned:
        name = f"{c.model} {c.label} block {c.block}"
        try:
            run = record.load(c.record) if c.state == "done" else None
            if fault := _fault(run, c) if run else c.state:
                gaps.append(f"{name} is {fault} ({c.run_id})")
            elif run:
                runs[c.run_id] = run
        except GainError as error:
            gaps.append(f"{name}: {error.what} ({error.where})")
    for model in dict.fromkeys(c.model for c in planned):
        mine = [runs[c.run_id].record for c in planned if c.model == model and c.run_id in runs]
        for what, _, odd, value in unlike(mine, COMPUTED):
            gaps.append(f"mixed {what}: {odd.run_id} has {value}")
            del runs[odd.run_id]
    if gaps and not partial:
        several = ["..."] if len(gaps) > 5 else []
        raise DataError(
            f"{len(gaps)} of {len(planned)} runs may not enter a table: "
            f"{'; '.join(gaps[:5] + several)}",
            f"experiment {experiment.name}",
            "run or fix them, or give partial=true to show gaps",
        )
    words = [w for w in more if not w.startswith(("results_dir=", "output_dir="))]
    words.insert(0, f"experiment={given or experiment.name}")
    studies, results = studies_of(experiment, planned, runs), planned[0].record.parents[1]
    return Book(experiment, planned, studies, runs, results, gaps, words)


def _fault(run: Run, planned: Planned) -> str | None:
    """Return why a finished run may not be printed."""
    r = run.record
    if r.run_id != planned.run_id:
        return f"the record of {r.run_id} under another name"
    if r.tainted:
        return f"tainted: {', '.join(r.tainted)}"
    limited = any(t.limited for s in r.stages for t in s.tasks.values())
    if limited or r.config["tasks"].get("limit") is not None:
        return "limited: tasks.limit is for debugging"
    if r.provenance.get("numerics") not in (None, provenance.NUMERICS):
        return (
            f"stale: of numerics {r.provenance['numerics']}, this program has {provenance.NUMERICS}"
        )
    return None
