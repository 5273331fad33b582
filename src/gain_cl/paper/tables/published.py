"""Ours beside what the GAIN paper's abstracts say (arXiv 2604.04516): headline numbers alone were
available, none of its tables."""

from __future__ import annotations

from collections.abc import Sequence

from gain_cl.paper import tables
from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, count, percent
from gain_cl.paper.table import of as of_
from gain_cl.stats.format import counted
from gain_cl.studies import equal
from gain_cl.studies import study as comparison
from gain_cl.studies.study import Setting, Study

STATUS = "seen in an abstract"
EARLIER = ("improve by 7 to 13", "degrade by 18 to 36")


def build(book: Book) -> list[Table]:
    return [
        _of(book, model, study)
        for model, study in book.studies.items()
        if any(m.startswith("gain") for m in study.chosen)
    ]


def _of(book: Book, model: str, study: Study) -> Table:
    chosen = study.chosen
    gain = chosen.get("gain_ffn") or next(s for m, s in chosen.items() if m.startswith("gain"))
    lora = chosen.get("lora")
    rows: list[Row] = []

    notes = [
        "Published: five models of 774M to 70B, eight domains, budgets and rates not known. "
        f"Ours: {model}, "
        f"{tokens(study)} training tokens a domain, {counted(len(study.blocks), 'block')}.",
        "Whether published changes are against the model just after it learned a domain or "
        "the pretrained one is not known: both are here.",
    ]

    def row(
        what: str,
        published: tuple[str, str],
        values: Sequence[Value | None],
        *of: Setting | None,
        status: str = STATUS,
    ) -> None:
        rows.append(
            Row(
                [what, *published, status, *values],
                [r for s in of if s is not None for r in book.ids(model, s.label)],
            )
        )

    def both(what: str, published: tuple[str, str], metric: str) -> None:
        row(
            what,
            published,
            [
                of_(metric, comparison.level(s, metric), blocks=len(s.runs)) if s else None
                for s in (gain, lora)
            ],
            gain,
            lora,
        )

    def at_equal_step(what: str, published: str, method: str) -> None:
        found = equal.matched(study, gain.method, method)
        if found.reason:
            notes.append(f"{what}: {found.reason}.")
        settings = [*study.of(gain.method), *study.of(method)]
        row(
            what,
            (published, "-"),
            [None if found.reason else percent(equal.interval(found)), None],
            *settings,
        )

    both("in-domain adaptation (own step %)", ("about equal to LoRA", "reference"), "own_step")
    both("earlier domains, since they were learned (backward %)", EARLIER, "backward")
    both("earlier domains, since the pretrained model (from base %)", EARLIER, "from_base")
    if comparison.level(gain, "accuracy:boolq") is not None:
        boolq = ("-0.8 (Qwen2.5-7B; points or relative: not known)", "-14.9")
        both(
            "BoolQ after seven adaptations (ours: after the sequence), points",
            boolq,
            "accuracy:boolq",
        )
    if "lora_replay" in chosen:
        at_equal_step(
            "backward % minus LoRA with replay at equal own step",
            "equal, with no stored data",
            "lora_replay",
        )
    if "ewc" in chosen:
        at_equal_step("backward % minus EWC at equal own step", "dominates its Pareto front", "ewc")
    trained = [
        Value(s.one(lambda run: run.record.trainable_parameters), write=count)
        if s is not None
        else None
        for s in (gain, lora)
    ]
    status = f"{STATUS}; GPT-2 Large: deduced from the counts"
    row(
        "trained parameters", ("46K to 230K (GPT-2 Large)", "-"), trained, gain, lora, status=status
    )
    heads = [
        "what",
        "GAIN, published",
        "LoRA, published",
        "status",
        f"{gain.label}, ours",
        f"{lora.label if lora else 'lora'}, ours",
    ]
    return Table(
        tables.named("published", book, model),
        f"{model}: ours beside the published headline numbers",
        heads,
        rows,
        notes,
    )


def tokens(study: Study) -> str:
    """Training tokens of a stage, of all runs."""
    seen = {
        s.train.tokens
        for x in study.settings
        for run in x.runs.values()
        for s in run.record.stages
        if s.train is not None
    }
    return " to ".join(f"{n:,}" for n in sorted({min(seen), max(seen)})) if seen else "0"
