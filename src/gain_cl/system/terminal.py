"""Write for a terminal: a console of known width, names that others chose. Torch-free."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from gain_cl import errors


def console() -> Any:
    """Return rich's Console. It is 120 wide where the output is no terminal and COLUMNS is not
    set."""
    from rich.console import Console

    found = Console()
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = 120
    return found


class _Unfailing:
    """A stream whose reader may go away: what nobody reads is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except UnicodeEncodeError:  # a terminal of few characters
            coded = text.encode(self._stream.encoding, "backslashreplace")
            return self.write(coded.decode(self._stream.encoding))
        except (OSError, ValueError):
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), self._stream.fileno())


@contextlib.contextmanager
def unfailing() -> Iterator[None]:
    """Let no failure to print end the block: a closed or broken stdout or stderr takes what is
    printed and drops it."""
    before = sys.stdout, sys.stderr
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would be printed into
            os.open(os.devnull, os.O_RDWR)
    dropped = open(os.devnull, "w")  # noqa: SIM115 - open as long as somebody prints
    sys.stdout, sys.stderr = (_Unfailing(s or dropped) for s in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def printable(text: object) -> str:
    """Return a name that others chose as one line without control characters."""
    return errors.printable(str(text)).replace("\n", "\\n")
