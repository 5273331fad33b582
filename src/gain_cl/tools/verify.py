"""``python -m gain_cl verify``: recompute every number of a finished run from its raw values, and
hash its files again.

A check is a function of the Case. It returns what it found, raises DataError where something is not
what was written, or Absent where there is nothing to compare with. What reading the record refuses
already (its form, its seal, values of another hash) is not checked again. Nothing is fetched, and
torch is not imported.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
import pandas as pd
from rich.text import Text

from gain_cl.config.schema import ADAPTERS, EXECUTION, RunConfig
from gain_cl.domains import Domain, tokens
from gain_cl.errors import DataError, GainError, StorageError
from gain_cl.measure import provenance, record, tasks
from gain_cl.paper.table import Row, Table, print_table, say
from gain_cl.runs import finish, resume, same
from gain_cl.stats import answers
from gain_cl.system import checkpoint, hashes, lock
from gain_cl.system.files import sha256
from gain_cl.tools.command import RUN, Parser, load_run, print_report, recorded_config

SAME = 1e-12
"""Relative: what the order of summing in float64 may change, three digits to spare."""

AGAIN = "restore the files or run again with force=true"

STYLES = {"ok": "green", "FAILED": "bold red", "not there": "dim"}


class Absent(Exception):
    """There is nothing to compare with. The message says what is not there."""


class Line(NamedTuple):
    """What a check came to. state: ok, FAILED or not there."""

    check: str
    state: str
    finding: str


class Case:
    """A record with the places around it. hashed: the files whose content was compared."""

    def __init__(self, run: record.Run, output_dir: str | None = None) -> None:
        self.run, self.record, self.output_dir = run, run.record, output_dir
        self.hashed: set[Path] = {run.path, record.items_path(run.path)}

    @functools.cached_property
    def config(self) -> RunConfig:
        try:
            return recorded_config(self.record)
        except DataError as error:
            by = self.record.provenance.get("gain_cl")
            if by == provenance.version():
                raise
            raise Absent(f"settings of gain_cl {by}: {error.what}") from None

    @property
    def folder(self) -> Path:
        """The run folder. Absent: it is elsewhere, or a later attempt is under way in it."""
        folder = Path(self.output_dir or self.config.output_dir) / self.record.run_id
        if not folder.is_dir():
            raise Absent(f"no run folder {folder}")
        states = [p.stat().st_mtime_ns for p in checkpoint.steps(folder / "ckpt")]
        if lock.holder(folder) or max(states, default=0) > self.run.path.stat().st_mtime_ns:
            raise Absent("a later attempt at the run is under way in its folder")
        return folder

    def beside(self, name: str) -> Path:
        """Return a file of the run folder, which is compared from here on."""
        path = self.folder / name
        if not path.exists():
            raise Absent(f"no {path}")
        if path.is_file():
            self.hashed.add(path)
        return path

    def fail(self, what: str, where: Path | None = None) -> NoReturn:
        """Raise DataError about the record, or another file."""
        raise DataError(what, str(where or self.run.path), AGAIN)

    def equal(self, what: str, told: Any, found: Any, where: Path | None = None) -> None:
        """Raise DataError unless what is told is what was found."""
        if told != found:
            self.fail(f"{what} is {told}, not {found}", where)

    def fields(self, told: object, found: dict[str, Any], of: str = "") -> None:
        """Raise DataError unless the fields of a part of the record are what was found."""
        for key, value in found.items():
            self.equal(f"{key}{of}", getattr(told, key), value)


def main(argv: list[str]) -> int:
    """Print the checks. Raises the first failure."""
    about = (
        "Recompute every number of a finished run from its raw values, and hash its files again."
    )
    args = Parser("verify", *RUN, description=about).read(argv)
    hashes.trust_nothing()
    case = Case(load_run(args), args.output_dir)
    lines, failure = examine(case)
    name, files = case.record.run_id, len(case.hashed)

    def show(_: Any) -> None:
        rows = [Row([x.check, Text(x.state, STYLES[x.state]), x.finding]) for x in lines]
        print_table(Table("verify", name, ["check", "state", "finding"], rows))
        if failure is None:
            good = sum(x.state == "ok" for x in lines)
            say(f"verified: {good} checks, {files} files hashed")

    report = {"run_id": name, "checks": [x._asdict() for x in lines], "files": files}
    print_report(report, args.json, show)
    if failure is not None:
        raise failure
    return 0


def examine(case: Case) -> tuple[list[Line], GainError | None]:
    """Make every check. Return what they found, and the error of the first that failed."""
    from rich.console import Console

    lines: list[Line] = []
    first: GainError | None = None
    with Console(stderr=True).status("") as status:  # hashing a large model takes minutes
        for check in CHECKS:
            status.update(name := check.__name__.replace("_", " "))
            try:
                lines.append(Line(name, "ok", check(case)))
            except Absent as reason:
                lines.append(Line(name, "not there", str(reason)))
            except Exception as error:  # values of any shape: what a check expects is not there
                if not isinstance(error, GainError):
                    what = f"malformed: {type(error).__name__}: {error}".splitlines()[0]
                    error = DataError(what, str(case.run.path), AGAIN)
                kind = StorageError if isinstance(error, StorageError) else DataError
                first = first or kind(f"{name}: {error.what}", error.where, error.do)
                lines.append(Line(name, "FAILED", f"{error.what} ({error.where})"))
    return lines, first


# --- the record and its values --------------------------------------------------------------------


def settings(case: Case) -> str:
    """What the record says beside its configuration is what the configuration says."""
    r, c = case.record, case.config
    case.equal("its name", case.run.path.name, f"{r.run_id}.json")
    told = {"model": c.model.name, "method": c.method, "sequence": c.sequence.name, "seed": c.seed}
    told |= {"trained": c.sequence.trained, "controls": c.sequence.controls, "regime": c.regime}
    case.fields(r, told)
    if missing := {*r.trained, *r.controls} - c.domains.keys():
        case.fail(f"no settings of domain {min(missing)}")
    window = f"first{c.eval.window}" if c.eval.window else "whole"
    stride = f"-stride{c.eval.stride}" if c.eval.stride else ""
    prefix = "".join(re.findall("-prefix[0-9]+-", r.protocol))
    asked = f"ppl-{c.eval.split}-{window}x{c.eval.documents}{prefix}ctx{c.eval.context}{stride}"
    case.equal("protocol", r.protocol, asked)
    return f"{r.model}, {r.method}, {r.sequence}, seed {r.seed}, {r.protocol}"


def run_id(case: Case) -> str:
    """The id is the hash over settings, pins and numerics. A tainted run keeps the id of its first
    attempt, which run.json tells."""
    r, c, numerics = case.record, case.config, case.record.provenance["numerics"]
    parts = ("model", "domains", "tasks", "plugins", "init_from", "checkpoints")
    pins = {key: pin for key, pin in r.pins.items() if key in parts}
    name = f"{f'{r.model}-{r.method}-{r.sequence}'[:70]}-s{r.seed}"
    found = f"{name}-{provenance.identity(c.scientific(), pins, numerics)}"
    if found == (r.run_id if r.interpolated is None else r.interpolated.of):
        return f"that of settings, pins and numerics {numerics}"
    if r.tainted:
        beginning(case)
        return "that of the first attempt; TAINTED since"
    known = c.model_dump(mode="json", exclude=set(EXECUTION))
    told, given = (pd.json_normalize(settings).columns for settings in (known, r.config))
    if len(added := told.difference(given)):
        raise Absent(
            f"written by a version without the setting {added[0]}: the id cannot be derived"
        )
    return case.fail(f"its settings and pins give {found}")


def sums(case: Case) -> str:
    """Nats, tokens, bytes and documents of every score are the sums over its documents."""
    _of_scores(case, case.run.documents, "domain")
    parts = case.run.documents.groupby(["stage", "domain"])
    for key_of, part in parts:
        index, name = cast("tuple[int, str]", key_of)
        score, where = case.record.stages[index].domains[name], f"{name} at stage {index}"
        counts = {"tokens": part["tokens"].sum(), "bytes": part["bytes"].sum()}
        case.fields(score, {**counts, "documents": len(part)}, f" of {where}")
        nats = math.fsum(part["nll_nats"])
        if not math.isclose(nats, score.nll_nats, rel_tol=SAME):
            case.fail(f"nll_nats of {where} is {score.nll_nats!r}, not {nats!r}")
    return f"{len(parts)} scores: nats, tokens, bytes, documents"


def _of_scores(case: Case, table: pd.DataFrame, name: str) -> None:
    """Raise DataError unless every row is of a score of the record, and every score has rows.

    name: column of the domain or task.
    """
    scored = {(s.index, key) for s in case.record.stages for key in getattr(s, f"{name}s")}
    for index, key in scored ^ set(zip(table["stage"], table[name], strict=True)):
        case.fail(f"values without a score, or a score without values: {key} at stage {index}")


def same_documents(case: Case) -> str:
    """A domain is scored on the same documents, tokens and bytes after every stage, as many as its
    settings say."""
    wanted, count = case.config.eval, len(case.record.stages)
    for name, own in case.run.documents.groupby("domain"):
        columns = own.groupby("stage")[["document", "split", "tokens", "bytes"]]
        first, *later = (part.reset_index(drop=True) for _, part in columns)
        for stage, part in enumerate(later, start=1):
            if not part.equals(first):
                case.fail(f"{name} is scored on other documents at stage {stage} than at stage 0")
        case.equal(f"documents of {name}", first["document"].nunique(), len(first))
        case.equal(f"documents of {name}", len(first), wanted.documents)
        case.equal(f"split of {name}", {*first["split"]}, {wanted.split})
    return f"{wanted.documents} {wanted.split} documents of each domain at all {count} stages"


def task_counts(case: Case) -> str:
    """Items and right answers of every task follow from the log-likelihoods. A task has the same
    items at every stage, and is scored where the settings say."""
    r, wanted, first = case.record, case.config.tasks, dict[str, answers.Answers]()
    if not wanted.names and case.run.items.empty:
        raise Absent("the run has no tasks")
    if r.interpolated is not None:
        raise Absent("interpolated models are not asked tasks")
    _of_scores(case, case.run.items, "task")
    for stage in r.stages:
        due = wanted.names if tasks.due(wanted.stages, stage.index, len(r.stages) - 1) else []
        case.equal(f"tasks at stage {stage.index}", set(stage.tasks), set(due))
        for name, score in stage.tasks.items():
            own = answers.answers(case.run.items, name, stage.index)
            other = first.setdefault(name, own)
            if [*own.items, *own.gold] != [*other.items, *other.gold]:
                case.fail(f"{name} has other items at stage {stage.index} than before")
            found = {"items": len(own.items), "correct": answers.correct(own).sum()}
            if (normed := answers.correct_norm(own)) is not None:
                found["correct_norm"] = normed.sum()
            found |= {"fewshot": wanted.fewshot, "limited": wanted.limit is not None}
            case.fields(score, found, f" of {name} at stage {stage.index}")
    return ", ".join(f"{len(own.items):,} of {name}" for name, own in first.items())


def training(case: Case) -> str:
    """Steps, tokens and rate of every stage are those of the settings."""
    c, given = case.config, case.config.adapter.kind == "given"
    for stage in case.record.stages:
        at, told = f"stage {stage.index}", stage.train
        case.equal(f"whether {at} was trained", told is not None, bool(stage.index) and not given)
        if told is None:
            continue
        asked = c.stage.stage_steps, c.train.lr
        case.equal(f"steps and rate of {at}", (told.steps, told.lr), asked)
        tokens = told.steps * c.train.batch_tokens
        if told.tokens < tokens or c.guard.kind == "none":  # a guard may add tokens to a step
            case.equal(f"tokens of {at}", told.tokens, tokens)
    last = len(case.record.stages) - 1
    if given:
        return f"{last} stages were trained elsewhere"
    return f"{last} stages of {c.stage.stage_steps} steps of {c.train.batch_tokens} tokens"


def attempts(case: Case) -> str:
    """Every attempt is listed as the run folder lists it, and what changed between them is what
    tainted the run."""
    listed, tainted = case.record.provenance.get("attempts", []), case.record.tainted
    changed = dict.fromkeys(what for attempt in listed for what in attempt["changed"])
    case.equal("what tainted it", tainted, list(changed))
    with suppress(Absent):
        path = case.beside("attempts.jsonl")
        if same.read_attempts(path.parent) != listed:
            case.fail("attempts.jsonl lists other attempts", path)
    return "; ".join([f"{len(listed)} attempts", *(f"TAINTED: {what}" for what in tainted)])


# --- the run folder -------------------------------------------------------------------------------


def matrix_file(case: Case) -> str:
    """matrix.csv is that of the record, byte for byte."""
    path = case.beside("matrix.csv")
    if path.read_bytes() != finish.matrix_csv(case.run).encode():
        case.fail("matrix.csv is not that of the record", path)
    return f"{path.stat().st_size:,} bytes again"


def stages(case: Case) -> str:
    """Every finished stage is what was written and says what the record says. The trained state
    after each stage that kept it has as many numbers as the record says."""
    root, r, c, kept = case.beside("stages"), case.record, case.config, list[int]()
    told = {f"{s.index:02d}-{s.domain or 'pretrained'}": s for s in r.stages}
    if wrong := sorted(told.keys() ^ {path.name for path in root.iterdir()}):
        case.fail(
            f"{wrong[0]} is {'missing' if wrong[0] in told else 'no stage of this run'}", root
        )
    for name, row in told.items():
        stage, at = resume.read_stage(folder := root / name), f"stage {row.index}"
        files = checkpoint.manifest(folder)
        case.hashed |= {folder / file for file in files}
        case.equal("its run", stage.facts["run_id"], r.run_id, folder)
        if stage.record != row:
            case.fail(f"stage.json tells other scores of {at} than the record", folder)
        for kind, table in (("document", case.run.documents), ("item", case.run.items)):
            mine = table[table["stage"] == row.index]
            there = stage.rows[stage.rows["kind"] == kind].reindex(columns=mine.columns)
            if _plain(there.assign(stage=row.index)) != _plain(mine):
                case.fail(f"scores.parquet holds other {kind}s of {at}", folder)
        if resume.ADAPTER in files and row.index:
            kept.append(row.index)
            # a state after a restart holds what is frozen, too
            if c.adapter.kind in ADAPTERS and (row.index == 1 or c.handover != "restart"):
                count = _numbers(folder / resume.ADAPTER)
                case.equal(f"parameters after {at}", r.trainable_parameters, count, folder)
    every = [*range(1, len(told))]
    if c.adapter.kind != "given" and kept not in (every, every[-1:]):
        case.fail(f"the trained state of stage {min({*every} - {*kept})} is missing", root)
    return f"{len(told)} folders, {len(kept)} trained states"


def _numbers(path: Path) -> int:
    """Return how many numbers a safetensors file holds."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _plain(table: pd.DataFrame) -> str:
    """Return the rows as text that tells every bit, lists in cells included."""
    listed = table.map(lambda x: x.tolist() if isinstance(x, np.ndarray) else x)
    return str(listed.to_dict("list"))


