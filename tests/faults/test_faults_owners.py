"""One run has one owner, one file one result: many processes at once, and sweeps that are repeated,
broken and killed.

``python tests/test_faults_owners.py`` carries out the full campaigns of docs/reliability.md.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from campaign import SMOKE, Outcome, Result, Warm, evidence, evidence_bytes, leftovers, steps

import synthetic
from conftest import HELPERS
from gain_cl.errors import GainError, InUseError
from gain_cl.measure import record
from gain_cl.system import lock

BASE = (*SMOKE, "domain=[smoke_a,smoke_b]", "train.steps=3")
STARTERS, WRITERS = 16, 64

Told = tuple[list[str], int]
"""What is wrong (nothing, it is to be hoped) and how many bytes were compared."""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork and flock")


def wrong(**facts: object) -> list[str]:
    """The names of what does not hold."""
    return [name for name, holds in facts.items() if not holds]


def at_once(
    count: int, work: Callable[[int], int], meanwhile: Callable[[list[int]], None] = lambda _: None
) -> list[int]:
    """Exit codes of ``count`` forked processes that begin ``work(number)`` at one moment; -9: it
    had to be killed after two minutes. meanwhile(pids) is called once they have begun."""
    ready, go = os.pipe(), os.pipe()
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                os.close(go[1])
                os.write(ready[1], b".")
                os.read(go[0], 1)  # returns when the parent closes its end
                code = work(number)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    waiting = count
    while waiting:
        waiting -= len(os.read(ready[0], waiting))
    os.close(go[1])
    meanwhile(pids)
    codes, until = [], time.monotonic() + 120
    for pid in pids:
        while (
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            and time.monotonic() < until
        ):
            time.sleep(0.005)
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(pid, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    for end in (*ready, go[0]):
        os.close(end)
    return codes


# --- two owners -----------------------------------------------------------------------------------


def start_all(folder: str, stale: str) -> list[int]:
    """In a light process without torch: 16 start one run; its owner does nothing until the others
    have ended. Their exit codes."""
    import injections

    from gain_cl import cli
    from gain_cl.compose import composition
    from gain_cl.runs import plan as plan_

    root, told = Path(folder), Path(folder) / "told"
    told.mkdir(parents=True)
    words = [*BASE, f"output_dir={root}/runs", f"results_dir={root}/results"]
    config = composition.compose(words)
    plan = plan_.prepare(config)
    composition.compose = lambda *_, **__: config
    plan.folder.mkdir(parents=True)
    if stale:
        (plan.folder / "LOCK").write_text(stale)
    injections.hold(str(root / "GO"))

    def start(number: int) -> int:
        for handle, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(told / f"{number}.{name}", os.O_WRONLY | os.O_CREAT), handle)
        code = cli.main(["run", *words])
        (told / f"{number}.json").write_text(
            json.dumps({"code": code, "pid": os.getpid(), "torch": "torch" in sys.modules})
        )
        return code

    def let_go(pids: list[int]) -> None:
        until = time.monotonic() + 60
        while len(list(told.glob("*.json"))) < len(pids) - 1 and time.monotonic() < until:
            time.sleep(0.02)
        (root / "GO").touch()

    return at_once(STARTERS, start, let_go)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def stale_texts() -> dict[str, str]:
    """What a LOCK may hold that nobody holds: nothing, garbage, a dead process, a live one that is
    another's, another machine's."""
    here = socket.gethostname()
    return {
        "none": "",
        "garbage": "\0\xff{",
        "dead": json.dumps({"pid": dead_pid(), "host": here}),
        "live": json.dumps({"pid": os.getpid(), "host": here}),
        "elsewhere": json.dumps({"pid": 1, "host": "another-machine"}),
    }


def two_owners(root: Path, stale: str, expected: dict[str, str]) -> Told:
    """Of 16 starters one runs and 15 are told who, without having loaded torch."""
    folder = root / f"owners-{len(list(root.iterdir()))}"
    codes: list[int] = apart(f"start_all({str(folder)!r}, {stale_texts()[stale]!r})")
    told = [json.loads(path.read_text()) for path in folder.glob("told/*.json")]
    (winner,) = [t for t in told if t["code"] == 0] or [{"pid": None}]
    errors = [(folder / f"told/{i}.err").read_text() for i, code in enumerate(codes) if code == 73]
    owner = f"by process {winner['pid']} on {socket.gethostname()}"
    facts = {
        f"one_runs_15_do_not {codes}": sorted(codes) == [0, *[73] * (STARTERS - 1)],
        "one_line_names_the_owner": all(
            len(e.splitlines()) == 1 and e.startswith("gain_cl: error:") and owner in e
            for e in errors
        ),
        "without_torch": not any(t["torch"] for t in told if t["code"] == 73),
        "identical": evidence(folder) == expected,
        "no_leftovers": leftovers(folder) == [],
        "each_step_once": steps(folder) == [(s, i) for s in (1, 2) for i in (1, 2, 3)],
    }
    return wrong(**facts), evidence_bytes(folder)


def owned_by_two(folder: Path) -> bool:
    """The race for which the lock looks at the inode: B opens LOCK; A, its owner, ends and removes
    it; C makes a new one and is the owner; now B locks the file without a name. Whether B becomes
    an owner beside C."""
    first = lock.owned(folder)
    first.__enter__()
    second = lock.owned(folder)
    flock = fcntl.flock

    def while_b_waits(handle: int, how: int) -> None:
        fcntl.flock = flock  # only once
        first.__exit__(None, None, None)
        second.__enter__()
        flock(handle, how)

    fcntl.flock = while_b_waits  # type: ignore[assignment]
    try:
        with lock.owned(folder):
            return True
    except InUseError:
        return False
    finally:
        fcntl.flock = flock
        second.__exit__(None, None, None)


# --- many writers ---------------------------------------------------------------------------------


def apart(call: str) -> Any:
    """What an expression over this module's names gives in a light process of its own, which may
    fork: JSON data."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HELPERS}
    code = f"import json\nfrom test_faults_owners import *\nprint(json.dumps({call}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def writers(folder: str, count: int = WRITERS) -> Told:
    """That many processes save a record at once in one folder; every one of them reads as it was
    written."""
    root = Path(folder)

    def save(number: int) -> int:
        synthetic.run(
            root / f"runs/run-{number}.json",
            bases={"a": 20.0, "b": 10.0},
            controls=["b"],
            with_items=False,
            seed=number,
        )
        return 0

    codes = at_once(count, save)
    bad = []
    for number in range(count):
        try:
            run = record.load(root / f"runs/run-{number}.json")
            written = run.documents.groupby(["stage", "domain"]).nll_nats.sum()
            claimed = {
                (s.index, name): d.nll_nats
                for s in run.record.stages
                for name, d in s.domains.items()
            }
            if written.to_dict() != pytest.approx(claimed):
                bad.append(f"run-{number}: its values are another's")
        except GainError as error:
            bad.append(str(error))
    facts = {
        f"all_saved {codes}": codes == [0] * count,
        f"lost_or_torn {bad[:3]}": not bad,
        "leftovers": not list(root.rglob(".*")),
    }
    return wrong(**facts), sum(p.stat().st_size for p in root.rglob("*") if p.is_file())


