"""Write numbers: in the terminal, in metrics.jsonl and in wandb alike. Torch-free."""

from __future__ import annotations

import math
from typing import Any


def perplexity(loss_nats: float) -> str:
    """Return a perplexity in at most seven characters: 23.31, 455.6, 49152, 1.2e+08, or - where it
    was not scored."""
    if math.isnan(loss_nats):
        return "-"
    value = math.exp(min(loss_nats, 700.0))
    for limit, shown in ((100, f"{value:.2f}"), (1000, f"{value:.1f}"), (1e6, f"{value:.0f}")):
        if value < limit:
            return shown
    return f"{value:.1e}"


def percent(nats: float) -> str:
    """Return a difference of losses as a change of perplexity in %, with its sign, or - where there
    is none."""
    if math.isnan(nats):
        return "-"
    value = change(nats)
    return f"{value:+.1f}" if abs(value) < 1000 else f"{value:+.0e}"


def change(nats: float) -> float:
    """Return a difference of losses as a change of perplexity in %: inf where float64 ends, nan of
    nan."""
    return math.inf if nats >= 700 else 100 * math.expm1(nats)


def clock(seconds: float) -> str:
    """Return a moment or a countdown: 1:02:03, 2:03, 0:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def duration(seconds: float) -> str:
    """Return how long something took: 1 h 2 min, 2 min 3 s, 3.0 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole // 60 % 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{seconds:.1f} s"


def counted(n: int, noun: str) -> str:
    """Return 1 run, 3 runs."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def finite(value: Any, name: str = "") -> tuple[Any, dict[str, str]]:
    """Return the value with plain Python numbers and null for what is not finite, then the names
    and values of those."""
    bad: dict[str, str] = {}

    def clean(x: Any, name: str) -> Any:
        if hasattr(x, "item"):  # a numpy or torch scalar
            x = x.item()
        if isinstance(x, dict):
            return {k: clean(v, f"{name}.{k}" if name else str(k)) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [clean(v, f"{name}[{i}]") for i, v in enumerate(x)]
        if isinstance(x, float) and not math.isfinite(x):
            bad[name], x = str(x), None
        return x

    return clean(value, name), bad
