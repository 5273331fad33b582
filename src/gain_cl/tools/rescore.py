"""A finished run's model at hand again, to be changed without training and scored as the run was:
for recombine, interpolate."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gain_cl.compose import composition
from gain_cl.config.schema import Given, Model, RunConfig
from gain_cl.errors import ConfigError, DataError, printable
from gain_cl.measure import record, scoring
from gain_cl.runs import inputs, plan, resume
from gain_cl.stats import format
from gain_cl.system.terminal import console
from gain_cl.tools.command import Parser, find_record

if TYPE_CHECKING:
    from torch import Tensor

    from gain_cl.adapters.base import Adapter
    from gain_cl.models.load import Loaded


class Bench:
    """The pretrained model of a run, its domains and the trained state of its stages. Axes: D
    domains."""

    def __init__(self, run: record.Run, output_dir: str | None, given: bool = False) -> None:
        """given: whether stages that were trained elsewhere will do, too."""
        self.run, self.record = run, run.record
        if (made := self.record.interpolated) is not None:
            raise ConfigError(
                "it is interpolated and has no trained state of its own",
                self.record.run_id,
                f"use {made.of}",
            )
        config = RunConfig.model_validate(
            {**run.record.config, **({"output_dir": output_dir} if output_dir else {})}
        )
        if isinstance(config.adapter, Given) and not given:
            raise ConfigError(
                "its stages were trained elsewhere",
                run.record.run_id,
                "it has no trained state of its own",
            )
        if (
            getattr(config.adapter, "init_from", None) is not None
        ):  # the saved states hold what they began from
            config = config.model_copy(
                update={"adapter": config.adapter.model_copy(update={"init_from": None})}
            )
        self.config = config
        composition.load_plugins(self.config.plugins)
        self.folder = Path(self.config.output_dir) / run.record.run_id
        self.names = [*run.record.trained, *run.record.controls]

    def open(self, rows: int) -> None:
        """Load model and domains; rows: how many times the domains will be scored. DataError when
        they are not the run's."""
        pins = plan.prepare(self.config.model_copy(update={"resume": "never"})).pins
        for part, recorded in (
            (p, self.record.pins.get(p)) for p in ("model", "domains", "plugins", "checkpoints")
        ):
            if pins.get(part) != recorded:
                raise DataError(
                    f"{part}: not what the run read",
                    self.record.run_id,
                    "restore what the run read",
                )
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=stderr(),
            transient=True,
        )
        self._cells = self._bar.add_task("load", total=rows * len(self.names))
        self._rows = 0
        self._bar.start()
        self.inputs = inputs.load_inputs(self.config, pins, self)
        self.loaded = self.inputs.loaded

    def close(self) -> None:
        """End the progress display."""
        if hasattr(self, "_bar"):
            self._bar.stop()

    def phase(self, text: str, stage: int = 0) -> None:
        """What is being done; see track.Tracker."""
        self._bar.update(self._cells, description=text)

    def progress(self, done: int, of: int, unit: str, what: str = "") -> None:
        """How far; see track.Tracker."""
        if unit == "cells":
            self._bar.update(
                self._cells, completed=self._rows * of + done, description=f"score {what}"
            )

    def saved(self, stage: int) -> Path:
        """The folder of the trained state after a stage, verified. DataError when it was not
        kept."""
        told = self.record.stages[stage]
        saved = resume.read_stage(self.folder / "stages" / f"{stage:02d}-{told.domain}").folder
        if not (saved / resume.ADAPTER).exists():
            raise DataError(
                "the trained state of this stage was not kept",
                str(saved),
                "run again with checkpoint.keep_stages=all",
            )
        return saved

    def state(self, stage: int) -> dict[str, Tensor]:
        """The trained state after a stage."""
        from gain_cl.system import checkpoint

        return checkpoint.read_tensors(self.saved(stage), resume.ADAPTER)

    def attach(self, loaded: Loaded) -> Adapter:
        """The run's adapter, on a model."""
        import torch

        from gain_cl import adapters
        from gain_cl.runs import train

        adapter = adapters.build_adapter(self.config.adapter)
        with torch.random.fork_rng():
            torch.manual_seed(train.seed_of("init", self.config.seed))
            adapter.attach(loaded)
        return adapter

    @property
    def fp32(self) -> Model:
        """The pretrained model in full precision, for what is computed on weights."""
        return self.config.model.model_copy(update={"dtype": "float32", "load_in": None})

    def tuned(self, model: Model, stage: int) -> tuple[Loaded, Adapter]:
        """The model after a stage, the adapter on it."""
        from gain_cl.models import load

        loaded = load.load_model(model, self.loaded.device)
        adapter = self.attach(loaded)
        if adapter.trains:
            adapter.load_state(self.state(stage))
        else:
            adapter.take(stage)
        return loaded, adapter

    def folded(self, stage: int) -> dict[str, Tensor]:
        """Every parameter of the model after a stage, the adapter folded in, in fp32. DataError
        when that is not all it does."""
        import torch

        loaded, adapter = self.tuned(self.fp32, stage)
        ids_BT = torch.arange(64, device=loaded.device)[None] % loaded.vocabulary
        with torch.no_grad():
            before = loaded.model(ids_BT).logits
            adapter.absorb()
            moved = ((loaded.model(ids_BT).logits - before).abs().max() / before.abs().max()).item()
        if not moved <= 1e-3:
            what = (
                "the folded weights compute something else than the adapter: logits differ by "
                f"{moved:.0e} of the largest"
            )
            raise DataError(what, f"stage {stage}", "what it does is no change of the weights")
        return {name: p.detach() for name, p in loaded.model.named_parameters()}

    def score_D(self, weights: dict[str, Tensor], **what: Any) -> np.ndarray:
        """Nats per token of every domain, see ``score``."""
        return self.losses(self.score(weights, **what))

    def losses(self, scores: scoring.Scores) -> np.ndarray:
        """Nats per token of every domain."""
        return np.array([scores.domains[d].loss_nats for d in self.names])

    def score(self, weights: dict[str, Tensor], **what: Any) -> scoring.Scores:
        """Every domain by the model as it is now. weights, what: all that makes it differ from the
        base."""
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(
                f"{name} {tuple(weights[name].shape)}\n".encode()
                + weights[name].detach().cpu().contiguous().numpy().tobytes()
            )
        identity = {**self.inputs.identity, "weights": digest.hexdigest(), **what}
        identity |= {
            "adapter": self.config.scientific()["adapter"],
            "plugins": self.record.pins["plugins"],
            "seed": self.config.seed,
        }
        cells, batch = self.folder.parent / "cells", self.config.compute.eval_batch
        found = scoring.score_domains(
            self.loaded, self.inputs.domains, self.config.eval, batch, identity, cells, self
        )
        self._rows += 1
        return found


