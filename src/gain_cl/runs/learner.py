"""Learn the domains of a run: what trains on the model, how the past is kept, and the loop over the
steps of a stage."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from gain_cl import adapters, guards
from gain_cl.adapters import portable
from gain_cl.adapters.base import Adapter
from gain_cl.config.schema import RunConfig
from gain_cl.errors import ConfigError, DataError, GainError
from gain_cl.guards.base import Guard
from gain_cl.measure import perplexity, scoring
from gain_cl.measure.record import TrainStats
from gain_cl.models import compiled, load
from gain_cl.runs import inherit, train
from gain_cl.runs.inputs import Inputs, training_streams
from gain_cl.runs.resume import ADAPTER, GUARD, OPTIMIZER, Attempt, Stage
from gain_cl.runs.track import Tracker
from gain_cl.system import checkpoint, signals, watchdog
from gain_cl.system.failpoints import reach

Learned = tuple[TrainStats | None, Path | None]
"""What learning a stage cost, and the folder of its trained state. Both are None when a stage was
learned elsewhere than in a run."""


def attach(config: RunConfig, loaded: load.Loaded, seed: int) -> tuple[Adapter, Guard]:
    """Put adapter and guard on the untouched model. ConfigError when they do not fit it or each
    other."""
    adapter = adapters.build_adapter(config.adapter)
    adapter.attach(loaded)
    portable.begin(config.adapter, adapter, loaded)
    if adapter.trains and not adapter.parameters():
        what = f"method {config.method} trains nothing on this model"
        raise ConfigError(what, "adapter", "choose another method")
    if config.handover == "restart" and len(config.stages) > 1 and not adapter.restarts():
        what = f"the adapter of method {config.method} cannot restart"
        raise ConfigError(what, "handover", "use handover=continue")
    guard = guards.build_guard(config.guard)
    guard.attach(loaded, adapter, seed)
    return adapter, guard


def rehearse(config: RunConfig) -> None:
    """Attach to the model without its weights: what does not fit it is refused in a second, not
    once stage 0 is scored. So is a machine that cannot compile. What needs weights is left to the
    real model: PEFT's RuntimeError, and whatever else a plugin does with them."""
    device = load.device_of(config.compute.device, config.model.dtype)
    if config.model.load_in and device.type != "cuda":
        what = f"model.load_in={config.model.load_in} needs a CUDA GPU"
        raise ConfigError(what, "model.load_in", "leave it out")
    if config.compute.compile == "layers":
        compiled.try_compiler(device)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come when it counts
        try:
            attach(config, load.weightless(config.model), 0)
        except GainError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
        except Exception:
            return