def metrics(case: Case) -> str:
    """metrics.jsonl has each step once, and the losses and tokens of the record are theirs."""
    path, r = case.beside("metrics.jsonl"), case.record
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for stage in r.stages:
        at, told = f"of stage {stage.index}", stage.train
        if told is None or str(stage.index) in r.provenance.get("inherited", {}):
            continue
        own = [row for row in rows if row["kind"] == "step" and row["stage"] == stage.index]
        if [row["step"] for row in own] != [*range(1, told.steps + 1)]:
            case.fail(f"it does not have every step {at} once", path)
        found = own[0]["loss_nats"], own[-1]["loss_nats"], sum(row["tokens"] for row in own)
        there = told.first_loss_nats, told.last_loss_nats, told.tokens
        case.equal(f"the losses and tokens {at}", there, found, path)
    return f"{len(rows)} rows: every step once"


def beginning(case: Case) -> str:
    """run.json is this run's: its settings, pins and numerics have the id, and unless the run is
    tainted, what it began with is what the record pins."""
    r = case.record
    if r.interpolated is not None:
        return _origin(case, r.interpolated)
    path = case.beside("run.json")
    first = json.loads(path.read_bytes())
    facts, numerics = first["facts"], first["facts"]["numerics"]["version"]
    found = provenance.identity(first["settings"], first["pins"], numerics)
    case.equal("its id", first["run_id"], r.run_id, path)
    case.equal("the id of its settings", r.run_id.rpartition("-")[2], found, path)
    began = {**facts["data"], "tokenizer": facts["tokenizer"]}
    began |= {"model": facts["model"]["pin"], "model_files": facts["model"]["files"]}
    for key in began.keys() & r.pins.keys() if not r.tainted else ():
        if began[key] != r.pins[key]:
            case.fail(f"{key} are not those of the record", path)
    return "run.json: settings, pins and numerics of this run"


