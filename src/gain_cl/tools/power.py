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
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy import stats

from gain_cl.config.schema import RunConfig
from gain_cl.errors import ConfigError
from gain_cl.measure import record, tasks
from gain_cl.measure.record import RunRecord
from gain_cl.stats import answers, format, inference
from gain_cl.studies import costs, experiments
from gain_cl.studies import study as comparison
from gain_cl.studies.experiments import Cell, Endpoint, Experiment
from gain_cl.studies.study import Study
from gain_cl.system.terminal import console, printable, size
from gain_cl.tools.command import Parser
from gain_cl.tools.status import asked

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
    experiment, more = asked(args.words, "power")
    cells = experiments.cells(experiment, more)
    pilot = experiments.load(args.pilot) if args.pilot else experiment
    results = next((w.partition("=")[2] for w in more if w.startswith("results_dir=")), "results")
    known = cells if args.pilot is None else experiments.cells(pilot, [f"results_dir={results}"])
    done = [c for c in known if c.state == "done"]
    study = next(iter(comparison.studies(pilot, done).values())) if done else None
    configs = {(c.model, c.method, str(c.values)): c.config for c in cells if c.block == 0}
    records = [record.load(c.record).record for c in done]
    found = {
        "experiment": experiment.name,
        "effects": [
            _effect(e, experiment, study, args, next(iter(configs.values())))
            for e in experiment.endpoints or _usual(experiment)
        ],
        "cost": _cost(cells, configs, records, args.speed),
    }
    found = format.finite(found)[0]
    print(json.dumps(found, indent=1, allow_nan=False)) if args.json else _show(
        found, experiment, bool(done), Path(results)
    )
    return 0


def _usual(experiment: Experiment) -> list[Endpoint]:
    """Own step and backward change of the first method against the reference, where nothing is
    declared."""
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
    """By number of blocks, with POWER at experiment.alpha over all endpoints: the smallest true
    difference that is found or, of an equivalence endpoint, the smallest margin within which no
    difference is placed. % of perplexity; of items their unit."""
    losses = comparison.lower_is_better(e.metric)
    noise = _noise(e, study, args, config)
    alpha = experiment.alpha / max(1, len(experiment.endpoints))  # Holm's first step
    find = inference.detectable if e.kind == "difference" else inference.detectable_equivalence
    quantiles = stats.norm.ppf(
        [
            1 - (alpha / 2 if e.kind == "difference" else alpha),
            POWER if e.kind == "difference" else (1 + POWER) / 2,
        ]
    )
    floor = (
        math.nan if math.isnan(noise.document_se) else noise.document_se * float(quantiles.sum())
    )
    write = format.change if losses else float
    rows = {}
    for k in sorted({*BLOCKS, experiment.blocks} - {1}):
        rows[k] = write(
            math.hypot(find(noise.block_sd, k, POWER, alpha), 0.0 if math.isnan(floor) else floor)
        )
    name, _, task = e.metric.partition(":")
    return {
        "endpoint": e.name,
        "what": f"{e.metric} of {e.of}" + (f" minus {e.minus}" if e.minus else ""),
        "kind": e.kind,
        "margin": e.margin,
        "unit": "%" if losses else ("nats" if name == "margin" else "share"),
        "block_sd": noise.block_sd,
        "document_se": noise.document_se,
        "noise": noise.source,
        "floor": write(floor),
        "detectable": rows,
        "items": _items(task, e, study, alpha) if task else None,
    }


def _noise(e: Endpoint, study: Study | None, args: Any, config: RunConfig) -> Noise:
    """Of an endpoint's difference between chosen settings: the pilot's, or as stated (losses
    alone)."""
    seen, losses = None, comparison.lower_is_better(e.metric)
    if study is not None and (a := study.chosen.get(e.of)) is not None:
        b = study.chosen.get(e.minus or "")
        seen = (
            comparison.level(a, e.metric)
            if e.minus is None
            else comparison.difference(a, b, e.metric)
            if b is not None
            else None
        )
    block_sd, document_se, sources = math.nan, math.nan, []
    if seen is not None and study is not None:
        sources.append(f"pilot of {format.counted(seen.blocks, 'block')}")
        block_sd = float(np.std(seen.values, ddof=1)) if seen.blocks > 1 else math.nan
        first = next(iter(study.settings[0].runs.values())).record
        pilot = first.config["eval"]
        ratio = (
            pilot["documents"]
            * len(first.trained)
            / (config.eval.documents * len(config.sequence.trained))
        )
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
        sources.append(
            "sd over blocks not known: "
            + (
                "give --block-sd, or a pilot of several blocks"
                if losses
                else "a pilot of several blocks"
            )
        )
    return Noise(block_sd, document_se, "; ".join(sources))


def _items(task: str, e: Endpoint, study: Study | None, alpha: float) -> dict[str, Any]:
    """What the items of a task can tell of a change of accuracy, in points (McNemar)."""
    name, count = tasks.parse(task)
    n = tasks.STOCK[name].items if count is None else count
    share, source = DISCORDANT, "assumed"
    if study is not None and (a := study.chosen.get(e.of)) is not None:
        runs = [
            r
            for r in a.runs.values()
            if task in r.record.stages[-1].tasks and task in r.record.stages[0].tasks
        ]
        if runs:
            flips = [answers.flips(r.items, task, 0, r.record.stages[-1].index) for r in runs]
            share, source = (
                float(np.mean([(f.lost + f.gained) / f.items for f in flips])),
                "of the pilot",
            )
    points = None if share == 0 else 100 * inference.detectable_flips(n, share, POWER, alpha)
    return {"items": n, "discordant": share, "source": source, "accuracy_points": points}


