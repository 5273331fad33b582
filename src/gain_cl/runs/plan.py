"""Name a run and its places before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gain_cl import adapters, guards
from gain_cl import domains as domains_
from gain_cl.adapters import portable
from gain_cl.config.schema import Given, RunConfig
from gain_cl.measure import provenance, record, tasks
from gain_cl.models import source
from gain_cl.runs import same

if TYPE_CHECKING:
    pass


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
        """Whether an attempt is under way, was killed or failed."""
        return any(
            (self.folder / name).exists() for name in ("ckpt", "cells", "LOCK", "failure.json")
        )

    @property
    def interrupted(self) -> bool:
        """Whether an attempt has saved something since the record, if there is one, was written."""
        states = [p.stat().st_mtime_ns for p in (self.folder / "ckpt").glob("step-*")]
        return bool(states) and not (
            self.finished and self.record_path.stat().st_mtime_ns >= max(states)
        )

    @property
    def files(self) -> dict[str, Path]:
        """What a user is told to look at."""
        return {
            "per-item values": record.items_path(self.record_path),
            "matrix (CSV)": self.folder / "matrix.csv",
            "heat map (PNG)": self.folder / "matrix.png",
            "metrics": self.folder / "metrics.jsonl",
            "adapters": self.folder / "stages",
        }


def prepare(config: RunConfig) -> Plan:
    """Pin model, data and tasks and derive the run id. Torch-free; reads local files, downloads
    nothing."""
    pins: dict[str, Any] = {
        "model": source.pin(config.model),
        "domains": {name: domains_.pin_domain(domain) for name, domain in config.domains.items()},
        "tasks": tasks.pin(config.tasks),
        "plugins": {
            "adapter": adapters.pin_adapter(config.adapter.kind),
            "guard": guards.pin_guard(config.guard.kind),
        },
    }
    if (begin := portable.pin(config.adapter)) is not None:
        pins["init_from"] = begin
    if isinstance(config.adapter, Given):
        pins["checkpoints"] = [portable.checkpoint_pin(c) for c in config.adapter.checkpoints]
    plan = _plan(config, provenance.run_id(config, pins), pins)
    if not plan.finished and not plan.folder.exists() and (interrupted := same.adopt(config, pins)):
        plan = _plan(config, interrupted, pins)
    return plan


def _plan(config: RunConfig, run_id: str, pins: dict[str, Any]) -> Plan:
    return Plan(
        run_id,
        pins,
        Path(config.results_dir) / "runs" / f"{run_id}.json",
        Path(config.output_dir) / run_id,
    )