def _origin(case: Case, made: record.Interpolated) -> str:
    """What was interpolated has the settings, pins and row 0 of its run's record, and what its
    stages cost."""
    path = case.run.path.with_name(f"{made.of}.json")
    if not path.exists():
        raise Absent(f"no {path}")
    case.hashed.add(path)
    case.equal("SHA-256", sha256(path), made.record_sha256, path)
    origin, of = record.load(path), "the run it is interpolated from"
    own = {"run_id", "provenance", "peak_memory_bytes", "stages", "items_sha256", "notes", "seal"}
    seen = [
        (
            run.record.model_dump(exclude=own),
            [stage.train for stage in run.record.stages],
            _plain(run.documents[run.documents["stage"] == 0]),
        )
        for run in (case.run, origin)
    ]
    for what, mine, theirs in zip(("settings or pins", "costs", "row 0"), *seen, strict=True):
        if mine != theirs:
            case.fail(f"its {what} are not those of {of}")
    return f"{path.name}: settings, pins, costs and row 0 of this record"


# --- what the run read, where it still lies -------------------------------------------------------


def cached_tokens(case: Case) -> str:
    """Cached tokens have the pinned hash, and the scored documents are the first of their split in
    them."""
    r, wanted, found = case.record, case.config.eval, 0
    names = [*r.trained, *r.controls]
    for name in names:
        domain = _cached(case, name)
        if domain is None:
            continue
        found += 1
        case.equal(f"the hash of {name}'s tokens", domain.hash, r.pins["tokens"][name])
        meant = []
        for d in domain.split_documents(wanted.split)[: wanted.documents]:
            count = min(len(d.tokens) - d.prompt, wanted.window or len(d.tokens))
            meant.append((d.id, count, int(d.ends[d.prompt + count - 1])))
        own = case.run.documents[case.run.documents["domain"] == name]
        for stage, part in own.groupby("stage"):
            if [*zip(part["document"], part["tokens"], part["bytes"], strict=True)] != meant:
                case.fail(
                    f"{name} at stage {stage} is not scored on the first {len(meant)} "
                    f"{wanted.split} documents of its text"
                )
    if not found:
        raise Absent(f"no tokens of this run in {hashes.cache_dir()}")
    return f"{found} of {len(names)} domains, as pinned; the scored documents are in them"


def _cached(case: Case, name: str) -> Domain | None:
    """Return the tokens of a domain of the run; None: they are not in the cache."""
    pins = case.record.pins
    meant = [tokens.FORMAT, pins["domains"][name], pins["tokenizer"]]
    for path in sorted((hashes.cache_dir() / "tokens").glob("*/meta.json")):
        with suppress(OSError, ValueError, LookupError, TypeError):  # a run tokenises again
            meta = json.loads(path.read_bytes())
            if [meta["identity"][key] for key in ("format", "pin", "tokenizer")] == meant:
                break
    else:
        return None
    arrays = {}
    for array, pinned in meta["sha256"].items():
        case.hashed.add(file := path.with_name(f"{array}.npy"))
        case.equal("SHA-256", sha256(file), pinned, file)
        arrays[array] = np.load(file, mmap_mode="r", allow_pickle=False)
    return Domain(name, case.config.domains[name].split, meta["hash"], arrays)


CHECKS: tuple[Callable[[Case], str], ...] = (
    settings, run_id, sums, same_documents, task_counts, training, attempts, matrix_file,
    stages, metrics, beginning, cached_tokens,
)  # fmt: skip
