"""Disks that are full, read-only or lost, and a hub that does not answer, in real runs.

``python tests/test_faults_resources.py`` carries out the full campaigns of docs/reliability.md.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from campaign import SMOKE, Outcome, Result, Warm, evidence, evidence_bytes, leftovers, steps

import fake_hub
from gain_cl.errors import GainError
from gain_cl.measure import record
from gain_cl.system import checkpoint

STEPS = 3
BASE = (*SMOKE, "domain=[smoke_a,smoke_b]", f"train.steps={STEPS}")

Told = tuple[list[str], int]
"""What is wrong (nothing, it is to be hoped) and how many bytes were compared."""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits, capabilities and mounts of Linux"
)


def wrong(**facts: object) -> list[str]:
    """The names of what does not hold."""
    return [name for name, holds in facts.items() if not holds]


class Bench:
    """A warm parent, a place for trials and the undisturbed run they are compared with."""

    def __init__(self, warm: Warm, root: Path) -> None:
        self.warm, self.root, self.count = warm, root, 0

    def new(self) -> Path:
        self.count += 1
        return self.root / str(self.count)

    def run(self, folder: Path, patch: str | None = None, *overrides: str) -> Result:
        """What is printed goes beside the folder, so that a fault of the folder does not hide
        it."""
        words = [
            "run",
            *BASE,
            *overrides,
            f"output_dir={folder}/runs",
            f"results_dir={folder}/results",
        ]
        return self.warm.run(
            folder.parent / f"{folder.name}.printed",
            argv=words,
            patch=patch and f"injections:{patch}",
        )

    @functools.cached_property
    def expected(self) -> dict[str, str]:
        folder = self.root / "undisturbed"
        assert self.run(folder).code == 0
        return evidence(folder)


def one_line(result: Result) -> dict[str, object]:
    lines = [line for line in result.err.splitlines() if line.startswith("gain_cl: error:")]
    return {
        f"exit_74_not_{result.code}": result.code == 74,
        f"one_line {result.err[-300:]}": len(lines) == 1 and "Traceback" not in result.err,
    }


def torn(folder: Path) -> list[str]:
    """What a reader could see and that is not whole: records, saved states, cells, JSON, tables."""
    bad = []
    for path in folder.glob("runs/*/ckpt/step-*"):
        bad += broken(path, checkpoint.verify)
    for path in folder.glob("runs/*/stages/[0-9]*"):
        bad += broken(path, checkpoint.verify)
    for path in folder.glob("results/runs/*.json"):
        bad += broken(path, record.load)
    for pattern, read in (
        ("**/[!.]*.json", lambda p: json.loads(p.read_bytes())),
        ("**/[!.]*.parquet", pd.read_parquet),
    ):
        for path in folder.glob(pattern):
            if not any(part.startswith(".tmp-") for part in path.parts):
                bad += broken(path, read)
    return bad


def broken(path: Path, read: Callable[[Path], Any]) -> list[str]:
    try:
        read(path)
    except (GainError, ValueError, OSError) as error:
        return [f"{path.name}: {error}"]
    return []


def states(folder: Path) -> int:
    """The furthest step of the run that is saved."""
    inside = [int(p.name.removeprefix("step-")) for p in folder.glob("runs/*/ckpt/step-*")]
    return max(
        [0, *inside, *(STEPS * int(p.name[:2]) for p in folder.glob("runs/*/stages/[0-9]*"))]
    )


def goes_on(bench: Bench, folder: Path, patch: str | None = None) -> dict[str, object]:
    """The same command with the fault gone: from the newest state that is saved to the undisturbed
    outcome."""
    saved, stage, finished = (
        states(folder),
        len(list(folder.glob("runs/*/stages/[0-9]*"))),
        bool(list(folder.glob("results/runs/*.json"))),
    )
    again = bench.run(folder, patch)
    facts: dict[str, object] = {
        f"resume_exit_0 {again.err[-300:]}": again.code == 0,
        "resume_identical": evidence(folder) == bench.expected,
        f"no_leftovers {leftovers(folder)}": leftovers(folder) == [],
        "each_step_once": steps(folder) == [(s, i) for s in (1, 2) for i in range(1, STEPS + 1)],
    }
    if saved and not finished:
        at = f"stage {min(stage, 2)} of 2", f"step {saved - STEPS * (min(stage, 2) - 1)} of {STEPS}"
        facts["from_the_newest_state"] = all(words in again.out for words in ("resumed at", *at))
    return facts


# --- a full disk ----------------------------------------------------------------------------------

SIZES = [
    0,
    1,
    30,
    64,
    90,
    150,
    221,
    300,
    400,
    500,
    600,
    900,
    1_100,
    1_300,
    2_000,
    2_500,
    4_000,
    6_000,
    20_000,
    200_000,
]
"""Bytes no file may exceed: from nothing to more than the largest file of the run."""


def small_files(bench: Bench, size: int) -> Told:
    """RLIMIT_FSIZE from the start of the run: a write stops in the middle of whichever file is too
    large."""
    folder = bench.new()
    result = bench.run(folder, f"small_files,{size}")
    whole = size == max(SIZES)
    facts = (
        {"exit_0": result.code == 0, "identical": evidence(folder) == bench.expected}
        if whole
        else one_line(result)
    )
    facts |= {f"nothing_torn {torn(folder)}": not torn(folder)}
    return wrong(**facts, **(goes_on(bench, folder) if not whole else {})), evidence_bytes(folder)


PLACES = [
    ("json.before_write", 1),  # run.json
    ("json.after_rename", 1),  # attempts.jsonl, metrics.jsonl
    ("json.before_write", 2),  # the first cell of stage 0
    ("cell.after", 3),  # metrics.jsonl
    ("stage.before", 1),
    ("save.after_fsync", 1),  # scores.parquet of stage 0
    ("save.before_write", 3),  # tensors of the first checkpoint
    ("save.before_write", 5),  # its state.json
    ("save.after_fsync", 5),  # its manifest
    ("save.before_write", 6),  # the second checkpoint
    ("commit", 1),  # metrics.jsonl in the middle of a stage
    ("json.before_write", 6),  # a cell of stage 1
    ("stage.before", 2),
    ("stage.after", 2),
    ("save.before_write", 21),
    ("stage.before", 3),
    ("stage.after", 3),
    ("record.before", 1),
    ("parquet.before_write", 1),
    ("parquet.after_fsync", 1),  # the record
    ("record.after", 1),  # matrix.csv
    ("csv.after_rename", 1),  # matrix.png
    ("png.after_rename", 1),  # the last line of metrics.jsonl
]
"""(failpoint, how often it was reached) from where on nothing is taken any more, and what is
written next."""


def disk_full(bench: Bench, place: str, at: int, room: int) -> Told:
    """From a place on, no file takes more than ``room`` bytes."""
    folder = bench.new()
    result = bench.run(folder, f"disk_full,{place},{at},{room}")
    return wrong(
        **one_line(result),
        **{f"nothing_torn {torn(folder)}": not torn(folder)},
        **goes_on(bench, folder),
    ), evidence_bytes(folder)


REFUSED = [
    ("json.before_write", 1, "EROFS"),
    ("json.after_write", 3, "EIO"),
    ("save.after_write", 1, "EIO"),
    ("save.before_write", 3, "ENOSPC"),
    ("save.before_rename", 3, "EROFS"),
    ("save.after_rename", 3, "EIO"),
    ("prune.before", 1, "EROFS"),
    ("prune.between", 1, "EIO"),
    ("cell.before", 5, "EACCES"),
    ("stage.after", 2, "EROFS"),
    ("record.before", 1, "EROFS"),
    ("parquet.after_fsync", 1, "EIO"),
    ("record.after", 1, "EROFS"),
    ("png.after_rename", 1, "EROFS"),
]


def refused(bench: Bench, place: str, at: int, code: str) -> Told:
    """From a place on, every change of a folder is refused (a file system that went read-only after
    an error)."""
    folder = bench.new()
    result = bench.run(folder, f"refused,{place},{at},{code}")
    return wrong(
        **one_line(result),
        **{f"nothing_torn {torn(folder)}": not torn(folder)},
        **goes_on(bench, folder),
    ), evidence_bytes(folder)


def read_only(bench: Bench, name: str) -> Told:
    """A folder whose permissions forbid writing, met by a run that has to go on there; the process
    has no privilege."""
    folder = bench.new()
    dead = bench.run(folder, "die,commit,2")
    target = (
        folder / "results/runs" if name == "results" else next(folder.glob("runs/*gain*")) / name
    )
    target.mkdir(parents=True, exist_ok=True)
    target.chmod(0o555)
    try:
        result = bench.run(folder, "unprivileged")
    finally:
        target.chmod(0o755)
    facts = {"killed": dead.code == -9, **one_line(result), "says_where": str(target) in result.err}
    return wrong(**facts, **goes_on(bench, folder, "unprivileged")), evidence_bytes(folder)


READ_ONLY = ["", "ckpt", "stages", "results"]


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], int]]:
    """A file system of so many KiB; what is yielded gives it another size. Skips where mounting is
    not allowed."""
    folder.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"mount: {made.stderr.strip()}")
    try:
        yield lambda new: subprocess.check_call(
            ["mount", "-o", f"remount,size={new}k", str(folder)]
        )
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


DISKS = [4, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128, 144, 160, 192, 224, 256, 1024]
"""KiB of a whole file system for the run."""


def full_disk(bench: Bench, size: int) -> Told:
    """A real file system that fills up; then it grows."""
    folder = bench.new() / "disk"
    with small_disk(folder, size) as resize:
        result = bench.run(folder)
        if result.code == 0:
            facts: dict[str, object] = {
                "identical": evidence(folder) == bench.expected,
                "small": size > 128,
            }
        else:
            facts = one_line(result) | {f"nothing_torn {torn(folder)}": not torn(folder)}
            resize(65_536)
            facts |= goes_on(bench, folder)
        compared = evidence_bytes(folder)
    return wrong(**facts), compared


def full_terminal(bench: Bench) -> Told:
    """The file that the command prints into is on the full disk, during the run and when a finished
    one is shown again: what is printed is lost, the run is not."""
    folder = bench.new()
    facts = {"exit_0": bench.run(folder, "full_stdout").code == 0}
    facts |= {f"nothing_torn {torn(folder)}": not torn(folder)} | goes_on(bench, folder)
    facts["again exit_0"] = bench.run(folder, "full_stdout").code == 0
    return wrong(**facts), evidence_bytes(folder)


# --- a hub that does not answer -------------------------------------------------------------------

ANSWERS = {
    "refused": 74,
    "black hole": 74,
    "401": 65,
    "403": 65,
    "404": 65,
    "429": 74,
    "500": 74,
    "cut": 74,
}
"""What the hub does, and the exit code of a run that needs a model from it."""


class Hub:
    """The hub of fake_hub behind a door that misbehaves on request: ``answer`` is a key of ANSWERS,
    or "well"."""

    def __init__(self, root: Path) -> None:
        self.root, self.answer, self.asked = root, "well", 0

    @contextmanager
    def open(self) -> Iterator[Hub]:
        hub = self
        never = threading.Event()

        class Door(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                hub.asked += 1

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                if hub.answer == "black hole":
                    hub.asked += 1
                    never.wait(60)
                elif hub.answer.isdigit():
                    self.send_error(int(hub.answer))
                else:
                    self.pass_on()

            def pass_on(self) -> None:
                asked = urllib.request.Request(inside + self.path, method=self.command)
                try:
                    with opener.open(asked) as found:
                        body = found.read()
                except urllib.error.HTTPError as error:
                    self.send_error(error.code)
                    return
                self.send_response(200)
                for name in (
                    "Content-Type",
                    "ETag",
                    "X-Repo-Commit",
                    "X-Linked-Size",
                    "Content-Length",
                ):
                    if name in found.headers:
                        self.send_header(name, found.headers[name])
                self.end_headers()
                cut = hub.answer == "cut" and self.path.endswith("model.safetensors")
                self.wfile.write(body[: len(body) // 2] if cut else body)

        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with fake_hub.serve(self.root) as (inside, _):
            server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self.address = f"http://127.0.0.1:{server.server_address[1]}"
            try:
                yield self
            finally:
                never.set()
                server.shutdown()
                server.server_close()


def put_model(root: Path) -> None:
    """A tiny model under the name org/tiny."""
    from conftest import tiny

    loaded = tiny("llama")
    loaded.model.save_pretrained(root / "models/org/tiny")
    loaded.tokenizer.save_pretrained(root / "models/org/tiny")


HUB_MODEL = (
    *(
        "model.path=org/tiny",
        f"model.revision={fake_hub.SHA}",
        "model.dtype=float32",
        "sequence=smoke",
        "domain=[smoke_a]",
        "tasks=none",
    ),
    *(
        "train.lr=1e-3",
        "train.tokens=null",
        "train.steps=2",
        "train.block=32",
        "train.batch_tokens=64",
        "compute.threads=1",
    ),
    *("eval.documents=2", "eval.window=16", "eval.context=64", "compute.device=cpu"),
)


def hub_away(bench: Bench, hub: Hub, answer: str) -> Told:
    """With the model in the cache nobody is asked; without it one line says what to do, and the
    same command works when the hub does."""

    def run(folder: Path, home: Path) -> Result:
        address = "http://127.0.0.1:9" if hub.answer == "refused" else hub.address
        words = ["run", *HUB_MODEL, f"output_dir={folder}/runs", f"results_dir={folder}/results"]
        return bench.warm.run(
            folder.parent / f"{folder.name}.printed",
            argv=words,
            patch=f"injections:hub,{address},{home}",
        )

    online, cached, fresh, home = (
        bench.root / "online",
        bench.new(),
        bench.new(),
        bench.root / "home",
    )
    if not online.exists():
        hub.answer = "well"
        first = run(online, home)
        assert first.code == 0, first.err
    hub.answer, asked = answer, hub.asked
    again = run(cached, home)
    facts: dict[str, object] = {
        f"cached_exit_0 {again.err[-300:]}": again.code == 0,
        "nobody_asked": hub.asked == asked,
    }
    facts["cached_identical"] = evidence(cached) == evidence(online)
    own = bench.root / f"home of {fresh.name}".replace(" ", "-")
    refused = run(fresh, own)
    lines = [line for line in refused.err.splitlines() if line.startswith("gain_cl: error:")]
    facts |= {
        f"exit_{ANSWERS[answer]}_not_{refused.code}": refused.code == ANSWERS[answer],
        f"one_line {refused.err[-300:]}": len(lines) == 1
        and "org/tiny" in lines[0]
        and "Traceback" not in refused.err,
        "asked": answer == "refused" or hub.asked > asked,
        "nothing_half_fetched": not list(own.glob("hub/**/snapshots/*/model.safetensors")),
    }
    hub.answer = "well"
    later = run(fresh, own)
    facts |= {
        f"later_exit_0 {later.err[-300:]}": later.code == 0,
        "later_identical": evidence(fresh) == evidence(online),
    }
    return wrong(**facts), evidence_bytes(cached) + evidence_bytes(fresh)


# --- what CI does ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Warm(composed_once=True) as warm:
        yield Bench(warm, tmp_path_factory.mktemp("resources"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    put_model(root)
    with Hub(root).open() as hub:
        yield hub


def some(trials: list[Any], *quick: int) -> list[Any]:
    """Those of the named places in the default run, the others with the slow tests."""
    return [
        pytest.param(t, marks=[] if i in quick else pytest.mark.slow, id=str(t))
        for i, t in enumerate(trials)
    ]


@pytest.mark.parametrize("size", some(SIZES[::3], 2))
def test_small_files(bench: Bench, size: int) -> None:
    assert small_files(bench, size)[0] == []


@pytest.mark.parametrize("place", some(PLACES[::2], 3))
def test_disk_full(bench: Bench, place: tuple[str, int]) -> None:
    assert disk_full(bench, *place, room=10)[0] == []


@pytest.mark.parametrize("place", some(REFUSED[::2], 3))
def test_refused(bench: Bench, place: tuple[str, int, str]) -> None:
    assert refused(bench, *place)[0] == []


@pytest.mark.parametrize("name", some(READ_ONLY, 1))
def test_read_only(bench: Bench, name: str) -> None:
    assert read_only(bench, name)[0] == []


@pytest.mark.parametrize("size", some(DISKS[::4], 2))
def test_full_disk(bench: Bench, size: int) -> None:
    assert full_disk(bench, size)[0] == []


def test_full_terminal(bench: Bench) -> None:
    assert full_terminal(bench)[0] == []


def test_saving_in_place_is_noticed(bench: Bench) -> None:
    """A twin that writes checkpoints where they are read."""
    folder = bench.new()
    result = bench.run(folder, "twin_in_place;injections:disk_full,save.before_write,6,1000")
    assert result.code and torn(folder)


@pytest.mark.parametrize("answer", some(list(ANSWERS), 6))
def test_hub_away(bench: Bench, hub: Hub, answer: str) -> None:
    assert hub_away(bench, hub, answer)[0] == []


# --- the full campaigns ---------------------------------------------------------------------------


def carry_out(name: str, trials: list[Callable[[], Told]]) -> Outcome:
    outcome, begun = Outcome(name), time.monotonic()
    for number, trial in enumerate(trials):
        complaints, compared = trial()
        outcome.count(1, complaints, f"trial {number}", compared)
    outcome.seconds = time.monotonic() - begun
    print(outcome.row(), *outcome.failures, sep="\n", flush=True)
    return outcome


def main() -> int:
    with tempfile.TemporaryDirectory() as root, Warm(composed_once=True) as warm:
        bench, of = Bench(warm, Path(root)), functools.partial
        put_model(Path(root) / "served")
        with Hub(Path(root) / "served").open() as hub:
            done = [
                carry_out(
                    "disk full: RLIMIT_FSIZE from the start",
                    [of(small_files, bench, size) for size in SIZES],
                ),
                carry_out(
                    "disk full: from a place on",
                    [of(disk_full, bench, *p, room=room) for room in (0, 10, 700) for p in PLACES],
                ),
                carry_out(
                    "disk full: a real small file system",
                    [of(full_disk, bench, size) for size in DISKS],
                ),
                carry_out("file system refuses changes", [of(refused, bench, *p) for p in REFUSED]),
                carry_out(
                    "folder without write permission",
                    [of(read_only, bench, name) for name in READ_ONLY],
                ),
                carry_out("printing into a full disk", [of(full_terminal, bench)]),
                carry_out("hub away", [of(hub_away, bench, hub, answer) for answer in ANSWERS]),
            ]
    return any(outcome.failures for outcome in done)


if __name__ == "__main__":
    sys.exit(main())
