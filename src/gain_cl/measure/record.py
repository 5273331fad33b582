"""The record that a run leaves behind: sums go in, ratios come out. Torch-free.

``results/runs/<run_id>.json`` holds a RunRecord. ``<run_id>.items.parquet`` beside it holds one row
per scored document and per task item, and its SHA-256 stands in the record. Everything shown is
derived from these two files.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from gain_cl.config.schema import JOINT, Name, Regime
from gain_cl.errors import DataError, StorageError
from gain_cl.system.files import sha256, write_all
from gain_cl.system.sealed import seal_of, sealed_bytes, unique_keys

SCHEMA = 1

DOCUMENT_COLUMNS = ["stage", "domain", "split", "document", "nll_nats", "tokens", "bytes"]
ITEM_COLUMNS = ["stage", "task", "item", "gold", "logprobs", "choice_bytes", "choice_chars"]
GRADED_COLUMNS = ["right", "response", "metrics"]
"""Of items that lm-eval's code graded: 1 or 0 by its first metric, if that is such a metric; the
generated text; JSON, "metric,filter" -> value."""


class Part(BaseModel):
    """A part of a file of JSON: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class DomainScore(Part):
    """Sums over the scored documents of one domain. nll_nats: float64 sum of -ln p. bytes: UTF-8,
    of the same text."""

    nll_nats: NonNegativeFloat
    tokens: PositiveInt
    bytes: PositiveInt
    documents: PositiveInt

    @property
    def loss_nats(self) -> float:
        """Sum NLL / tokens, in nats per token (never a mean of means)."""
        return self.nll_nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the loss; inf where float64 ends."""
        return math.exp(self.loss_nats) if self.loss_nats < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Sum NLL / (ln 2 * bytes), which is comparable across tokenizers."""
        return self.nll_nats / (math.log(2) * self.bytes)


class TaskScore(Part):
    """Counts of one task at one stage. correct: argmax of log p is gold (lm-eval's acc), or the
    task's first metric says right; None where that counts nothing. correct_norm: argmax of log p
    per character of the choice (its acc_norm); None where there are no choices."""

    items: PositiveInt
    correct: NonNegativeInt | None
    correct_norm: NonNegativeInt | None
    fewshot: NonNegativeInt
    truncated: NonNegativeInt = 0  # items cut on the left to fit the context
    limited: bool = False
    metrics: dict[str, float] = {}  # lm-eval's own by "metric,filter", where its code graded

    @property
    def numbers(self) -> dict[str, float]:
        """The accuracy, if there is one, and the metrics."""
        own = {} if self.correct is None else {"accuracy": self.correct / self.items}
        return own | self.metrics


class TrainStats(Part):
    """What learning one stage cost. tokens: training tokens seen, replayed ones included. dev:
    within the stage, step, nll_nats and tokens of its domain, controls_... of the controls. spikes:
    steps whose loss was more than 6 standard deviations above the mean of those before."""

    steps: PositiveInt
    tokens: PositiveInt
    seconds: NonNegativeFloat
    lr: NonNegativeFloat
    first_loss_nats: float
    last_loss_nats: float
    dev: list[dict[str, float]] = []
    spikes: list[int] = []


class StageRecord(Part):
    """One row of the matrix. Stage 0 is the untouched model (domain None)."""

    index: int
    domain: str | None
    domains: dict[str, DomainScore]
    tasks: dict[str, TaskScore]
    train: TrainStats | None
    eval_seconds: NonNegativeFloat
    task_seconds: NonNegativeFloat


class Interpolated(Part):
    """What an older version made a record of, by ``interpolate --records``: W_base + alpha (W_stage
    - W_base) of every stage of a run. It stands in the provenance. The configuration is the run's.
    record_sha256: of the run's record."""

    of: str  # run_id
    alpha: float = Field(allow_inf_nan=False)
    record_sha256: str

    @property
    def run_id(self) -> str:
        """The name of the record."""
        return f"{self.of}-alpha{self.alpha:g}"


