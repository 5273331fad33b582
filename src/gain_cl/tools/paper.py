"""``python -m gain_cl tables | figures | report | paper experiment=NAME``: what is printed of an
experiment, from its records alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

from gain_cl.errors import ConfigError
from gain_cl.paper import build, gather
from gain_cl.system.terminal import printable
from gain_cl.tools.command import Parser
from gain_cl.tools.status import asked

ABOUT = {
    "tables": "Tables of an experiment as Markdown, LaTeX and CSV, every number as tidy.csv, "
    "those a text quotes as LaTeX commands.",
    "figures": "Figures of an experiment as PDF and PNG.",
    "report": "One HTML page of an experiment that needs no network.",
    "paper": "Tables, figures and report of an experiment; what is not out of date stays.",
}


def main(what: str, argv: list[str]) -> int:
    """Build one kind, or all three. DataError names the cells that may not be printed."""
    parser = Parser(
        what,
        usage=f"python -m gain_cl {what} experiment=NAME [partial=true] [force=true] "
        "[KEY=VALUE ...]",
        description=f"{ABOUT[what]} They go to "
        f"RESULTS_DIR/{'tables, figures, reports' if what == 'paper' else _place(what)}.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="experiment=NAME | KEY=VALUE",
        help="the experiment; results_dir= and other overrides",
    )
    asked_for = parser.parse_intermixed_args(argv).words
    experiment, words = asked(asked_for, what)
    given = next(w.partition("=")[2] for w in asked_for if w.startswith("experiment="))
    flags = {"partial": False, "force": False}
    for word in [w for w in words if w.partition("=")[0] in flags]:
        key, _, value = word.partition("=")
        if value not in ("true", "false"):
            raise ConfigError(
                f"{value!r} is neither true nor false", key, f"give {key}=true or {key}=false"
            )
        flags[key] = value == "true"
        words.remove(word)
    book = gather.gather(experiment, words, flags["partial"], given)
    for gap in book.gaps:
        print(f"gap: {printable(gap)}")
    made_of, output = build.inputs(book), Path(book.cells[0].config.output_dir)
    for kind in ("tables", "figures", "report") if what == "paper" else (what,):
        folder = book.results / _place(kind) / experiment.name
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        stamp = output / "paper" / f"{experiment.name}-{kind}-{place}.json"
        if not flags["force"] and build.fresh(folder, stamp, made_of):
            print(f"up to date: {folder}")
            continue
        build.replace(folder, MADE[kind](book), stamp, made_of)
        print(f"made: {folder}", flush=True)
    return 0


def _place(kind: str) -> str:
    return "reports" if kind == "report" else kind


def _report(book: gather.Book) -> build.Files:
    from gain_cl.paper import report

    return {"index.html": report.page(book)}


MADE = {"tables": build.made_tables, "figures": build.made_figures, "report": _report}