def stderr() -> Any:
    """Where progress is shown."""
    from rich.console import Console

    return Console(file=sys.stderr)


def arguments(verb: str, usage: str, description: str) -> Parser:
    """The arguments that both verbs take."""
    parser = Parser(
        verb,
        usage=f"python -m gain_cl {verb} RECORD.json|RUN_ID {usage} [--json] [--results-dir DIR] "
        "[--output-dir DIR]",
    )
    parser.description = description
    parser.add_argument("run", help="path of a record, or a run id (its beginning is enough)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument(
        "--results-dir", default="results", help="where runs/RUN_ID.json are (default: %(default)s)"
    )
    parser.add_argument("--output-dir", help="output_dir of the run (default: as recorded)")
    return parser


def bench(args: Any) -> Bench:
    """The run that the arguments name."""
    return Bench(record.load(find_record(args.run, Path(args.results_dir))), args.output_dir)


def number(text: str, key: str) -> float:
    """A finite number of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise ConfigError(f"{text!r} is no number", key, "give a finite number")
    return value


def show(
    title: str,
    names: list[str],
    rows: list[tuple[str, np.ndarray]],
    write: Callable[[float], str],
    notes: list[str],
) -> None:
    """A table of rows by domains."""
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for label, values in rows:
        table.add_row(printable(label), *(write(v) for v in values))
    out = console()
    out.print(table)
    out.print()
    for note in notes:
        out.print(note, markup=False, highlight=False, soft_wrap=True)


perplexity, percent = format.perplexity, format.percent
