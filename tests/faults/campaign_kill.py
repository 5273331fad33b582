"""Campaigns of kills and of requests to stop: each trial's end must be the undisturbed run's, bit
for bit.

A trial also logs every optimiser step and every scored cell that was computed, in all of its
attempts, so that work done twice is counted: a silent restart gives the right numbers too.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from campaign import SMOKE, Outcome, Result, Warm, evidence, evidence_bytes, leftovers, steps

HANG_SECONDS = 600.0
"""A trial that takes longer is killed, and counts as failed."""

GRACE_SECONDS = 30.0
"""Schedulers give about this long from the request to stop to the kill."""

MEMORY = """\
import torch

from gain_cl import guards
from gain_cl.guards.base import Guard


class Memory(Guard):
    '''A pull towards the mean of the states after the finished stages: wrong from stage 2 on when its memory is lost.'''

    def attach(self, loaded, adapter, seed):
        self.parameters = list(adapter.parameters().values())
        self.means = []

    def penalty(self):
        return sum((p - m).square().sum() for p, m in zip(self.parameters, self.means)) if self.means else None

    def after_stage(self, stage, domain, blocks):
        now = [p.detach().clone() for p in self.parameters]
        self.means = [m + (p - m) / stage for m, p in zip(self.means, now)] if self.means else now

    def state(self):
        return {f"mean/{i}": m.clone() for i, m in enumerate(self.means)}

    def load_state(self, state):
        self.means = [state[f"mean/{i}"].clone() for i in range(len(state))]


guards.register("memory", Memory)
"""


class Case(NamedTuple):
    """A configuration to disturb. every: the longest stretch of steps that a fault may cost; cache:
    with an empty token cache of its own, so that it tokenises."""

    name: str
    overrides: tuple[str, ...]
    every: int = 1
    cache: bool = False
    base: tuple[str, ...] = SMOKE

    def prepared(self, root: Path) -> Case:
        """With what it overrides taken out of the base, and the plugin's file where it asks for
        one."""
        keys = {word.split("=")[0] for word in self.overrides}
        self = self._replace(
            base=tuple(word for word in self.base if word.split("=")[0] not in keys)
        )
        if "guard.kind=memory" not in self.overrides:
            return self
        path = root / "memory_guard.py"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(MEMORY)
        return self._replace(overrides=(*self.overrides, f"plugins=[{path}]"))


GAIN = Case("gain_ffn", ())
CASES = (
    GAIN,
    Case(
        "lora with dropout, every 3 steps",
        ("method=lora", "++adapter.config.lora_dropout=0.2", "checkpoint.every_steps=3"),
        3,
    ),
    Case("full, last state kept", ("method=full",)),
    Case(
        "full, all states kept, stages only",
        ("method=full", "checkpoint.keep_stages=all", "checkpoint.every_steps=null"),
        4,
    ),
    Case(
        "carried optimiser, every 3 steps",
        ("train.optimizer=carried", "checkpoint.every_steps=3"),
        3,
    ),
    Case("guard with memory", ("method=gain_attn", "guard.kind=memory")),
    Case(
        "last state kept, stages only, nothing cached",
        ("checkpoint.keep_stages=last", "checkpoint.every_steps=null"),
        4,
        True,
    ),
)
TASK = Case("one task", ("tasks.names=[boolq@8]", "sequence.domains=[smoke_a]"))
REAL = tuple(
    Case(
        f"SmolLM2-135M, {method}",
        (f"method={method}",),
        1,
        False,
        (
            "domain=[medicine,law]",
            "sequence.controls=[]",
            "train.tokens=1024",
            "train.batch_tokens=256",
            "eval.documents=4",
            "tasks=none",
            "checkpoint.every_steps=1",
            "compute.threads=1",
            "compute.device=cpu",
        ),
    )
    for method in ("gain_ffn", "lora")
)


# --- one trial ------------------------------------------------------------------------------------


def log_work(path: str) -> None:
    """In the child: append each optimiser step and each cell that is computed to a file."""
    from gain_cl.measure import scoring
    from gain_cl.runs import train

    def note(text: str) -> None:
        with open(path, "a") as file:
            file.write(text + "\n")

    stage, store = train.stage, scoring.keep_score

    def logged(*arguments: Any, index: int, **keywords: Any) -> Iterator[dict[str, Any]]:
        for row in stage(*arguments, index=index, **keywords):
            note(f"step {index} {row['step']}")
            yield row

    def stored(folder: Path, name: str, *arguments: Any, **keywords: Any) -> None:
        note(f"cell {name}")
        store(folder, name, *arguments, **keywords)

    train.stage, scoring.keep_score = logged, stored  # type: ignore[assignment]


def work(folder: Path) -> list[str]:
    """What ``log_work`` wrote in all attempts of a trial."""
    path = folder / "work.log"
    return path.read_text().splitlines() if path.exists() else []


def redone(folder: Path, kind: str) -> int:
    """How much was computed twice: kind is step or cell."""
    return sum(n - 1 for what, n in Counter(work(folder)).items() if what.startswith(kind))


def own_cache(folder: Path) -> Path:
    """A cache of a trial's own without tokens; what would have to be fetched is that of the usual
    cache."""
    from gain_cl.system import hashes

    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for name in ("packages", "models", "hashes"):
        if (hashes.cache_dir() / name).exists() and not (cache / name).exists():
            (cache / name).symlink_to(hashes.cache_dir() / name)
    return cache


def attempt(
    warm: Warm, case: Case, folder: Path, patch: str | None = None, **keywords: Any
) -> Result:
    """One process of a trial, killed when it hangs."""
    env = {
        **keywords.pop("env", {}),
        **({"GAIN_CL_CACHE": str(own_cache(folder))} if case.cache else {}),
    }
    patches = ";".join(filter(None, (patch, f"campaign_kill:log_work,{folder}/work.log")))
    after = [*keywords.pop("after", ()), (HANG_SECONDS, signal.SIGKILL)]
    return warm.run(
        folder, *case.overrides, base=case.base, env=env, patch=patches, after=after, **keywords
    )


def label(*parts: Any) -> str:
    """A folder name for what these are."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def undisturbed(warm: Warm, case: Case, root: Path, patch: str | None = None) -> tuple[Path, float]:
    """The folder of the run without a fault and its seconds; made once."""
    folder = root / "undisturbed" / label(case, patch)
    if not (folder / "seconds").exists():
        result = attempt(warm, case, folder, patch)
        assert result.code == 0, result.err
        assert not leftovers(folder)
        (folder / "seconds").write_text(str(result.seconds))
    return folder, float((folder / "seconds").read_text())


