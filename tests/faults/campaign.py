"""Real runs in which faults happen, and what they leave behind.

A trial is a whole ``python -m gain_cl run`` in a process of its own, forked from a warm parent that
has imported torch and everything else (2 seconds a trial instead of 10). The warm parent is itself
a process of its own: it never trains, so that forking it is safe.

    with Warm() as warm:
        result = warm.run(folder, "seed=1", env={"GAIN_CL_FAILPOINT": "commit@2"})      # dies
        there: result.code == -9 result = warm.run(folder, patch="twins:in_place", after=[(0.7,
        signal.SIGTERM)])  # with a patch, and a signal assert evidence(folder) ==
        evidence(undisturbed)
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from conftest import HELPERS
from gain_cl.tools.verify_resume import EVIDENCE, evidence  # noqa: F401 (for the fault tests)

SMOKE = (
    "debug=smoke",
    "tasks=none",
    "checkpoint.every_steps=1",
    "compute.threads=1",
    "compute.device=cpu",
)
"""Three domains of four steps on a tiny random model, saved at every step."""


class Result(NamedTuple):
    """code: exit code, -9 when killed; out, err: what it printed; seconds from fork to exit."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass
class Outcome:
    """What a campaign found. injected, survived: faults; compared: bytes that were held against the
    undisturbed run's; failures: one line for each trial that was not survived; notes: what else a
    reader wants to know."""

    name: str
    injected: int = 0
    survived: int = 0
    compared: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, faults: int, complaints: Sequence[str], where: str, compared: int = 0) -> None:
        """Add a trial of so many faults."""
        self.injected += faults
        self.survived += 0 if complaints else faults
        self.compared += compared
        self.failures += [f"{where}: {'; '.join(complaints)}"] if complaints else []

    def row(self) -> str:
        """A row of the table of docs/reliability.md: campaign, injected, survived, bytes compared,
        seconds, notes."""
        cells = [
            self.name,
            f"{self.injected:,}",
            f"{self.survived:,}",
            f"{self.compared:,}",
            f"{self.seconds:,.0f}",
            "; ".join(self.notes),
        ]
        return f"| {' | '.join(cells)} |"


