"""Ours beside what the GAIN paper's abstracts say (arXiv 2604.04516): headline numbers alone were
available, none of its tables."""

from __future__ import annotations

from collections.abc import Sequence

from gain_cl.paper.table import Entry, Row, Table, Value, count, of, percent
from gain_cl.paper.tables.main import parameters
from gain_cl.stats.format import counted
from gain_cl.studies import equal
from gain_cl.studies.study import Setting, Study, level

STATUS = "seen in an abstract"
EARLIER = ("improve by 7 to 13", "degrade by 18 to 36")
LEVELS = {  # metric -> what it is called, of GAIN and of LoRA as published
    "own_step": ("in-domain adaptation (own step %)", "about equal to LoRA", "reference"),
    "backward": ("earlier domains, since they were learned (backward %)", *EARLIER),
    "from_base": ("earlier domains, since the pretrained model (from base %)", *EARLIER),
    "accuracy:boolq": (
        "BoolQ after seven adaptations (ours: after the sequence), points",
        "-0.8 (Qwen2.5-7B; points or relative: not known)",
        "-14.9",
    ),
}
MATCHED = {  # method -> what is compared with it at equal own step, of GAIN as published
    "lora_replay": (
        "backward % minus LoRA with replay at equal own step",
        "equal, with no stored data",
    ),
    "ewc": ("backward % minus EWC at equal own step", "dominates its Pareto front"),
}


def build(study: Study) -> list[Table]:
    """Return nothing of a study without GAIN."""
    gains = [s for m, s in study.chosen.items() if m.startswith("gain")]
    if not gains:
        return []
    gain, lora = study.chosen.get("gain_ffn", gains[0]), study.chosen.get("lora")
    both = [s for s in (gain, lora) if s is not None]
    notes = [
        "Published: five models of 774M to 70B, eight domains, budgets and rates not known. "
        f"Ours: {study.model}, "
        f"{tokens(study)} training tokens a domain, {counted(len(study.blocks), 'block')}.",
        "Whether published changes are against the model just after it learned a domain or "
        "the pretrained one is not known: both are here.",
    ]

    rows = []

    def add(words: Sequence[str], values: Sequence[Entry], settings: Sequence[Setting]) -> None:
        rows.append(Row([*words, *values, None][:6], [r for s in settings for r in s.ids]))

    for metric, words in LEVELS.items():
        found = [of(metric, level(s, metric), blocks=len(s.runs)) for s in both]
        if metric != "accuracy:boolq" or found[0].shown != "-":
            add((*words, STATUS), found, both)
    for method, (text, said) in MATCHED.items():
        if method not in study.chosen:
            continue
        match = equal.match_skill(study, gain.method, method)
        if match.reason:
            notes.append(f"{text}: {match.reason}.")
        value = None if match.reason else percent(equal.interval_of(match))
        sides = study.of(gain.method) + study.of(method)
        add((text, said, "-", STATUS), [value, None], sides)
    status = f"{STATUS}; GPT-2 Large: deduced from the counts"
    what = ("trained parameters", "46K to 230K (GPT-2 Large)", "-", status)
    add(what, [Value(parameters(s), count) for s in both], both)
    heads = ["what", "GAIN, published", "LoRA, published", "status"]
    heads += [f"{gain.label}, ours", f"{lora.label if lora else 'lora'}, ours"]
    title = f"{study.model}: ours beside the published headline numbers"
    return [Table("published", title, heads, rows, notes)]


def tokens(study: Study) -> str:
    """Return the training tokens of a stage, of all runs."""
    seen = {s.train.tokens for run in study.runs for s in run.record.stages if s.train is not None}
    return " to ".join(f"{n:,}" for n in sorted({min(seen), max(seen)})) if seen else "0"
