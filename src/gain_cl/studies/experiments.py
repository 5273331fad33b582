"""Experiments: a question as data (experiments/NAME.yaml), the runs it asks for, and what it
declares beforehand. Torch-free.

An experiment is a set of methods, each with a grid of settings, in blocks: block k is order k of a
Latin square of the domains with seed k, and every setting runs in every block, so that settings are
compared within blocks. Endpoints are declared in the file; whatever else is looked at is
exploratory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from gain_cl.compose import composition
from gain_cl.config import presets
from gain_cl.config.schema import Finite, Name, RunConfig, Section
from gain_cl.errors import ConfigError, DataError, suggest
from gain_cl.measure import tasks
from gain_cl.runs import plan as plan_
from gain_cl.stats.matrix import METRICS
from gain_cl.system import lock

Values = dict[str, Any]
"""Keys of a run's configuration and what a setting gives them."""

LOSSES = tuple(f.__name__ for f in METRICS)
ITEMS = ("margin", "accuracy")


class Endpoint(Section):
    """One declared comparison: the metric of a method, less that of another (or of nothing: against
    0)."""

    name: Name
    # of matrix.METRICS, or margin:TASK, accuracy:TASK (change from the pretrained model to the end)
    metric: str
    of: Name  # method
    minus: Name | None = None  # method; None: against 0
    at: Literal["chosen", "matched"] = (
        "chosen"  # the methods' chosen settings, or equal own step, interpolated on their fronts
    )
    kind: Literal["difference", "equivalence"] = "difference"
    margin: float | None = Field(
        None, gt=0, allow_inf_nan=False
    )  # % of perplexity (items: its unit) that does not matter

    @model_validator(mode="after")
    def _check(self) -> Endpoint:
        metric, _, task = self.metric.partition(":")
        if self.metric not in LOSSES and not (metric in ITEMS and task):
            raise ValueError(
                f"metric {self.metric!r} is unknown; use one of {', '.join(LOSSES)}, margin:TASK, "
                "accuracy:TASK"
            )
        if self.at == "matched" and (self.metric != "backward" or self.minus is None):
            raise ValueError(
                "at: matched compares the backward change of two methods; give metric: backward "
                "and minus:"
            )
        if self.kind == "equivalence" and self.margin is None:
            raise ValueError("kind: equivalence needs margin:")
        if metric == "accuracy" and self.margin is not None and self.margin >= 1:
            raise ValueError("margin: of an accuracy is a share; 2 points are 0.02")
        return self


