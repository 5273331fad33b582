"""``python -m gain_cl interpolate RUN``: W = W_base + alpha (W_tuned - W_base), for any method: a
whole front from one run.

WiSE-FT (Wortsman et al. 2022, 2109.01903): alpha = 0 is the pretrained model, 1 the run's. The
tuned weights are the folded ones, in fp32. Each row is rounded once to the model's dtype. With
--records every stage is the far end once, and the matrix of each alpha is a record like a run's,
which show, verify and compare take.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gain_cl.config.schema import NAME
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import provenance, record
from gain_cl.paper.table import say
from gain_cl.studies.study import loss_matrix
from gain_cl.system.files import sha256
from gain_cl.tools import reopen
from gain_cl.tools.command import RUN, Parser, load_run, print_report

if TYPE_CHECKING:
    from gain_cl.measure.scoring import Scores


def main(argv: list[str]) -> int:
    """Print the front: change of perplexity against the pretrained model for every alpha."""
    about = "Score the models between the pretrained one and a stage's (WiSE-FT), without training."
    parser = Parser("interpolate", *RUN, description=about)
    about = "shares of the change of the weights (default: %(default)s)"
    parser.option("--alpha", about, "0,0.25,0.5,0.75,1")
    parser.option("--stage", "stage whose model is the far end (default: the last)", type=int)
    parser.option(
        "--records", "score every stage, and write a record for each alpha beside the run's", False
    )
    args = parser.read(argv)
    run = reopen.Reopened(load_run(args), args.output_dir)
    alphas = list(dict.fromkeys(reopen.number(a, "--alpha") for a in args.alpha.split(",")))
    chosen = reopen.stage_of(args.stage, run.last)
    if args.records and args.stage is not None:
        raise ConfigError("--records takes every stage", "--stage", "leave it out")
    try:
        report = _records(run, alphas) if args.records else _front(run, alphas, chosen)
    finally:
        run.close()
    return print_report(report, args.json, _show_records if args.records else _show)


def _scored(
    run: reopen.Reopened, alphas: list[float], stages: list[int]
) -> Iterator[tuple[float, Scores]]:
    """Yield (alpha, scores) of every model between the pretrained one and a stage's, stage by
    stage."""
    run.open()
    import torch

    from gain_cl.models import families, load

    model = run.loaded.model
    families.can_merge(dict(model.named_modules()))
    whole = load.load_model(run.fp32, run.loaded.device).model
    base = {name: p.detach() for name, p in whole.named_parameters()}
    for stage in stages:
        state, tuned = run.state(stage), run.folded(stage)
        for alpha in alphas:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(base[name] + alpha * (tuned[name] - base[name]))
            yield alpha, run.score(state, alpha=alpha, folded=True)


# --- one stage, as a table ------------------------------------------------------------------------


def _front(run: reopen.Reopened, alphas: list[float], stage: int) -> dict[str, Any]:
    pretrained, learned = run.record.losses()[0], len(run.record.trained)
    front = []
    for alpha, scores in _scored(run, alphas, [stage]):
        change = (loss := run.losses(scores)) - pretrained
        controls = float(change[learned:].mean()) if run.record.controls else None
        means = {"from_base_nats": change[:learned].mean(), "controls_from_base_nats": controls}
        front.append({"alpha": alpha, "loss_nats": loss.tolist(), **means})
    return {
        "run_id": run.record.run_id,
        "protocol": run.record.protocol,
        "stage": stage,
        "domains": run.names,
        "pretrained_nats": pretrained.tolist(),
        "front": front,
    }


def _show(report: dict[str, Any]) -> None:
    rows, means = {}, {"from_base_nats": "trained", "controls_from_base_nats": "controls"}
    for row in report["front"]:
        change = np.subtract(row["loss_nats"], report["pretrained_nats"])
        shown = [name for name in means if row[name] is not None]
        rows[f"alpha {row['alpha']:g}"] = [*(row[name] for name in shown), *change]
    title = "Change of perplexity from the pretrained model, % (below 0: better), towards stage "
    note = "trained, controls: means over these domains"
    names = [*(means[name] for name in shown), *report["domains"]]
    reopen.show(f"{title}{report['stage']}", names, rows, note)


def _show_records(report: dict[str, Any]) -> None:
    for made in report["records"]:
        say(f"record: {made['path']}")


# --- every stage, as records ----------------------------------------------------------------------


def _records(run: reopen.Reopened, alphas: list[float]) -> dict[str, Any]:
    """Make the record of every alpha. Those that are there are not made again."""
    if run.record.regime == "joint":
        raise ConfigError(
            "the run is joint: one stage has no own step and no backward change",
            run.record.run_id,
            "use it on a sequential or individual run",
        )
    found: dict[float, record.Run] = {}
    missing: list[record.Interpolated] = []
    for alpha in alphas:
        of, pin = run.record.run_id, sha256(run.run.path)
        made = record.Interpolated(of=of, alpha=alpha, record_sha256=pin)
        if float(f"{alpha:g}") != alpha or not NAME.fullmatch(made.run_id):
            raise ConfigError(
                f"{alpha} makes no name of a record", "--alpha", "give at most 6 digits"
            )
        if (path := _place(run, made)).exists():
            found[alpha] = record.load_between(run.run, path)
        else:
            missing.append(made)
    if missing:
        scores = _matrices(run, [made.alpha for made in missing])
        found |= {made.alpha: _saved(run, made, scores[made.alpha]) for made in missing}
    records = [
        {"alpha": alpha, "run_id": found[alpha].record.run_id, "path": str(found[alpha].path)}
        for alpha in alphas
    ]
    return {"run_id": run.record.run_id, "protocol": run.record.protocol, "records": records}


def _place(run: reopen.Reopened, made: record.Interpolated) -> Path:
    return run.run.path.with_name(f"{made.run_id}.json")


def _matrices(run: reopen.Reopened, alphas: list[float]) -> dict[float, list[Scores]]:
    """Return the scores of stages 1 .. T for each alpha. DataError, before anything is computed:
    they cannot be had."""
    stages = [*range(1, run.last + 1)]
    for stage in stages:
        run.saved(stage)
    then, now = run.record.provenance.get("numerics"), provenance.NUMERICS
    if then != now:  # row 0 is the run's
        raise DataError(
            f"the run was scored by numerics {then}, this is {now}",
            run.record.run_id,
            "run it again",
        )
    found: dict[float, list[Scores]] = {alpha: [] for alpha in alphas}
    for alpha, scores in _scored(run, alphas, stages):
        found[alpha].append(scores)
    return found


def _saved(run: reopen.Reopened, made: record.Interpolated, scores: list[Scores]) -> record.Run:
    """Write the record. Row 0 and what the stages cost are the run's."""
    told, here, documents = run.record, run.inputs.environment, run.run.documents
    rows, stages = [documents[documents["stage"] == 0]], []
    for stage in told.stages:
        own: dict[str, Any] = {"tasks": {}, "task_seconds": 0.0}
        if stage.index:
            part = scores[stage.index - 1]
            rows.append(part.rows.assign(stage=stage.index))
            own |= {"domains": part.domains, "eval_seconds": part.seconds("document")}
        stages.append(stage.model_copy(update=own))
    what = "interpolated: no training led here; every stage is W_base + "
    notes = [*told.notes, f"{what}{made.alpha:g} (W_stage - W_base) of {made.of}"]
    if here["device"] != (then := told.provenance.get("device")):
        notes.append(f"row 0 was scored on {then}, the others on {here['device']}")
    about = {"attempts": told.provenance.get("attempts"), "interpolated": made.model_dump()}
    finished = told.model_copy(
        update={
            "run_id": made.run_id,
            "provenance": {**provenance.environment(), **here, **about},
            "peak_memory_bytes": run.inputs.peak_memory(),
            "stages": stages,
            "notes": notes,
        }
    )
    parts = finished, pd.concat(rows, ignore_index=True), run.run.items.iloc[:0], _place(run, made)
    loss_matrix(record.Run(*parts))  # row 0 is of the same documents
    return record.save(*parts)