class RunRecord(Part):
    """All that a finished run says, but for the values of documents and items."""

    schema_version: int = SCHEMA
    run_id: Name
    model: Name
    method: Name
    sequence: Name
    seed: int
    regime: Regime = "sequential"
    # Domains in training order: stage k trains trained[k-1]. Joint: stage 1 trains them all.
    trained: list[Name] = Field(min_length=1)
    controls: list[Name]
    protocol: str  # name of the perplexity protocol, e.g. ppl-test-first128x32-prefix0-ctx1024
    config: dict[str, Any]  # every setting, resolved; secrets never enter it
    pins: dict[str, Any]  # hashes and revisions of model, tokenizer and data
    provenance: dict[str, Any]  # commit, versions, hardware, dtype, threads, times
    trainable_parameters: NonNegativeInt
    total_parameters: NonNegativeInt
    peak_memory_bytes: NonNegativeInt
    stages: list[StageRecord]
    items_sha256: str
    notes: list[str] = []  # warnings a reader of the numbers must see
    tainted: list[str] = []  # what changed between the attempts of this run although it may not
    seal: str = ""  # seal_of the rest, set by save: an edited record is told from what was written

    @property
    def interpolated(self) -> Interpolated | None:
        """What this is made of; None for a run."""
        told = self.provenance.get("interpolated")
        return None if told is None else Interpolated.model_validate(told)

    @property
    def alpha(self) -> float:
        """The share of the change of the weights: 1 for a run."""
        return 1.0 if (made := self.interpolated) is None else made.alpha

    def losses(self) -> np.ndarray:
        """Return (stages + 1, domains) nats per token, NaN where not scored. Columns are the
        trained domains, then the controls."""

        def loss(stage: StageRecord, domain: str) -> float:
            return stage.domains[domain].loss_nats if domain in stage.domains else math.nan

        return np.array([[loss(s, d) for d in self.trained + self.controls] for s in self.stages])


def outcome(record: RunRecord) -> dict[str, Any]:
    """Return what every undisturbed or interrupted attempt at one run agrees in: all but
    provenance, times and memory."""
    without = {"provenance", "peak_memory_bytes", "config", "notes", "seal"}
    kept = record.model_dump(mode="json", exclude=without)
    for stage in kept["stages"]:
        del stage["eval_seconds"], stage["task_seconds"]
        if stage["train"] is not None:
            del stage["train"]["seconds"]
    return kept


@dataclass(eq=False, repr=False)
class Run:
    """A record with its per-document and per-item values, as read from disk."""

    record: RunRecord
    documents: pd.DataFrame
    items: pd.DataFrame
    path: Path

    @property
    def matrix(self) -> pd.DataFrame:
        """Perplexity, (stages + 1) x domains. Rows are stages (0 = pretrained), columns trained
        then control domains."""
        r = self.record
        rows = pd.Index([f"{s.index} {s.domain or 'pretrained'}" for s in r.stages], name="stage")
        with np.errstate(over="ignore"):  # beyond float64 is inf
            return pd.DataFrame(np.exp(r.losses()), index=rows, columns=r.trained + r.controls)

    def __repr__(self) -> str:
        stages = len(self.record.stages) - 1
        return f"Run({self.record.run_id}, {stages} stages)\n{self.matrix.round(2)}"


def items_path(record_path: Path) -> Path:
    """Return the path of the values of documents and items beside a record."""
    return record_path.with_name(record_path.name.removesuffix(".json") + ".items.parquet")


def save(record: RunRecord, documents: pd.DataFrame, items: pd.DataFrame, path: Path) -> Run:
    """Write the items, then the record with their hash, and return what can be read back. A record
    means that the run is finished.

    DataError: a number is not finite. StorageError: the disk refuses. Nothing is written then."""
    do = "nothing was saved; lower train.lr or check the model"
    if not np.isfinite(documents["nll_nats"].to_numpy(dtype=np.float64)).all():
        raise DataError("a document's loss is not finite", record.run_id, do)
    documents = documents.reindex(columns=DOCUMENT_COLUMNS).assign(kind="document")
    columns = [*ITEM_COLUMNS, *(c for c in GRADED_COLUMNS if c in items)]
    items = items.reindex(columns=columns).assign(kind="item")
    buffer = io.BytesIO()
    frames = [f for f in (documents, items) if len(f)]
    pd.concat(frames, ignore_index=True).to_parquet(buffer, index=False)
    record.items_sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    try:
        plain = record.model_dump(mode="json")
        record.seal = seal_of(plain)
        content = sealed_bytes(plain)
    except ValueError as error:
        raise DataError("a number of the run is not finite", record.run_id, do) from error
    write_all({items_path(path): buffer.getvalue(), path: content})
    return load(path)


