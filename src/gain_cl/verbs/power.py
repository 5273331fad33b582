"""``python -m gain_cl power experiment=NAME``: what its blocks, documents and items can detect, and what it will cost, before it runs.

The noise comes from pilot runs (--pilot: another experiment, or this one as far as it is done) or is stated (--block-sd,
--document-se). A difference between methods varies over blocks (seed, order) with sd s_b, and over the choice of documents, which
all blocks share, with standard error s_d ~ 1 / sqrt(documents). What k blocks can detect is the paired t-test's for s_b and, added in
squares, the floor that s_d sets however many blocks there are.
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

from gain_cl import build, comparison, experiments, inference, record, terms
from gain_cl.config import RunConfig
from gain_cl.errors import ConfigError
from gain_cl.experiments import Cell, Endpoint, Experiment
from gain_cl.record import RunRecord
from gain_cl.verbs import Parser, console, printable, size
from gain_cl.verbs.status import asked

BLOCKS = (2, 3, 5, 8, 12)
POWER, ALPHA = 0.8, 0.05
DISCORDANT = 0.15
"""Share of items whose answer changes, where no pilot says it (shared/numerics.md)."""


@dataclass(frozen=True)
class Noise:
    """Of one difference, nats or a task's unit. block_sd: nan where fewer than two blocks were seen; document_se: for ``documents``."""

    block_sd: float
    document_se: float
    documents: int
    source: str


def main(argv: list[str]) -> int:
    """Print what can be detected and the cost, or JSON."""
    parser = Parser(
        "power",
        usage="python -m gain_cl power experiment=NAME [KEY=VALUE ...] [--pilot EXPERIMENT] [--block-sd X] [--document-se X] [--speed N]",
        description="Effects that an experiment can detect, hours and memory, before anything is spent.",
    )
    parser.add_argument("words", nargs="+", metavar="experiment=NAME | KEY=VALUE", help="the experiment; overrides of every run")
    parser.add_argument("--pilot", help="experiment whose finished runs tell the noise and the speed (default: this one)")
    parser.add_argument("--block-sd", type=float, help="sd over blocks of a difference between methods, nats per token")
    parser.add_argument("--document-se", type=float, help="its standard error over the experiment's test documents, nats per token")
    parser.add_argument("--speed", type=float, help="training tokens per second of a run (scoring: twice that), where no pilot tells")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_intermixed_args(argv)
    for key in ("block_sd", "document_se", "speed"):
        if (value := getattr(args, key)) is not None and not 0 < value < math.inf:
            raise ConfigError(f"{value} is no positive number", f"--{key.replace('_', '-')}", "give one")
    experiment, more = asked(args.words, "power")
    cells = experiments.cells(experiment, more)
    pilot = experiments.load(args.pilot) if args.pilot else experiment
    results = next((w.partition("=")[2] for w in more if w.startswith("results_dir=")), "results")
    known = cells if pilot == experiment else experiments.cells(pilot, [f"results_dir={results}"])
    runs = {(experiments.label(c.method, c.values), c.block): record.load(c.record) for c in known if c.state == "done"}
    study = comparison.from_experiment(pilot, runs, []) if runs else None
    configs = {(c.method, str(c.values)): build.compose([*c.overrides, *more]) for c in cells if c.block == 0}
    records = [run.record for run in runs.values()]
    found = {
        "experiment": experiment.name,
        "effects": [_effect(e, experiment, study, args, next(iter(configs.values()))) for e in experiment.endpoints or _usual(experiment)],
        "cost": _cost(cells, configs, records, args.speed),
    }
    found = terms.finite(found)[0]
    print(json.dumps(found, indent=1, allow_nan=False)) if args.json else _show(found, experiment, bool(runs), Path(results))
    return 0


def _usual(experiment: Experiment) -> list[Endpoint]:
    """Backward change and own step of each method against the reference, where nothing is declared."""
    reference = experiment.reference or list(experiment.methods)[-1]
    others = [m for m in experiment.methods if m != reference]
    return [Endpoint(name=f"{k}-{m}", metric=k, of=m, minus=reference) for m in others[:1] for k in ("own_step", "backward")]


# --- what can be detected ----------------------------------------------------------------------------------------------


