"""``python -m gain_cl export``: what a run has learned, as files that others load without
gain_cl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gain_cl.errors import ConfigError
from gain_cl.system.terminal import printable
from gain_cl.tools.command import Parser, find_record

KEYS = ("stage", "to", "dir", "dtype")


def main(argv: list[str]) -> int:
    parser = Parser(
        "export",
        usage="python -m gain_cl export RUN to=peft|merged [stage=K] [dir=DIR] "
        "[dtype=float32|bfloat16|float16]"
        " [--results-dir DIR] [--output-dir DIR]",
        description="Write the model after a stage: to=peft, the adapter in PEFT's format; "
        "to=merged, an ordinary transformers checkpoint"
        " (base weights times trained state in fp32, rounded once to dtype). With a model "
        "card and the measured merge error.",
    )
    parser.add_argument("run", help="path of a record, or a run id (its beginning is enough)")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="stage (default: the last), to, dir (default: exports/...), dtype",
    )
    parser.add_argument(
        "--results-dir", default="results", help="where runs/RUN_ID.json are (default: %(default)s)"
    )
    parser.add_argument("--output-dir", help="output_dir of the run (default: as recorded)")
    args = parser.parse_intermixed_args(argv)
    given = _settings(args.settings)
    from gain_cl.compose import composition
    from gain_cl.measure import record
    from gain_cl.tools import exported

    made = record.load(find_record(args.run, Path(args.results_dir))).record
    composition.load_plugins(made.config["plugins"])
    done = exported.export(
        made, given["to"], given["dir"], given["stage"], args.output_dir, given["dtype"]
    )
    if done.gap is not None:
        print(
            f"folded against unfolded, fp32: {done.gap:.1e}, the largest relative difference "
            "of a logit"
        )
    for m in done.merge:
        if m.difference is None:
            print(f"merge error in {m.dtype}: not measured ({printable(m.why)})")
        else:
            print(
                f"merge error in {m.dtype}: {m.difference:+.1e} nats per token, on "
                f"{done.tokens:,} tokens"
            )
    print(f"{'adapter' if given['to'] == 'peft' else 'checkpoint'}: {done.folder}")
    return 0


def _settings(words: list[str]) -> dict[str, Any]:
    """stage=K to=... dir=... dtype=..., checked. ConfigError names the word that is wrong."""
    from gain_cl.errors import suggest

    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in KEYS:
            raise ConfigError(
                f"unknown setting {word!r}", "gain_cl export", suggest(key, list(KEYS))
            )
        if key in given:
            raise ConfigError(f"{key}= is given twice", "gain_cl export", "give it once")
        given[key] = value
    for key, allowed in {
        "to": ("peft", "merged"),
        "dtype": ("float32", "bfloat16", "float16"),
    }.items():
        if key in given and given[key] not in allowed:
            raise ConfigError(
                f"{key}={given[key]}", "gain_cl export", f"use one of: {', '.join(allowed)}"
            )
    if "to" not in given:
        raise ConfigError(
            "to= is missing", "gain_cl export", "to=peft (the adapter) or to=merged (a whole model)"
        )
    if given["to"] == "peft" and "dtype" in given:
        raise ConfigError(
            "dtype= with to=peft: an adapter is fp32", "gain_cl export", "leave it out"
        )
    if not given.get("stage", "1").isdecimal() or not given.get("dir", "x"):
        raise ConfigError(
            f"stage={given.get('stage')} dir={given.get('dir')}",
            "gain_cl export",
            "stage is a number from 1, dir a folder",
        )
    return {
        "to": given["to"],
        "dir": Path(given["dir"]) if "dir" in given else None,
        "stage": int(given["stage"][:9]) if "stage" in given else None,
        "dtype": given.get("dtype", "float32"),
    }
