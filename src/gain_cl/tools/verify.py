"""``python -m gain_cl verify``: recompute every number of a finished run from its raw values, and
hash its files again.

A check is a function of the Case, and its docstring says what it shows. It yields what is compared:
a name, what is told, what was found and, if it is not the record, the file that tells it. It raises
Absent where there is nothing to compare with. What reading the record refuses
already (its form, its seal, values of another hash) is not checked again. Nothing is fetched, and
torch is not imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gain_cl.config.schema import ADAPTERS, EXECUTION
from gain_cl.domains import Domain, tokens
from gain_cl.errors import DataError, GainError
from gain_cl.measure import provenance, record, scoring, tasks
from gain_cl.paper.table import say
from gain_cl.runs import finish, resume, same
from gain_cl.stats import answers
from gain_cl.studies.study import loss_matrix
from gain_cl.system import hashes, lock
from gain_cl.system.files import sha256
from gain_cl.system.sealed import read_sealed
from gain_cl.tools.command import (
    RUN,
    Parser,
    load_run,
    print_report,
    print_rows,
    recorded_config,
)

SAME = 1e-12
"""Relative: what the order of summing in float64 may change, three digits to spare."""

AGAIN = "restore the files or run again with force=true"


class Absent(Exception):
    """There is nothing to compare with. The message says what is not there."""


class Case:
    """A finished run with its settings and its folder."""

    def __init__(self, run: record.Run, output_dir: str | None = None) -> None:
        self.run, self.record, self.config = run, run.record, recorded_config(run.record)
        self.folder = Path(output_dir or self.config.output_dir) / self.record.run_id

    def beside(self, name: str) -> Path:
        """Return a file of the run folder. Absent: it is elsewhere, or of a later attempt."""
        if lock.holder(self.folder) or (self.folder / "ckpt").exists():
            raise Absent("a later attempt at the run is under way in its folder")
        if not (path := self.folder / name).exists():
            raise Absent(f"no {path}")
        return path


Compared = Iterator[tuple[Any, ...]]


def main(argv: list[str]) -> int:
    """Print the checks. Raises the first failure."""
    args = Parser("verify", *RUN).read(argv)
    case = Case(load_run(args), args.output_dir)
    lines, failure = examine(case)
    name, good = case.record.run_id, sum(line["state"] == "ok" for line in lines)

    def show(_: Any) -> None:
        print_rows("verify", name, lines)
        if failure is None:
            say(f"verified: {good} checks")

    print_report({"run_id": name, "checks": lines}, args.json, show)
    if failure is not None:
        raise failure
    return 0


def examine(case: Case) -> tuple[list[dict[str, str]], GainError | None]:
    """Make every check. Return what they came to, and the error of the first that failed."""
    from rich.console import Console

    lines: list[dict[str, str]] = []
    first: GainError | None = None
    with Console(stderr=True).status("") as status:  # hashing a large model takes minutes
        for check in CHECKS:
            status.update(name := check.__name__.replace("_", " "))
            state, finding = "ok", " ".join(str(check.__doc__).split())
            try:
                for what, told, found, *where in check(case):
                    if differs := same.first_difference(told, found, what):
                        raise DataError(differs, str([*where, case.run.path][0]), AGAIN)
            except Absent as reason:
                state, finding = "not there", str(reason)
            except Exception as error:  # values of any shape: what a check expects is not there
                if not isinstance(error, GainError):
                    error = DataError(f"malformed: {error!r}", str(case.run.path), AGAIN)
                first = first or type(error)(f"{name}: {error.what}", error.where, error.do)
                state, finding = "FAILED", f"{error.what} ({error.where})"
            lines.append({"check": name, "state": state, "finding": finding})
    return lines, first


# --- the record and its values --------------------------------------------------------------------


def settings(case: Case) -> Compared:
    """The record says what its configuration says."""
    r, c = case.record, case.config
    asked = {"model": c.model.name, "method": c.method, "sequence": c.sequence.name, "seed": c.seed}
    asked |= {"trained": c.sequence.trained, "controls": c.sequence.controls, "regime": c.regime}
    prefix = r.protocol.partition("-prefix")[2].partition("-")[0]
    asked["protocol"] = scoring.protocol(c.eval, int(prefix))
    yield "", r.model_dump(include={*asked}), asked
    yield "its name", case.run.path.name, f"{r.run_id}.json"


def run_id(case: Case) -> Compared:
    """The id is the hash over settings, pins and numerics, of a tainted run those of its first
    attempt."""
    r, c = case.record, case.config
    later = ("model_files", "tokenizer", "tokens", "validation")
    pins = {key: pin for key, pin in r.pins.items() if key not in later}
    found = provenance.run_id(c, pins, r.provenance["numerics"])
    if r.tainted and found != r.run_id:
        yield from beginning(case)
        return
    known = c.model_dump(mode="json", exclude=set(EXECUTION))
    told, given = (pd.json_normalize(settings).columns for settings in (known, r.config))
    for key in told.difference(given) if found != r.run_id else ():
        raise Absent(f"written by a version without the setting {key}: the id cannot be derived")
    yield "the id of its settings and pins", r.run_id, found


def sums(case: Case) -> Compared:
    """A domain is scored on the same documents after every stage, as many as the settings say.
    Nats, tokens and bytes of a score are the sums over them."""
    loss_matrix(case.run)  # says which documents are not the same
    rows, wanted, scored = case.run.documents, case.config.eval, 0
    for stage in case.record.stages:
        for name, score in stage.domains.items():
            part = rows[(rows["stage"] == stage.index) & (rows["domain"] == name)]
            nats = math.fsum(part["nll_nats"])
            if math.isclose(score.nll_nats, nats, rel_tol=SAME):
                nats = score.nll_nats
            found = {"nll_nats": nats, "documents": len(part)}
            found |= {"tokens": part["tokens"].sum(), "bytes": part["bytes"].sum()}
            yield f"{name} at stage {stage.index}", score.model_dump(), found
            yield f"documents of {name}", score.documents, wanted.documents
            scored += len(part)
    yield "scored documents", scored, len(rows)
    yield "their split", {*rows["split"]}, {wanted.split}


def task_counts(case: Case) -> Compared:
    """Items and right answers of every task follow from the log-likelihoods. A task has the same
    items at every stage, and is scored where the settings say."""
    items, wanted, first = case.run.items, case.config.tasks, dict[str, answers.Answers]()
    answered, stages = 0, case.record.stages
    for stage in stages:
        due = wanted.names if tasks.due(wanted.stages, stage.index, len(stages) - 1) else []
        yield f"tasks at stage {stage.index}", {*stage.tasks}, {*due}
        for name, score in stage.tasks.items():
            if score.correct is None:  # lm-eval's metrics alone
                answered += score.items
                continue
            own, at = answers.answers(items, name, stage.index), f"{name} at stage {stage.index}"
            other = first.setdefault(name, own)
            yield f"items of {at}", [*other.items, *other.gold], [*own.items, *own.gold]
            found = {"items": len(own.items), "correct": answers.correct(own).sum()}
            if (normed := answers.correct_norm(own)) is not None:
                found["correct_norm"] = normed.sum()
            found |= {"limited": wanted.limit is not None}
            if wanted.fewshot is not None:  # else what the task says
                found["fewshot"] = wanted.fewshot
            yield at, score.model_dump(include={*found}), found
            answered += len(own.items)
    yield "answered items", answered, len(items)
    if not items.size:
        raise Absent("the run has no tasks")


def training(case: Case) -> Compared:
    """Steps, tokens and rate of every stage are those of the settings."""
    c = case.config
    for stage in case.record.stages:
        at, told = f"stage {stage.index}", stage.train
        trains = stage.index > 0 and c.adapter.kind != "given"
        yield f"whether {at} was trained", told is not None, trains
        if told is not None:
            asked, tokens = (c.stage.stage_steps, c.train.lr), told.steps * c.train.batch_tokens
            yield f"steps and rate of {at}", (told.steps, told.lr), asked
            if told.tokens < tokens or c.guard.kind == "none":  # a guard may add tokens to a step
                yield f"tokens of {at}", told.tokens, tokens


def attempts(case: Case) -> Compared:
    """What changed between the attempts is what tainted the run, and the run folder lists the same
    attempts."""
    listed = case.record.provenance.get("attempts", [])
    changed = dict.fromkeys(what for attempt in listed for what in attempt["changed"])
    yield "what tainted it", case.record.tainted, [*changed]
    with suppress(Absent):
        path = case.beside("attempts.jsonl")
        yield "attempts", listed, same.read_attempts(path.parent), path


# --- the run folder -------------------------------------------------------------------------------


def matrix_file(case: Case) -> Compared:
    """matrix.csv is that of the record, byte for byte."""
    path = case.beside("matrix.csv")
    yield "matrix.csv", path.read_bytes(), finish.matrix_csv(case.run).encode(), path


def stages(case: Case) -> Compared:
    """Every finished stage is what was written and says what the record says. Its trained state, if
    it was kept, has as many numbers as the record says."""
    root, r = case.beside("stages"), case.record
    told = {f"{s.index:02d}-{s.domain or 'pretrained'}": s for s in r.stages}
    there = {path.name: path for path in root.iterdir()}
    yield "stages", dict.fromkeys(told), dict.fromkeys(there), root
    for name, row in told.items():
        stage, state = resume.read_stage(there[name]), there[name] / resume.ADAPTER
        mine: dict[str, Any] = {"run_id": r.run_id, "record": row.model_dump()}
        own = {"run_id": stage.facts["run_id"], "record": stage.record.model_dump()}
        for kind, table in (("document", case.run.documents), ("item", case.run.items)):
            rows = table[table["stage"] == row.index].drop(columns="stage")
            saved = stage.rows[stage.rows["kind"] == kind].reindex(columns=rows.columns)
            saved = saved.astype(rows.dtypes)
            mine[kind], own[kind] = _plain(rows), _plain(saved)
        yield name, mine, own, there[name]
        # a state after a restart holds what is frozen, too
        known = case.config.adapter.kind in ADAPTERS and case.config.handover != "restart"
        if row.index and known and state.exists():
            yield f"parameters after {name}", r.trainable_parameters, _numbers(state), state


def _numbers(path: Path) -> int:
    """Return how many numbers a safetensors file holds."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _plain(table: pd.DataFrame) -> str:
    """Return the rows as text that tells every bit, lists in cells included."""
    listed = table.map(lambda x: x.tolist() if isinstance(x, np.ndarray) else x)
    return str(listed.to_dict("list"))


