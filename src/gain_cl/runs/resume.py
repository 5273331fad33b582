"""Find where an attempt at a run begins: what earlier attempts left, and whether it is good.
Torch-free.

A run folder holds ``run.json`` (what the run is, and where it was begun), ``attempts.jsonl`` (a
line for each start), ``ckpt/step-N/`` (state inside a stage: N optimiser steps of the whole run are
done) and ``stages/NN-domain/`` (a finished stage: scores, and its trained state as a checkpoint).
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd

from gain_cl.config.schema import RunConfig
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import record
from gain_cl.runs import same
from gain_cl.system import checkpoint

ADAPTER, OPTIMIZER, GUARD = "adapter.safetensors", "optimizer.safetensors", "guard.safetensors"
SCORES = "scores.parquet"


@dataclass
class Position:
    """Where a run is: JSON data, in state.json of every checkpoint and in stage.json of every
    finished stage.

    step: of the stage, from 1; fits: sequences a forward pass, once memory ran out (None: it never
    did); events: what happened to the run; seconds: spent on it; track: where metrics.jsonl
    stands; changed: what was not the same as before, although it may not differ. Events, seconds
    and changes are of all attempts together."""

    run_id: str
    stage: int = 0
    step: int = 0
    fits: int | None = None
    events: list[str] = field(default_factory=list)
    seconds: float = 0.0
    track: dict[str, int] | None = None
    changed: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, state: dict[str, Any]) -> Position:
        """Return the position that state.json or stage.json tells."""
        return cls(**{f.name: state[f.name] for f in fields(cls) if f.name in state})


@dataclass(frozen=True)
class Stage:
    """A finished stage as read from its folder. facts: stage.json but for the record."""

    record: record.StageRecord
    rows: pd.DataFrame  # documents and items, told apart by the column kind
    folder: Path
    facts: dict[str, Any]


@dataclass
class Attempt:
    """An attempt at a run: what it found, and where it is now.

    stages: finished ones by index; folder: the verified checkpoint to go on from (None: the
    pretrained model); inside: the stage that it was saved in the middle of (0: none), and progress,
    what its state.json says of that stage; warnings: what was passed over.

    behind: folders of later states that are damaged. They are removed before anything new is saved.
    If they stayed, they would push new checkpoints out. If somebody restored them, their position
    in metrics.jsonl would be wrong.

    unscored: finished stages whose scores are damaged, and whose trained state is not: they are
    scored again; inherited: stages that another run has learned, both by index; notes: what a
    reader of the numbers must know."""

    position: Position
    stages: dict[int, Stage] = field(default_factory=dict)
    folder: Path | None = None
    inside: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    behind: list[Path] = field(default_factory=list)
    unscored: dict[int, Stage] = field(default_factory=dict)
    inherited: dict[int, Stage] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    since: float = field(default_factory=time.time)

    @property
    def seconds(self) -> float:
        """Seconds spent on the run so far."""
        return self.position.seconds + time.time() - self.since

    def move(self, stage: int, step: int, track: dict[str, int]) -> dict[str, Any]:
        """Go to a step of a stage. Return the position as JSON data, for what is about to be saved
        there. Remove what was passed over."""
        here = self.position
        here.stage, here.step, here.track = stage, step, track
        here.seconds, self.since = self.seconds, time.time()
        while self.behind:
            checkpoint.remove(self.behind.pop())
        return asdict(here)


# --- what earlier attempts left -------------------------------------------------------------------


def begin_attempt(config: RunConfig, folder: Path, run_id: str) -> Attempt:
    """Find the newest good state in a run folder, for its owner. DataError when there are states
    and none is good: never from the start again unasked. ConfigError when resume=must and there is
    nothing to go on from."""
    checkpoint.remove_leftovers(folder, folder / "ckpt", folder / "stages")
    same.check_settings(config, folder)
    warnings: list[str] = []
    stages, unscored = _finished(folder, run_id, warnings)
    learned = stages | unscored
    size = config.stage.stage_steps
    found = [(_steps(path), 0, path) for path in checkpoint.steps(folder / "ckpt")]
    for index, path in stage_folders(folder):
        if index and (index not in learned or (path / ADAPTER).exists()):
            found.append((index * size, 1, path))
    for steps, is_stage, path in sorted(found, reverse=True):
        if is_stage and steps // size not in learned:
            continue  # told of already
        try:
            state = learned[steps // size].facts if is_stage else _state(path, run_id, steps, size)
        except DataError as error:
            warnings.append(f"{error.what} ({error.where}): going back to the state before it")
            continue
        reached = state["stage"] + is_stage  # the first stage that is not finished
        if missing := [i for i in range(1, reached) if i not in learned]:
            warnings.append(f"{path} cannot be used: stage {missing[0]} before it is damaged")
            continue
        good = {i: stage for i, stage in stages.items() if i < reached}
        attempt = Attempt(Position.read(state), good, path, warnings=warnings)
        attempt.unscored = {i: stage for i, stage in unscored.items() if i < reached}
        attempt.behind = _behind(folder, steps, reached)
        if not is_stage:
            attempt.inside, attempt.progress = reached, state["progress"]
        return attempt
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
    if 0 not in stages:
        return Attempt(Position(run_id), warnings=warnings)
    return Attempt(Position.read(stages[0].facts), {0: stages[0]}, warnings=warnings)


def stage_folders(folder: Path) -> list[tuple[int, Path]]:
    """Return index and path of the finished stages in a run folder, in order."""
    return sorted((int(p.name.split("-")[0]), p) for p in folder.glob("stages/[0-9]*-*"))


def _steps(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _behind(folder: Path, steps: int, reached: int) -> list[Path]:
    """Return the checkpoints of more than ``steps`` steps, and the stages from ``reached`` on."""
    later = [p for p in checkpoint.steps(folder / "ckpt") if _steps(p) > steps]
    return later + [p for index, p in stage_folders(folder) if index >= reached]


def _state(path: Path, run_id: str, steps: int, size: int) -> dict[str, Any]:
    """Read state.json of a checkpoint. DataError when any of its files is not what was written."""
    checkpoint.verify(path)
    try:
        state = checkpoint.read_json(path, "state.json")
        own, at = state["run_id"] == run_id, (state["stage"] - 1) * size + state["step"]
        own = own and isinstance(state["progress"], dict)
    except same.OTHER_SHAPE:
        raise DataError("state.json is not of this version of gain_cl", str(path)) from None
    if not own or at != steps:
        raise DataError(
            f"it holds step {state['step']} of stage {state['stage']} of {state['run_id']}",
            str(path),
        )
    return state


def _finished(
    folder: Path, run_id: str, warnings: list[str]
) -> tuple[dict[int, Stage], dict[int, Stage]]:
    """Return the finished stages that are what was written, and those of which only the scores are
    not, by index."""
    whole: dict[int, Stage] = {}
    unscored: dict[int, Stage] = {}
    for index, path in stage_folders(folder):
        try:
            whole[index] = _own(read_stage(path), run_id, index)
        except DataError as error:
            warnings.append(f"{error.what} ({error.where})")
            if index:
                with suppress(DataError):
                    stage = _own(read_stage(path, scores=False), run_id, index)
                    if (path / ADAPTER).exists():
                        unscored[index] = stage
                        warnings[-1] += ": scored again from its trained state"
                    else:
                        warnings[-1] += ": its trained state, to score it again, was not kept"
    return whole, unscored


def _own(stage: Stage, run_id: str, index: int) -> Stage:
    """Return a stage without what a killed process left in it. DataError: it is another's."""
    if (stage.facts["run_id"], stage.facts["stage"]) != (run_id, index):
        what = f"it is stage {stage.facts['stage']} of {stage.facts['run_id']}"
        raise DataError(what, str(stage.folder))
    checkpoint.drop(stage.folder)
    return stage


