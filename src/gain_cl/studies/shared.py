"""What runs must share: to be compared, to stand in one table, to be shown in one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gain_cl.measure.record import RunRecord

Facts = Mapping[str, Callable[[RunRecord], Any]]
"""What a fact is called, and what it is of a record."""

MEASURED: Facts = {
    "protocol": lambda r: r.protocol,
    "model": lambda r: r.pins.get("model", r.model),
    "trained domains": lambda r: sorted(r.trained),
    "controls": lambda r: sorted(r.controls),
    "training text": lambda r: r.pins.get("domains"),
    "test documents": lambda r: r.pins.get("validation"),
    "dtype": lambda r: (r.config["model"]["dtype"], r.config["model"].get("load_in")),
}
"""What runs must share to be compared."""

PACKAGES = "torch transformers tokenizers peft lm-eval datasets numpy safetensors"
"""Packages that numbers come from."""

COMPUTED: Facts = {
    "schema": lambda r: r.schema_version,
    "packages": lambda r: {p: r.provenance.get("packages", {}).get(p) for p in PACKAGES.split()},
    "dtype": MEASURED["dtype"],
    "device type": lambda r: str(r.provenance.get("device", "")).split(":")[0],
}
"""What the runs of one model in one table must share besides; not the commit, which a study may
outlive."""

SCORED: Facts = {
    "protocol": MEASURED["protocol"],
    "domains": lambda r: {*r.trained, *r.controls},  # their order is nothing to stage 0
    "test documents": MEASURED["test documents"],
    "scored text": lambda r: {  # another tokenizer
        d: (s.tokens, s.bytes) for d, s in r.stages[0].domains.items()
    },
}
"""What two runs must share whose untouched models are shown in one matrix."""


def unlike(
    records: Sequence[RunRecord], facts: Facts
) -> Iterator[tuple[str, RunRecord, RunRecord, Any]]:
    """Yield each record that is unlike most of the others in a fact, once: (what differs, one of
    the others, the record, its value)."""
    left = list(records)
    for what, of in facts.items():
        values = [of(r) for r in left]
        usual = max(values, key=values.count, default=None)
        odd = [(r, x) for r, x in zip(left, values, strict=True) if x != usual]
        left = [r for r, x in zip(left, values, strict=True) if x == usual]
        yield from ((what, left[0], r, x) for r, x in odd)
