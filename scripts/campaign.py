"""The fault campaigns of docs/reliability.md in full: kills, preemption, corruption.

    python scripts/campaign.py [boundaries random preempt corrupt real ...] [--scale 1.0] [--root
    DIR]

Prints a row of the table for each campaign as it ends: injected, survived, bytes compared, seconds;
then what failed, and exits with 1 if anything did. --scale 0.1 does a tenth. About an hour on two
free cores.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / p) for p in ("tests", "tests/faults")]

import campaign_corrupt as damage  # noqa: E402
import campaign_kill as kill  # noqa: E402
from campaign import Warm  # noqa: E402

NAMES = ("boundaries", "random", "preempt", "corrupt", "real")
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("names", nargs="*", help=f"any of {', '.join(NAMES)} (default: all)")
parser.add_argument("--scale", type=float, default=1.0)
parser.add_argument("--root", type=Path, help="where runs are kept (default: a temporary folder)")
asked = parser.parse_args()
root, chosen = asked.root or Path(tempfile.mkdtemp(prefix="campaign-")), asked.names or list(NAMES)


def times(count):  # type: ignore[no-untyped-def]
    return max(1, round(count * asked.scale))


with Warm(composed_once=True, imports=["lm_eval"] if "boundaries" in chosen else []) as warm:
    todo = {
        "boundaries": [
            lambda: kill.kill_at_boundaries(warm, root, kill.GAIN),
            lambda: kill.kill_at_boundaries(warm, root, kill.CASES[2]),
            lambda: kill.kill_at_boundaries(
                warm, root, kill.TASK, only=("task.", "cell.", "stage.", "record.")
            ),
        ],
        "random": [lambda: kill.kill_at_random(warm, root, times(200))],
        "preempt": [
            lambda: kill.preempt(warm, root, times(60)),
            lambda: kill.quit_at_once(warm, root),
        ],
        "corrupt": [
            lambda: damage.decide(warm, root, times(64)),
            lambda: damage.run_on(warm, root, times(40)),
            lambda: damage.bad_ones_stay_out(warm, root),
            lambda: damage.kill_while_replacing(warm, root),
        ],
        "real": [
            lambda: kill.kill_at_random(warm, root, times(8), kill.REAL),
            lambda: kill.preempt(warm, root, times(4), kill.REAL),
        ],
    }
    failures = []
    for name in chosen:
        for campaign in todo[name]:
            outcome = campaign()
            print(outcome.row(), flush=True)
            failures += [f"{outcome.name}: {failure}" for failure in outcome.failures]
print(*failures, sep="\n")
sys.exit(bool(failures))