def _effect(e: Endpoint, experiment: Experiment, study: Any, args: Any, config: RunConfig) -> dict[str, Any]:
    """Smallest true differences that are found with POWER at ALPHA, by number of blocks, in the unit of the metric (% of perplexity)."""
    noise = _noise(e, study, args)
    documents = config.eval.documents * len(config.sequence.trained)
    if noise.documents:
        se = noise.document_se * math.sqrt(noise.documents / documents) if comparison.lower_is_better(e.metric) else noise.document_se
    else:
        se = noise.document_se
    tests = max(1, len(experiment.endpoints))
    rows = {}
    floor = 0.0 if math.isnan(se) else se * float(stats.norm.ppf(1 - ALPHA / tests / 2) + stats.norm.ppf(POWER))
    for k in sorted({*BLOCKS, experiment.blocks} - {1}):
        rows[k] = math.hypot(inference.detectable(noise.block_sd, k, POWER, ALPHA / tests), floor)
    percent = comparison.lower_is_better(e.metric)
    task = e.metric.partition(":")[2]
    return {
        "endpoint": e.name,
        "what": f"{e.metric} of {e.of}" + (f" minus {e.minus}" if e.minus else ""),
        "block_sd": noise.block_sd,
        "document_se": se,
        "documents": documents,
        "noise": noise.source,
        "unit": "% of perplexity" if percent else "nats or share",
        "margin": e.margin,
        "floor": terms.change(floor) if comparison.lower_is_better(e.metric) else floor,
        "detectable": {k: terms.change(v) if percent else v for k, v in rows.items()},
        "items": _items(task) if task else None,
    }


def _noise(e: Endpoint, study: Any, args: Any) -> Noise:
    """Of an endpoint's difference: as stated, else of the pilot's chosen settings (their own, else those of its reference)."""
    seen = None
    if study is not None:
        a, b = study.chosen.get(e.of), study.chosen.get(e.minus or "")
        if a is not None and (b is not None or e.minus is None):
            seen = comparison.level(a, e.metric) if b is None else comparison.difference(a, b, e.metric)
    block_sd = float(np.std(seen.values, ddof=1)) if seen is not None and seen.blocks > 1 else math.nan
    document_se = seen.documents.standard_error if seen is not None else math.nan
    sources = [f"pilot of {seen.blocks} block{'s' if seen.blocks > 1 else ''}"] if seen is not None else []
    if args.block_sd is not None:
        block_sd, sources = args.block_sd, [*sources, "block sd as stated"]
    if args.document_se is not None:
        document_se, sources = args.document_se, [*sources, "document error as stated"]
    if math.isnan(block_sd):
        sources.append("sd over blocks not known: give --block-sd, or a pilot of several blocks")
    documents = seen.estimate.n if seen is not None and args.document_se is None else 0
    return Noise(block_sd, document_se, documents, "; ".join(sources))


def _items(task: str) -> dict[str, Any]:
    """What the items of a task can tell of accuracy."""
    name, _, count = task.partition("@")
    n = int(count) if count.isdigit() else {"boolq": 3270}.get(name)
    points = None if n is None else 100 * inference.detectable_flips(n, DISCORDANT, POWER, ALPHA)
    return {"items": n, "discordant": DISCORDANT, "accuracy_points": points}


# --- what it costs -----------------------------------------------------------------------------------------------------


def _cost(cells: list[Cell], configs: dict[tuple[str, str], RunConfig], records: list[RunRecord], speed: float | None) -> dict[str, Any]:
    """Hours of the runs that are not done, by method, and GPU memory of the largest."""
    rows: list[dict[str, Any]] = []
    for (method, values), config in configs.items():
        mine = [c for c in cells if (c.method, str(c.values)) == (method, values)]
        left = sum(c.state != "done" for c in mine)
        seconds = _seconds(config, method, records, speed)
        rows.append({"method": method, "runs": len(mine), "left": left, "seconds_a_run": seconds})
    total = sum(r["left"] * r["seconds_a_run"] for r in rows)
    return {"runs": rows, "hours": total / 3600, "memory_bytes": _memory(list(configs.values()))}


