"""``python -m gain_cl power experiment=NAME``: what its blocks, documents and items can detect, and
what it will cost, before it runs.

The noise comes from pilot runs (--pilot: another experiment, or this one as far as it is done) or
is stated (--block-sd, --document-se). A difference between methods varies over blocks (seed, order)
with sd s_b, and over the choice of documents, which all blocks share, with standard error s_d ~ 1 /
sqrt(documents). What k blocks can detect is the paired t-test's for s_b and, added in squares, the
floor that s_d sets however many blocks there are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from gain_cl.config.schema import RunConfig
from gain_cl.measure import tasks
from gain_cl.measure.record import RunRecord
from gain_cl.paper.table import Row, Table, known, plain, print_table, say
from gain_cl.paper.tables.endpoints import contrast
from gain_cl.stats import answers, format, inference
from gain_cl.studies.costs import run_seconds
from gain_cl.studies.experiments import (
    Endpoint,
    Experiment,
    Planned,
    load_experiment,
    planned_runs,
)
from gain_cl.studies.study import Study, difference, level, lower_is_better, studies_of
from gain_cl.tools.command import Parser, print_report
from gain_cl.tools.status import asked_experiment

BLOCKS = (2, 3, 5, 8, 12)
POWER = 0.8
DISCORDANT = 0.15
"""Share of items whose answer changes, where no pilot says it (shared/numerics.md)."""

STATED = {
    "--block-sd": "sd over blocks of a difference between methods, nats per token",
    "--document-se": "its standard error over the experiment's test documents, nats per token",
    "--speed": "training tokens per second of a run (scoring: twice that), where no pilot tells",
}
"""Options that are positive numbers."""


def main(argv: list[str]) -> int:
    """Print what can be detected and the cost, or JSON."""
    about = "Effects that an experiment can detect, and hours, before anything is spent."
    parser = Parser("power", "words", "--results-dir", "--json", description=about)
    parser.option(
        "--pilot", "experiment whose finished runs tell noise and speed (default: this one)"
    )
    for name, meaning in STATED.items():
        parser.option(name, meaning, type=positive_number)
    args = parser.read(argv)
    experiment, more = asked_experiment(args.words, "power")
    results = f"results_dir={args.results_dir}"
    planned = finished = planned_runs(experiment, [*more, results])
    pilot = experiment
    if args.pilot:
        pilot = load_experiment(args.pilot)
        finished = planned_runs(pilot, [results])
    done = any(c.state == "done" for c in finished)
    studies = list(studies_of(pilot, finished).values()) if done else []
    study = studies[0] if studies else None
    records = [run.record for x in studies for run in x.runs]
    endpoints = experiment.endpoints or _usual(experiment)
    report = {
        "experiment": experiment.name,
        "effects": [_effect(e, experiment, study, args, planned[0].config) for e in endpoints],
        "cost": _cost(planned, records, args.speed),
    }
    return print_report(report, args.json, lambda told: _show(told, experiment, done))


def positive_number(text: str) -> float:
    """Return a number above 0. ValueError: it is none."""
    if not 0 < (value := float(text)) < math.inf:
        raise ValueError(text)
    return value


def _usual(experiment: Experiment) -> list[Endpoint]:
    """Return own step and backward change of the first method against the reference, where nothing
    is declared."""
    reference = experiment.reference or list(experiment.methods)[-1]
    first = next((m for m in experiment.methods if m != reference), reference)
    minus = reference if first != reference else None
    return [
        Endpoint(name=f"{k}-{first}", metric=k, of=first, minus=minus)
        for k in ("own_step", "backward")
    ]


# --- what can be detected -------------------------------------------------------------------------


def _effect(
    e: Endpoint, experiment: Experiment, study: Study | None, args: Any, config: RunConfig
) -> dict[str, Any]:
    """Return, by number of blocks, with POWER at experiment.alpha over all endpoints: the smallest
    true difference that is found or, of an equivalence endpoint, the smallest margin within which
    no difference is placed. % of perplexity; of items their unit."""
    losses, same = lower_is_better(e.metric), e.kind == "equivalence"
    block_sd, document_se, source = _noise(e, study, args, config)
    alpha = experiment.alpha / max(1, len(experiment.endpoints))  # Holm's first step
    find = inference.detectable_equivalence if same else inference.detectable
    sides = (1 - alpha, (1 + POWER) / 2) if same else (1 - alpha / 2, POWER)
    floor = document_se * float(stats.norm.ppf(sides).sum())
    write = format.change if losses else float
    shared = 0.0 if math.isnan(floor) else floor
    name, _, task = e.metric.partition(":")
    return {
        "endpoint": e.name,
        "what": contrast(e).removesuffix(", against 0"),
        "kind": e.kind,
        "margin": e.margin,
        "unit": "%" if losses else ("nats" if name == "margin" else "share"),
        "block_sd": block_sd,
        "document_se": document_se,
        "noise": source,
        "floor": write(floor),
        "detectable": {
            k: write(math.hypot(find(block_sd, k, POWER, alpha), shared))
            for k in sorted({*BLOCKS, experiment.blocks} - {1})
        },
        "items": _items(task, e, study, alpha) if task else None,
    }


def _noise(
    e: Endpoint, study: Study | None, args: Any, config: RunConfig
) -> tuple[float, float, str]:
    """Return the noise of an endpoint's difference between chosen settings, and its source: the
    pilot, or what was stated (of losses alone). In nats (of accuracy: a share) its sd over blocks,
    nan where fewer than two were seen, and its standard error over the experiment's number of
    documents or items."""
    seen, losses, chosen = None, lower_is_better(e.metric), study.chosen if study else {}
    if e.of in chosen and e.minus is None:
        seen = level(chosen[e.of], e.metric)
    elif e.of in chosen and e.minus in chosen:
        seen = difference(chosen[e.of], chosen[e.minus], e.metric)
    block_sd, document_se, sources = math.nan, math.nan, []
    if seen is not None and study is not None:
        sources.append(f"pilot of {format.counted(seen.blocks, 'block')}")
        block_sd = float(np.std(seen.values, ddof=1)) if seen.blocks > 1 else math.nan
        first = study.runs[0].record
        pilot, mine = first.config["eval"], config.eval
        ratio = pilot["documents"] * len(first.trained)
        ratio /= mine.documents * len(config.sequence.trained)
        document_se = seen.documents.standard_error * (math.sqrt(ratio) if losses else 1.0)
        if losses and pilot["window"] != mine.window:
            sources.append(f"which scored the first {pilot['window']} tokens, not {mine.window}")
        if e.at == "matched":
            sources.append("of the chosen settings' difference: interpolation adds to it")
    if losses and args.block_sd is not None:
        block_sd, sources = args.block_sd, [*sources, "block sd as stated"]
    if losses and args.document_se is not None:
        document_se, sources = args.document_se, [*sources, "document error as stated"]
    if math.isnan(block_sd):
        give = "give --block-sd, or a " if losses else "a "
        sources.append(f"sd over blocks not known: {give}pilot of several blocks")
    return block_sd, document_se, "; ".join(sources)


def _items(task: str, e: Endpoint, study: Study | None, alpha: float) -> dict[str, Any]:
    """Return what the items of a task can tell of a change of accuracy, in points (McNemar)."""
    name, count = tasks.parse_task(task)
    n = tasks.STOCK[name].items if count is None else count
    a = study.chosen.get(e.of) if study is not None else None
    flips = [
        answers.flips(run.items, task, 0, run.record.stages[-1].index)
        for run in (a.runs.values() if a else ())
        if all(task in run.record.stages[i].tasks for i in (0, -1))
    ]
    seen = [(f.lost + f.gained) / f.items for f in flips]
    share, source = (float(np.mean(seen)), "of the pilot") if seen else (DISCORDANT, "assumed")
    points = 100 * inference.detectable_flips(n, share, POWER, alpha) if share else math.nan
    return {"items": n, "discordant": share, "source": source, "accuracy_points": points}


# --- what it costs --------------------------------------------------------------------------------


def _cost(planned: list[Planned], records: list[RunRecord], speed: float | None) -> dict[str, Any]:
    """Return the hours of the runs that are not done."""
    left = [c for c in planned if c.state != "done"]
    seconds = sum(run_seconds(c.config, c.method, records, speed) for c in left)
    asked = planned[0].config.tasks.names
    timed = any(s.task_seconds for r in records for s in r.stages)
    left_out = [f"tasks ({', '.join(asked)}): no pilot timed them"] if asked and not timed else []
    about = {"runs": len(planned), "left": len(left)}
    return {**about, "hours": seconds / 3600, "left_out": left_out}


# --- as a table -----------------------------------------------------------------------------------


def _show(told: dict[str, Any], experiment: Experiment, piloted: bool) -> None:
    say(f"{experiment.name}: {experiment.question}")
    if not piloted:
        say("no finished run: noise and speed are as stated (--block-sd, --document-se, --speed)")
    say()
    title = (
        f"Smallest true difference (equivalence: margin) found with {100 * POWER:.0f}% power, "
        f"alpha {experiment.alpha:g} over {max(1, len(experiment.endpoints))} endpoints together"
    )
    ks = list(told["effects"][0]["detectable"])
    heads = ["endpoint", *(f"{k} blocks{'*' if k == experiment.blocks else ''}" for k in ks)]
    heads += ["floor", "unit", "sd over blocks, nats", "se over documents, nats"]
    rows, notes = (
        [],
        ["*: as the experiment has it; floor: set by what all blocks share, the test set"],
    )
    for e in told["effects"]:
        sizes = [known(x, lambda x: f"{x:.3g}") for x in (*e["detectable"].values(), e["floor"])]
        noise = [known(e[key], plain(4)) for key in ("block_sd", "document_se")]
        rows.append(Row([e["endpoint"], *sizes, e["unit"], *noise]))
        notes.append(f"{e['endpoint']}: {e['what']}; noise: {e['noise']}")
        if i := e["items"]:
            notes.append(
                f"accuracy in one run: {i['items']} items, {100 * i['discordant']:.0f}% "
                f"({i['source']}) changing their answer: {i['accuracy_points']:.1f} points"
            )
    print_table(Table("power", title, heads, rows, notes))
    cost, hours = told["cost"], "not known (--speed N, or a pilot)"
    if not math.isnan(cost["hours"]):
        hours = format.duration(3600 * cost["hours"])
    say(f"cost: {cost['left']} of {cost['runs']} runs ahead, {hours} one after the other")
    for text in cost["left_out"]:
        say(f"not included: {text}")
