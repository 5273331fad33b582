"""``python -m gain_cl compare RUN ... | experiment=NAME``: settings side by side, fronts, equal
skill, and a verdict per endpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from gain_cl.errors import ConfigError
from gain_cl.measure import diagnosis, record
from gain_cl.stats import format, fronts
from gain_cl.stats.matrix import Estimate
from gain_cl.studies import equal as equal_
from gain_cl.studies import experiments, verdicts
from gain_cl.studies import study as comparison
from gain_cl.studies.study import Compared, Setting, Study
from gain_cl.studies.verdicts import Judged
from gain_cl.system.terminal import console, printable
from gain_cl.tools.command import Parser, find_record
from gain_cl.tools.status import asked

SHOWN = ("own_step", "backward", "backward_net", "from_base", "controls_from_base")
HEADS = {
    "own_step": "own step",
    "backward": "backward",
    "backward_net": "net",
    "from_base": "from base",
    "controls_from_base": "controls",
}


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
    results = Path(
        next(
            (w.partition("=")[2] for w in args.words if w.startswith("results_dir=")),
            args.results_dir,
        )
    )
    found = _studies(args.words, results, args.alphas)
    skill = math.log1p(args.skill / 100) if args.skill is not None else None
    if args.json:
        told = [report(study, skill, results) for study in found]
        print(json.dumps(told[0] if len(told) == 1 else told, indent=1, allow_nan=False))
    else:
        for study in found:
            _show(study, skill, args.equal, results)
    return 0


def _studies(words: list[str], results_dir: Path, alphas: bool) -> list[Study]:
    if not any(w.startswith("experiment=") for w in words):
        if strange := [w for w in words if "=" in w]:
            raise ConfigError(
                f"{strange[0]}: overrides go with an experiment",
                "gain_cl compare",
                "give experiment=NAME, or runs alone",
            )
        if alphas:
            raise ConfigError(
                "--alphas goes with an experiment",
                "gain_cl compare",
                "give experiment=NAME, or name the records themselves",
            )
        if len(words) < 2:
            raise ConfigError(
                "one run cannot be compared", "gain_cl compare", "name two runs, or experiment=NAME"
            )
        return [comparison.from_records(record.load(find_record(w, results_dir)) for w in words)]
    experiment, more = asked(words, "compare")
    if not any(w.startswith("results_dir=") for w in more):
        more.append(f"results_dir={results_dir}")
    return list(
        comparison.studies(experiment, experiments.cells(experiment, more), alphas).values()
    )


# --- as data --------------------------------------------------------------------------------------


def report(study: Study, skill: float | None, results_dir: Path) -> dict[str, Any]:
    """Everything that is shown, as JSON data: nats per token, null where there is no number."""
    norms = _norms(study, results_dir)
    control, most, forgets = verdicts.positive_control(study)
    return format.finite(
        {
            "name": study.name,
            "model": study.model,
            "blocks": len(study.blocks),
            "absent": study.absent,
            "settings": [
                {
                    "setting": s.label,
                    "method": s.method,
                    "values": s.values,
                    "runs": [run.record.run_id for run in s.runs.values()],
                    "parameters": equal_.axis(s, "parameters", norms),
                    "tokens": equal_.axis(s, "tokens", norms),
                    "norm": equal_.axis(s, "norm", norms),
                    **{m: _data(comparison.level(s, m)) for m in SHOWN},
                }
                for s in study.settings
            ],
            "positive_control": {
                "setting": control.label if control else None,
                "backward": _data(most),
                "reached": forgets,
            },
            "equal_skill": [
                {
                    "method": m,
                    "minus": study.reference,
                    **_matched(equal_.matched(study, m, study.reference, skill)),
                }
                for m in study.methods
                if m != study.reference
            ],
            "endpoints": [_judged(j) for j in verdicts.judge(study)],
            "notes": study.notes,
        }
    )[0]


def _data(found: Compared | None) -> dict[str, Any] | None:
    if found is None:
        return None
    e = found.estimate
    return {"value": e.value, "low": e.low, "high": e.high, "blocks": found.blocks, "units": e.n}


def _matched(found: fronts.Matched) -> dict[str, Any]:
    d = equal_.interval(found)
    return {
        "skill": found.skill,
        "backward": found.a,
        "reference_backward": found.b,
        "difference": {"value": d.value, "low": d.low, "high": d.high},
        "reason": found.reason,
    }


def _judged(j: Judged) -> dict[str, Any]:
    e = j.endpoint
    return {
        **e.model_dump(mode="json"),
        "measured": _data(j.compared),
        "p_difference": j.tests.difference,
        "p_equivalence": j.tests.equivalence,
        "skill": j.skill,
        "verdict": j.verdict,
        "why": j.why,
    }


def _diagnosed(study: Study, results_dir: Path) -> dict[str, diagnosis.Stage]:
    """run id -> what its last stage did to the weights, of the runs that were diagnosed."""
    ids = [run.record.run_id for s in study.settings for run in s.runs.values()]
    found = {run_id: diagnosis.load(results_dir, run_id) for run_id in ids}
    return {run_id: d.end for run_id, d in found.items() if d is not None and d.end is not None}


def _norms(study: Study, results_dir: Path) -> dict[str, float]:
    return {run_id: end.total_norm for run_id, end in _diagnosed(study, results_dir).items()}


def _kl(s: Setting, ends: dict[str, diagnosis.Stage]) -> list[float]:
    """KL(base || tuned) on the domains learned and on the controls, mean over blocks, nats per
    token; nan where not measured."""
    stages = [ends.get(run.record.run_id) for run in s.runs.values()]
    kinds = [[getattr(e, kind, None) for e in stages] for kind in ("kl_new", "kl_controls")]
    return [
        math.nan if None in found else sum(d.nats for d in found if d is not None) / len(found)
        for found in kinds
    ]


# --- as tables ------------------------------------------------------------------------------------


def _show(study: Study, skill: float | None, equal: str, results_dir: Path) -> None:
    out = console()

    def say(text: str = "", style: str = "") -> None:
        out.print(
            printable(text), style=style or None, markup=False, highlight=False, soft_wrap=True
        )

    first = study.settings[0].runs[next(iter(study.settings[0].runs))].record
    say(
        f"{study.name}: {study.question}" if study.question else f"{len(study.settings)} settings",
        style="bold",
    )
    blocks = len(study.blocks)
    kinds = f"{format.counted(blocks, 'block')} (order of the domains and seed)"
    say(
        f"{first.model}, {kinds}, {first.protocol}, {_documents(study)} test documents of "
        "trained domains"
    )
    if study.absent:
        say(
            f"not finished: {', '.join(f'{n} of {method}' for method, n in study.absent.items())}",
            style="yellow",
        )
    say()
    _settings(study, results_dir, out)
    control, most, forgets = verdicts.positive_control(study)
    if control is not None and most is not None:
        reached = "reached" if forgets else "NOT reached: nothing below is decided"
        say(f"positive control, some setting forgets by {study.forgets:g}%: {reached}")
        say(f"  the most is {control.label}: {_percent(most.estimate)}%")
        say()
    if equal == "skill":
        _equal_skill(study, skill, out)
    else:
        _equal_cost(study, equal, _norms(study, results_dir), out)
    _endpoints(study, out)
    if len(study.methods) > 1:
        _chosen(study, out)
    over = "documents of the one block" if blocks == 1 else "blocks, and documents that they share"
    say(f"Intervals: 95%, over {over}. Below 0 is better (margins and accuracies: above 0).")
    for text in [*study.notes, *verdicts.advice(study)]:
        say(f"note: {text}")


def _documents(study: Study) -> int:
    matrix = next(iter(study.settings[0].matrices.values()))
    return sum(len(matrix.tokens[d]) for d in matrix.trained)


def _settings(study: Study, results_dir: Path, out: Any) -> None:
    norms = _norms(study, results_dir)
    shown = [m for m in SHOWN if any(comparison.level(s, m) is not None for s in study.settings)]
    efficient = comparison.efficient(study)
    blocks, ends = len(study.blocks), _diagnosed(study, results_dir)
    moved = [x for s in study.settings for x in _kl(s, ends)] if norms else []
    kl = ["KL new", "KL controls"] if not all(map(math.isnan, moved)) else []
    wide = out.width >= 110 + 8 * (blocks > 1) + 8 * bool(norms) + 18 * bool(kl)
    table = _table("Change of perplexity, % (mean over domains)")
    table.add_column("setting", no_wrap=wide)
    for head in (
        *(["trains"] if wide else []),
        *(["blocks"] if blocks > 1 else []),
        *(["|dW|", *kl] if norms else []),
    ):
        table.add_column(head, justify="right")
    for metric in shown:
        table.add_column(HEADS[metric], justify="right", no_wrap=True)
        if wide and metric in ("own_step", "backward"):
            table.add_column("95% interval", justify="right", no_wrap=True)
    table.add_column("front", justify="center")
    method = study.settings[0].method
    for s in study.settings:
        if s.method != method:
            table.add_section()
            method = s.method
        row = [printable(s.label)]
        row += [_count(equal_.axis(s, "parameters", norms))] if wide else []
        row += [str(len(s.runs))] if blocks > 1 else []
        if norms:
            row += [
                "-" if math.isnan(x) else f"{x:.3g}"
                for x in (equal_.axis(s, "norm", norms), *(_kl(s, ends) if kl else ()))
            ]
        for metric in shown:
            found = comparison.level(s, metric)
            value, between = (
                ("-", "-")
                if found is None
                else (format.percent(found.estimate.value), _range(found.estimate))
            )
            interval = metric in ("own_step", "backward")
            row += (
                [value, between]
                if wide and interval
                else [f"{value}\n{between}" if interval else value]
            )
        table.add_row(*row, "*" if s.label in efficient else "")
    out.print(table)
    out.print(
        "* on its method's front: no other setting of the method learns more and forgets less",
        markup=False,
        highlight=False,
    )
    out.print()


def _equal_skill(study: Study, skill: float | None, out: Any) -> None:
    others = [m for m in study.methods if m != study.reference]
    if not others or all(comparison.level(s, "backward") is None for s in study.settings):
        return
    table = _table(
        f"Backward change at equal own step, against {study.reference} (interpolated on both "
        "fronts), %"
    )
    table.add_column("method", no_wrap=True)
    for head in (
        "at own step",
        "backward",
        study.reference,
        "difference",
        "95% interval",
        "blocks",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    for m in others:
        found = equal_.matched(study, m, study.reference, skill)
        d = equal_.interval(found)
        values = [format.percent(x) for x in (found.skill, found.a, found.b, d.value)]
        between = _range(d) if not math.isnan(d.value) else "-"
        table.add_row(m, *values, between, str(len(found.differences)), printable(found.reason))
    out.print(table)
    out.print()


def _equal_cost(study: Study, name: Any, norms: dict[str, float], out: Any) -> None:
    table = _table(
        f"Change of perplexity at equal {name}, minus {study.reference} (interpolated over "
        f"log {name}), %"
    )
    table.add_column("method", no_wrap=True)
    for head in (f"at {name}", "own step", "95% interval", "backward", "95% interval"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    for m in (m for m in study.methods if m != study.reference):
        found = [
            equal_.at_equal(study, m, study.reference, name, metric, norms)
            for metric in ("own_step", "backward")
        ]
        cells = [
            text
            for f in found
            for text in (format.percent(equal_.interval(f).value), _range(equal_.interval(f)))
        ]
        at = "-" if math.isnan(found[0].skill) else f"{found[0].skill:.4g}"
        table.add_row(m, at, *cells, printable(found[0].reason))
    out.print(table)
    out.print()


def _endpoints(study: Study, out: Any) -> None:
    judged = verdicts.judge(study)
    if not judged:
        out.print(
            "No endpoint was declared beforehand: everything here is exploratory.",
            style="bold",
            highlight=False,
        )
        out.print()
        return
    table = _table("Declared endpoints")
    for head in (
        "endpoint",
        "verdict",
        "measured",
        "95% interval",
        "p",
        "p equal",
        "blocks",
        "units",
    ):
        table.add_column(
            head,
            justify="left" if head in ("endpoint", "verdict") else "right",
            no_wrap=head != "endpoint",
        )
    for j in judged:
        c = j.compared
        write = format.percent if comparison.lower_is_better(j.endpoint.metric) else _signed
        value = "-" if c is None else write(c.estimate.value)
        interval = (
            "-"
            if c is None or math.isnan(c.estimate.low)
            else f"{write(c.estimate.low)} to {write(c.estimate.high)}"
        )
        counts = ["-", "-"] if c is None else [str(c.blocks), str(c.estimate.n)]
        table.add_row(
            j.endpoint.name,
            j.verdict,
            value,
            interval,
            _p(j.tests.difference),
            _p(j.tests.equivalence),
            *counts,
        )
    out.print(table)
    for j in judged:
        e = j.endpoint
        what = f"{e.metric} of {e.of}" + (f" minus {e.minus}" if e.minus else ", against 0")
        at = f" at an own step of {format.percent(j.skill)}%" if j.skill is not None else ""
        within = (
            ""
            if e.margin is None
            else f", margin {e.margin:g}{'%' if comparison.lower_is_better(e.metric) else ''}"
        )
        text = f"{e.name}: {what}{at}, {e.kind}{within}" + (f"; {j.why}" if j.why else "")
        out.print(printable(text), markup=False, highlight=False, soft_wrap=True)
    out.print(
        f"p adjusted over the declared endpoints (Holm), alpha {study.alpha:g}",
        markup=False,
        highlight=False,
    )
    out.print()


def _chosen(study: Study, out: Any) -> None:
    """Chosen settings against the reference's: exploratory."""
    if study.reference not in study.chosen:
        return
    reference = study.chosen[study.reference]
    table = _table(f"Exploratory: chosen settings minus {reference.label}, %")
    table.add_column("setting", no_wrap=True)
    for head in ("own step", "95% interval", "backward", "95% interval", "net", "95% interval"):
        table.add_column(head, justify="right", no_wrap=True)
    for method, s in study.chosen.items():
        if method == study.reference:
            continue
        row = [printable(s.label)]
        for metric in ("own_step", "backward", "backward_net"):
            found = comparison.difference(s, reference, metric)
            row += (
                ["-", "-"]
                if found is None
                else [format.percent(found.estimate.value), _range(found.estimate)]
            )
        table.add_row(*row)
    out.print(table)
    out.print()


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
    )


def _percent(e: Estimate) -> str:
    return f"{format.percent(e.value)} ({_range(e)})"


def _range(e: Estimate) -> str:
    return (
        "not known"
        if math.isnan(e.low) or math.isnan(e.high)
        else f"{format.percent(e.low)} to {format.percent(e.high)}"
    )


def _count(n: float) -> str:
    """In at most five characters: 960, 63.4k, 4.88M, 135M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def _signed(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:+.3f}"


def _p(p: float) -> str:
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"
