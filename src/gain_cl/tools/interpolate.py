"""``python -m gain_cl interpolate RUN``: W = W_base + alpha (W_tuned - W_base), for any method: a
whole front from one run.

WiSE-FT (Wortsman et al. 2022, 2109.01903): alpha = 0 is the pretrained model, 1 the run's. The
tuned weights are the folded ones, in fp32; each row is rounded once to the model's dtype. With
--records every stage is the far end once, and the matrix of each alpha is a record like a run's,
which show, verify and compare take.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gain_cl.config.schema import NAME
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import provenance, record
from gain_cl.stats import matrix
from gain_cl.studies.study import loss_matrix
from gain_cl.system.files import sha256
from gain_cl.tools import rescore
from gain_cl.tools.compare import SHOWN

if TYPE_CHECKING:
    from gain_cl.measure.scoring import Scores


def main(argv: list[str]) -> int:
    """Print the front: change of perplexity against the pretrained model for every alpha."""
    parser = rescore.arguments(
        "interpolate",
        "[--alpha 0,0.25,0.5,0.75,1] [--stage K | --records]",
        "Score the models between the pretrained one and a stage's (WiSE-FT), without training.",
    )
    parser.add_argument(
        "--alpha",
        default="0,0.25,0.5,0.75,1",
        help="shares of the change of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--stage", type=int, help="stage whose model is the far end (default: the last)"
    )
    parser.add_argument(
        "--records",
        action="store_true",
        help="score every stage, and write a record for each alpha beside the run's",
    )
    args = parser.parse_args(argv)
    bench = rescore.bench(args)
    alphas = list(dict.fromkeys(rescore.number(text, "--alpha") for text in args.alpha.split(",")))
    last = len(bench.record.stages) - 1
    stage = last if args.stage is None else args.stage
    if not 1 <= stage <= last:
        raise ConfigError(f"stage {stage} is not among 1..{last}", "--stage", "stage 0 is alpha=0")
    if args.records and args.stage is not None:
        raise ConfigError("--records takes every stage", "--stage", "leave it out")
    try:
        report = _records(bench, alphas) if args.records else _front(bench, alphas, stage)
    finally:
        bench.close()
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
    elif args.records:
        _show_records(report)
    else:
        _show(report, bench)
    return 0


def _scored(
    bench: rescore.Bench, alphas: list[float], stages: list[int]
) -> Iterator[tuple[float, Scores]]:
    """(alpha, scores) of every model between the pretrained one and a stage's, stage by stage."""
    bench.open(rows=len(alphas) * len(stages))
    import torch

    from gain_cl.models import families, load

    model = bench.loaded.model
    families.can_merge(dict(model.named_modules()))
    base = {
        name: p.detach()
        for name, p in load.load_model(bench.fp32, bench.loaded.device).model.named_parameters()
    }
    for stage in stages:
        state, tuned = bench.state(stage), bench.folded(stage)
        for alpha in alphas:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(base[name] + alpha * (tuned[name] - base[name]))
            yield alpha, bench.score(state, alpha=alpha, folded=True)


# --- one stage, as a table ------------------------------------------------------------------------


def _front(bench: rescore.Bench, alphas: list[float], stage: int) -> dict[str, Any]:
    found = [(alpha, bench.losses(scores)) for alpha, scores in _scored(bench, alphas, [stage])]
    pretrained = bench.record.losses()[0]
    learned, controls = slice(0, len(bench.record.trained)), slice(len(bench.record.trained), None)
    return {
        "run_id": bench.record.run_id,
        "protocol": bench.record.protocol,
        "stage": stage,
        "domains": bench.names,
        "pretrained_nats": pretrained.tolist(),
        "front": [
            {
                "alpha": alpha,
                "loss_nats": row.tolist(),
                "from_base_nats": float((row - pretrained)[learned].mean()),
                "controls_from_base_nats": float((row - pretrained)[controls].mean())
                if bench.record.controls
                else None,
            }
            for alpha, row in found
        ],
    }


def _show(report: dict[str, Any], bench: rescore.Bench) -> None:
    base = np.array(report["pretrained_nats"])
    names = ["trained", *(["controls"] if bench.record.controls else []), *bench.names]
    rows = []
    for row in report["front"]:
        means = [
            row["from_base_nats"],
            *([row["controls_from_base_nats"]] if bench.record.controls else []),
        ]
        rows.append(
            (f"alpha {row['alpha']:g}", np.array([*means, *(np.array(row["loss_nats"]) - base)]))
        )
    title = (
        "Change of perplexity from the pretrained model, % (below 0: better), towards stage "
        f"{report['stage']}"
    )
    rescore.show(
        title, names, rows, rescore.percent, ["trained, controls: means over these domains"]
    )


# --- every stage, as records ----------------------------------------------------------------------


