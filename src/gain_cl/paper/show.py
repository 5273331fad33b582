"""A finished run in the terminal: its matrix, its summary with intervals, its tasks, its cost and
its files.

Everything is derived from the record and its per-item values. Readable without colour, at any
width. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gain_cl.errors import DataError, printable
from gain_cl.measure.record import Run, RunRecord, items_path
from gain_cl.stats import answers, format
from gain_cl.stats.inference import mcnemar
from gain_cl.stats.matrix import Estimate, LossMatrix, forgetting_by_age, published, summary

STUDY_TOKENS = 500_000
"""Training tokens per domain from which a run can be part of a study (shared/paper.md); less is a
demonstration."""

DEMONSTRATION = "demonstration: too small to decide between methods"

ROWS = {  # metric of matrix.METRICS -> what it is called, what it compares
    "own_step": ("own step", "before to after the own stage"),
    "zero_shot": ("zero-shot part", "pretrained to before the own stage"),
    "learned": ("learned", "pretrained to after the own stage"),
    "backward": ("backward change", "after the own stage to the end"),
    "backward_net": ("  net of controls", "less the controls' change meanwhile"),
    "from_base": ("change from base", "pretrained to the end"),
    "controls_from_base": ("controls", "never trained: pretrained to the end"),
}

PLAIN_WIDTH = 120  # where the output is no terminal and COLUMNS says nothing

LEVELS = ("▁▂▃▄▅▆▇█", "12345678")
"""Heights of a sparkline from lowest to highest, and what stands for them where the output cannot
encode them."""


def render(
    run: Run,
    files: dict[str, Path] | None = None,
    console: Console | None = None,
    shipped: Run | None = None,
    definitions: bool = False,
) -> None:
    """Print a run. files: what to name at the end (label -> path); None: the per-item values and,
    where they exist, the matrix and the heat map in the run's folder. shipped: a run of the model
    as its makers shipped it, whose stage 0 is shown too. DataError: its perplexities are not of the
    same text in the same way. definitions: also what others call forgetting."""
    console = console or _console()
    r = run.record
    say = _Printer(console)
    losses = _checked(run)
    if shipped is not None:
        _beside(r, shipped.record)
        _checked(shipped)
    how = "" if r.regime == "sequential" else f", {r.regime}"
    say(f"{r.model}, {r.method}, {r.sequence}{how}, seed {r.seed}: {r.run_id}", style="bold")
    if r.tainted:
        say(
            f"TAINTED: {'; '.join(r.tainted)} (changed between attempts of this run, by "
            "allow_change)",
            style="bold",
        )
    say()
    say("Perplexity after each stage")
    _matrix(run, console, shipped.record if shipped is not None else None)
    if r.regime == "sequential" and losses.stages >= 2:
        _courses(r, console, say)
    say("Change of perplexity, mean over domains (below 0: better)")
    _summary(summary(losses), console)
    if losses.stages >= 3 and (
        ages := forgetting_by_age(losses)
    ):  # of two stages it is the backward change
        say(
            "Forgetting by stages since a domain was learned: change of perplexity (above 0: "
            "forgotten)"
        )
        _ages({a: losses.estimate(c) for a, c in ages.items()}, losses.stages, console)
    if definitions and (found := published(losses)):
        say(
            "The same matrix by other definitions, nats per token, with their signs "
            "(docs/metrics.md)"
        )
        for name, value in found.items():
            say(f"  {name:<27}{value:+.4f}")
        say()
    say(_bits_per_byte(r))
    say()
    _tasks(run, console, say)
    units = "test documents and task items" if len(run.items) else "test documents"
    say(
        f"Intervals: 95%, over {units} of this one run; they leave out what another seed "
        "would change."
    )
    say()
    say(_cost(r))
    if r.notes:
        say()
        for note in r.notes:
            say(f"note: {note}")
    reasons = demonstration(r)
    if reasons:
        say()
        say(DEMONSTRATION, style="bold")
        say(f"  ({'; '.join(reasons)})")
    say()
    for label, path in (files if files is not None else _files(run)).items():
        say(f"{label}: {path}")


def demonstration(r: RunRecord, runs: int = 1) -> list[str]:
    """Why this cannot decide between methods; empty when it can. The rule: fewer than STUDY_TOKENS
    training tokens in some stage, or a single run (one seed of one method says nothing of the
    spread between seeds)."""
    tokens = [s.train.tokens for s in r.stages if s.train is not None]
    reasons = []
    if tokens and min(tokens) < STUDY_TOKENS:
        reasons.append(f"{min(tokens):,} training tokens per domain, a study has {STUDY_TOKENS:,}")
    if runs < 2:
        reasons.append("one run of one seed")
    return reasons


def _checked(run: Run) -> LossMatrix:
    """The matrix from the documents. DataError: a cell is missing, or the record holds other sums
    than its documents."""
    again = "restore the files or run again with force=true"
    try:
        found = LossMatrix.from_documents(
            run.documents, run.record.trained, run.record.controls, run.record.regime
        )
    except ValueError as error:
        raise DataError(str(error), str(run.path), again) from error
    if not np.allclose(found.loss, run.record.losses(), rtol=1e-9, atol=0.0):
        raise DataError(
            "the sums in the record are not those of its documents", str(run.path), again
        )
    return found


def _beside(r: RunRecord, shipped: RunRecord) -> None:
    """DataError unless the untouched model of ``shipped`` was scored on the same text in the same
    way."""
    same: dict[str, Callable[[RunRecord], object]] = {
        "protocol": lambda x: x.protocol,
        "domains": lambda x: {
            *x.trained,
            *x.controls,
        },  # their order and whether they were trained do not matter to stage 0
        "test documents": lambda x: x.pins.get("validation"),
        "scored text": lambda x: {
            d: (s.tokens, s.bytes) for d, s in x.stages[0].domains.items()
        },  # another tokenizer
    }
    for what, of in same.items():
        if of(shipped) != of(r):
            names = f"{shipped.run_id} and {r.run_id}"
            raise DataError(
                f"different {what}: not to be shown in one matrix",
                names,
                "give --shipped a run that shares it",
            )


class _Printer:
    """Prints text as it is: brackets are no markup, long paths are not broken; nothing in it
    commands the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, text: str = "", style: str = "") -> None:
        self._console.print(
            printable(text), style=style or None, markup=False, highlight=False, soft_wrap=True
        )


