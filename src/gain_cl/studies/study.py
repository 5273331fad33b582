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
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from gain_cl.config.schema import RunConfig
from gain_cl.errors import DataError
from gain_cl.measure import record
from gain_cl.measure.record import Run
from gain_cl.stats import answers, fronts, inference
from gain_cl.stats.inference import Parts
from gain_cl.stats.matrix import METRICS, Estimate, LossMatrix
from gain_cl.studies.experiments import Cell, Endpoint, Experiment, Values, label

Block = tuple[int, tuple[str, ...]]
"""(seed, order of the domains)"""


@dataclass(frozen=True)
class Setting:
    """A method with what was set, and its run in each block."""

    method: str
    values: Values
    runs: dict[Block, Run]

    @property
    def label(self) -> str:
        return label(self.method, self.values)

    @property
    def trained(self) -> bool:
        """Whether it was, and not interpolated from what was."""
        return all(run.record.interpolated is None for run in self.runs.values())

    @cached_property
    def matrices(self) -> dict[Block, LossMatrix]:
        return {block: loss_matrix(run) for block, run in self.runs.items()}

    def parts(self, metric: str, block: Block) -> Parts | None:
        """What the metric is a ratio of in a block; None where it does not exist."""
        name, _, task = metric.partition(":")
        if task:
            return _item_parts(self.runs[block], name, task)
        matrix = self.matrices[block]
        coefficients = _METRIC[name](matrix)
        return None if coefficients is None else matrix.contributions(coefficients)

    def value(self, metric: str, block: Block) -> float:
        parts = self.parts(metric, block)
        return math.nan if parts is None else _ratio(parts)

    def one(self, what: Callable[[Run], float]) -> float:
        """Mean over the blocks of a fact of each run."""
        return float(np.mean([what(run) for run in self.runs.values()]))


_METRIC = {f.__name__: f for f in METRICS}


@dataclass(frozen=True)
class Study:
    """Settings that may be compared, and what was declared of them beforehand (nothing, for runs
    named on a command line).

    forgets: % of perplexity, see positive_control; skill: own step in nats at which methods are
    matched (None: common_skill); absent: method -> how many of its runs are not finished."""

    name: str
    question: str
    settings: list[Setting]
    chosen: dict[str, Setting]
    reference: str
    endpoints: list[Endpoint]
    forgets: float
    skill: float | None
    alpha: float
    absent: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def blocks(self) -> list[Block]:
        return list(dict.fromkeys(block for s in self.settings for block in s.runs))

    def of(self, method: str) -> list[Setting]:
        return [s for s in self.settings if s.method == method]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(s.method for s in self.settings))

    @property
    def model(self) -> str:
        return next(iter(self.settings[0].runs.values())).record.model


class Compared(NamedTuple):
    """A summary, or a difference of two (paired within blocks), over so many blocks; its estimate's
    n are documents or items."""

    estimate: Estimate
    values: np.ndarray  # a block each
    documents: (
        inference.Error
    )  # standard error over documents; of several blocks, what they share of it

    @property
    def blocks(self) -> int:
        return len(self.values)


INTERPOLATED = "fronts hold interpolated models (alpha), which the experiment did not declare"
NOT_INTERPOLATED = (
    "no interpolated models beside these runs: python -m gain_cl interpolate RUN "
    "--records makes them"
)


# --- making a study -------------------------------------------------------------------------------


def studies(experiment: Experiment, cells: list[Cell], alphas: bool = False) -> dict[str, Study]:
    """A study of each model of an experiment, of its finished runs. alphas: with what ``interpolate
    --records`` made of them."""
    found = {}
    for model in dict.fromkeys(c.model for c in cells):
        done = {
            (c.label, c.block): record.load(c.record)
            for c in cells
            if c.model == model and c.state == "done"
        }
        between = (
            {
                key: [r for r in record.between(run) if r.record.alpha != 1]
                for key, run in done.items()
            }
            if alphas
            else None
        )
        if done:
            found[model] = from_experiment(experiment, done, between)
    if not found:
        raise _nothing(experiment)
    return found


def _nothing(experiment: Experiment) -> DataError:
    return DataError(
        f"no run of {experiment.name} is finished",
        "results",
        f"python -m gain_cl sweep experiment={experiment.name}",
    )


