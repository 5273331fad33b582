"""``python -m gain_cl compare RUN ... | experiment=NAME``: settings side by side, fronts, equal
skill, and a verdict per endpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gain_cl.errors import ConfigError
from gain_cl.measure import diagnosis, record
from gain_cl.paper.table import Row, Table, known, of, percent, print_table, say
from gain_cl.paper.tables import endpoints, fronts
from gain_cl.paper.tables import main as main_table
from gain_cl.stats import format
from gain_cl.studies import equal, verdicts
from gain_cl.studies.experiments import planned_runs
from gain_cl.studies.study import Compared, Study, difference, level, studies_of, study_of_runs
from gain_cl.tools.command import Parser, find_record, print_report
from gain_cl.tools.status import asked_experiment

SHOWN = ("own_step", "backward", "backward_net", "from_base", "controls_from_base")


def main(argv: list[str]) -> int:
    """Print the comparison, or JSON."""
    about = "Compare runs (RUN RUN ...), or the finished runs of an experiment (experiment=NAME): "
    about += "intervals, fronts, equal skill, a verdict per endpoint."
    parser = Parser("compare", "words", "--results-dir", "--json", description=about)
    parser.option(
        "--alphas", "of an experiment: with what interpolate --records made of its runs", False
    )
    parser.option(
        "--skill",
        "own step in %% at which methods are matched (default: the middle of what both reach)",
        type=percentage,
    )
    costs = ["skill", "norm", "tokens", "parameters"]
    parser.option("--equal", "in what methods are made equal", "skill", choices=costs)
    args = parser.read(argv)
    results = Path(args.results_dir)
    found = _studies(args.words, results, args.alphas)
    report = [_report(study, args.skill, results) for study in found] if args.json else []

    def show(_: Any) -> None:
        for study in found:
            _show(study, args.skill, args.equal, results)

    return print_report(report[0] if len(report) == 1 else report, args.json, show)


def percentage(text: str) -> float:
    """Return nats per token of a change of perplexity in %. ValueError: it is none."""
    return math.log1p(float(text) / 100)


def _studies(words: list[str], results_dir: Path, alphas: bool) -> list[Study]:
    if any(w.startswith("experiment=") for w in words):
        experiment, more = asked_experiment(words, "compare")
        planned = planned_runs(experiment, [*more, f"results_dir={results_dir}"])
        return list(studies_of(experiment, planned, alphas=alphas).values())
    if alphas or len(words) < 2 or any("=" in w for w in words):
        raise ConfigError(
            "overrides and --alphas go with an experiment, and one run cannot be compared",
            "gain_cl compare",
            "name two runs, or experiment=NAME",
        )
    return [study_of_runs(record.load(find_record(w, results_dir)) for w in words)]


# --- as data --------------------------------------------------------------------------------------


def _report(study: Study, skill: float | None, results_dir: Path) -> dict[str, Any]:
    """Return everything that is shown, as JSON data: nats per token, null where there is no
    number."""
    norms = _norms(study, results_dir)
    control, _, reached = verdicts.positive_control(study)
    settings = [
        {
            "setting": s.label,
            "method": s.method,
            "values": s.values,
            "runs": s.ids,
            "parameters": equal.cost_of(s, "parameters", norms),
            "tokens": equal.cost_of(s, "tokens", norms),
            "norm": equal.cost_of(s, "norm", norms),
            **{m: _data(level(s, m)) for m in SHOWN},
        }
        for s in study.settings
    ]
    matched = [
        {
            "method": m,
            "minus": study.reference,
            "skill": found.skill,
            "backward": found.a,
            "reference_backward": found.b,
            "difference": {"value": d.value, "low": d.low, "high": d.high},
            "reason": found.reason,
        }
        for m in study.others
        for found in [equal.match_skill(study, m, study.reference, skill)]
        for d in [equal.interval_of(found)]
    ]
    judged = [
        {
            **j.endpoint.model_dump(mode="json"),
            "measured": _data(j.compared),
            "p_difference": j.tests.difference,
            "p_equivalence": j.tests.equivalence,
            "skill": j.skill,
            "verdict": j.verdict,
            "why": j.why,
        }
        for j in verdicts.judge(study)
    ]
    return {
        "name": study.name,
        "model": study.model,
        "blocks": len(study.blocks),
        "absent": study.absent,
        "settings": settings,
        "positive_control": {
            "setting": control.label if control else None,
            "backward": _data(level(control, "backward")) if control else None,
            "reached": reached,
        },
        "equal_skill": matched,
        "endpoints": judged,
        "notes": study.notes,
    }


def _data(found: Compared | None) -> dict[str, Any] | None:
    if found is None:
        return None
    e = found.estimate
    return {"value": e.value, "low": e.low, "high": e.high, "blocks": found.blocks, "units": e.n}


def _norms(study: Study, results_dir: Path) -> dict[str, float]:
    """Return run id -> norm of the effective weight change, of the runs that were diagnosed."""
    ids = [run_id for s in study.settings for run_id in s.ids]
    found = {run_id: diagnosis.load_diagnosis(results_dir, run_id) for run_id in ids}
    return {run_id: d.end.total_norm for run_id, d in found.items() if d is not None and d.end}


# --- as tables ------------------------------------------------------------------------------------


def _show(study: Study, skill: float | None, made_equal: str, results_dir: Path) -> None:
    blocks = format.counted(len(study.blocks), "block")
    first = study.runs[0].record
    matrix = next(iter(study.settings[0].matrices.values()))
    documents = sum(len(matrix.tokens[d]) for d in matrix.trained)
    title = f"{len(study.settings)} settings"
    say(f"{study.name}: {study.question}" if study.question else title, "bold")
    say(
        f"{first.model}, {blocks} (order of the domains and seed), {first.protocol}, {documents} "
        "test documents of trained domains"
    )
    if study.absent:
        absent = ", ".join(f"{n} of {method}" for method, n in study.absent.items())
        say(f"not finished: {absent}", "yellow")
    say()
    print_table(fronts.settings(study))
    control, most, reached = verdicts.positive_control(study)
    if control is not None and most is not None:
        said = "reached" if reached else "NOT reached: nothing below is decided"
        say(f"positive control, some setting forgets by {study.forgets:g}%: {said}")
        say(f"  the most is {control.label}: {percent(most).text()}%\n")
    if made_equal != "skill":
        print_table(_equal_cost(study, made_equal, _norms(study, results_dir)))
    elif study.others:
        print_table(fronts.skill(study, skill))
    for table in endpoints.build(study):
        print_table(table)
    if not study.endpoints:
        say("No endpoint was declared beforehand: everything here is exploratory.\n", "bold")
    for table in main_table.build(study):
        print_table(table)
    if study.chosen.keys() - {study.reference} and study.reference in study.chosen:
        print_table(_differences(study))
    for text in study.notes:
        say(f"note: {text}")


def _equal_cost(study: Study, name: Any, norms: dict[str, float]) -> Table:
    rows = []
    for m in study.others:
        found = [
            equal.match_cost(study, m, study.reference, name, metric, norms)
            for metric in ("own_step", "backward")
        ]
        changes = [None if f.reason else percent(equal.interval_of(f)) for f in found]
        at = known(found[0].skill, lambda x: f"{x:.4g}")
        rows.append(Row([m, at, *changes, found[0].reason]))
    title = (
        f"Change of perplexity at equal {name}, minus {study.reference} (interpolated over "
        f"log {name}), %"
    )
    return Table("cost", title, ["method", f"at {name}", "own step", "backward", "why not"], rows)


def _differences(study: Study) -> Table:
    """Return the chosen settings against the reference's."""
    reference = study.chosen[study.reference]
    metrics = [m for m in main_table.METRICS if level(reference, m) is not None]
    rows = [
        Row([s.label, *(of(m, difference(s, reference, m)) for m in metrics)], s.ids)
        for s in study.chosen.values()
        if s is not reference
    ]
    title = f"Exploratory: chosen settings minus {reference.label}"
    heads = ["setting", *(main_table.METRICS[m] for m in metrics)]
    return Table("differences", title, heads, rows)
