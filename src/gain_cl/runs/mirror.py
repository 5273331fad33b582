"""Show a run in wandb, on request: the only door to it. Torch-free, and wandb is imported only when
a run asks for it.

It mirrors what the files say. It may be absent, refuse or vanish at any moment: one line tells, and
neither a number nor the end of the run changes. It is fed from metrics.jsonl, and only what a
checkpoint covers, so each row is shown once however often the run was interrupted.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gain_cl.errors import scrubbed
from gain_cl.stats import answers, format, matrix
from gain_cl.system.failpoints import reach

if TYPE_CHECKING:
    from gain_cl.config.schema import RunConfig
    from gain_cl.measure.record import Run

FINISH_SECONDS = 15
"""Longest wait for the upload of what is left when the run ends; the rest stays on disk for ``wandb
sync``."""

SHOWN = ("step", "dev", "stage")
"""Kinds of rows of metrics.jsonl that become a row here. A stage's row takes in the eval and task
lines before it."""


class Mirror:
    """Follow a run in wandb, where its configuration asks for it. Each call is guarded: the first
    exception is told in one line and ends the mirror, not the run.

    wandb's step is the row's number in the whole run. Axes of its own besides: ``stage`` for ppl/*,
    change_pct/* and task/*, ``train/global_step`` for train/*.

    When a run goes on, what wandb has already is not sent again. Online the server says what that
    is. Offline, wandb writes to its file with delay, so that a killed process leaves an unknown
    part: earlier offline folders of the run are removed, and all rows are written again from
    metrics.jsonl. So a run has one offline folder at most, and it holds the whole run.
    """

    def __init__(
        self, config: RunConfig, run_id: str, folder: Path, tell: Callable[[str], None]
    ) -> None:
        self._config, self._run_id, self._folder, self._tell = config, run_id, folder, tell
        self._run: Any = None
        self._sent = 0  # rows that wandb has been given
        self._read = 0  # bytes of metrics.jsonl that have been looked at
        self._base: dict[str, float] = {}  # loss of each domain before anything was learned
        self._values: dict[str, Any] = {}  # of the stage whose eval and task lines are being read

    @contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker does, the run goes on
            self._tell(
                f"wandb: {doing} failed ({_reason(error)}); the run goes on without it, its files "
                "are complete"
            )
            self._abandon()

    def _abandon(self) -> None:
        """Leave nothing behind that could speak or wait later; that this may fail too was told
        already."""
        run, self._run = self._run, None
        with suppress(Exception):
            if run is not None:
                run.finish(exit_code=1)
        with suppress(Exception):
            if (
                wandb := sys.modules.get("wandb")
            ) and wandb.run is None:  # no run of the caller's own
                wandb.teardown()

    def start(self, resuming: bool) -> None:
        """Begin to follow. resuming: metrics.jsonl holds rows of an earlier process."""
        mode = self._mode()
        if mode == "disabled":
            return
        # Its crash reports go to the same server: out of reach, they would hold up the end of the
        # process by 20 s.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        with self._guarded("start"):
            import wandb

            wandb.setup(wandb.Settings(silent=True))  # before anything that could print
            from requests.utils import get_netrc_auth

            names, server = ("API_KEY", "IDENTITY_TOKEN_FILE"), wandb.setup().settings.base_url
            key = any(os.environ.get(f"WANDB_{name}") for name in names) or get_netrc_auth(server)
            problem = ""
            if mode != "offline" and not key:
                problem = "no API key (wandb login, or WANDB_API_KEY)"
            elif mode != "offline":
                try:
                    self._run = self._init("online", "allow" if resuming else None)
                except Exception as error:
                    if wandb.run is not None:
                        # somebody else's run is active: the service cannot be restarted under it
                        raise
                    wandb.teardown()  # the service still holds the run id of the failed attempt
                    wandb.setup(wandb.Settings(silent=True))
                    problem = f"not reached ({_reason(error)})"
            if problem:
                later = f"wandb sync {self._folder / 'wandb' / 'offline-run-*'}"
                self._tell(f"wandb: {problem}; tracking offline, upload later with: {later}")
            online = self._run is not None
            if not online:
                self._run = self._init("offline", None)
            reach("dashboard.opened")
            self._sent = self._run.starting_step if online else 0
            for folder in (self._folder / "wandb").glob(f"offline-run-*-{self._run_id}"):
                if folder.name != Path(self._run.dir).parent.name:
                    shutil.rmtree(folder)
            self._run.define_metric("stage", hidden=True)
            for metrics in ("ppl/*", "change_pct/*", "task/*"):
                self._run.define_metric(metrics, step_metric="stage")
            self._run.define_metric("train/global_step", hidden=True)
            self._run.define_metric("train/*", step_metric="train/global_step")

    def _mode(self) -> str:
        """Return the mode: disabled without backend=wandb. auto is as WANDB_MODE says, else online
        where a key is found."""
        track, said = self._config.track, os.environ.get("WANDB_MODE", "")
        if track.backend != "wandb":
            return "disabled"
        return (
            said
            if track.mode == "auto" and said in ("online", "offline", "disabled")
            else track.mode
        )

    def _init(self, mode: Literal["online", "offline"], resume: Literal["allow"] | None) -> Any:
        """Begin a run of wandb. resume: "allow" goes on with what the server has of this id; None
        replaces it."""
        import wandb

        track, config = self._config.track, self._config
        # Of the time allowed (RunConfig's bound keeps the start under 20 s), a third is kept for
        # giving up and starting offline.
        wait = max(1.0, track.init_timeout_seconds * 2 / 3)
        settings = {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "save_code": False,
            # it would copy the command line; the record says where the run was made
            "x_disable_meta": True,
            "init_timeout": wait,
            "finish_timeout": FINISH_SECONDS,
        }
        return wandb.init(
            project=track.project,
            entity=track.entity,
            id=self._run_id,
            resume=resume,
            name=track.name or self._run_id,
            group=track.group or f"{config.sequence.name}/{config.model.name}/{config.method}",
            job_type=track.job_type,
            tags=track.tags,
            config=_public(
                {
                    **config.scientific(),
                    "compute": config.compute.model_dump(mode="json"),
                    "run_id": self._run_id,
                }
            ),
            dir=str(self._folder),
            mode=mode,
            reinit="create_new",  # leaves a run of the caller's own alone
            settings=wandb.Settings(
                **{k: v for k, v in settings.items() if k in wandb.Settings.model_fields}
            ),  # 0.22 knows fewer
        )

    def send(self, length: int) -> None:
        """Give wandb the rows among the first ``length`` bytes of metrics.jsonl that it does not
        have."""
        if self._run is None:
            return
        with self._guarded("log"):
            with open(self._folder / "metrics.jsonl", "rb") as file:
                file.seek(self._read)
                lines = file.read(length - self._read).splitlines()
            self._read = length
            for row in map(json.loads, lines):
                values = self._shown(row)
                if values and row["row"] >= self._sent:
                    self._run.log(_known(values), step=row["row"], commit=True)
                    self._sent = row["row"] + 1

    def _shown(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return what wandb shows for a row of metrics.jsonl: nothing for most kinds."""
        kind, values = row["kind"], self._values
        if kind in ("step", "dev"):
            # A function of the position, so that a resumed run continues its curve.
            done = (int(row["stage"]) - 1) * self._config.stage.stage_steps + int(row["step"])
            values = {"train/global_step": done}
            if kind == "dev":
                return {**values, "train/dev_loss_nats": row["loss_nats"]}
            for key in ("loss_nats", "lr", "grad_norm", "stage", "micro_batch"):
                values[f"train/{key}"] = row[key]
            return {**values, "train/tokens_per_second": row["tokens"] / row["seconds"]}
        if kind == "eval" and row["loss_nats"] is not None:
            domain, loss = row["domain"], row["loss_nats"]
            if row["stage"] == 0:
                self._base[domain] = loss
            values[f"ppl/{domain}"] = math.exp(loss) if loss < 700 else math.inf
            if domain in self._base:
                values[f"change_pct/{domain}"] = format.change(loss - self._base[domain])
        elif kind == "task" and row["items"]:
            counts = {"accuracy": row["correct"], "accuracy_norm": row["correct_norm"]}
            found = {n: x / row["items"] for n, x in counts.items() if x is not None}
            found |= row.get("metrics", {})
            values |= {f"task/{row['task']}/{name}": x for name, x in found.items()}
        elif kind == "stage":
            self._values = {}
            return {"stage": row["stage"], **values}
        return {}

    def finish(self, run: Run, picture: Path) -> None:
        """Send what is known at the end: the summary, the matrix, and its picture if there is
        one."""
        if self._run is None:
            return
        with self._guarded("finish"):
            import wandb

            r = run.record
            summary: dict[str, Any] = {
                "trainable_parameters": r.trainable_parameters,
                "peak_memory_bytes": r.peak_memory_bytes,
                "train_seconds": sum(s.train.seconds for s in r.stages if s.train is not None),
                **({"tainted": "; ".join(r.tainted)} if r.tainted else {}),
                **_tasks(run),
            }
            losses = matrix.LossMatrix.from_documents(
                run.documents, r.trained, r.controls, r.regime
            )
            for name, estimate in matrix.summary(losses).items():
                pct = estimate.map(format.change)
                summary |= {f"{name}_nats": estimate.value, f"{name}_pct": pct.value}
                summary |= {f"{name}_pct_low": pct.low, f"{name}_pct_high": pct.high}
            self._run.summary.update(_known(summary))
            last: dict[str, Any] = {}
            if picture.exists():
                last["matrix_image"] = wandb.Image(str(picture))
            table = run.matrix
            rows: list[Any] = [
                [s.index, s.domain or "", *format.finite(v)[0]]
                for s, v in zip(r.stages, table.to_numpy().tolist(), strict=True)
            ]
            last["matrix"] = wandb.Table(columns=["stage", "trained", *table.columns], data=rows)
            self._run.log(last, step=self._sent, commit=True)

    def close(self, failed: bool) -> None:
        """Wait for the upload, but not for ever."""
        if self._run is None:
            return
        with self._guarded("upload"):
            run, self._run = self._run, None
            run.finish(exit_code=1 if failed else 0)
            reach("dashboard.closed")


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are known and finite."""
    return {k: v for k, v in format.finite(values)[0].items() if v is not None}


def _tasks(run: Run) -> dict[str, float]:
    """Return each task's accuracy at the last stage that scored it, and what changed since the
    first, with 95% intervals over items."""
    found: dict[str, float] = {}
    stages = run.record.stages
    for task in dict.fromkeys(t for s in stages for t in s.tasks):
        scored = [s for s in stages if task in s.tasks]
        first, last = scored[0], scored[-1]
        found |= {f"task/{task}/{name}": x for name, x in last.tasks[task].numbers.items()}
        if first is not last and last.tasks[task].correct is not None:
            for name, e in answers.change(run.items, task, first.index, last.index).items():
                key = f"task/{task}/{name}_change"
                found |= {key: e.value, f"{key}_low": e.low, f"{key}_high": e.high}
    return found


def _reason(error: Exception) -> str:
    """Return the first line of an exception, without credentials."""
    name, lines = type(error).__name__, str(error).strip().splitlines()
    return str(_public(f"{name}: {lines[0]}" if lines else name))


def _public(value: Any) -> Any:
    """Return the value with every text in it scrubbed of secrets."""
    if isinstance(value, dict):
        return {k: _public(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_public(v) for v in value]
    return scrubbed(value) if isinstance(value, str) else value
