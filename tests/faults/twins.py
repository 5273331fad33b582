"""Broken twins of parts of gain_cl, put in place in the process of a trial: the campaigns must
notice each of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def in_place() -> None:
    """A checkpoint is written straight into its own folder."""
    from gain_cl.system import checkpoint

    def save(folder: Path, files: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in files.items():
            checkpoint.reach("save.before_write")
            checkpoint._write(folder / name, content)
            checkpoint.reach("save.after_write")
        (folder / checkpoint.MANIFEST).write_bytes(
            checkpoint._manifest({name: checkpoint._facts(folder / name) for name in files})
        )

    checkpoint.save = save


def no_manifest_check() -> None:
    """What is loaded is not compared with what was written."""
    from gain_cl.system import checkpoint

    checkpoint.verify = lambda folder, but=(): {}  # type: ignore[assignment]


def restart_on_bad() -> None:
    """A bad checkpoint means from the beginning."""
    from gain_cl.runs import resume
    from gain_cl.system import checkpoint

    begin = resume.begin_attempt

    def lenient(config: Any, folder: Path, run_id: str) -> Any:
        for path in [*checkpoint.steps(folder / "ckpt"), *(folder / "stages").glob("*")]:
            try:
                checkpoint.verify(path)
            except Exception:
                resume.clear_folder(folder)
                return resume.Attempt(resume.Position(run_id))
        return begin(config, folder, run_id)

    resume.begin_attempt = lenient


def bad_ones_stay() -> None:
    """What was passed over is kept beside what comes after."""
    from gain_cl.runs import resume

    resume._behind = lambda *_: []


def keep_one() -> None:
    """Only the newest checkpoint is kept, so that there is none to fall back to."""
    from gain_cl.system import checkpoint

    prune = checkpoint.prune
    checkpoint.prune = lambda root, keep=1: prune(root, min(keep, 1))


def rng_not_saved() -> None:
    """Dropout is drawn from a stream that begins anew with each process."""
    from gain_cl.runs import train

    seed_of, calls = train.seed_of, 0

    def drawn(*parts: Any) -> int:
        nonlocal calls
        if parts[0] != "dropout":
            return seed_of(*parts)
        calls += 1
        return seed_of("dropout", parts[1], calls)

    train.seed_of = drawn


def off_by(steps: str) -> None:
    """The position in a stage is wrong after a resume, by so many steps."""
    from gain_cl.runs import train

    stage = train.stage

    def shifted(*arguments: Any, start: int = 0, **keywords: Any) -> Iterator[dict[str, Any]]:
        return stage(*arguments, start=start and start + int(steps), **keywords)

    train.stage = shifted


def optimizer_forgotten() -> None:
    """The optimiser begins anew with each process."""
    from gain_cl.runs import train

    train.load_optimizer_state = lambda *_: None


def adapter_forgotten() -> None:
    """The trained state begins anew with each process."""
    from gain_cl.adapters.base import Adapter

    Adapter.load_state = lambda self, state: None  # type: ignore[method-assign]


def guard_forgotten() -> None:
    """What a guard remembers is lost with the process."""
    from gain_cl import guards

    build = guards.build_guard

    def forgetful(settings: Any) -> Any:
        guard = build(settings)
        guard.load_state = lambda state: None  # type: ignore[method-assign]
        return guard

    guards.build_guard = forgetful


def truncate_not() -> None:
    """metrics.jsonl goes on behind rows that no checkpoint covers."""
    from gain_cl.runs import track

    track._cut = lambda path, length: path.stat().st_size if path.exists() else 0


def cells_forgotten() -> None:
    """An interrupted evaluation begins anew."""
    from gain_cl.measure import scoring

    load, stored = scoring.known_score, set()
    store = scoring.keep_score

    def remembered(folder: Path, name: str, *arguments: Any, **keywords: Any) -> None:
        store(folder, name, *arguments, **keywords)
        stored.add(name)

    scoring.keep_score = remembered
    scoring.known_score = lambda folder, name: load(folder, name) if name in stored else None


def record_in_place() -> None:
    """Records and tables are written straight to their names."""
    from gain_cl.system import files

    def write_all(wanted: dict[Path, bytes]) -> None:
        for path, data in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = path.suffix.lstrip(".")
            with open(path, "wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                files.reach(f"{kind}.after_write")
                file.write(data[len(data) // 2 :])

    from gain_cl.measure import record

    files.write_all = record.write_all = write_all


def deaf() -> None:
    """Nobody asks whether a signal came."""
    from gain_cl.system import signals

    signals.asked = lambda: None
    signals.poll = lambda: None


def signal_unsaved() -> None:
    """It stops when asked, without saving what was learned since the last checkpoint."""
    from gain_cl.runs import train
    from gain_cl.system import signals

    stage = train.stage

    def hasty(*arguments: Any, **keywords: Any) -> Iterator[dict[str, Any]]:
        for row in stage(*arguments, **keywords):
            signals.poll()
            yield row

    train.stage = hasty


def dies_of_signals() -> None:
    """No handler: a request to stop ends the process."""
    from gain_cl.system import signals

    signals._WATCHED = ()
