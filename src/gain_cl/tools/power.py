"""``python -m gain_cl power experiment=NAME``: what its blocks and documents can detect, and
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
from gain_cl.paper.table import Row, Table, Value, plain, print_table, say
from gain_cl.paper.tables.endpoints import contrast
from gain_cl.stats import format, inference
from gain_cl.studies.costs import run_seconds
from gain_cl.studies.experiments import Endpoint, Experiment, load_experiment, planned_runs
from gain_cl.studies.study import Study, difference, level, lower_is_better, studies_of
from gain_cl.tools.command import Parser, print_report
from gain_cl.tools.status import asked_experiment

BLOCKS = (2, 3, 5, 8, 12)
POWER = 0.8

STATED = {
    "--block-sd": "sd over blocks of a difference between methods, nats per token",
    "--document-se": "its standard error over the experiment's test documents, nats per token",
    "--speed": "training tokens per second of a run (scoring: twice that), where no pilot tells",
}
"""Options that are positive numbers."""


def main(argv: list[str]) -> int:
    """Print what can be detected and the cost, or JSON."""
    parser = Parser("power", "words", "--results-dir", "--json")
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
    studies: list[Study] = []
    if any(c.state == "done" for c in finished):
        studies = list(studies_of(pilot, finished).values())
    records = [run.record for study in studies for run in study.runs]
    left = [c for c in planned if c.state != "done"]
    seconds = sum(run_seconds(c.config, c.method, records, args.speed) for c in left)
    noise = studies[0] if studies else None, args, planned[0].config
    report = {
        "experiment": experiment.name,
        "effects": [_effect(e, experiment, *noise) for e in _endpoints(experiment)],
        "cost": {"runs": len(planned), "left": len(left), "hours": seconds / 3600},
    }
    return print_report(report, args.json, lambda told: _show(told, experiment))


def positive_number(text: str) -> float:
    """Return a number above 0. ValueError: it is none."""
    if not 0 < (value := float(text)) < math.inf:
        raise ValueError(text)
    return value


def _endpoints(experiment: Experiment) -> list[Endpoint]:
    """Return what is declared, else own step and backward change of the first method against the
    reference."""
    reference = experiment.reference or list(experiment.methods)[-1]
    first = next((m for m in experiment.methods if m != reference), reference)
    minus = reference if first != reference else None
    return experiment.endpoints or [
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
    return {
        "endpoint": e.name,
        "what": contrast(e).removesuffix(", against 0"),
        "unit": "%" if losses else ("nats" if e.metric.startswith("margin") else "share"),
        "block_sd": block_sd,
        "document_se": document_se,
        "noise": source,
        "floor": write(floor),
        "detectable": {
            k: write(math.hypot(find(block_sd, k, POWER, alpha), np.nan_to_num(floor)))
            for k in sorted({*BLOCKS, experiment.blocks} - {1})
        },
    }


def _noise(
    e: Endpoint, study: Study | None, args: Any, config: RunConfig
) -> tuple[float, float, str]:
    """Return the noise of an endpoint's difference between chosen settings, and its source: the
    pilot, or what was stated (of losses alone). In nats (of accuracy: a share) its sd over blocks,
    nan where fewer than two were seen, and its standard error over the experiment's number of
    documents or items."""
    seen, losses, chosen = None, lower_is_better(e.metric), study.chosen if study else {}
    block_sd, document_se, sources = math.nan, math.nan, []
    if e.of in chosen and e.minus is None:
        seen = level(chosen[e.of], e.metric)
    elif e.of in chosen and e.minus in chosen:
        seen = difference(chosen[e.of], chosen[e.minus], e.metric)
    if seen and seen.blocks and study is not None:
        sources.append(f"pilot of {format.counted(seen.blocks, 'block')}")
        block_sd = float(np.std(seen.values, ddof=1)) if seen.blocks > 1 else math.nan
        first = study.runs[0].record
        scored = first.config["eval"]["documents"] * len(first.trained)
        ratio = scored / (config.eval.documents * len(config.sequence.trained))
        document_se = seen.documents.standard_error * (math.sqrt(ratio) if losses else 1.0)
    if losses and args.block_sd is not None:
        block_sd, sources = args.block_sd, [*sources, "block sd as stated"]
    if losses and args.document_se is not None:
        document_se, sources = args.document_se, [*sources, "document error as stated"]
    if math.isnan(block_sd):
        sources.append("sd over blocks not known: give --block-sd, or a pilot of several blocks")
    return block_sd, document_se, "; ".join(sources)


# --- as a table -----------------------------------------------------------------------------------


def _show(told: dict[str, Any], experiment: Experiment) -> None:
    say(f"{experiment.name}: {experiment.question}\n")
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
        sizes = [Value(x, lambda x: f"{x:.3g}") for x in (*e["detectable"].values(), e["floor"])]
        noise = [Value(e[key], plain(4)) for key in ("block_sd", "document_se")]
        rows.append(Row([e["endpoint"], *sizes, e["unit"], *noise]))
        notes.append(f"{e['endpoint']}: {e['what']}; noise: {e['noise']}")
    print_table(Table("power", title, heads, rows, notes))
    cost, hours = told["cost"], "not known (--speed N, or a pilot)"
    if not math.isnan(cost["hours"]):
        hours = format.duration(3600 * cost["hours"])
    hours += " one after the other (tasks as far as timed)"
    say(f"cost: {cost['left']} of {cost['runs']} runs ahead, {hours}")
