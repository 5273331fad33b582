"""``python -m gain_cl tables | figures | report | paper experiment=NAME``: what is printed of an
experiment, from its records alone: tables as Markdown, LaTeX and CSV, with every number as tidy.csv
and those a text quotes as LaTeX commands; figures as PDF and PNG; one HTML page that needs no
network. They go to RESULTS_DIR/tables, figures, reports."""

from __future__ import annotations

from gain_cl.paper import build, gather
from gain_cl.paper.table import say
from gain_cl.tools.command import FLAG, Parser
from gain_cl.tools.status import asked_experiment

MADE = {
    "tables": ("tables", build.made_tables),
    "figures": ("figures", build.made_figures),
    "report": ("reports", build.made_report),
}
"""What is made -> its folder in RESULTS_DIR, and how it is made."""


def main(what: str, argv: list[str]) -> int:
    """Make one kind, or all three. DataError names the runs that may not be printed."""
    kinds = list(MADE) if what == "paper" else [what]
    parser = Parser(what, "words", description=__doc__)
    parser.option("--partial", "true: leave out runs that may not be printed", **FLAG)
    parser.option("--force", "true or not, everything is made again", **FLAG)
    args = parser.read(argv)
    experiment, words = asked_experiment(args.words, what)
    given = next(w.partition("=")[2] for w in args.words if w.startswith("experiment="))
    book = gather.gather(experiment, words, args.partial == "true", given)
    for gap in book.gaps:
        say(f"gap: {gap}")
    for kind in kinds:
        place, make = MADE[kind]
        folder = book.results / place / experiment.name
        build.replace_files(folder, make(book))
        say(f"made: {folder}")
    return 0
