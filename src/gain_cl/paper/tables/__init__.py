"""Tables of an experiment: a module each, ``build(study) -> [Table, ...]`` or, of all its models,
``build(studies)``, in the order in which they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gain_cl.paper.gather import Book
from gain_cl.paper.table import GAP, Table
from gain_cl.paper.tables import (
    blocks,
    domains,
    endpoints,
    fronts,
    main,
    matrix,
    models,
    parameters,
    published,
    tasks,
)
from gain_cl.studies.study import Study

Build = Callable[[dict[str, Study]], list[Table]]


def of_each(build: Callable[[Study], list[Table]]) -> Build:
    """Return the tables of each model, named after it where there are several."""

    def every(studies: dict[str, Study]) -> list[Table]:
        several = len(studies) > 1
        return [
            replace(t, name=f"{t.name}-{model}") if several else t
            for model, study in studies.items()
            for t in build(study)
        ]

    return every


ALL: tuple[Build, ...] = (
    *map(of_each, (main.build, endpoints.build, fronts.build, domains.build, blocks.build)),
    of_each(tasks.build),
    models.build,
    parameters.build,
    of_each(published.build),
    matrix.build,
)


def build_tables(book: Book) -> list[Table]:
    """Return every table that the experiment has something for."""
    gaps = [f"{GAP}{gap}" for gap in book.gaps]
    return [
        replace(table, notes=[*table.notes, *gaps])
        for build in ALL
        for table in build(book.studies)
    ]
