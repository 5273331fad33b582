"""Errors a user can cause, each printed as one line: ``gain_cl: error: <what> (<where>); <what to
do>``."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from typing import Any

USAGE, DATA, IN_USE, IO, PREEMPTED = 64, 65, 73, 74, 75  # exit codes (sysexits.h numbers)


def printable(text: str) -> str:
    """Return the text with what a terminal would obey or cannot show as an escape: \\x1b. Line ends
    stay."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


SECRET_NAME = re.compile(
    r"(?!.*_(?:FILE|PATH|DIR)$)"
    r".*(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|KEY|_PASS$|_PAT$|_AUTH$|^PGPASS$)",
    re.IGNORECASE,
)
"""Environment variables whose values reach no file and no message."""
_IN_URL = re.compile(r"(://)[^/\s@]+@|(\b[\w.-]+:)[^\s/:@\\]+@(?=[\w-]+(?:\.\w|[:/]))")
_ASKED = re.compile(r"([?&](?:\w*token|\w*key|\w*secret|sig|signature|password)=)[^&\s]+", re.I)


def scrubbed(text: str) -> str:
    """Return the text without secrets: values of environment variables named so, passwords and
    tokens of URLs. What stands there instead says what was taken."""
    known = sorted(os.environ.items(), key=lambda pair: -len(pair[1]))  # one may begin another
    for name, secret in known:
        if len(secret) >= 8 and SECRET_NAME.search(name) and secret in text:
            text = text.replace(secret, f"<the value of ${name}>")
    text = _IN_URL.sub(r"\1\2<a password>@", text)
    return _ASKED.sub(r"\1<a password>", text)


def suggest(word: str, options: Iterable[str], listing: bool = True) -> str:
    """Return 'did you mean X?' and, unless listing is off, what there is."""
    lower = {o.lower(): o for o in sorted(options)}
    near = difflib.get_close_matches(word.lower(), lower, n=1) or [
        o for o in lower if word and word.lower() in o
    ]
    mean = [f"did you mean {' or '.join(lower[o] for o in near[:3])}?"] if near else []
    there = [f"there is: {', '.join(lower.values())}"] if listing and lower else []
    return " ".join(mean + there)


class GainError(Exception):
    """Something outside the program is wrong.

    what: the fault, quoting the offending value. where: key, file or line. do: the next step for
    the user. facts: more about it for failure.json, as JSON data.
    """

    exit_code = USAGE

    def __init__(self, what: str, where: str = "", do: str = "") -> None:
        self.what, self.where, self.do = map(scrubbed, (what, where, do))
        self.facts: dict[str, Any] = {}
        line = self.what + (f" ({self.where})" if where else "") + (f"; {self.do}" if do else "")
        super().__init__(printable(" ".join(line.split())))


class ConfigError(GainError):
    """A setting is wrong: exit 64."""


class DataError(GainError):
    """Data, a model or a number is wrong: exit 65."""

    exit_code = DATA


class InUseError(GainError):
    """Another process owns the run: exit 73."""

    exit_code = IN_USE


class StorageError(GainError):
    """Disk, network or memory failed: exit 74."""

    exit_code = IO


class PreemptedError(GainError):
    """Asked to stop by a signal, with everything that is done saved: exit 75, try again."""

    exit_code = PREEMPTED