# --- what it costs --------------------------------------------------------------------------------


def _cost(
    cells: list[Cell],
    configs: dict[tuple[str, str, str], RunConfig],
    records: list[RunRecord],
    speed: float | None,
) -> dict[str, Any]:
    """Hours of the runs that are not done, by model and setting, and GPU memory of the largest."""
    rows: list[dict[str, Any]] = []
    for (model, method, values), config in configs.items():
        mine = [c for c in cells if (c.model, c.method, str(c.values)) == (model, method, values)]
        left = sum(c.state != "done" for c in mine)
        rows.append(
            {
                "model": model,
                "method": method,
                "runs": len(mine),
                "left": left,
                "seconds_a_run": costs.seconds(config, method, records, speed),
            }
        )
    asked = next(iter(configs.values())).tasks.names
    timed = any(s.task_seconds for r in records for s in r.stages)
    return {
        "runs": rows,
        "hours": sum(r["left"] * r["seconds_a_run"] for r in rows) / 3600,
        "left_out": [f"tasks ({', '.join(asked)}): no pilot timed them"]
        if asked and not timed
        else [],
        "memory_bytes": _memory(list(configs.values())),
    }


def _memory(configs: list[RunConfig]) -> int | None:
    """Bytes on a GPU of the hungriest run, roughly: weights in their dtype; what trains in fp32
    with its gradient and AdamW's two moments (16 bytes each); activations kept for the backward
    pass, 34 bytes a token, layer and unit of width in two-byte types (Korthikanti et al. 2022,
    2205.05198, eq. 2 without the attention scores, which sdpa does not keep). None: no preset says
    how large the model is."""
    from gain_cl.tools import params

    most: float | None = None
    for config in configs:
        arch = config.model.arch or {}
        layers, hidden = (
            arch.get("num_hidden_layers") or arch.get("n_layer"),
            arch.get("hidden_size") or arch.get("n_embd"),
        )
        if layers is None or hidden is None:
            continue
        row = params.count_row(config.model, {"": config.adapter})
        total, trains = row["total"], row["methods"][""]
        if not isinstance(trains, int):
            continue
        width = 4 if config.model.dtype == "float32" else 2
        tokens = (config.compute.micro_batch or config.train.sequences) * config.train.block
        kept = (
            34
            * tokens
            * hidden
            * (1 if config.compute.gradient_checkpointing else layers)
            * width
            / 2
        )
        most = max(most or 0.0, total * width + 16 * trains + kept)
    return None if most is None else int(most)


# --- as a table -----------------------------------------------------------------------------------


def _show(found: dict[str, Any], experiment: Experiment, piloted: bool, results: Path) -> None:
    out = console()
    out.print(printable(f"{experiment.name}: {experiment.question}"), markup=False, highlight=False)
    if not piloted:
        text = (
            f"no finished run in {results}: noise and speed are as stated (--block-sd, "
            "--document-se, --speed, --pilot EXPERIMENT)"
        )
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    out.print()
    n = len(experiment.endpoints)
    together = f", {n} endpoints together" if n else ""
    head = (
        f"Smallest true difference (equivalence: margin) found with {100 * POWER:.0f}% power, "
        f"alpha {experiment.alpha:g}{together}"
    )
    table = Table(
        title=head,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("endpoint")
    ks = list(found["effects"][0]["detectable"])
    for k in ks:
        table.add_column(
            f"{k} blocks{'*' if k == experiment.blocks else ''}", justify="right", no_wrap=True
        )
    for head in ("floor", "unit", "sd over blocks, nats", "se over documents, nats"):
        table.add_column(head, justify="right")
    for e in found["effects"]:
        values = [
            "-" if v is None else f"{v:.3g}"
            for v in (*(e["detectable"][k] for k in ks), e["floor"])
        ]
        noise = ["-" if e[key] is None else f"{e[key]:.4f}" for key in ("block_sd", "document_se")]
        table.add_row(printable(e["endpoint"]), *values, e["unit"], *noise)
    out.print(table)
    out.print(
        "* as the experiment has it; floor: set by the documents or items that all blocks "
        "share, however many blocks",
        markup=False,
    )
    for e in found["effects"]:
        out.print(
            printable(f"{e['endpoint']}: {e['what']}; noise: {e['noise']}"),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if e["items"] and e["items"]["accuracy_points"] is not None:
            i = e["items"]
            text = (
                f"{i['items']} items, {100 * i['discordant']:.0f}% ({i['source']}) changing "
                f"their answer: {i['accuracy_points']:.1f} points"
            )
            out.print(f"  accuracy in one run: {text}", markup=False, highlight=False)
    cost = found["cost"]
    left = sum(r["left"] for r in cost["runs"])
    hours = (
        "not known (--speed N, or a pilot)"
        if cost["hours"] is None
        else format.duration(3600 * cost["hours"])
    )
    out.print()
    out.print(
        f"cost: {left} of {sum(r['runs'] for r in cost['runs'])} runs ahead, {hours} one "
        "after the other",
        highlight=False,
    )
    for text in cost["left_out"]:
        out.print(f"  not included: {text}", markup=False, highlight=False)
    memory = (
        "not known" if cost["memory_bytes"] is None else f"{size(cost['memory_bytes'])}, roughly"
    )
    out.print(f"GPU memory of the largest run: {memory}", highlight=False)
