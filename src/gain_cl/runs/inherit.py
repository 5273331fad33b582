"""Take over stages that another run with the same beginning has learned."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from gain_cl.config.schema import Given, RunConfig
from gain_cl.errors import DataError
from gain_cl.measure import cells, provenance, record
from gain_cl.runs import resume
from gain_cl.runs import same as same_

# --- a run with more domains ----------------------------------------------------------------------


def inherit(
    config: RunConfig,
    folder: Path,
    pins: dict[str, Any],
    now: dict[str, Any],
    here: dict[str, Any] | None = None,
) -> tuple[dict[int, resume.Stage], list[str]]:
    """The trained stages that another run has in common with this one: same settings, data and
    order up to there.

    now, here: as of ``settle``. Returns them by index, from 1 (the longest such beginning), and
    what to tell. What was scored is no condition: it is scored again where it differs. Of a run in
    which something changed on the way no stage is known to be of these data."""
    best: dict[int, resume.Stage] = {}
    notes: list[str] = []
    told: list[str] = []
    if isinstance(config.adapter, Given) or config.regime == "joint":
        return best, notes
    for other in sorted(Path(config.output_dir).glob("*/run.json")):
        run = same_._read(other)
        if other.parent == folder or run is None:
            continue
        stages: dict[int, resume.Stage] = {}
        tainted = True
        with suppress(DataError):
            for index, name in enumerate(_common(run, config, pins, now), start=1):
                stages[index] = resume.read_stage(other.parent / "stages" / f"{index:02d}-{name}")
        with suppress(DataError):
            tainted = any(attempt["changed"] for attempt in same_.attempts(other.parent))
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
            best, other_way = (
                stages,
                same_._otherwise(run, {**provenance.environment(), **(here or {})}),
            )
            told = [
                f"stages up to {len(best)} are those of {run['run_id']}, where {what}"
                for what in other_way
            ]
    return best, told if best else notes


def _common(
    run: dict[str, Any], config: RunConfig, pins: dict[str, Any], now: dict[str, Any]
) -> list[str]:
    """The domains that another run and this one begin with, as far as all that their weights depend
    on is the same."""
    settings, common = config.scientific(), list(config.sequence.trained)
    try:
        while common:
            same = (
                run["settings"]["regime"] == config.regime
                and run["settings"]["sequence"]["trained"][: len(common)] == common
            )
            same = same and _learning(run["settings"], run["pins"], common) == _learning(
                settings, pins, common
            )
            if same and not _unlike(run["facts"], now, common):
                break
            common.pop()
    except same_.OTHER_SHAPE:
        return []
    return common


def _learning(settings: dict[str, Any], pins: dict[str, Any], trained: list[str]) -> dict[str, Any]:
    """All that the weights after these stages depend on."""
    settings = provenance.without_places(settings, pins)
    kept = {
        k: settings.get(k)
        for k in ("model", "adapter", "guard", "train", "seed", "handover", "regime")
    }
    kept["domains"] = [
        [name, settings["domains"].get(name), pins["domains"].get(name)] for name in trained
    ]
    if (settings.get("train") or {}).get("dev_every"):
        kept["eval"] = settings["eval"]  # of the dev losses in its record
    return {**kept, "pins": {k: pins.get(k) for k in ("model", "plugins", "init_from")}}


def _unlike(before: dict[str, Any], now: dict[str, Any], trained: list[str]) -> dict[str, str]:
    """What differs between two runs in facts that weights depend on."""

    def relevant(facts: dict[str, Any]) -> dict[str, Any]:
        tokens = facts["data"].get("tokens", {})
        kept: dict[str, Any] = {
            k: facts[k] for k in ("numerics", "model", "tokenizer", "dtype", "device") if k in facts
        }
        return {**kept, "data": {name: tokens.get(name) for name in trained}}

    return same_.differing(relevant(before), relevant(now))


def share_scores(stage: resume.Stage, folder: Path) -> None:
    """Put the scores of a finished stage where an evaluation looks for known cells."""
    kinds = {"document": "domain", "item": "task"}
    for (kind, name), key in ((tuple(k.split("/", 1)), v) for k, v in stage.facts["cells"].items()):
        rows = stage.rows[(stage.rows.kind == kind) & (stage.rows[kinds[kind]] == name)]
        columns = [c for c in cell_columns(kind) if c in rows]
        extra = (
            {}
            if kind == "document"
            else {"score": stage.record.tasks[name].model_dump(mode="json")}
        )
        if cells.load(folder, key["key"]) is None:
            cells.store(
                folder,
                key["key"],
                rows[columns].reset_index(drop=True),
                seconds=key["seconds"],
                **extra,
            )


def cell_columns(kind: str) -> list[str]:
    """Columns of a cell: those of the record but for the stage and what names the cell."""
    if kind == "document":
        return [c for c in record.DOCUMENT_COLUMNS if c not in ("stage", "domain", "split")]
    return [c for c in record.ITEM_COLUMNS if c not in ("stage", "task")]