def shared_table(folder: str) -> int:
    """The twin: every process reads one table, adds a row and writes it again, ten times. The rows
    of 640 that are left."""
    table = Path(folder) / "results.csv"
    table.parent.mkdir(parents=True)
    table.write_text("run,row\n")

    def save(number: int) -> int:
        for row in range(10):
            table.write_text(table.read_text() + f"{number},{row}\n")
        return 0

    at_once(WRITERS, save)
    return len(table.read_text().splitlines()) - 1


# --- sweeps ---------------------------------------------------------------------------------------

CELL = (*SMOKE, "domain=[smoke_a]", "train.steps=2", "eval.documents=2")


class Sweep:
    """``-m`` over seeds in one process, in a folder of its own."""

    def __init__(self, warm: Warm, folder: Path, seeds: int) -> None:
        self.warm, self.folder, self.seeds = warm, folder, seeds

    def run(self, **more: Any) -> Result:
        seeds = "seed=" + ",".join(map(str, range(self.seeds)))
        words = [
            "run",
            "-m",
            *CELL,
            seeds,
            f"output_dir={self.folder}/runs",
            f"results_dir={self.folder}/results",
        ]
        return self.warm.run(self.folder.parent / f"{self.folder.name}.printed", argv=words, **more)

    def files(self) -> dict[str, tuple[str, int]]:
        """Hash and time of every file but Hydra's note of what was asked."""
        paths = [p for p in self.folder.rglob("*") if p.is_file() and p.name != "multirun.yaml"]
        return {
            str(p.relative_to(self.folder)): (
                hashlib.sha256(p.read_bytes()).hexdigest(),
                p.stat().st_mtime_ns,
            )
            for p in paths
        }

    def steps(self) -> int:
        return sum(
            path.read_text().count('"kind": "step"')
            for path in self.folder.glob("runs/*/metrics.jsonl")
        )

    def trained_since(self, before: dict[str, tuple[str, int]]) -> list[str]:
        """Runs whose metrics are not those of before."""
        after = self.files()
        return sorted(
            name
            for name in after
            if name.endswith("metrics.jsonl") and after[name] != before.get(name)
        )


