"""A finished run in the terminal: its matrix, its summary with intervals, its tasks, its cost and
its files.

Everything is derived from the record and its per-item values. Readable without colour, at any
width. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from gain_cl.errors import DataError
from gain_cl.measure.record import Run, RunRecord, items_path
from gain_cl.paper.table import (
    Row,
    Table,
    Value,
    nats,
    p_value,
    percent,
    plain,
    print_table,
    say,
    signed,
    valued,
)
from gain_cl.paper.tables import matrix
from gain_cl.stats import answers, format
from gain_cl.stats.inference import mcnemar
from gain_cl.stats.matrix import Estimate, LossMatrix, forgetting_by_age, published, summary
from gain_cl.studies.shared import SCORED, unlike
from gain_cl.studies.study import loss_matrix
from gain_cl.system.terminal import console

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

SCORES = {  # metric of answers.level -> what it is called
    "accuracy": "accuracy",
    "accuracy_norm": "accuracy norm",
    "margin": "margin (nats)",
    "auc": "AUC",
    "balanced_accuracy": "balanced accuracy",
}


def render(
    run: Run,
    files: dict[str, Path] | None = None,
    out: Console | None = None,
    shipped: Run | None = None,
    definitions: bool = False,
) -> None:
    """Print a run.

    files: what to name at the end (label -> path); None: the per-item values. shipped: a run of the
    model as its makers shipped it, whose stage 0 is shown too. definitions: also what others call
    forgetting.
    DataError: the perplexities of shipped are not of the same text in the same way."""
    out = out or console()
    files = {"per-item values": items_path(run.path)} if files is None else files
    r, write, show = run.record, partial(say, out=out), partial(print_table, out=out)
    losses = checked_matrix(run)
    if shipped is not None:
        for what, *_ in unlike([r, shipped.record], SCORED):
            raise DataError(
                f"different {what}: not to be shown in one matrix",
                f"{shipped.record.run_id} and {r.run_id}",
                "give --shipped a run that shares it",
            )
        checked_matrix(shipped)
    how = "" if r.regime == "sequential" else f", {r.regime}"
    write(f"{r.model}, {r.method}, {r.sequence}{how}, seed {r.seed}: {r.run_id}", "bold")
    if r.tainted:
        why = "changed between attempts of this run, by allow_change"
        write(f"TAINTED: {'; '.join(r.tainted)} ({why})", "bold")
    write()
    show(matrix.in_terminal(r, shipped.record if shipped else None))
    show(summarised(summary(losses)))
    ages = {a: losses.estimate(c) for a, c in forgetting_by_age(losses).items()}
    if len(ages) > 1:  # of two stages it is the backward change
        show(by_age(ages))
    if definitions and (found := published(losses)):
        write(
            "The same matrix by other definitions, nats per token, with their signs "
            "(docs/metrics.md)"
        )
        for name, value in found.items():
            write(f"  {name:<27}{value:+.4f}")
        write()
    first, last = (
        np.mean([s.domains[d].bits_per_byte for d in r.trained])
        for s in (r.stages[0], r.stages[-1])
    )
    ends = f"{first:.4f} pretrained, {last:.4f} after stage {r.stages[-1].index}"
    write(f"bits per byte, mean over trained domains: {ends}\n")
    for task in dict.fromkeys(t for s in r.stages for t in s.tasks):
        _task(run, task, write, show)
    units = "test documents and task items" if len(run.items) else "test documents"
    write(
        f"Intervals: 95%, over {units} of this one run; they leave out what another seed "
        "would change."
    )
    write(f"\n{_cost(r)}")
    if r.notes:
        write("\n" + "\n".join(f"note: {note}" for note in r.notes))
    if reasons := demonstration([r]):
        write(f"\n{DEMONSTRATION}", "bold")
        write(f"  ({'; '.join(reasons)})")
    write()
    for label, path in files.items():
        write(f"{label}: {path}")


def demonstration(records: Sequence[RunRecord]) -> list[str]:
    """Return why these cannot decide between methods; empty when they can.

    The rule: fewer than STUDY_TOKENS training tokens in some stage, or a single run (one seed of
    one method says nothing of the spread between seeds)."""
    trained = (s.train.tokens for r in records for s in r.stages if s.train)
    tokens = min(trained, default=STUDY_TOKENS)
    reasons = []
    if tokens < STUDY_TOKENS:
        reasons.append(f"{tokens:,} training tokens per domain, a study has {STUDY_TOKENS:,}")
    if len(records) < 2:
        reasons.append("one run of one seed")
    return reasons


def checked_matrix(run: Run) -> LossMatrix:
    """Return the matrix of a run, from its documents. DataError: an entry is missing, or the record
    holds other sums than its documents."""
    found = loss_matrix(run)
    if not np.allclose(found.loss, run.record.losses(), rtol=1e-9, atol=0.0):
        raise DataError(
            "the sums in the record are not those of its documents",
            str(run.path),
            "restore the files or run again with force=true",
        )
    return found


# --- tables ---------------------------------------------------------------------------------------


def summarised(found: dict[str, Estimate]) -> Table:
    """Return a row for each metric, in % and in nats per token."""
    rows = []
    for name in (k for k in ROWS if k in found):
        (label, compares), e = ROWS[name], found[name]
        in_nats = valued(e, lambda x: signed(x, 4))
        rows.append(Row([label, percent(e), in_nats, Value(e.n), compares]))
    title = "Change of perplexity, mean over domains (below 0: better)"
    return Table("summary", title, ["", "%", "nats", "docs", "from to"], rows)


def by_age(found: dict[int, Estimate]) -> Table:
    """Return a row for each number of stages since a domain was learned."""
    rows = [
        Row([*map(Value, (age, len(found) + 1 - age, e.n)), percent(e)]) for age, e in found.items()
    ]
    title = (
        "Forgetting by stages since a domain was learned: change of perplexity (above 0: forgotten)"
    )
    return Table("ages", title, ["stages since", "domains", "docs", "%"], rows)


def _task(run: Run, task: str, write: Callable[[str], None], show: Callable[[Table], None]) -> None:
    """Print a task at the first and the last stage that scored it, and the change between, paired
    over its items."""
    of = {s.index: s.tasks[task] for s in run.record.stages if task in s.tasks}
    ends = sorted({min(of), max(of)})
    score, cut = of[ends[0]], max(s.truncated for s in of.values())
    shots = f", {score.fewshot}-shot" if score.fewshot else ""
    write(f"{task}: {score.items} items{shots}, {' and '.join(f'stage {s}' for s in ends)}")
    if score.limited:
        write("  limited for debugging: not for a table")
    if cut:
        write(
            f"  {cut} of {score.items} items did not fit the model's context: their "
            "beginning was cut"
        )
    for name in score.metrics:
        write(f"  {name}: {' -> '.join(f'{of[s].metrics.get(name, np.nan):.4g}' for s in ends)}")
    try:
        levels = [answers.level(run.items, task, s) for s in ends]
        change = answers.change(run.items, task, *ends) if len(ends) > 1 else {}
    except DataError as error:
        write(f"  {error}")
        return
    rows = []
    for name in (k for k in SCORES if k in levels[0]):
        cells = [Value(x[name].value, plain(3)) for x in levels]
        cells += [valued(change[name], nats)] if change else []
        rows.append(Row([SCORES[name], *cells]))
    heads = ["", *(f"stage {s}" for s in ends), *["change"][: len(change)]]
    show(Table(task, "", heads, rows))
    if change:
        lost, gained, count = answers.flips(run.items, task, *ends)
        write(
            f"  flips: {lost} right to wrong, {gained} wrong to right, of {count} (McNemar p "
            f"{p_value(mcnemar(lost, gained))})"
        )
    write("")


# --- cost -----------------------------------------------------------------------------------------


def _cost(r: RunRecord) -> str:
    """Return parameters, tokens, time and memory in a few lines."""
    trains = [s.train for s in r.stages if s.train is not None]
    tokens, learning = sum(t.tokens for t in trains), sum(t.seconds for t in trains)
    whole = r.provenance.get("seconds")
    trainable, whole_model = r.trainable_parameters, r.total_parameters
    share = f"{100 * trainable / max(whole_model, 1):.3g}%"
    speed = f", {tokens / learning:,.0f} tokens/s" if learning > 0 else ""
    parts = {
        "learning": learning,
        "scoring": sum(s.eval_seconds for s in r.stages),
        "tasks": sum(s.task_seconds for s in r.stages),
    }
    times = ", ".join(f"{what} {format.duration(x)}" for what, x in parts.items())
    if isinstance(whole, int | float):
        times = f"{format.duration(float(whole))} ({times})"
    return (
        f"trainable parameters: {trainable:,} of {whole_model:,} ({share})\n"
        f"training tokens: {tokens:,} in {len(trains)} stages{speed}\n"
        f"time: {times}\n"
        f"peak memory: {r.peak_memory_bytes / 1e9:.2f} GB\n"
        f"perplexity protocol: {r.protocol}"
    )
