"""``python -m gain_cl verify-resume``: whether a run that is killed and started again ends as an
undisturbed one, on this machine.

A run is carried out undisturbed, then once more in a folder of its own and killed at random
moments, each time started again by the same command. What must not depend on it (``evidence``) is
compared by SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gain_cl.compose import composition
from gain_cl.compose.messages import key_of
from gain_cl.config.schema import RunConfig
from gain_cl.errors import (
    PREEMPTED,
    ConfigError,
    DataError,
    InUseError,
    PreemptedError,
    StorageError,
)
from gain_cl.measure import record
from gain_cl.system import signals
from gain_cl.system.files import sha256
from gain_cl.system.terminal import console, printable
from gain_cl.tools.command import Parser

DEFAULT = ("debug=smoke", "train.steps=40")
"""What is run when nothing else is asked for: seconds of work, on a tiny random model."""

OWN = ("results_dir", "resume", "force", "allow_change")
"""Settings that are decided here."""

IN_STARTUP, AT_A_SAVE = 1 / 4, 1 / 2
"""Share of the kills before the run goes on where it stopped, and of those soon after a checkpoint,
drawn among the ones to come; the others fall uniformly into what is left of its work, most of which
need not be training."""

PATIENCE_SECONDS = 120.0
"""How long a run may take to save and stop after SIGTERM before it counts as hung."""


class Seen(NamedTuple):
    """A file, or what of it must not differ: SHA-256 and size in bytes."""

    sha256: str
    bytes: int


def evidence(folder: Path) -> dict[str, Seen]:
    """Everything in folder/runs and folder/results that must not depend on interruptions, by path:
    per-item values, scores, trained weights, matrix and heat map; the record and metrics.jsonl but
    for times and places."""
    found: dict[str, Seen] = {}
    patterns = (
        "results/runs/*.items.parquet",
        "runs/*/matrix.*",
        "runs/*/stages/*/*.safetensors",
        "runs/*/stages/*/scores.parquet",
    )
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            found[path.relative_to(folder).as_posix()] = Seen(sha256(path), path.stat().st_size)
    derived: dict[Path, Any] = {
        p: record.outcome(record.load(p).record) for p in sorted(folder.glob("results/runs/*.json"))
    }
    derived |= {p: _steps(p) for p in sorted(folder.glob("runs/*/metrics.jsonl"))}
    for path, data in derived.items():
        text = json.dumps(data, sort_keys=True, allow_nan=False).encode()
        found[path.relative_to(folder).as_posix()] = Seen(
            hashlib.sha256(text).hexdigest(), len(text)
        )
    return found


def _steps(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl about training and scores, without their times."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    timed = ("seconds", "row", "train", "eval_seconds", "task_seconds")
    return [
        {k: v for k, v in row.items() if k not in timed}
        for row in rows
        if row["kind"] in ("step", "dev", "spike", "eval", "task")
    ]


# --- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """command: the run but for its places; seed: of the moments."""

    command: list[str]
    kills: int
    signal: signal.Signals
    seed: int


@dataclass(frozen=True)
class Pace:
    """Seconds of an undisturbed run: until it has loaded everything, and after that. saves: steps
    of its checkpoints, in order; between: the seconds between two."""

    startup: float
    work: float
    saves: tuple[int, ...] = ()
    between: float = 0.0

    def left(self, kills: int) -> float:
        """About how long this many kills and the end of the run take."""
        return kills * (self.startup + self.work / 2) + self.startup + self.work


class Moment(NamedTuple):
    """When to interrupt an attempt: seconds after its start (early), after its checkpoint of so
    many steps or a later one (save), or after it had loaded everything."""

    early: bool
    seconds: float
    save: int | None = None


@dataclass(frozen=True)
class Ended:
    """An attempt. startup: seconds until it had loaded everything (None: it did not come so far);
    stopping: seconds from the signal to the end of the process (None: no signal was sent);
    training: seconds from its first checkpoint to its last (None: none was seen)."""

    code: int
    seconds: float
    startup: float | None
    stopping: float | None
    training: float | None = None


def main(argv: list[str]) -> int:
    """Print the table and the verdict; DataError (exit 65) when an interrupted run ends
    otherwise."""
    parser = Parser(
        "verify-resume",
        usage="python -m gain_cl verify-resume [--kills N] [--signal KILL|TERM] [--seed S] "
        "[--keep DIR] [GROUP=NAME] [KEY=VALUE]",
        description="Carry out a short run undisturbed, then again with kills at random moments, "
        "and compare every result by SHA-256.",
    )
    words = (
        f"overrides of run (default: {' '.join(DEFAULT)}); the work is done in a folder "
        "beside output_dir"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=words)
    parser.add_argument(
        "--kills",
        type=int,
        default=5,
        metavar="N",
        help="how often the run is interrupted (default: %(default)s)",
    )
    kinds = "KILL ends it at once, TERM asks it to save and stop (default: %(default)s)"
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL", help=kinds)
    parser.add_argument("--seed", type=int, help="of the moments (default: random, and printed)")
    parser.add_argument(
        "--keep", metavar="DIR", help="work in this new or empty folder, and leave it"
    )
    parser.add_presets()
    args = parser.parse_intermixed_args(argv)
    if args.kills < 1:
        raise ConfigError(f"--kills {args.kills}", "gain_cl verify-resume", "give 1 or more")
    overrides = args.overrides or list(DEFAULT)
    for key in (k for k in map(key_of, overrides) if k in OWN):
        raise ConfigError(f"{key} is decided by verify-resume", "command line", f"leave {key}= out")
    config = composition.compose(overrides, args.config_dir, args.plugin)
    command = [
        sys.executable,
        "-m",
        "gain_cl",
        "run",
        *(o for o in overrides if key_of(o) not in ("output_dir", "track.backend")),
    ]
    command += [
        "track.backend=none",
        *(f"--config-dir={d}" for d in args.config_dir),
        *(f"--plugin={f}" for f in args.plugin),
    ]
    if config.checkpoint.every_steps is None:
        command.append(f"checkpoint.every_steps={_every(config)}")
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    with signals.listening(), _workplace(config.output_dir, args.keep) as folder:
        _compare(
            Asked(command, args.kills, getattr(signal, f"SIG{args.signal}"), seed), config, folder
        )
    return 0


@contextmanager
def _workplace(output_dir: str, keep: str | None) -> Iterator[Path]:
    """The folder --keep names, or one on the disk of output_dir that is removed at the end."""
    place = Path(keep if keep is not None else output_dir).expanduser().absolute()
    try:
        if keep is not None:
            place.mkdir(parents=True, exist_ok=True)
            if any(place.iterdir()):
                raise ConfigError("the folder is not empty", f"--keep {keep}", "name a new one")
            folder = place
        else:
            while not place.is_dir():
                place = place.parent
            folder = Path(tempfile.mkdtemp(dir=place, prefix=".tmp-verify-resume-"))
    except OSError as error:
        raise StorageError(
            f"cannot write: {error.strerror or error}", str(place), "name another folder"
        ) from error
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _compare(asked: Asked, config: RunConfig, folder: Path) -> None:
    """The undisturbed run; then interrupted ones, each to its end, until all kills were made:
    mostly one takes them all."""
    from rich.console import Console
    from rich.text import Text

    err = Console(stderr=True, highlight=False, soft_wrap=True)
    with err.status("") as status:  # seen on a terminal only

        def say(text: str, left: float | None = None) -> None:
            rest = "" if left is None else f", about {math.ceil(left)} s left"
            err.print(printable(text + rest), markup=False)
            status.update(Text(printable(text + rest)))

        def tell(text: str) -> None:
            status.update(Text(printable(text)))

        say(f"seed {asked.seed}: {' '.join(asked.command[4:])}")
        undisturbed = folder / "undisturbed"
        first = _attempt(asked, undisturbed, tell=tell)
        if first.code:
            _gave_up(first.code, undisturbed)
        reference = evidence(undisturbed)
        startup = first.startup if first.startup is not None else first.seconds / 2
        saves = () if first.training is None else _saves(config)
        pace = Pace(
            startup, first.seconds - startup, saves, (first.training or 0.0) / max(1, len(saves))
        )
        draw, hits, slowest, rounds, resumed = random.Random(asked.seed), Counter[str](), 0.0, 0, 0
        say(
            f"undisturbed: {first.seconds:.1f} s, {startup:.1f} s of it start-up",
            pace.left(asked.kills),
        )
        while (before := hits.total()) < asked.kills:
            rounds += 1
            place, left = folder / f"interrupted-{rounds}", pace
            while True:
                moment = _moment(draw, left, not resumed) if hits.total() < asked.kills else None
                ended = _attempt(asked, place, moment, tell)
                if ended.code == 0:
                    break
                if ended.stopping is None or ended.code not in (
                    -asked.signal,
                    *([PREEMPTED] if asked.signal == signal.SIGTERM else []),
                ):
                    _gave_up(ended.code, place, hits.total())
                hit = _hit(place, ended)
                hits[hit] += 1
                slowest = max(slowest, ended.stopping)
                at = _saved(place)
                resumed += at > 0 and hit != "finishing"
                left = replace(left, saves=tuple(save for save in pace.saves if save > at))
                if ended.startup is not None:
                    left = replace(
                        left, work=max(left.work - (ended.seconds - ended.startup), pace.work / 20)
                    )
                say(
                    f"kill {hits.total()}: {ended.seconds:.1f} s after a start, in {hit}",
                    pace.left(asked.kills - hits.total()),
                )
            if (
                hits.total() == before and ended.startup is not None
            ):  # the first run was slower: it prepared the text
                pace = replace(pace, startup=ended.startup, work=ended.seconds - ended.startup)
            say(f"interrupted run {rounds} finished after {hits.total() - before} kills")
            found = evidence(place)
            if found != reference:
                break
    _table(reference, found)
    if wrong := [
        name
        for name in sorted({**reference, **found}, key=_order)
        if reference.get(name) != found.get(name)
    ]:
        where = (
            "" if config.compute.device == "cpu" else " and, on a GPU, compute.deterministic=true"
        )
        do = f"look at compute.threads{where}, at plugins, and at the files that --keep DIR leaves"
        raise DataError(
            f"resume is NOT exact here: {wrong[0]} differs",
            f"{len(wrong)} of {len(reference)} files, seed {asked.seed}",
            do,
        )
    told = f"hit: {', '.join(f'{count} in {name}' for name, count in hits.items())}"
    print(
        told
        + (f"; slowest to save and stop: {slowest:.1f} s" if asked.signal != signal.SIGKILL else "")
    )
    size = rounds * sum(seen.bytes for seen in reference.values())
    compared = f"{rounds * len(reference)} files, {size:,} bytes compared"
    if saves and not resumed:
        do = "give more --kills, or a longer run with train.steps="
        raise DataError(
            "no kill came between a checkpoint and the end: whether resume is exact is not known",
            compared,
            do,
        )
    gone_on = f" ({resumed} with a checkpoint to go on from)" if saves else ""
    print(f"resume is exact here: {hits.total()} kills{gone_on}, {compared}", flush=True)


def _moment(draw: random.Random, pace: Pace, first: bool = False) -> Moment:
    """first: no kill has come behind a checkpoint yet, and this one does."""
    kind = draw.random()
    if pace.saves and (first or IN_STARTUP <= kind < IN_STARTUP + AT_A_SAVE):
        return Moment(
            False, draw.uniform(0, pace.between), draw.choice(pace.saves[:-1] or pace.saves)
        )
    early = kind < IN_STARTUP
    return Moment(early, draw.uniform(0, pace.startup if early else pace.work))


def _saves(config: RunConfig) -> tuple[int, ...]:
    """Steps of the whole run at which a checkpoint is saved, but for those that are due by the
    minute."""
    size, every = config.stage.stage_steps, _every(config)
    return tuple(
        stage * size + step
        for stage in range(len(config.stages))
        for step in (*range(every, size, every), size)
    )


def _every(config: RunConfig) -> int:
    """Steps between checkpoints: so few, unless the user says, that a kill loses some steps."""
    return config.checkpoint.every_steps or max(2, config.train.stage_steps // 5)


def _saved(place: Path) -> int:
    """Steps of the newest checkpoint; 0 when there is none."""
    return max(
        (int(path.name.removeprefix("step-")) for path in place.glob("runs/*/ckpt/step-*")),
        default=0,
    )


def _attempt(
    asked: Asked,
    place: Path,
    moment: Moment | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Ended:
    """One process of the run in ``place``, from its start to its end, which a signal at ``moment``
    may bring about.

    tell: is given what the process says last."""
    place.mkdir(exist_ok=True)
    folders = {"output_dir": place / "runs", "results_dir": place / "results"}
    command = [
        *asked.command,
        *(
            f"{key}={json.dumps(str(path), ensure_ascii=False, allow_nan=False)}"
            for key, path in folders.items()
        ),
    ]
    before, begun = _starts(place), time.monotonic()
    startup, sent, said = None, None, 0
    newest, saved_at = 0, list[tuple[int, float]]()  # steps of a checkpoint, when it was first seen
    with open(place / "log.txt", "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while process.poll() is None:
                now = time.monotonic() - begun
                if (name := signals.asked()) is not None:
                    raise PreemptedError(f"stopped by {name}", "", "nothing was kept: run it again")
                if startup is None and _starts(place) > before:
                    startup = now
                if (saved := _saved(place)) > newest:
                    newest, saved_at = saved, [*saved_at, (saved, now)]
                if moment is not None and sent is None:
                    origin = 0.0 if moment.early else startup
                    if moment.save is not None:
                        origin = next(
                            (at for steps, at in saved_at if steps >= (moment.save or 0)), None
                        )
                    if origin is not None and now - origin >= moment.seconds:
                        os.killpg(process.pid, asked.signal)
                        sent = now
                if sent is not None and now - sent > PATIENCE_SECONDS:
                    what = (
                        f"the run did not stop within {PATIENCE_SECONDS:.0f} s of "
                        f"{asked.signal.name}"
                    )
                    raise DataError(
                        what, f"seed {asked.seed}", "look at its log, which --keep DIR leaves"
                    )
                if (size := os.fstat(log.fileno()).st_size) > said:
                    said = size
                    tell(_lines(place)[-1])
                time.sleep(0.005)
        finally:
            with suppress(ProcessLookupError, PermissionError):  # also what it may have started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - begun
    training = saved_at[-1][1] - saved_at[0][1] if saved_at else None
    return Ended(
        process.returncode, seconds, startup, None if sent is None else seconds - sent, training
    )


def _starts(place: Path) -> int:
    """Bytes of the list of attempts, to which a run adds when it has loaded everything."""
    return sum(path.stat().st_size for path in place.glob("runs/*/attempts.jsonl"))


def _hit(place: Path, ended: Ended) -> str:
    """What a killed attempt was at, by what it left."""
    if ended.startup is None:
        return "start-up"
    if any(place.glob("results/runs/*.json")):
        return "finishing"
    if not any(place.glob("runs/*/stages/[0-9]*")) or any(place.glob("runs/*/cells/*")):
        return "scoring"
    return "training or saving"


def _gave_up(code: int, place: Path, kills: int = 0) -> NoReturn:
    """The run ended as it should not; its last words are in the log."""
    lines = _lines(place)
    said = next(
        (
            line.removeprefix("gain_cl: error: ")
            for line in reversed(lines)
            if line.startswith("gain_cl: error: ")
        ),
        None,
    )
    told = f"exit code {code}: {said or lines[-1]}"
    if kills:
        raise DataError(
            f"resume is NOT exact here: started again after kill {kills} the run ends with {told}"
        )
    kind = {64: ConfigError, 73: InUseError, 74: StorageError, 75: PreemptedError}.get(
        code, DataError
    )
    raise kind(f"the run fails undisturbed with {told}")


def _lines(place: Path) -> list[str]:
    """What the attempts said, without blank lines; not empty."""
    said = (place / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.strip() for line in said if line.strip()] or [""]


def _order(name: str) -> tuple[bool, str]:
    """What was computed before what was derived from it."""
    return "/stages/" not in name, name


def _table(reference: dict[str, Seen], found: dict[str, Seen]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("file", "bytes", "undisturbed", "interrupted", "equal"):
        table.add_column(
            name,
            overflow="fold",
            no_wrap=name != "file",
            justify="right" if name == "bytes" else "left",
        )
    for name in sorted({**reference, **found}, key=_order):
        one, two = reference.get(name), found.get(name)
        hashes = [seen.sha256[:12] if seen else "missing" for seen in (one, two)]
        size = f"{(one or two or Seen('', 0)).bytes:,}"
        table.add_row(
            Text(printable(name.split("/", 2)[-1])),
            size,
            *hashes,
            Text("yes") if one == two else Text("NO", "bold red"),
        )
    console().print(table)