def metrics(case: Case) -> Compared:
    """metrics.jsonl has each step once, and the losses and tokens of the record are theirs."""
    path, inherited = case.beside("metrics.jsonl"), case.record.provenance.get("inherited", {})
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for stage in case.record.stages:
        if (told := stage.train) is None or str(stage.index) in inherited:
            continue
        own = [row for row in rows if row["kind"] == "step" and row["stage"] == stage.index]
        steps = [row["step"] for row in own]
        yield f"steps of stage {stage.index}", [*range(1, told.steps + 1)], steps, path
        found = own[0]["loss_nats"], own[-1]["loss_nats"], sum(row["tokens"] for row in own)
        there = told.first_loss_nats, told.last_loss_nats, told.tokens
        yield f"losses and tokens of stage {stage.index}", there, found, path


def beginning(case: Case) -> Compared:
    """run.json is this run's: its settings, pins and numerics have the id, and unless the run is
    tainted, what it began with is what the record pins."""
    r, path = case.record, case.beside("run.json")
    first = json.loads(path.read_bytes())
    facts = first["facts"]
    found = provenance.identity(first["settings"], first["pins"], facts["numerics"]["version"])
    yield "id", r.run_id, f"{r.run_id.rpartition('-')[0]}-{found}", path
    began = {**facts["data"], "tokenizer": facts["tokenizer"]}
    began["model_files"] = facts["model"]["files"]
    if not r.tainted:
        yield "", {key: r.pins[key] for key in began}, began, path


