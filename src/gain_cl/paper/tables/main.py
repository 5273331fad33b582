"""The main comparison: the chosen setting of each method, what it learned, what it forgot, what it
cost."""

from __future__ import annotations

from gain_cl.paper import tables
from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, count, of, plain
from gain_cl.studies import study as comparison
from gain_cl.studies import verdicts
from gain_cl.studies.experiments import Endpoint
from gain_cl.studies.study import Setting, Study

METRICS = {
    "own_step": "own step %",
    "learned": "learned %",
    "backward": "backward %",
    "backward_net": "backward net of controls %",
    "from_base": "from base %",
    "controls_from_base": "controls %",
}


def build(book: Book) -> list[Table]:
    return [_of(book, model, study) for model, study in book.studies.items()]


def _of(book: Book, model: str, study: Study) -> Table:
    settings = list(study.chosen.values())
    shown = [m for m in METRICS if any(comparison.level(s, m) is not None for s in settings)]
    tasks = [
        t
        for t in scored(study)
        if any(comparison.level(s, f"margin:{t}") is not None for s in settings)
    ]
    won = wins(study)
    bold = {(better, e.metric) for better, e in won}
    heads = ["method", "blocks", "trains", *(METRICS[m] for m in shown)]
    heads += [h for t in tasks for h in (f"{t} margin, nats", f"{t} accuracy, points")]
    heads += ["training min", "memory GB"]
    rows = []
    for s in settings:
        cells: list[Value | str | None] = [
            s.label,
            Value(len(s.runs), write=count),
            Value(parameters(s), write=count),
        ]
        for m in (*shown, *(m for t in tasks for m in (f"margin:{t}", f"accuracy:{t}"))):
            cells.append(of(m, comparison.level(s, m), (s.method, m) in bold, blocks=len(s.runs)))
        cells += [
            Value(minutes(s), write=plain(1)),
            Value(s.one(lambda run: run.record.peak_memory_bytes / 1e9), write=plain(2)),
        ]
        rows.append(Row(cells, book.ids(model, s.label)))
    over = (
        "documents of the one block"
        if len(study.blocks) == 1
        else "blocks and the documents they share"
    )
    notes = [
        f"Change of perplexity, mean over domains; below 0 is better. 95% intervals over {over}.",
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
    if tasks:
        blocks = " or ".join(str(n) for n in sorted(set(blocks_of(study, tasks))))
        where = f"in {blocks} of {len(study.blocks)} blocks"
        notes.append(
            f"Margin, accuracy: change from the pretrained model, {where}; above 0 is better. "
            "Intervals over items: tasks table."
        )
    return Table(
        tables.named("main", book, model),
        f"{model}: methods at their chosen settings",
        heads,
        rows,
        notes,
    )


def wins(study: Study) -> list[tuple[str, Endpoint]]:
    """Methods that a declared endpoint's test calls better than another one, at chosen settings."""
    judged = [
        j
        for j in verdicts.judge(study)
        if j.endpoint.at == "chosen" and j.verdict in ("better", "worse")
    ]
    return [
        (j.endpoint.of if j.verdict == "better" else j.endpoint.minus, j.endpoint)
        for j in judged
        if j.endpoint.minus is not None
    ]


def parameters(s: Setting) -> float:
    return s.one(lambda run: run.record.trainable_parameters)


def minutes(s: Setting) -> float:
    """Of training in a run, mean over blocks."""
    return s.one(
        lambda run: sum(x.train.seconds for x in run.record.stages if x.train is not None) / 60
    )


def blocks_of(study: Study, tasks: list[str]) -> list[int]:
    """In how many blocks each task was scored, by the chosen settings."""
    found = [comparison.level(s, f"margin:{t}") for s in study.chosen.values() for t in tasks]
    return [f.blocks for f in found if f is not None]


def scored(study: Study) -> list[str]:
    """Tasks that some run scored."""
    return list(
        dict.fromkeys(
            t
            for s in study.settings
            for run in s.runs.values()
            for x in run.record.stages
            for t in x.tasks
        )
    )
