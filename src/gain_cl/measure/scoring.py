"""Score a stage: every domain, and the tasks that are due. A score that is known is not computed
again.

A known score is one file for each weights x domain or task x protocol x execution environment. Its
name is a hash of all that the numbers depend on, the source code of gain_cl included, so what is
found is what would be computed again, bit for bit. This lets an interrupted evaluation go on, and
runs of one model share stage 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from gain_cl.errors import StorageError
from gain_cl.measure import record
from gain_cl.system import signals
from gain_cl.system.failpoints import reach
from gain_cl.system.hashes import json_sha256
from gain_cl.system.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gain_cl.config.schema import Eval
    from gain_cl.domains import Domain
    from gain_cl.measure.tasks import TaskSet
    from gain_cl.models.load import Loaded

Score = tuple[pd.DataFrame, dict[str, Any]]
"""A row per document or item, and JSON facts about all of them."""


class Teller(Protocol):
    """Who is told how far the work is: track.Tracker, or a verb's progress bar."""

    def phase(self, text: str, stage: int = 0) -> None: ...

    def progress(self, done: int, of: int, unit: str, what: str = "") -> None: ...


@dataclass
class Scores:
    """The scores of a stage. parts: tables with a row per document or item, told apart by the
    column kind. cells: document/DOMAIN or item/TASK -> key of the known score and the seconds it
    took to compute, whenever that was."""

    domains: dict[str, record.DomainScore] = field(default_factory=dict)
    tasks: dict[str, record.TaskScore] = field(default_factory=dict)
    parts: list[pd.DataFrame] = field(default_factory=list)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> pd.DataFrame:
        """All parts, one below the other."""
        return pd.concat(self.parts, ignore_index=True)

    def seconds(self, kind: str) -> float:
        """Return how long all scores of a kind, document or item, took."""
        return float(sum(c["seconds"] for name, c in self.cells.items() if name.startswith(kind)))

    def add(
        self,
        folder: Path,
        what: dict[str, Any],
        compute: Callable[[], Score],
        kind: str,
        name: str,
        **columns: str,
    ) -> Score:
        """Add a score, a known one if there is one, and return it. what: JSON data, all that the
        numbers depend on. columns: added to the rows. The score that is used is the one that was
        stored, so that its bits do not depend on who computed it."""
        key = json_sha256(what)[:32]
        if (found := known_score(folder, key)) is None:
            begun = time.perf_counter()
            rows, facts = compute()
            keep_score(folder, key, rows, seconds=time.perf_counter() - begun, **facts)
            if (found := known_score(folder, key)) is None:
                raise StorageError("a score cannot be read back", str(folder), "check the disk")
        rows, facts = found
        self.cells[f"{kind}/{name}"] = {"key": key, "seconds": facts["seconds"]}
        self.parts.append(rows.assign(kind=kind, **columns))
        return found


def keep_score(folder: Path, key: str, rows: pd.DataFrame, **facts: Any) -> None:
    """Write a score to be known from now on."""
    reach("cell.before")
    write_sealed(folder / f"{key}.json", {"rows": rows.to_dict("list"), "facts": facts})
    reach("cell.after")


def known_score(folder: Path, key: str) -> Score | None:
    """Return a known score; None when there is none, or it is not what was written."""
    found = read_sealed(folder / f"{key}.json")
    return None if found is None else (pd.DataFrame(found["rows"]), found["facts"])


def protocol(settings: Eval, prefix_id: int) -> str:
    """Return the name of the measure. Two numbers are comparable only if their protocols are
    equal."""
    window = f"first{settings.window}" if settings.window else "whole"
    stride = f"-stride{settings.stride}" if settings.stride else ""
    what = f"ppl-{settings.split}-{window}x{settings.documents}"
    return f"{what}-prefix{prefix_id}-ctx{settings.context}{stride}"


def score_domain(loaded: Loaded, domain: Domain, settings: Eval, batch: int) -> pd.DataFrame:
    """Score the first settings.documents documents of settings.split in hash order by the protocol
    of settings. Return a row per document (perplexity.score)."""
    from gain_cl.measure import perplexity

    chosen = domain.split_documents(settings.split)[: settings.documents]
    return perplexity.score(
        loaded, chosen, settings.window, settings.context, settings.stride, batch
    )


def score_domains(
    loaded: Loaded,
    domains: Mapping[str, Domain],
    settings: Eval,
    batch: int,
    identity: dict[str, Any],
    folder: Path,
    tracker: Teller,
) -> Scores:
    """Score every domain. identity: all that a score depends on besides the text and the protocol.
    folder: of the known scores."""
    from gain_cl.measure import perplexity

    scores = Scores()
    for i, (name, domain) in enumerate(domains.items()):
        signals.poll()
        tracker.progress(i, len(domains), "cells", name)
        what = {
            **identity,
            "eval": settings.model_dump(mode="json"),
            "batch": batch,
            "prefix": loaded.prefix_id,
            "tokens": domain.hash,
            "documents": domain.ids(settings.split)[: settings.documents],
        }

        def compute(domain: Domain = domain) -> Score:
            return score_domain(loaded, domain, settings, batch), {}

        columns = {"domain": name, "split": settings.split}
        rows, _ = scores.add(folder, what, compute, "document", name, **columns)
        scores.domains[name] = perplexity.total(rows)
    return scores


def score_tasks(
    loaded: Loaded,
    taskset: TaskSet,
    pins: dict[str, Any],
    identity: dict[str, Any],
    folder: Path,
    tracker: Teller,
) -> Scores:
    """Score every task. pins: what identifies the items of each. identity, folder: as of
    score_domains."""

    scores, before = Scores(), 0
    total = sum(map(len, taskset.items.values()))
    settings = taskset.settings.model_dump(mode="json", exclude={"names", "stages"})
    for name, items in taskset.items.items():
        what = {
            **identity,
            "task": name,
            "pin": pins[name],
            "tasks": settings,
            "prefix": loaded.prefix_id,
            "context": loaded.context,
        }

        def compute(name: str = name, before: int = before) -> Score:
            def progress(answered: int) -> None:
                signals.poll()
                tracker.progress(before + answered, total, "items")

            counts, rows = taskset.score(loaded, name, progress)
            return rows, {"score": counts.model_dump(mode="json")}

        _, facts = scores.add(folder, what, compute, "item", name, task=name)
        reach("task.after")
        scores.tasks[name] = record.TaskScore.model_validate(facts["score"])
        before += len(items)
    return scores
