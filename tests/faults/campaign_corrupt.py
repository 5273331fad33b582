"""Campaigns of damaged files: whatever happens to a checkpoint or a finished stage is noticed
before it is used."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from campaign import Outcome, Warm, evidence_bytes
from campaign_kill import GAIN, Case, attempt, complaints, label, undisturbed

NAMED = re.compile(
    r"SHA-256 [0-9a-f]{12}|\d+ bytes instead of \d+|is missing|is not what was written|it "
    r"is stage|it holds step"
)
"""How a damaged file is told of."""


class State(NamedTuple):
    """A run that was killed at a failpoint. damaged: the folder to damage, within the run's; other:
    a folder of its kind, to swap with; back: the state it must go back to, and where the damage
    reaches that too, the one before; empty: none is good."""

    name: str
    point: str
    damaged: str
    other: str
    back: tuple[str, ...] = ()
    scores: str | None = (
        None  # the state to go on from where only the scores of a stage are damaged
    )

    def expected(self, damage: str) -> str | None:
        """The state to go on from after this damage, and None when there is none."""
        if self.scores and damage.startswith("scores.parquet") and " and " not in damage:
            return self.scores
        if not self.back:
            return None
        if self.damaged.startswith("ckpt"):
            further = "swapped with" in damage
        else:
            # a finished stage and the last checkpoint within it share the file of the trained state
            further = (
                damage.startswith("adapter") and "swapped" not in damage and "deleted" not in damage
            )
        return self.back[further]


STEPS = {
    "ckpt/step-6": 0, "ckpt/step-5": 1, "ckpt/step-4": 0, "ckpt/step-3": 1,
    "stages/01-smoke_a": 2, None: 0,
}  # fmt: skip
"""Optimiser steps that are done again from each state."""

STATES = (
    State(
        "newest checkpoint",
        "prune.after@4",
        "ckpt/step-6",
        "ckpt/step-5",
        ("ckpt/step-5", "stages/01-smoke_a"),
    ),
    State(
        "newest stage",
        "stage.after@2",
        "stages/01-smoke_a",
        "stages/00-pretrained",
        ("ckpt/step-4", "ckpt/step-3"),
        "stages/01-smoke_a",
    ),
    State(
        "stage behind the checkpoints",
        "prune.after@4",
        "stages/01-smoke_a",
        "stages/00-pretrained",
        scores="ckpt/step-6",
    ),
)


def killed(warm: Warm, root: Path, case: Case, state: State, patch: str | None = None) -> Path:
    """The folder of the killed run; made once for each place and patch."""
    folder = root / "killed" / label(state.point, case, patch)
    if not folder.exists():
        result = attempt(warm, case, folder, patch, env={"GAIN_CL_FAILPOINT": state.point})
        assert result.code == -signal.SIGKILL, result.err
    return folder


def copy(folder: Path, to: Path) -> Path:
    """A copy in which files that were one file under two names still are."""
    shutil.rmtree(to, ignore_errors=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", str(folder), str(to)], check=True)
    return to


def run_folder(folder: Path) -> Path:
    (path,) = folder.glob("runs/*/run.json")
    return path.parent


# --- what can happen to a file --------------------------------------------------------------------


def overwrite(path: Path, data: bytes) -> None:
    """In place, as a broken disk would: a second name of the file shows it too."""
    with open(path, "r+b") as file:
        file.truncate(0)
        file.write(data)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    overwrite(path, bytes(data))


def swap(a: Path, b: Path) -> None:
    kept = a.with_name("kept")
    a.rename(kept)
    b.rename(a)
    kept.rename(b)


Damage = Callable[[], None]


def damages(
    folder: Path, other: Path, flips: int, rng: random.Random
) -> Iterator[tuple[str, Damage]]:
    """Every way to damage a saved folder, by name."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    for path in files:
        data = path.read_bytes()
        yield (
            f"{path.name} truncated",
            lambda path=path, data=data: overwrite(path, data[: len(data) // 2]),
        )
        yield f"{path.name} a byte short", lambda path=path, data=data: overwrite(path, data[:-1])
        yield (
            f"{path.name} a byte longer",
            lambda path=path, data=data: overwrite(path, data + b"\0"),
        )
        yield f"{path.name} emptied", lambda path=path: overwrite(path, b"")
        yield f"{path.name} deleted", lambda path=path: path.unlink()
        if (other / path.name).exists() and (other / path.name).read_bytes() != data:
            yield (
                f"{path.name} swapped with that of {other.name}",
                lambda path=path: swap(path, other / path.name),
            )
        for second in files:
            if path.name < second.name:
                yield (
                    f"{path.name} and {second.name} swapped",
                    lambda path=path, second=second: swap(path, second),
                )
        for bit in [
            0,
            8 * len(data) - 1,
            *(rng.randrange(8 * len(data)) for _ in range(flips - 2)),
        ]:
            yield f"{path.name} bit {bit} flipped", lambda path=path, bit=bit: flip(path, bit)
    if other.exists():
        yield f"all of it swapped with {other.name}", lambda: swap(folder, other)
    yield (
        "all of it deleted but the manifest",
        lambda: [p.unlink() for p in files if p.name != "MANIFEST.json"] and None,
    )


# --- the decision where to go on ------------------------------------------------------------------


def decide(warm: Warm, root: Path, flips: int = 64, case: Case = GAIN, seed: int = 0) -> Outcome:
    """Every damage to every file, in each of STATES: resume.begin_attempt must go back to the state before
    it and say so, or refuse and name file and hash. Decided in this process, without running on."""
    from gain_cl.compose import composition
    from gain_cl.errors import DataError
    from gain_cl.runs import resume

    begun, rng = time.monotonic(), random.Random(seed)
    outcome = Outcome(f"damaged files, {flips} flips each")
    config = composition.compose([*case.base, *case.overrides], [], [])
    for state in STATES:
        template = killed(warm, root, case, state)
        trial = root / "decide"
        inside = run_folder(copy(template, trial))
        draw = rng.random()
        count = len(
            list(damages(inside / state.damaged, inside / state.other, flips, random.Random(draw)))
        )
        for number in range(count):
            inside = run_folder(copy(template, trial))
            name, damage = list(
                damages(inside / state.damaged, inside / state.other, flips, random.Random(draw))
            )[number]
            size = sum(p.stat().st_size for p in (inside / state.damaged).iterdir())
            damage()
            found, wanted = [], state.expected(name)
            try:
                start = resume.begin_attempt(config, inside, inside.name)
                back = (
                    str(start.folder.relative_to(inside))
                    if start.folder
                    else "the pretrained model"
                )
                if back != wanted:
                    found.append(f"goes on from {back}")
                if not any(NAMED.search(text) for text in start.warnings):
                    found.append(f"says {start.warnings}")
            except DataError as error:
                if wanted is not None or not NAMED.search(str(error)):
                    found.append(f"refuses: {error}")
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
            outcome.count(1, found, f"{state.name}, {name}", size)
        shutil.rmtree(trial)
    outcome.seconds = time.monotonic() - begun
    return outcome


# --- and running on -------------------------------------------------------------------------------


def run_on(
    warm: Warm,
    root: Path,
    trials: int | None,
    case: Case = GAIN,
    patch: str | None = None,
    seed: int = 0,
    states: tuple[State, ...] = STATES,
) -> Outcome:
    """Whole runs after a damage, drawn evenly from all there are (trials; None: each once, with two
    flips a file): the end is the undisturbed run's with the loss told and no more done again than
    it must; or exit code 65, and the undisturbed run's once the files are restored."""
    begun, rng = time.monotonic(), random.Random(seed)
    outcome = Outcome("damaged files, run on")
    reference, _ = undisturbed(warm, case, root, patch)
    chosen = []
    for state in states:
        inside = run_folder(killed(warm, root, case, state, patch))
        chosen += [
            (state, number)
            for number in range(
                len(
                    list(damages(inside / state.damaged, inside / state.other, 2, random.Random(0)))
                )
            )
        ]
    if trials is not None:
        chosen = [chosen[int((i + rng.random()) * len(chosen) / trials)] for i in range(trials)]
    for state, number in chosen:
        template = killed(warm, root, case, state, patch)
        folder = copy(template, root / "damaged" / str(time.monotonic_ns()))
        inside = run_folder(folder)
        name, damage = list(
            damages(inside / state.damaged, inside / state.other, 2, random.Random(0))
        )[number]
        damage()
        result = attempt(warm, case, folder, patch)
        found = []
        if state.expected(name) is None:
            if result.code != 65 or not NAMED.search(result.err):
                found.append(f"exit code {result.code} instead of 65: {result.err.strip()[-300:]}")
            elif result.err.count("\n") != 1:
                found.append(f"more than one line: {result.err}")
            shutil.copytree(
                run_folder(template) / state.damaged, inside / state.damaged, dirs_exist_ok=True
            )
            shutil.copytree(
                run_folder(template) / state.other, inside / state.other, dirs_exist_ok=True
            )
            result = attempt(warm, case, folder, patch) if not found else result
        elif not NAMED.search(result.out):
            found.append("it says nothing of the damage")
        found += [] if found else complaints(folder, reference, result, STEPS[state.expected(name)])
        outcome.count(
            1, found, f"{state.name}, {name}", evidence_bytes(folder) if result.code == 0 else 0
        )
        if not found:
            shutil.rmtree(folder)
    outcome.seconds = time.monotonic() - begun
    return outcome


def bad_ones_stay_out(warm: Warm, root: Path, patch: str | None = None) -> Outcome:
    """Both checkpoints are damaged, and the run that went back to the stage before is stopped at an
    earlier step than theirs: what it saved then counts, not they."""
    begun, outcome = time.monotonic(), Outcome("bad checkpoints, newer than the next good one")
    state = State("two bad checkpoints", "prune.after@6", "ckpt/step-8", "ckpt/step-7")
    reference, _ = undisturbed(warm, GAIN.prepared(root), root, patch)
    folder = copy(killed(warm, root, GAIN, state, patch), root / "two")
    for path in run_folder(folder).glob("ckpt/*/adapter.safetensors"):
        flip(path, 1000)
    rare = GAIN._replace(overrides=("checkpoint.every_steps=null",)).prepared(root)
    result = attempt(
        warm,
        rare,
        folder,
        ";".join(filter(None, (patch, "campaign_kill:signal_in,train,SIGTERM,1"))),
    )
    found = [] if result.code == 75 else [f"exit code {result.code}: {result.err}"]
    found += complaints(folder, reference, attempt(warm, rare, folder, patch), 4)
    outcome.count(1, found, state.name, evidence_bytes(folder))
    outcome.seconds = time.monotonic() - begun
    return outcome


def kill_while_replacing(warm: Warm, root: Path) -> Outcome:
    """The scores of the untouched model are damaged, and the process is killed while it replaces
    their folder."""
    begun, outcome = time.monotonic(), Outcome("kill -9 while a damaged stage is replaced")
    state = State("stage 0", "prune.after@4", "stages/00-pretrained", "stages/01-smoke_a")
    reference, _ = undisturbed(warm, GAIN.prepared(root), root)
    folder = copy(killed(warm, root, GAIN, state), root / "replaced")
    flip(run_folder(folder) / state.damaged / "scores.parquet", 1000)
    result = attempt(warm, GAIN, folder, env={"GAIN_CL_FAILPOINT": "save.between_renames@1"})
    found = (
        []
        if result.code == -signal.SIGKILL and NAMED.search(result.out)
        else [f"exit code {result.code}: {result.out}{result.err}"]
    )
    found += complaints(folder, reference, attempt(warm, GAIN, folder), 0, 0)
    outcome.count(2, found, state.name, evidence_bytes(folder))
    outcome.seconds = time.monotonic() - begun
    return outcome