def _console() -> Console:
    """Standard output; as wide as a full matrix where nobody says how wide it is."""
    import os

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PLAIN_WIDTH
    return console


# --- matrix ---------------------------------------------------------------------------------------


def _matrix(run: Run, console: Console, shipped: RunRecord | None = None) -> None:
    """Stages by domains, above them the untouched model of ``shipped``. As the width shrinks:
    stages by number alone, then domain names cut, then several tables."""
    r = run.record
    names = r.trained + r.controls
    losses = r.losses()
    rows = [
        (f"{s.index} {s.domain or 'pretrained'}", str(s.index), s.domain, row)
        for s, row in zip(r.stages, losses, strict=True)
    ]
    if shipped is not None:
        above = np.array([shipped.stages[0].domains[d].loss_nats for d in names])
        rows.insert(0, ("as shipped", "as shipped", None, above))
    stages = [label for label, *_ in rows]
    stars = [
        " " if d in r.trained else "" for d in names
    ]  # the place of the mark behind each number of a column
    cells = [
        [
            format.perplexity(x) + ("*" if learned == d else star)
            for d, x, star in zip(names, row, stars, strict=True)
        ]
        for _, _, learned, row in rows
    ]
    changes = [
        (label, [x + star for x, star in zip(row, stars, strict=True)])
        for label, row in _changes(losses, r)
    ]
    widest = [
        max(len(row[j]) for row in [*cells, *(row for _, row in changes)])
        for j in range(len(names))
    ]

    def width(columns: list[int]) -> int:
        """Of a table with these domains."""
        bar = 3 * any(names[j] in r.controls for j in columns)
        return first + sum(max(len(titles[j] + stars[j]), widest[j]) + 2 for j in columns) + bar

    titles, everything = names, list(range(len(names)))
    notes = (
        ["* learned in this stage"]
        if r.regime != "joint"
        else ["stage 1 learned all domains together"]
    )
    if shipped is not None:
        notes.append(f"as shipped: {shipped.model}, stage 0 of {shipped.run_id}")
    if r.controls:
        notes.append("right of the bar: controls, never trained")
    if console.color_system:
        notes.append("blue: below stage 0, orange: above")
    first = max(len(t) for t in [*stages, *(label for label, _ in changes)])
    if width(everything) > console.width:
        stages = [short for _, short, *_ in rows]
        first = max(len(t) for t in ["stage", *stages, *(label for label, _ in changes)])
    if width(everything) > console.width:
        titles = _shorten(names, 6)
        cut = [f"{t} {n}" for t, n in zip(titles, names, strict=True) if t != n]
        if cut:
            notes.append(f"short: {', '.join(cut)}")
    groups: list[list[int]] = [[]]
    for j in everything:
        if groups[-1] and width([*groups[-1], j]) > console.width:
            groups.append([])
        groups[-1].append(j)

    for group in groups:
        table = _table()
        table.add_column("stage", min_width=first, no_wrap=True)
        bar = next((j for j in group if names[j] in r.controls), None)
        for j in group:
            if j == bar:
                table.add_column("|", no_wrap=True)
            table.add_column(titles[j] + stars[j], justify="right", no_wrap=True)
        for i, (*_, row) in enumerate(rows):
            texts = [
                Text(cells[i][j], style=_colour(row[j] - losses[0, j], cells[i][j].endswith("*")))
                for j in group
            ]
            table.add_row(stages[i], *_barred(texts, group, bar), end_section=i == len(rows) - 1)
        for label, shares in changes:
            table.add_row(label, *_barred([Text(shares[j]) for j in group], group, bar))
        console.print(table)
        console.print()
    for line in ["; ".join(notes)] if len("; ".join(notes)) <= console.width else notes:
        console.print(line, style="dim", markup=False, highlight=False)
    console.print()