@dataclass
class Learner:
    """Hold what learns: the adapter on the model, the guard, the optimiser and the streams of text,
    one of each stage.

    folder: the run's."""

    config: RunConfig
    folder: Path
    inputs: Inputs
    attempt: Attempt
    tracker: Tracker

    def __post_init__(self) -> None:
        """Attach to the model."""
        config, loaded = self.config, self.inputs.loaded
        torch.manual_seed(train.seed_of("init", config.seed))
        self.adapter, self.guard = attach(config, loaded, train.seed_of("guard", config.seed))
        if config.compute.gradient_checkpointing:
            load.checkpoint_activations(loaded.model)
        if config.compute.compile == "layers" and self.adapter.trains:
            loaded.compiled = compiled.Compiled(loaded.model)
        if self.adapter.trains:
            self.renew_optimizer()
            self.streams = training_streams(config, self.inputs)
        self.initial = self.adapter.state() if config.regime == "individual" else {}

    def renew_optimizer(self) -> None:
        """Begin with an optimiser of the adapter's parameters that has seen nothing."""
        self.optimizer = train.optimizer(self.adapter, self.config.train)

    def load(self, saved: Path) -> None:
        """Put the state of a verified folder into adapter, guard and optimiser."""
        self.adapter.load_state(checkpoint.read_tensors(saved, ADAPTER))
        self.guard.load_state(checkpoint.read_tensors(saved, GUARD))
        self.renew_optimizer()  # an adapter that restarted has other parameters
        state = checkpoint.read_tensors(saved, OPTIMIZER)
        train.load_optimizer_state(self.optimizer, self.adapter, state)

    def save(self, index: int, step: int, progress: train.Progress) -> Path:
        """Write a checkpoint, inside or at the end of a stage. Return its folder. DataError when
        the trained state is not finite."""
        size, files = self.config.stage.stage_steps, {ADAPTER: self.adapter.state()}
        if not all(torch.isfinite(t).all() for t in files[ADAPTER].values()):
            where, do = f"stage {index}, step {step}", "it was not saved; lower train.lr"
            raise DataError("the trained state is not finite", where, do)
        if memory := self.guard.state():
            files[GUARD] = memory
        if step < size or self.config.train.optimizer == "carried":
            files[OPTIMIZER] = train.optimizer_state(self.optimizer, self.adapter)
        about = self.attempt.move(index, step, self.tracker.position())
        about["progress"] = asdict(progress)
        text = json.dumps(about, indent=1, allow_nan=False) + "\n"
        path = self.folder / "ckpt" / f"step-{(index - 1) * size + step}"
        checkpoint.save(path, {**files, "state.json": text.encode()})
        reach("commit")
        self.tracker.commit()
        checkpoint.prune(path.parent)
        return path

    def begin_stage(self, index: int) -> None:
        """Prepare adapter and optimiser for a stage that nothing is learned of yet."""
        if self.config.regime == "individual":
            self.adapter.load_state(self.initial)
        if self.config.handover == "restart" and index > 1:
            torch.manual_seed(train.seed_of("init", self.config.seed, index))
            self.adapter.restart()
            if self.inputs.loaded.compiled is not None:
                self.inputs.loaded.compiled.anew()
        if self.config.train.optimizer == "fresh":
            self.renew_optimizer()

    def learn(self, index: int) -> Learned:
        """Train a stage, from where an earlier attempt stopped in it."""
        config, position, tracker = self.config, self.attempt.position, self.tracker
        size, sequences = config.stage.stage_steps, config.train.sequences
        blocks = self.streams[index - 1]
        tracker.phase(f"learn {blocks.name}", stage=index)
        progress, saved = train.Progress(), self.attempt.folder
        if self.attempt.inside == index:
            progress = train.Progress.read(self.attempt.progress, saved)
        else:
            self.begin_stage(index)
        self.guard.before_stage(index, self.streams[: index - 1], size * sequences)
        micro = min(config.compute.micro_batch or sequences, position.fits or sequences)
        due = checkpoint.Due(config.checkpoint.every_minutes, config.checkpoint.every_steps)
        for row in train.stage(
            self.inputs.loaded, self.adapter, self.guard, blocks, config.stage, self.optimizer,
            # individual: as if it were the only stage
            index=index, seed=config.seed, place=1 if config.regime == "individual" else index,
            micro_batch=micro, start=progress.steps,
        ):  # fmt: skip
            step = row["step"]
            watchdog.beat()
            tracker.step(row | {"steps": size})
            if row["micro_batch"] < micro:
                position.fits = micro = row["micro_batch"]
                position.events.append(
                    f"out of memory at step {step} of stage {index}: from there {micro} "
                    "sequences a forward pass"
                )
                tracker.note(position.events[-1])
            if (spike := progress.add(row)) is not None:
                tracker.spike(row | spike)
            if config.train.dev_every and step % config.train.dev_every == 0:
                self.score_dev(row, progress)
            if step == size:
                self.guard.after_stage(index, blocks.name, blocks)
            if step == size or due.now(step) or signals.asked():
                saving = time.perf_counter()
                saved = self.save(index, step, progress)
                due.saved(time.perf_counter() - saving)
                signals.poll()
        return progress.stats(config.train.lr), saved

    def score_dev(self, row: dict[str, Any], progress: train.Progress) -> None:
        """Score the dev documents of what is being learned, and of the controls. row: of the step
        that was just done."""
        config, inputs, sums = self.config, self.inputs, {"step": row["step"]}
        told = {k: row[k] for k in ("stage", "domain", "step")}
        settings = config.eval.model_copy(update={"split": "dev"})
        learned = config.sequence.trained if config.regime == "joint" else [row["domain"]]
        with signals.held():  # the step is not saved yet
            for prefix, names in (("", learned), ("controls_", config.sequence.controls)):
                parts = [
                    scoring.score_domain(
                        inputs.loaded, inputs.domains[name], settings, config.compute.eval_batch
                    )
                    for name in names
                ]
                if parts:
                    total = perplexity.total(pd.concat(parts))
                    sums |= {f"{prefix}nll_nats": total.nll_nats, f"{prefix}tokens": total.tokens}
                    told[f"{prefix}loss_nats"] = total.loss_nats
        progress.dev.append(sums)
        self.tracker.dev(told)

    def take_over(self, stage: Stage) -> Learned:
        """Load a stage that was learned before: by another run, whose scores are shared, or by this
        one, which lost them."""
        self.load(stage.folder)
        if len(stage.rows):
            inherit.share_scores(stage, self.folder / "cells")
        return stage.record.train, stage.folder

    def load_given(self, index: int) -> Learned:
        """Load a stage that was learned elsewhere than in a run."""
        name = self.config.stages[index - 1]
        self.tracker.phase(f"load what learned {name}", stage=index)
        self.adapter.take(index)
        return None, None

    def drop_states_before(self, index: int) -> None:
        """Remove the trained states of earlier stages, where only the last is kept."""
        keep = self.config.checkpoint.keep_stages
        if (keep or ("all" if self.adapter.keep_stages else "last")) == "last":
            for older in range(1, index):
                checkpoint.drop(self.attempt.stages[older].folder, [ADAPTER, GUARD, OPTIMIZER])
