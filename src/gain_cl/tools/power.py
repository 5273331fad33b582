"""``python -m gain_cl power experiment=NAME``: what its blocks, documents and items can detect, and
what it will cost, before it runs.

The noise comes from pilot runs (--pilot: another experiment, or this one as far as it is done) or
is stated (--block-sd, --document-se). A difference between methods varies over blocks (seed, order)
with sd s_b, and over the choice of documents, which all blocks share, with standard error s_d ~ 1 /
sqrt(documents). What k blocks can detect is the paired t-test's for s_b and, added in squares, the
floor that s_d sets however many blocks there are.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from gain_cl.config.schema import RunConfig
from gain_cl.errors import ConfigError
from gain_cl.measure import tasks
from gain_cl.measure.record import RunRecord
from gain_cl.paper.table import Row, Table, Value, plain, print_table, say
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
from gain_cl.system.terminal import size
from gain_cl.tools.command import Parser
from gain_cl.tools.status import asked_experiment

BLOCKS = (2, 3, 5, 8, 12)
POWER = 0.8
DISCORDANT = 0.15
"""Share of items whose answer changes, where no pilot says it (shared/numerics.md)."""


@dataclass(frozen=True)
class Noise:
    """Of one difference, in nats (of accuracy: a share). block_sd: nan where fewer than two blocks
    were seen; document_se: of the experiment's number of documents or items."""

    block_sd: float
    document_se: float
    source: str


