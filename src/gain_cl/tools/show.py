"""``python -m gain_cl show``: print a finished run."""

from __future__ import annotations

from gain_cl.measure import record
from gain_cl.paper import show
from gain_cl.tools.command import Parser, find_record


def main(argv: list[str]) -> int:
    """Print the run that a path, a run id or the beginning of one names."""
    parser = Parser("show", "run", "--results-dir")
    parser.option(
        "--definitions", "also what GEM, Chaudhry, TRACE and Avalanche make of the matrix", False
    )
    parser.option(
        "--shipped",
        "a run of the model as shipped: its stage 0 is shown above the run's",
        metavar="RUN",
    )
    args = parser.read(argv)
    path = find_record(args.run, args.results_dir)
    shipped = args.shipped and record.load(find_record(args.shipped, args.results_dir))
    show.render(record.load(path), shipped=shipped, definitions=args.definitions)
    print(f"record: {path}")
    return 0
