"""One run, from a configuration to a record. READ THIS FIRST: it is the whole procedure, top to
bottom.

``prepare`` is torch-free: it pins the inputs, names the run and says whether it is finished.
``execute`` does the work: score the untouched model on every domain (stage 0); attach the adapter;
then for each domain learn it and score every domain again. Nothing here knows what a forgetting
matrix is: that is derived from the record afterwards.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from gain_cl import adapters, errors, guards
from gain_cl.adapters import portable
from gain_cl.compose import checks
from gain_cl.config.schema import Eval, RunConfig
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import provenance, record, scoring, tasks
from gain_cl.models import load
from gain_cl.runs import inherit, resume, same
from gain_cl.runs import inputs as inputs_
from gain_cl.runs import plan as plan_
from gain_cl.system import checkpoint, lock, signals
from gain_cl.system.failpoints import reach
from gain_cl.system.files import remove_abandoned, write_bytes

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.domains import Stream
    from gain_cl.guards.base import Guard
    from gain_cl.models.load import Loaded
    from gain_cl.runs.train import Progress


def execute(config: RunConfig, plan: plan_.Plan) -> record.Run:
    """Carry the run out, going on where an earlier attempt stopped; or read it when it is finished
    and force is off.

    PreemptedError when a signal asked to stop: what is done is saved. Any other failure leaves
    failure.json in the folder.
    """
    with signals.listening():
        if plan.finished and not config.force and not plan.unswept:
            return show_again(plan)
        if not plan.finished or config.force:
            checks.inputs(
                config
            )  # what is wrong with data or model shows now, before anything is on disk
        made = [p for p in (plan.folder, *plan.folder.parents) if not p.exists()]  # with the lock
        try:
            with lock.owned(plan.folder):
                if (
                    plan.finished and not config.force
                ):  # another process finished it while we waited, or was killed at the end
                    if not plan.interrupted:
                        _sweep(plan)
                    return show_again(plan)
                if made:  # else an attempt came past this
                    _rehearse(config)
                return _watched(config, plan)
        except ConfigError:
            with suppress(OSError):  # a folder that is not empty: something was begun
                for path in made:
                    path.rmdir()
            raise


def _watched(config: RunConfig, plan: plan_.Plan) -> record.Run:
    """The run; what makes it fail is told in failure.json, too."""
    try:
        (plan.folder / "failure.json").unlink(missing_ok=True)
        return _execute(config, plan)
    except (errors.PreemptedError, KeyboardInterrupt):
        raise
    except Exception as error:
        failure = _explained(error)
        with suppress(errors.GainError):  # a full disk does not take this either
            write_bytes(plan.folder / "failure.json", _failure(failure))
        if failure is error:
            raise
        raise failure from error


def show_again(plan: plan_.Plan) -> record.Run:
    """A finished run; its pictures are made again where they are missing."""
    run = record.load(plan.record_path)
    if not all(plan.files[k].exists() for k in ("matrix (CSV)", "heat map (PNG)")):
        _write_views(run, plan)
    return run


def _execute(config: RunConfig, plan: plan_.Plan) -> record.Run:
    from gain_cl.runs import track

    begun, folder = time.time(), plan.folder
    if config.resume == "never" or (config.force and not plan.interrupted):
        resume.clear(folder)
    start = resume.begin(config, folder, plan.run_id)
    names = [*config.sequence.trained, *config.sequence.controls]
    last, size = len(config.stages), config.stage.stage_steps
    cells = (last + 1) * len(names)
    with track.Tracker(
        config,
        plan.run_id,
        folder,
        steps_total=last * size,
        cells_total=cells,
        position=start.track,
    ) as tracker:
        for text in start.warnings:
            tracker.note(text)
        inputs = inputs_.load(config, plan.pins, tracker)
        import torch

        from gain_cl.measure import perplexity
        from gain_cl.runs import train

        loaded = inputs.loaded
        fixed = inputs_._fixed(config, plan, inputs)
        first = not start.stages and start.folder is None
        notes = inputs.notes + same.settle(
            config, folder, plan.run_id, plan.pins, fixed, inputs.environment, first
        )
        for text in notes:
            tracker.note(text)
        inherited: dict[int, resume.Stage] = {}
        if start.folder is None and config.resume != "never" and not config.force:
            inherited, told = inherit.inherit(config, folder, plan.pins, fixed, inputs.environment)
            for text in told:
                tracker.note(text)
            notes += told

        stages = dict(start.stages)
        events: list[str] = list(
            start.state.get("events", [])
        )  # what happened to the run, in every attempt
        spent: float = start.state.get("seconds", 0.0)
        fits: int | None = start.state.get("fits")  # sequences a forward pass, once memory ran out
        if start.folder is not None:
            done = (start.state["stage"] - 1) * size + start.state["step"]
            tracker.resumed([stages[i].record for i in sorted(stages)], done)

        def state(index: int, step: int) -> dict[str, Any]:
            """Where the run is, for a checkpoint or a finished stage."""
            at = {
                "run_id": plan.run_id,
                "stage": index,
                "step": step,
                "fits": fits,
                "events": events,
            }
            return {**at, "seconds": spent + time.time() - begun, "track": tracker.position()}

        def supersede() -> None:
            """Something new is about to be saved: what was passed over goes."""
            while start.behind:
                checkpoint.remove(start.behind.pop())

        def score(
            index: int, domain: str | None, stats: record.TrainStats | None, weights: Path | None
        ) -> resume.Stage:
            """Score every domain, and the tasks when they are due; save the finished stage.
            weights: folder of its trained state."""
            tracker.phase(
                f"score after {domain}" if domain else "score pretrained", stage=index, of=last
            )
            identity = dict(inputs.identity)
            if weights is not None:
                identity["adapter"] = config.scientific()["adapter"]
                identity["weights"] = checkpoint.manifest(weights)[resume.ADAPTER]["sha256"]
            elif index:
                identity["weights"] = plan.pins["checkpoints"][index - 1]
            shared = weights is None and not config.force  # others may score these very weights
            known = folder.parent / "cells" if shared else folder / "cells"
            batch = config.compute.eval_batch
            found = [
                scoring.domains(
                    loaded, inputs.domains, config.eval, batch, identity, known, tracker
                )
            ]
            if inputs.taskset is not None and tasks.due(config.tasks.stages, index, last):
                tracker.phase("run tasks", stage=index, of=last)
                found.append(
                    scoring.tasks(
                        loaded, inputs.taskset, plan.pins["tasks"], identity, known, tracker
                    )
                )
            row = record.StageRecord(
                index=index,
                domain=domain,
                domains=found[0].domains,
                tasks=found[-1].tasks,
                train=stats,
                eval_seconds=found[0].seconds("document"),
                task_seconds=found[-1].seconds("item"),
            )
            tracker.stage(row)
            about = {
                **state(index, size if index else 0),
                "cells": {k: v for part in found for k, v in part.cells.items()},
            }
            rows = pd.concat([part.rows for part in found], ignore_index=True).assign(stage=index)
            supersede()
            extra = [
                resume.GUARD,
                *([resume.OPTIMIZER] if config.train.optimizer == "carried" else []),
            ]
            reach("stage.before")
            finished = resume.write_stage(
                folder / "stages" / f"{index:02d}-{domain or 'pretrained'}",
                row,
                rows,
                weights,
                about,
                extra,
            )
            reach("stage.after")
            tracker.commit()
            shutil.rmtree(folder / "cells", ignore_errors=True)
            return finished

        if 0 not in stages:  # before anything is attached: the same for every method of this model
            stages[0] = score(0, None, None, None)

        with torch.random.fork_rng():
            torch.manual_seed(train.seed_of("init", config.seed))
            adapter, guard = _attach(config, loaded, train.seed_of("guard", config.seed))
            if config.compute.gradient_checkpointing:
                load.checkpoint_activations(loaded.model)
            optimizer: Any = train.optimizer(adapter, config.train) if adapter.trains else None
            initial = adapter.state() if config.regime == "individual" else {}
            streams = inputs_._streams(config, inputs) if adapter.trains else []
            keep = config.checkpoint.keep_stages or ("all" if adapter.keep_stages else "last")

            def take(saved: Path) -> None:
                """Put a saved state into adapter, guard and optimiser."""
                nonlocal optimizer
                adapter.load_state(checkpoint.read_tensors(saved, resume.ADAPTER))
                guard.load_state(checkpoint.read_tensors(saved, resume.GUARD))
                optimizer = train.optimizer(
                    adapter, config.train
                )  # an adapter that restarted has other parameters
                train.load_optimizer_state(
                    optimizer, adapter, checkpoint.read_tensors(saved, resume.OPTIMIZER)
                )

            def save(index: int, step: int, progress: train.Progress) -> Path:
                """A checkpoint, inside or at the end of a stage."""
                trained_state, memory = adapter.state(), guard.state()
                if not all(torch.isfinite(t).all() for t in trained_state.values()):
                    raise DataError(
                        "the trained state is not finite",
                        f"stage {index}, step {step}",
                        "it was not saved; lower train.lr",
                    )
                files: dict[str, Any] = {resume.ADAPTER: trained_state}
                if memory:
                    files[resume.GUARD] = memory
                if step < size or config.train.optimizer == "carried":
                    files[resume.OPTIMIZER] = train.optimizer_state(optimizer, adapter)
                supersede()
                about = {**state(index, step), "progress": asdict(progress)}
                files["state.json"] = (json.dumps(about, indent=1, allow_nan=False) + "\n").encode()
                path = folder / "ckpt" / f"step-{(index - 1) * size + step}"
                checkpoint.save(path, files)
                reach("commit")
                tracker.commit()
                checkpoint.prune(folder / "ckpt")
                return path

            def learn(index: int, name: str) -> tuple[record.TrainStats, Path]:
                """Train a stage, from where an earlier attempt stopped in it; returns the folder of
                its last checkpoint."""
                nonlocal fits, optimizer
                tracker.phase(f"learn {name}", stage=index, of=last)
                inside = start.state.get("stage") == index and "progress" in start.state
                progress = (
                    _progress(start.state["progress"], start.folder) if inside else train.Progress()
                )
                if not inside:
                    if config.regime == "individual":
                        adapter.load_state(initial)
                    if config.handover == "restart" and index > 1:
                        torch.manual_seed(train.seed_of("init", config.seed, index))
                        adapter.restart()
                    if config.train.optimizer == "fresh":
                        optimizer = train.optimizer(adapter, config.train)
                blocks, path = streams[index - 1], start.folder
                guard.before_stage(index, streams[: index - 1], size * config.train.sequences)
                place = (
                    1 if config.regime == "individual" else index
                )  # as if it were the only stage
                micro = min(
                    config.compute.micro_batch or config.train.sequences,
                    fits or config.train.sequences,
                )
                due = checkpoint.Due(config.checkpoint.every_minutes, config.checkpoint.every_steps)
                steps = train.stage(
                    loaded, adapter, guard, blocks, config.stage, optimizer,
                    index=index, seed=config.seed, place=place, micro_batch=micro, start=progress.steps,
                )  # fmt: skip
                for row in _located(steps, index, name, blocks):
                    step = row["step"]
                    tracker.step(row | {"steps": size})
                    if row["micro_batch"] < micro:
                        fits = micro = row["micro_batch"]
                        events.append(
                            f"out of memory at step {step} of stage {index}: from there {fits} "
                            "sequences a forward pass"
                        )
                        tracker.note(events[-1])
                    if (spike := progress.add(row)) is not None:
                        tracker.spike(row | spike)
                    if config.train.dev_every and step % config.train.dev_every == 0:
                        on_dev = config.eval.model_copy(update={"split": "dev"})
                        mixed = config.sequence.trained if config.regime == "joint" else [name]
                        asked = {"": mixed, "controls_": config.sequence.controls}
                        with signals.held():  # the step is not saved yet
                            dev = {
                                prefix: _total(config, inputs, on_dev, names)
                                for prefix, names in asked.items()
                                if names
                            }
                        sums = {
                            f"{p}{key}": getattr(found, key)
                            for p, found in dev.items()
                            for key in ("nll_nats", "tokens")
                        }
                        progress.dev.append({"step": step, **sums})
                        losses = {f"{p}loss_nats": found.loss_nats for p, found in dev.items()}
                        tracker.dev({"stage": index, "domain": name, "step": step, **losses})
                    if step == size:
                        guard.after_stage(index, name, blocks)
                    if step == size or due.now(step) or signals.asked():
                        saving = time.perf_counter()
                        path = save(index, step, progress)
                        due.saved(time.perf_counter() - saving)
                        signals.poll()
                assert path is not None
                return progress.stats(config.train.lr), path

            if start.folder is not None:
                take(start.folder)
            for index, name in enumerate(config.stages, start=1):
                if index in stages:
                    pass
                elif not adapter.trains:
                    tracker.phase(f"load what learned {name}", stage=index, of=last)
                    adapter.take(index)
                    stages[index] = score(index, name, None, None)
                elif index in inherited:
                    take(inherited[index].folder)
                    inherit.share_scores(inherited[index], folder / "cells")
                    stages[index] = score(
                        index, name, inherited[index].record.train, inherited[index].folder
                    )
                else:
                    stages[index] = score(index, name, *learn(index, name))
                for older in range(1, index) if keep == "last" else ():
                    checkpoint.drop(
                        stages[older].folder, [resume.ADAPTER, resume.GUARD, resume.OPTIMIZER]
                    )

        run_of = {
            **provenance.environment(),
            **inputs.environment,
            "seconds": spent + time.time() - begun,
            "attempts": same.attempts(folder),
            "inherited": {str(index): stage.facts["run_id"] for index, stage in inherited.items()},
        }
        in_order = [stages[i] for i in range(last + 1)]
        finished = record.RunRecord(
            run_id=plan.run_id,
            model=config.model.name,
            method=config.method,
            sequence=config.sequence.name,
            seed=config.seed,
            regime=config.regime,
            trained=config.sequence.trained,
            controls=config.sequence.controls,
            protocol=perplexity.protocol(config.eval, loaded.prefix_id),
            config=config.model_dump(mode="json"),
            pins={
                **plan.pins,
                "model_files": fixed["model"]["files"],
                "tokenizer": fixed["tokenizer"],
                **{k: fixed["data"][k] for k in ("tokens", "validation")},
            },
            provenance=run_of,
            trainable_parameters=sum(p.numel() for p in adapter.parameters().values()),
            total_parameters=inputs.total_parameters,
            peak_memory_bytes=inputs.peak_memory(),
            stages=[stage.record for stage in in_order],
            items_sha256="",
            notes=[*notes, *events, *adapter.remarks(loaded.model.dtype)],
            tainted=list(
                dict.fromkeys(what for attempt in run_of["attempts"] for what in attempt["changed"])
            ),
        )
        rows = pd.concat([stage.rows for stage in in_order], ignore_index=True)
        reach("record.before")
        run = record.save(
            finished, rows[rows.kind == "document"], rows[rows.kind == "item"], plan.record_path
        )
        reach("record.after")
        _write_views(run, plan)
        tracker.finish(run)
    _sweep(plan)
    return run


def _attach(config: RunConfig, loaded: Loaded, seed: int) -> tuple[Adapter, Guard]:
    """Adapter and guard on the untouched model. ConfigError when they do not fit it or each
    other."""
    adapter = adapters.build_adapter(config.adapter)
    adapter.attach(loaded)
    portable.begin(config.adapter, adapter, loaded)
    if adapter.trains and not adapter.parameters():
        raise ConfigError(
            f"method {config.method} trains nothing on this model",
            "adapter",
            "choose another method",
        )
    if config.handover == "restart" and len(config.stages) > 1 and not adapter.restarts():
        raise ConfigError(
            f"the adapter of method {config.method} cannot restart",
            "handover",
            "use handover=continue",
        )
    guard = guards.build_guard(config.guard)
    guard.attach(loaded, adapter, seed)
    return adapter, guard


def _rehearse(config: RunConfig) -> None:
    """Attach to the model without its weights: what does not fit it is refused in a second, not
    once stage 0 is scored. What needs weights is left to the real model: PEFT's RuntimeError, and
    whatever else a plugin does with them."""
    import torch

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come when it counts
        try:
            _attach(config, load.weightless(config.model), 0)
        except errors.GainError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
        except Exception:
            return


def _progress(saved: dict[str, Any], folder: Path | None) -> Progress:
    """What a checkpoint says of its stage. DataError when another version of gain_cl wrote it."""
    from gain_cl.runs import train

    try:
        return train.Progress(**saved)
    except TypeError:
        do = "go on with the version that wrote it, or resume=never"
        raise DataError("state.json is not of this version of gain_cl", str(folder), do) from None


def _total(
    config: RunConfig, inputs: inputs_._Inputs, settings: Eval, names: list[str]
) -> record.DomainScore:
    """The sums over the documents of several domains."""
    from gain_cl.measure import perplexity

    scores = [
        scoring.score_domain(inputs.loaded, inputs.domains[d], settings, config.compute.eval_batch)
        for d in names
    ]
    return perplexity.total(pd.concat(scores))


def _located(
    steps: Iterator[dict[str, Any]], index: int, name: str, blocks: Stream
) -> Iterator[dict[str, Any]]:
    """Rows of training with their stage; an error is told with the ids of the documents of its
    batch."""
    try:
        for row in steps:
            yield {"stage": index, "domain": name, **row}
    except DataError as error:
        if "documents" in error.facts:
            error.facts |= {
                "stage": index,
                "domain": name,
                "documents": [blocks.ids[i] for i in error.facts["documents"]],
            }
        raise


def _sweep(plan: plan_.Plan) -> None:
    """Remove what only an unfinished run needs."""
    checkpoint.prune(
        plan.folder / "ckpt", keep=0
    )  # one by one: half of a checkpoint would look like a newer attempt
    for path in (plan.folder / "ckpt", plan.folder / "cells"):
        shutil.rmtree(path, ignore_errors=True)
    checkpoint.remove_leftovers(plan.folder, plan.folder / "stages")
    (plan.folder / "failure.json").unlink(missing_ok=True)
    for shared in (plan.record_path.parent, plan.folder.parent / "cells"):
        remove_abandoned(shared)


def _explained(error: Exception) -> Exception:
    """What the system refuses, and running out of memory, in one line with advice; other errors as
    they are."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, BrokenPipeError):
        return errors.StorageError(
            f"the system refuses: {error.strerror}",
            str(error.filename or ""),
            "check the disk and its permissions",
        )
    if isinstance(error, errors.GainError) or "torch" not in sys.modules:
        return error
    from gain_cl.runs import train

    if not train.out_of_memory(error):
        return error
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    do = (
        "use compute.gradient_checkpointing=true, model.dtype=bfloat16 or, when the run "
        "begins, a smaller compute.eval_batch"
    )
    return errors.StorageError(
        f"out of memory: {what}", "evaluation and loading do not change their batches", do
    )


def _failure(error: Exception) -> bytes:
    facts = {
        "error": str(error),
        "exit_code": getattr(error, "exit_code", 1),
        **getattr(error, "facts", {}),
    }
    return (
        json.dumps(
            {"time": datetime.now(UTC).isoformat(timespec="seconds"), **facts},
            indent=1,
            allow_nan=False,
        )
        + "\n"
    ).encode()


def _write_views(run: record.Run, plan: plan_.Plan) -> None:
    """Matrix and heat map: derived from the record, never read back."""
    from gain_cl.measure import matrix_csv
    from gain_cl.runs import heatmap

    write_bytes(plan.files["matrix (CSV)"], matrix_csv.csv(run).encode())
    write_bytes(plan.files["heat map (PNG)"], heatmap.png(run))
