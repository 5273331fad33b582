"""Say what a run does while it works: on the console, in ``metrics.jsonl`` and, on request, in the
dashboard. Torch-free.

``metrics.jsonl`` holds one JSON object a line, told apart by ``kind``: ``start`` (a process began,
or went on), ``step``, ``dev``, ``eval`` (a domain after a stage), ``task``, ``stage``, ``spike``,
``note``, ``finish``. A number that is not finite is written as null and named in ``not_finite``.
Each step stands in it once, however often the run was interrupted: a process that goes on cuts the
file back to where the checkpoint that it starts from was made. Rows that the dashboard shows are
numbered from 0 over the whole run (``row``).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.status import Status
from rich.text import Text

from gain_cl.errors import printable
from gain_cl.runs.mirror import SHOWN, Mirror
from gain_cl.stats import format
from gain_cl.stats.format import percent, perplexity

if TYPE_CHECKING:
    from gain_cl.config.schema import RunConfig
    from gain_cl.measure.record import Run, StageRecord

LINE_SECONDS = 10.0
"""Without a terminal, at most one progress line in this time (and one for each finished stage)."""


@dataclass
class Pace:
    """Work of one kind. total: units in the whole run; done: those of this process, which took so
    many seconds."""

    total: int
    done: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count a unit that is done."""
        self.done, self.seconds = self.done + 1, self.seconds + seconds

    @property
    def left(self) -> float:
        """Return the seconds for what remains at the mean pace so far; NaN while there is none."""
        pace = self.seconds / self.done if self.done else math.nan
        return (self.total - self.done) * pace if self.total > self.done else 0.0


