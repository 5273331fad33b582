"""Experiments: a question as data (experiments/NAME.yaml), the runs it asks for, and what it
declares beforehand. Torch-free.

An experiment is a set of methods, each with a grid of settings, in blocks: block k is order k of a
Latin square of the domains with seed k, and every setting runs in every block, so that settings are
compared within blocks. Endpoints are declared in the file; whatever else is looked at is
exploratory.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from gain_cl.compose import composition
from gain_cl.config import presets
from gain_cl.config.schema import Finite, Name, RunConfig, Section
from gain_cl.errors import ConfigError, suggest
from gain_cl.measure import tasks
from gain_cl.measure.record import first_line
from gain_cl.runs import plan
from gain_cl.stats.matrix import METRICS
from gain_cl.system import lock

Values = dict[str, Any]
"""Keys of a run's configuration and what a setting gives them."""

METRIC = rf"^({'|'.join(f.__name__ for f in METRICS)}|(margin|accuracy):.+)$"


class Endpoint(Section):
    """One declared comparison: the metric of a method, less that of another (or of nothing: against
    0)."""

    name: Name
    # of matrix.METRICS, or margin:TASK, accuracy:TASK (change from the pretrained model to the end)
    metric: str = Field(pattern=METRIC)
    of: Name  # method
    minus: Name | None = None  # method; None: against 0
    # the methods' chosen settings, or equal own step, interpolated on their fronts
    at: Literal["chosen", "matched"] = "chosen"
    kind: Literal["difference", "equivalence"] = "difference"
    # % of perplexity (items: its unit) that does not matter
    margin: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Endpoint:
        if self.at == "matched" and (self.metric != "backward" or self.minus is None):
            raise ValueError(
                "at: matched compares the backward change of two methods; give metric: backward "
                "and minus:"
            )
        if self.kind == "equivalence" and self.margin is None:
            raise ValueError("kind: equivalence needs margin:")
        if self.metric.startswith("accuracy") and (self.margin or 0) >= 1:
            raise ValueError("margin: of an accuracy is a share; 2 points are 0.02")
        return self


class Experiment(Section):
    name: Name
    question: str
    expect: str = ""  # what we expect, and why, written before it was run
    # model presets, each an experiment of its own; default: the one that every run has
    models: list[Name] = Field([])
    config_dirs: list[str] = Field([])  # folders with presets of your own, as --config-dir of run
    plugins: list[str] = Field([])  # files that register adapters or guards, as --plugin of run
    overrides: list[str] = Field([])  # of every run
    # of the runs of block 0, instead of those of the same keys: what every block cannot afford
    once: list[str] = Field([])
    # method -> key -> values: its grid; {} is the preset as it is
    methods: dict[Name, dict[str, Annotated[list[Any], Field(min_length=1)]]] = Field(min_length=1)
    # the setting that stands for a method where settings are not interpolated; default: its first
    chosen: dict[Name, Values] = Field({})
    blocks: int = Field(1, ge=1)
    # method that others are compared with where nothing is declared; default: the last
    reference: Name | None = None
    endpoints: list[Endpoint] = Field([])
    # % of perplexity that some setting must forget, or nothing is decided
    forgets: float = Field(10.0, gt=0, allow_inf_nan=False)
    # own step in % of perplexity at which methods are matched; None: the middle of what both reach
    skill: Finite | None = None
    alpha: float = Field(0.05, gt=0, lt=1)  # of the declared endpoints together (Holm)

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        settings = self.settings()
        for method, values in self.chosen.items():
            if (method, values) not in settings:
                raise ValueError(f"chosen: {method} has no setting {values}")
        for named in (self.reference, *(m for e in self.endpoints for m in (e.of, e.minus))):
            if named and named not in self.methods:
                raise ValueError(f"{named} is not among the methods: {', '.join(self.methods)}")
        for e in (e for e in self.endpoints if e.at == "matched"):
            if self.skill is None:
                raise ValueError(
                    f"endpoint {e.name} is at: matched; declare skill: (own step in %, such as -10)"
                )
            a, b = (sum(method == m for method, _ in settings) for m in (e.of, e.minus))
            if a != b:  # choosing the best of more settings flatters (fronts.py)
                raise ValueError(
                    f"endpoint {e.name}: {e.of} has {a} settings, {e.minus} {b}; give both as many"
                )
        if len({e.name for e in self.endpoints}) < len(self.endpoints):
            raise ValueError("two endpoints have the same name")
        return self

    def settings(self) -> list[tuple[str, Values]]:
        """Return (method, values) of every setting, in the order of the file."""
        return [
            (method, dict(zip(grid, values, strict=True)))
            for method, grid in self.methods.items()
            for values in itertools.product(*grid.values())
        ]

    def chosen_of(self, method: str) -> Values:
        """Return the setting that stands for a method."""
        return self.chosen.get(method) or dict(self.settings()[::-1])[method]