def from_experiment(
    experiment: Experiment,
    runs: dict[tuple[str, int], Run],
    between: dict[tuple[str, int], list[Run]] | None = None,
) -> Study:
    """Of the finished runs of an experiment with one model. runs: (label of the setting, block) ->
    run; between: records that were interpolated from a run, further settings of its method, of
    which nothing was declared."""
    settings: list[Setting] = []
    for method, values in experiment.settings():
        mine = [(key, run) for key, run in runs.items() if key[0] == label(method, values)]
        settings += _by_alpha(
            method, values, [r for key, run in mine for r in (run, *(between or {}).get(key, []))]
        )
    if not settings:
        raise _nothing(experiment)
    chosen = {}
    for method in experiment.methods:
        found = [
            s for s in settings if s.method == method and s.values == experiment.chosen_of(method)
        ]
        if found:
            chosen[method] = found[0]
    methods = [m for m in experiment.methods if any(s.method == m for s in settings)]
    study = Study(
        name=experiment.name,
        question=experiment.question,
        settings=settings,
        chosen=chosen,
        reference=experiment.reference if experiment.reference in methods else methods[-1],
        endpoints=experiment.endpoints,
        forgets=experiment.forgets,
        skill=None if experiment.skill is None else math.log1p(experiment.skill / 100),
        alpha=experiment.alpha,
        absent=dict(
            Counter(
                m
                for m, values in experiment.settings()
                for k in range(experiment.blocks)
                if (label(m, values), k) not in runs
            )
        ),
        notes=[]
        if between is None
        else [INTERPOLATED if any(between.values()) else NOT_INTERPOLATED],
    )
    return _checked(study)


def from_records(runs: Iterable[Run]) -> Study:
    """Of runs named by hand: those that differ in seed and order alone are blocks of one setting.
    Nothing is declared."""
    runs = list(runs)
    flat = {
        id(run): _flat(RunConfig.model_validate(run.record.config).scientific()) for run in runs
    }
    settings: list[Setting] = []
    for method in dict.fromkeys(run.record.method for run in runs):
        mine = [run for run in runs if run.record.method == method]
        keys = [
            key
            for key in flat[id(mine[0])]
            if len({repr(flat[id(run)].get(key)) for run in mine}) > 1
        ]
        keys = [
            key for key in keys if key != "seed" and not key.startswith(("sequence.", "domains."))
        ]
        groups: dict[str, list[Run]] = {}
        for run in mine:
            groups.setdefault(repr([flat[id(run)].get(key) for key in keys]), []).append(run)
        for group in groups.values():
            settings += _by_alpha(method, {key: flat[id(group[0])].get(key) for key in keys}, group)
    chosen = {s.method: s for s in reversed(settings)}
    return _checked(
        Study(
            name="runs",
            question="",
            settings=settings,
            chosen=chosen,
            reference=settings[-1].method,
            endpoints=[],
            forgets=10.0,
            skill=None,
            alpha=0.05,
        )
    )


def _by_alpha(method: str, values: Values, runs: list[Run]) -> list[Setting]:
    """A setting of each alpha, trained runs (1, which is not said) first."""
    found: dict[float, dict[Block, Run]] = {}
    for run in runs:
        blocks = found.setdefault(run.record.alpha, {})
        if _block(run) in blocks:
            raise DataError(
                f"two runs of {method} are the same", run.record.run_id, "name each once"
            )
        blocks[_block(run)] = run
    return [
        Setting(method, values if a == 1 else {**values, "alpha": a}, found[a])
        for a in sorted(found, key=lambda a: (a != 1, a))
    ]


def _block(run: Run) -> Block:
    return run.record.seed, tuple(run.record.trained)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return out


SAME = {
    "protocol": lambda r: r.protocol,
    "model": lambda r: r.pins.get("model", r.model),
    "trained domains": lambda r: sorted(r.trained),
    "controls": lambda r: sorted(r.controls),
    "training text": lambda r: r.pins.get("domains"),
    "test documents": lambda r: r.pins.get("validation"),
    "dtype": lambda r: (r.config["model"]["dtype"], r.config["model"].get("load_in")),
}
"""What runs must share to be compared."""

BUDGET = ("tokens", "block", "batch_tokens", "schedule", "pack")