# --- what the run read, where it still lies -------------------------------------------------------


def cached_documents(case: Case) -> Compared:
    """The scored documents are the first of their split in the cached text that the record pins,
    with their tokens and bytes up to the window."""
    wanted, pins, rows = case.config.eval, case.record.pins["tokens"], case.run.documents
    absent = True
    for path in (hashes.cache_dir() / "tokens").glob("*/meta.json"):
        meta = read_sealed(path) or {"hash": None}
        current = meta["hash"] and meta["identity"]["format"] == tokens.FORMAT
        for name in [name for name in pins if current and meta["hash"] == pins[name]]:
            absent, arrays = False, {}
            for array, told in meta["sha256"].items():
                file = path.with_name(f"{array}.npy")
                yield "SHA-256", told, sha256(file), file
                arrays[array] = np.load(file, mmap_mode="r", allow_pickle=False)
            domain, first = Domain(name, case.config.domains[name].split, "", arrays), []
            for d in domain.split_documents(wanted.split)[: wanted.documents]:
                places = np.flatnonzero(d.scored)[: wanted.window]
                first.append((d.id, len(places), int(d.ends[places[-1]])))
            own = rows[(rows["stage"] == 0) & (rows["domain"] == name)]
            scored = [*zip(own["document"], own["tokens"], own["bytes"], strict=True)]
            yield f"first documents of {name}", scored, first
    if absent:
        raise Absent(f"no tokens of this run in {hashes.cache_dir()}")


CHECKS: tuple[Callable[[Case], Compared], ...] = (
    settings, run_id, sums, task_counts, training, attempts, matrix_file, stages, metrics,
    beginning, cached_documents,
)  # fmt: skip
