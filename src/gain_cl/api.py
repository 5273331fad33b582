"""gain_cl from Python and notebooks: the command line's run, its records as data frames, and gains
on any model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from gain_cl.adapters.gain import Gains, attach_gains
from gain_cl.errors import ConfigError
from gain_cl.measure.record import Run, load
from gain_cl.studies.study import level, study_of_runs

__all__ = ["Gains", "Run", "attach_gains", "compare", "load", "run"]

Paths = str | Path | Iterable[str | Path]

COMPARED = ("own_step", "backward", "backward_net", "from_base", "controls_from_base")
"""Metrics of ``compare``."""


def run(*overrides: str, config_dirs: Paths = (), plugins: Paths = ()) -> Run:
    """Carry out a run and return it: ``run("model=smollm2", "method=gain_ffn").matrix``.

    overrides: Hydra overrides, as on the command line. config_dirs, plugins: as --config-dir and
    --plugin, one or several. A finished run is read, not repeated (unless ``force=true``). Raises
    errors.GainError, whose text is the command line's one-line message.
    """
    from gain_cl.compose import composition
    from gain_cl.runs.plan import prepare
    from gain_cl.runs.run import execute

    config = composition.compose(
        overrides,
        *([given] if isinstance(given, str | Path) else given for given in (config_dirs, plugins)),
    )
    return execute(config, prepare(config))


def compare(*runs_or_paths: Run | str | Path) -> pd.DataFrame:
    """Return settings side by side, a row each.

    Columns: setting, blocks, trainable_parameters, and for each metric of COMPARED its value with
    its 95% interval in nats per token (own_step, own_step_low, own_step_high, ...). Below 0 is
    better. NaN: it does not exist.

    Runs that differ in seed and order of the domains alone are blocks of one setting. The interval
    is over blocks and the documents they share. With one block it is over its documents, which
    cannot tell methods apart.

    >>> import gain_cl
    >>> # records, or what run() and load() return
    >>> table = gain_cl.compare("results/runs/A.json", "results/runs/B.json")
    >>> table[["setting", "own_step", "backward", "backward_low", "backward_high"]].round(3)
      setting  own_step  backward  backward_low  backward_high
    0    gain    -0.090     0.038         0.035          0.040
    1    lora    -0.088     0.042         0.039          0.045

    Raises errors.DataError when they do not measure the same.
    """
    if not runs_or_paths:
        raise ConfigError(
            "nothing to compare", "gain_cl.compare", "give runs or the paths of their records"
        )
    study = study_of_runs(x if isinstance(x, Run) else load(x) for x in runs_or_paths)
    rows = []
    for s in study.settings:
        row: dict[str, object] = {
            "setting": s.label,
            "blocks": len(s.runs),
            "trainable_parameters": int(s.one(lambda run: run.record.trainable_parameters)),
        }
        for metric in COMPARED:
            e = level(s, metric).estimate
            row |= {metric: e.value, f"{metric}_low": e.low, f"{metric}_high": e.high}
        rows.append(row)
    return pd.DataFrame(rows)