def _courses(r: RunRecord, console: Console, say: _Printer) -> None:
    """A sparkline per domain, each on a scale of its own: on a common one the forgetting of a
    domain would vanish beside what others learned. The perplexities at the ends of the scale stand
    beside it and say how much it is."""
    try:
        LEVELS[0].encode(console.encoding)
        levels = LEVELS[0]
    except UnicodeEncodeError:
        levels = LEVELS[1]
    say(
        "Perplexity over the stages, left to right, each domain on its own scale "
        f"({levels[0]} to {levels[-1]})"
    )
    table = _table()
    table.add_column("domain", no_wrap=True)
    table.add_column("", overflow="fold")
    for head in ("lowest", "highest"):
        table.add_column(head, justify="right", no_wrap=True)
    for domain, course in zip(r.trained + r.controls, r.losses().T, strict=True):
        low, high = course.min(), course.max()
        heights = np.minimum(
            (course - low) / ((high - low) or 1.0) * len(levels), len(levels) - 1
        ).astype(int)  # equal steps of loss
        marks = [
            levels[h] + ("*" if s.domain == domain else " ")
            for s, h in zip(r.stages, heights, strict=True)
        ]
        table.add_row(
            printable(domain), Text("".join(marks)), format.perplexity(low), format.perplexity(high)
        )
    console.print(table)
    console.print()
    console.print(
        "* own stage: what rises after it was forgotten", style="dim", markup=False, highlight=False
    )
    console.print()


def _table() -> Table:
    """Columns two characters apart, a line under the head."""
    return Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)


def _barred(row: list[Text], columns: list[int], bar: int | None) -> list[Text]:
    """The row with the bar before column ``bar``."""
    at = columns.index(bar) if bar is not None else len(row)
    return row[:at] + [Text("|")] * (bar is not None) + row[at:]