@dataclass(frozen=True)
class Planned:
    """A run that an experiment asks for. model: its preset; overrides: words of the command
    ``run``, which compose to config."""

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
        return setting_label(self.method, self.values)

    @property
    def claims(self) -> Path:
        """Return the folder of the claims of a sweep."""
        return self.folder.parent / "claims"

    @property
    def state(self) -> Literal["done", "running", "failed", "stopped", "missing"]:
        """Return what became of it so far. running: a process has its lock; failed: it said why, or
        its launcher did; stopped: some of it is saved."""
        if self.record.exists():
            return "done"
        if lock.holder(self.folder) is not None:
            return "running"
        if (self.folder / "failure.json").exists() or "failed" in lock.read_claim(
            self.claims, self.run_id
        ):
            return "failed"
        return "stopped" if (self.folder / "run.json").exists() else "missing"


def shipped_experiments() -> Path:
    """Return experiments/ beside the shipped presets: inside the installed package, else in the
    checkout."""
    return presets.configs_dir().parent / "experiments"


def load_experiment(name: str) -> Experiment:
    """Return an experiment by name (experiments/NAME.yaml here, else the shipped one) or by the
    path of its file. ConfigError: what is wrong in it."""
    given, folders = Path(name).expanduser(), (Path("experiments"), shipped_experiments())
    places = [given] if given.suffix == ".yaml" else [f / f"{name}.yaml" for f in folders]
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        there = {p.stem for f in folders for p in f.glob("*.yaml")}
        do = suggest(name, there) or "give the path of its YAML file"
        raise ConfigError(f"no experiment {name!r}", str(places[0]), do)
    plain = presets.read_yaml(file)
    try:
        return Experiment.model_validate({"name": file.stem, **plain})
    except TypeError:
        what = "an experiment is a mapping of keys"
    except ValidationError as error:
        what = first_line(error).replace("Value error, ", "").removeprefix(": ")
    raise ConfigError(what, str(file), "fix the file")


def latin_order(size: int, block: int) -> list[int]:
    """Return row ``block`` of a Latin square of 0 .. size-1, balanced for what comes before what
    (Williams 1949): over ``size`` rows each element stands once in each place and, for an even
    size, follows each other once; an odd size needs the reversed rows too. Row 0 is 0 .. size-1."""
    first = [(i + 1) // 2 if i % 2 else (size - i // 2) % size for i in range(size)]
    place = {value: i for i, value in enumerate(first)}
    row = [place[(value + block) % size] for value in first]
    return row[::-1] if size % 2 and (block // size) % 2 else row


def planned_runs(
    experiment: Experiment, more: list[str] | None = None, execute: bool = False
) -> list[Planned]:
    """Return every run that the experiment asks for, block by block, with its id and state.

    more: overrides of this machine (output_dir=, results_dir=, compute.threads=). execute: run its
    plugins, too. ConfigError: what is wrong in any of them."""
    more = list(more or [])
    options = [f"--config-dir={d}" for d in experiment.config_dirs]
    options += [f"--plugin={p}" for p in experiment.plugins]
    domains, found = 0, dict[str, Planned]()
    try:
        with composition.composer(experiment.config_dirs, experiment.plugins, execute) as compose:
            models = [[f"model={m}"] for m in experiment.models] or [[]]
            for model, block, (method, values) in itertools.product(
                models, range(experiment.blocks), experiment.settings()
            ):
                own = [*model, f"method={method}"]
                for key, value in values.items():
                    text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
                    own.append(f"{key}={text}")
                # in block 0 ``once`` replaces those of the same key
                once = {o.partition("=")[0]: o for o in experiment.once if not block}
                own += [o for o in experiment.overrides if o.partition("=")[0] not in once]
                own += once.values()
                if experiment.blocks > 1:
                    domains = domains or len(compose([*own, *more]).sequence.domains)
                    order = ",".join(map(str, latin_order(domains, block)))
                    own += [f"seed={block}", f"sequence.order=[{order}]"]
                config = compose([*own, *more])
                if block == 0:
                    _scores_what_is_declared(experiment, config)
                made, name = plan.prepare(config), config.model.name
                about = made.run_id, made.record_path, made.folder
                run = Planned(name, method, values, block, [*own, *options], config, *about)
                if (other := found.setdefault(run.run_id, run)) is not run:
                    what = f"two settings are the same run: {other.label} and {run.label}"
                    raise ConfigError(what, "methods", "remove one")
    except ConfigError as error:
        where = f"experiment {experiment.name}: {error.where}"
        raise ConfigError(error.what, where, error.do) from error
    return list(found.values())


def _scores_what_is_declared(experiment: Experiment, config: RunConfig) -> None:
    """Raise ConfigError when an endpoint asks for a task that the runs do not score before and
    after."""
    for e in experiment.endpoints:
        task, last = e.metric.partition(":")[2], len(config.stages)
        both = all(tasks.due(config.tasks.stages, stage, last) for stage in (0, last))
        if task and not (both and task in config.tasks.names):
            raise ConfigError(
                f"endpoint {e.name}: the runs do not score {task!r} before and after",
                "endpoints",
                suggest(task, config.tasks.names) or "set tasks= and tasks.stages=ends",
            )


def setting_label(method: str, values: Values) -> str:
    """Return what a setting is called in a table: lora lr=0.001."""
    words = [
        f"{k.rpartition('.')[2]}={f'{v:g}' if isinstance(v, float) else v}"
        for k, v in values.items()
    ]
    return " ".join([method, *words])