def main(argv: list[str]) -> int:
    """Print what can be detected and the cost, or JSON."""
    parser = Parser(
        "power",
        usage="python -m gain_cl power experiment=NAME [KEY=VALUE ...] [--pilot EXPERIMENT] "
        "[--block-sd X] [--document-se X] [--speed N]",
        description="Effects that an experiment can detect, hours and memory, before anything "
        "is spent.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="experiment=NAME | KEY=VALUE",
        help="the experiment; overrides of every run",
    )
    parser.add_argument(
        "--pilot",
        help="experiment whose finished runs tell the noise and the speed (default: this one)",
    )
    parser.add_argument(
        "--block-sd",
        type=float,
        help="sd over blocks of a difference between methods, nats per token",
    )
    parser.add_argument(
        "--document-se",
        type=float,
        help="its standard error over the experiment's test documents, nats per token",
    )
    parser.add_argument(
        "--speed",
        type=float,
        help="training tokens per second of a run (scoring: twice that), where no pilot tells",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_intermixed_args(argv)
    for key in ("block_sd", "document_se", "speed"):
        if (value := getattr(args, key)) is not None and not 0 < value < math.inf:
            raise ConfigError(
                f"{value} is no positive number", f"--{key.replace('_', '-')}", "give one"
            )
    experiment, more = asked_experiment(args.words, "power")
    planned = planned_runs(experiment, more)
    results = next((w.partition("=")[2] for w in more if w.startswith("results_dir=")), "results")
    pilot, known = experiment, planned
    if args.pilot:
        pilot = load_experiment(args.pilot)
        known = planned_runs(pilot, [f"results_dir={results}"])
    done = any(c.state == "done" for c in known)
    studies = list(studies_of(pilot, known).values()) if done else []
    study = studies[0] if studies else None
    configs = {(c.model, c.label): c.config for c in planned if c.block == 0}
    records = [run.record for x in studies for run in x.runs]
    endpoints = experiment.endpoints or _usual(experiment)
    first = next(iter(configs.values()))
    found = format.finite(
        {
            "experiment": experiment.name,
            "effects": [_effect(e, experiment, study, args, first) for e in endpoints],
            "cost": _cost(planned, configs, records, args.speed),
        }
    )[0]
    if args.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        _show(found, experiment, done, Path(results))
    return 0


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
    noise = _noise(e, study, args, config)
    alpha = experiment.alpha / max(1, len(experiment.endpoints))  # Holm's first step
    find = inference.detectable_equivalence if same else inference.detectable
    sides = (1 - alpha, (1 + POWER) / 2) if same else (1 - alpha / 2, POWER)
    floor = noise.document_se * float(stats.norm.ppf(sides).sum())
    write = format.change if losses else float
    shared = 0.0 if math.isnan(floor) else floor
    blocks = sorted({*BLOCKS, experiment.blocks} - {1})
    name, _, task = e.metric.partition(":")
    return {
        "endpoint": e.name,
        "what": contrast(e).removesuffix(", against 0"),
        "kind": e.kind,
        "margin": e.margin,
        "unit": "%" if losses else ("nats" if name == "margin" else "share"),
        "block_sd": noise.block_sd,
        "document_se": noise.document_se,
        "noise": noise.source,
        "floor": write(floor),
        "detectable": {
            k: write(math.hypot(find(noise.block_sd, k, POWER, alpha), shared)) for k in blocks
        },
        "items": _items(task, e, study, alpha) if task else None,
    }


def _noise(e: Endpoint, study: Study | None, args: Any, config: RunConfig) -> Noise:
    """Return that of an endpoint's difference between chosen settings: the pilot's, or as stated
    (losses alone)."""
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
        pilot = first.config["eval"]
        mine = config.eval.documents * len(config.sequence.trained)
        ratio = pilot["documents"] * len(first.trained) / mine
        document_se = seen.documents.standard_error * (math.sqrt(ratio) if losses else 1.0)
        if losses and pilot["window"] != config.eval.window:
            sources.append(
                f"which scored the first {pilot['window']} tokens, not {config.eval.window}"
            )
        if e.at == "matched":
            sources.append("of the chosen settings' difference: interpolation adds to it")
    if losses and args.block_sd is not None:
        block_sd, sources = args.block_sd, [*sources, "block sd as stated"]
    if losses and args.document_se is not None:
        document_se, sources = args.document_se, [*sources, "document error as stated"]
    if math.isnan(block_sd):
        give = "give --block-sd, or a " if losses else "a "
        sources.append(f"sd over blocks not known: {give}pilot of several blocks")
    return Noise(block_sd, document_se, "; ".join(sources))


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
    points = None if share == 0 else 100 * inference.detectable_flips(n, share, POWER, alpha)
    return {"items": n, "discordant": share, "source": source, "accuracy_points": points}


# --- what it costs --------------------------------------------------------------------------------


def _cost(
    planned: list[Planned],
    configs: dict[tuple[str, str], RunConfig],
    records: list[RunRecord],
    speed: float | None,
) -> dict[str, Any]:
    """Return hours of the runs that are not done, by model and setting, and GPU memory of the
    largest."""
    rows: list[dict[str, Any]] = []
    for key, config in configs.items():
        mine = [c for c in planned if (c.model, c.label) == key]
        rows.append(
            {
                "model": key[0],
                "method": mine[0].method,
                "runs": len(mine),
                "left": sum(c.state != "done" for c in mine),
                "seconds_a_run": run_seconds(config, mine[0].method, records, speed),
            }
        )
    asked = next(iter(configs.values())).tasks.names
    timed = any(s.task_seconds for r in records for s in r.stages)
    left_out = [f"tasks ({', '.join(asked)}): no pilot timed them"] if asked and not timed else []
    return {
        "runs": rows,
        "hours": sum(r["left"] * r["seconds_a_run"] for r in rows) / 3600,
        "left_out": left_out,
        "memory_bytes": _memory(list(configs.values())),
    }


def _memory(configs: list[RunConfig]) -> int | None:
    """Return bytes on a GPU of the hungriest run, roughly: weights in their dtype; what trains in
    fp32 with its gradient and AdamW's two moments (16 bytes each); activations kept for the
    backward pass, 34 bytes a token, layer and unit of width in two-byte types (Korthikanti et al.
    2022, 2205.05198, eq. 2 without the attention scores, which sdpa does not keep). None: no preset
    says how large the model is."""
    from gain_cl.tools import params

    found = []
    for config in configs:
        arch = config.model.arch or {}
        layers = arch.get("num_hidden_layers") or arch.get("n_layer")
        hidden = arch.get("hidden_size") or arch.get("n_embd")
        if layers is None or hidden is None:
            continue
        row = params.count_row(config.model, {"": config.adapter})
        total, trains = row["total"], row["methods"][""]
        if not isinstance(trains, int):
            continue
        width = 4 if config.model.dtype == "float32" else 2
        tokens = (config.compute.micro_batch or config.train.sequences) * config.train.block
        kept = 34 * tokens * hidden * width / 2
        kept *= 1 if config.compute.gradient_checkpointing else layers
        found.append(int(total * width + 16 * trains + kept))
    return max(found, default=None)


# --- as a table -----------------------------------------------------------------------------------


def _show(found: dict[str, Any], experiment: Experiment, piloted: bool, results: Path) -> None:
    say(f"{experiment.name}: {experiment.question}")
    if not piloted:
        say(
            f"no finished run in {results}: noise and speed are as stated (--block-sd, "
            "--document-se, --speed, --pilot EXPERIMENT)"
        )
    say()
    n = len(experiment.endpoints)
    together = f", {n} endpoints together" if n else ""
    title = (
        f"Smallest true difference (equivalence: margin) found with {100 * POWER:.0f}% power, "
        f"alpha {experiment.alpha:g}{together}"
    )
    ks = list(found["effects"][0]["detectable"])
    heads = ["endpoint", *(f"{k} blocks{'*' if k == experiment.blocks else ''}" for k in ks)]
    heads += ["floor", "unit", "sd over blocks, nats", "se over documents, nats"]
    rows, write = [], lambda x: f"{x:.3g}"
    for e in found["effects"]:
        sizes = [_number(x, write) for x in (*e["detectable"].values(), e["floor"])]
        noise = [_number(e[key], plain(4)) for key in ("block_sd", "document_se")]
        rows.append(Row([e["endpoint"], *sizes, e["unit"], *noise]))
    note = (
        "* as the experiment has it; floor: set by the documents or items that all blocks "
        "share, however many blocks"
    )
    print_table(Table("power", title, heads, rows, [note]))
    for e in found["effects"]:
        say(f"{e['endpoint']}: {e['what']}; noise: {e['noise']}")
        if (i := e["items"]) and i["accuracy_points"] is not None:
            say(
                f"  accuracy in one run: {i['items']} items, {100 * i['discordant']:.0f}% "
                f"({i['source']}) changing their answer: {i['accuracy_points']:.1f} points"
            )
    cost, hours = found["cost"], "not known (--speed N, or a pilot)"
    if cost["hours"] is not None:
        hours = format.duration(3600 * cost["hours"])
    left, runs = (sum(r[key] for r in cost["runs"]) for key in ("left", "runs"))
    say(f"\ncost: {left} of {runs} runs ahead, {hours} one after the other")
    for text in cost["left_out"]:
        say(f"  not included: {text}")
    memory = cost["memory_bytes"]
    told = "not known" if memory is None else f"{size(memory)}, roughly"
    say(f"GPU memory of the largest run: {told}")


def _number(x: float | None, write: Any) -> Value | None:
    return None if x is None else Value(x, write=write)
