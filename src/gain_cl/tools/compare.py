"""``python -m gain_cl compare RUN ... | experiment=NAME``: settings side by side, fronts, equal
skill, and a verdict per endpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gain_cl.errors import ConfigError
from gain_cl.measure import diagnosis, record
from gain_cl.paper.table import Row, Table, Value, known, of, percent, print_table, say
from gain_cl.paper.tables import endpoints, fronts
from gain_cl.paper.tables import main as main_table
from gain_cl.stats import format
from gain_cl.studies import equal, verdicts
from gain_cl.studies.experiments import planned_runs
from gain_cl.studies.study import Compared, Study, difference, level, studies_of, study_of_runs
from gain_cl.tools.command import Parser, find_record
from gain_cl.tools.status import asked_experiment

SHOWN = ("own_step", "backward", "backward_net", "from_base", "controls_from_base")


def main(argv: list[str]) -> int:
    """Print the comparison, or JSON."""
    parser = Parser(
        "compare",
        usage="python -m gain_cl compare RUN RUN ... | experiment=NAME [KEY=VALUE ...] [--alphas] "
        "[--skill PERCENT] [--equal WHAT]"
        " [--json]",
        description="Compare runs, or the finished runs of an experiment: intervals, fronts, "
        "equal skill, a verdict per endpoint.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN | experiment=NAME | KEY=VALUE",
        help="records or run ids; or an experiment",
    )
    parser.add_argument(
        "--alphas",
        action="store_true",
        help="of an experiment: with what interpolate --records made of its runs",
    )
    parser.add_argument(
        "--skill",
        type=float,
        help="own step in %% at which methods are matched (default: the middle of what both reach)",
    )
    parser.add_argument(
        "--equal",
        choices=["skill", "norm", "tokens", "parameters"],
        default="skill",
        help="in what methods are made equal",
    )
    parser.add_argument(
        "--results-dir", default="results", help="where runs/RUN_ID.json are (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_intermixed_args(argv)
    if args.skill is not None and not -100 < args.skill < 100:
        raise ConfigError(
            f"{args.skill} is no change in %", "--skill", "give the own step, e.g. --skill -10"
        )
    skill = math.log1p(args.skill / 100) if args.skill is not None else None
    given = [w.partition("=")[2] for w in args.words if w.startswith("results_dir=")]
    results = Path(given[0] if given else args.results_dir)
    found = _studies(args.words, results, args.alphas)
    if args.json:
        told = [_report(study, skill, results) for study in found]
        print(json.dumps(told[0] if len(told) == 1 else told, indent=1, allow_nan=False))
    else:
        for study in found:
            _show(study, skill, args.equal, results)
    return 0


def _studies(words: list[str], results_dir: Path, alphas: bool) -> list[Study]:
    if any(w.startswith("experiment=") for w in words):
        experiment, more = asked_experiment(words, "compare")
        more = [w for w in more if not w.startswith("results_dir=")]
        planned = planned_runs(experiment, [*more, f"results_dir={results_dir}"])
        return list(studies_of(experiment, planned, alphas=alphas).values())
    where = "gain_cl compare"
    if strange := [w for w in words if "=" in w]:
        what = f"{strange[0]}: overrides go with an experiment"
        raise ConfigError(what, where, "give experiment=NAME, or runs alone")
    if alphas:
        do = "give experiment=NAME, or name the records themselves"
        raise ConfigError("--alphas goes with an experiment", where, do)
    if len(words) < 2:
        raise ConfigError("one run cannot be compared", where, "name two runs, or experiment=NAME")
    return [study_of_runs(record.load(find_record(w, results_dir)) for w in words)]


# --- as data --------------------------------------------------------------------------------------


def _report(study: Study, skill: float | None, results_dir: Path) -> dict[str, Any]:
    """Return everything that is shown, as JSON data: nats per token, null where there is no
    number."""
    norms = {k: end.total_norm for k, end in _diagnosed(study, results_dir).items()}
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
    return format.finite(
        {
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
    )[0]


def _data(found: Compared | None) -> dict[str, Any] | None:
    if found is None:
        return None
    e = found.estimate
    return {"value": e.value, "low": e.low, "high": e.high, "blocks": found.blocks, "units": e.n}


def _diagnosed(study: Study, results_dir: Path) -> dict[str, diagnosis.Stage]:
    """Return run id -> what its last stage did to the weights, of the runs that were diagnosed."""
    found = {
        run_id: diagnosis.load_diagnosis(results_dir, run_id)
        for s in study.settings
        for run_id in s.ids
    }
    return {run_id: d.end for run_id, d in found.items() if d is not None and d.end is not None}


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
    ends = _diagnosed(study, results_dir)
    if ends:
        print_table(_moved(study, ends))
    control, most, reached = verdicts.positive_control(study)
    if control is not None and most is not None:
        said = "reached" if reached else "NOT reached: nothing below is decided"
        say(f"positive control, some setting forgets by {study.forgets:g}%: {said}")
        say(f"  the most is {control.label}: {percent(most).text()}%\n")
    if made_equal != "skill":
        norms = {run_id: end.total_norm for run_id, end in ends.items()}
        print_table(_equal_cost(study, made_equal, norms))
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
    for text in [*study.notes, *verdicts.advice(study)]:
        say(f"note: {text}")


def _moved(study: Study, ends: dict[str, diagnosis.Stage]) -> Table:
    """Return how far the weights moved, and KL(base || tuned) in nats per token on the domains
    learned and on the controls, mean over blocks; nothing where a run was not diagnosed."""
    facts: tuple[Callable[[diagnosis.Stage], float | None], ...] = (
        lambda e: e.total_norm,
        lambda e: e.kl_new.nats if e.kl_new else None,
        lambda e: e.kl_controls.nats if e.kl_controls else None,
    )
    rows = []
    for s in study.settings:
        found = [ends[run_id] for run_id in s.ids if run_id in ends]
        cells = []
        for fact in facts:
            values = [x for e in found if (x := fact(e)) is not None]
            whole = len(values) == len(s.ids)
            cells.append(Value(sum(values) / len(values), write=_three) if whole else None)
        rows.append(Row([s.label, *cells], s.ids))
    heads = ["setting", "|dW|", "KL new", "KL controls"]
    title = f"{study.model}: change of the weights (diagnose), and what it did to the predictions"
    return Table("moved", title, heads, rows)


def _three(x: float) -> str:
    return f"{x:.3g}"


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