def _checked(study: Study) -> Study:
    """The study, with notes on unequal budgets and tainted runs. DataError, naming two runs: they
    do not measure the same."""
    runs = [run for s in study.settings for run in s.runs.values()]
    first = runs[0]
    for what, of in SAME.items():
        for run in runs[1:]:
            if of(run.record) != of(first.record):
                names = f"{first.record.run_id} and {run.record.run_id}"
                raise DataError(
                    f"runs of different {what} cannot be compared",
                    names,
                    "compare runs that share it",
                )
    for task in {task for run in runs for s in run.record.stages for task in s.tasks}:
        asked = {}
        for run in runs:
            rows = run.items[run.items.task == task]
            if len(rows):
                asked[run.record.run_id] = (
                    run.record.config["tasks"]["fewshot"],
                    *sorted(set(rows["item"])),
                )
        if len(set(asked.values())) > 1:
            other = next(k for k, v in asked.items() if v != next(iter(asked.values())))
            names = f"{next(iter(asked))} and {other}"
            raise DataError(
                f"{task} has other items or examples", names, "compare runs that answered the same"
            )
    notes = list(study.notes)
    swept = {key for s in study.settings for key in s.values}
    for key in BUDGET:
        if (
            f"train.{key}" not in swept
            and len({repr(run.record.config["train"][key]) for run in runs}) > 1
        ):
            notes.append(f"unequal budgets: train.{key} differs between runs")
    devices = {run.record.provenance.get("device") for run in runs}
    if len(devices) > 1:
        notes.append(f"runs of different devices: {', '.join(map(str, sorted(map(str, devices))))}")
    notes += [
        f"{run.record.run_id} is tainted: {', '.join(run.record.tainted)}"
        for run in runs
        if run.record.tainted
    ]
    return replace(study, notes=notes)


def loss_matrix(run: Run) -> LossMatrix:
    """From the run's documents. DataError: they are not paired."""
    try:
        return LossMatrix.from_documents(
            run.documents, run.record.trained, run.record.controls, run.record.regime
        )
    except ValueError as error:
        raise DataError(
            str(error), str(run.path), "restore the files or run again with force=true"
        ) from error


def _item_parts(run: Run, name: str, task: str) -> Parts | None:
    """Change of each item's margin (nats) or correctness from the pretrained model to the end; None
    where it was not scored at both."""
    ends = [run.record.stages[0], run.record.stages[-1]]
    if not all(task in s.tasks and not s.tasks[task].limited for s in ends):
        return None
    before, after = (answers.answers(run.items, task, s.index) for s in ends)
    of = answers.margin if name == "margin" else answers.correct
    change = np.asarray(of(after), dtype=np.float64) - of(before)
    return {task: (change, np.ones(len(change)))}


# --- summaries and differences --------------------------------------------------------------------


def level(setting: Setting, metric: str) -> Compared | None:
    """A setting's summary: over documents of its one run, or over its blocks and their
    documents."""
    return compared(
        [p for block in setting.runs if (p := setting.parts(metric, block)) is not None]
    )


def difference(a: Setting, b: Setting, metric: str) -> Compared | None:
    """a minus b, paired within the blocks that both have."""
    pairs = [
        (a.parts(metric, block), b.parts(metric, block)) for block in a.runs if block in b.runs
    ]
    try:
        return compared(
            [
                inference.combined([x, y], [1, -1])
                for x, y in pairs
                if x is not None and y is not None
            ]
        )
    except ValueError as error:
        raise DataError(
            f"{a.label} and {b.label} were not scored on the same text: {error}",
            "records",
            "score them alike",
        ) from error


def compared(parts: list[Parts]) -> Compared | None:
    """The mean over blocks of a summary or paired difference (inference.combined), whose parts in
    each block are given, with its interval over documents of the one block, or over blocks and the
    documents they share; None without any."""
    if not parts:
        return None
    values = np.array([_ratio(part) for part in parts])
    mean = inference.combined(parts, [1 / len(parts)] * len(parts))
    units = sum(len(z) for z, _ in mean.values())
    if len(parts) == 1:
        return Compared(inference.bootstrap_t(parts[0]), values, inference.error(mean))
    documents = inference.shared_error(parts)
    found = inference.blocks(values, documents=documents)
    return Compared(Estimate(found.value, found.low, found.high, units), values, documents)


def _ratio(parts: Parts) -> float:
    """The summary that parts make up."""
    return sum(float(z.sum() / n.sum()) for z, n in parts.values())


def lower_is_better(metric: str) -> bool:
    return ":" not in metric


def nats(metric: str, margin: float | None) -> float:
    """A declared margin in the unit the metric is computed in; nan without one."""
    if margin is None:
        return math.nan
    return math.log1p(margin / 100) if lower_is_better(metric) else margin


def efficient(study: Study) -> set[str]:
    """Labels of the settings that are on their method's front: no other setting of it learns more
    and forgets less."""
    found = set()
    for method in study.methods:
        mine = [(s, level(s, "own_step"), level(s, "backward")) for s in study.of(method)]
        there = [
            (s, x.estimate.value, y.estimate.value)
            for s, x, y in mine
            if x is not None and y is not None
        ]
        if there:
            keep = fronts.efficient(
                np.array([x for _, x, _ in there]), np.array([y for _, _, y in there])
            )
            found |= {there[i][0].label for i in keep}
    return found