class Tracker:
    """Follow one run; a context manager. The run calls it. It calls nothing back.

    folder: the run's own folder, which gets metrics.jsonl. position: what ``position()`` gave for
    the checkpoint that the run goes on from; None: the run begins. Raises OSError when
    metrics.jsonl cannot be written.
    """

    def __init__(
        self,
        config: RunConfig,
        run_id: str,
        folder: Path,
        *,
        position: dict[str, int] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.notes: list[str] = []  # what note() was given, each once
        self._config, self._run_id, self._folder, self._clock = config, run_id, folder, clock
        self._console = console or Console()
        self._trained = config.stages
        self._stages = Pace(1 + len(config.stages))
        self._steps = Pace(len(config.stages) * config.stage.stage_steps)
        # of the last checkpoint, written or being written
        self._position = position or {"bytes": 0, "rows": 0}
        self._shown = self._position["rows"]  # rows for the dashboard so far, in the whole run
        self._file: TextIO
        self._live: Status | None = None
        self._mirror = Mirror(config, run_id, folder, self._warn)
        self._begun = self._mark = self._said = clock()
        self._stage, self._phase = 0, "start"
        self._rows: list[StageRecord] = []

    # --- what the run calls -----------------------------------------------------------------------

    def __enter__(self) -> Tracker:
        path, wanted = self._folder / "metrics.jsonl", self._position["bytes"]
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _cut(path, wanted) if wanted else 0
        # line by line, so that tail -f follows
        self._file = open(path, "a" if kept else "w", encoding="utf-8", buffering=1)
        facts = {"stages": len(self._trained), "steps": self._steps.total}
        self._write("start", {"run_id": self._run_id, **facts})
        self._say(f"run {self._run_id}")
        if kept < wanted:
            self._warn(
                f"metrics.jsonl was cut or changed behind its {kept} bytes; rows before the last "
                "checkpoint are missing in it"
            )
        self._mirror.start(resuming=wanted > 0)
        self._mirror.send(kept)
        console = self._console
        if console.is_interactive and console.file.isatty():  # FORCE_COLOR alone makes no terminal
            self._live = console.status("", refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._mirror.close(failed=kind is not None)
        with suppress(OSError):  # a line that could not be written was told when it was
            self._file.close()

    def resumed(self, stages: list[StageRecord], steps: int) -> None:
        """Tell that the run goes on: ``stages`` are finished, and ``steps`` optimiser steps of the
        whole run are done."""
        self._rows, last = stages, len(self._trained)
        reached = stages[-1].index + 1 if stages else 0
        self._stages.total -= len(stages)
        self._steps.total -= steps
        self._stage, size = min(reached, last), self._config.stage.stage_steps
        at = f", step {steps - (self._stage - 1) * size} of {size}" if self._stage else ""
        self._say(f"resumed at {self._where}{at}")

    def position(self) -> dict[str, int]:
        """Return where metrics.jsonl stands, for the checkpoint that is about to be saved: bytes
        (all of them on disk) and rows for the dashboard so far."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._position = {"bytes": os.fstat(self._file.fileno()).st_size, "rows": self._shown}
        return dict(self._position)

    def commit(self) -> None:
        """Take note that the checkpoint that holds the last ``position()`` is on disk: no row
        before it can be taken back."""
        self._mirror.send(self._position["bytes"])

    def note(self, *texts: str) -> None:
        """Tell what a reader of the numbers should see: a line each, printed once, kept in
        ``notes``."""
        for text in texts:
            if text not in self.notes:
                self.notes.append(text)
                self._warn(text)

    def phase(self, text: str, stage: int = 0) -> None:
        """Tell what is being done now, within a stage."""
        self._stage, self._phase, self._mark = stage, text, self._clock()
        self._line(text)

    def progress(self, done: int, of: int, unit: str, what: str = "") -> None:
        """Tell that ``done`` of ``of`` units of the current phase are done, and ``what`` is in
        hand."""
        self._line(f"{self._phase}, {unit} {done}/{of} {what}".rstrip())

    def step(self, row: dict[str, Any]) -> None:
        """Tell of one optimiser step: stage, domain, step (from 1), steps, loss_nats, lr,
        grad_norm, micro_batch, tokens and seconds of this step."""
        now = self._clock()
        # by this clock: reading data and logging included
        self._steps.add(now - self._mark)
        self._mark = now
        self._write("step", row)
        speed = f"{row['tokens'] / row['seconds']:,.0f} tokens/s"
        self._line(f"step {row['step']}/{row['steps']}, loss {row['loss_nats']:.3f}, {speed}")

    def dev(self, row: dict[str, Any]) -> None:
        """Tell the dev loss of the current domain, and of the controls, within its stage: stage,
        domain, step, loss_nats, controls_loss_nats. Its time counts as training."""
        self._write("dev", row)
        self._line(f"step {row['step']}, dev loss {row['loss_nats']:.3f}")

    def spike(self, row: dict[str, Any]) -> None:
        """Tell of a loss far above those before it: stage, domain, step, loss_nats, and mean, sd
        and number (``steps``) of those."""
        self._write("spike", row)
        self._say(
            f"{self._where}: loss spike at step {row['step']}: {row['loss_nats']:.2f} against "
            f"{row['mean']:.2f} +- {row['sd']:.2f} over the last {row['steps']} steps; nothing is "
            "skipped"
        )

    def stage(self, row: StageRecord) -> None:
        """Tell that a stage is learned and scored."""
        self._stage = row.index
        for domain, score in row.domains.items():
            own = {"stage": row.index, "domain": domain, "loss_nats": score.loss_nats}
            self._write("eval", {**own, **score.model_dump()})
        for task, result in row.tasks.items():
            self._write("task", {"stage": row.index, "task": task, **result.model_dump()})
        rest = row.model_dump(mode="json", exclude={"domains", "tasks"})
        self._write("stage", {"stage": rest.pop("index"), **rest})
        self._stages.add(row.eval_seconds + row.task_seconds)
        self._say(self._stage_line(row))
        self._rows.append(row)

    def finish(self, run: Run) -> None:
        """Tell that the record is written, and matrix.png in the run's folder if there is to be a
        picture in wandb."""
        self._write("finish", {"run_id": self._run_id, "seconds": self._clock() - self._begun})
        self.position()
        self.commit()
        self._mirror.finish(run, self._folder / "matrix.png")

    # --- numbers ----------------------------------------------------------------------------------

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        clean, bad = format.finite(row)
        line = {"kind": kind, **clean, **({"not_finite": bad} if bad else {})}
        if kind in SHOWN:
            line["row"] = self._shown
            self._shown += 1
        self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")

    # --- words ------------------------------------------------------------------------------------

    @property
    def _where(self) -> str:
        domain = ["pretrained", *self._trained][self._stage]
        return f"stage {self._stage} of {len(self._trained)} {domain}"

    @property
    def _rest(self) -> str:
        """Return the time left in words, by the pace of steps and of scoring so far."""
        seconds = self._steps.left + self._stages.left
        return "? left" if math.isnan(seconds) else f"about {format.clock(seconds)} left"

    def _stage_line(self, row: StageRecord) -> str:
        """Return a finished stage in one line."""
        alone, parts, before = self._config.regime == "individual", [], self._rows
        since = before[0 if alone else -1].domains if before else {}
        now, then = ({d: s.loss_nats for d, s in x.items()} for x in (row.domains, since))
        if row.domain in now and row.domain in then:
            a, b = then[row.domain], now[row.domain]
            parts.append(f"perplexity {perplexity(a)} -> {perplexity(b)} ({percent(b - a)}%)")
            if drift := [] if alone else [now[d] - then[d] for d in self._trained[: row.index - 1]]:
                mean = percent(sum(drift) / len(drift))
                parts.append(f"earlier domains {mean}% meanwhile")
        elif now:
            shown = [perplexity(pick(now.values())) for pick in (min, max)]
            parts.append(f"perplexity {shown[0]} to {shown[1]} over {len(now)} domains")
        for task, score in row.tasks.items():
            parts += [f"{task} {name} {x:.3f}" for name, x in [*score.numbers.items()][:1]]
        return f"{self._where} done: {', '.join([*parts, self._rest])}"

    def _warn(self, text: str) -> None:
        self._write("note", {"text": text})
        self._say(f"note: {text}")

    def _say(self, text: str) -> None:
        """Print a line that stays, above the live view if there is one."""
        self._said = self._clock()
        line = f"{format.clock(self._said - self._begun):>7}  {printable(text)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _line(self, text: str) -> None:
        """Show a passing line: in a terminal in place of the one before, else rarely."""
        line = f"{self._where}: {text}, {self._rest}"
        if self._live is not None:
            elapsed = format.clock(self._clock() - self._begun)
            self._live.update(Text(f"{elapsed}  {printable(line)}"))
        elif self._clock() - self._said >= LINE_SECONDS:
            self._say(line)


def _cut(path: Path, length: int) -> int:
    """Cut metrics.jsonl back to its first ``length`` bytes, or to its whole lines where that many
    are not there. Return the bytes left."""
    with open(path, "a+b") as file:
        file.seek(0)
        kept = file.read(length).rfind(b"\n") + 1
        file.truncate(kept)
    return kept