def write_stage(
    folder: Path,
    row: record.StageRecord,
    rows: pd.DataFrame,
    weights: Path | None,
    facts: dict[str, Any],
) -> Stage:
    """Save a finished stage in a run folder: stage.json, scores.parquet and, linked from the folder
    ``weights``, the state that is there: adapter, guard and the optimiser where it is carried."""
    place = folder / "stages" / f"{row.index:02d}-{row.domain or 'pretrained'}"
    files: dict[str, Any] = {
        "stage.json": same.json_bytes({**facts, "record": row.model_dump(mode="json")}),
        SCORES: rows.to_parquet(index=False),
    }
    for name in (ADAPTER, GUARD, OPTIMIZER):
        if weights is not None and (weights / name).exists():
            files[name] = weights / name
    checkpoint.save(place, files)
    return _load(place)


def read_stage(folder: Path, scores: bool = True) -> Stage:
    """Read a finished stage, with or without its scores. DataError when it is not what was
    written."""
    checkpoint.verify(folder, but=() if scores else (SCORES,))
    return _load(folder, scores)


def _load(folder: Path, scores: bool = True) -> Stage:
    try:
        facts = checkpoint.read_json(folder, "stage.json")
        row = record.StageRecord.model_validate(facts.pop("record"))
    except same.OTHER_SHAPE:
        raise DataError("stage.json is not of this version of gain_cl", str(folder)) from None
    rows = pd.read_parquet(folder / SCORES) if scores else pd.DataFrame()
    return Stage(row, rows, folder, facts)


def clear_folder(folder: Path) -> None:
    """Remove everything of a run but its lock, for its owner."""
    for path in folder.iterdir():
        if path.name != "LOCK":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
