"""``python -m gain_cl tables | figures | report | paper experiment=NAME``: what is printed of an
experiment, from its records alone."""

from __future__ import annotations

from gain_cl.paper import build, gather
from gain_cl.paper.table import say
from gain_cl.tools.command import Parser
from gain_cl.tools.status import asked_experiment, flag

ABOUT = {
    "tables": "Tables of an experiment as Markdown, LaTeX and CSV, every number as tidy.csv, "
    "those a text quotes as LaTeX commands.",
    "figures": "Figures of an experiment as PDF and PNG.",
    "report": "One HTML page of an experiment that needs no network.",
    "paper": "Tables, figures and report of an experiment.",
}
MADE = {
    "tables": ("tables", build.made_tables),
    "figures": ("figures", build.made_figures),
    "report": ("reports", build.made_report),
}
"""What is made -> its folder in RESULTS_DIR, and how it is made."""


def main(what: str, argv: list[str]) -> int:
    """Make one kind, or all three. DataError names the runs that may not be printed."""
    kinds = list(MADE) if what == "paper" else [what]
    places = ", ".join(MADE[kind][0] for kind in kinds)
    parser = Parser(
        what,
        usage=f"python -m gain_cl {what} experiment=NAME [partial=true] [KEY=VALUE ...]",
        description=f"{ABOUT[what]} They go to RESULTS_DIR/{places}.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="experiment=NAME | KEY=VALUE",
        help="the experiment; results_dir= and other overrides",
    )
    asked = parser.parse_intermixed_args(argv).words
    experiment, words = asked_experiment(asked, what)
    given = next(w.partition("=")[2] for w in asked if w.startswith("experiment="))
    own = [w.partition("=") for w in words if w.startswith(("partial=", "force="))]
    flags = {key: flag(key, value) for key, _, value in own}  # force=true is what is done anyway
    words = [w for w in words if w.partition("=")[0] not in flags]
    book = gather.gather(experiment, words, flags.get("partial", False), given)
    for gap in book.gaps:
        say(f"gap: {gap}")
    for kind in kinds:
        place, make = MADE[kind]
        folder = book.results / place / experiment.name
        build.replace_files(folder, make(book))
        say(f"made: {folder}")
    return 0