def load(path: str | Path) -> Run:
    """Read a record (file) and its items. DataError: either is missing, malformed or not what was
    written."""
    path = Path(path)
    give = "give the path of a results/runs/<run_id>.json"
    again = "restore the file or run again with force=true"
    try:
        plain = json.loads(path.read_bytes(), parse_int=_whole, object_pairs_hook=unique_keys)
        record = RunRecord.model_validate(plain, strict=True)
        _check(record)
        whole = record.seal == seal_of(plain)  # ValueError: a number is not finite
    except FileNotFoundError:
        raise DataError("no record", str(path), give) from None
    except OSError as error:
        raise StorageError(f"cannot read: {error.strerror or error}", str(path), give) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a run record: {first_line(error)}", str(path), again) from None
    if not (beside := items_path(path)).exists():
        raise DataError("per-item values are missing", str(beside), again)
    if sha256(beside) != record.items_sha256:
        what = "per-item values are not those the record was written with"
        raise DataError(what, str(beside), again)
    if not whole:
        what = "the record is not what was written: its seal is broken"
        raise DataError(what, str(path), again)
    try:
        documents, items = _tables(beside)
    except (ValueError, TypeError, KeyError, OverflowError, OSError) as error:
        # The errors of pyarrow are ValueError or OSError.
        what = f"per-item values cannot be read: {first_line(error)}"
        raise DataError(what, str(beside), again) from None
    return Run(record, documents, items, path)


def _tables(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read documents and items of a values file. ValueError: they are impossible."""
    table = pd.read_parquet(path)
    table = table.reindex(columns=list({*table, *DOCUMENT_COLUMNS, *ITEM_COLUMNS, "kind"}))

    def rows(kind: str, columns: list[str], *whole: str) -> pd.DataFrame:
        own = table.loc[table.kind == kind, columns].reset_index(drop=True)
        return own.astype(dict.fromkeys(("stage", *whole), int))

    documents = rows("document", DOCUMENT_COLUMNS, "tokens", "bytes")
    finite = np.isfinite(documents["nll_nats"].to_numpy(dtype=np.float64)).all()
    if not finite or not (documents[["tokens", "bytes"]] > 0).all(axis=None):
        raise ValueError("a document without finite loss, tokens or bytes")
    graded = [column for column in GRADED_COLUMNS if column in table]
    return documents, rows("item", [*ITEM_COLUMNS, *graded], "gold")


def _whole(text: str) -> float:
    """Return a number without a point. One beyond 64 bits is no whole number here, so the types
    refuse it."""
    return int(text) if len(text) < 19 else float(text)


def _check(r: RunRecord) -> None:
    """Check what types do not say of a finished run: its stages in order, its counts. ValueError
    names the first fault."""
    if r.schema_version != SCHEMA:
        raise ValueError(f"schema_version is {r.schema_version}, this program reads {SCHEMA}")
    names = [*r.trained, *r.controls]
    if (made := r.interpolated) is not None and made.run_id != r.run_id:
        raise ValueError(f"it is interpolated and should be named {made.run_id}")
    if len(set(names)) < len(names):
        raise ValueError("trained and controls must be different domains")
    order = [None, *([JOINT] if r.regime == "joint" else r.trained)]
    if [(s.index, s.domain) for s in r.stages] != list(enumerate(order)):
        raise ValueError("its stages are not the pretrained model and then what it trains")
    for stage in r.stages:
        if unknown := stage.domains.keys() - names:
            raise ValueError(f"stage {stage.index}: {min(unknown)!r} is none of its domains")
        for task, count in stage.tasks.items():
            if max(count.correct or 0, count.correct_norm or 0) > count.items:
                raise ValueError(f"stage {stage.index}: impossible counts of {task!r}")


def first_line(error: Exception) -> str:
    """Return an error in one line: pydantic's by place and message."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return next(iter(str(error).splitlines()), type(error).__name__)