def complaints(
    folder: Path, reference: Path, result: Result, steps_again: int, cells_again: int | None = None
) -> list[str]:
    """What is wrong with a trial that has come to its end. steps_again, cells_again: what may have
    been computed twice."""
    if result.code != 0:
        return [f"exit code {result.code}: {result.err.strip()[-300:]}"]
    found = []
    mine, theirs = evidence(folder), evidence(reference)
    found += [
        f"{name} differs"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]
    if not theirs:
        found.append("nothing to compare")
    if steps(folder) != steps(reference):
        found.append(f"metrics.jsonl has the steps {steps(folder)}")
    if left := leftovers(folder):
        found.append(f"left behind: {', '.join(left)}")
    if (again := redone(folder, "step")) > steps_again:
        found.append(f"{again} steps were done again, at most {steps_again} may")
    if cells_again is not None and (again := redone(folder, "cell")) > cells_again:
        found.append(f"{again} cells were scored again, at most {cells_again} may")
    return found


# --- kill -9 at I/O boundaries --------------------------------------------------------------------


def trace(warm: Warm, case: Case, folder: Path, patch: str | None = None) -> list[str]:
    """The failpoints that a run reaches, in order."""
    path = folder / "trace"
    folder.mkdir(parents=True, exist_ok=True)
    result = attempt(warm, case, folder, patch, env={"GAIN_CL_FAILPOINT": f"trace:{path}"})
    assert result.code == 0, result.err
    return path.read_text().split()


