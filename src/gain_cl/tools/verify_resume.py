"""``python -m gain_cl verify-resume``: whether a run that is killed and started again ends as an
undisturbed one, on this machine.

A run is carried out undisturbed, then once more in a folder of its own and killed at random
moments, each time started again by the same command. Half of the kills, and always the first, come
soon after a checkpoint. What must not depend on it (``evidence``) is compared by SHA-256.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rich.text import Text

from gain_cl.compose.composition import compose
from gain_cl.compose.messages import key_of
from gain_cl.config.presets import quote
from gain_cl.errors import PREEMPTED, ConfigError, DataError, PreemptedError, printable
from gain_cl.measure import record
from gain_cl.paper.table import Row, Table, print_table
from gain_cl.system import signals
from gain_cl.system.files import sha256
from gain_cl.system.hashes import json_sha256
from gain_cl.tools.command import CONFIGURATION, Parser, new_folder

DEFAULT = ["debug=smoke", "train.steps=40"]
"""What is run when nothing else is asked for: seconds of work, on a tiny random model."""

OWN = ("results_dir", "resume", "force", "allow_change")
"""Settings that are decided here."""

PATIENCE_SECONDS = 120.0
"""How long a run may take to stop after a signal before it counts as hung."""

EVIDENCE = (
    "results/runs/*.items.parquet",
    "runs/*/matrix.csv",
    "runs/*/stages/*/*.safetensors",
    "runs/*/stages/*/scores.parquet",
)
"""Files that must not depend on interruptions."""


def evidence(folder: Path) -> dict[str, str]:
    """Return path -> SHA-256 of everything in folder/runs and folder/results that must not depend
    on interruptions: values of items, scores, trained weights, matrix, and the record but for times
    and places."""
    found = {path: sha256(path) for pattern in EVIDENCE for path in sorted(folder.glob(pattern))}
    for path in sorted(folder.glob("results/runs/*.json")):
        found[path] = json_sha256(record.outcome(record.load(path).record))
    return {path.relative_to(folder).as_posix(): digest for path, digest in found.items()}


def main(argv: list[str]) -> int:
    """Print the table and the verdict. DataError (exit 65): an interrupted run ends otherwise."""
    about = "Carry out a short run undisturbed, then again with kills at random moments, and "
    about += f"compare every result by SHA-256 (default: {' '.join(DEFAULT)})."
    parser = Parser("verify-resume", *CONFIGURATION, description=about)
    parser.option("--kills", "how many (default: %(default)s)", 5)
    parser.option(
        "--signal",
        "KILL ends the run at once, TERM asks it to save and stop (default: %(default)s)",
        "KILL",
        choices=["KILL", "TERM"],
    )
    parser.option("--seed", "of the moments (default: random, and printed)", type=int)
    parser.option("--keep", "work in this new or empty folder, and leave it")
    args = parser.read(argv)
    if args.kills < 1:
        raise ConfigError(f"--kills {args.kills}", "gain_cl verify-resume", "give 1 or more")
    overrides = args.overrides or DEFAULT
    for key in map(key_of, overrides):
        if key in OWN:
            raise ConfigError(f"{key} is decided by verify-resume", key, f"leave {key}= out")
    config = compose(overrides, args.config_dir, args.plugin)
    words = [word for word in overrides if key_of(word) not in ("output_dir", "track.backend")]
    words += [f"--config-dir={folder}" for folder in args.config_dir]
    words += [*(f"--plugin={file}" for file in args.plugin), "track.backend=none"]
    if config.checkpoint.every_steps is None:  # so few that a kill loses some steps
        words.append(f"checkpoint.every_steps={max(2, config.train.stage_steps // 5)}")
    place = Path(args.keep or config.output_dir).expanduser().absolute()
    if args.keep:
        new_folder(place).mkdir(parents=True, exist_ok=True)
    there = next(path for path in (place, *place.parents) if path.is_dir())
    folder = place if args.keep else Path(tempfile.mkdtemp(dir=there, prefix=".tmp-verify-resume-"))
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    try:
        with signals.listening():
            kind = getattr(signal, f"SIG{args.signal}")
            _compare(words, args.kills, kind, seed, folder)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def _compare(words: list[str], kills: int, kind: signal.Signals, seed: int, folder: Path) -> None:
    """Make the undisturbed run, then interrupted ones, each to its end, until all kills were made:
    mostly one takes them all."""
    draw, made, resumed, attempts, runs = random.Random(seed), 0, 0, 0, 0
    _say(f"seed {seed}: {' '.join(words)}")
    begun, place = time.monotonic(), folder / "undisturbed"
    if code := attempt(words, place):
        raise _failed(f"undisturbed the run ends with exit code {code}", place)
    whole = time.monotonic() - begun
    _say(f"undisturbed: {whole:.1f} s, about {(kills + 2) * whole:.0f} s to go")
    reference = found = evidence(place)
    while made < kills and found == reference:
        runs += 1
        place, code = folder / f"interrupted-{runs}", 1
        while code:
            wait, behind = draw.uniform(0, whole), attempts % 2 == 0
            due = moment(place, wait / 20 if behind else wait, behind) if made < kills else None
            code = attempt(words, place, kind, due)
            attempts += 1
            if code and code not in (-kind, PREEMPTED if kind == signal.SIGTERM else -kind):
                what = f"resume is NOT exact here: started again after kill {made} the run ends"
                raise _failed(f"{what} with exit code {code}", place)
            made += code != 0
            resumed += code != 0 and _saved(place) > 0
            _say(f"kill {made}: {_saved(place)} steps were saved" if code else "finished")
        found = evidence(place)
    rows, wrong = [], []
    for name in (names := {**reference, **found}):
        one, two = reference.get(name, "missing"), found.get(name, "missing")
        wrong += [name] if one != two else []
        equal = Text("NO", "bold red") if one != two else "yes"
        rows.append(Row([name.split("/", 2)[-1], one[:12], two[:12], equal]))
    heads = ["file", "undisturbed", "interrupted", "equal"]
    print_table(Table("verify-resume", "", heads, rows))
    # what was computed comes before what was derived from it
    for name in sorted(wrong, key=lambda name: ("/stages/" not in name, name)):
        raise DataError(
            f"resume is NOT exact here: {name} differs",
            f"{len(wrong)} of {len(names)} files, seed {seed}",
            "look at compute.threads, on a GPU compute.deterministic=true, plugins, and --keep DIR",
        )
    if not resumed:
        raise DataError(
            "no kill came after a checkpoint: nothing was resumed",
            "",
            "give more --kills, or a longer run with train.steps=",
        )
    told = f"{made} kills ({resumed} with a checkpoint to go on from), {len(names)} files compared"
    print(f"resume is exact here: {told}", flush=True)


def attempt(
    words: list[str], place: Path, kind: int = 0, due: Callable[[], bool] | None = None
) -> int:
    """Run one process in ``place`` to its end, which a signal brings about once it is due. Return
    its exit code."""
    place.mkdir(exist_ok=True)
    folders = {"output_dir": place / "runs", "results_dir": place / "results"}
    command = [sys.executable, "-m", "gain_cl", "run", *words]
    command += [f"{key}={quote(str(path))}" for key, path in folders.items()]
    with open(place / "log.txt", "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while process.poll() is None:
                if (name := signals.asked()) is not None:
                    raise PreemptedError(f"stopped by {name}", "", "nothing was kept: run it again")
                if due is not None and due():
                    os.killpg(process.pid, kind)
                    process.wait(PATIENCE_SECONDS)
                time.sleep(0.005)
        except subprocess.TimeoutExpired:
            raise DataError(
                f"the run did not stop within {PATIENCE_SECONDS:.0f} s of a signal",
                str(place),
                "look at its log, which --keep DIR leaves",
            ) from None
        finally:
            with suppress(ProcessLookupError, PermissionError):  # also what it may have started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode


def moment(place: Path, seconds: float, behind: bool) -> Callable[[], bool]:
    """Return a function that is true so many seconds from now, or (behind) after the next
    checkpoint."""
    before, seen = _saved(place), [] if behind else [time.monotonic()]

    def due() -> bool:
        if not seen and _saved(place) > before:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= seconds

    return due


def _saved(place: Path) -> int:
    """Return the steps of the newest checkpoint; 0 when there is none."""
    found = [path.name.removeprefix("step-") for path in place.glob("runs/*/ckpt/step-*")]
    return max(map(int, found), default=0)


def _failed(what: str, place: Path) -> DataError:
    """Return the error of a run that ended as it should not, with its last words."""
    lines = (place / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line for line in lines if line.strip()][-1:] or [""]
    return DataError(f"{what}: {said[0].removeprefix('gain_cl: error: ')}")


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
