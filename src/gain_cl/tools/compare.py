"""``python -m gain_cl compare RUN ... | experiment=NAME``: settings side by side, of runs or of the
finished runs of an experiment, with intervals, fronts, equal skill and a verdict per endpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gain_cl.errors import ConfigError
from gain_cl.measure import diagnosis, record
from gain_cl.paper.table import Row, Table, Value, of, percent, print_table, say
from gain_cl.paper.tables import endpoints, fronts
from gain_cl.paper.tables import main as main_table
from gain_cl.stats import format
from gain_cl.studies import equal, verdicts
from gain_cl.studies.experiments import planned_runs
from gain_cl.studies.study import Study, difference, level, studies_of, study_of_runs
from gain_cl.tools.command import Parser, find_record, print_report
from gain_cl.tools.status import asked_experiment


def main(argv: list[str]) -> int:
    """Print the comparison, or JSON: the same tables as data."""
    parser = Parser("compare", "words", "--results-dir", "--json")
    parser.option(
        "--skill",
        "own step in %% at which methods are matched (default: the middle of what both reach)",
        type=percentage,
    )
    costs = ["skill", "norm", "tokens", "parameters"]
    parser.option("--equal", "in what methods are made equal", "skill", choices=costs)
    args = parser.read(argv)
    results = Path(args.results_dir)
    found = [(study, _tables(study, args, results)) for study in _studies(args.words, results)]

    def show(_: Any) -> None:
        for study, tables in found:
            _show(study, tables)

    report = [_report(*each) for each in found]
    return print_report(report[0] if len(report) == 1 else report, args.json, show)


def percentage(text: str) -> float:
    """Return nats per token of a change of perplexity in %. ValueError: it is none."""
    return math.log1p(float(text) / 100)


def _studies(words: list[str], results_dir: Path) -> list[Study]:
    if any(w.startswith("experiment=") for w in words):
        experiment, more = asked_experiment(words, "compare")
        planned = planned_runs(experiment, [*more, f"results_dir={results_dir}"])
        return list(studies_of(experiment, planned).values())
    if len(words) < 2 or any("=" in w for w in words):
        what = "overrides go with an experiment, and one run cannot be compared"
        raise ConfigError(what, "gain_cl compare", "name two runs, or experiment=NAME")
    return [study_of_runs(record.load(find_record(w, results_dir)) for w in words)]


def _tables(study: Study, args: Any, results_dir: Path) -> list[Table]:
    """Return what is shown of a study, table by table."""
    tables = [fronts.settings(study)]
    if args.equal != "skill":
        tables.append(_equal_cost(study, args.equal, results_dir))
    elif study.others:
        tables.append(fronts.skill(study, args.skill))
    tables += [*endpoints.build(study), *main_table.build(study)]
    if study.chosen.keys() - {study.reference} and study.reference in study.chosen:
        tables.append(_differences(study))
    return tables


def _report(study: Study, tables: list[Table]) -> dict[str, Any]:
    """Return tables as JSON data: a row by its heads, a number with its interval as value, low,
    high."""
    plain = {
        t.name: [
            {
                head: [c.value, c.low, c.high] if isinstance(c, Value) else c
                for head, c in zip(t.columns, row.cells, strict=True)
            }
            for row in t.rows
        ]
        for t in tables
    }
    about = {"name": study.name, "model": study.model, "blocks": len(study.blocks)}
    reached = verdicts.positive_control(study).reached
    more = {"absent": study.absent, "positive_control": reached, "notes": study.notes}
    return {**about, **more, **plain}


def _show(study: Study, tables: list[Table]) -> None:
    blocks, first = format.counted(len(study.blocks), "block"), study.runs[0].record
    say(f"{study.name}: {study.question or f'{len(study.settings)} settings'}", "bold")
    say(f"{first.model}, {blocks} (order of the domains and seed), {first.protocol}")
    for method, count in study.absent.items():
        say(f"not finished: {count} of {method}", "yellow")
    control, most, reached = verdicts.positive_control(study)
    if control is not None and most is not None:
        said = "reached" if reached else "NOT reached: nothing below is decided"
        say(f"positive control, some setting forgets by {study.forgets:g}%: {said}")
        say(f"  the most is {control.label}: {percent(most).text()}%\n")
    for table in tables:
        print_table(table)
    if not study.endpoints:
        say("No endpoint was declared beforehand: everything here is exploratory.", "bold")
    for text in study.notes:
        say(f"note: {text}")


def _equal_cost(study: Study, name: Any, results_dir: Path) -> Table:
    """Return own step and backward change at equal cost. The norm of a run's change is known where
    it was diagnosed."""
    ids, rows = [run_id for s in study.settings for run_id in s.ids], []
    found_of = {run_id: diagnosis.load_diagnosis(results_dir, run_id) for run_id in ids}
    norms = {run_id: d.total_norm for run_id, d in found_of.items() if d and d.total_norm}
    for m in study.others:
        found = [
            equal.match_cost(study, m, study.reference, name, metric, norms)
            for metric in ("own_step", "backward")
        ]
        changes = [None if f.reason else percent(equal.interval_of(f)) for f in found]
        at = Value(found[0].skill, lambda x: f"{x:.4g}")
        rows.append(Row([m, at, *changes, found[0].reason]))
    title = (
        f"Change of perplexity at equal {name}, minus {study.reference} (interpolated over "
        f"log {name}), %"
    )
    return Table("cost", title, ["method", f"at {name}", "own step", "backward", "why not"], rows)


def _differences(study: Study) -> Table:
    """Return the chosen settings against the reference's."""
    reference = study.chosen[study.reference]
    metrics = [m for m in main_table.METRICS if level(reference, m).blocks]
    rows = [
        Row([s.label, *(of(m, difference(s, reference, m)) for m in metrics)], s.ids)
        for s in study.chosen.values()
        if s is not reference
    ]
    title = f"Exploratory: chosen settings minus {reference.label}"
    heads = ["setting", *(main_table.METRICS[m] for m in metrics)]
    return Table("differences", title, heads, rows)
