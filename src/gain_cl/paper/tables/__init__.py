"""Tables of an experiment: a module each, ``build(book) -> [Table, ...]``, in the order in which
they are read."""

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
    parameters,
    published,
    tasks,
)

ALL = (main, endpoints, fronts, domains, blocks, tasks, models, parameters, published, matrix)


def build(book: Book) -> list[Table]:
    """Every table that the experiment has something for."""
    gaps = [f"{GAP}{gap}" for gap in book.gaps]
    return [
        replace(table, notes=[*table.notes, *gaps])
        for module in ALL
        for table in module.build(book)
    ]


def named(name: str, book: Book, model: str) -> str:
    """The file name of a table of one model: with the model where the experiment has several."""
    return name if len(book.models) == 1 else f"{name}-{model}"
