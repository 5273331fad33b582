"""``python -m gain_cl score A B ...``: matrix and statistics of checkpoints that were trained
elsewhere, as a run's.

Each is a PEFT adapter or a whole model, and stands in the place of a trained stage: the k-th
learned the k-th domain. The result is a record like any other: show, verify and tables take it.
"""

from __future__ import annotations

import re

from gain_cl.compose import composition
from gain_cl.config import presets
from gain_cl.config.schema import RunConfig
from gain_cl.errors import ConfigError
from gain_cl.tools.command import Parser


def compose(argv: list[str]) -> RunConfig:
    """The run that scores the checkpoints on a command line."""
    parser = Parser(
        "score",
        usage="python -m gain_cl score CHECKPOINT ... domain=[a,b,...] [model=NAME] [KEY=VALUE] "
        "[--config-dir DIR] [--plugin FILE.py]",
        description="Score checkpoints trained elsewhere: folders or ORG/NAME@COMMIT, adapters of "
        "PEFT or whole models, in order.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="CHECKPOINT | KEY=VALUE",
        help="checkpoints in order, and overrides as for run",
    )
    parser.add_presets()
    args = parser.parse_intermixed_args(argv)
    overrides = [w for w in args.words if re.match(r"[~+]*[A-Za-z_][\w.@/-]*=", w)]
    checkpoints = [w for w in args.words if w not in overrides]
    if not checkpoints:
        raise ConfigError(
            "no checkpoint is named",
            "gain_cl score",
            "give folders of PEFT's or transformers', in order",
        )
    if "method" in [w.split("=", 1)[0] for w in overrides]:
        raise ConfigError(
            "nothing is trained: method= has no meaning here", "gain_cl score", "leave it out"
        )
    quoted = ",".join(map(presets.quote, checkpoints))
    return composition.compose(
        ["method=given", f"++adapter.checkpoints=[{quoted}]", *overrides],
        args.config_dir,
        args.plugin,
    )
