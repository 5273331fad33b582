"""The command line: ``python -m gain_cl VERB`` = ``gain-cl VERB``. Torch is imported only after a configuration is valid.

Every mistake of a user is one line on stderr, ``gain_cl: error: <what> (<where>); <what to do>``, and the exit code of
errors.py; GAIN_CL_DEBUG=1 adds the traceback. The last line of a run on stdout is ``record: PATH``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gain_cl.errors import USAGE, ConfigError, GainError, PreemptedError, StorageError
from gain_cl.verbs import Parser, find_record

INTERRUPTED = 130
VERBS = (
    "sweep", "status", "compare", "power", "diagnose",
    "export", "recombine", "interpolate", "prepare", "verify", "verify-resume", "doctor", "clean", "bench",
)  # fmt: skip
"""Those with a module of their own in verbs/."""

PAPER = ("tables", "figures", "report", "paper")
"""Those of verbs/paper.py."""

USAGE_TEXT = """\
usage: python -m gain_cl VERB ... (also: gain-cl VERB ...)

  run     adapt a model to a sequence of domains and write its forgetting matrix; run --help lists presets and keys
  show    print a finished run again: show RECORD.json, or show RUN_ID
  export  what a run has learned for use elsewhere: an adapter in PEFT's format, or an ordinary transformers checkpoint
  params  trainable parameters of every model and method

  sweep     run what an experiment (experiments/NAME.yaml) lacks, here or on Slurm
  status    which runs of an experiment (experiments/NAME.yaml) are done, and the commands of those that are not
  compare   runs, or an experiment: intervals, fronts, equal skill, and a verdict per declared endpoint
  power     what an experiment can detect and what it will cost, before it runs
  diagnose  what a run did to the weights: norms, directions, intruders, gains, divergence from the pretrained model

  tables    of an experiment, from its records alone: Markdown, LaTeX, CSV
  figures   of an experiment: PDF, PNG
  report    of an experiment: one HTML page
  paper     all three; what is not out of date stays

  recombine      multiply the gains of a run's stages anew, with stages left out, weighted or reordered: no training
  score          matrix and statistics of checkpoints and adapters that were trained elsewhere, in order
  interpolate    score the models between the pretrained one and a run's: no training

  prepare        fetch, tokenise and check the data of a run, before it starts
  verify         recompute every number of a finished run from its raw values and hash its files again
  verify-resume  kill a short run at random moments, resume it and compare with the undisturbed one
  doctor         what this machine has, what it lacks and what to do
  bench          speed and memory of a training step, ours beside its peers, with random weights
  clean          remove caches and abandoned runs, after showing them

  --version, --help
