"""``python -m gain_cl show``: print a finished run."""

from __future__ import annotations

from pathlib import Path

from gain_cl.measure import record
from gain_cl.paper import show
from gain_cl.tools.command import Parser, find_record


def main(argv: list[str]) -> int:
    """Print the run that a path, a run id or the beginning of one names."""
    parser = Parser(
        "show",
        usage="python -m gain_cl show [--definitions] [--shipped RECORD.json|RUN_ID] "
        "[--results-dir DIR] RECORD.json|RUN_ID",
        description="Print a finished run.",
    )
    parser.add_argument("run", help="path of a record, or a run id (its beginning is enough)")
    parser.add_argument(
        "--definitions",
        action="store_true",
        help="also what GEM, Chaudhry, TRACE and Avalanche make of the matrix",
    )
    parser.add_argument(
        "--shipped",
        metavar="RUN",
        help="a run of the model as shipped: its stage 0 is shown above the run's",
    )
    parser.add_argument(
        "--results-dir", default="results", help="where runs/RUN_ID.json are (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    results = Path(args.results_dir)
    path = find_record(args.run, results)
    shipped = record.load(find_record(args.shipped, results)) if args.shipped is not None else None
    show.render(record.load(path), shipped=shipped, definitions=args.definitions)
    print(f"record: {path}")
    return 0
