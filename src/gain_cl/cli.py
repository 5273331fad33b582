"""The command line: ``python -m gain_cl VERB`` = ``gain-cl VERB``. Torch is imported only after a
configuration is valid.

Every mistake of a user is one line on stderr, ``gain_cl: error: <what> (<where>); <what to do>``,
and the exit code of errors.py. GAIN_CL_DEBUG=1 adds the traceback. The last line of a run on stdout
is ``record: PATH``.
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
from typing import Any, NoReturn

from gain_cl.errors import PREEMPTED, USAGE, ConfigError, GainError, StorageError, suggest
from gain_cl.tools.command import CONFIGURATION, Parser

INTERRUPTED = 130

USAGE_TEXT = """\
usage: python -m gain_cl VERB ... (also: gain-cl VERB ...)

  run     adapt a model to a sequence of domains and write its forgetting matrix (run --help)
  show    print a finished run again: show RECORD.json, or show RUN_ID
  export  what a run has learned, for use elsewhere: an adapter of PEFT's, or a whole checkpoint
  params  trainable parameters of every model and method

  sweep     run what an experiment (experiments/NAME.yaml) lacks, here or on Slurm
  status    which runs of an experiment are done, and the commands of those that are not
  compare   runs, or an experiment: intervals, fronts, equal skill, verdicts on endpoints
  power     what an experiment can detect and what it will cost, before it runs
  diagnose  what a run did to the weights: norms, directions, intruders, gains, divergence

  tables    of an experiment, from its records alone: Markdown, LaTeX, CSV
  figures   of an experiment: PDF, PNG
  report    of an experiment: one HTML page
  paper     all three

  recombine      multiply the gains of stages anew, some left out or weighted
  score          matrix and statistics of checkpoints that were trained elsewhere, in order
  interpolate    score the models between the pretrained one and a run's: no training

  prepare        fetch, tokenise and check the data of a run, before it starts
  verify         recompute every number of a finished run and hash its files again
  verify-resume  kill a short run at random moments, resume it and compare with the undisturbed one
  doctor         what this machine has, what it lacks and what to do
  bench          speed and memory of a step beside peers (a script of the checkout)
  clean          remove caches and abandoned runs, after showing them

  --version, --help
