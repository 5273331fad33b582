"""The run in wandb, on request: the only door to it. Torch-free, and wandb is imported only when a run asks for it.

A mirror of what the files say: it may be absent, refuse or vanish at any moment, and neither a number nor the end of
the run changes; one line tells.
"""

from __future__ import annotations

import math
import netrc
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from gain_cl import matrix, terms
from gain_cl.config import SECRET_NAME

if TYPE_CHECKING:
    from gain_cl.config import RunConfig
    from gain_cl.record import Run, StageRecord

FINISH_SECONDS = 20
"""Longest wait for the upload of what is left when the run ends; the rest stays on disk for ``wandb sync``."""

_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


class Mirror:
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
        # Of the time allowed (RunConfig's bound keeps the start under 20 s), a third is kept for giving up and starting offline.
        wait = max(1.0, track.init_timeout_seconds * 2 / 3)
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
            clean, _ = terms.finite(values)
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
                values[f"change_pct/{domain}"] = terms.change(score.loss_nats - base.domains[domain].loss_nats)
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
                pct = estimate.map(terms.change)
                summary |= {f"{name}_nats": estimate.value, f"{name}_pct": pct.value}
                summary |= {f"{name}_pct_low": pct.low, f"{name}_pct_high": pct.high}
            clean, _ = terms.finite(summary)
            self._run.summary.update({k: v for k, v in clean.items() if v is not None})
            if picture.exists():
                self._run.log({"matrix_image": wandb.Image(str(picture))})
            table = run.matrix
            cells = table.to_numpy().tolist()
            rows: list[Any] = [[s.index, s.domain or "", *terms.finite(v)[0]] for s, v in zip(r.stages, cells, strict=True)]
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
            if SECRET_NAME.search(name) and len(secret) >= 8:
                value = value.replace(secret, "***")
    return value
