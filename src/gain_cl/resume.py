"""Where an attempt at a run begins: what earlier attempts left, whether it is good, and what may not differ. Torch-free.

A run folder holds ``run.json`` (what the run is, and where it was begun), ``attempts.jsonl`` (a line for each start),
``ckpt/step-N/`` (state inside a stage: N optimiser steps of the whole run are done) and ``stages/NN-domain/`` (a finished
stage: scores, and its trained state as a checkpoint).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from gain_cl import cells, checkpoint, lock, provenance, record
from gain_cl.config import Given, RunConfig
from gain_cl.errors import ConfigError, DataError, GainError
from gain_cl.files import write_bytes

ADAPTER, OPTIMIZER, GUARD = "adapter.safetensors", "optimizer.safetensors", "guard.safetensors"
ANEW = "resume=never starts anew and removes what is there"

OTHER_SHAPE = (KeyError, TypeError, AttributeError, ValueError, IndexError)
"""What JSON of another version of gain_cl, or of another hand, makes of code that reads it: it is no such file then."""


@dataclass(frozen=True)
class Stage:
    """A finished stage as read from its folder. facts: stage.json but for the record."""

    record: record.StageRecord
    rows: pd.DataFrame  # documents and items, told apart by the column kind
    folder: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """stages: finished ones by index; folder: the verified checkpoint to go on from (None: the pretrained model) and state,
    its state.json; warnings: what was passed over; behind: folders of later states, which go before anything new is saved: they
    would push new checkpoints out, or, once good again, speak of a metrics.jsonl that is gone."""

    stages: dict[int, Stage] = field(default_factory=dict)
    folder: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    behind: list[Path] = field(default_factory=list)

    @property
    def track(self) -> dict[str, int] | None:
        """Where metrics.jsonl stood."""
        at = self.state or (self.stages[0].facts if 0 in self.stages else {})
        return at.get("track")


# --- what earlier attempts left --------------------------------------------------------------------------------------


def begin(config: RunConfig, folder: Path, run_id: str) -> Start:
    """The newest good state in a run folder, for its owner. DataError when there are states and none is good: never from
    the start again unasked. ConfigError when resume=must and there is nothing to go on from."""
    root = folder / "stages"
    checkpoint.tidy(folder, folder / "ckpt", root)
    _same_settings(config, folder)
    warnings: list[str] = []
    stages = dict(_finished(root, run_id, warnings))
    size, found = config.stage.stage_steps, []
    for path in checkpoint.steps(folder / "ckpt"):
        found.append((int(path.name.removeprefix("step-")), 0, path))
    for path in sorted(root.glob("[0-9]*-*")):
        index = int(path.name.split("-")[0])
        if index and (index not in stages or (path / ADAPTER).exists()):
            found.append((index * size, 1, path))
    for steps, is_stage, path in sorted(found, reverse=True):
        if is_stage and steps // size not in stages:
            continue  # told of already
        try:
            state = stages[steps // size].facts if is_stage else _state(path, run_id, steps, size)
        except DataError as error:
            warnings.append(f"{error.what} ({error.where}): going back to the state before it")
            continue
        reached = state["stage"] + is_stage  # the first stage that is not finished
        if missing := [i for i in range(1, reached) if i not in stages]:
            warnings.append(f"{path} cannot be used: stage {missing[0]} before it is damaged")
            continue
        return Start({i: s for i, s in stages.items() if i < reached}, path, state, warnings, _behind(folder, steps, reached))
    if found:
        do = f"restore {found[-1][2].name}, or {ANEW}"
        raise DataError(f"no good checkpoint: {'; '.join(dict.fromkeys(warnings))}", str(folder), do)
    if config.resume == "must":
        raise ConfigError("resume=must, but there is no checkpoint", str(folder), "use resume=auto, or check output_dir and the settings")
    return Start({i: s for i, s in stages.items() if i == 0}, warnings=warnings)


def _behind(folder: Path, steps: int, reached: int) -> list[Path]:
    """Checkpoints of more than ``steps`` steps, and stages from ``reached`` on."""
    later = [p for p in checkpoint.steps(folder / "ckpt") if int(p.name.removeprefix("step-")) > steps]
    return later + [p for p in (folder / "stages").glob("[0-9]*-*") if int(p.name.split("-")[0]) >= reached]


def _state(path: Path, run_id: str, steps: int, size: int) -> dict[str, Any]:
    """state.json of a checkpoint whose every file was verified."""
    checkpoint.verify(path)
    try:
        state = checkpoint.read_json(path, "state.json")
        own, at = state["run_id"] == run_id, (state["stage"] - 1) * size + state["step"]
    except OTHER_SHAPE:
        raise DataError("state.json is not of this version of gain_cl", str(path)) from None
    if not own or at != steps:
        raise DataError(f"it holds step {state['step']} of stage {state['stage']} of {state['run_id']}", str(path))
    return state


def _finished(root: Path, run_id: str, warnings: list[str]) -> Iterator[tuple[int, Stage]]:
    """The finished stages that are what was written, by index."""
    for path in sorted(root.glob("[0-9]*-*")):
        try:
            stage, index = read_stage(path), int(path.name.split("-")[0])
            if (stage.facts["run_id"], stage.facts["stage"]) != (run_id, index):
                raise DataError(f"it is stage {stage.facts['stage']} of {stage.facts['run_id']}", str(path))
            checkpoint.drop(path)
            yield index, stage
        except DataError as error:
            warnings.append(f"{error.what} ({error.where})")


def write_stage(
    folder: Path, row: record.StageRecord, rows: pd.DataFrame, state: Path | None, facts: dict[str, Any], extra: list[str]
) -> Stage:
    """Save a finished stage: stage.json, scores.parquet and, linked from ``state``, the trained state (and ``extra`` files)."""
    linked = {name: state / name for name in (ADAPTER, *extra) if state is not None and (state / name).exists()}
    about = {**facts, "record": row.model_dump(mode="json")}
    files: dict[str, Any] = {"stage.json": _json(about), "scores.parquet": rows.to_parquet(index=False), **linked}
    checkpoint.save(folder, files)
    return _load(folder)


def read_stage(folder: Path) -> Stage:
    """A finished stage, verified; DataError when it is not what was written."""
    checkpoint.verify(folder)
    return _load(folder)


def _load(folder: Path) -> Stage:
    try:
        facts = checkpoint.read_json(folder, "stage.json")
        row = record.StageRecord.model_validate(facts.pop("record"))
    except OTHER_SHAPE:
        raise DataError("stage.json is not of this version of gain_cl", str(folder)) from None
    return Stage(row, pd.read_parquet(folder / "scores.parquet"), folder, facts)


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


# --- what may not differ ---------------------------------------------------------------------------------------------


def facts(config: RunConfig, pins: dict[str, Any]) -> dict[str, Any]:
    """What may not differ between attempts, as far as it is known before torch is imported; keys as in config.Change."""
    return {
        "numerics": {"version": provenance.NUMERICS, "plugins": pins["plugins"]},
        "model": {"pin": pins["model"], **{k: pins[k] for k in ("init_from", "checkpoints") if k in pins}},
        "data": {"domains": pins["domains"], "tasks": pins["tasks"]},
        "dtype": config.model.dtype,
        "eval_batch": config.compute.eval_batch,
    }


def differing(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Field -> what differs in it, in words; keys that only one side has are not compared."""
    out = {}
    for name in before.keys() & now.keys():
        if found := _difference(before[name], now[name], name):
            out[name] = found
    return dict(sorted(out.items()))


