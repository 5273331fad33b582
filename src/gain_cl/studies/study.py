"""Runs side by side: settings, blocks, fronts, declared endpoints and what may be said of them.
numpy and scipy only.

A study holds settings (a method and what was set), each with a run per block (one order of the
domains with one seed). Within a block runs are paired: the same documents, items, order and seed.
With one block only the choice of documents can be told from a difference; verdicts are about
methods, so they need blocks. Metrics are matrix.METRICS (nats per token; below 0: better) and
margin:TASK, accuracy:TASK (change from the pretrained model to the end; above 0: better).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gain_cl.config.schema import RunConfig
from gain_cl.errors import DataError
from gain_cl.measure import record
from gain_cl.measure.record import Run
from gain_cl.stats import answers, fronts, inference
from gain_cl.stats.matrix import METRICS, Coefficients, Estimate, LossMatrix, Parts, linearised
from gain_cl.studies.experiments import Endpoint, Experiment, Planned, Values, setting_label
from gain_cl.studies.shared import MEASURED, unlike

Block = tuple[int, tuple[str, ...]]
"""(seed, order of the domains)"""
Metric = str | Callable[[LossMatrix], Coefficients]
"""The name of a metric, or a summary of the matrix itself."""


@dataclass(frozen=True)
class Setting:
    """A method with what was set, and its run in each block."""

    method: str
    values: Values
    runs: dict[Block, Run]

    @property
    def label(self) -> str:
        return setting_label(self.method, self.values)

    @property
    def ids(self) -> list[str]:
        """Return its run ids, by block."""
        return [run.record.run_id for run in self.runs.values()]

    @property
    def trained(self) -> bool:
        """True if the setting was trained; False if it was interpolated."""
        return all(run.record.interpolated is None for run in self.runs.values())

    @cached_property
    def matrices(self) -> dict[Block, LossMatrix]:
        return {block: loss_matrix(run) for block, run in self.runs.items()}

    def parts(self, metric: Metric, block: Block) -> Parts | None:
        """Return what the metric is a ratio of in a block; None where it does not exist."""
        if isinstance(metric, str) and ":" in metric:
            name, _, task = metric.partition(":")
            return item_change(self.runs[block], name, task)
        matrix = self.matrices[block]
        coefficients = (_METRIC[metric] if isinstance(metric, str) else metric)(matrix)
        return None if coefficients is None else matrix.contributions(coefficients)

    def value(self, metric: str, block: Block) -> float:
        """Return the metric in a block; nan where it does not exist."""
        parts = self.parts(metric, block)
        return math.nan if parts is None else linearised(parts)[0]

    def one(self, what: Callable[[Run], float]) -> float:
        """Return the mean over the blocks of a fact of each run."""
        return float(np.mean([what(run) for run in self.runs.values()]))


_METRIC = {f.__name__: f for f in METRICS}


@dataclass(frozen=True, eq=False)
class Study:
    """Settings that may be compared, and what was declared of them beforehand (nothing, for runs
    named on a command line).

    forgets: % of perplexity, see positive_control; skill: own step in nats at which methods are
    matched (None: fronts.common_skill); absent: method -> how many of its runs are not finished."""

    name: str
    settings: list[Setting]
    chosen: dict[str, Setting]
    reference: str
    question: str = ""
    endpoints: list[Endpoint] = field(default_factory=list)
    forgets: float = 10.0
    skill: float | None = None
    alpha: float = 0.05
    absent: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def blocks(self) -> list[Block]:
        return list(dict.fromkeys(block for s in self.settings for block in s.runs))

    @property
    def runs(self) -> list[Run]:
        return [run for s in self.settings for run in s.runs.values()]

    @property
    def chosen_runs(self) -> list[tuple[Setting, Run]]:
        return [(s, run) for s in self.chosen.values() for run in s.runs.values()]

    def of(self, method: str) -> list[Setting]:
        """Return the settings of a method."""
        return [s for s in self.settings if s.method == method]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(s.method for s in self.settings))

    @property
    def others(self) -> list[str]:
        """Return the methods that are compared with the reference."""
        return [m for m in self.methods if m != self.reference]

    @property
    def model(self) -> str:
        return self.runs[0].record.model


class Compared(NamedTuple):
    """A summary, or a difference of two (paired within blocks), over so many blocks (0: there is
    none).

    estimate: its n are documents or items. values: (blocks,). documents: standard error over
    documents; of several blocks, what they share of it."""

    estimate: Estimate = Estimate()
    values: np.ndarray = np.array([])
    documents: inference.Error = inference.Error()

    @property
    def blocks(self) -> int:
        return len(self.values)


# --- making a study -------------------------------------------------------------------------------


def studies_of(
    experiment: Experiment,
    planned: Sequence[Planned],
    runs: Mapping[str, Run] | None = None,
) -> dict[str, Study]:
    """Return a study of each model of an experiment, of its finished runs.

    runs: those that were read, by run id; None: all that are done. DataError:
    none is finished."""
    if runs is None:
        runs = {c.run_id: record.load(c.record) for c in planned if c.state == "done"}
    found: dict[str, dict[tuple[str, int], Run]] = {}
    for c in planned:
        if c.run_id in runs:
            found.setdefault(c.model, {})[c.label, c.block] = runs[c.run_id]
    if not found:
        do = f"python -m gain_cl sweep experiment={experiment.name}"
        raise DataError(f"no run of {experiment.name} is finished", "results", do)
    return {m: study_of_experiment(experiment, done) for m, done in found.items()}


def study_of_experiment(experiment: Experiment, runs: Mapping[tuple[str, int], Run]) -> Study:
    """Return the study of the finished runs of an experiment with one model. runs: (label of the
    setting, block) -> run."""
    settings: list[Setting] = []
    absent: Counter[str] = Counter()
    for method, values in experiment.settings():
        mine = [run for key, run in runs.items() if key[0] == setting_label(method, values)]
        absent[method] += experiment.blocks - len(mine)
        settings += _settings(method, [(values, run) for run in mine])
    methods = {s.method for s in settings}
    reference = experiment.reference if experiment.reference in methods else settings[-1].method
    return _checked(
        Study(
            name=experiment.name,
            question=experiment.question,
            settings=settings,
            chosen={s.method: s for s in settings if s.values == experiment.chosen_of(s.method)},
            reference=reference,
            endpoints=experiment.endpoints,
            forgets=experiment.forgets,
            skill=None if experiment.skill is None else math.log1p(experiment.skill / 100),
            alpha=experiment.alpha,
            absent=dict(+absent),
        )
    )


def study_of_runs(runs: Iterable[Run]) -> Study:
    """Return the study of runs named by hand: those that differ in seed and order alone are blocks
    of one setting. Nothing is declared."""
    by_method: dict[str, list[tuple[Values, Run]]] = {}
    for run in runs:
        plain = RunConfig.model_validate(run.record.config).scientific()
        flat: Any = pd.json_normalize(plain).to_dict("records")[0]
        by_method.setdefault(run.record.method, []).append((flat, run))
    settings: list[Setting] = []
    for method, mine in by_method.items():
        keys = [
            key
            for key in mine[0][0]
            if len({repr(flat.get(key)) for flat, _ in mine}) > 1
            and not re.match(r"seed$|sequence\.|domains\.", key)
        ]
        settings += _settings(method, [({k: flat.get(k) for k in keys}, run) for flat, run in mine])
    return _checked(
        Study(
            name="runs",
            settings=settings,
            chosen={s.method: s for s in reversed(settings)},
            reference=settings[-1].method,
        )
    )


def _settings(method: str, told: list[tuple[Values, Run]]) -> list[Setting]:
    """Return a setting for all runs of the same values; what is interpolated (alpha) is one of its
    own."""
    found: dict[str, Setting] = {}
    for values, run in told:
        r = run.record
        mine = values if r.alpha == 1 else {**values, "alpha": r.alpha}
        runs = found.setdefault(repr(mine), Setting(method, mine, {})).runs
        if runs.setdefault((r.seed, tuple(r.trained)), run) is not run:
            raise DataError(f"two runs of {method} are the same", r.run_id, "name each once")
    return list(found.values())


BUDGET = ("tokens", "block", "batch_tokens", "schedule", "pack")
"""Keys of train: that two runs may differ in, which is noted."""


def _checked(study: Study) -> Study:
    """Return the study, with notes on unequal budgets and tainted runs. DataError, naming two runs:
    they do not measure the same."""
    runs = study.runs
    for what, usual, odd, _ in unlike([run.record for run in runs], MEASURED):
        raise DataError(
            f"runs of different {what} cannot be compared",
            f"{usual.run_id} and {odd.run_id}",
            "compare runs that share it",
        )
    for task in {task for run in runs for s in run.record.stages for task in s.tasks}:
        asked: dict[Any, str] = {}
        for run in runs:
            if items := set(run.items.item[run.items.task == task]):
                key = run.record.config["tasks"]["fewshot"] or 0, frozenset(items)
                asked.setdefault(key, run.record.run_id)
        if len(asked) > 1:
            raise DataError(
                f"{task} has other items or examples",
                " and ".join(list(asked.values())[:2]),
                "compare runs that answered the same",
            )
    swept = {key for s in study.settings for key in s.values}
    notes = [
        f"unequal budgets: train.{key} differs between runs"
        for key in BUDGET
        if f"train.{key}" not in swept
        and len({repr(run.record.config["train"][key]) for run in runs}) > 1
    ]
    devices = {str(run.record.provenance.get("device")) for run in runs}
    if len(devices) > 1:
        notes.append(f"runs of different devices: {', '.join(sorted(devices))}")
    notes += [
        f"{run.record.run_id} is tainted: {', '.join(run.record.tainted)}"
        for run in runs
        if run.record.tainted
    ]
    return replace(study, notes=[*study.notes, *notes])


def loss_matrix(run: Run) -> LossMatrix:
    """Return the matrix of the run's documents. DataError: they are not paired."""
    try:
        return LossMatrix.from_documents(
            run.documents, run.record.trained, run.record.controls, run.record.regime
        )
    except ValueError as error:
        raise DataError(
            str(error), str(run.path), "restore the files or run again with force=true"
        ) from error


