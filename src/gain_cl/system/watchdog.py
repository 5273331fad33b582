"""End a run that hangs: a driver, a network disk or a collective that never answers. Torch-free."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from gain_cl.errors import StorageError

_last = 0.0


def beat() -> None:
    """Say that the run goes on. Loops call it with every step or batch."""
    global _last
    _last = time.monotonic()


@contextmanager
def watching(minutes: float | None, tell: Callable[[StorageError], None]) -> Iterator[None]:
    """End the process with exit code 74 when nothing beats for so many minutes within the block.
    None: never. The system frees the locks of a process that ends.

    tell: is given the error before. Its facts hold the stack of every thread."""
    if minutes is None:
        yield
        return
    over, seconds = threading.Event(), 60 * minutes

    def dying(error: StorageError) -> None:
        threads = sys._current_frames().values()
        error.facts["stacks"] = [line for t in threads for line in traceback.format_stack(t)]
        tell(error)

    def watch() -> None:
        waited, seen = 0.0, _last
        while waited < seconds:  # what it waited itself: a stopped process does not hang
            if over.wait(period := min(seconds / 4, 10)):
                return
            waited, seen = (waited + period, seen) if seen == _last else (0.0, _last)
        what = f"no step or batch ended in {minutes:g} minutes"
        do = "failure.json has the stacks; the same command goes on from the last checkpoint"
        error = StorageError(what, "compute.hang_minutes", do)
        last = threading.Thread(target=dying, args=(error,), daemon=True)
        last.start()
        last.join(60)  # the disk may be what hangs
        with suppress(Exception):
            print(f"gain_cl: error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    beat()
    threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield
    finally:
        over.set()