class Experiment(Section):
    name: Name
    question: str
    expect: str = ""  # what we expect, and why, written before it was run
    models: list[Name] = Field(
        []
    )  # model presets, each an experiment of its own; default: the one that every run has
    config_dirs: list[str] = Field([])  # folders with presets of your own, as --config-dir of run
    plugins: list[str] = Field([])  # files that register adapters or guards, as --plugin of run
    overrides: list[str] = Field([])  # of every run
    once: list[str] = Field(
        []
    )  # of the runs of block 0, instead of those of the same keys: what every block cannot afford
    methods: dict[Name, dict[str, list[Any]]] = Field(
        min_length=1
    )  # method -> key -> values: its grid; {} is the preset as it is
    chosen: dict[Name, Values] = Field(
        {}
        # the setting that stands for a method where settings are not interpolated; default: its first
    )
    blocks: int = Field(1, ge=1)
    reference: Name | None = (
        None  # method that others are compared with where nothing is declared; default: the last
    )
    endpoints: list[Endpoint] = Field([])
    forgets: float = Field(
        10.0, gt=0, allow_inf_nan=False
    )  # % of perplexity that some setting must forget, or nothing is decided
    skill: Finite | None = (
        # own step in % of perplexity at which methods are matched; None: the middle of what both
        # reach
        None
    )
    alpha: float = Field(0.05, gt=0, lt=1)  # of the declared endpoints together (Holm)

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if len(set(self.models)) < len(self.models):
            raise ValueError("models: one is named twice")
        if self.models and any(o.startswith("model=") for o in (*self.overrides, *self.once)):
            raise ValueError("models: and an override model= exclude each other")
        for method, values in self.chosen.items():
            if method not in self.methods:
                raise ValueError(f"chosen: {method} is not among the methods")
            if values not in list(_grid(self.methods[method])):
                raise ValueError(f"chosen: {method} has no setting {values}")
        named = [m for e in self.endpoints for m in (e.of, e.minus) if m] + (
            [self.reference] if self.reference else []
        )
        for method in named:
            if method not in self.methods:
                raise ValueError(f"{method} is not among the methods: {', '.join(self.methods)}")
        for method, grid in self.methods.items():
            for key, steps in grid.items():
                if not steps:
                    raise ValueError(f"methods: {method}: {key} has no value")
        for e in (e for e in self.endpoints if e.at == "matched" and e.minus):
            if self.skill is None:
                raise ValueError(
                    f"endpoint {e.name} is at: matched; declare skill: (own step in %, such as -10)"
                )
            sizes = [len(list(_grid(self.methods[m]))) for m in (e.of, e.minus) if m]
            if len(set(sizes)) > 1:  # choosing the best of more settings flatters (fronts.py)
                raise ValueError(
                    f"endpoint {e.name}: {e.of} has {sizes[0]} settings, {e.minus} {sizes[1]}; "
                    "give both as many"
                )
        names = [e.name for e in self.endpoints]
        if len(set(names)) < len(names):
            raise ValueError("two endpoints have the same name")
        return self

    def settings(self) -> list[tuple[str, Values]]:
        """(method, values) of every setting, in the order of the file."""
        return [(method, values) for method, grid in self.methods.items() for values in _grid(grid)]

    def chosen_of(self, method: str) -> Values:
        """The setting that stands for a method."""
        return self.chosen.get(method, next(_grid(self.methods[method])))


@dataclass(frozen=True)
class Cell:
    """One run of an experiment. model: its preset; overrides: words of the command ``run``, which
    compose to config."""

    model: str
    method: str
    values: Values
    block: int
    overrides: list[str]
    config: RunConfig
    run_id: str
    record: Path
    folder: Path

    @property
    def label(self) -> str:
        return label(self.method, self.values)

    @property
    def claims(self) -> Path:
        """Folder of the claims of a sweep."""
        return self.folder.parent / "claims"

    @property
    def state(self) -> Literal["done", "running", "failed", "stopped", "missing"]:
        """running: a process has its lock; failed: it said why, or its launcher did; stopped: some
        of it is saved."""
        if self.record.exists():
            return "done"
        if lock.holder(self.folder) is not None:
            return "running"
        if (self.folder / "failure.json").exists() or "failed" in lock.read_claim(
            self.claims, self.run_id
        ):
            return "failed"
        return "stopped" if (self.folder / "run.json").exists() else "missing"


def _grid(axes: dict[str, list[Any]]) -> Iterator[Values]:
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def folder() -> Path:
    """experiments/ beside the shipped presets: inside the installed package, else in the
    checkout."""
    return presets.configs_dir().parent / "experiments"


def load(name: str) -> Experiment:
    """An experiment by name (experiments/NAME.yaml here, else the shipped one) or by the path of
    its file."""
    given = Path(name).expanduser()
    if given.suffix == ".yaml":
        places = [given]
    else:
        places = [Path("experiments") / f"{name}.yaml", folder() / f"{name}.yaml"]
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        there = sorted(
            {p.stem for place in (Path("experiments"), folder()) for p in place.glob("*.yaml")}
        )
        raise ConfigError(
            f"no experiment {name!r}",
            str(places[0]),
            suggest(name, there) or "give the path of its YAML file",
        )
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = f"{file}:{line + 1}" if line is not None else str(file)
        raise ConfigError(
            f"not YAML: {str(getattr(error, 'problem', None) or error).splitlines()[0]}",
            at,
            "mend the file",
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot read: {error.strerror}", str(file), "check the file and its permissions"
        ) from None
    if not isinstance(plain, dict):
        raise ConfigError(
            "an experiment is a mapping of keys", str(file), "see experiments/pilot.yaml"
        )
    try:
        return Experiment.model_validate({"name": file.stem, **plain})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{where}: {message}" if where else message, str(file), "mend the experiment"
        ) from None


