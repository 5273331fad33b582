"""``python -m gain_cl score A B ...``: matrix and statistics of checkpoints that were trained
elsewhere, as a run's: folders or ORG/NAME@COMMIT, adapters of PEFT or whole models, in order, among
the overrides of a run.

Each stands in the place of a trained stage: the k-th
learned the k-th domain. The result is a record like any other: show, verify and tables take it.
"""

from __future__ import annotations

import re

from gain_cl.compose import composition
from gain_cl.config import presets
from gain_cl.config.schema import RunConfig
from gain_cl.errors import ConfigError
from gain_cl.tools.command import CONFIGURATION, Parser


def compose(argv: list[str]) -> RunConfig:
    """Return the run that scores the checkpoints on a command line."""
    args = Parser("score", *CONFIGURATION).read(argv)
    overrides = [w for w in args.overrides if re.match(r"[~+]*[A-Za-z_][\w.@/-]*=", w)]
    checkpoints = [w for w in args.overrides if w not in overrides]
    if not checkpoints:
        raise ConfigError(
            "no checkpoint is named",
            "gain_cl score",
            "give folders of PEFT's or transformers', in order",
        )
    if any(word.startswith("method=") for word in overrides):
        raise ConfigError(
            "nothing is trained: method= has no meaning here", "gain_cl score", "leave it out"
        )
    listed = ",".join(map(presets.quote, checkpoints))
    words = ["method=given", f"++adapter.checkpoints=[{listed}]", *overrides]
    return composition.compose(words, args.config_dir, args.plugin)
