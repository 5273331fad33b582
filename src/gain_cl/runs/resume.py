"""Where an attempt at a run begins: what earlier attempts left, whether it is good, and what may
not differ. Torch-free.

A run folder holds ``run.json`` (what the run is, and where it was begun), ``attempts.jsonl`` (a
line for each start), ``ckpt/step-N/`` (state inside a stage: N optimiser steps of the whole run are
done) and ``stages/NN-domain/`` (a finished stage: scores, and its trained state as a checkpoint).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from gain_cl.config.schema import RunConfig
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import record
from gain_cl.runs import same
from gain_cl.system import checkpoint

ADAPTER, OPTIMIZER, GUARD = "adapter.safetensors", "optimizer.safetensors", "guard.safetensors"


@dataclass(frozen=True)
class Stage:
    """A finished stage as read from its folder. facts: stage.json but for the record."""

    record: record.StageRecord
    rows: pd.DataFrame  # documents and items, told apart by the column kind
    folder: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Start:
    """stages: finished ones by index; folder: the verified checkpoint to go on from (None: the
    pretrained model) and state, its state.json; warnings: what was passed over; behind: folders of
    later states, which go before anything new is saved: they would push new checkpoints out, or,
    once good again, speak of a metrics.jsonl that is gone."""

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


# --- what earlier attempts left -------------------------------------------------------------------


def begin(config: RunConfig, folder: Path, run_id: str) -> Start:
    """The newest good state in a run folder, for its owner. DataError when there are states and
    none is good: never from the start again unasked. ConfigError when resume=must and there is
    nothing to go on from."""
    root = folder / "stages"
    checkpoint.remove_leftovers(folder, folder / "ckpt", root)
    same._same_settings(config, folder)
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
        return Start(
            {i: s for i, s in stages.items() if i < reached},
            path,
            state,
            warnings,
            _behind(folder, steps, reached),
        )
    if found:
        do = f"restore {found[-1][2].name}, or {same.ANEW}"
        raise DataError(
            f"no good checkpoint: {'; '.join(dict.fromkeys(warnings))}", str(folder), do
        )
    if config.resume == "must":
        raise ConfigError(
            "resume=must, but there is no checkpoint",
            str(folder),
            "use resume=auto, or check output_dir and the settings",
        )
    return Start({i: s for i, s in stages.items() if i == 0}, warnings=warnings)


def _behind(folder: Path, steps: int, reached: int) -> list[Path]:
    """Checkpoints of more than ``steps`` steps, and stages from ``reached`` on."""
    later = [
        p for p in checkpoint.steps(folder / "ckpt") if int(p.name.removeprefix("step-")) > steps
    ]
    return later + [
        p for p in (folder / "stages").glob("[0-9]*-*") if int(p.name.split("-")[0]) >= reached
    ]


def _state(path: Path, run_id: str, steps: int, size: int) -> dict[str, Any]:
    """state.json of a checkpoint whose every file was verified."""
    checkpoint.verify(path)
    try:
        state = checkpoint.read_json(path, "state.json")
        own, at = state["run_id"] == run_id, (state["stage"] - 1) * size + state["step"]
    except same.OTHER_SHAPE:
        raise DataError("state.json is not of this version of gain_cl", str(path)) from None
    if not own or at != steps:
        raise DataError(
            f"it holds step {state['step']} of stage {state['stage']} of {state['run_id']}",
            str(path),
        )
    return state


def _finished(root: Path, run_id: str, warnings: list[str]) -> Iterator[tuple[int, Stage]]:
    """The finished stages that are what was written, by index."""
    for path in sorted(root.glob("[0-9]*-*")):
        try:
            stage, index = read_stage(path), int(path.name.split("-")[0])
            if (stage.facts["run_id"], stage.facts["stage"]) != (run_id, index):
                raise DataError(
                    f"it is stage {stage.facts['stage']} of {stage.facts['run_id']}", str(path)
                )
            checkpoint.drop(path)
            yield index, stage
        except DataError as error:
            warnings.append(f"{error.what} ({error.where})")


def write_stage(
    folder: Path,
    row: record.StageRecord,
    rows: pd.DataFrame,
    state: Path | None,
    facts: dict[str, Any],
    extra: list[str],
) -> Stage:
    """Save a finished stage: stage.json, scores.parquet and, linked from ``state``, the trained
    state (and ``extra`` files)."""
    linked = {
        name: state / name
        for name in (ADAPTER, *extra)
        if state is not None and (state / name).exists()
    }
    about = {**facts, "record": row.model_dump(mode="json")}
    files: dict[str, Any] = {
        "stage.json": same._json(about),
        "scores.parquet": rows.to_parquet(index=False),
        **linked,
    }
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
    except same.OTHER_SHAPE:
        raise DataError("stage.json is not of this version of gain_cl", str(folder)) from None
    return Stage(row, pd.read_parquet(folder / "scores.parquet"), folder, facts)


def clear(folder: Path) -> None:
    """Remove everything of a run but its lock, for its owner."""
    for path in folder.iterdir():
        if path.name != "LOCK":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
