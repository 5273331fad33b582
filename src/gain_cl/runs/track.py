"""What a run says while it works: the console, ``metrics.jsonl`` and, on request, the dashboard.
Torch-free.

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
from gain_cl.runs import mirror
from gain_cl.stats import format

if TYPE_CHECKING:
    from types import TracebackType

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
    was measured so far."""

    total: int | None
    done: int = 0
    seconds: float = 0.0

    @property
    def left(self) -> float | None:
        """Seconds for what remains at the mean pace so far; None while nothing is known to go
        by."""
        if self.total is not None and self.done >= self.total:
            return 0.0
        return (
            (self.total - self.done) * self.seconds / self.done
            if self.total is not None and self.done
            else None
        )


class Tracker:
    """Follows one run; a context manager. The spine calls it; it calls nothing back.

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
        self._position = position or {
            "bytes": 0,
            "rows": 0,
        }  # of the last checkpoint, written or being written
        self._shown = self._position["rows"]  # rows for the dashboard so far, in the whole run
        self._file: TextIO | None = None
        self._live: Live | None = None
        self._mirror = (
            mirror.Mirror(config, run_id, folder, self._warn)
            if config.track.backend == "wandb"
            else None
        )
        self._begun = self._mark = self._said = clock()
        self._stage, self._phase = 0, "start"
        self._work: tuple[int, int, str, str] | None = (
            None  # done, of, unit, what: of the current phase
        )
        self._counted: dict[str, int] = {}  # units of the current stage that are in a pace already
        self._timed: dict[str, float] = {}  # and the seconds they took
        self._numbers = ""  # loss and speed of the last step, in words
        self._recent: deque[tuple[int, float]] = deque(
            maxlen=20
        )  # (tokens, seconds) of the last steps
        self._rows: list[StageRecord] = []

    # --- what the spine calls ---------------------------------------------------------------------

    def __enter__(self) -> Tracker:
        path = self._folder / "metrics.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _cut(path, self._position["bytes"]) if self._position["bytes"] else 0
            self._file = open(
                path, "a" if kept else "w", encoding="utf-8", buffering=1
            )  # line by line, so that tail -f follows
        except OSError as error:
            raise _unwritable(error, path) from error
        self._begun = self._mark = self._said = self._clock()
        self._write(
            "start",
            {
                "run_id": self._run_id,
                "stages": len(self._trained),
                "steps": self._paces["steps"].total,
            },
        )
        self._say(f"run {self._run_id}")
        if kept < self._position["bytes"]:
            self._warn(
                f"metrics.jsonl was cut or changed behind its {kept} bytes; rows before the last "
                "checkpoint are missing in it"
            )
        if self._mirror is not None:
            self._mirror.start(resuming=self._position["bytes"] > 0)
            self._mirror.send(kept)
        if (
            self._console.is_interactive and self._console.file.isatty()
        ):  # FORCE_COLOR alone makes no terminal
            self._live = Live(
                get_renderable=self._view,
                console=self._console,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._mirror is not None:
            self._mirror.close(failed=kind is not None)
        if self._file is not None:
            with suppress(OSError):  # a line that could not be written was told when it was
                self._file.close()
            self._file = None

    def resumed(self, stages: list[StageRecord], steps: int) -> None:
        """The run goes on: ``stages`` are finished, and ``steps`` optimiser steps of the whole run
        are done."""
        for row in stages:
            self._scored(row)
            self._rows.append(row)
            self._counted, self._timed = {}, {}
        pace, trained = self._paces["steps"], [row.train for row in stages if row.train is not None]
        pace.done += sum(t.steps for t in trained)
        pace.seconds += sum(t.seconds for t in trained)
        if pace.total is not None:
            pace.total -= steps - sum(
                t.steps for t in trained
            )  # done as well, at a pace that nobody wrote down
        last, per_stage = len(self._trained), self._config.stage.stage_steps
        self._stage = min(len(stages), last)
        at = f", step {steps - (self._stage - 1) * per_stage} of {per_stage}" if self._stage else ""
        self._say(f"resumed at {self._where}{at}")

    def position(self) -> dict[str, int]:
        """Where metrics.jsonl stands, for the checkpoint that is about to be saved: bytes (all of
        them on disk) and rows for the dashboard so far. Raises StorageError."""
        if self._file is not None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._position = {
                    "bytes": os.fstat(self._file.fileno()).st_size,
                    "rows": self._shown,
                }
            except OSError as error:
                raise _unwritable(error, self._file.name) from error
        return dict(self._position)

    def commit(self) -> None:
        """The checkpoint that holds the last ``position()`` is on disk: no row before it can be
        taken back."""
        if self._mirror is not None:
            self._mirror.send(self._position["bytes"])

    def note(self, *texts: str) -> None:
        """Tell what a reader of the numbers should see: a line each, printed once, kept in
        ``notes``."""
        for text in texts:
            if text not in self.notes:
                self.notes.append(text)
                self._warn(text)

    def phase(self, text: str, stage: int, of: int) -> None:
        """What is being done now, within stage ``stage`` of ``of``."""
        if stage != self._stage:
            self._counted, self._timed = {}, {}
        self._recent.clear()
        self._stage, self._phase, self._work, self._numbers = stage, text, None, ""
        self._mark = self._clock()
        self._line(f"stage {stage} of {of} {self._domain}: {text}", rest=True)

    def progress(self, done: int, of: int, unit: str, what: str = "") -> None:
        """``done`` of ``of`` units of the current phase are done; ``what`` is in hand. The unit is
        "cells" (a domain scored after a stage) or "items" (of tasks), from which the time left is
        estimated, or any other word, which is only shown."""
        now = self._clock()
        kind = unit if unit in KINDS else ""
        if kind:
            if kind == "items":
                self._paces["items"].total = of * self._task_stages()
            self._count(kind, done, now - self._mark)
        self._mark = now
        self._work = (done, of, unit, what)
        self._line(f"{self._where}: {self._phase}, {unit} {done}/{of} {what}".rstrip(), rest=True)

    def step(self, row: dict[str, Any]) -> None:
        """One optimiser step: stage, domain, step (from 1), steps, loss_nats, lr, grad_norm, tokens
        and seconds of this step, and micro_batch where it is known."""
        now = self._clock()
        self._paces["steps"].done += 1
        self._paces["steps"].seconds += (
            now - self._mark
        )  # by this clock: reading data and logging included
        self._mark = now
        if row.get("tokens") and row.get("seconds"):
            self._recent.append((int(row["tokens"]), float(row["seconds"])))
        seconds = sum(s for _, s in self._recent)
        speed = f", {sum(t for t, _ in self._recent) / seconds:,.0f} tokens/s" if seconds else ""
        self._numbers = f", loss {_number(row.get('loss_nats'))}{speed}"
        self._work = (int(row["step"]), int(row["steps"]), "steps", "")
        self._write("step", row)
        self._line(f"{self._where}: step {row['step']}/{row['steps']}{self._numbers}", rest=True)

    def dev(self, row: dict[str, Any]) -> None:
        """Dev loss of the current domain, and of the controls, within its stage: stage, domain,
        step, loss_nats, controls_loss_nats. Its time counts as training."""
        self._write("dev", row)
        controls = (
            f", controls {_number(row['controls_loss_nats'])}"
            if "controls_loss_nats" in row
            else ""
        )
        self._line(
            f"{self._where}: step {row['step']}, dev loss {_number(row.get('loss_nats'))}{controls}"
        )

    def spike(self, row: dict[str, Any]) -> None:
        """A loss far above those before it: stage, domain, step, loss_nats, and mean, sd and number
        (``steps``) of those."""
        self._write("spike", row)
        usual = f"{row['mean']:.2f} +- {row['sd']:.2f} over the last {row['steps']} steps"
        self._say(
            f"{self._where}: loss spike at step {row['step']}: {row['loss_nats']:.2f} against "
            f"{usual}; nothing is skipped"
        )

    def stage(self, row: StageRecord) -> None:
        """A stage is learned and scored."""
        self._scored(row)
        for domain, score in row.domains.items():
            self._write(
                "eval",
                {
                    "stage": row.index,
                    "domain": domain,
                    "loss_nats": score.loss_nats,
                    **score.model_dump(),
                },
            )
        for task, result in row.tasks.items():
            self._write("task", {"stage": row.index, "task": task, **result.model_dump()})
        rest = row.model_dump(mode="json", exclude={"domains", "tasks"})
        self._write("stage", {"stage": rest.pop("index"), **rest})
        self._say(self._stage_line(row))
        self._rows.append(row)
        self._counted, self._timed, self._work, self._numbers = {}, {}, None, ""
        self._mark = self._clock()

    def finish(self, run: Run) -> None:
        """The record is written, and matrix.png in the run's folder if there is to be a picture in
        wandb."""
        self._write("finish", {"run_id": self._run_id, "seconds": self._clock() - self._begun})
        self.position()
        self.commit()
        if self._mirror is not None:
            self._mirror.finish(run, self._folder / "matrix.png")

    def left(self) -> tuple[float, list[str]]:
        """Seconds left for the run by what was measured, and the kinds of work whose pace is not
        known yet."""
        known = {kind: pace.left for kind, pace in self._paces.items()}
        return sum(s for s in known.values() if s is not None), [
            KINDS[kind] for kind, s in known.items() if s is None
        ]

    # --- numbers ----------------------------------------------------------------------------------

    def _scored(self, row: StageRecord) -> None:
        """Take the pace of scoring from a finished stage."""
        self._count("cells", len(row.domains), row.eval_seconds, exact=True)
        count = sum(t.items for t in row.tasks.values())
        if count:
            self._paces["items"].total = count * self._task_stages()
            self._count("items", count, row.task_seconds, exact=True)

    def _count(self, kind: str, done: int, seconds: float, exact: bool = False) -> None:
        """Raise a pace to ``done`` units in this stage. exact: ``seconds`` is what all of them
        took; else what the new ones did."""
        pace, before, spent = (
            self._paces[kind],
            self._counted.get(kind, 0),
            self._timed.get(kind, 0.0),
        )
        new = seconds if exact else spent + seconds
        if done > before or exact:
            pace.done += done - before
            pace.seconds += new - spent
            self._counted[kind], self._timed[kind] = done, new

    def _task_stages(self) -> int:
        """Stages after which tasks are scored."""
        when = self._config.tasks.stages
        return (
            {"ends": 2, "all": len(self._trained) + 1}[when] if isinstance(when, str) else len(when)
        )

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        clean, bad = format.finite(row)
        line = {"kind": kind, **clean, **({"not_finite": bad} if bad else {})}
        if kind in mirror.SHOWN:
            line["row"] = self._shown
            self._shown += 1
        try:
            self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _unwritable(error, self._file.name) from error

    # --- words ------------------------------------------------------------------------------------

    @property
    def _domain(self) -> str:
        return (
            self._trained[self._stage - 1]
            if 0 < self._stage <= len(self._trained)
            else "pretrained"
        )

    @property
    def _where(self) -> str:
        return f"stage {self._stage} of {len(self._trained)} {self._domain}"

    @property
    def _rest(self) -> str:
        """The time left: "about 5:20 left", "? left" before anything is measured, "5:20 + ? (tasks)
        left" in between."""
        seconds, unknown = self.left()
        if not unknown:
            return f"about {format.clock(seconds)} left"
        return f"{format.clock(seconds)} + ? ({', '.join(unknown)}) left" if seconds else "? left"

    def _stage_line(self, row: StageRecord) -> str:
        now = {d: s.loss_nats for d, s in row.domains.items()}
        parts = []
        if now and (row.domain is None or not self._rows):
            values = sorted(now.values())
            parts.append(
                f"perplexity {format.perplexity(values[0])} to {format.perplexity(values[-1])} "
                f"over {len(values)} domains"
            )
        elif self._rows and row.domain in now and row.domain in self._rows[-1].domains:
            alone = self._config.regime == "individual"
            before, after = (
                self._rows[0 if alone else -1].domains[row.domain].loss_nats,
                now[row.domain],
            )
            parts.append(
                f"perplexity {format.perplexity(before)} -> {format.perplexity(after)} "
                f"({format.percent(after - before)}%)"
            )
            earlier = [
                d
                for d in self._trained[: row.index - 1]
                if d in now and d in self._rows[-1].domains
            ]
            if earlier and not alone:
                drift = sum(now[d] - self._rows[-1].domains[d].loss_nats for d in earlier) / len(
                    earlier
                )
                parts.append(f"earlier domains {format.percent(drift)}% meanwhile")
        parts += [
            f"{task} accuracy {t.correct / t.items:.3f}" for task, t in row.tasks.items() if t.items
        ]
        if row.train is not None:
            parts.append(f"learned in {format.duration(row.train.seconds)}")
        parts.append(f"scored in {format.duration(row.eval_seconds + row.task_seconds)}")
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
        """A line that stays, above the live view if there is one."""
        self._said = self._clock()
        line = f"{format.clock(self._said - self._begun):>7}  {printable(text)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _line(self, text: str, rest: bool = False) -> None:
        """A passing line: shown only where there is no live view, and rarely."""
        if self._live is None and self._clock() - self._said >= LINE_SECONDS:
            self._say(f"{text}, {self._rest}" if rest else text)

    def _view(self) -> Group:
        """The live view: where the run is, what it is doing, how far it is."""
        elapsed = self._clock() - self._begun
        head = Text(self._where, style="bold", overflow="ellipsis", no_wrap=True)
        head.append(f"  {self._phase}{self._numbers}", style="not bold")
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=5)
        grid.add_column(width=max(10, min(40, self._console.width - 50)))
        grid.add_column(no_wrap=True, overflow="ellipsis")
        if self._work is not None:
            done, of, unit, what = self._work
            grid.add_row(
                "now",
                ProgressBar(total=max(1, of), completed=done),
                f"{unit} {done}/{of} {what}".rstrip(),
            )
        seconds, unknown = self.left()
        share = elapsed / (elapsed + seconds) if not unknown and elapsed + seconds > 0 else 0.0
        grid.add_row(
            "run",
            ProgressBar(total=1.0, completed=share),
            f"{format.clock(elapsed)} elapsed, {self._rest}",
        )
        return Group(head, grid)


def _cut(path: Path, length: int) -> int:
    """Cut metrics.jsonl back to its first ``length`` bytes, or to its whole lines where that many
    are not there; the bytes left."""
    with open(path, "a+b") as file:
        file.seek(0)
        kept = file.read(length).rfind(b"\n") + 1
        file.truncate(kept)
    return kept


def _unwritable(error: OSError, path: Path | str) -> StorageError:
    return StorageError(
        f"cannot write: {error.strerror}",
        str(path),
        "free space or name another folder with output_dir=",
    )


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "?"