"""


def entry() -> NoReturn:
    """The console script."""
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code; never raises for a user's mistake."""
    verb, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    try:
        return _verb(verb)(rest)
    except GainError as error:
        return _report(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except OSError as error:  # told where it happens if it can be; what remains is mostly the place that is printed to
        return _report(StorageError(f"the system refuses: {error.strerror or error}", str(error.filename or ""), "check the disk"))


def _other(name: str, argv: list[str]) -> int:
    code: int = importlib.import_module(f"gain_cl.verbs.{name.replace('-', '_')}").main(argv)
    return code


def _paper(what: str, argv: list[str]) -> int:
    from gain_cl.verbs import paper

    return paper.main(what, argv)


def _verb(verb: str) -> Callable[[list[str]], int]:
    verbs: dict[str, Callable[[list[str]], int]] = {
        "run": _run,
        "score": _score,
        "show": _show,
        "params": _params,
        **{name: functools.partial(_other, name) for name in VERBS},
        **{name: functools.partial(_paper, name) for name in PAPER},
        "--help": _help,
        "-h": _help,
        "help": _help,
        "--version": _version,
    }
    if verb not in verbs:
        if verb:
            from gain_cl.explain import suggest

            raise ConfigError(f"unknown verb {verb!r}", "command line", suggest(verb, ["run", "score", "show", "params", *VERBS, *PAPER]))
        return lambda _: _help([]) or USAGE
    return verbs[verb]


def _report(error: GainError) -> int:
    if os.environ.get("GAIN_CL_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"gain_cl: error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def _help(_: list[str]) -> int:
    print(USAGE_TEXT, end="")
    return 0


def _version(_: list[str]) -> int:
    from gain_cl import __version__

    print(f"gain_cl {__version__}")
    return 0


# --- run -------------------------------------------------------------------------------------------------------------


def _run(argv: list[str]) -> int:
    parser = Parser("run", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", action="append", default=[])
    parser.add_argument("--plugin", action="append", default=[])
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=["job", "hydra", "all"])
    parser.add_argument("-p", "--package")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument(
        "-i", "--info", nargs="?", const="all", choices=["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    )
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--hydra-help", action="store_true")
    args = parser.parse_intermixed_args(argv)
    from gain_cl import build, signals

    here = {"config_dirs": args.config_dir, "plugins": args.plugin}
    if words := ["--help"] * args.help + ["--hydra-help"] * args.hydra_help:
        build.search_path(args.config_dir)  # says what is wrong with a folder
        first, rest = args.config_dir[:1], args.config_dir[1:]  # Hydra's help lists the presets of its own --config-dir only
        return _hydra([*words, *(f"--config-dir={d}" for d in first), *build.search_path(rest), *args.overrides])
    if args.multirun and not args.cfg and not args.info:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("-m under torchrun would start every run on every rank", "command line", "start torchrun once for each run")
        with signals.listening():
            return _multirun(args.overrides, here)
    if args.cfg or args.info:
        words = [f"--{w}={getattr(args, w)}" for w in ("cfg", "info", "package") if getattr(args, w)] + ["--resolve"] * args.resolve
        return _hydra([*words, *build.spell_out(args.overrides, **here)])
    with signals.listening():
        return _carry_out(build.compose(args.overrides, **here))


def _carry_out(config: Any) -> int:
    """One run, from a checked configuration to the last line printed."""
    from gain_cl import show
    from gain_cl.spine import execute, prepare

    plan = prepare(config)
    finished = execute(config, plan)
    show.render(finished, plan.files)
    print(f"record: {plan.record_path}", flush=True)
    return 0


def _multirun(overrides: list[str], here: dict[str, Any]) -> int:
    """Every job through Hydra's launcher and then the path of a single run; goes on after a failure, stops at a signal."""
    from gain_cl import build

    total = len(build.jobs(overrides, **here))  # every job is checked before the first starts
    failures: list[int] = []
    stopped: list[int] = []
    parent = os.getpid()

    def job(task: list[str]) -> None:
        if stopped:
            return
        print(f"== {' '.join(o.lstrip('+') for o in task)}", flush=True)
        try:
            _carry_out(build.compose(task, here["config_dirs"]))
        except PreemptedError as error:
            stopped.append(_report(error))
        except GainError as error:
            failures.append(_report(error))
        except Exception:
            failures.append(1)
            traceback.print_exc()
        if failures and os.getpid() != parent:  # a launcher that starts processes learns of it no other way
            raise RuntimeError("the run failed")

    try:
        _hydra(["--multirun", *build.search_path(here["config_dirs"]), *build.rewrite(overrides, sweep=True, **here)], job)
    except RuntimeError:
        failures.append(1)
    if stopped:
        return stopped[0]
    if failures:
        print(f"gain_cl: error: {len(failures)} of {total} runs failed (multirun); see the messages above", file=sys.stderr, flush=True)
    return failures[0] if failures else 0


def _hydra(argv: list[str], job: Callable[[list[str]], None] | None = None) -> int:
    """Hand over to hydra.main: its help, its printing of configurations, its multirun."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from gain_cl import presets
    from gain_cl.explain import Given, explained

    def task(_: Any) -> None:
        if job is not None:
            job(list(HydraConfig.get().overrides.task))

    before, full, said = sys.argv, os.environ.get("HYDRA_FULL_ERROR"), io.StringIO()
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["gain_cl run", *argv], "1"  # errors reach us instead of being printed
    try:
        with explained(Given(argv)), contextlib.redirect_stderr(said if job is None else sys.stderr):
            hydra.main(version_base="1.3", config_path=str(presets.configs_dir()), config_name="run")(task)()
    except SystemExit as end:
        if end.code:
            raise ConfigError(said.getvalue() or "Hydra refuses", "gain_cl run", "see python -m gain_cl run --help") from None
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR") if full is None else os.environ.update(HYDRA_FULL_ERROR=full)
    return 0


# --- score, show, params ----------------------------------------------------------------------------------------------------


def _score(argv: list[str]) -> int:
    from gain_cl import signals
    from gain_cl.verbs import score

    with signals.listening():
        return _carry_out(score.compose(argv))


def _show(argv: list[str]) -> int:
    parser = Parser(
        "show",
        usage="python -m gain_cl show [--definitions] [--shipped RECORD.json|RUN_ID] [--results-dir DIR] RECORD.json|RUN_ID",
        description="Print a finished run.",
    )
    parser.add_argument("run", help="path of a record, or a run id (its beginning is enough)")
    parser.add_argument("--definitions", action="store_true", help="also what GEM, Chaudhry, TRACE and Avalanche make of the matrix")
    parser.add_argument("--shipped", metavar="RUN", help="a run of the model as shipped: its stage 0 is shown above the run's")
    parser.add_argument("--results-dir", default="results", help="where runs/RUN_ID.json are (default: %(default)s)")
    args = parser.parse_args(argv)
    from gain_cl import record, show

    path = find_record(args.run, Path(args.results_dir))
    shipped = record.load(find_record(args.shipped, Path(args.results_dir))) if args.shipped is not None else None
    show.render(record.load(path), shipped=shipped, definitions=args.definitions)
    print(f"record: {path}")
    return 0


def _params(argv: list[str]) -> int:
    parser = Parser(
        "params",
        usage="python -m gain_cl params [model=A,B] [method=A,B] [--json] [--config-dir DIR] [--plugin FILE.py]",
        description="Trainable parameters of models and methods, counted on the meta device from the presets.",
    )
    parser.add_argument("filters", nargs="*", metavar="model=A,B method=A,B", help="only these")
    parser.add_argument("--json", action="store_true", help="print JSON: model -> {total, methods}")
    parser.add_argument("--config-dir", action="append", default=[], help="a folder with more presets (repeatable)")
    parser.add_argument("--plugin", action="append", default=[], help="a file that registers adapters (repeatable)")
    args = parser.parse_intermixed_args(argv)
    from gain_cl import params

    table = params.count(args.filters, args.config_dir, args.plugin)
    if args.json:
        import json

        print(json.dumps(table, indent=1, allow_nan=False))
    else:
        params.show(table)
    return 0