def _changes(losses: np.ndarray, r: RunRecord) -> list[tuple[str, list[str]]]:
    """Rows below the matrix, per domain, in % of perplexity: own step, change since the own stage,
    change from base."""
    own, back, base = [], [], []
    last = len(losses) - 1
    for j in range(losses.shape[1]):
        k = j + 1
        staged = r.regime != "joint" and j < len(r.trained)
        own.append(
            format.percent(losses[k, j] - losses[0 if r.regime == "individual" else k - 1, j])
            if staged
            else ""
        )
        back.append(
            format.percent(losses[last, j] - losses[k, j])
            if r.regime == "sequential" and j < len(r.trained) - 1
            else ""
        )
        base.append(
            format.percent(losses[last, j] - losses[0, j]) if r.regime != "individual" else ""
        )
    rows = [("own step %", own), ("backward %", back), ("from base %", base)]
    return [row for row in rows if any(row[1])]


def _shorten(names: Sequence[str], width: int) -> list[str]:
    """Names cut to width characters, all different."""
    short = [n if len(n) <= width else n[: width - 1] + "." for n in names]
    return [f"{s[: width - 2]}~{i}" if short.count(s) > 1 else s for i, s in enumerate(short)]


def _colour(change_nats: float, trained: bool) -> str:
    """Blue where perplexity fell since stage 0, orange where it rose (colour-blind readers can tell
    them apart), stronger from 10%; plain within 1%."""
    weight = "bold " if trained else ""
    if not math.isfinite(change_nats) or abs(change_nats) < 0.01:
        return weight + "default"
    strong = abs(change_nats) >= 0.1
    return weight + (
        ("color(33)" if strong else "color(31)")
        if change_nats < 0
        else ("color(202)" if strong else "color(172)")
    )


# --- numbers --------------------------------------------------------------------------------------


def _interval(low: str, high: str) -> str:
    return "not known" if "-" in (low, high) else f"{low} to {high}"


def _signed(x: float, digits: int) -> str:
    return "-" if math.isnan(x) else f"{x:+.{digits}f}"


def _plain(x: float, digits: int = 3) -> str:
    return "-" if math.isnan(x) else f"{x:.{digits}f}"


# --- summary, tasks, cost -------------------------------------------------------------------------


def _summary(found: dict[str, Estimate], console: Console) -> None:
    """One line per metric; as the width shrinks without what it compares, then without the interval
    in nats."""
    wordy, wide = console.width >= 119, console.width >= 80
    table = _table()
    table.add_column("", no_wrap=True)
    for head in ["%", "95% interval", "nats", *(["95% interval"] if wide else []), "docs"]:
        table.add_column(head, justify="right", no_wrap=True)
    if wordy:
        table.add_column("from to", no_wrap=True)
    for name in [*(n for n in ROWS if n in found), *(n for n in found if n not in ROWS)]:
        e = found[name]
        label, compares = ROWS.get(name, (name.replace("_", " "), ""))
        percent = [
            format.percent(e.value),
            _interval(format.percent(e.low), format.percent(e.high)),
        ]
        nats = [
            _signed(e.value, 4),
            *([_interval(_signed(e.low, 4), _signed(e.high, 4))] if wide else []),
        ]
        table.add_row(label, *percent, *nats, str(e.n), *([compares] if wordy else []))
    console.print(table)
    console.print()


def _ages(found: dict[int, Estimate], stages: int, console: Console) -> None:
    """One line per number of stages since learned; stages - age domains are that old."""
    table = _table()
    for head in ("stages since", "%", "95% interval", "domains", "docs"):
        table.add_column(head, justify="right", no_wrap=True)
    for age, e in found.items():
        interval = _interval(format.percent(e.low), format.percent(e.high))
        table.add_row(str(age), format.percent(e.value), interval, str(stages - age), str(e.n))
    console.print(table)
    console.print()


def _bits_per_byte(r: RunRecord) -> str:
    """sum NLL / (ln 2 * bytes) of each trained domain, then their mean, before and after the
    run."""
    first, last = (
        sum(stage.domains[d].bits_per_byte for d in r.trained) / len(r.trained)
        for stage in (r.stages[0], r.stages[-1])
    )
    return (
        f"bits per byte, mean over trained domains: {first:.4f} pretrained, {last:.4f} after "
        f"stage {r.stages[-1].index}"
    )