def _seconds(config: RunConfig, method: str, records: list[RunRecord], speed: float | None) -> float:
    """Of one run: training tokens by the method's speed, scored tokens by the pilot's, stage 0 and tasks once; nan when nothing tells."""
    stages, names = len(config.stages), len(config.sequence.trained) + len(config.sequence.controls)
    train_tokens = config.stage.stage_steps * config.train.batch_tokens * stages
    window = config.eval.window or config.eval.context
    scored = (stages + 1) * names * config.eval.documents * window
    mine = [r for r in records if r.method == method] or records
    if speed is not None or not mine:
        return math.nan if speed is None else train_tokens / speed + scored / (2 * speed)
    trained = [s.train for r in mine for s in r.stages if s.train is not None]
    per_token = sum(t.seconds for t in trained) / sum(t.tokens for t in trained)
    tokens = sum(d.tokens for r in mine for s in r.stages for d in s.domains.values())
    per_score = sum(s.eval_seconds for r in mine for s in r.stages) / tokens
    return train_tokens * per_token + scored * per_score


def _memory(configs: list[RunConfig]) -> int:
    """Bytes on a GPU of the hungriest run, roughly: weights in their dtype; what trains in fp32 with its gradient and AdamW's two
    moments (16 bytes each); activations kept for the backward pass, 34 bytes a token, layer and unit of width in two-byte types
    (Korthikanti et al. 2022, 2205.05198, eq. 2 without the attention scores, which sdpa does not keep), and one chunk of logits."""
    from pydantic import TypeAdapter

    from gain_cl import params
    from gain_cl.config import Adapter

    most = 0
    for config in configs:
        adapter = TypeAdapter(Adapter).validate_python(config.adapter.model_dump())
        total, trains = params.attached(config.model, adapter)
        if not isinstance(trains, int):
            continue
        width = 4 if config.model.dtype == "float32" else 2
        arch = config.model.arch or {}
        layers = arch.get("num_hidden_layers") or arch.get("n_layer") or 0
        hidden = arch.get("hidden_size") or arch.get("n_embd") or 0
        tokens = (config.compute.micro_batch or config.train.sequences) * config.train.block
        kept = 34 * tokens * hidden * (1 if config.compute.gradient_checkpointing else layers) * width // 2
        most = max(most, total * width + 16 * trains + kept)
    return most


# --- as a table --------------------------------------------------------------------------------------------------------


def _show(found: dict[str, Any], experiment: Experiment, piloted: bool, results: Path) -> None:
    out = console()
    out.print(printable(f"{experiment.name}: {experiment.question}"), markup=False, highlight=False)
    if not piloted:
        text = f"no finished run in {results}: noise and speed are as stated (--block-sd, --document-se, --speed, --pilot EXPERIMENT)"
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    out.print()
    for_endpoints = f", {len(experiment.endpoints)} endpoints together (Bonferroni, Holm's first step)" if experiment.endpoints else ""
    head = f"Smallest true difference found with {100 * POWER:.0f}% power, two-sided {ALPHA:g}{for_endpoints}, by blocks"
    table = Table(title=head, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    table.add_column("endpoint")
    table.add_column("what")
    ks = list(found["effects"][0]["detectable"])
    for k in ks:
        table.add_column(f"{k}{'*' if k == experiment.blocks else ''}", justify="right")
    for head in ("unit", "sd over blocks", "se over documents", "documents"):
        table.add_column(head, justify="right")
    for e in found["effects"]:
        values = ["-" if (v := e["detectable"][k]) is None else f"{v:.3g}" for k in ks]
        noise = ["-" if e[key] is None else f"{e[key]:.4f}" for key in ("block_sd", "document_se")]
        table.add_row(printable(e["endpoint"]), printable(e["what"]), *values, e["unit"], *noise, str(e["documents"]))
    out.print(table)
    for note in dict.fromkeys(e["noise"] for e in found["effects"] if e["noise"]):
        out.print(f"noise: {note}", markup=False, highlight=False, soft_wrap=True)
    for e in found["effects"]:
        if e["items"] and e["items"]["accuracy_points"] is not None:
            i = e["items"]
            text = f"{i['items']} items, {100 * i['discordant']:.0f}% changing their answer: {i['accuracy_points']:.1f} points of accuracy"
            out.print(f"{e['endpoint']}: {text}", markup=False, highlight=False)
    cost = found["cost"]
    left = sum(r["left"] for r in cost["runs"])
    hours = "not known (--speed N)" if cost["hours"] is None else terms.duration(3600 * cost["hours"])
    out.print(f"cost: {left} of {sum(r['runs'] for r in cost['runs'])} runs ahead, {hours} one after the other", highlight=False)
    out.print(f"memory of the largest, roughly: {size(cost['memory_bytes'])}", highlight=False)