def boundaries(reached: Sequence[str]) -> list[str]:
    """NAME@N of the first, middle and last time each failpoint is reached."""
    counts = Counter(reached)
    return [
        f"{name}@{n}" for name in counts for n in sorted({1, (counts[name] + 1) // 2, counts[name]})
    ]


def kill_at_boundaries(
    warm: Warm,
    root: Path,
    case: Case,
    points: Sequence[str] | None = None,
    patch: str | None = None,
    only: tuple[str, ...] = ("",),
) -> Outcome:
    """points: NAME@N; None: all that the case reaches, each at its first, middle and last time.
    only: names that begin so."""
    begun, case = time.monotonic(), case.prepared(root)
    outcome = Outcome(f"kill -9 at I/O boundaries, {case.name}")
    if points is None:
        points = [
            p
            for p in boundaries(trace(warm, case, root / "trace" / label(case), patch))
            if p.startswith(only)
        ]
    reference, _ = undisturbed(warm, case, root, patch)
    for point in points:
        folder = root / "boundary" / f"{point.replace('@', '-')}-{time.monotonic_ns()}"
        result = attempt(warm, case, folder, patch, env={"GAIN_CL_FAILPOINT": point})
        if result.code != -signal.SIGKILL:
            outcome.count(
                1, [f"never reached: exit code {result.code} {result.err.strip()[-200:]}"], point
            )
            continue
        result = attempt(warm, case, folder, patch)
        found = complaints(folder, reference, result, case.every, 1)
        outcome.count(1, found, point, evidence_bytes(folder) if result.code == 0 else 0)
        if not found:
            shutil.rmtree(folder)
    outcome.seconds = time.monotonic() - begun
    outcome.notes.append(f"{len({p.split('@')[0] for p in points})} failpoints")
    return outcome


# --- kill -9 at random moments --------------------------------------------------------------------


def kill_at_random(
    warm: Warm,
    root: Path,
    trials: int,
    cases: Sequence[Case] = CASES,
    patch: str | None = None,
    seed: int = 0,
    most: int = 3,
) -> Outcome:
    """trials: runs, each killed up to ``most`` times, at least once, at U(0, T), T the undisturbed
    seconds; the cases in turn."""
    begun, rng = time.monotonic(), random.Random(seed)
    outcome = Outcome("kill -9 at random moments")
    cases = [case.prepared(root) for case in cases]
    trial = unresumable = again = 0
    while trial < trials:
        case = cases[trial % len(cases)]
        reference, seconds = undisturbed(warm, case, root, patch)
        folder, moments = root / "random" / f"{trial}-{time.monotonic_ns()}", []
        for _ in range(rng.randint(1, most)):
            at = rng.uniform(0, seconds)
            if (
                attempt(warm, case, folder, patch, after=[(at, signal.SIGKILL)]).code
                != -signal.SIGKILL
            ):
                break  # it was done before
            moments.append(at)
        if not moments:
            shutil.rmtree(folder)
            continue
        where = (
            f"trial {trial}, {case.name}, killed at {', '.join(f'{m:.2f}' for m in moments)} "
            f"of {seconds:.2f} s"
        )
        result = attempt(warm, case, folder, patch)
        again += redone(folder, "step")
        found = complaints(folder, reference, result, len(moments) * case.every, len(moments))
        outcome.count(len(moments), found, where, evidence_bytes(folder) if result.code == 0 else 0)
        unresumable += result.code != 0
        trial += 1
        if not found:
            shutil.rmtree(folder)
    outcome.seconds = time.monotonic() - begun
    outcome.notes.append(f"{trials} trials, {unresumable} unresumable, {again} steps done again")
    return outcome


# --- asked to stop --------------------------------------------------------------------------------

PLACES = ("train", "score", "tokenise", "load")


def signal_in(place: str, name: str, number: str) -> None:
    """In the child: it gets the signal ``name`` when ``place`` (of PLACES) is reached for the
    ``number``-th time, from 1."""
    from gain_cl.domains import tokens
    from gain_cl.measure import perplexity
    from gain_cl.models import load
    from gain_cl.runs import train

    module, function = {
        "train": (train, "_gradient"),
        "score": (perplexity, "score"),
        "tokenise": (tokens, "tokenize"),
        "load": (load, "load_model"),
    }[place]
    original, reached = getattr(module, function), 0

    def asked(*arguments: Any, **keywords: Any) -> Any:
        nonlocal reached
        reached += 1
        if reached == int(number):
            os.kill(os.getpid(), getattr(signal, name))
        return original(*arguments, **keywords)

    setattr(module, function, asked)


def mark_listening(path: str) -> None:
    """In the child: note when the run begins and ends to listen for signals, in seconds of the
    monotonic clock."""
    from gain_cl.runs import run

    execute = run.execute

    def marked(*arguments: Any) -> Any:
        Path(path).write_text(f"{time.monotonic()}\n")
        try:
            return execute(*arguments)
        finally:
            with open(path, "a") as file:
                file.write(f"{time.monotonic()}\n")

    run.execute = marked  # type: ignore[assignment]


def preempt(
    warm: Warm,
    root: Path,
    trials: int,
    cases: Sequence[Case] = CASES,
    patch: str | None = None,
    seed: int = 0,
) -> Outcome:
    """trials: requests to stop, TERM, USR1 and INT in turn, one at a fixed place and one at a
    random moment in turn. Each must end in exit code 75 with nothing lost: not one step is done
    again."""
    begun, rng = time.monotonic(), random.Random(seed)
    outcome, longest, trial = Outcome("TERM, USR1, INT"), 0.0, 0
    cases = [case.prepared(root) for case in cases]
    while outcome.injected < trials:
        case, name = cases[trial % len(cases)], ("SIGTERM", "SIGUSR1", "SIGINT")[trial % 3]
        reference, seconds = undisturbed(warm, case, root, patch)
        folder = root / "preempt" / f"{trial}-{time.monotonic_ns()}"
        if trial % 2 == 0:
            place = PLACES[trial // 2 % len(PLACES)]
            case = case._replace(cache=case.cache or place == "tokenise")
            done = Counter(line.split()[0] for line in work(reference))
            times = {
                "train": rng.randint(1, done["step"]),
                "score": rng.randint(1, done["cell"]),
            }.get(place, 1)
            where = f"{name} in {place} {times}"
            result = attempt(
                warm,
                case,
                folder,
                ";".join(filter(None, (patch, f"campaign_kill:signal_in,{place},{name},{times}"))),
            )
            listening = True
        else:
            at = rng.uniform(0.1, seconds)
            where = f"{name} at {at:.2f} of {seconds:.2f} s"
            mark = ";".join(
                filter(None, (patch, f"campaign_kill:mark_listening,{folder}/listening"))
            )
            result = attempt(warm, case, folder, mark, after=[(at, getattr(signal, name))])
            marks = (
                (folder / "listening").read_text().split()
                if (folder / "listening").exists()
                else []
            )
            longest = max(longest, result.seconds - at if result.code == 75 else 0.0)
            # before it listens nothing has begun, after it everything is written: it may die of the
            # signal as any program does
            early_or_late = len(marks) != 1 and result.code in (-getattr(signal, name), 130)
            listening = not early_or_late and result.code != 0
        trial += 1
        if not listening:
            shutil.rmtree(folder)
            continue
        if result.code != 75:
            outcome.count(
                1,
                [f"exit code {result.code} instead of 75: {result.err.strip()[-300:]}"],
                f"{case.name}, {where}",
            )
            continue
        result = attempt(warm, case, folder, patch)
        found = complaints(folder, reference, result, 0, 0)
        outcome.count(
            1, found, f"{case.name}, {where}", evidence_bytes(folder) if result.code == 0 else 0
        )
        if not found:
            shutil.rmtree(folder)
    outcome.seconds = time.monotonic() - begun
    outcome.notes.append(f"slowest exit after {longest:.1f} s")
    return outcome


def stuck(path: str) -> None:
    """In the child: the third training step never ends, and says that it has begun."""
    from gain_cl.runs import train

    gradient, reached = train._gradient, 0

    def slow(*arguments: Any) -> Any:
        nonlocal reached
        reached += 1
        if reached == 3:
            os.kill(os.getpid(), signal.SIGINT)
            Path(path).touch()
            while True:
                time.sleep(60)
        return gradient(*arguments)

    train._gradient = slow


def quit_at_once(warm: Warm, root: Path, case: Case = GAIN) -> Outcome:
    """A second Ctrl-C ends a process that does not come to a safe point: at once, and nothing is
    lost by it."""
    begun, outcome, case = time.monotonic(), Outcome("second INT"), case.prepared(root)
    reference, seconds = undisturbed(warm, case, root)
    folder = root / "stuck"
    result = attempt(
        warm,
        case,
        folder,
        f"campaign_kill:stuck,{folder}/begun",
        after=[(3 * seconds + 5, signal.SIGINT)],
    )
    found = [] if (folder / "begun").exists() else ["it was not stuck when the second signal came"]
    if result.code != -signal.SIGINT:
        found.append(f"exit code {result.code}")
    last = attempt(warm, case, folder)
    outcome.count(
        1,
        found + complaints(folder, reference, last, case.every),
        "second INT",
        evidence_bytes(folder),
    )
    outcome.seconds = time.monotonic() - begun
    return outcome