def item_change(run: Run, name: str, task: str, stage: int = -1) -> Parts | None:
    """Return the change of each item's margin (nats) or correctness from the pretrained model to
    the end (or another stage); None where it was not scored at both."""
    ends = [run.record.stages[0], *run.record.stages[stage:][:1]]
    if len(ends) < 2 or any(task not in s.tasks or s.tasks[task].limited for s in ends):
        return None
    needs = "correct_norm" if name == "margin" else "correct"  # None: no choices, nothing right
    if any(getattr(s.tasks[task], needs) is None for s in ends):
        return None
    of = answers.margin if name == "margin" else answers.correct
    values = [of(answers.answers(run.items, task, s.index)).astype(float) for s in ends]
    return {task: (values[-1] - values[0], np.ones(len(values[0])))}


# --- summaries and differences --------------------------------------------------------------------


def level(setting: Setting, metric: Metric) -> Compared:
    """Return a setting's summary: over documents of its one run, or over its blocks and their
    documents."""
    return compared([setting.parts(metric, block) for block in setting.runs])


def difference(a: Setting, b: Setting, metric: Metric) -> Compared:
    """Return a minus b, paired within the blocks that both have."""
    pairs = [(a.parts(metric, k), b.parts(metric, k)) for k in a.runs if k in b.runs]
    return compared([inference.combined([x, y], [1, -1]) for x, y in pairs if x and y])


