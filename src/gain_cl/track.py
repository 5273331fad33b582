"""What a run says while it works: the console, ``metrics.jsonl`` and, on request, wandb (this is the only door to it).

The files are the truth. wandb is a mirror: it may be absent, refuse or vanish at any moment, and neither a number nor
the end of the run changes; one line tells. Torch-free.

``metrics.jsonl`` holds one JSON object a line, told apart by ``kind``: ``start`` (a process began; what follows replaces
what an earlier, interrupted process wrote), ``step``, ``dev``, ``eval`` (a domain after a stage), ``task``, ``stage``,
``note``, ``finish``. A number that is not finite is written as null and named in ``not_finite``.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO
from urllib.parse import urlsplit

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gain_cl import matrix
from gain_cl.errors import StorageError

if TYPE_CHECKING:
    from types import TracebackType

    from gain_cl.config import RunConfig
    from gain_cl.record import Run, StageRecord

LINE_SECONDS = 10.0
"""Without a terminal, at most one progress line in this time (and one for each finished stage)."""

KINDS = {"steps": "training", "cells": "scoring", "items": "tasks"}
"""Units of work that the time left is estimated from, and what they are called while their pace is unknown."""


@dataclass
class Pace:
    """Work of one kind. total: units in the whole run (None: not known yet); done, seconds: what was measured so far."""

    total: int | None
    done: int = 0
    seconds: float = 0.0

    @property
    def left(self) -> float | None:
        """Seconds for what remains at the mean pace so far; None while nothing is known to go by."""
        if self.total is not None and self.done >= self.total:
            return 0.0
        return (self.total - self.done) * self.seconds / self.done if self.total is not None and self.done else None


class Tracker:
    """Follows one run; a context manager. The spine calls it; it calls nothing back.

    steps_total: optimiser steps of the run; cells_total: (stages + 1) x domains to score; items_total: task items to score in
    the whole run (None: learnt from the first scored stage). folder: the run's own folder, which gets metrics.jsonl.
    Raises StorageError when metrics.jsonl cannot be written.
    """

    def __init__(
        self,
        config: RunConfig,
        run_id: str,
        folder: Path,
        *,
        steps_total: int,
        cells_total: int,
        items_total: int | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.notes: list[str] = []  # what note() was given, each once
        self._config, self._run_id, self._folder, self._clock = config, run_id, folder, clock
        self._console = console or Console()
        self._trained = config.sequence.trained
        if not config.tasks.names:
            items_total = 0
        self._items_given = items_total is not None
        self._paces = {"steps": Pace(steps_total), "cells": Pace(cells_total), "items": Pace(items_total)}
        self._file: TextIO | None = None
        self._live: Live | None = None
        self._mirror = _Mirror(config, run_id, folder, self._warn) if config.track.backend == "wandb" else None
        self._begun = self._mark = self._said = clock()
        self._stage, self._phase = 0, "start"
        self._work: tuple[int, int, str, str] | None = None  # done, of, unit, what: of the current phase
        self._counted: dict[str, int] = {}  # units of the current stage that are in a pace already
        self._timed: dict[str, float] = {}  # and the seconds they took
        self._numbers = ""  # loss and speed of the last step, in words
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)  # (tokens, seconds) of the last steps
        self._rows: list[StageRecord] = []

    # --- what the spine calls ----------------------------------------------------------------------------------------

    def __enter__(self) -> Tracker:
        path = self._folder / "metrics.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # written line by line, so that tail -f follows
        except OSError as error:
            raise _unwritable(error, path) from error
        self._begun = self._mark = self._said = self._clock()
        self._write("start", {"run_id": self._run_id, "stages": len(self._trained), "steps": self._paces["steps"].total})
        self._say(f"run {self._run_id}")
        if self._mirror is not None:
            self._mirror.start()
        if self._console.is_interactive and self._console.file.isatty():  # FORCE_COLOR alone makes no terminal
            self._live = Live(get_renderable=self._view, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._mirror is not None:
            self._mirror.close(failed=kind is not None)
        if self._file is not None:
            self._file.close()
            self._file = None

    def note(self, text: str) -> None:
        """A line that a reader of the numbers should see: printed once, kept in ``notes``."""
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
        """``done`` of ``of`` units of the current phase are done; ``what`` is in hand. The unit is "cells" (a domain scored
        after a stage) or "items" (of tasks), from which the time left is estimated, or any other word, which is only shown."""
        now = self._clock()
        kind = unit if unit in KINDS else ""
        if kind:
            if kind == "items" and not self._items_given:
                self._paces["items"].total = of * self._task_stages()
            self._count(kind, done, now - self._mark)
        self._mark = now
        self._work = (done, of, unit, what)
        self._line(f"{self._where}: {self._phase}, {unit} {done}/{of} {what}".rstrip(), rest=True)

    def step(self, row: dict[str, Any]) -> None:
        """One optimiser step: stage, domain, step (from 1), steps, loss_nats, lr, grad_norm, tokens and seconds of this step."""
        now = self._clock()
        self._paces["steps"].done += 1
        self._paces["steps"].seconds += now - self._mark  # by this clock: reading data and logging included
        self._mark = now
        if row.get("tokens") and row.get("seconds"):
            self._recent.append((int(row["tokens"]), float(row["seconds"])))
        seconds = sum(s for _, s in self._recent)
        speed = f", {sum(t for t, _ in self._recent) / seconds:,.0f} tokens/s" if seconds else ""
        self._numbers = f", loss {_number(row.get('loss_nats'))}{speed}"
        self._work = (int(row["step"]), int(row["steps"]), "steps", "")
        self._write("step", row)
        if self._mirror is not None:
            self._mirror.step(row)
        self._line(f"{self._where}: step {row['step']}/{row['steps']}{self._numbers}", rest=True)

    def dev(self, row: dict[str, Any]) -> None:
        """Dev loss of the current domain within its stage: stage, domain, step, loss_nats. Its time counts as training."""
        self._write("dev", row)
        if self._mirror is not None:
            self._mirror.dev(row)
        self._line(f"{self._where}: step {row['step']}, dev loss {_number(row.get('loss_nats'))}")

    def stage(self, row: StageRecord) -> None:
        """A stage is learned and scored."""
        self._count("cells", len(row.domains), row.eval_seconds, exact=True)
        count = sum(t.items for t in row.tasks.values())
        if count:
            if not self._items_given:
                self._paces["items"].total = count * self._task_stages()
            self._count("items", count, row.task_seconds, exact=True)
        for domain, score in row.domains.items():
            self._write("eval", {"stage": row.index, "domain": domain, "loss_nats": score.loss_nats, **score.model_dump()})
        for task, result in row.tasks.items():
            self._write("task", {"stage": row.index, "task": task, **result.model_dump()})
        rest = row.model_dump(mode="json", exclude={"domains", "tasks"})
        self._write("stage", {"stage": rest.pop("index"), **rest})
        if self._mirror is not None:
            self._mirror.stage(row, base=self._rows[0] if self._rows else row)
        self._say(self._stage_line(row))
        self._rows.append(row)
        self._counted, self._timed, self._work, self._numbers = {}, {}, None, ""
        self._mark = self._clock()

    def finish(self, run: Run) -> None:
        """The record is written, and matrix.png in the run's folder if there is to be a picture in wandb."""
        self._write("finish", {"run_id": self._run_id, "seconds": self._clock() - self._begun})
        if self._mirror is not None:
            self._mirror.finish(run, self._folder / "matrix.png")

    def left(self) -> tuple[float, list[str]]:
        """Seconds left for the run by what was measured, and the kinds of work whose pace is not known yet."""
        known = {kind: pace.left for kind, pace in self._paces.items()}
        return sum(s for s in known.values() if s is not None), [KINDS[kind] for kind, s in known.items() if s is None]

    # --- numbers -----------------------------------------------------------------------------------------------------

    def _count(self, kind: str, done: int, seconds: float, exact: bool = False) -> None:
        """Raise a pace to ``done`` units in this stage. exact: ``seconds`` is what all of them took; else what the new ones did."""
        pace, before, spent = self._paces[kind], self._counted.get(kind, 0), self._timed.get(kind, 0.0)
        new = seconds if exact else spent + seconds
        if done > before or exact:
            pace.done += done - before
            pace.seconds += new - spent
            self._counted[kind], self._timed[kind] = done, new

    def _task_stages(self) -> int:
        """Stages after which tasks are scored."""
        when = self._config.tasks.stages
        return {"ends": 2, "all": len(self._trained) + 1}[when] if isinstance(when, str) else len(when)

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        clean, bad = _finite(row)
        line = {"kind": kind, **clean, **({"not_finite": bad} if bad else {})}
        try:
            self._file.write(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
        except OSError as error:
            raise _unwritable(error, self._file.name) from error

    # --- words -------------------------------------------------------------------------------------------------------

    @property
    def _domain(self) -> str:
        return self._trained[self._stage - 1] if 0 < self._stage <= len(self._trained) else "pretrained"

    @property
    def _where(self) -> str:
        return f"stage {self._stage} of {len(self._trained)} {self._domain}"

    @property
    def _rest(self) -> str:
        """The time left: "about 5:20 left", "? left" before anything is measured, "5:20 + ? (tasks) left" in between."""
        seconds, unknown = self.left()
        if not unknown:
            return f"about {_clock(seconds)} left"
        return f"{_clock(seconds)} + ? ({', '.join(unknown)}) left" if seconds else "? left"

    def _stage_line(self, row: StageRecord) -> str:
        now = {d: s.loss_nats for d, s in row.domains.items()}
        parts = []
        if now and (row.domain is None or not self._rows):
            values = sorted(now.values())
            parts.append(f"perplexity {_perplexity(values[0])} to {_perplexity(values[-1])} over {len(values)} domains")
        elif self._rows and row.domain in now and row.domain in self._rows[-1].domains:
            before = self._rows[-1].domains[row.domain].loss_nats
            parts.append(f"perplexity {_perplexity(before)} -> {_perplexity(now[row.domain])} ({_percent(now[row.domain] - before)})")
            earlier = [d for d in self._trained[: row.index - 1] if d in now and d in self._rows[-1].domains]
            if earlier:
                drift = sum(now[d] - self._rows[-1].domains[d].loss_nats for d in earlier) / len(earlier)
                parts.append(f"earlier domains {_percent(drift)} meanwhile")
        parts += [f"{task} accuracy {t.correct / t.items:.3f}" for task, t in row.tasks.items() if t.items]
        if row.train is not None:
            parts.append(f"learned in {_clock(row.train.seconds)}")
        parts.append(f"scored in {_clock(row.eval_seconds + row.task_seconds)}")
        if row.index < len(self._trained):
            parts.append(self._rest)
        return f"stage {row.index} of {len(self._trained)} {row.domain or 'pretrained'} done: {', '.join(parts)}"

    def _warn(self, text: str) -> None:
        self._write("note", {"text": text})
        self._say(f"note: {text}")

    def _say(self, text: str) -> None:
        """A line that stays, above the live view if there is one."""
        self._said = self._clock()
        line = f"{_clock(self._said - self._begun):>7}  {text}"
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
            grid.add_row("now", ProgressBar(total=max(1, of), completed=done), f"{unit} {done}/{of} {what}".rstrip())
        seconds, unknown = self.left()
        share = elapsed / (elapsed + seconds) if not unknown and elapsed + seconds > 0 else 0.0
        grid.add_row("run", ProgressBar(total=1.0, completed=share), f"{_clock(elapsed)} elapsed, {self._rest}")
        return Group(head, grid)


def _unwritable(error: OSError, path: Path | str) -> StorageError:
    return StorageError(f"cannot write: {error.strerror}", str(path), "free space or name another folder with output_dir=")


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "?"


def _clock(seconds: float) -> str:
    """1:02:03, 2:03, 0:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _perplexity(loss_nats: float) -> str:
    return f"{math.exp(min(loss_nats, 700)):.4g}"


def _percent(difference_nats: float) -> str:
    """A difference of losses as a change of perplexity."""
    return f"{100 * math.expm1(min(difference_nats, 700)):+.1f}%"


def _finite(value: Any, name: str = "") -> tuple[Any, dict[str, str]]:
    """The value with plain Python numbers and null for what is not finite, and the names and values of those."""
    if hasattr(value, "item"):  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None, {name: str(value)}
    if isinstance(value, dict):
        parts = {k: _finite(v, f"{name}.{k}" if name else str(k)) for k, v in value.items()}
        return {k: v for k, (v, _) in parts.items()}, {n: t for _, bad in parts.values() for n, t in bad.items()}
    if isinstance(value, list | tuple):
        entries = [_finite(v, f"{name}[{i}]") for i, v in enumerate(value)]
        return [v for v, _ in entries], {n: t for _, bad in entries for n, t in bad.items()}
    return value, {}


# --- wandb -----------------------------------------------------------------------------------------------------------

ONLINE_SECONDS = 15
"""Longest wait for wandb's server, whatever track.init_timeout_seconds says: with the offline start after it, under 20 s."""

FINISH_SECONDS = 20
"""Longest wait for the upload of what is left when the run ends; the rest stays on disk for ``wandb sync``."""

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|KEY", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


class _Mirror:
    """The run in wandb. Each call is guarded: the first exception is told in one line and ends the mirror, not the run.

    Axes of its own (wandb's step restarts with each process): ``stage`` for ppl/*, change_pct/* and task/*,
    ``train/global_step`` for train/*.
    """

    def __init__(self, config: RunConfig, run_id: str, folder: Path, tell: Callable[[str], None]) -> None:
        self._config, self._run_id, self._folder, self._tell = config, run_id, folder, tell
        self._run: Any = None

    @contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker does, the run goes on
            self._tell(f"wandb: {doing} failed ({_reason(error)}); the run goes on without it, its files are complete")
            self._abandon()

    def _abandon(self) -> None:
        """Leave nothing behind that could speak or wait later; that this may fail too was told already."""
        run, self._run = self._run, None
        with suppress(Exception):
            if run is not None:
                run.finish(exit_code=1)
        with suppress(Exception):
            if (wandb := sys.modules.get("wandb")) and wandb.run is None:  # no run of the caller's own
                wandb.teardown()

    def start(self) -> None:
        mode = self._mode()
        if mode == "disabled":
            return
        # Its crash reports go to the same server: out of reach, they would hold up the end of the process by 20 s.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        with self._guarded("start"):
            import wandb

            wandb.setup(wandb.Settings(silent=True))  # before anything that could print
            if mode != "offline" and not _has_key(wandb.setup().settings.base_url):
                self._tell(f"wandb: no API key (wandb login, or WANDB_API_KEY); tracking offline, {self._later}")
                mode = "offline"
            if mode != "offline":
                try:
                    self._run = self._init("online")
                except Exception as error:
                    if wandb.run is not None:
                        raise  # somebody else's run is active: the service cannot be restarted under it
                    wandb.teardown()  # the service still holds the run id of the failed attempt
                    wandb.setup(wandb.Settings(silent=True))
                    mode = "offline"
                    self._tell(f"wandb: not reached ({_reason(error)}); tracking offline, {self._later}")
            if self._run is None:
                self._run = self._init("offline")
            self._run.define_metric("stage", hidden=True)
            for metrics in ("ppl/*", "change_pct/*", "task/*"):
                self._run.define_metric(metrics, step_metric="stage")
            self._run.define_metric("train/global_step", hidden=True)
            self._run.define_metric("train/*", step_metric="train/global_step")

    @property
    def _later(self) -> str:
        return f"upload later with: wandb sync {self._folder / 'wandb' / 'offline-run-*'}"

    def _mode(self) -> str:
        """auto: as WANDB_MODE says, else online where a key is found."""
        mode = self._config.track.mode
        said = os.environ.get("WANDB_MODE", "")
        return said if mode == "auto" and said in ("online", "offline", "disabled") else mode

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        track, config = self._config.track, self._config
        # Of the time allowed, a third is kept for giving up and starting offline.
        wait = max(1.0, min(track.init_timeout_seconds, ONLINE_SECONDS) * 2 / 3)
        settings = {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "save_code": False,
            "x_disable_meta": True,  # it would copy the command line; the record says where the run was made
            "init_timeout": wait,
            "finish_timeout": FINISH_SECONDS,
        }
        return wandb.init(
            project=track.project,
            entity=track.entity,
            id=self._run_id,
            name=track.name or self._run_id,
            group=track.group or f"{config.sequence.name}/{config.model.name}/{config.method}",
            job_type=track.job_type,
            tags=track.tags,
            config=_public({**config.scientific(), "compute": config.compute.model_dump(mode="json"), "run_id": self._run_id}),
            dir=str(self._folder),
            mode=mode,
            reinit="create_new",  # leaves a run of the caller's own alone
            settings=wandb.Settings(**{k: v for k, v in settings.items() if k in wandb.Settings.model_fields}),  # 0.22 knows fewer
        )

    def _log(self, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        with self._guarded("log"):
            clean, _ = _finite(values)
            self._run.log({k: v for k, v in clean.items() if v is not None})

    def _global_step(self, row: dict[str, Any]) -> int:
        """Steps since the start of the run: a function of the position, so that a resumed run continues its curve."""
        return (int(row["stage"]) - 1) * self._config.train.stage_steps + int(row["step"])

    def step(self, row: dict[str, Any]) -> None:
        values = {f"train/{k}": v for k, v in row.items() if k in ("loss_nats", "lr", "grad_norm", "stage")}
        if row.get("tokens") and row.get("seconds"):
            values["train/tokens_per_second"] = row["tokens"] / row["seconds"]
        self._log({"train/global_step": self._global_step(row), **values})

    def dev(self, row: dict[str, Any]) -> None:
        self._log({"train/global_step": self._global_step(row), "train/dev_loss_nats": row.get("loss_nats")})

    def stage(self, row: StageRecord, base: StageRecord) -> None:
        values: dict[str, Any] = {"stage": row.index}
        for domain, score in row.domains.items():
            values[f"ppl/{domain}"] = _exp(score.loss_nats)
            if domain in base.domains:
                values[f"change_pct/{domain}"] = 100 * (_exp(score.loss_nats - base.domains[domain].loss_nats) - 1)
        for task, result in row.tasks.items():
            if result.items:
                values[f"task/{task}/accuracy"] = result.correct / result.items
                values[f"task/{task}/accuracy_norm"] = result.correct_norm / result.items
        self._log(values)

    def finish(self, run: Run, picture: Path) -> None:
        if self._run is None:
            return
        with self._guarded("finish"):
            import wandb

            r = run.record
            summary: dict[str, Any] = {"trainable_parameters": r.trainable_parameters, "peak_memory_bytes": r.peak_memory_bytes}
            losses = matrix.LossMatrix.from_documents(run.documents, r.trained, r.controls)
            for name, estimate in matrix.summary(losses).items():
                pct = estimate.map(lambda x: 100 * (_exp(x) - 1))
                summary |= {f"{name}_nats": estimate.value, f"{name}_pct": pct.value}
                summary |= {f"{name}_pct_low": pct.low, f"{name}_pct_high": pct.high}
            clean, _ = _finite(summary)
            self._run.summary.update({k: v for k, v in clean.items() if v is not None})
            if picture.exists():
                self._run.log({"matrix_image": wandb.Image(str(picture))})
            table = run.matrix
            rows: list[Any] = [[s.index, s.domain or "", *_finite(v)[0]] for s, v in zip(r.stages, table.to_numpy().tolist(), strict=True)]
            self._run.log({"matrix": wandb.Table(columns=["stage", "trained", *table.columns], data=rows)})

    def close(self, failed: bool) -> None:
        if self._run is None:
            return
        with self._guarded("upload"):
            run, self._run = self._run, None
            run.finish(exit_code=1 if failed else 0)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _reason(error: Exception) -> str:
    """The first line of an exception, without credentials."""
    lines = str(error).strip().splitlines() or [""]
    return str(_public(f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__))


def _has_key(base_url: str) -> bool:
    """Whether wandb would find credentials for this server without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if name and netrc.netrc(os.path.expanduser(name)).authenticators(urlsplit(base_url).netloc):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _public(value: Any) -> Any:
    """The value with credentials blanked: logins in URLs, and values of environment variables that are named like secrets."""
    if isinstance(value, dict):
        return {k: _public(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_public(v) for v in value]
    if isinstance(value, str):
        value = _LOGIN.sub("***@", value)
        for name, secret in os.environ.items():
            if _SECRET.search(name) and len(secret) >= 8:
                value = value.replace(secret, "***")
    return value
