"""Files of a book: tables, figures, and numbers to be quoted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from gain_cl.errors import DataError
from gain_cl.measure.record import Run
from gain_cl.paper import figures, tables
from gain_cl.paper.figures import style
from gain_cl.paper.gather import Book
from gain_cl.paper.table import GAP, as_csv, change_of, latex, markdown, of, p_value, written
from gain_cl.runs import heatmap
from gain_cl.stats.format import change
from gain_cl.stats.matrix import summary
from gain_cl.studies import verdicts
from gain_cl.studies.study import Compared, Setting, Study, difference, level, loss_matrix
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
    found["tidy.csv"] = written([LONG, *long_rows(book)])
    found["numbers.csv"] = written([["name", "value"], *quoted.items()])
    found["numbers.tex"] = macros(book.experiment.name, quoted)
    if book.gaps:
        found["PARTIAL.txt"] = "".join(f"{GAP}{gap}\n" for gap in book.gaps)
    records = [["run", "model", "setting", "block", "commit", "sha256"]]
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
        found |= {f"{name}.pdf": style.vector(figure), f"{name}.png": style.png(figure)}
        captions.append(f"- `{name}`: {caption}")
    found["captions.md"] = ("\n".join(captions) + "\n").encode()
    return found


def made_report(book: Book) -> Files:
    """Return the page."""
    from gain_cl.paper import report

    return {"index.html": report.page(book)}


def drawn(book: Book) -> Iterable[tuple[str, str, Figure]]:
    """Yield (name, caption, figure) of all there is something to draw for."""
    for model, study in book.studies.items():
        for name, module in figures.ALL.items():
            figure = module.build(study)
            if figure is not None:
                named = name if len(book.studies) == 1 else f"{name}-{model}"
                yield named, module.CAPTION, style.partial(figure, len(book.gaps))


def heat_maps(book: Book) -> Iterable[tuple[str, str, Figure]]:
    """Yield the same of the matrix of each run of a chosen setting."""
    caption = "perplexity, its colour the change from the pretrained model."
    for study in book.studies.values():
        for s in study.chosen.values():
            for run in s.runs.values():
                figure = heatmap.draw_matrix(run, s.label, style.DOUBLE)
                name = f"matrix-{run.record.run_id}"
                yield name, f"{s.label}: {caption}", style.partial(figure, len(book.gaps))


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

LONG = [
    "experiment",
    "model",
    "method",
    "setting",
    "block",
    "seed",
    "run",
    "stage",
    "after",
    "kind",
    "name",
    "metric",
    "value",
]


def long_rows(book: Book) -> list[list[object]]:
    """Return a row for every number: sums and losses of each domain, counts of each task, training,
    summaries of the run, its cost."""
    rows: list[list[object]] = []
    for c in book.printed:
        run = book.runs[c.run_id]
        about = [book.experiment.name, c.model, c.method, c.label, c.block]
        about += [run.record.seed, c.run_id]
        for place, values in _numbers_of(run):
            known = {k: "" if math.isnan(x) else f"{x:.12g}" for k, x in values.items()}
            rows += [[*about, *place, metric, text] for metric, text in known.items()]
    return rows


def _numbers_of(run: Run) -> Iterable[tuple[list[object], dict[str, float]]]:
    """Yield (stage, after, kind, name) and the numbers there."""
    r = run.record
    for s in r.stages:
        here: list[object] = [s.index, s.domain or ""]
        for domain, d in s.domains.items():
            kind = "control" if domain in r.controls else "domain"
            sums = "nll_nats tokens bytes documents loss_nats perplexity bits_per_byte"
            yield [*here, kind, domain], _facts(d, sums)
        for task, t in s.tasks.items():
            yield [*here, "task", task], _facts(t, "items correct correct_norm")
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
        found |= {f"{start}{name}": text for name, text in _numbers(study).items()}
    if book.gaps:
        found["gaps"] = str(len(book.gaps))
    return found


def _numbers(study: Study) -> dict[str, str]:
    found: dict[str, str] = {"blocks": str(len(study.blocks))}
    scored = tables.main.scored(study)
    metrics = [*tables.main.METRICS, *(f"{m}:{t}" for t in scored for m in ("margin", "accuracy"))]
    for method, s in study.chosen.items():
        for metric in metrics:
            found |= _quoted(f"{method} {metric}", metric, level(s, metric), len(s.runs))
        for d in tables.domains.domain_names(study):
            change = tables.domains.from_base(s, d)
            found |= _quoted(f"{method} from_base of {d}", "from_base", change)
        found[f"{method} trains"] = f"{tables.main.parameters(s):,.0f}"
        found[f"{method} minutes"] = f"{tables.main.minutes(s):.1f}"
        for block in s.runs:
            for metric in ("own_step", "backward"):
                if value := change_of(s.value(metric, block)):
                    found[f"{method} {metric} block {block[0]}"] = value.shown
    for a, b in _pairs(study):
        for metric in metrics:
            name, shared = (
                f"{a.method} minus {b.method} {metric}",
                len(a.runs.keys() & b.runs.keys()),
            )
            found |= _quoted(name, metric, difference(a, b, metric), shared)
    for j in verdicts.judge(study):
        name = f"endpoint {j.endpoint.name}"
        found |= _quoted(name, j.endpoint.metric, j.compared)
        found |= {
            f"{name} {k}": p_value(p)
            for k, p in (("p", j.tests.difference), ("p equal", j.tests.equivalence))
            if not math.isnan(p)
        }
        found[f"{name} verdict"] = j.verdict
    return found


def _quoted(name: str, metric: str, found: Compared | None, blocks: int = 0) -> dict[str, str]:
    """Return a value and the ends of its interval, by name."""
    v = of(metric, found, blocks=blocks)
    if v is None:
        return {}
    ends = {} if math.isnan(v.low) else {f"{name} low": v.low, f"{name} high": v.high}
    return {k: v.write(x) for k, x in {name: v.value, **ends}.items()}


def _pairs(study: Study) -> list[tuple[Setting, Setting]]:
    """Return every two chosen settings: the reference second, else the one that is named later
    first."""
    ordered = sorted(study.chosen.values(), key=lambda s: s.method != study.reference)
    pairs = [(a, b) for i, a in enumerate(ordered) for b in ordered[:i]]
    return sorted(pairs, key=lambda pair: pair[1].method != study.reference)


_DIGITS = ["Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"]


def macros(experiment: str, quoted: dict[str, str]) -> str:
    """Return LaTeX commands: \\studyGainFfnOwnStep is the number named "gain_ffn own_step" of the
    experiment study."""
    lines, taken = [], dict[str, str]()
    for name, text in quoted.items():
        words = re.findall(r"[A-Za-z]+|\d", f"{experiment} {name}")
        command = "".join(_DIGITS[int(w)] if w.isdigit() else w[0].upper() + w[1:] for w in words)
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
