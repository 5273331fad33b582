"""Files of a book: tables, figures, numbers to be quoted; and what of it is out of date."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gain_cl.errors import DataError
from gain_cl.measure import provenance
from gain_cl.measure.record import items_path
from gain_cl.paper import figures, tables
from gain_cl.paper.figures import style
from gain_cl.paper.gather import Book
from gain_cl.paper.table import GAP, as_csv, latex, markdown, of, p_value, signed, written
from gain_cl.runs import heatmap
from gain_cl.stats.format import change, counted
from gain_cl.stats.matrix import summary
from gain_cl.studies import study as comparison
from gain_cl.studies import verdicts
from gain_cl.studies.study import Setting, Study
from gain_cl.system import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Files = dict[str, bytes]
"""Name below the folder -> content."""


def made_tables(book: Book) -> Files:
    """Each table as Markdown, LaTeX and CSV; tidy.csv, every number of every run; numbers.csv and
    numbers.tex, those that a text quotes, by name; records.csv, the records that all of it is
    from."""
    found: dict[str, str] = {}
    for t in tables.build(book):
        found |= {
            f"{t.name}.md": markdown(t),
            f"{t.name}.tex": latex(t),
            f"{t.name}.csv": as_csv(t),
        }
    quoted = numbers(book)
    found["tidy.csv"] = written([TIDY, *tidy(book)])
    found["numbers.csv"] = written([["name", "value"], *quoted.items()])
    found["numbers.tex"] = macros(book.experiment.name, quoted)
    if book.gaps:
        found["PARTIAL.txt"] = "".join(f"{GAP}{gap}\n" for gap in book.gaps)
    found["records.csv"] = written(
        [["run", "model", "setting", "block", "commit", "sha256"], *_records(book)]
    )
    return {name: text.encode() for name, text in found.items()}


def made_figures(book: Book) -> Files:
    """Each figure as PDF and PNG, and captions.md."""
    found: Files = {}
    captions = [f"- {GAP}{gap}" for gap in book.gaps]
    for name, caption, figure in (*drawn(book), *heat_maps(book)):
        found |= {f"{name}.pdf": style.vector(figure), f"{name}.png": style.png(figure)}
        captions.append(f"- `{name}`: {caption}")
    found["captions.md"] = ("\n".join(captions) + "\n").encode()
    return found


def drawn(book: Book) -> Iterable[tuple[str, str, Figure]]:
    """(name, caption, figure) of all there is something to draw for."""
    for model, study in book.studies.items():
        for name, module in figures.ALL.items():
            figure = module.build(study, book.results) if name == "gains" else module.build(study)
            if figure is not None:
                yield tables.named(name, book, model), module.CAPTION, _marked(figure, book)


def heat_maps(book: Book) -> Iterable[tuple[str, str, Figure]]:
    """The same of the matrix of each run of a chosen setting."""
    caption = "perplexity, its colour the change from the pretrained model."
    for study in book.studies.values():
        for s in study.chosen.values():
            for run in s.runs.values():
                yield (
                    f"matrix-{run.record.run_id}",
                    f"{s.label}: {caption}",
                    _marked(heatmap.build(run, s.label, style.DOUBLE), book),
                )


def _marked(figure: Figure, book: Book) -> Figure:
    if book.gaps:
        style.partial(figure, counted(len(book.gaps), "gap"))
    return figure


# --- numbers --------------------------------------------------------------------------------------

TIDY = [
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


def tidy(book: Book) -> list[list[object]]:
    """A row for every number: sums and losses of each domain, counts of each task, training,
    summaries of the run, its cost."""
    rows: list[list[object]] = []
    for c in book.cells:
        if c.run_id not in book.runs:
            continue
        run = book.runs[c.run_id]
        r = run.record
        about = [book.experiment.name, c.model, c.method, c.label, c.block, r.seed, r.run_id]

        def add(place: list[object], values: dict[str, float], about: list[object] = about) -> None:
            rows.extend([*about, *place, metric, _exact(value)] for metric, value in values.items())

        for s in r.stages:
            after = s.domain or ""
            for domain, d in s.domains.items():
                kind = "control" if domain in r.controls else "domain"
                sums: dict[str, float] = {
                    "nll_nats": d.nll_nats,
                    "tokens": d.tokens,
                    "bytes": d.bytes,
                    "documents": d.documents,
                }
                ratios = {
                    "loss_nats": d.loss_nats,
                    "perplexity": d.perplexity,
                    "bits_per_byte": d.bits_per_byte,
                }
                add([s.index, after, kind, domain], sums | ratios)
            for task, t in s.tasks.items():
                add(
                    [s.index, after, "task", task],
                    {"items": t.items, "correct": t.correct, "correct_norm": t.correct_norm},
                )
            if (x := s.train) is not None:
                add(
                    [s.index, after, "training", after],
                    {"steps": x.steps, "tokens": x.tokens, "seconds": x.seconds, "lr": x.lr},
                )
        for metric, e in summary(comparison.loss_matrix(run)).items():
            found = {
                "nats": e.value,
                "nats_low_t": e.low,
                "nats_high_t": e.high,
                "percent": change(e.value),
            }
            add(["", "", "summary", metric], {k: _short(x) for k, x in found.items()})
        cost = {
            "trains": r.trainable_parameters,
            "parameters": r.total_parameters,
            "peak_memory_bytes": r.peak_memory_bytes,
        }
        add(["", "", "cost", "run"], dict(cost))
    return rows


def _exact(x: float) -> str:
    return "" if isinstance(x, float) and math.isnan(x) else f"{x:.12g}"


def _short(x: float) -> float:
    return float(f"{x:.6g}")


def numbers(book: Book) -> dict[str, str]:
    """What a text may quote, by name: METHOD METRIC [low|high] of chosen settings, METHOD minus
    METHOD METRIC, and of endpoints their value, p and verdict; as the tables show it. Names begin
    with the model where there are several."""
    found: dict[str, str] = {}
    for model, study in book.studies.items():
        start = "" if len(book.models) == 1 else f"{model} "
        found |= {f"{start}{name}": text for name, text in _numbers(study).items()}
    if book.gaps:
        found["gaps"] = str(len(book.gaps))
    return found


def _numbers(study: Study) -> dict[str, str]:
    found: dict[str, str] = {"blocks": str(len(study.blocks))}
    metrics = [
        *tables.main.METRICS,
        *(f"{m}:{t}" for t in tables.main.scored(study) for m in ("margin", "accuracy")),
    ]

    def add(name: str, metric: str, compared: comparison.Compared | None, blocks: int = 0) -> None:
        value = of(metric, compared, blocks=blocks)
        if value is not None:
            found[name] = value.write(value.value)
            if not math.isnan(value.low):
                found.update(
                    {f"{name} low": value.write(value.low), f"{name} high": value.write(value.high)}
                )

    for method, s in study.chosen.items():
        for metric in metrics:
            add(f"{method} {metric}", metric, comparison.level(s, metric), len(s.runs))
        for d in tables.domains.names(study):
            add(f"{method} from_base of {d}", "from_base", tables.domains.from_base(s, d))
        found[f"{method} trains"] = f"{tables.main.parameters(s):,.0f}"
        found[f"{method} minutes"] = f"{tables.main.minutes(s):.1f}"
        for block in study.blocks:
            if block in s.runs:
                values = {metric: s.value(metric, block) for metric in ("own_step", "backward")}
                found |= {
                    f"{method} {m} block {block[0]}": signed(change(x))
                    for m, x in values.items()
                    if not math.isnan(x)
                }
    for a, b in _pairs(study):
        for metric in metrics:
            shared = len(a.runs.keys() & b.runs.keys())
            add(
                f"{a.method} minus {b.method} {metric}",
                metric,
                comparison.difference(a, b, metric),
                shared,
            )
    for j in verdicts.judge(study):
        name = f"endpoint {j.endpoint.name}"
        add(name, j.endpoint.metric, j.compared)
        found |= {
            f"{name} {k}": p_value(p)
            for k, p in (("p", j.tests.difference), ("p equal", j.tests.equivalence))
            if not math.isnan(p)
        }
        found[f"{name} verdict"] = j.verdict
    return found


def _pairs(study: Study) -> list[tuple[Setting, Setting]]:
    """Every two chosen settings: the reference second, else the one that is named later first."""
    settings, reference = list(study.chosen.values()), study.chosen.get(study.reference)
    others = [s for s in settings if s is not reference]
    return [(s, reference) for s in others if reference is not None] + [
        (a, b) for i, a in enumerate(others) for b in others[:i]
    ]


_DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def macros(experiment: str, quoted: dict[str, str]) -> str:
    """LaTeX commands: \\studyGainFfnOwnStep is the number named "gain_ffn own_step" of the
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


