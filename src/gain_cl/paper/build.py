"""Files of a book: tables, figures, and numbers to be quoted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from gain_cl.errors import DataError
from gain_cl.measure.record import Run
from gain_cl.paper import figures, tables
from gain_cl.paper.figures import style
from gain_cl.paper.gather import Book
from gain_cl.paper.table import (
    GAP,
    Value,
    as_csv,
    change_of,
    count,
    latex,
    markdown,
    of,
    p_value,
    plain,
    written,
)
from gain_cl.paper.tables import domains, main
from gain_cl.runs import heatmap
from gain_cl.stats.format import change
from gain_cl.stats.matrix import summary
from gain_cl.studies import verdicts
from gain_cl.studies.study import Study, difference, level, loss_matrix
from gain_cl.system import files

Files = dict[str, bytes]
"""Name below the folder -> content."""


def made_tables(book: Book) -> Files:
    """Return each table as Markdown, LaTeX and CSV; tidy.csv, every number of every run;
    numbers.csv and numbers.tex, those that a text quotes, by name; records.csv, the records that
    all of it is from."""
    found: dict[str, str] = {}
    for t in tables.build_tables(book):
        writers = {"md": markdown, "tex": latex, "csv": as_csv}
        found |= {f"{t.name}.{kind}": write(t) for kind, write in writers.items()}
    quoted = numbers(book)
    found["tidy.csv"] = written([LONG.split(), *long_rows(book)])
    found["numbers.csv"] = written([["name", "value"], *quoted.items()])
    found["numbers.tex"] = macros(book.experiment.name, quoted)
    if book.gaps:
        found["PARTIAL.txt"] = "".join(f"{GAP}{gap}\n" for gap in book.gaps)
    records = [RECORDS.split()]
    for c in book.printed:
        run = book.runs[c.run_id]
        about = [c.run_id, c.model, c.label, str(c.block), commit(run)]
        records.append([*about, files.sha256(run.path)])
    found["records.csv"] = written(records)
    return {name: text.encode() for name, text in found.items()}


def made_figures(book: Book) -> Files:
    """Return each figure as PDF and PNG, and captions.md."""
    found: Files = {}
    captions = [f"- {GAP}{gap}" for gap in book.gaps]
    for name, caption, figure in (*drawn(book), *heat_maps(book)):
        found |= {f"{name}.{kind}": style.written(figure, kind) for kind in ("pdf", "png")}
        captions.append(f"- `{name}`: {caption}")
    found["captions.md"] = ("\n".join(captions) + "\n").encode()
    return found


def made_report(book: Book) -> Files:
    """Return the page."""
    from gain_cl.paper import report

    return {"index.html": report.page(book)}


def drawn(book: Book) -> Iterator[tuple[str, str, Figure]]:
    """Yield (name, caption, figure) of all there is something to draw for."""
    for model, study in book.studies.items():
        for name, module in figures.ALL.items():
            figure = module.build(study)
            if figure is not None:
                named = name if len(book.studies) == 1 else f"{name}-{model}"
                yield named, module.CAPTION, style.partial(figure, len(book.gaps))


def heat_maps(book: Book) -> Iterator[tuple[str, str, Figure]]:
    """Yield the same of the matrix of each run of a chosen setting."""
    caption = "perplexity, its colour the change from the pretrained model."
    for study in book.studies.values():
        for s, run in study.chosen_runs:
            figure = heatmap.draw_matrix(run, s.label)
            partial = style.partial(figure, len(book.gaps))
            yield f"matrix-{run.record.run_id}", f"{s.label}: {caption}", partial


TABLES = "main endpoints settings skill domains blocks tasks models parameters published"
OURS = re.compile(
    rf"({'|'.join([*TABLES.split(), *figures.ALL])})(-.+)?\.(md|tex|csv|pdf|png)|PARTIAL\.txt|"
    r"matrix-.+-s\d+-[0-9a-f]{10}\.(md|tex|csv|pdf|png)"
)
"""Names of files that are not made of every book."""


def replace_files(folder: Path, made: Files) -> None:
    """Write the files, and remove those that were made before and are no longer. Files of other
    names in the folder stay."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in made and OURS.fullmatch(path.name):
            path.unlink()
    files.write_all({folder / name: content for name, content in made.items()})


# --- numbers --------------------------------------------------------------------------------------

LONG = "experiment model method setting block seed run stage after kind name metric value"
RECORDS = "run model setting block commit sha256"
"""Heads of tidy.csv and records.csv."""


def long_rows(book: Book) -> Iterator[list[object]]:
    """Yield a row for every number: sums and losses of each domain, counts of each task, training,
    summaries of the run, its cost."""
    for c in book.printed:
        run = book.runs[c.run_id]
        about = [book.experiment.name, c.model, c.method, c.label, c.block]
        about += [run.record.seed, c.run_id]
        for place, values in _numbers_of(run):
            for metric, x in values.items():
                yield [*about, *place, metric, "" if math.isnan(x) else f"{x:.12g}"]


