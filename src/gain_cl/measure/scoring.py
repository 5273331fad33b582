"""Scoring a stage: every domain, and the tasks that are due, cell by cell. A cell that is known
already is not computed again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from gain_cl.errors import StorageError
from gain_cl.measure import cells, record
from gain_cl.system import signals
from gain_cl.system.failpoints import reach

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gain_cl.config.schema import Eval
    from gain_cl.domains import Domain
    from gain_cl.measure.tasks import TaskSet
    from gain_cl.models.load import Loaded

Told = tuple[pd.DataFrame, dict[str, Any]]
"""Rows of a cell, and facts about them."""


class Teller(Protocol):
    """Who is told how far the work is: track.Tracker, or a verb's progress bar."""

    def phase(self, text: str, stage: int = 0) -> None: ...

    def progress(self, done: int, of: int, unit: str, what: str = "") -> None: ...


@dataclass(frozen=True)
class Scores:
    """rows: one per document and per item, told apart by the column kind. cells: document/DOMAIN or
    item/TASK -> key of the cell and the seconds it took to compute, whenever that was."""

    domains: dict[str, record.DomainScore]
    tasks: dict[str, record.TaskScore]
    rows: pd.DataFrame
    cells: dict[str, dict[str, Any]]

    def seconds(self, kind: str) -> float:
        return float(
            sum(cell["seconds"] for name, cell in self.cells.items() if name.startswith(kind))
        )


def score_domain(loaded: Loaded, domain: Domain, settings: Eval, batch: int) -> pd.DataFrame:
    """The first settings.documents documents of settings.split in hash order, scored by the
    protocol of settings."""
    from gain_cl.measure import perplexity

    chosen = domain.split_documents(settings.split)[: settings.documents]
    return perplexity.score(
        loaded, chosen, settings.window, settings.context, settings.stride, batch
    )


def domains(
    loaded: Loaded,
    corpora: Mapping[str, Domain],
    settings: Eval,
    batch: int,
    identity: dict[str, Any],
    folder: Path,
    tracker: Teller,
) -> Scores:
    """Score every corpus. identity: all that a score depends on besides the text and the protocol;
    folder: of the cells."""
    from gain_cl.measure import perplexity

    protocol = {
        "eval": settings.model_dump(mode="json"),
        "batch": batch,
        "prefix": loaded.prefix_id,
    }
    scores, parts, known = {}, [], {}
    for i, (name, corpus) in enumerate(corpora.items()):
        signals.poll()
        tracker.progress(i, len(corpora), "cells", name)
        what = {
            **identity,
            **protocol,
            "tokens": corpus.hash,
            "documents": corpus.ids(settings.split)[: settings.documents],
        }
        rows, facts = _cell(
            folder,
            what,
            lambda c=corpus: (score_domain(loaded, c, settings, batch), {}),  # type: ignore[misc]
        )
        parts.append(rows.assign(kind="document", domain=name, split=settings.split))
        scores[name] = perplexity.total(rows)
        known[f"document/{name}"] = {"key": cells.key(what), "seconds": facts["seconds"]}
    return Scores(scores, {}, pd.concat(parts, ignore_index=True), known)


def tasks(
    loaded: Loaded,
    taskset: TaskSet,
    pins: dict[str, Any],
    identity: dict[str, Any],
    folder: Path,
    tracker: Teller,
) -> Scores:
    """Score every task. pins: what identifies the items of each."""

    def progress(done: int, of: int) -> None:
        signals.poll()
        tracker.progress(done, of, "items")

    def compute(name: str) -> Told:
        counts, rows = taskset.score(loaded, progress, [name])
        return rows.drop(columns="task"), {"score": counts[name].model_dump(mode="json")}

    scores, parts, known = {}, [], {}
    settings = taskset.settings.model_dump(mode="json", exclude={"names", "stages"})
    for name in taskset.items:
        what = {
            **identity,
            "task": name,
            "pin": pins[name],
            "tasks": settings,
            "prefix": loaded.prefix_id,
            "context": loaded.context,
        }
        rows, facts = _cell(folder, what, lambda name=name: compute(name))  # type: ignore[misc]
        reach("task.after")
        parts.append(rows.assign(kind="item", task=name))
        scores[name] = record.TaskScore.model_validate(facts["score"])
        known[f"item/{name}"] = {"key": cells.key(what), "seconds": facts["seconds"]}
    return Scores({}, scores, pd.concat(parts, ignore_index=True), known)


def _cell(folder: Path, what: dict[str, Any], compute: Callable[[], Told]) -> Told:
    """What is used is what was stored, so that its bits do not depend on who computed it."""
    name = cells.key(what)
    if (found := cells.load(folder, name)) is None:
        begun = time.perf_counter()
        rows, facts = compute()
        cells.store(folder, name, rows, seconds=time.perf_counter() - begun, **facts)
        found = cells.load(folder, name)
        if found is None:
            raise StorageError("a score cannot be read back", str(folder), "check the disk")
    return found
