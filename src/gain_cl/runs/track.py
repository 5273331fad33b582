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
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gain_cl.errors import StorageError, printable
from gain_cl.measure import tasks
from gain_cl.runs.mirror import SHOWN, Mirror
from gain_cl.stats import format
from gain_cl.stats.format import duration, percent, perplexity

if TYPE_CHECKING:
    from gain_cl.config.schema import RunConfig
    from gain_cl.measure.record import Run, StageRecord

LINE_SECONDS = 10.0
"""Without a terminal, at most one progress line in this time (and one for each finished stage)."""

KINDS = {"steps": "training", "cells": "scoring", "items": "tasks"}
"""Units of work that the time left is estimated from, and what they are called while their pace is
unknown."""


@dataclass
class Pace:
    """Work of one kind. total: units in the whole run (None: not known yet); done, seconds: what
    was measured before the current stage; here, took: what was measured in it."""

    total: int | None
    done: int = 0
    seconds: float = 0.0
    here: int = 0
    took: float = 0.0

    def count(self, units: int, seconds: float) -> None:
        """Raise what is done in this stage to ``units``. seconds: that the new ones took."""
        if units > self.here:
            self.here, self.took = units, self.took + seconds

    def close(self) -> None:
        """End the stage."""
        self.done, self.seconds = self.done + self.here, self.seconds + self.took
        self.here, self.took = 0, 0.0

    @property
    def left(self) -> float | None:
        """Return the seconds for what remains at the mean pace so far, or None while nothing is
        known to go by."""
        done = self.done + self.here
        if self.total is None or (done < self.total and not done):
            return None
        return max(0, self.total - done) * (self.seconds + self.took) / max(1, done)