def compared(blocks: Sequence[Parts | None]) -> Compared:
    """Return the mean over blocks of a summary or paired difference (inference.combined), whose
    parts in each block are given (None: not there), with its interval over documents of the one
    block, or over blocks and the documents they share."""
    if not (parts := [p for p in blocks if p]):
        return Compared()
    values = np.array([linearised(p)[0] for p in parts])
    mean = inference.combined(parts, [1 / len(parts)] * len(parts))
    if len(parts) == 1:
        return Compared(inference.bootstrap_t(mean), values, inference.error(mean))
    documents = inference.shared_error(parts)
    found = inference.blocks(values, documents=documents)
    return Compared(replace(found, n=sum(len(z) for z, _ in mean.values())), values, documents)


def lower_is_better(metric: str) -> bool:
    return ":" not in metric


def margin_nats(metric: str, margin: float | None) -> float:
    """Return a declared margin in the unit the metric is computed in; nan without one."""
    if margin is None:
        return math.nan
    return math.log1p(margin / 100) if lower_is_better(metric) else margin


def plane(settings: Iterable[Setting]) -> list[tuple[Setting, Estimate, Estimate]]:
    """Return the settings that have both, with their own step and backward change in nats."""
    found = [(s, level(s, "own_step"), level(s, "backward")) for s in settings]
    return [(s, x.estimate, y.estimate) for s, x, y in found if x.blocks and y.blocks]


def on_front(study: Study) -> set[str]:
    """Return the labels of the settings that are on their method's front: no other setting of it
    learns more and forgets less."""
    found = set()
    for method in study.methods:
        if there := plane(study.of(method)):
            points = np.array([(x.value, y.value) for _, x, y in there])
            found |= {there[i][0].label for i in fronts.efficient(*points.T)}
    return found