def _difference(a: Any, b: Any, where: str) -> str | None:
    """The first place where two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() & b.keys()):
            if found := _difference(a[key], b[key], f"{where}.{key}"):
                return found
        return next((f"{where}.{key} is only in one of them" for key in sorted(a.keys() ^ b.keys())), None)
    if a == b:
        return None
    short = [text if len(text := str(value)) <= 40 else text[:37] + "..." for value in (a, b)]
    return f"{where} was {short[0]}, is {short[1]}"


def adopt(config: RunConfig, pins: dict[str, Any]) -> str | None:
    """The id of an interrupted run of these settings that this one may go on with, although something outside the settings
    changed and so its id, or of a run that ended so. DataError when there is one and ``allow_change`` does not name what changed."""
    if config.resume == "never" or config.force:
        return None
    for other in sorted(Path(config.output_dir).glob("*/run.json")):
        run = _read(other)
        changed = {} if run is None else _changed(run, config, pins)
        if run is None or not changed or lock.holder(other.parent):
            continue
        finished = Path(config.results_dir) / "runs" / f"{run['run_id']}.json"
        if changed.keys() <= set(config.allow_change):
            if not finished.exists() or _ended_so(finished, config, pins):
                return str(run["run_id"])
        elif not finished.exists() and _progress(other.parent):
            name = next(k for k in changed if k not in config.allow_change)
            do = f"allow_change=[{','.join(changed)}] goes on with it and marks the record tainted; resume=never starts a new run"
            raise DataError(f"an interrupted run of these settings has another {name}: {changed[name]}", str(other.parent), do)
    return None


def _changed(run: dict[str, Any], config: RunConfig, pins: dict[str, Any]) -> dict[str, str]:
    """What changed since a run of these settings began, of what its id is a hash of; empty for a run of other settings."""
    try:
        if _comparable(run["settings"]) != _comparable(config.scientific()):
            return {}
        own = facts(config, pins)
        known = {k: {n: v[n] for n in own[k]} if isinstance(v, dict) else v for k, v in run["facts"].items() if k in own}
    except OTHER_SHAPE:
        return {}
    return {k: v for k, v in differing(known, own).items() if k != "eval_batch"}  # which is no part of the id


def _ended_so(path: Path, config: RunConfig, pins: dict[str, Any]) -> bool:
    """Whether a finished run's last attempt was made with what there is now: only then is its record the answer."""
    try:
        r = record.load(path).record
        then = r.provenance["numerics"], r.config["model"]["dtype"], {k: r.pins.get(k) for k in pins}
    except (GainError, *OTHER_SHAPE):
        return False
    return then == (provenance.NUMERICS, config.model.dtype, pins)


