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
    chosen, won = study.chosen.values(), wins(study)
    heads, levels = METRICS | task_metrics(study), {}
    for m in heads:
        found = [level(s, m) for s in chosen]
        if any(c.blocks for c in found):
            levels[m] = found
    bold = {(better, e.metric) for better, e in won}
    rows = []
    for i, s in enumerate(chosen):
        cells = (of(m, found[i], (s.method, m) in bold, len(s.runs)) for m, found in levels.items())
        memory = s.one(lambda run: run.record.peak_memory_bytes / 1e9)
        cost = [Value(minutes(s), plain(1)), Value(memory, plain(2))]
        rows.append(Row([s.label, *sizes(s), *cells, *cost], s.ids))
    over = f"95% intervals over {over_units(study)}."
    notes = [f"Change of perplexity, mean over domains; below 0 is better. {over}"]
    if "learned" in levels:
        notes.append(
            "Own step: from just before a domain's stage to its end, relearning included; "
            "learned: from the pretrained model on."
        )
    for better, e in won:
        other = e.minus if better == e.of else e.of
        said = f"{better} is better in {e.metric} than {other}, by the test of {e.name}."
        notes.append(f"Bold: {said}")
    if blocks := sorted({c.blocks for m in levels if ":" in m for c in levels[m]} - {0}):
        where = f"in {' or '.join(map(str, blocks))} of {len(study.blocks)} blocks"
        notes.append(
            f"Margin, accuracy: change from the pretrained model, {where}; above 0 is better. "
            "Intervals over items: tasks table."
        )
    columns = ["method", "blocks", "trains", *(heads[m] for m in levels)]
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


def sizes(s: Setting) -> list[Value]:
    """Return how many blocks a setting has, and how many parameters it trains."""
    return [Value(x, count) for x in (len(s.runs), parameters(s))]


def parameters(s: Setting) -> float:
    """Return how many parameters a setting trains."""
    return s.one(lambda run: run.record.trainable_parameters)


def minutes(s: Setting) -> float:
    """Return the minutes of training in a run, mean over blocks."""
    return s.one(lambda run: sum(x.train.seconds for x in run.record.stages if x.train) / 60)


def scored(study: Study) -> list[str]:
    """Return the tasks whose right answers some run counted."""
    stages = (stage for run in study.runs for stage in run.record.stages)
    counted = (t for x in stages for t, score in x.tasks.items() if score.correct is not None)
    return list(dict.fromkeys(counted))


def task_metrics(study: Study) -> dict[str, str]:
    """Return the metrics of the tasks that some run scored, and what they are called."""
    units = {"margin": "nats", "accuracy": "points"}
    return {f"{k}:{t}": f"{t} {k}, {unit}" for t in scored(study) for k, unit in units.items()}
