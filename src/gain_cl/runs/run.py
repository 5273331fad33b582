"""Carry out one run, from a configuration to a record. READ THIS FIRST: it is the whole procedure,
top to bottom.

``plan.prepare`` comes before it: it pins the inputs, names the run and says whether it is finished.
``execute`` takes the run's lock. ``carry_out`` then loads the inputs, settles what may not differ
between attempts, and scores the untouched model on every domain (stage 0). For each stage it takes
over, loads or learns the stage, scores every domain again and saves the stage. At the end it writes
the record. Nothing here knows what a forgetting matrix is: ``finish`` derives it from the record.
This module imports no torch: that waits until the lock is taken.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

import pandas as pd

from gain_cl.compose import checks
from gain_cl.config.schema import RunConfig
from gain_cl.errors import ConfigError
from gain_cl.measure import record, scoring, tasks
from gain_cl.runs import finish, inherit, resume, same
from gain_cl.runs.inputs import Inputs, load_inputs
from gain_cl.runs.plan import Plan, like
from gain_cl.runs.track import Tracker
from gain_cl.system import checkpoint, lock, signals, watchdog
from gain_cl.system.failpoints import reach

if TYPE_CHECKING:
    from gain_cl.runs.learner import Learned


def execute(config: RunConfig, plan: Plan) -> record.Run:
    """Carry the run out from where an earlier attempt stopped. Read it when it is finished and
    force is off.

    Raises PreemptedError when a signal asked to stop: what is done is saved. Any other failure
    leaves failure.json in the folder.
    """
    with signals.listening():
        if plan.finished and not config.force and not plan.unswept:
            return finish.show_again(plan)
        if not plan.finished or config.force:
            # What is wrong with data or model shows now, before anything is on disk.
            with signals.at_once():
                checks.inputs(config)
        made = [p for p in (plan.folder, *plan.folder.parents) if not p.exists()]  # with the lock
        try:
            with lock.owned(plan.folder):
                if plan.finished and not config.force:
                    # Another process finished it while this one waited, or was killed at the end.
                    if not plan.interrupted:
                        finish.sweep(plan)
                    return finish.show_again(plan)
                if made:  # else an attempt came past this
                    from gain_cl.runs.learner import rehearse

                    rehearse(config)
                with finish.failure_told(plan.folder):
                    return carry_out(config, plan)
        except ConfigError:
            with suppress(OSError):  # a folder that is not empty: something was begun
                for path in made:
                    path.rmdir()
            raise


def carry_out(config: RunConfig, plan: Plan) -> record.Run:
    """Learn one domain after the other and score all of them after each: the procedure."""
    if config.resume == "never" or (config.force and not plan.interrupted):
        resume.clear_folder(plan.folder)
    attempt = resume.begin_attempt(config, plan.folder, plan.run_id)
    last = len(config.stages)
    stages = attempt.stages  # by index: those of earlier attempts, then what this one finishes
    with Tracker(
        config,
        plan.run_id,
        plan.folder,
        position=attempt.position.track,
    ) as tracker:
        tracker.note(*attempt.warnings)
        inputs = load_inputs(config, plan, tracker)
        import torch

        from gain_cl.runs.learner import Learner

        settle(inputs, attempt, tracker)
        if 0 not in stages:  # before anything is attached: the same for every method of this model
            stages[0] = score(0, (None, None), inputs, attempt, tracker)
        device = inputs.loaded.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            watchdog.watching(
                config.compute.hang_minutes, lambda error: finish.tell_failure(plan.folder, error)
            ),
        ):
            learner = Learner(config, plan.folder, inputs, attempt, tracker)
            for index, damaged in attempt.unscored.items():
                stages[index] = score(index, learner.take_over(damaged), inputs, attempt, tracker)
            if attempt.folder is not None:
                learner.load(attempt.folder)
            for index in range(1, last + 1):
                if index not in stages:
                    if index in attempt.inherited:
                        learned = learner.take_over(attempt.inherited[index])
                    elif learner.adapter.trains:
                        learned = learner.learn(index)
                    else:
                        learned = learner.load_given(index)
                    stages[index] = score(index, learned, inputs, attempt, tracker)
                learner.drop_states_before(index)
        run = finish.write_record(inputs, attempt, learner)
        tracker.finish(run)
    finish.sweep(plan)
    return run


def settle(inputs: Inputs, attempt: resume.Attempt, tracker: Tracker) -> None:
    """Compare what may not differ between attempts. Go on where an earlier one stopped, or find the
    stages that another run has learned already."""
    first = not attempt.stages and attempt.folder is None
    attempt.notes = inputs.notes + same.compare_attempts(inputs, first)
    attempt.position.changed += same.read_attempts(inputs.plan.folder)[-1]["changed"]
    tracker.note(*attempt.notes)
    config, pins = inputs.config, inputs.plan.pins
    if first and (other := like(config, pins, "train steps", "train tokens")):
        tracker.note(
            f"{other['run_id']} has another train.steps or train.tokens: this is another run, with "
            "a schedule of its own, and begins anew. To go on from what that one learned, export "
            "it to=peft and give adapter.init_from=FOLDER"
        )
    if attempt.folder is None:
        attempt.inherited, told = inherit.common_stages(inputs)
        attempt.position.events += told  # a later attempt reads them from its checkpoint
        tracker.note(*told)
    else:
        here = attempt.position
        done = (here.stage - 1) * inputs.config.stage.stage_steps + here.step
        tracker.resumed([stage.record for stage in attempt.stages.values()], done)


def score(
    index: int, learned: Learned, inputs: Inputs, attempt: resume.Attempt, tracker: Tracker
) -> resume.Stage:
    """Score every domain, and the tasks when they are due, by the model as it is. Save the finished
    stage."""
    (stats, weights), config, plan = learned, inputs.config, inputs.plan
    last, domain = len(config.stages), config.stages[index - 1] if index else None
    tracker.phase(f"score after {domain}" if domain else "score pretrained", stage=index)
    identity = dict(inputs.identity)
    if weights is not None:
        identity["adapter"] = config.scientific()["adapter"]
        identity["weights"] = checkpoint.manifest(weights)[resume.ADAPTER]["sha256"]
    elif index:
        identity["weights"] = plan.pins["checkpoints"][index - 1]
    own = plan.folder / "cells"
    # Scores of weights that no training changed are kept where other runs find them.
    known = own if weights is not None or config.force else plan.folder.parent / "cells"
    batch = config.compute.eval_batch
    found = [
        scoring.score_domains(
            inputs.loaded, inputs.domains, config.eval, batch, identity, known, tracker
        )
    ]
    if inputs.taskset is not None and tasks.due(config.tasks.stages, index, last):
        tracker.phase("run tasks", stage=index)
        pins = plan.pins["tasks"]
        found.append(
            scoring.score_tasks(inputs.loaded, inputs.taskset, pins, identity, known, tracker)
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
    rows = pd.concat([part.rows for part in found], ignore_index=True).assign(stage=index)
    if index in attempt.unscored:
        about = attempt.unscored[index].facts
    else:
        about = attempt.move(index, config.stage.stage_steps if index else 0, tracker.position())
    about["cells"] = {k: v for part in found for k, v in part.cells.items()}
    if index in attempt.inherited:
        about["inherited"] = attempt.inherited[index].facts["run_id"]
    reach("stage.before")
    finished = resume.write_stage(plan.folder, row, rows, weights, about)
    reach("stage.after")
    tracker.commit()
    shutil.rmtree(own, ignore_errors=True)
    return finished
