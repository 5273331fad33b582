"""The main comparison: the chosen setting of each method, what it learned, what it forgot, what it cost."""

from __future__ import annotations

from gain_cl import comparison
from gain_cl.comparison import Setting, Study
from gain_cl.paper import tables
from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, count, of, plain

METRICS = {
    "own_step": "own step %",
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
    tasks = [t for t in scored(study) if any(comparison.level(s, f"margin:{t}") is not None for s in settings)]
    bold = bolded(study)
    heads = ["method", "blocks", "trains", *(METRICS[m] for m in shown)]
    heads += [h for t in tasks for h in (f"{t} margin, nats", f"{t} accuracy, points")]
    heads += ["training min", "memory GB"]
    rows = []
    for s in settings:
        cells: list[Value | str | None] = [s.label, Value(len(s.runs), write=count), Value(parameters(s), write=count)]
        cells += [of(m, comparison.level(s, m), (s.method, m) in bold) for m in shown]
        cells += [of(m, comparison.level(s, m), (s.method, m) in bold) for t in tasks for m in (f"margin:{t}", f"accuracy:{t}")]
        cells += [Value(minutes(s), write=plain(1)), Value(s.one(lambda run: run.record.peak_memory_bytes / 1e9), write=plain(2))]
        rows.append(Row(cells, book.ids(model, s.label)))
    over = "documents of the one block" if len(study.blocks) == 1 else "blocks and the documents they share"
    notes = [
        f"Change of perplexity, mean over domains; below 0 is better. 95% intervals over {over}.",
        "Bold: better by a declared endpoint's test (endpoints table).",
    ]
    if tasks:
        notes.append("Margin, accuracy: change from the pretrained model, in the blocks that scored the task; above 0 is better.")
    return Table(tables.named("main", book, model), f"{model}: methods at their chosen settings", heads, rows, notes + gaps(book))


def bolded(study: Study) -> set[tuple[str, str]]:
    """(method, metric) that a declared endpoint's test calls better, at chosen settings."""
    found = set()
    for j in comparison.judge(study):
        e = j.endpoint
        if e.at == "chosen" and j.verdict in ("better", "worse"):
            winner = e.of if j.verdict == "better" else e.minus
            if winner is not None:
                found.add((winner, e.metric))
    return found


def parameters(s: Setting) -> float:
    return s.one(lambda run: run.record.trainable_parameters)


def minutes(s: Setting) -> float:
    """Of training in a run, mean over blocks."""
    return s.one(lambda run: sum(x.train.seconds for x in run.record.stages if x.train is not None) / 60)


def gaps(book: Book) -> list[str]:
    return [f"GAP: {gap}" for gap in book.gaps]


def scored(study: Study) -> list[str]:
    """Tasks that some run scored."""
    return list(dict.fromkeys(t for s in study.settings for run in s.runs.values() for x in run.record.stages for t in x.tasks))
