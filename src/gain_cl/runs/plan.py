"""Name a run and its places before torch is imported."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gain_cl import adapters, domains, guards
from gain_cl.adapters import portable
from gain_cl.config import presets
from gain_cl.config.schema import Given, RunConfig
from gain_cl.errors import DataError, GainError
from gain_cl.measure import provenance, record, tasks
from gain_cl.models import source
from gain_cl.runs import same
from gain_cl.runs.resume import stage_folders
from gain_cl.system import checkpoint, lock


@dataclass(frozen=True)
class Plan:
    """Identity and places of a run. folder: output_dir/<run_id>; finished: the record is there
    already."""

    run_id: str
    pins: dict[str, Any]
    record_path: Path
    folder: Path

    @property
    def finished(self) -> bool:
        return self.record_path.exists()

    @property
    def unswept(self) -> bool:
        """True if an attempt is under way, was killed or failed."""
        return any(
            (self.folder / name).exists() for name in ("ckpt", "cells", "LOCK", "failure.json")
        )

    @property
    def interrupted(self) -> bool:
        """True if an attempt has saved something since the record, if there is one, was written."""
        states = [p.stat().st_mtime_ns for p in (self.folder / "ckpt").glob("step-*")]
        return bool(states) and not (
            self.finished and self.record_path.stat().st_mtime_ns >= max(states)
        )

    @property
    def files(self) -> dict[str, Path]:
        """Return what a user is told to look at."""
        return {
            "per-item values": record.items_path(self.record_path),
            "matrix (CSV)": self.folder / "matrix.csv",
            "heat map (PNG)": self.folder / "matrix.png",
            "metrics": self.folder / "metrics.jsonl",
            "adapters": self.folder / "stages",
        }


def prepare(config: RunConfig) -> Plan:
    """Pin model, data and tasks and derive the run id. Read local files and download nothing."""
    pins: dict[str, Any] = {
        "model": source.pin_model(config.model),
        "domains": {name: domains.pin_domain(domain) for name, domain in config.domains.items()},
        "tasks": tasks.pin_tasks(config.tasks),
        "plugins": {
            "adapter": adapters.pin_adapter(config.adapter.kind),
            "guard": guards.pin_guard(config.guard.kind),
        },
    }
    if (begin := portable.init_pin(config.adapter)) is not None:
        pins["init_from"] = begin
    if isinstance(config.adapter, Given):
        pins["checkpoints"] = [portable.checkpoint_pin(c) for c in config.adapter.checkpoints]
    output, run_id = Path(config.output_dir), provenance.run_id(config, pins)
    path = record_path(config, run_id)
    if not path.exists() and not (output / run_id).exists():
        _check_name(config, pins)
        run_id = adopted_run(config, pins) or run_id
    return Plan(run_id, pins, record_path(config, run_id), output / run_id)


def record_path(config: RunConfig, run_id: str) -> Path:
    """Return the place of a run's record."""
    return Path(config.results_dir) / "runs" / f"{run_id}.json"


# --- a run that something outside the settings changed under --------------------------------------


def like(config: RunConfig, pins: dict[str, Any], *keys: str) -> dict[str, Any] | None:
    """Return run.json of a run in output_dir that has the same inputs and settings, but for some
    keys. keys: section and name, as in "model name"."""

    def parts(settings: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        settings = provenance.without_places(settings, pins)
        named = map(str.split, keys)  # what was trained elsewhere has no section train
        return [settings.get(section, {}).pop(key, None) for section, key in named], settings

    own, rest = parts(config.scientific())
    for other in sorted(Path(config.output_dir).glob("*/run.json")):
        with suppress(*same.OTHER_SHAPE):
            run = same.read_run(other)
            if run and run["pins"] == pins:
                values, others = parts(run["settings"])
                if others == rest and values != own:
                    return run
    return None


def _check_name(config: RunConfig, pins: dict[str, Any]) -> None:
    """Raise DataError when a run of this model is there under another name, and the folder alone
    gives the model its name: somebody renamed it."""
    if config.resume == "never" or config.force or config.model.path is None:
        return
    if config.model.name != presets.folder_name(config.model.path):
        return
    if (run := like(config, pins, "model name")) is not None:
        name = run["settings"]["model"]["name"]
        do = f"model.name={name} goes on with it, resume=never begins anew"
        raise DataError(f"there is a run of this model as {name}", run["run_id"], do)


def adopted_run(config: RunConfig, pins: dict[str, Any]) -> str | None:
    """Return the id of an interrupted run of these settings that this one may go on with, although
    something outside the settings changed and so its id, or of a run that ended so. DataError when
    there is one and ``allow_change`` does not name what changed."""
    if config.resume == "never" or config.force:
        return None
    for other in sorted(Path(config.output_dir).glob("*/run.json")):
        run, folder = same.read_run(other), other.parent
        changed = {} if run is None else _changed(run, config, pins)
        if run is None or not changed or lock.holder(folder):
            continue
        finished = record_path(config, run["run_id"])
        if changed.keys() <= set(config.allow_change):
            if not finished.exists() or _ended_so(finished, config, pins):
                return str(run["run_id"])
        elif not finished.exists() and (
            checkpoint.steps(folder / "ckpt") or any(index for index, _ in stage_folders(folder))
        ):
            name = next(k for k in changed if k not in config.allow_change)
            do = (
                f"allow_change=[{','.join(changed)}] goes on with it and marks the record "
                "tainted; resume=never starts a new run"
            )
            raise DataError(
                f"an interrupted run of these settings has another {name}: {changed[name]}",
                str(folder),
                do,
            )
    return None


def _changed(run: dict[str, Any], config: RunConfig, pins: dict[str, Any]) -> dict[str, str]:
    """Return what changed since a run of these settings began, of what its id is a hash of. Nothing
    for a run of other settings."""
    now = same.fixed_facts(config, pins)
    del now["eval_batch"]  # which is no part of the id
    try:
        if same.comparable(run["settings"]) != same.comparable(config.scientific()):
            return {}
        known = {
            k: {n: v[n] for n in now[k]} if isinstance(v, dict) else v
            for k, v in run["facts"].items()
            if k in now
        }
    except same.OTHER_SHAPE:
        return {}
    return same.differing(known, now)


def _ended_so(path: Path, config: RunConfig, pins: dict[str, Any]) -> bool:
    """True if a finished run's last attempt was made with what there is now: only then is its
    record the answer."""
    try:
        r = record.load(path).record
        then = (
            r.provenance["numerics"],
            r.config["model"]["dtype"],
            {k: r.pins.get(k) for k in pins},
        )
    except (GainError, *same.OTHER_SHAPE):
        return False
    return then == (provenance.NUMERICS, config.model.dtype, pins)
