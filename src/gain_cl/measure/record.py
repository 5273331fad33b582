"""What a run leaves behind: sums go in, ratios come out. Torch-free.

``results/runs/<run_id>.json`` holds a RunRecord; ``<run_id>.items.parquet`` beside it holds one row
per scored document and per task item, and its SHA-256 stands in the record. Everything shown is
derived from these two files.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gain_cl.config.schema import JOINT, NAME, Regime
from gain_cl.errors import DataError, StorageError
from gain_cl.system.files import sha256, write_all
from gain_cl.system.sealed import seal_of, sealed_bytes

SCHEMA = 1

DOCUMENT_COLUMNS = ["stage", "domain", "split", "document", "nll_nats", "tokens", "bytes"]
ITEM_COLUMNS = ["stage", "task", "item", "gold", "logprobs", "choice_bytes", "choice_chars"]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DomainScore(Part):
    """Sums over the scored documents of one domain. nll_nats: float64 sum of -ln p; bytes: UTF-8,
    of the same text."""

    nll_nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def loss_nats(self) -> float:
        """Nats per token: sum NLL / tokens (never a mean of means)."""
        return self.nll_nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss_nats) if self.loss_nats < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """sum NLL / (ln 2 * bytes): comparable across tokenizers."""
        return self.nll_nats / (math.log(2) * self.bytes)


class TaskScore(Part):
    """Counts of one task at one stage. correct: argmax of log p is gold (lm-eval's acc);
    correct_norm: of log p per character of the choice (its acc_norm)."""

    items: int
    correct: int
    correct_norm: int
    fewshot: int
    truncated: int = 0  # items cut on the left to fit the context
    limited: bool = False


class TrainStats(Part):
    """What learning one stage cost. tokens: training tokens seen, replayed ones included."""

    steps: int
    tokens: int
    seconds: float
    lr: float
    first_loss_nats: float
    last_loss_nats: float
    dev: list[
        dict[str, float]
        # within the stage: step, nll_nats and tokens of its domain, controls_... of the controls
    ] = []
    spikes: list[
        int
    ] = []  # steps whose loss was more than 6 standard deviations above the mean of those before


class StageRecord(Part):
    """Stage 0 is the untouched model (domain None)."""

    index: int
    domain: str | None
    domains: dict[str, DomainScore]
    tasks: dict[str, TaskScore]
    train: TrainStats | None
    eval_seconds: float
    task_seconds: float


class Interpolated(Part):
    """What ``interpolate --records`` makes a record of: W_base + alpha (W_stage - W_base) of every
    stage of a run. record_sha256: of the run's record. It stands in the provenance; the
    configuration is the run's."""

    of: str  # run_id
    alpha: float = Field(allow_inf_nan=False)
    record_sha256: str

    @property
    def run_id(self) -> str:
        """The name of the record."""
        return f"{self.of}-alpha{self.alpha:g}"


class RunRecord(Part):
    schema_version: int = SCHEMA
    run_id: str
    model: str
    method: str
    sequence: str
    seed: int
    regime: Regime = "sequential"
    trained: list[
        str
    ]  # domains in training order: stage k trains trained[k-1] (joint: stage 1 trains them all)
    controls: list[str]
    protocol: str  # name of the perplexity protocol, e.g. ppl-test-first128x32-prefix0-ctx1024
    config: dict[str, Any]  # every setting, resolved; secrets never enter it
    pins: dict[str, Any]  # hashes and revisions of model, tokenizer and data
    provenance: dict[str, Any]  # commit, versions, hardware, dtype, threads, times
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    stages: list[StageRecord]
    items_sha256: str
    notes: list[str] = []  # warnings a reader of the numbers must see
    tainted: list[
        str
    ] = []  # what changed between the attempts of this run although it may not; empty: nothing
    seal: str = ""  # seal_of the rest, set by save: an edited record is told from what was written

    @property
    def interpolated(self) -> Interpolated | None:
        """What this is made of; None: a run."""
        told = self.provenance.get("interpolated")
        return None if told is None else Interpolated.model_validate(told)

    @property
    def alpha(self) -> float:
        """Share of the change of the weights: 1 of a run."""
        return 1.0 if (made := self.interpolated) is None else made.alpha

    def losses(self) -> np.ndarray:
        """(stages + 1, domains) nats per token; columns = trained + controls; NaN where not
        scored."""
        names = self.trained + self.controls
        return np.array(
            [
                [s.domains[d].loss_nats if d in s.domains else math.nan for d in names]
                for s in self.stages
            ]
        )


def outcome(record: RunRecord) -> dict[str, Any]:
    """What every undisturbed or interrupted attempt at one run agrees in: all but provenance, times
    and memory."""
    kept = record.model_dump(
        mode="json", exclude={"provenance", "peak_memory_bytes", "config", "notes", "seal"}
    )
    for stage in kept["stages"]:
        del stage["eval_seconds"], stage["task_seconds"]
        if stage["train"] is not None:
            del stage["train"]["seconds"]
    return kept


class Run:
    """A record with its per-document and per-item values, as read from disk."""

    def __init__(
        self, record: RunRecord, documents: pd.DataFrame, items: pd.DataFrame, path: Path
    ) -> None:
        self.record, self.documents, self.items, self.path = record, documents, items, path

    @property
    def matrix(self) -> pd.DataFrame:
        """Perplexity, (stages + 1) x domains: rows are stages (0 = pretrained), columns trained
        then control domains."""
        r = self.record
        rows = pd.Index([f"{s.index} {s.domain or 'pretrained'}" for s in r.stages], name="stage")
        with np.errstate(over="ignore"):  # beyond float64 is inf
            return pd.DataFrame(np.exp(r.losses()), index=rows, columns=r.trained + r.controls)

    def __repr__(self) -> str:
        return (
            f"Run({self.record.run_id}, {len(self.record.stages) - 1} "
            f"stages)\n{self.matrix.round(2)}"
        )


def items_path(record_path: Path) -> Path:
    return record_path.with_name(record_path.name.removesuffix(".json") + ".items.parquet")


def save(record: RunRecord, documents: pd.DataFrame, items: pd.DataFrame, path: Path) -> Run:
    """Write the items, then the record with their hash; the record's presence means the run is
    finished.

    Raises DataError, and writes nothing, when a number is not finite; StorageError when the disk
    refuses."""
    import io

    if not np.isfinite(documents["nll_nats"].to_numpy(dtype=np.float64)).all():
        raise DataError(
            "a document's loss is not finite",
            record.run_id,
            "nothing was saved; lower train.lr or check the model",
        )
    documents = documents.reindex(columns=DOCUMENT_COLUMNS).assign(kind="document")
    items = items.reindex(columns=ITEM_COLUMNS).assign(kind="item")
    buffer = io.BytesIO()
    frames = [f for f in (documents, items) if len(f)]
    pd.concat(frames, ignore_index=True).to_parquet(buffer, index=False)
    record.items_sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    try:
        plain = record.model_dump(mode="json")
        record.seal = seal_of(plain)
        content = sealed_bytes(plain)
    except ValueError as error:
        do = "nothing was saved; lower train.lr or check the model"
        raise DataError("a number of the run is not finite", record.run_id, do) from error
    write_all({items_path(path): buffer.getvalue(), path: content})
    return load(path)


def load(path: str | Path) -> Run:
    """Read a record (file) and its items; DataError when either is missing, malformed or not what
    was written."""
    path = Path(path)
    try:
        plain = _parse(path.read_bytes())
        record = RunRecord.model_validate(plain, strict=True)
        _check(record)
    except FileNotFoundError:
        raise DataError(
            "no record", str(path), "give the path of a results/runs/<run_id>.json"
        ) from None
    except OSError as error:
        raise StorageError(
            f"cannot read: {error.strerror or error}",
            str(path),
            "give the path of a results/runs/<run_id>.json",
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"not a run record: {_first(error)}",
            str(path),
            "restore it or run again with force=true",
        ) from None
    beside = items_path(path)
    if not beside.exists():
        raise DataError(
            "per-item values are missing",
            str(beside),
            "restore the file or run again with force=true",
        )
    if sha256(beside) != record.items_sha256:
        what = "per-item values are not those the record was written with"
        raise DataError(what, str(beside), "restore the file or run again with force=true")
    if record.seal != seal_of(plain):
        raise DataError(
            "the record is not what was written: its seal is broken",
            str(path),
            "restore it or run again with force=true",
        )
    try:
        documents, items = _tables(beside)
    except (
        ValueError,
        TypeError,
        KeyError,
        OverflowError,
        OSError,
    ) as error:  # pyarrow's errors are ValueError or OSError
        what = f"per-item values cannot be read: {_first(error)}"
        raise DataError(
            what, str(beside), "restore the file or run again with force=true"
        ) from None
    return Run(record, documents, items, path)


def between(run: Run) -> list[Run]:
    """The records that ``interpolate --records`` made of a run, which lie beside its own, by
    alpha."""
    paths = run.path.parent.glob(f"{run.record.run_id}-alpha*.json")
    return sorted((load_between(run, path) for path in paths), key=lambda found: found.record.alpha)


def load_between(run: Run, path: Path) -> Run:
    """One of them. DataError when it was made of another record than the run's is now."""
    found = load(path)
    made = found.record.interpolated
    if made is None or (made.of, made.record_sha256) != (run.record.run_id, sha256(run.path)):
        raise DataError(
            f"it is not interpolated from {run.path}",
            str(path),
            "move it away; interpolate --records makes it again",
        )
    return found


def _tables(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Documents and items of a values file."""
    table = pd.read_parquet(path).reindex(
        columns=[*dict.fromkeys([*DOCUMENT_COLUMNS, *ITEM_COLUMNS]), "kind"]
    )
    documents = table.loc[table.kind == "document", DOCUMENT_COLUMNS].reset_index(drop=True)
    items = table.loc[table.kind == "item", ITEM_COLUMNS].reset_index(drop=True)
    documents, items = (
        documents.astype({"stage": int, "tokens": int, "bytes": int}),
        items.astype({"stage": int, "gold": int}),
    )
    if not np.isfinite(documents["nll_nats"].to_numpy(dtype=np.float64)).all() or not (
        documents[["tokens", "bytes"]] > 0
    ).all(axis=None):
        raise ValueError("a document without finite loss, tokens or bytes")
    return documents, items


def _parse(data: bytes) -> Any:
    """JSON as this program writes it. ValueError: a key twice, or a number that is not finite or
    beyond 64 bits."""

    def whole(text: str) -> int:
        if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
            raise ValueError(f"{text[:20]}... is too large a number")
        return int(text)

    def real(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{text[:20]} is no finite number")
        return number

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    return json.loads(
        data.decode(),
        parse_int=whole,
        parse_float=real,
        parse_constant=real,
        object_pairs_hook=once,
    )


def _check(r: RunRecord) -> None:
    """What types do not say of a finished run: its names, its stages in order, its counts.
    ValueError names the first fault."""
    names = [*r.trained, *r.controls]
    for name in (r.run_id, r.model, r.method, r.sequence, *names):
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name")
    if (made := r.interpolated) is not None and made.run_id != r.run_id:
        raise ValueError(f"it is interpolated and should be named {made.run_id}")
    if not r.trained or len(set(names)) < len(names):
        raise ValueError("trained and controls must be different domains, at least one trained")
    if [(s.index, s.domain) for s in r.stages] != list(
        enumerate([None, *([JOINT] if r.regime == "joint" else r.trained)])
    ):
        raise ValueError("its stages are not the pretrained model and then what it trains")
    if r.schema_version != SCHEMA:
        raise ValueError(f"schema_version is {r.schema_version}, this program reads {SCHEMA}")
    if min(r.trainable_parameters, r.total_parameters, r.peak_memory_bytes) < 0:
        raise ValueError("a negative count of parameters or bytes")
    for stage in r.stages:
        where = f"stage {stage.index}"
        for domain, score in stage.domains.items():
            if (
                domain not in names
                or score.nll_nats < 0
                or min(score.tokens, score.bytes, score.documents) < 1
            ):
                raise ValueError(f"{where}: impossible sums of {domain!r}")
        for task, count in stage.tasks.items():
            right = max(count.correct, count.correct_norm), min(count.correct, count.correct_norm)
            if (
                not 0 <= right[1] <= right[0] <= count.items
                or count.items < 1
                or min(count.fewshot, count.truncated) < 0
            ):
                raise ValueError(f"{where}: impossible counts of {task!r}")
        train = stage.train
        if train is not None and (
            min(train.steps, train.tokens) < 1 or min(train.seconds, train.lr) < 0
        ):
            raise ValueError(f"{where}: impossible training statistics")
        if min(stage.eval_seconds, stage.task_seconds) < 0:
            raise ValueError(f"{where}: a negative time")


def _first(error: Exception) -> str:
    """An error in one line: pydantic's by place and message."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return (
        "nested too deeply"
        if isinstance(error, RecursionError)
        else (str(error).splitlines() or [type(error).__name__])[0]
    )
