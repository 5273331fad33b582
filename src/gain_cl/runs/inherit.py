"""Take over stages that another run with the same beginning has learned: a run with more
domains."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gain_cl.config.schema import Given, RunConfig
from gain_cl.errors import DataError
from gain_cl.measure import provenance, record, scoring
from gain_cl.runs import resume, same

if TYPE_CHECKING:
    from gain_cl.runs.inputs import Inputs
    from gain_cl.runs.plan import Plan


def common_stages(
    config: RunConfig, plan: Plan, inputs: Inputs
) -> tuple[dict[int, resume.Stage], list[str]]:
    """Find the trained stages that another run has in common with this one: same settings, data and
    order up to there.

    Return them by index, from 1 (the longest such beginning), and what to tell. What was scored is
    no condition: it is scored again where it differs. A run in which something changed between
    attempts is not used: nobody knows which of its stages saw which data."""
    best: dict[int, resume.Stage] = {}
    notes: list[str] = []
    told: list[str] = []
    if isinstance(config.adapter, Given) or config.regime == "joint":
        return best, notes
    if config.resume == "never" or config.force:
        return best, notes
    for other in sorted(Path(config.output_dir).glob("*/run.json")):
        run, folder = same.read_run(other), other.parent
        if folder == plan.folder or run is None:
            continue
        stages: dict[int, resume.Stage] = {}
        tainted = True
        with suppress(DataError):
            common = _common(run, config, plan.pins, inputs.facts)
            for index, name in enumerate(common, start=1):
                stages[index] = resume.read_stage(folder / "stages" / f"{index:02d}-{name}")
        with suppress(DataError):
            tainted = any(attempt["changed"] for attempt in same.read_attempts(folder))
        if not stages:
            continue
        text = f"{run['run_id']} begins with the same {len(stages)} stages, but"
        if tainted:
            notes.append(f"{text} is tainted: training them again")
        elif any(not (stage.folder / resume.ADAPTER).exists() for stage in stages.values()):
            notes.append(
                f"{text} keeps only its last state: training them again "
                "(checkpoint.keep_stages=all would have kept them)"
            )
        elif len(stages) > len(best):
            best, here = stages, {**provenance.environment(), **inputs.environment}
            told = [
                f"stages up to {len(best)} are those of {run['run_id']}, where {what}"
                for what in same.elsewhere(run, here)
            ]
    return best, told if best else notes


def _common(
    run: dict[str, Any], config: RunConfig, pins: dict[str, Any], facts: dict[str, Any]
) -> list[str]:
    """Return the domains that another run and this one begin with, as far as all that their weights
    depend on is the same."""
    mine, common = config.scientific(), list(config.sequence.trained)
    try:
        while common and (
            run["settings"]["sequence"]["trained"][: len(common)] != common
            or _learning(run["settings"], run["pins"], common) != _learning(mine, pins, common)
            or same.differing(_weighty(run["facts"], common), _weighty(facts, common))
        ):
            common.pop()
    except same.OTHER_SHAPE:
        return []
    return common


def _learning(settings: dict[str, Any], pins: dict[str, Any], trained: list[str]) -> dict[str, Any]:
    """Return all settings and pins that the weights after these stages depend on."""
    settings = provenance.without_places(settings, pins)
    kept = {
        k: settings.get(k)
        for k in ("model", "adapter", "guard", "train", "seed", "handover", "regime", "compile")
    }
    kept["domains"] = [
        [name, settings["domains"].get(name), pins["domains"].get(name)] for name in trained
    ]
    if (settings.get("train") or {}).get("dev_every"):
        kept["eval"] = settings["eval"]  # of the dev losses in its record
    return {**kept, "pins": {k: pins.get(k) for k in ("model", "plugins", "init_from")}}


def _weighty(facts: dict[str, Any], trained: list[str]) -> dict[str, Any]:
    """Return the facts that weights depend on."""
    tokens = facts["data"].get("tokens", {})
    names = ("numerics", "model", "tokenizer", "dtype", "device")
    kept: dict[str, Any] = {k: facts[k] for k in names if k in facts}
    return {**kept, "data": {name: tokens.get(name) for name in trained}}


def share_scores(stage: resume.Stage, folder: Path) -> None:
    """Put the scores of a finished stage where an evaluation looks for known ones."""
    left_out = ["stage", "kind", "domain", "split", "task"]
    for full, known in stage.facts["cells"].items():
        kind, name = full.split("/", 1)
        document = kind == "document"
        rows = stage.rows[stage.rows.kind == kind]
        rows = rows[rows["domain" if document else "task"] == name]
        columns = [
            c
            for c in (record.DOCUMENT_COLUMNS if document else record.ITEM_COLUMNS)
            if c in rows and c not in left_out
        ]
        score = {} if document else {"score": stage.record.tasks[name].model_dump(mode="json")}
        if scoring.known_score(folder, known["key"]) is None:
            rows = rows[columns].reset_index(drop=True)
            scoring.keep_score(folder, known["key"], rows, seconds=known["seconds"], **score)