def _records(book: Book) -> list[list[object]]:
    found: list[list[object]] = []
    for c in book.cells:
        if c.run_id in book.runs:
            run = book.runs[c.run_id]
            p = run.record.provenance
            commit = f"{p.get('commit') or 'not known'}{' with changes' if p.get('dirty') else ''}"
            found.append([c.run_id, c.model, c.label, c.block, commit, files.sha256(run.path)])
    return found


OF_A_RUN = re.compile(r"matrix-.+-s\d+-[0-9a-f]{10}\.(md|tex|csv|pdf|png)")


# --- out of date or not ---------------------------------------------------------------------------


def inputs(book: Book) -> str:
    """A hash of all that the files depend on: the experiment, the records and their values, what
    was diagnosed, this program."""
    import matplotlib
    import scipy

    digest = hashlib.sha256()
    page = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    versions = [module.__version__ for module in (matplotlib, np, scipy)]
    for part in (
        book.experiment.model_dump_json(),
        provenance.code(),
        page,
        *versions,
        *book.gaps,
        *book.words,
    ):
        digest.update(part.encode())
    for run_id, run in sorted(book.runs.items()):
        for path in (
            run.path,
            items_path(run.path),
            book.results / "diagnostics" / f"{run_id}.json",
        ):
            digest.update(f"{path.name} {files.sha256(path) if path.exists() else ''}".encode())
    return digest.hexdigest()


def fresh(folder: Path, stamp: Path, made_of: str) -> bool:
    """Whether the folder holds what was made of these inputs, unchanged."""
    try:
        told = json.loads(stamp.read_bytes())
        return told["inputs"] == made_of and all(
            files.sha256(folder / name) == h for name, h in told["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def replace(folder: Path, made: Files, stamp: Path, made_of: str) -> None:
    """Write the files, remove those made before that are no longer made, and note what they were
    made of."""
    try:
        before = set(json.loads(stamp.read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        before = {p.name for p in folder.glob("matrix-*") if OF_A_RUN.fullmatch(p.name)} | {
            "PARTIAL.txt"
        }  # made elsewhere
    for name in before - made.keys():
        (folder / name).unlink(missing_ok=True)
    files.write_all({folder / name: content for name, content in made.items()})
    told = {
        "inputs": made_of,
        "files": {name: files.sha256(folder / name) for name in sorted(made)},
    }
    files.write_bytes(stamp, (json.dumps(told, indent=1, allow_nan=False) + "\n").encode())