def latin_order(size: int, block: int) -> list[int]:
    """Row ``block`` of a Latin square of 0 .. size-1, balanced for what comes before what (Williams
    1949): over ``size`` rows each element stands once in each place and, for an even size, follows
    each other once; an odd size needs the reversed rows too. Row 0 is 0 .. size-1."""
    first = [(i + 1) // 2 if i % 2 else (size - i // 2) % size for i in range(size)]
    place = {value: i for i, value in enumerate(first)}
    row = [place[(value + block) % size] for value in first]
    return row[::-1] if size % 2 and (block // size) % 2 else row


def cells(experiment: Experiment, more: list[str] | None = None) -> list[Cell]:
    """Every run that the experiment asks for, block by block, with its id and state. more:
    overrides of this machine (output_dir=, results_dir=, compute.threads=). ConfigError for what is
    wrong in any of them."""
    more, base = list(more or []), None
    found: list[Cell] = []
    seen: dict[str, str] = {}
    try:
        with composition.composer(experiment.config_dirs, experiment.plugins) as compose:
            models = [[f"model={m}"] for m in experiment.models] or [[]]
            for model, block, (method, values) in itertools.product(
                models, range(experiment.blocks), experiment.settings()
            ):
                own = [*model]
                own += [
                    f"method={method}",
                    *(f"{key}={_text(value)}" for key, value in values.items()),
                ]
                own += (
                    experiment.overrides
                    if block
                    else _instead(experiment.overrides, experiment.once)
                )
                if experiment.blocks > 1:
                    base = base or len(compose([*own, *more]).sequence.domains)
                    own += [
                        f"seed={block}",
                        f"sequence.order=[{','.join(map(str, latin_order(base, block)))}]",
                    ]
                config = compose([*own, *more])
                if block == 0:
                    _scores_what_is_declared(experiment, config)
                plan = plan_.prepare(config)
                if plan.run_id in seen:
                    what = (
                        f"two settings are the same run: {seen[plan.run_id]} and "
                        f"{label(method, values)}"
                    )
                    raise ConfigError(what, "methods", "remove one")
                seen[plan.run_id] = label(method, values)
                words = [*own, *_options(experiment)]
                found.append(
                    Cell(
                        config.model.name,
                        method,
                        values,
                        block,
                        words,
                        config,
                        plan.run_id,
                        plan.record_path,
                        plan.folder,
                    )
                )
    except ConfigError as error:
        raise ConfigError(
            error.what, f"experiment {experiment.name}: {error.where}", error.do
        ) from error
    return found


def _scores_what_is_declared(experiment: Experiment, config: RunConfig) -> None:
    """ConfigError when an endpoint asks for a task that the runs do not score before and after."""
    for e in experiment.endpoints:
        task = e.metric.partition(":")[2]
        if task and task not in config.tasks.names:
            raise ConfigError(
                f"endpoint {e.name}: the runs do not score {task!r}",
                "endpoints",
                suggest(task, config.tasks.names) or "set tasks=",
            )
        last = len(config.stages)
        if task and not all(tasks.due(config.tasks.stages, stage, last) for stage in (0, last)):
            raise ConfigError(
                f"endpoint {e.name}: {task} is not scored before and after the run",
                "tasks.stages",
                "use tasks.stages=ends",
            )


def _options(experiment: Experiment) -> list[str]:
    return [f"--config-dir={d}" for d in experiment.config_dirs] + [
        f"--plugin={p}" for p in experiment.plugins
    ]


def _instead(overrides: list[str], others: list[str]) -> list[str]:
    """Overrides with others added, which replace those of the same key."""
    keys = {o.partition("=")[0] for o in others}
    return [*(o for o in overrides if o.partition("=")[0] not in keys), *others]


def _text(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(_text(v) for v in value)}]"
    return str(value)


def label(method: str, values: Values) -> str:
    """A setting in a table: lora lr=0.001."""
    words = [
        f"{k.rpartition('.')[2]}={f'{v:g}' if isinstance(v, float) else v}"
        for k, v in values.items()
    ]
    return " ".join([method, *words])