class Warm:
    """A warm parent; a context manager. composed_once: it composes each configuration once, and its
    trials are spared that (half of their time); imports: more modules that it loads."""

    def __init__(self, composed_once: bool = False, imports: Sequence[str] = ()) -> None:
        self._asked = {"composed_once": composed_once, "imports": list(imports)}

    def __enter__(self) -> Warm:
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([HELPERS, os.environ.get("PYTHONPATH", "")]),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._asked) + "\n")
        self._process.stdin.flush()
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(
        self,
        folder: Path,
        *overrides: str,
        base: Sequence[str] = SMOKE,
        env: dict[str, str] | None = None,
        patch: str | None = None,
        after: Sequence[tuple[float, int]] = (),
        limits: dict[str, int] | None = None,
        argv: Sequence[str] | None = None,
    ) -> Result:
        """One trial in folder/runs and folder/results. patch: MODULE:FUNCTION called in the child
        before the run (tests/ is on its path), with arguments after a comma; several are parted by
        semicolons. after: (seconds since the fork, signal) to send. limits: RLIMIT_NAME -> bytes.
        argv: the whole command instead of run with overrides."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (".out", ".err"):  # it may be killed before it opens them
            (folder / name).write_text("")
        words = (
            list(argv)
            if argv is not None
            else [
                "run",
                *base,
                *overrides,
                f"output_dir={folder}/runs",
                f"results_dir={folder}/results",
            ]
        )
        asked = {
            "argv": words,
            "env": env or {},
            "patch": patch,
            "after": list(after),
            "limits": limits or {},
            "folder": str(folder),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        told = self._answer()
        texts = [(folder / name).read_text(errors="replace") for name in (".out", ".err")]
        return Result(told["code"], *texts, told["seconds"])

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the warm parent died"
        return json.loads(line)


def evidence_bytes(folder: Path) -> int:
    """Bytes of the files that ``evidence`` hashes."""
    return sum(
        path.stat().st_size
        for pattern in (*EVIDENCE, "results/runs/*.json")
        for path in folder.glob(pattern)
    )


def steps(folder: Path) -> list[tuple[int, int]]:
    """(stage, step) of every optimiser step in metrics.jsonl."""
    (path,) = folder.glob("runs/*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["stage"], r["step"]) for r in rows if r["kind"] == "step"]


def leftovers(folder: Path) -> list[str]:
    """What a finished run must not leave: temporaries, locks, checkpoints, cells of its own, a note
    of a failure."""
    patterns = (
        "**/.tmp-*",
        "**/.*.tmp",
        "runs/*/LOCK",
        "runs/*/ckpt",
        "runs/*/cells",
        "runs/*/failure.json",
    )
    return sorted(
        str(p.relative_to(folder))
        for pattern in patterns
        for p in folder.glob(pattern)
        if p.parent.parent.name != "cells"
    )


# --- the warm parent ------------------------------------------------------------------------------


def serve() -> None:
    import hydra
    import pandas
    import peft
    import pyarrow.parquet
    import torch
    import transformers.models.llama.modeling_llama
    from matplotlib import pyplot

    from gain_cl.runs import (
        heatmap,  # noqa: F401
        run,  # noqa: F401  a child that is asked to stop at once must not be importing it
        train,  # noqa: F401
    )

    wanted = json.loads(sys.stdin.readline())
    for name in wanted["imports"]:
        importlib.import_module(name)
    pyplot.figure().text(0, 0, "fonts are looked up once").get_window_extent()
    pyplot.close("all")
    del hydra, pandas, peft, pyarrow, transformers
    torch.set_num_threads(1)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if wanted["composed_once"]:
            compose_once(asked["argv"])
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            trial(asked)
        for seconds, number in asked["after"]:
            while (
                time.monotonic() - begun < seconds
                and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.002)
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(child, number)
        _, status = os.waitpid(child, 0)
        print(
            json.dumps(
                {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begun}
            ),
            flush=True,
        )


_composed: dict[tuple[str, ...], Any] = {}


def compose_once(argv: list[str]) -> None:
    """Let composition.compose answer for this command (and leave others to it) without composing again;
    only the folders differ."""
    from gain_cl.compose import composition
    from gain_cl.errors import GainError

    compose = (
        composition.compose.__wrapped__
        if hasattr(composition.compose, "__wrapped__")
        else composition.compose
    )
    folders = dict(
        word.split("=", 1) for word in argv if word.startswith(("output_dir=", "results_dir="))
    )
    rest = tuple(word for word in argv if word.split("=")[0] not in folders)
    if argv[0] != "run" or any(word.startswith("-") for word in argv):
        return
    if rest not in _composed:
        try:
            _composed[rest] = compose(rest[1:])
        except GainError:
            return  # the trial says so itself
    config = _composed[rest].model_copy(update=folders)

    def known(overrides: Any = (), config_dirs: Any = (), plugins: Any = ()) -> Any:
        return config if list(overrides) == argv[1:] else compose(overrides, config_dirs, plugins)

    known.__wrapped__ = compose  # type: ignore[attr-defined]
    composition.compose = known


def trial(asked: dict[str, Any]) -> None:
    """The child: never returns."""
    code = 70
    try:
        os.close(0)
        for number, name in ((1, ".out"), (2, ".err")):
            handle = os.open(Path(asked["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
            os.close(handle)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(asked["env"])
        for patch in filter(None, (asked["patch"] or "").split(";")):
            name, *arguments = patch.split(",")
            module, function = name.split(":")
            getattr(importlib.import_module(module), function)(*arguments)
        if asked["limits"]:
            import resource

            for name, size in asked["limits"].items():
                resource.setrlimit(getattr(resource, name), (size, size))
        from gain_cl import cli

        code = cli.main(asked["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
