"""End a run: with its record and what is derived from it, or with failure.json. Torch-free."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from gain_cl import errors
from gain_cl.measure import provenance, record, scoring
from gain_cl.runs import heatmap, resume, same
from gain_cl.runs.plan import Plan
from gain_cl.system import checkpoint
from gain_cl.system.failpoints import reach
from gain_cl.system.files import remove_abandoned, write_bytes

if TYPE_CHECKING:
    from gain_cl.runs.inputs import Inputs
    from gain_cl.runs.learner import Learner
    from gain_cl.runs.resume import Attempt

LARGE = 2**28
"""Bytes of a file that is not hashed only to show a run again."""


def write_record(inputs: Inputs, attempt: Attempt, learner: Learner) -> record.Run:
    """Write the record of a run from its stages, and the views of it. Return it as read from
    disk."""
    config, plan = inputs.config, inputs.plan
    stages = [attempt.stages[index] for index in range(len(config.stages) + 1)]
    attempts, facts, model = same.read_attempts(plan.folder), inputs.facts, inputs.loaded
    rows = pd.concat([stage.rows for stage in stages], ignore_index=True)
    finished = record.RunRecord(
        run_id=plan.run_id,
        model=config.model.name,
        method=config.method,
        sequence=config.sequence.name,
        seed=config.seed,
        regime=config.regime,
        trained=config.sequence.trained,
        controls=config.sequence.controls,
        protocol=scoring.protocol(config.eval, model.prefix_id),
        config=config.model_dump(mode="json"),
        pins={
            **plan.pins,
            "model_files": facts["model"]["files"],
            "tokenizer": facts["tokenizer"],
            **{k: facts["data"][k] for k in ("tokens", "validation")},
        },
        provenance={
            **provenance.environment(),
            **inputs.environment,
            "seconds": attempt.seconds,
            **({"compile_seconds": model.compiled.seconds} if model.compiled is not None else {}),
            "attempts": attempts,
            "inherited": {
                str(stage.facts["stage"]): stage.facts["inherited"]
                for stage in stages
                if "inherited" in stage.facts
            },
        },
        trainable_parameters=sum(p.numel() for p in learner.adapter.parameters().values()),
        total_parameters=inputs.total_parameters,
        peak_memory_bytes=inputs.peak_memory(),
        stages=[stage.record for stage in stages],
        items_sha256="",
        notes=[
            *attempt.notes,
            *attempt.position.events,
            *learner.adapter.remarks(model.model.dtype),
        ],
        # attempts.jsonl is a list for readers: what counts is in hashed files too
        tainted=list(
            dict.fromkeys(
                [
                    *(what for each in attempts for what in each["changed"]),
                    *attempt.position.changed,
                ]
            )
        ),
    )
    reach("record.before")
    run = record.save(
        finished, rows[rows.kind == "document"], rows[rows.kind == "item"], plan.record_path
    )
    reach("record.after")
    write_views(run, plan)
    return run


def show_again(plan: Plan) -> record.Run:
    """Read a finished run. Write its views again where they are missing or damaged, and tell of a
    saved stage that is not what was written. Large states are left to ``verify``."""
    run = record.load(plan.record_path)
    for _, stage in resume.stage_folders(plan.folder):
        try:
            files = checkpoint.manifest(stage).items()
            checkpoint.verify(stage, [name for name, facts in files if facts["bytes"] > LARGE])
        except errors.GainError as error:
            print(f"note: a saved stage is damaged: {error}", file=sys.stderr, flush=True)
    matrix, image = (plan.files[k] for k in ("matrix (CSV)", "heat map (PNG)"))
    whole = image.exists() and image.read_bytes().endswith(b"IEND\xaeB`\x82")
    if not whole or not matrix.exists() or matrix.read_bytes() != matrix_csv(run).encode():
        write_views(run, plan)
    return run


def write_views(run: record.Run, plan: Plan) -> None:
    """Write matrix and heat map. They are derived from the record and never read back."""
    write_bytes(plan.files["matrix (CSV)"], matrix_csv(run).encode())
    write_bytes(plan.files["heat map (PNG)"], heatmap.matrix_png(run))


def matrix_csv(run: record.Run) -> str:
    """Return the forgetting matrix as CSV: one row per stage, with its index (0 = pretrained), the
    domain learned in it (empty for 0), then the perplexity of each domain, trained ones in training
    order, then controls.

    Numbers have full precision (the shortest text that reads back as the same float64). A domain
    that was not scored is empty. A tainted run has one more column, which says why."""
    r, table = run.record, run.matrix
    stages = r.stages  # a domain may be called as a column is
    table.insert(0, "stage", [stage.index for stage in stages], allow_duplicates=True)
    table.insert(1, "trained", [stage.domain for stage in stages], allow_duplicates=True)
    if r.tainted:
        table.insert(len(table.columns), "tainted", "; ".join(r.tainted), allow_duplicates=True)
    return table.to_csv(index=False, lineterminator="\n")


def sweep(plan: Plan) -> None:
    """Remove what only an unfinished run needs."""
    # One by one: half of a checkpoint would look like a newer attempt.
    checkpoint.prune(plan.folder / "ckpt", keep=0)
    for path in (plan.folder / "ckpt", plan.folder / "cells"):
        shutil.rmtree(path, ignore_errors=True)
    checkpoint.remove_leftovers(plan.folder, plan.folder / "stages")
    (plan.folder / "failure.json").unlink(missing_ok=True)
    for shared in (plan.record_path.parent, plan.folder.parent / "cells"):
        remove_abandoned(shared)


# --- failures -------------------------------------------------------------------------------------


@contextmanager
def failure_told(folder: Path) -> Iterator[None]:
    """Write what makes the block fail to failure.json in ``folder``, and raise it. What a user
    cannot act on as it stands is explained."""
    try:
        (folder / "failure.json").unlink(missing_ok=True)
        yield
    except errors.PreemptedError:
        raise
    except Exception as error:
        failure = explained(error)
        tell_failure(folder, failure)
        if failure is error:
            raise
        raise failure from error


def tell_failure(folder: Path, failure: Exception) -> None:
    """Write failure.json."""
    about = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "error": errors.scrubbed(str(failure)),
        "exit_code": getattr(failure, "exit_code", 1),
        **getattr(failure, "facts", {}),
    }
    with suppress(errors.GainError):  # a full disk does not take this either
        write_bytes(folder / "failure.json", same.json_bytes(about))


def explained(error: Exception) -> Exception:
    """Return what the system refuses, and running out of memory, as StorageError with advice, and
    other errors as they are."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, BrokenPipeError):
        return errors.StorageError(
            f"the system refuses: {error.strerror}",
            str(error.filename or ""),
            "check the disk and its permissions",
        )
    if isinstance(error, errors.GainError) or "torch" not in sys.modules:
        return error
    from gain_cl.runs.train import out_of_memory

    if not out_of_memory(error):
        return error
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    return errors.StorageError(
        f"out of memory: {what}",
        "evaluation and loading do not change their batches",
        "use compute.gradient_checkpointing=true, model.dtype=bfloat16 or, when the run "
        "begins, a smaller compute.eval_batch",
    )