def settle(
    config: RunConfig, folder: Path, run_id: str, pins: dict[str, Any], now: dict[str, Any], here: dict[str, Any], first: bool
) -> list[str]:
    """Compare with run.json what may not differ, write run.json where this attempt is the first, and note the attempt.

    now: every field of config.Change; here: of the machine, what may differ. Returns what a reader of the numbers must
    know; DataError names the first field that differs and is not in allow_change."""
    environment, path = provenance.environment(), folder / "run.json"
    known = None if first else _read(path)
    if known is None and not first:
        raise DataError("run.json is missing or damaged: what the run began with is not known", str(folder), f"restore it, or {ANEW}")
    if known is None:
        (folder / "attempts.jsonl").unlink(missing_ok=True)
        known = {"run_id": run_id, "settings": config.scientific(), "pins": pins, "facts": now, "environment": {**environment, **here}}
        write_bytes(path, _json(known))
    changed = differing(known["facts"], now)
    for name, what in changed.items():
        if name not in config.allow_change:
            do = f"run it as before, or allow_change=[{','.join(changed)}] goes on and marks the record tainted, or {ANEW}"
            raise DataError(f"the interrupted run has another {name}: {what}", str(folder), do)
    before = known["facts"].get("data")
    if "data" in changed and isinstance(before, dict) and (found := _difference(before.get("validation"), now["data"]["validation"], "")):
        what = f"the documents that are scored changed too, {found.lstrip('.')}: stages before and after cannot be compared"
        raise DataError(what, str(folder), f"restore the data, or {ANEW}")
    other = _otherwise(known, {**environment, **here})
    line = {
        "started": environment["started"], "process": os.getpid(), "host": socket.gethostname(),
        "commit": environment["commit"], "dirty": environment["dirty"], **here,
        "changed": list(changed.values()), "other": other,
    }  # fmt: skip
    lines = [json.dumps(attempt, allow_nan=False) + "\n" for attempt in [*attempts(folder), line]]
    write_bytes(folder / "attempts.jsonl", "".join(lines).encode())
    return [f"since the first attempt: {what}" for what in other]


