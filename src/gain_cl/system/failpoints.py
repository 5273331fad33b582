"""Named places where a test can end the process as a power cut would. Without GAIN_CL_FAILPOINT
they do nothing.

``GAIN_CL_FAILPOINT=NAME@N`` kills the process (SIGKILL) the N-th time NAME is reached, N from 1;
``GAIN_CL_FAILPOINT=trace:FILE`` appends each name reached to FILE, which tells how often each is.
"""

from __future__ import annotations

import os
import signal

_reached: dict[str, int] = {}


def reach(name: str) -> None:
    """Mark the place ``name``."""
    armed = os.environ.get("GAIN_CL_FAILPOINT")
    if not armed:
        return
    if armed.startswith("trace:"):
        with open(armed.removeprefix("trace:"), "a") as file:
            file.write(name + "\n")
        return
    wanted, _, count = armed.rpartition("@")
    if name == wanted:
        _reached[name] = _reached.get(name, 0) + 1
        if _reached[name] == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