def sweep(warm: Warm, root: Path, seeds: int) -> Told:
    """Repeated: nothing happens. One run deleted: one is trained. Only its record deleted: nothing
    is trained."""
    it = Sweep(warm, root / "sweep", seeds)
    first = it.run()
    assert first.code == 0, first.err
    whole, known = it.files(), evidence(it.folder)
    again = it.run()
    facts = {
        "rerun_exit_0": again.code == 0,
        "rerun_changes_nothing": it.files() == whole,
        "all_there": it.steps() == 2 * seeds,
    }
    gone = sorted(it.folder.glob("results/runs/*.json"))[seeds // 2]
    gone.unlink()
    facts["record_again"] = it.run().code == 0 and evidence(it.folder) == known
    now = it.files()
    gone.unlink()
    shutil.rmtree(it.folder / "runs" / gone.stem)
    facts["run_again"] = it.run().code == 0 and evidence(it.folder) == known
    facts["one_trained"] = it.trained_since(now) == [f"runs/{gone.stem}/metrics.jsonl"]
    return wrong(**facts), evidence_bytes(it.folder)


def sweep_with_failures(warm: Warm, root: Path, seeds: int) -> Told:
    """Three runs fail: the others finish, the failures are told; the next time just those three are
    run."""
    it, failing = Sweep(warm, root / "failing", seeds), (0, seeds // 2, seeds - 1)
    first = it.run(patch="injections:fail_seeds," + ",".join(map(str, failing)))
    lines = [line for line in first.err.splitlines() if line.startswith("gain_cl: error:")]
    before = it.files()
    facts = {
        f"exit_65_not_{first.code}": first.code == 65,
        "listed": len(lines) == 4 and all(f"seed {seed}" in first.err for seed in failing),
        "counted": lines[-1:]
        == [f"gain_cl: error: 3 of {seeds} runs failed (multirun); see the messages above"],
        "others_finished": len(list(it.folder.glob("results/runs/*.json"))) == seeds - 3,
    }
    second = it.run()
    facts |= {
        "then_exit_0": second.code == 0,
        "three_trained": len(it.trained_since(before)) == 3,
        "each_step_once": it.steps() == 2 * seeds,
    }
    return wrong(**facts), evidence_bytes(it.folder)


def sweep_killed(warm: Warm, root: Path, seeds: int, kills: int) -> Told:
    """The launcher is killed in the middle of a run, some times over, and started again."""
    it, whole = Sweep(warm, root / "killed", seeds), Sweep(warm, root / "sweep", seeds)
    if not whole.folder.exists():
        assert whole.run().code == 0
    codes = [it.run(env={"GAIN_CL_FAILPOINT": f"{place}@2"}).code for place in KILLED_AT[:kills]]
    last = it.run()
    facts = {
        "killed": codes == [-9] * kills,
        "exit_0": last.code == 0,
        "identical": evidence(it.folder) == evidence(whole.folder),
        f"leftovers {leftovers(it.folder)}": leftovers(it.folder) == [],
        "each_step_once": it.steps() == 2 * seeds,
    }
    return wrong(**facts), evidence_bytes(it.folder)


KILLED_AT = ("commit", "record.before", "cell.after", "parquet.after_rename")


# --- what CI does ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as warm:
        yield warm


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("owners")


@pytest.fixture(scope="module")
def expected(warm: Warm, root: Path) -> dict[str, str]:
    return undisturbed(warm, root)


def undisturbed(warm: Warm, root: Path) -> dict[str, str]:
    assert warm.run(root / "undisturbed", base=BASE).code == 0
    return evidence(root / "undisturbed")


STALE = ("none", "garbage", "dead", "live", "elsewhere")


@pytest.mark.parametrize(
    "stale", [*STALE[:1], *(pytest.param(s, marks=pytest.mark.slow) for s in STALE[1:])]
)
def test_two_owners(expected: dict[str, str], root: Path, stale: str) -> None:
    assert two_owners(root, stale, expected)[0] == []


def test_a_lock_without_a_name_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not owned_by_two(tmp_path / "checked")
    monkeypatch.setattr(lock, "_is", lambda *_: True)  # the twin that does not look at the inode
    assert owned_by_two(tmp_path / "unchecked")


@pytest.mark.parametrize("text", [b"", b"\0\xff{", b'{"pid": 1}', b"[]", b"1" * 2000])
def test_a_live_owner_is_not_robbed_whatever_its_lock_says(tmp_path: Path, text: bytes) -> None:
    with lock.owned(tmp_path):
        (tmp_path / "LOCK").write_bytes(text)
        with pytest.raises(InUseError, match="another process"), lock.owned(tmp_path):
            pass
        assert lock.holder(tmp_path) == "another process"
    with lock.owned(tmp_path):
        pass


@pytest.mark.parametrize("stale", STALE)
def test_a_lock_nobody_holds_is_taken_over(tmp_path: Path, stale: str) -> None:
    (tmp_path / "LOCK").write_text(stale_texts()[stale])
    assert lock.holder(tmp_path) is None
    with lock.owned(tmp_path):
        assert lock.holder(tmp_path) == f"process {os.getpid()} on {socket.gethostname()}"
    assert not (tmp_path / "LOCK").exists()


ORPHAN = """
import os, sys, time
from pathlib import Path
from gain_cl.system.lock import owned
with owned(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        sys.stdin.read()
        os._exit(0)
    time.sleep(0.2)
    os.kill(os.getpid(), 9)
"""


def test_a_child_that_outlives_the_owner(tmp_path: Path) -> None:
    """It may still be writing, so the run stays in use until it has ended."""
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None and owner.stdin is not None
        owner.stdout.readline()
        assert owner.wait() == -9
        with pytest.raises(InUseError, match=f"process {owner.pid} on"), lock.owned(tmp_path):
            pass
        owner.stdin.close()
        assert owner.stdout.read() == ""  # the child has ended
        with lock.owned(tmp_path):
            pass


@pytest.mark.parametrize(
    "count", [16, *(pytest.param(WRITERS, marks=pytest.mark.slow, id=str(i)) for i in (1, 2, 3, 4))]
)
def test_writers(tmp_path: Path, count: int) -> None:
    assert apart(f"writers({str(tmp_path / 'results')!r}, {count})")[0] == []


def test_a_shared_table_loses_rows(tmp_path: Path) -> None:
    assert apart(f"shared_table({str(tmp_path / 'table')!r})") < 640


@pytest.mark.slow
def test_sweep(warm: Warm, root: Path) -> None:
    assert sweep(warm, root, 6)[0] == []


@pytest.mark.slow
def test_sweep_with_failures(warm: Warm, root: Path) -> None:
    assert sweep_with_failures(warm, root, 6)[0] == []


@pytest.mark.slow
def test_sweep_killed(warm: Warm, tmp_path: Path) -> None:
    assert sweep_killed(warm, tmp_path, 6, 2)[0] == []


# --- the full campaigns ---------------------------------------------------------------------------


def carry_out(name: str, faults: int, trials: list[Callable[[], Told]]) -> Outcome:
    outcome, begun = Outcome(name), time.monotonic()
    for number, trial in enumerate(trials):
        complaints, compared = trial()
        outcome.count(faults, complaints, f"trial {number}", compared)
    outcome.seconds = time.monotonic() - begun
    print(outcome.row(), *outcome.failures, sep="\n", flush=True)
    return outcome


def main() -> int:
    with tempfile.TemporaryDirectory() as name, Warm() as warm:
        root, of = Path(name), functools.partial
        expected = undisturbed(warm, root)
        done = [
            carry_out(
                "two owners: 16 processes start one run",
                1,
                [of(two_owners, root, STALE[i % 5], expected) for i in range(50)],
            ),
            carry_out(
                "writers: 64 processes save at once",
                1,
                [of(apart, f"writers({str(root / f'w{i}')!r})") for i in range(40)],
            ),
            carry_out("sweep of 24, run again", 3, [of(sweep, warm, root, 24)]),
            carry_out("sweep of 24 with failures", 3, [of(sweep_with_failures, warm, root, 24)]),
            carry_out("sweep of 24, launcher killed", 4, [of(sweep_killed, warm, root, 24, 4)]),
        ]
        lost = [640 - apart(f"shared_table({str(root / f't{i}')!r})") for i in range(40)]
        print(f"The twin, a table that all share, lost {min(lost)} to {max(lost)} of 640 rows.")
    return any(outcome.failures for outcome in done) or not all(lost)


if __name__ == "__main__":
    sys.exit(main())
