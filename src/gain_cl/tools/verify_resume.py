"""``python -m gain_cl verify-resume``: whether a run that is killed and started again ends as an
undisturbed one, on this machine (default: debug=smoke train.steps=40).

A run is carried out undisturbed, then once more in a folder of its own and killed at random
moments, each time started again by the same command. Half of the kills, and always the first, come
soon after a checkpoint. What must not depend on it (``evidence``) is compared by SHA-256.
"""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from gain_cl.compose.composition import compose
from gain_cl.compose.messages import key_of
from gain_cl.config.presets import quote
from gain_cl.errors import PREEMPTED, ConfigError, DataError, PreemptedError
from gain_cl.measure import record
from gain_cl.system import signals
from gain_cl.system.files import sha256
from gain_cl.system.hashes import json_sha256
from gain_cl.tools.command import CONFIGURATION, Parser, new_folder

DEFAULT = ["debug=smoke", "train.steps=40"]
"""What is run when nothing else is asked for: seconds of work, on a tiny random model."""

OWN = ("results_dir", "resume", "force", "allow_change", "track.backend")
"""Settings that are decided here."""

EVIDENCE = (
    "runs/*/stages/*/*.safetensors",
    "runs/*/stages/*/scores.parquet",
    "results/runs/*.items.parquet",
    "runs/*/matrix.csv",
)
"""Files that must not depend on interruptions, what was computed before what is derived from it."""


def evidence(folder: Path) -> dict[str, str]:
    """Return path -> SHA-256 of everything in folder/runs and folder/results that must not depend
    on interruptions: values of items, scores, trained weights, matrix, and the record but for times
    and places."""
    found = {path: sha256(path) for pattern in EVIDENCE for path in sorted(folder.glob(pattern))}
    for path in sorted(folder.glob("results/runs/*.json")):
        found[path] = json_sha256(record.outcome(record.load(path).record))
    return {path.relative_to(folder).as_posix(): digest for path, digest in found.items()}


def main(argv: list[str]) -> int:
    """Print the verdict. DataError (exit 65): an interrupted run ends otherwise."""
    parser = Parser("verify-resume", *CONFIGURATION)
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
    overrides = args.overrides or DEFAULT
    for key in map(key_of, overrides):
        if key in OWN:
            raise ConfigError(f"{key} is decided by verify-resume", key, f"leave {key}= out")
    config = compose(overrides, args.config_dir, args.plugin)
    words = [word for word in overrides if key_of(word) != "output_dir"]
    words += [f"--config-dir={folder}" for folder in args.config_dir]
    words += [*(f"--plugin={file}" for file in args.plugin), "track.backend=none"]
    if config.checkpoint.every_steps is None:  # so few that a kill loses some steps
        words.append(f"checkpoint.every_steps={max(2, config.train.stage_steps // 5)}")
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    place = new_folder(Path(args.keep)) if args.keep else Path(config.output_dir)
    place.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}: {' '.join(words)}", file=sys.stderr, flush=True)
    work: Any = nullcontext(place)
    if not args.keep:
        work = tempfile.TemporaryDirectory(dir=place, prefix=".tmp-verify-resume-")
    with signals.listening(), work as folder:
        kind = getattr(signal, f"SIG{args.signal}")
        _compare(words, args.kills, kind, random.Random(seed), Path(folder).absolute())
    return 0


def _compare(
    words: list[str], kills: int, kind: signal.Signals, draw: random.Random, folder: Path
) -> None:
    """Make the undisturbed run, then interrupted ones, each to its end, until all kills were made:
    mostly one takes them all."""
    begun, place = time.monotonic(), folder / "undisturbed"
    if code := attempt(words, place):
        raise _failed(f"undisturbed the run ends with exit code {code}", place)
    whole = time.monotonic() - begun
    reference = found = evidence(place)
    made = attempts = resumed = 0
    while made < kills and found == reference:
        place, code = folder / f"interrupted-{attempts}", 1
        while code:
            wait, behind = draw.uniform(0, whole), attempts % 2 == 0
            wait = (wait / 20 if behind else wait) if made < kills else math.inf
            code = attempt(words, place, kind, wait, behind)
            attempts += 1
            if code not in (0, -kind, PREEMPTED):
                what = f"resume is NOT exact here: started again after kill {made} the run ends"
                raise _failed(f"{what} with exit code {code}", place)
            made += code != 0
            resumed += code != 0 and _saved(place) > 0
            said = f"kill {made}: {_saved(place)} steps were saved" if code else "finished"
            print(said, file=sys.stderr, flush=True)
        found = evidence(place)
    names = {**reference, **found}
    for name in names:
        if reference.get(name) != found.get(name):
            do = "look at compute.threads, on a GPU compute.deterministic=true, plugins, --keep DIR"
            raise DataError(f"resume is NOT exact here: {name} differs", "", do)
    if not resumed:
        what = "no kill came after a checkpoint: nothing was resumed"
        raise DataError(what, "", "give more --kills, or a longer run with train.steps=")
    told = f"{made} kills ({resumed} with a checkpoint to go on from), {len(names)} files compared"
    print(f"resume is exact here: {told}", flush=True)


def attempt(
    words: list[str], place: Path, kind: int = 0, wait: float = math.inf, behind: bool = False
) -> int:
    """Run one process in ``place`` to its end, and return its exit code. A signal ends it so many
    seconds after its start or (behind) after its next checkpoint."""
    place.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "gain_cl", "run", *words]
    for key, name in (("output_dir", "runs"), ("results_dir", "results")):
        command.append(f"{key}={quote(str(place / name))}")
    before, since = _saved(place), math.inf if behind else time.monotonic()
    with open(place / "log.txt", "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while process.poll() is None:
            if (asked := signals.asked()) is not None:
                raise PreemptedError(f"stopped by {asked}", "", "nothing was kept: run it again")
            if _saved(place) > before:
                since = min(since, time.monotonic())
            if time.monotonic() - since >= wait:
                os.killpg(process.pid, kind)
                wait = math.inf  # a run that does not stop ends by its watchdog
            time.sleep(0.005)
    finally:
        with suppress(ProcessLookupError, PermissionError):  # also what it may have started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode


def _saved(place: Path) -> int:
    """Return the steps of the newest checkpoint; 0 when there is none."""
    found = [path.name.removeprefix("step-") for path in place.glob("runs/*/ckpt/step-*")]
    return max(map(int, found), default=0)


def _failed(what: str, place: Path) -> DataError:
    """Return the error of a run that ended as it should not, with its last words."""
    said = (place / "log.txt").read_text(encoding="utf-8", errors="replace").strip()
    last = said.rpartition("\n")[2]
    return DataError(f"{what}: {last.removeprefix('gain_cl: error: ')}")