class Tracker:
    """Follow one run; a context manager. The run calls it. It calls nothing back.

    steps_total: optimiser steps of the run; cells_total: (stages + 1) x domains to score. How many
    task items there are in the whole run is learnt when the first are scored. folder: the run's own
    folder, which gets metrics.jsonl. position: what ``position()`` gave for the checkpoint that the
    run goes on from; None: the run begins. Raises StorageError when metrics.jsonl cannot be
    written.
    """

    def __init__(
        self,
        config: RunConfig,
        run_id: str,
        folder: Path,
        *,
        steps_total: int,
        cells_total: int,
        position: dict[str, int] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.notes: list[str] = []  # what note() was given, each once
        self._config, self._run_id, self._folder, self._clock = config, run_id, folder, clock
        self._console = console or Console()
        self._trained = config.stages
        self._paces = {
            "steps": Pace(steps_total),
            "cells": Pace(cells_total),
            "items": Pace(None if config.tasks.names else 0),
        }
        # of the last checkpoint, written or being written
        self._position = position or {"bytes": 0, "rows": 0}
        self._shown = self._position["rows"]  # rows for the dashboard so far, in the whole run
        self._file: TextIO
        self._live: Live | None = None
        self._mirror = Mirror(config, run_id, folder, self._warn)
        self._begun = self._mark = self._said = clock()
        self._stage, self._phase = 0, "start"
        # done, of, unit, what: of the current phase
        self._work: tuple[int, int, str, str] | None = None
        self._numbers = ""  # loss and speed of the last step, in words
        # tokens and seconds of the last steps
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._rows: list[StageRecord] = []

    # --- what the run calls -----------------------------------------------------------------------

    def __enter__(self) -> Tracker:
        path, wanted = self._folder / "metrics.jsonl", self._position["bytes"]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _cut(path, wanted) if wanted else 0
            # line by line, so that tail -f follows
            self._file = open(path, "a" if kept else "w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise _unwritable(error, path) from error
        stages, steps = len(self._trained), self._paces["steps"].total
        self._write("start", {"run_id": self._run_id, "stages": stages, "steps": steps})
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
            self._live = Live(
                get_renderable=self._view, console=console, refresh_per_second=4, transient=True
            )
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
        pace, last = self._paces["steps"], len(self._trained)
        for row in stages:
            self._scored(row)
            if row.train is not None:
                pace.done += row.train.steps
                pace.seconds += row.train.seconds
        if pace.total is not None:
            pace.total -= steps - pace.done  # done as well, at a pace that nobody wrote down
        reached = stages[-1].index + 1 if stages else 0
        self._stage, size = min(reached, last), self._config.stage.stage_steps
        at = f", step {steps - (self._stage - 1) * size} of {size}" if self._stage else ""
        self._say(f"resumed at {self._where}{at}")

    def position(self) -> dict[str, int]:
        """Return where metrics.jsonl stands, for the checkpoint that is about to be saved: bytes
        (all of them on disk) and rows for the dashboard so far. Raises StorageError."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise _unwritable(error, self._file.name) from error
        self._position = {"bytes": size, "rows": self._shown}
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
        if stage != self._stage:
            self._close_stage()
        self._recent.clear()
        self._stage, self._phase, self._work, self._numbers = stage, text, None, ""
        self._mark = self._clock()
        self._line(f"{self._where}: {text}", rest=True)

    def progress(self, done: int, of: int, unit: str, what: str = "") -> None:
        """Tell that ``done`` of ``of`` units of the current phase are done, and ``what`` is in
        hand. The unit is "cells" (a domain scored after a stage) or "items" (of tasks), from which
        the time left is estimated, or any other word, which is only shown."""
        now, pace = self._clock(), self._paces.get(unit)
        if pace is not None:
            if unit == "items":
                pace.total = of * self._task_stages()
            pace.count(done, now - self._mark)
        self._mark = now
        self._work = (done, of, unit, what)
        self._line(f"{self._where}: {self._phase}, {unit} {done}/{of} {what}".rstrip(), rest=True)

    def step(self, row: dict[str, Any]) -> None:
        """Tell of one optimiser step: stage, domain, step (from 1), steps, loss_nats, lr,
        grad_norm, tokens and seconds of this step, and micro_batch where it is known."""
        now, pace = self._clock(), self._paces["steps"]
        pace.done += 1
        pace.seconds += now - self._mark  # by this clock: reading data and logging included
        self._mark = now
        if row.get("tokens") and row.get("seconds"):
            self._recent.append((int(row["tokens"]), float(row["seconds"])))
        tokens, seconds = (sum(part) for part in zip((0, 0.0), *self._recent, strict=True))
        speed = f", {tokens / seconds:,.0f} tokens/s" if seconds else ""
        self._numbers = f", loss {_number(row.get('loss_nats'))}{speed}"
        self._work = (int(row["step"]), int(row["steps"]), "steps", "")
        self._write("step", row)
        self._line(f"{self._where}: step {row['step']}/{row['steps']}{self._numbers}", rest=True)

    def dev(self, row: dict[str, Any]) -> None:
        """Tell the dev loss of the current domain, and of the controls, within its stage: stage,
        domain, step, loss_nats, controls_loss_nats. Its time counts as training."""
        self._write("dev", row)
        name, shown = "controls_loss_nats", _number(row.get("loss_nats"))
        controls = f", controls {_number(row[name])}" if name in row else ""
        self._line(f"{self._where}: step {row['step']}, dev loss {shown}{controls}")

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
        for domain, score in row.domains.items():
            own = {"stage": row.index, "domain": domain, "loss_nats": score.loss_nats}
            self._write("eval", {**own, **score.model_dump()})
        for task, result in row.tasks.items():
            self._write("task", {"stage": row.index, "task": task, **result.model_dump()})
        rest = row.model_dump(mode="json", exclude={"domains", "tasks"})
        self._write("stage", {"stage": rest.pop("index"), **rest})
        self._scored(row)
        self._say(self._stage_line(row, self._rows[:-1]))
        self._work, self._numbers = None, ""
        self._mark = self._clock()

    def finish(self, run: Run) -> None:
        """Tell that the record is written, and matrix.png in the run's folder if there is to be a
        picture in wandb."""
        self._write("finish", {"run_id": self._run_id, "seconds": self._clock() - self._begun})
        self.position()
        self.commit()
        self._mirror.finish(run, self._folder / "matrix.png")

    def left(self) -> tuple[float, list[str]]:
        """Return the seconds left for the run by what was measured, and the kinds of work whose
        pace is not known yet."""
        known = {kind: pace.left for kind, pace in self._paces.items()}
        return sum(s or 0 for s in known.values()), [
            KINDS[kind] for kind, s in known.items() if s is None
        ]

    # --- numbers ----------------------------------------------------------------------------------

    def _scored(self, row: StageRecord) -> None:
        """Take the pace of scoring from a finished stage, which tells what all of it took."""
        cells, items = self._paces["cells"], self._paces["items"]
        cells.here, cells.took = len(row.domains), row.eval_seconds
        if count := sum(t.items for t in row.tasks.values()):
            items.total = count * self._task_stages()
            items.here, items.took = count, row.task_seconds
        self._close_stage()
        self._rows.append(row)

    def _close_stage(self) -> None:
        for pace in self._paces.values():
            pace.close()

    def _task_stages(self) -> int:
        """Return the number of stages after which tasks are scored."""
        when, last = self._config.tasks.stages, len(self._trained)
        return sum(tasks.due(when, index, last) for index in range(last + 1))

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        clean, bad = format.finite(row)
        line = {"kind": kind, **clean, **({"not_finite": bad} if bad else {})}
        if kind in SHOWN:
            line["row"] = self._shown
            self._shown += 1
        try:
            self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _unwritable(error, self._file.name) from error

    # --- words ------------------------------------------------------------------------------------

    @property
    def _where(self) -> str:
        domain = ["pretrained", *self._trained][self._stage]
        return f"stage {self._stage} of {len(self._trained)} {domain}"

    @property
    def _rest(self) -> str:
        """Return the time left: "about 5:20 left", "? left" before anything is measured, "5:20 + ?
        (tasks) left" in between."""
        seconds, unknown = self.left()
        if not unknown:
            return f"about {format.clock(seconds)} left"
        return f"{format.clock(seconds)} + ? ({', '.join(unknown)}) left" if seconds else "? left"

    def _stage_line(self, row: StageRecord, before: list[StageRecord]) -> str:
        """Return a finished stage in one line. before: the stages before it."""
        now = {d: s.loss_nats for d, s in row.domains.items()}
        last = {d: s.loss_nats for d, s in before[-1].domains.items()} if before else {}
        parts = []
        if now and (row.domain is None or not before):
            shown = [perplexity(pick(now.values())) for pick in (min, max)]
            parts.append(f"perplexity {shown[0]} to {shown[1]} over {len(now)} domains")
        elif row.domain in now and row.domain in last:
            alone, own = self._config.regime == "individual", now[row.domain]
            then = before[0].domains[row.domain].loss_nats if alone else last[row.domain]
            parts.append(
                f"perplexity {perplexity(then)} -> {perplexity(own)} ({percent(own - then)}%)"
            )
            earlier = [d for d in self._trained[: row.index - 1] if d in now and d in last]
            if earlier and not alone:
                drift = sum(now[d] - last[d] for d in earlier) / len(earlier)
                parts.append(f"earlier domains {percent(drift)}% meanwhile")
        parts += [
            f"{task} accuracy {t.correct / t.items:.3f}" for task, t in row.tasks.items() if t.items
        ]
        if row.train is not None:
            parts.append(f"learned in {duration(row.train.seconds)}")
        parts.append(f"scored in {duration(row.eval_seconds + row.task_seconds)}")
        if row.index < len(self._trained):
            parts.append(self._rest)
        return (
            f"stage {row.index} of {len(self._trained)} {row.domain or 'pretrained'} done: "
            f"{', '.join(parts)}"
        )

    def _warn(self, text: str) -> None:
        self._write("note", {"text": text})
        self._say(f"note: {text}")

    def _say(self, text: str) -> None:
        """Print a line that stays, above the live view if there is one."""
        self._said = self._clock()
        line = f"{format.clock(self._said - self._begun):>7}  {printable(text)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _line(self, text: str, rest: bool = False) -> None:
        """Print a passing line: only where there is no live view, and rarely."""
        if self._live is None and self._clock() - self._said >= LINE_SECONDS:
            self._say(f"{text}, {self._rest}" if rest else text)

    def _view(self) -> Group:
        """Return the live view: where the run is, what it is doing, how far it is."""
        elapsed = self._clock() - self._begun
        head = Text(self._where, style="bold", overflow="ellipsis", no_wrap=True)
        head.append(f"  {self._phase}{self._numbers}", style="not bold")
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=5)
        grid.add_column(width=max(10, min(40, self._console.width - 50)))
        grid.add_column(no_wrap=True, overflow="ellipsis")
        if self._work is not None:
            done, of, unit, what = self._work
            bar = ProgressBar(total=max(1, of), completed=done)
            grid.add_row("now", bar, f"{unit} {done}/{of} {what}".rstrip())
        seconds, unknown = self.left()
        share = elapsed / (elapsed + seconds) if not unknown and elapsed + seconds > 0 else 0.0
        bar = ProgressBar(total=1.0, completed=share)
        grid.add_row("run", bar, f"{format.clock(elapsed)} elapsed, {self._rest}")
        return Group(head, grid)


def _cut(path: Path, length: int) -> int:
    """Cut metrics.jsonl back to its first ``length`` bytes, or to its whole lines where that many
    are not there. Return the bytes left."""
    with open(path, "a+b") as file:
        file.seek(0)
        kept = file.read(length).rfind(b"\n") + 1
        file.truncate(kept)
    return kept


def _unwritable(error: OSError, path: Path | str) -> StorageError:
    do = "free space or name another folder with output_dir="
    return StorageError(f"cannot write: {error.strerror}", str(path), do)


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "?"
