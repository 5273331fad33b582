"""Compare attempts at one run: what may not differ between them, and what is told."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from gain_cl.config.schema import RunConfig
from gain_cl.errors import DataError, GainError
from gain_cl.measure import provenance, record
from gain_cl.system import checkpoint, lock
from gain_cl.system.files import write_bytes

ANEW = "resume=never starts anew and removes what is there"

OTHER_SHAPE = (KeyError, TypeError, AttributeError, ValueError, IndexError)
"""What JSON of another version of gain_cl, or of another hand, makes of code that reads it: it is
no such file then."""


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


# --- what may not differ --------------------------------------------------------------------------


def facts(config: RunConfig, pins: dict[str, Any]) -> dict[str, Any]:
    """What may not differ between attempts, as far as it is known before torch is imported; keys as
    in config.Change."""
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
        return next(
            (f"{where}.{key} is only in one of them" for key in sorted(a.keys() ^ b.keys())), None
        )
    if a == b:
        return None
    short = [text if len(text := str(value)) <= 40 else text[:37] + "..." for value in (a, b)]
    return f"{where} was {short[0]}, is {short[1]}"


def adopt(config: RunConfig, pins: dict[str, Any]) -> str | None:
    """The id of an interrupted run of these settings that this one may go on with, although
    something outside the settings changed and so its id, or of a run that ended so. DataError when
    there is one and ``allow_change`` does not name what changed."""
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
            do = (
                f"allow_change=[{','.join(changed)}] goes on with it and marks the record "
                "tainted; resume=never starts a new run"
            )
            raise DataError(
                f"an interrupted run of these settings has another {name}: {changed[name]}",
                str(other.parent),
                do,
            )
    return None


def _changed(run: dict[str, Any], config: RunConfig, pins: dict[str, Any]) -> dict[str, str]:
    """What changed since a run of these settings began, of what its id is a hash of; empty for a
    run of other settings."""
    try:
        if _comparable(run["settings"]) != _comparable(config.scientific()):
            return {}
        own = facts(config, pins)
        known = {
            k: {n: v[n] for n in own[k]} if isinstance(v, dict) else v
            for k, v in run["facts"].items()
            if k in own
        }
    except OTHER_SHAPE:
        return {}
    return {
        k: v for k, v in differing(known, own).items() if k != "eval_batch"
    }  # which is no part of the id


def _ended_so(path: Path, config: RunConfig, pins: dict[str, Any]) -> bool:
    """Whether a finished run's last attempt was made with what there is now: only then is its
    record the answer."""
    try:
        r = record.load(path).record
        then = (
            r.provenance["numerics"],
            r.config["model"]["dtype"],
            {k: r.pins.get(k) for k in pins},
        )
    except (GainError, *OTHER_SHAPE):
        return False
    return then == (provenance.NUMERICS, config.model.dtype, pins)


def settle(
    config: RunConfig,
    folder: Path,
    run_id: str,
    pins: dict[str, Any],
    now: dict[str, Any],
    here: dict[str, Any],
    first: bool,
) -> list[str]:
    """Compare with run.json what may not differ, write run.json where this attempt is the first,
    and note the attempt.

    now: every field of config.Change; here: of the machine, what may differ. Returns what a reader
    of the numbers must know; DataError names the first field that differs and is not in
    allow_change."""
    environment, path = provenance.environment(), folder / "run.json"
    known = None if first else _read(path)
    if known is None and not first:
        raise DataError(
            "run.json is missing or damaged: what the run began with is not known",
            str(folder),
            f"restore it, or {ANEW}",
        )
    if known is None:
        (folder / "attempts.jsonl").unlink(missing_ok=True)
        known = {
            "run_id": run_id,
            "settings": config.scientific(),
            "pins": pins,
            "facts": now,
            "environment": {**environment, **here},
        }
        write_bytes(path, _json(known))
    changed = differing(known["facts"], now)
    for name, what in changed.items():
        if name not in config.allow_change:
            do = (
                f"run it as before, or allow_change=[{','.join(changed)}] goes on and marks the "
                f"record tainted, or {ANEW}"
            )
            raise DataError(f"the interrupted run has another {name}: {what}", str(folder), do)
    before = known["facts"].get("data")
    if (
        "data" in changed
        and isinstance(before, dict)
        and (found := _difference(before.get("validation"), now["data"]["validation"], ""))
    ):
        what = (
            f"the documents that are scored changed too, {found.lstrip('.')}: stages before "
            "and after cannot be compared"
        )
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
    return list(
        differing(
            {k: v for k, v in run["environment"].items() if k not in ("started", "numerics")}, now
        ).values()
    )


def attempts(folder: Path) -> list[dict[str, Any]]:
    """One entry for each start of the run so far; DataError when the file is not what was written:
    it tells what is tainted."""
    path = folder / "attempts.jsonl"
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if all(isinstance(what, str) for attempt in found for what in attempt["changed"]):
            return found
    except FileNotFoundError:
        return []
    except (OSError, RecursionError, *OTHER_SHAPE):
        pass
    raise DataError(
        "attempts.jsonl is damaged: what changed between the attempts is not known",
        str(path),
        f"restore it, or {ANEW}",
    )


def _same_settings(config: RunConfig, folder: Path) -> None:
    """A run folder of another configuration: somebody renamed it."""
    run = _read(folder / "run.json")
    if run is None:
        return
    try:
        before, now = (
            provenance.without_places(settings, run["pins"])
            for settings in (run["settings"], config.scientific())
        )
        found = _difference(_comparable(before), _comparable(now), "")
    except OTHER_SHAPE:
        raise DataError(
            "run.json is damaged: what the run began with is not known",
            str(folder),
            f"restore it, or {ANEW}",
        ) from None
    if found:
        raise DataError(
            f"the run folder is of another configuration: {found.lstrip('.')}",
            str(folder),
            "move it away",
        )


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what ``facts`` compares."""
    model = {k: v for k, v in settings["model"].items() if k != "dtype"}
    return {**settings, "model": model}


def _read(path: Path) -> dict[str, Any] | None:
    """run.json; None when there is none or it is none."""
    try:
        run: dict[str, Any] = json.loads(path.read_bytes())
        parts = [run[k] for k in ("settings", "pins", "facts", "environment")]
        return (
            run
            if isinstance(run["run_id"], str) and all(isinstance(part, dict) for part in parts)
            else None
        )
    except (OSError, RecursionError, *OTHER_SHAPE):
        return None


def _progress(folder: Path) -> bool:
    return bool(checkpoint.steps(folder / "ckpt")) or any(
        int(p.name[:2]) for p in (folder / "stages").glob("[0-9][0-9]-*")
    )
