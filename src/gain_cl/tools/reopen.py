"""Open the model of a finished run again, to look at it, to change it without training, and to
score it as the run was scored: for recombine, interpolate, diagnose and export."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gain_cl import adapters
from gain_cl.compose import composition
from gain_cl.config.schema import Model
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import record, scoring
from gain_cl.paper.table import Row, Table, Value, print_table
from gain_cl.runs import inputs, plan, resume
from gain_cl.stats import format
from gain_cl.system import checkpoint
from gain_cl.tools.command import recorded_config

if TYPE_CHECKING:
    from torch import Tensor

    from gain_cl.adapters.base import Adapter
    from gain_cl.models.load import Loaded

ABSORBED = 1e-3
"""Difference of a logit, as a share of the largest, beyond which folding in fp32 is no rounding."""


class Reopened:
    """The pretrained model of a run, its domains and the trained state of its stages. Axes: D
    domains."""

    def __init__(self, run: record.Run, output_dir: str | None = None) -> None:
        self.run, self.record, config = run, run.record, recorded_config(run.record)
        if output_dir:
            config = config.model_copy(update={"output_dir": output_dir})
        if getattr(config.adapter, "init_from", None) is not None:
            # the saved states hold what they began from
            adapter = config.adapter.model_copy(update={"init_from": None})
            config = config.model_copy(update={"adapter": adapter})
        composition.load_plugins(config.plugins)
        self.config, self.folder = config, Path(config.output_dir) / run.record.run_id
        self.names, self.last = run.record.trained + run.record.controls, len(run.record.stages) - 1

    @contextmanager
    def opened(self) -> Iterator[Loaded]:
        """Load model and domains, and show what is done for the block. DataError: they are not the
        run's."""
        from rich.console import Console

        made = plan.prepare(self.config.model_copy(update={"resume": "never"}))
        for part in ("model", "domains", "plugins", "checkpoints"):
            if made.pins.get(part) != self.record.pins.get(part):
                what = f"{part}: not what the run read"
                raise DataError(what, self.record.run_id, "restore what the run read")
        with Console(stderr=True).status("load") as self.status:
            self.inputs = inputs.load_inputs(self.config, made, self)
            self.loaded = self.inputs.loaded
            yield self.loaded

    def phase(self, text: str, stage: int = 0) -> None:
        """Show what is being done, see track.Tracker."""
        self.status.update(text)

    def progress(self, done: int, of: int, unit: str, what: str = "") -> None:
        """Show how far it is, see track.Tracker."""
        self.status.update(f"{what}: {done} of {of} {unit}")

    def place(self, stage: int) -> Path:
        """Return the folder of a stage."""
        return self.folder / "stages" / f"{stage:02d}-{self.record.stages[stage].domain}"

    def state(self, stage: int) -> dict[str, Tensor]:
        """Return the trained state after a stage, verified. DataError: it was not kept."""
        return checkpoint.read_tensors(self.saved(stage), resume.ADAPTER)

    def saved(self, stage: int) -> Path:
        """Return the folder of a trained state, verified. DataError: it was not kept."""
        folder = self.place(stage)
        if not (folder / resume.ADAPTER).exists():
            raise DataError(
                "the trained state of this stage is not there",
                str(folder),
                "it was not kept (checkpoint.keep_stages=all), or is in another --output-dir",
            )
        checkpoint.verify(folder)
        return folder

    def attach(self, loaded: Loaded) -> Adapter:
        """Put the run's adapter on a model."""
        import torch

        from gain_cl.runs import train

        adapter = adapters.build_adapter(self.config.adapter)
        with torch.random.fork_rng([loaded.device] if loaded.device.type == "cuda" else []):
            torch.manual_seed(train.seed_of("init", self.config.seed))
            adapter.attach(loaded)
        return adapter

    @property
    def fp32(self) -> Model:
        """The pretrained model in full precision, for what is computed on weights."""
        return self.config.model.model_copy(update={"dtype": "float32", "load_in": None})

    def tuned(self, model: Model, stage: int) -> tuple[Loaded, Adapter]:
        """Load the model after a stage, with the adapter on it."""
        from gain_cl.models import load

        opened = hasattr(self, "loaded")
        device = self.loaded.device if opened else load.device_of("auto", model.dtype)
        loaded = load.load_model(model, device)
        adapter = self.attach(loaded)
        if adapter.trains:
            adapter.load_state(self.state(stage))
        else:
            adapter.take(stage)
        return loaded, adapter

    def folded(self, stage: int) -> dict[str, Tensor]:
        """Return every parameter of the model after a stage in fp32, the adapter folded in.
        DataError: that is not all it does."""
        loaded, adapter = self.tuned(self.fp32, stage)
        absorb(loaded, adapter)
        return {name: p.detach() for name, p in loaded.model.named_parameters()}

    def losses_D(self, **what: Any) -> np.ndarray:
        """Score the model as it is now, and return nats per token of every domain. what: all that
        makes it differ from the base, beside the trained states."""
        states = [checkpoint.manifest(self.place(k)) for k in range(1, self.last + 1)]
        identity = {**self.inputs.identity, "run": self.record.run_id, "states": states, **what}
        cells, batch = self.folder.parent / "cells", self.config.compute.eval_batch
        scores = scoring.score_domains(
            self.loaded, self.inputs.domains, self.config.eval, batch, identity, cells, self
        )
        return np.array([scores.domains[d].loss_nats for d in self.names])


def absorb(loaded: Loaded, adapter: Adapter) -> float:
    """Fold an adapter into the weights of its fp32 model. Return by how much that moves the logits
    of 64 tokens, as a share of the largest. DataError: it is more than rounding."""
    import torch

    ids_BT = torch.arange(64, device=loaded.device)[None] % loaded.vocabulary
    with torch.no_grad():
        before = loaded.model(ids_BT).logits
        adapter.absorb()
        moved = float((loaded.model(ids_BT).logits - before).abs().max() / before.abs().max())
    if not moved <= ABSORBED:
        what = f"folding the adapter moves the logits by {moved:.0e} of the largest"
        raise DataError(what, "absorb", "what it does is no change of the weights")
    return moved


def number(text: str, key: str) -> float:
    """Return a finite number of the command line."""
    try:
        if math.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    raise ConfigError(f"{text!r} is no number", key, "give a finite number")


def stage_of(text: str | int | None, last: int) -> int:
    """Return a stage of a run by its number; None: the last."""
    if text is None:
        return last
    if (stage := str(text)) not in map(str, range(1, last + 1)):
        do = "stage 0 is the pretrained model itself"
        raise ConfigError(f"stage {text!r} is not among 1..{last}", "stage", do)
    return int(stage)


def show(
    title: str, names: Iterable[str], rows: dict[str, Any], *notes: str, write: Any = format.percent
) -> None:
    """Print losses or their differences (in nats) by label, with a column for each name."""
    lines = [
        Row([label, *(Value(float(x), write=write) for x in row)]) for label, row in rows.items()
    ]
    print_table(Table("", title, ["", *names], lines, notes))