def _otherwise(run: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between where a run began and here: recorded and told, allowed."""
    return list(differing({k: v for k, v in run["environment"].items() if k not in ("started", "numerics")}, now).values())


def attempts(folder: Path) -> list[dict[str, Any]]:
    """One entry for each start of the run so far; DataError when the file is not what was written: it tells what is tainted."""
    path = folder / "attempts.jsonl"
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if all(isinstance(what, str) for attempt in found for what in attempt["changed"]):
            return found
    except FileNotFoundError:
        return []
    except (OSError, RecursionError, *OTHER_SHAPE):
        pass
    raise DataError("attempts.jsonl is damaged: what changed between the attempts is not known", str(path), f"restore it, or {ANEW}")


def _same_settings(config: RunConfig, folder: Path) -> None:
    """A run folder of another configuration: somebody renamed it."""
    run = _read(folder / "run.json")
    if run is None:
        return
    try:
        before, now = (provenance.without_places(settings, run["pins"]) for settings in (run["settings"], config.scientific()))
        found = _difference(_comparable(before), _comparable(now), "")
    except OTHER_SHAPE:
        raise DataError("run.json is damaged: what the run began with is not known", str(folder), f"restore it, or {ANEW}") from None
    if found:
        raise DataError(f"the run folder is of another configuration: {found.lstrip('.')}", str(folder), "move it away")


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what ``facts`` compares."""
    model = {k: v for k, v in settings["model"].items() if k != "dtype"}
    return {**settings, "model": model}


def _read(path: Path) -> dict[str, Any] | None:
    """run.json; None when there is none or it is none."""
    try:
        run: dict[str, Any] = json.loads(path.read_bytes())
        parts = [run[k] for k in ("settings", "pins", "facts", "environment")]
        return run if isinstance(run["run_id"], str) and all(isinstance(part, dict) for part in parts) else None
    except (OSError, RecursionError, *OTHER_SHAPE):
        return None


def _progress(folder: Path) -> bool:
    return bool(checkpoint.steps(folder / "ckpt")) or any(int(p.name[:2]) for p in (folder / "stages").glob("[0-9][0-9]-*"))


def clear(folder: Path) -> None:
    """Remove everything of a run but its lock, for its owner."""
    for path in folder.iterdir():
        if path.name != "LOCK":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# --- a run with more domains -----------------------------------------------------------------------------------------


def inherit(
    config: RunConfig, folder: Path, pins: dict[str, Any], now: dict[str, Any], here: dict[str, Any] | None = None
) -> tuple[dict[int, Stage], list[str]]:
    """The trained stages that another run has in common with this one: same settings, data and order up to there.

    now, here: as of ``settle``. Returns them by index, from 1 (the longest such beginning), and what to tell. What was scored is
    no condition: it is scored again where it differs. Of a run in which something changed on the way no stage is known to be
    of these data."""
    best: dict[int, Stage] = {}
    notes: list[str] = []
    told: list[str] = []
    if isinstance(config.adapter, Given) or config.regime == "joint":
        return best, notes
    for other in sorted(Path(config.output_dir).glob("*/run.json")):
        run = _read(other)
        if other.parent == folder or run is None:
            continue
        stages: dict[int, Stage] = {}
        tainted = True
        with suppress(DataError):
            for index, name in enumerate(_common(run, config, pins, now), start=1):
                stages[index] = read_stage(other.parent / "stages" / f"{index:02d}-{name}")
        with suppress(DataError):
            tainted = any(attempt["changed"] for attempt in attempts(other.parent))
        if not stages:
            continue
        text = f"{run['run_id']} begins with the same {len(stages)} stages, but"
        if tainted:
            notes.append(f"{text} is tainted: training them again")
        elif any(not (stage.folder / ADAPTER).exists() for stage in stages.values()):
            notes.append(f"{text} keeps only its last state: training them again (checkpoint.keep_stages=all would have kept them)")
        elif len(stages) > len(best):
            best, other_way = stages, _otherwise(run, {**provenance.environment(), **(here or {})})
            told = [f"stages up to {len(best)} are those of {run['run_id']}, where {what}" for what in other_way]
    return best, told if best else notes


def _common(run: dict[str, Any], config: RunConfig, pins: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The domains that another run and this one begin with, as far as all that their weights depend on is the same."""
    settings, common = config.scientific(), list(config.sequence.trained)
    try:
        while common:
            same = run["settings"]["regime"] == config.regime and run["settings"]["sequence"]["trained"][: len(common)] == common
            same = same and _learning(run["settings"], run["pins"], common) == _learning(settings, pins, common)
            if same and not _unlike(run["facts"], now, common):
                break
            common.pop()
    except OTHER_SHAPE:
        return []
    return common


def _learning(settings: dict[str, Any], pins: dict[str, Any], trained: list[str]) -> dict[str, Any]:
    """All that the weights after these stages depend on."""
    settings = provenance.without_places(settings, pins)
    kept = {k: settings.get(k) for k in ("model", "adapter", "guard", "train", "seed", "handover", "regime")}
    kept["domains"] = [[name, settings["domains"].get(name), pins["domains"].get(name)] for name in trained]
    if (settings.get("train") or {}).get("dev_every"):
        kept["eval"] = settings["eval"]  # of the dev losses in its record
    return {**kept, "pins": {k: pins.get(k) for k in ("model", "plugins", "init_from")}}


def _unlike(before: dict[str, Any], now: dict[str, Any], trained: list[str]) -> dict[str, str]:
    """What differs between two runs in facts that weights depend on."""

    def relevant(facts: dict[str, Any]) -> dict[str, Any]:
        tokens = facts["data"].get("tokens", {})
        kept: dict[str, Any] = {k: facts[k] for k in ("numerics", "model", "tokenizer", "dtype", "device") if k in facts}
        return {**kept, "data": {name: tokens.get(name) for name in trained}}

    return differing(relevant(before), relevant(now))


def share_scores(stage: Stage, folder: Path) -> None:
    """Put the scores of a finished stage where an evaluation looks for known cells."""
    kinds = {"document": "domain", "item": "task"}
    for (kind, name), key in ((tuple(k.split("/", 1)), v) for k, v in stage.facts["cells"].items()):
        rows = stage.rows[(stage.rows.kind == kind) & (stage.rows[kinds[kind]] == name)]
        columns = [c for c in cell_columns(kind) if c in rows]
        extra = {} if kind == "document" else {"score": stage.record.tasks[name].model_dump(mode="json")}
        if cells.load(folder, key["key"]) is None:
            cells.store(folder, key["key"], rows[columns].reset_index(drop=True), seconds=key["seconds"], **extra)


def cell_columns(kind: str) -> list[str]:
    """Columns of a cell: those of the record but for the stage and what names the cell."""
    if kind == "document":
        return [c for c in record.DOCUMENT_COLUMNS if c not in ("stage", "domain", "split")]
    return [c for c in record.ITEM_COLUMNS if c not in ("stage", "task")]
