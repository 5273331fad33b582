"""The file that ``python -m gain_cl diagnose`` leaves behind: results/diagnostics/<run_id>.json, a
Diagnostics. Torch-free.

dW = W_tuned - W_base is the effective change of a parameter: the adapter folded in, in fp32. A
value that does not exist is null, such as a residual of a layer that was not asked for, or an
interval that the documents cannot give.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field, ValidationError

from gain_cl.errors import DataError, StorageError
from gain_cl.measure.record import Part, first_line
from gain_cl.system.files import sha256, write_bytes

SCHEMA = 1

DIRECTIONS = (8, 32, 128)
"""The k of the column-span residual."""
TOP, THRESHOLD = 10, 0.5
"""Intruder dimensions: those of the first TOP left singular vectors of W_tuned that have no
|cosine| of THRESHOLD with W's."""
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
EDGES = tuple(round(1 + x, 6) for x in (*(-x for x in reversed(_STEPS)), 0.0, *_STEPS))
"""Bins of the gains' histogram: below the first, [edge, next edge), from the last on."""


class Divergence(Part):
    """KL(base || tuned) in nats per token over the whole vocabulary. low, high: its 95% interval
    over documents, cut at 0."""

    nats: float
    low: float | None
    high: float | None
    documents: int
    tokens: int


class Gains(Part):
    """The gains s of one layer whose change is a diagonal. drift: mean |s - 1|. rms: of s - 1.
    counts: how many are in each bin of EDGES. heads: in old ones, drift of each head's inputs."""

    side: str
    drift: float
    rms: float
    least: float
    largest: float
    counts: list[int]
    heads: list[float] | None = None


class Layer(Part):
    """One linear layer that changed. role: its name within its block. norm: ||dW||_F. relative:
    ||dW|| / ||W||. residual: k -> ||(I - P_k) dW|| / ||dW||, "all" with all min(out, in)
    directions, null for a k beyond them. own: the same of W. intruders: how many. cosines: the
    largest |cosine| of each of the TOP. heads: relative norm of the columns of dW that a head
    feeds, where it is an attention output projection."""

    name: str
    role: str
    block: int | None
    shape: tuple[int, int]
    norm: float
    relative: float | None
    residual: dict[str, float | None] | None = None
    own: dict[str, float | None] | None = None
    intruders: int | None = None
    cosines: list[float] | None = None
    heads: list[float] | None = None
    gains: Gains | None


class Other(Part):
    """Any other parameter that changed: embeddings, norms, biases."""

    name: str
    norm: float
    relative: float | None


class Stage(Part):
    """A stage against the pretrained model. total_norm: Frobenius norm of the whole change.
    total_relative: the same divided by that of all parameters. analysed: how many layers the next
    four speak of. residual: mean over layers by k. chance: that of changes in random directions.
    own: that of W. intruders: sum over layers. kl: by domain. kl_new: mean over the domains learned
    up to this stage. kl_controls: mean over the controls. seconds: in old
    ones."""

    index: int
    domain: str
    total_norm: float
    total_relative: float
    layers: list[Layer]
    others: list[Other]
    residual: dict[str, float | None]
    chance: dict[str, float | None]
    own: dict[str, float | None]
    intruders: int | None
    analysed: int
    kl: dict[str, Divergence] | None = None
    kl_new: Divergence | None = None
    kl_controls: Divergence | None = None
    seconds: float = 0.0


class Diagnostics(Part):
    """All that was found about a run. record_sha256: of the record that was diagnosed. last: index
    of the run's last stage. directions, top, threshold, edges: the settings of the module. seconds:
    that it took. estimate_seconds, peak_bytes, device, threads: in old ones."""

    schema_version: int = SCHEMA
    run_id: str
    record_sha256: str
    method: str
    model: str
    dtype: str
    protocol: str
    last: int
    directions: list[int] = Field(list(DIRECTIONS))
    top: int = TOP
    threshold: float = THRESHOLD
    edges: list[float] = Field(list(EDGES))
    stages: list[Stage]
    not_kept: list[int]
    estimate_seconds: float = 0.0
    seconds: float
    peak_bytes: int = 0
    device: str = ""
    threads: int = 0

    @property
    def end(self) -> Stage | None:
        """The last stage of the run; None when it was not diagnosed."""
        return next((s for s in self.stages if s.index == self.last), None)

    @property
    def total_norm(self) -> float | None:
        """Frobenius norm of the whole effective change after the last stage."""
        return self.end.total_norm if self.end else None

    @property
    def kl(self) -> dict[str, Divergence] | None:
        """KL(base || tuned) after the last stage, by domain."""
        return self.end.kl if self.end else None


def diagnosis_path(results_dir: Path, run_id: str) -> Path:
    """Return where the diagnosis of a run is."""
    return results_dir / "diagnostics" / f"{run_id}.json"


def save_diagnosis(found: Diagnostics, results_dir: Path) -> Path:
    """Write a diagnosis, atomically, and return its path. DataError: a number is not finite."""
    path = diagnosis_path(results_dir, found.run_id)
    try:
        text = json.dumps(found.model_dump(mode="json"), indent=1, allow_nan=False)
    except ValueError:
        what, do = "a number of the diagnosis is not finite", "nothing was saved; check the model"
        raise DataError(what, found.run_id, do) from None
    write_bytes(path, (text + "\n").encode())
    return path


def load_diagnosis(results_dir: Path, run_id: str) -> Diagnostics | None:
    """Return the diagnosis of a run; None when there is none. DataError: it is malformed, or of
    another record than results_dir/runs/<run_id>.json."""
    path = diagnosis_path(results_dir, run_id)
    again = f"python -m gain_cl diagnose {run_id}"
    try:
        found = Diagnostics.model_validate_json(path.read_bytes(), strict=True)
        if sha256(results_dir / "runs" / f"{run_id}.json") != found.record_sha256:
            what = "the diagnosis is of another record than the one that is there"
            raise DataError(what, str(path), again)
    except FileNotFoundError:
        return None
    except OSError as error:
        what = f"cannot read: {error.strerror or error}"
        raise StorageError(what, str(path), "check the disk") from None
    except ValidationError as error:
        raise DataError(f"no diagnosis: {first_line(error)}", str(path), again) from None
    if found.schema_version != SCHEMA:
        what = f"schema_version is {found.schema_version}, this program reads {SCHEMA}"
        raise DataError(what, str(path), again)
    return found