def _tasks(run: Run, console: Console, say: _Printer) -> None:
    """Each task at the first and the last stage that scored it, and the change between, paired over
    its items."""
    r = run.record
    for task in dict.fromkeys(t for s in r.stages for t in s.tasks):
        stages = [s.index for s in r.stages if task in s.tasks]
        first, last = stages[0], stages[-1]
        score = r.stages[first].tasks[task]
        shots = f", {score.fewshot}-shot" if score.fewshot else ""
        say(
            f"{task}: {score.items} items{shots}, stage {first}"
            + (f" and stage {last}" if last != first else "")
        )
        if score.limited:
            say("  limited for debugging: not for a table")
        if truncated := max(r.stages[s].tasks[task].truncated for s in stages):
            say(
                f"  {truncated} of {score.items} items did not fit the model's context: their "
                "beginning was cut"
            )
        try:
            levels = [answers.level(run.items, task, s) for s in (first, last)]
            change = answers.change(run.items, task, first, last) if last != first else {}
        except DataError as error:
            say(f"  {error}")
            continue
        table = _table()
        table.add_column("", no_wrap=True)
        for head in [
            f"stage {first}",
            *([f"stage {last}", "change", "95% interval"] if change else []),
        ]:
            table.add_column(head, justify="right", no_wrap=True)
        for name, unit in (
            ("accuracy", ""),
            ("accuracy_norm", ""),
            ("margin", " (nats)"),
            ("auc", ""),
            ("balanced_accuracy", ""),
        ):
            if name not in levels[0]:
                continue
            row = [
                name.replace("_", " ").replace("auc", "AUC") + unit,
                _plain(levels[0][name].value),
            ]
            if name in change:
                e = change[name]
                row += [
                    _plain(levels[1][name].value),
                    _signed(e.value, 3),
                    _interval(_signed(e.low, 3), _signed(e.high, 3)),
                ]
            table.add_row(*row)
        console.print(table)
        if change:
            lost, gained, count = answers.flips(run.items, task, first, last)
            p = mcnemar(lost, gained)
            chance = f"{p:.2f}" if p >= 0.01 else f"{p:.1g}"
            say(
                f"  flips: {lost} right to wrong, {gained} wrong to right, of {count} (McNemar p "
                f"{chance})"
            )
        say()


def _cost(r: RunRecord) -> str:
    """Parameters, tokens, time and memory in a few lines."""
    trains = [s.train for s in r.stages if s.train is not None]
    tokens = sum(t.tokens for t in trains)
    learning = sum(t.seconds for t in trains)
    scoring = sum(s.eval_seconds for s in r.stages)
    answering = sum(s.task_seconds for s in r.stages)
    whole = r.provenance.get("seconds")
    share = (
        f" ({100 * r.trainable_parameters / r.total_parameters:.3g}%)" if r.total_parameters else ""
    )
    speed = f", {tokens / learning:,.0f} tokens/s" if learning > 0 else ""
    parts = {
        "learning": learning,
        "scoring": scoring,
        **({"tasks": answering} if answering else {}),
    }
    times = [f"{what} {format.duration(seconds)}" for what, seconds in parts.items()]
    lines = [
        f"trainable parameters: {r.trainable_parameters:,} of {r.total_parameters:,}{share}",
        f"training tokens: {tokens:,} in {len(trains)} stages{speed}",
        f"time: {format.duration(float(whole)) + ' (' if isinstance(whole, int | float) else ''}{', '.join(times)}"
        + (")" if isinstance(whole, int | float) else ""),
        f"peak memory: {r.peak_memory_bytes / 1e9:.2f} GB",
        f"perplexity protocol: {r.protocol}",
    ]
    return "\n".join(lines)


def _files(run: Run) -> dict[str, Path]:
    """What lies beside the record and in the run's folder."""
    files = {"per-item values": items_path(run.path)}
    folder = run.record.config.get("output_dir")
    if isinstance(folder, str):
        for label, name in (("matrix (CSV)", "matrix.csv"), ("heat map (PNG)", "matrix.png")):
            path = Path(folder) / run.record.run_id / name
            if path.exists():
                files[label] = path
    return files
