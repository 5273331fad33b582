"""Stop when asked: a handler sets a flag, and loops that can stop safely poll it. Torch-free.

TERM and USR1 (a scheduler), INT (Ctrl-C). A second Ctrl-C ends the process at once, wherever it is.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gain_cl.errors import PreemptedError
from gain_cl.system import watchdog

_WATCHED = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)  # Windows has no USR1
_asked: str | None = None
_listening = False
_held = False
_at_once = False


@contextmanager
def listening() -> Iterator[None]:
    """Let the watched signals ask for the block, instead of ending the process. Nested, or outside
    the main thread, it does nothing."""
    global _asked, _listening
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _note) for number in _WATCHED}
    _asked, _listening = None, True
    try:
        yield
    finally:
        _listening, _asked = False, None
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def asked() -> str | None:
    """Return the name of the signal that asked to stop, or None."""
    return _asked


@contextmanager
def at_once(seconds: float = 0) -> Iterator[None]:
    """Let a signal end the block wherever it is, and so many seconds with TimeoutError: for
    libraries that read what may have no end. Nothing may be half done in it."""
    global _at_once

    def ring(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds:g} seconds")

    before, timed = _at_once, bool(_listening and seconds and hasattr(signal, "setitimer"))
    if timed:
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    _at_once = True
    try:
        yield
    finally:
        _at_once = before
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def held() -> Iterator[None]:
    """Let ``poll`` pass for the block: something is half done that cannot be taken up again."""
    global _held
    _held = True
    try:
        yield
    finally:
        _held = False


def poll() -> None:
    """Raise PreemptedError if a signal asked to stop. Call it where nothing is half done. A run
    that polls does not hang."""
    watchdog.beat()
    if _asked is not None and not _held:
        raise PreemptedError(
            f"stopped by {_asked}", "what is done is kept", "run the same command to go on"
        )


def _note(number: int, _: Any) -> None:
    global _asked
    _asked = signal.Signals(number).name
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one does not wait for Python
        if not _at_once:
            os.write(2, b"\nstopping at the next safe point; Ctrl-C again quits at once\n")
    if _at_once:
        poll()
