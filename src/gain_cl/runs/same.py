"""Compare attempts at one run: what may not differ between them, and what is told."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gain_cl.config.schema import RunConfig
from gain_cl.errors import DataError
from gain_cl.measure import provenance
from gain_cl.system.files import write_bytes

if TYPE_CHECKING:
    from gain_cl.runs.inputs import Inputs

ANEW = "resume=never starts anew and removes what is there"

OTHER_SHAPE = (KeyError, TypeError, AttributeError, ValueError, IndexError)
"""What reading raises when JSON has another shape: another version of gain_cl wrote it, or a hand.
The file then counts as damaged."""


def json_bytes(data: Any) -> bytes:
    """Return JSON as a run folder holds it."""
    return (json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def fixed_facts(config: RunConfig, pins: dict[str, Any]) -> dict[str, Any]:
    """Return what may not differ between attempts, as far as it is known before torch is imported.
    Keys are those of config.Change."""
    return {
        "numerics": {"version": provenance.NUMERICS, "plugins": pins["plugins"]},
        "model": {
            "pin": pins["model"],
            **{k: pins[k] for k in ("init_from", "checkpoints") if k in pins},
        },
        "data": {"domains": pins["domains"], "tasks": pins["tasks"]},
        "dtype": config.model.dtype,
        "eval_batch": config.compute.eval_batch,
    }


def differing(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Return what differs in each field, in words. Fields that only one side has are not
    compared."""
    both = sorted(before.keys() & now.keys())
    return {k: found for k in both if (found := first_difference(before[k], now[k], k))}


def first_difference(a: Any, b: Any, where: str = "") -> str | None:
    """Return the first place where two JSON values differ, and how."""
    if isinstance(a, dict) and isinstance(b, dict):
        for k in sorted(a.keys() | b.keys()):
            name = f"{where}.{k}".lstrip(".")
            if k not in a or k not in b:
                return f"{name} is only in one of them"
            if found := first_difference(a[k], b[k], name):
                return found
        return None
    if a == b:
        return None
    short = [text if len(text := str(value)) <= 40 else text[:37] + "..." for value in (a, b)]
    return f"{where} was {short[0]}, is {short[1]}"


def compare_attempts(inputs: Inputs, first: bool) -> list[str]:
    """Compare with run.json what may not differ between attempts. Write run.json where this attempt
    is the first. Note the attempt in attempts.jsonl.

    Return what a reader of the numbers must know. DataError names the first field that differs and
    is not in allow_change."""
    config, plan, now, here = inputs.config, inputs.plan, inputs.facts, inputs.environment
    folder = plan.folder
    environment, path = provenance.environment(), folder / "run.json"
    if first:
        (folder / "attempts.jsonl").unlink(missing_ok=True)
        known: dict[str, Any] | None = {
            "run_id": plan.run_id,
            "settings": config.scientific(),
            "pins": plan.pins,
            "facts": now,
            "environment": {**environment, **here},
        }
        write_bytes(path, json_bytes(known))
    elif (known := read_run(path)) is None:
        raise _unknown("run.json is missing or damaged: what the run began with", folder)
    assert known is not None
    changed = differing(known["facts"], now)
    for name, what in changed.items():
        if name not in config.allow_change:
            do = (
                f"run it as before, or allow_change=[{','.join(changed)}] goes on and marks the "
                f"record tainted, or {ANEW}"
            )
            raise DataError(f"the interrupted run has another {name}: {what}", str(folder), do)
    scored = "data" in changed and [f["data"]["validation"] for f in (known["facts"], now)]
    if scored and (found := first_difference(*scored)):
        what = (
            f"the documents that are scored changed too, {found}: stages before and after cannot "
            "be compared"
        )
        raise DataError(what, str(folder), f"restore the data, or {ANEW}")
    other = elsewhere(known, {**environment, **here})
    line = {
        "started": environment["started"], "process": os.getpid(), "host": socket.gethostname(),
        "commit": environment["commit"], "dirty": environment["dirty"], **here,
        "changed": list(changed.values()), "other": other,
    }  # fmt: skip
    lines = [json.dumps(each, allow_nan=False) + "\n" for each in [*read_attempts(folder), line]]
    write_bytes(folder / "attempts.jsonl", "".join(lines).encode())
    return [f"since the first attempt: {what}" for what in other]


def elsewhere(run: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between the machine where a run began and this one. It is recorded and
    told, and allowed."""
    then = {k: v for k, v in run["environment"].items() if k not in ("started", "numerics")}
    return list(differing(then, now).values())


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """Return an entry for each start of the run so far. DataError when the file is not what was
    written: it tells what is tainted."""
    path = folder / "attempts.jsonl"
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if all(isinstance(what, str) for attempt in found for what in attempt["changed"]):
            return found
    except FileNotFoundError:
        return []
    except (OSError, RecursionError, *OTHER_SHAPE):
        pass
    raise _unknown("attempts.jsonl is damaged: what changed between the attempts", path)


def check_settings(config: RunConfig, folder: Path) -> None:
    """Raise DataError for a run folder of another configuration: somebody renamed it."""
    run = read_run(folder / "run.json")
    if run is None:
        return
    try:
        before, now = (
            provenance.without_places(settings, run["pins"])
            for settings in (run["settings"], config.scientific())
        )
        found = first_difference(comparable(before), comparable(now))
    except OTHER_SHAPE:
        raise _unknown("run.json is damaged: what the run began with", folder) from None
    if found:
        raise DataError(
            f"the run folder is of another configuration: {found}", str(folder), "move it away"
        )


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without what ``fixed_facts`` compares."""
    model = {k: v for k, v in settings["model"].items() if k != "dtype"}
    return {**settings, "model": model}


def read_run(path: Path) -> dict[str, Any] | None:
    """Read run.json. Return None when it is missing or has another shape."""
    try:
        run: dict[str, Any] = json.loads(path.read_bytes())
        parts = [run[k] for k in ("settings", "pins", "facts", "environment")]
        good = isinstance(run["run_id"], str) and all(isinstance(part, dict) for part in parts)
        return run if good else None
    except (OSError, RecursionError, *OTHER_SHAPE):
        return None


def _unknown(what: str, where: Path) -> DataError:
    return DataError(f"{what} is not known", str(where), f"restore it, or {ANEW}")