"""


def entry() -> NoReturn:
    """Run the console script."""
    code = main()
    try:
        if sys.stdout is not None:  # it was closed before Python began
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code. Never raise for a user's mistake."""
    verb, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    try:
        ranks = os.environ.get("WORLD_SIZE", "")
        if verb in ("run", "score", "sweep") and ranks.isdecimal() and int(ranks) > 1:
            if os.environ.get("RANK", "0") != "0":
                return USAGE  # rank 0 says it
            what = f"{ranks} processes were started, and gain_cl uses one"
            do = "start it without torchrun; several runs at once: gain_cl sweep max_parallel=N"
            raise ConfigError(what, "WORLD_SIZE", do)
        if verb in VERBS:
            return VERBS[verb](rest)
        if verb:
            there = (v for v in VERBS if v.isidentifier())
            raise ConfigError(f"unknown verb {verb!r}", "command line", suggest(verb, there))
        return _help([]) or USAGE
    except GainError as error:
        return _report(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except OSError as error:
        # told where it happens if it can be; what remains is mostly the place that is printed to
        what = f"the system refuses: {error.strerror or error}"
        return _report(StorageError(what, str(error.filename or ""), "check the disk"))


def _report(error: GainError) -> int:
    """Print an error and return its exit code."""
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


# --- run ------------------------------------------------------------------------------------------


def _run(argv: list[str]) -> int:
    """Carry out a run, several (-m), or one of Hydra's flags that print and stop."""
    parser = Parser("run", *CONFIGURATION, add_help=False)
    for flags in (["-m", "--multirun"], ["-h", "--help"], ["--hydra-help"], ["--resolve"]):
        parser.add_argument(*flags, action="store_true")
    parser.add_argument("-c", "--cfg")
    parser.add_argument("-p", "--package")
    parser.add_argument("-i", "--info", nargs="?", const="all")
    args = parser.parse_intermixed_args(argv)
    from gain_cl.config import presets

    here = {"config_dirs": args.config_dir, "plugins": args.plugin}
    if args.help or args.hydra_help:
        presets.search_path(args.config_dir)  # says what is wrong with a folder
        # Hydra's help lists the presets of its own --config-dir only
        first, rest = args.config_dir[:1], args.config_dir[1:]
        flag = "--help" if args.help else "--hydra-help"
        places = [*(f"--config-dir={d}" for d in first), *presets.search_path(rest)]
        return _hydra([flag, *places, *args.overrides])
    from gain_cl.compose import composition
    from gain_cl.system import signals, terminal

    if args.cfg or args.info:
        flags = [f"--{w}={v}" for w in ("cfg", "info", "package") if (v := getattr(args, w))]
        flags += ["--resolve"] * args.resolve
        return _hydra([*flags, *composition.spell_out(args.overrides, **here)])
    with signals.listening(), terminal.unfailing():
        if args.multirun:
            return _multirun(args.overrides, here)
        with signals.at_once():
            config = composition.compose(args.overrides, **here)
        return _carry_out(config)


def _carry_out(config: Any) -> int:
    """Carry out one run, from a checked configuration to the last line printed."""
    from gain_cl.paper import show
    from gain_cl.runs.plan import prepare
    from gain_cl.runs.run import execute

    plan = prepare(config)
    finished = execute(config, plan)
    show.render(finished, plan.files)
    print(f"record: {plan.record_path}", flush=True)
    return 0


def _multirun(overrides: list[str], here: dict[str, Any]) -> int:
    """Carry out every job through Hydra's launcher and the path of a single run. Go on after a
    failure, stop at a signal."""
    from gain_cl.compose import composition
    from gain_cl.config import presets

    total = len(composition.jobs(overrides, **here))  # all are checked before the first starts
    failures: list[int] = []
    parent = os.getpid()

    def job(words: list[str]) -> None:
        if PREEMPTED in failures:
            return
        print(f"== {' '.join(w.lstrip('+') for w in words)}", flush=True)
        try:
            _carry_out(composition.compose(words, here["config_dirs"]))
        except GainError as error:
            failures.append(_report(error))
        except Exception:
            failures.append(1)
            traceback.print_exc()
        if failures and os.getpid() != parent:
            # a launcher that starts processes learns of it no other way
            raise RuntimeError("the run failed")

    words = composition.rewrite(overrides, sweep=True, **here)
    try:
        _hydra(["--multirun", *presets.search_path(here["config_dirs"]), *words], job)
    except RuntimeError:
        failures.append(1)
    if PREEMPTED in failures:
        return PREEMPTED
    if failures:
        said = f"{len(failures)} of {total} runs failed (multirun); see the messages above"
        print(f"gain_cl: error: {said}", file=sys.stderr, flush=True)
    return (failures or [0])[0]


def _hydra(argv: list[str], job: Callable[[list[str]], None] | None = None) -> int:
    """Hand over to hydra.main: its help, its printing of configurations, its multirun."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from gain_cl.compose.messages import Request, explained
    from gain_cl.config import presets

    def task(_: Any) -> None:
        if job is not None:
            job(list(HydraConfig.get().overrides.task))

    before, said = sys.argv, io.StringIO()
    sys.argv = ["gain_cl run", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of being printed
    try:
        with (
            explained(Request(argv)),
            contextlib.redirect_stderr(said if job is None else sys.stderr),
        ):
            hydra.main(
                version_base="1.3", config_path=str(presets.configs_dir()), config_name="run"
            )(task)()
    except SystemExit as end:
        if end.code:
            what = said.getvalue().rpartition("error: ")[2] or "Hydra refuses"
            do = "see python -m gain_cl run --help"
            raise ConfigError(what, "gain_cl run", do) from None
    finally:
        sys.argv = before
    return 0


# --- the other verbs ------------------------------------------------------------------------------


def _score(argv: list[str]) -> int:
    from gain_cl.system import signals, terminal
    from gain_cl.tools import score

    with signals.listening(), terminal.unfailing():
        return _carry_out(score.compose(argv))


def _tool(name: str, *words: Any) -> int:
    """Call main of the module of a verb, which is imported now."""
    code: int = importlib.import_module(f"gain_cl.tools.{name.replace('-', '_')}").main(*words)
    return code


TOOLS = (
    "show", "params", "sweep", "status", "compare", "power", "diagnose", "export", "recombine",
    "interpolate", "prepare", "verify", "verify-resume", "doctor", "bench", "clean",
)  # fmt: skip
"""Verbs with a module of their own in tools/."""

VERBS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "score": _score,
    **{name: functools.partial(_tool, name) for name in TOOLS},
    **{
        name: functools.partial(_tool, "paper", name)
        for name in ("tables", "figures", "report", "paper")
    },
    "--help": _help,
    "-h": _help,
    "help": _help,
    "--version": _version,
}