def _numbers_of(run: Run) -> Iterator[tuple[list[object], dict[str, float]]]:
    """Yield (stage, after, kind, name) and the numbers there."""
    r = run.record
    for s in r.stages:
        here: list[object] = [s.index, s.domain or ""]
        for domain, d in s.domains.items():
            kind = "control" if domain in r.controls else "domain"
            sums = "nll_nats tokens bytes documents loss_nats perplexity bits_per_byte"
            yield [*here, kind, domain], _facts(d, sums)
        for task, t in s.tasks.items():
            counts = _facts(t, "items correct correct_norm")
            counts = {name: x for name, x in counts.items() if x is not None}
            yield [*here, "task", task], counts | t.metrics
        if s.train is not None:
            yield [*here, "training", here[1]], _facts(s.train, "steps tokens seconds lr")
    for metric, e in summary(loss_matrix(run)).items():
        found = {"nats": e.value, "nats_low_t": e.low, "nats_high_t": e.high}
        found["percent"] = change(e.value)
        yield ["", "", "summary", metric], {k: float(f"{x:.6g}") for k, x in found.items()}
    cost = {"trains": r.trainable_parameters, "parameters": r.total_parameters}
    yield ["", "", "cost", "run"], cost | _facts(r, "peak_memory_bytes")


def _facts(of: object, names: str) -> dict[str, float]:
    return {name: getattr(of, name) for name in names.split()}


def numbers(book: Book) -> dict[str, str]:
    """Return what a text may quote, by name: METHOD METRIC [low|high] of chosen settings, METHOD
    minus METHOD METRIC, and of endpoints their value, p and verdict; as the tables show it. Names
    begin with the model where there are several."""
    found: dict[str, str] = {}
    for model, study in book.studies.items():
        start = "" if len(book.studies) == 1 else f"{model} "
        for name, v in _quoted(study):
            if isinstance(v, str):
                found[f"{start}{name}"] = v
                continue
            values = {"": v.value, " low": v.low, " high": v.high}
            shown = ((end, x) for end, x in values.items() if not math.isnan(x))
            found |= {f"{start}{name}{end}": v.write(x) for end, x in shown}
    if book.gaps:
        found["gaps"] = str(len(book.gaps))
    return found


def _quoted(study: Study) -> Iterator[tuple[str, Value | str]]:
    yield "blocks", str(len(study.blocks))
    metrics = [*main.METRICS, *main.task_metrics(study)]
    for method, s in study.chosen.items():
        for m in metrics:
            yield f"{method} {m}", of(m, level(s, m), blocks=len(s.runs))
        for d in domains.domain_names(study):
            yield f"{method} from_base of {d}", of("from_base", domains.from_base(s, d))
        yield f"{method} trains", Value(main.parameters(s), count)
        yield f"{method} minutes", Value(main.minutes(s), plain(1))
        for block in s.runs:
            for m in ("own_step", "backward"):
                yield f"{method} {m} block {block[0]}", change_of(s.value(m, block))
    # every two: the reference second, else the one that is named later first
    ordered = sorted(study.chosen.values(), key=lambda s: s.method != study.reference)
    pairs = [(a, b) for i, a in enumerate(ordered) for b in ordered[:i]]
    for a, b in sorted(pairs, key=lambda pair: pair[1].method != study.reference):
        for m in metrics:
            shared = len(a.runs.keys() & b.runs.keys())
            less = of(m, difference(a, b, m), blocks=shared)
            yield f"{a.method} minus {b.method} {m}", less
    for j in verdicts.judge(study):
        name = f"endpoint {j.endpoint.name}"
        yield name, of(j.endpoint.metric, j.compared)
        yield f"{name} p", Value(j.tests.difference, p_value)
        yield f"{name} p equal", Value(j.tests.equivalence, p_value)
        yield f"{name} verdict", j.verdict


_DIGITS = "Zero One Two Three Four Five Six Seven Eight Nine"


def macros(experiment: str, quoted: dict[str, str]) -> str:
    """Return LaTeX commands: \\studyGainFfnOwnStep is the number named "gain_ffn own_step" of the
    experiment study."""
    lines, taken = [], dict[str, str]()
    for name, text in quoted.items():
        words = re.findall(r"[A-Za-z]+|\d", f"{experiment} {name}")
        command = "".join(
            _DIGITS.split()[int(w)] if w.isdigit() else w[0].upper() + w[1:] for w in words
        )
        command = command[0].lower() + command[1:]
        if taken.setdefault(command, name) != name:
            raise DataError(
                f"two numbers would be \\{command}: {taken[command]!r} and {name!r}",
                "numbers.tex",
                "rename one",
            )
        shown = f"\\ensuremath{{{text}}}" if re.fullmatch(r"[-+<]?[\d.,]+", text) else text
        lines.append(f"\\newcommand{{\\{command}}}{{{shown.replace(',', '{,}')}}} % {name}")
    return "\n".join(lines) + "\n"


def commit(run: Run) -> str:
    """Return the commit that a run was made with."""
    p = run.record.provenance
    return f"{p.get('commit') or 'not known'}{' with changes' if p.get('dirty') else ''}"
