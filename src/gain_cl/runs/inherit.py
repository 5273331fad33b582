"""Take over stages that another run with the same beginning has learned: a run with more
domains."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gain_cl.config.schema import Given
from gain_cl.errors import DataError
from gain_cl.measure import provenance, scoring
from gain_cl.runs import resume, same

if TYPE_CHECKING:
    from gain_cl.runs.inputs import Inputs


def common_stages(inputs: Inputs) -> tuple[dict[int, resume.Stage], list[str]]:
    """Find the trained stages that another run has in common with this one: same settings, data and
    order up to there, and their states were kept.

    Return them by index, from 1 (the longest such beginning), and what to tell. What was scored is
    no condition: it is scored again where it differs. A run in which something changed between
    attempts is not used: nobody knows which of its stages saw which data."""
    config, plan = inputs.config, inputs.plan
    best: dict[int, resume.Stage] = {}
    told: list[str] = []
    if isinstance(config.adapter, Given) or config.regime == "joint":
        return best, told
    if config.resume == "never" or config.force:
        return best, told
    for path in sorted(Path(config.output_dir).glob("*/run.json")):
        run, folder = same.read_run(path), path.parent
        if folder == plan.folder or run is None:
            continue
        stages: dict[int, resume.Stage] = {}
        with suppress(DataError):
            if any(attempt["changed"] for attempt in same.read_attempts(folder)):
                continue
            for index, name in enumerate(_common(run, inputs), start=1):
                stage = resume.read_stage(folder / "stages" / f"{index:02d}-{name}")
                if stage.facts.get("changed") or not (stage.folder / resume.ADAPTER).exists():
                    break
                stages[index] = stage
        if len(stages) > len(best):
            best, here = stages, {**provenance.environment(), **inputs.environment}
            told = [
                f"stages up to {len(best)} are those of {run['run_id']}, where {what}"
                for what in same.elsewhere(run, here)
            ]
    return best, told


def _common(run: dict[str, Any], inputs: Inputs) -> list[str]:
    """Return the domains that another run and this one begin with, as far as all that their weights
    depend on is the same. run: what run.json holds."""
    config, common = inputs.config, list(inputs.config.sequence.trained)
    mine = {"settings": config.scientific(), "pins": inputs.plan.pins, "facts": inputs.facts}
    with suppress(*same.OTHER_SHAPE):
        while common and _beginning(run, len(common)) != _beginning(mine, len(common)):
            common.pop()
        return common
    return []


def _beginning(run: dict[str, Any], stages: int) -> list[Any]:
    """Return all that the weights after so many stages depend on."""
    pins, facts = run["pins"], run["facts"]
    settings = provenance.without_places(run["settings"], pins)
    trained = settings["sequence"]["trained"][:stages]
    tokens, names = facts["data"]["tokens"], ["model", "adapter", "guard", "train", "seed"]
    if settings["train"]["dev_every"]:
        names.append("eval")  # of the dev losses in its record
    return [
        trained,
        [settings.get(k) for k in (*names, "handover", "regime", "compile")],
        [[settings["domains"][d], pins["domains"][d], tokens[d]] for d in trained],
        [pins.get(k) for k in ("model", "plugins", "init_from")],
        [facts[k] for k in ("numerics", "model", "tokenizer", "dtype", "device")],
    ]


def share_scores(stage: resume.Stage, folder: Path) -> None:
    """Put the scores of a finished stage where an evaluation looks for known ones."""
    given = ["stage", "kind", "domain", "split", "task"]
    for full, known in stage.facts["cells"].items():
        kind, _, name = full.partition("/")
        own = stage.rows["domain" if kind == "document" else "task"] == name
        rows = stage.rows[(stage.rows.kind == kind) & own].dropna(axis="columns", how="all")
        rows = rows.drop(columns=given, errors="ignore")
        score = {} if kind == "document" else {"score": stage.record.tasks[name].model_dump()}
        scoring.keep_score(folder, known["key"], rows, seconds=known["seconds"], **score)