def _records(bench: rescore.Bench, alphas: list[float]) -> dict[str, Any]:
    """The record of every alpha; those that are there are not made again."""
    run = bench.run
    if bench.record.regime == "joint":
        do = "use it on a sequential or individual run"
        raise ConfigError(
            "the run is joint: one stage has no own step and no backward change",
            bench.record.run_id,
            do,
        )
    found: dict[float, record.Run] = {}
    missing: list[record.Interpolated] = []
    for alpha in alphas:
        made = record.Interpolated(
            of=bench.record.run_id, alpha=alpha, record_sha256=sha256(run.path)
        )
        if float(f"{alpha:g}") != alpha or not NAME.fullmatch(made.run_id):
            raise ConfigError(
                f"{alpha} makes no name of a record", "--alpha", "give at most 6 digits"
            )
        if (path := _place(bench, made)).exists():
            found[alpha] = record.load_between(run, path)
        else:
            missing.append(made)
    if missing:
        scores = _matrices(bench, [made.alpha for made in missing])
        found |= {made.alpha: _saved(bench, made, scores[made.alpha]) for made in missing}
    return {
        "run_id": bench.record.run_id,
        "protocol": bench.record.protocol,
        "run_nats": _summary(run),
        "records": [
            {
                "alpha": alpha,
                "run_id": found[alpha].record.run_id,
                "path": str(found[alpha].path),
                "nats": _summary(found[alpha]),
            }
            for alpha in alphas
        ],
    }


def _place(bench: rescore.Bench, made: record.Interpolated) -> Path:
    return bench.run.path.with_name(f"{made.run_id}.json")


def _matrices(bench: rescore.Bench, alphas: list[float]) -> dict[float, list[Scores]]:
    """The scores of stages 1 .. T for each alpha. DataError before anything is computed where that
    cannot be."""
    stages = [stage.index for stage in bench.record.stages[1:]]
    for stage in stages:
        bench.saved(stage)
    if (
        then := bench.record.provenance.get("numerics")
    ) != provenance.NUMERICS:  # row 0 is the run's
        raise DataError(
            f"the run was scored by numerics {then}, this is {provenance.NUMERICS}",
            bench.record.run_id,
            "run it again",
        )
    found: dict[float, list[Scores]] = {alpha: [] for alpha in alphas}
    for alpha, scores in _scored(bench, alphas, stages):
        found[alpha].append(scores)
    return found


def _saved(bench: rescore.Bench, made: record.Interpolated, scores: list[Scores]) -> record.Run:
    """The record: row 0 and what the stages cost are the run's."""
    run, told, here = bench.run, bench.record, bench.inputs.environment
    rows = [
        run.documents[run.documents["stage"] == 0],
        *(part.rows.assign(stage=k) for k, part in enumerate(scores, start=1)),
    ]
    stages = [told.stages[0].model_copy(update={"tasks": {}, "task_seconds": 0.0})]
    for stage, part in zip(told.stages[1:], scores, strict=True):
        own = {
            "domains": part.domains,
            "tasks": {},
            "eval_seconds": part.seconds("document"),
            "task_seconds": 0.0,
        }
        stages.append(stage.model_copy(update=own))
    what = (
        f"interpolated: no training led here; every stage is W_base + {made.alpha:g} (W_stage "
        f"- W_base) of {made.of}"
    )
    notes = [*told.notes, what]
    if here["device"] != told.provenance.get("device"):
        notes.append(
            f"row 0 was scored on {told.provenance.get('device')}, the others on {here['device']}"
        )
    environment = {**provenance.environment(), **here, "attempts": told.provenance.get("attempts")}
    own = {
        "run_id": made.run_id,
        "provenance": {**environment, "interpolated": made.model_dump()},
        "peak_memory_bytes": bench.inputs.peak_memory(),
        "stages": stages,
        "notes": notes,
    }
    documents = pd.concat(rows, ignore_index=True)
    finished = record.Run(
        told.model_copy(update=own), documents, run.items.iloc[:0], _place(bench, made)
    )
    loss_matrix(finished)  # says where row 0 is of other documents
    return record.save(finished.record, finished.documents, finished.items, finished.path)


def _summary(run: record.Run) -> dict[str, float]:
    """The summaries that are shown, nats per token."""
    found = matrix.summary(loss_matrix(run))
    return {name: found[name].value for name in SHOWN if name in found}


def _show_records(report: dict[str, Any]) -> None:
    nats = {
        **{f"alpha {row['alpha']:g}": row["nats"] for row in report["records"]},
        "the run": report["run_nats"],
    }
    rows = [(label, np.array(list(values.values()))) for label, values in nats.items()]
    title = "Change of perplexity, % (below 0: better)"
    paths = [f"record: {row['path']}" for row in report["records"]]
    rescore.show(
        title, [m.replace("_", " ") for m in report["run_nats"]], rows, rescore.percent, paths
    )
