"""Tables of an experiment: a module each, ``build(study) -> [Table, ...]`` or, of all its models,
``build(studies)``, in the order in which they are read."""

from __future__ import annotations

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
    published,
    tasks,
)

OF_EACH = (main, endpoints, fronts, domains, blocks, tasks, published)
"""Those of each model, named after it where there are several."""
ALL = (*OF_EACH[:-1], models, published, matrix)


def build_tables(book: Book) -> list[Table]:
    """Return every table that the experiment has something for."""
    gaps, several = [f"{GAP}{gap}" for gap in book.gaps], len(book.studies) > 1
    found: list[Table] = []
    for module in ALL:
        if module not in OF_EACH:
            found += module.build(book.studies)
            continue
        for model, study in book.studies.items():
            named = f"-{model}" if several else ""
            found += (replace(t, name=f"{t.name}{named}") for t in module.build(study))
    return [replace(t, notes=[*t.notes, *gaps]) for t in found]
