"""The main comparison: the chosen setting of each method, what it learned, what it forgot, what it
cost."""

from __future__ import annotations

from gain_cl.paper.table import Row, Table, Value, count, of, over_units, plain
from gain_cl.studies import verdicts
from gain_cl.studies.experiments import Endpoint
from gain_cl.studies.study import Setting, Study, level

METRICS = {
    "own_step": "own step %",
    "learned": "learned %",
    "backward": "backward %",
    "backward_net": "backward net of controls %",
    "from_base": "from base %",
    "controls_from_base": "controls %",
}


def build(study: Study) -> list[Table]:
    """Return a row for each method at its chosen setting."""
    heads = METRICS | {
        f"{kind}:{t}": f"{t} {kind}, {unit}"
        for t in scored(study)
        for kind, unit in (("margin", "nats"), ("accuracy", "points"))
    }
    chosen = study.chosen.values()
    levels = {m: [level(s, m) for s in chosen] for m in heads}
    shown = [m for m in heads if any(levels[m])]
    won = wins(study)
    bold = {(better, e.metric) for better, e in won}
    rows = []
    for i, s in enumerate(chosen):
        numbers = [Value(x, write=count) for x in (len(s.runs), parameters(s))]
        cells = [of(m, levels[m][i], (s.method, m) in bold, blocks=len(s.runs)) for m in shown]
        memory = s.one(lambda run: run.record.peak_memory_bytes / 1e9)
        cost = [Value(minutes(s), write=plain(1)), Value(memory, write=plain(2))]
        rows.append(Row([s.label, *numbers, *cells, *cost], s.ids))
    notes = [
        "Change of perplexity, mean over domains; below 0 is better. 95% intervals over "
        f"{over_units(study)}."
    ]
    if "learned" in shown:
        notes.append(
            "Own step: from just before a domain's stage to its end, relearning included; "
            "learned: from the pretrained model on."
        )
    for better, e in won:
        notes.append(
            f"Bold: {better} is better in {e.metric} than {e.minus if better == e.of else e.of}, "
            f"by the test of {e.name}."
        )
    if blocks := sorted({c.blocks for m in shown if m not in METRICS for c in levels[m] if c}):
        where = f"in {' or '.join(map(str, blocks))} of {len(study.blocks)} blocks"
        notes.append(
            f"Margin, accuracy: change from the pretrained model, {where}; above 0 is better. "
            "Intervals over items: tasks table."
        )
    columns = ["method", "blocks", "trains", *(heads[m] for m in shown)]
    columns += ["training min", "memory GB"]
    title = f"{study.model}: methods at their chosen settings"
    return [Table("main", title, columns, rows, notes)]


def wins(study: Study) -> list[tuple[str, Endpoint]]:
    """Return the methods that a declared endpoint's test calls better than another one, at chosen
    settings."""
    return [
        (e.of if j.verdict == "better" else e.minus, e)
        for j in verdicts.judge(study)
        if (e := j.endpoint).minus and e.at == "chosen" and j.verdict in ("better", "worse")
    ]


def parameters(s: Setting) -> float:
    """Return how many parameters a setting trains."""
    return s.one(lambda run: run.record.trainable_parameters)


def minutes(s: Setting) -> float:
    """Return the minutes of training in a run, mean over blocks."""
    return s.one(lambda run: sum(x.train.seconds for x in run.record.stages if x.train) / 60)


def scored(study: Study) -> list[str]:
    """Return the tasks that some run scored."""
    return list(dict.fromkeys(t for run in study.runs for x in run.record.stages for t in x.tasks))
