"""``python -m gain_cl prepare``: fetch, tokenise and check everything a run would read, and report
what it is. Trains nothing.

What it puts into the cache is what a run looks for there. torch is imported, because transformers'
tokenizers do.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from gain_cl import domains as texts
from gain_cl.compose import checks, composition
from gain_cl.config.schema import RunConfig
from gain_cl.domains import Domain, overlap
from gain_cl.domains.domain import SplitName
from gain_cl.errors import printable
from gain_cl.measure import tasks
from gain_cl.models import load, source
from gain_cl.paper.table import Row, Table, print_table, say
from gain_cl.runs import plan as runs
from gain_cl.system import hashes, signals
from gain_cl.tools.command import CONFIGURATION, Parser, print_report

SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")
Report = dict[str, Any]


def main(argv: list[str]) -> int:
    """Print the report. DataError (exit 65): a run could not use the data."""
    about = "Fetch, tokenise and check the model, domains and tasks of a run (same overrides as "
    about += "run), and report what they share."
    parser = Parser("prepare", *CONFIGURATION, "--json", description=about)
    args = parser.read(argv)
    config = composition.compose(args.overrides, args.config_dir, args.plugin)
    with signals.listening():
        report = examine(config)
    return print_report(report, args.json, render)


def examine(config: RunConfig) -> Report:
    """Return the report as plain values. Its steps are told on stderr as they begin."""
    plan = runs.prepare(config)
    # what is wrong with local text or a model's files shows before torch is imported
    checks.inputs(config)
    names, trained = [*config.sequence.trained, *config.sequence.controls], config.sequence.trained
    _tell(f"{config.model.name}: files and tokenizer")
    folder = source.locate_model(config.model)
    arch = config.model.arch or {} if folder is None else source.read_config(folder)
    checks.limits(config, arch)
    tokenizer, tokenizer_hash = load.load_tokenizer(config.model)
    rows = load.vocabulary(config.model)
    prefix_id, _ = load.special_tokens(config.model, tokenizer, rows)
    domains: dict[str, Domain] = {}
    for number, name in enumerate(names, start=1):
        signals.poll()
        _tell(f"{name}: text and tokens ({number} of {len(names)})")
        given, pin = config.domains[name], plan.pins["domains"][name]
        domains[name] = texts.prepare_domain(given, tokenizer, tokenizer_hash, pin, prefix_id)
    warnings = texts.check_domains(
        domains, config.train, config.eval, rows, config.only_scored,
        tokenizer, "unknown" in config.allow_change,
    )  # fmt: skip
    _tell("near duplicates of scored documents in training text")
    near = overlap.near_duplicates(domains, trained)
    shared: list[overlap.Shared] = []
    if config.tasks.names:
        _tell(f"{', '.join(config.tasks.names)}: items, and what they share with training text")
        items = tasks.texts(tasks.TaskSet(config.tasks, tokenizer))
        shared = overlap.benchmark(domains, trained, items)
    signals.poll()
    model = {"name": config.model.name, **plan.pins["model"], "tokenizer": tokenizer_hash}
    return {
        "run": {"id": plan.run_id, "finished": plan.finished, "record": str(plan.record_path)},
        "model": {**model, "embedding_rows": rows},
        "domains": {n: _domain(config, domains[n], plan.pins["domains"][n]) for n in names},
        "tasks": plan.pins["tasks"],
        "eval": {"split": config.eval.split, "documents": config.eval.documents},
        "near_duplicates": [asdict(n) for n in near],
        "benchmark_overlap": [asdict(s) for s in shared],
        "notes": warnings + overlap.notes(near, shared, config.eval),
        "cache": str(hashes.cache_dir()),
    }


def _domain(config: RunConfig, domain: Domain, pin: dict[str, Any]) -> Report:
    trained, train = domain.name in config.sequence.trained, config.train
    share = train.stage_steps * train.batch_tokens / domain.n_tokens("train")
    return {
        "trained": trained,
        "documents": {split: domain.n_documents(split) for split in SPLITS},
        "tokens": {split: domain.n_tokens(split) for split in SPLITS},
        "prompt_tokens": {split: domain.n_prompt_tokens(split) for split in SPLITS},
        "bytes": {split: domain.n_bytes(split) for split in SPLITS},
        "split_sha256": {split: domain.split_hash(split) for split in SPLITS},
        "learned_share": share if trained else 0.0,
        "hash": domain.hash,
        "pin": pin,
        "licence": config.domains[domain.name].licence,
    }


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- printing -------------------------------------------------------------------------------------


def render(report: Report) -> None:
    """Print the report. The last line sums it up."""
    domains, run = report["domains"], report["run"]
    rows, sources, notes = [], [], []
    for name, d in domains.items():
        documents, tokens = (
            " / ".join(f"{d[of][s]:,}" for s in SPLITS) for of in ("documents", "tokens")
        )
        size = " / ".join(f"{d['bytes'][s] / 1e6:.1f}" for s in SPLITS)
        label, share = (
            (name, f"{d['learned_share']:.1%}") if d["trained"] else (f"{name} (control)", None)
        )
        rows.append(Row([label, documents, tokens, size, share]))
        sources.append(Row([name, d["hash"][:12], _source(d["pin"]), d["licence"]]))
        if prompts := sum(d["prompt_tokens"].values()):
            of = f"{prompts / sum(d['tokens'].values()):.0%} of the tokens are prompts"
            notes.append(f"{name}: instruction data, {of}, read and not scored; MB are completions")
    heads = ["domain", "documents", "tokens", "MB", "learned"]
    print_table(Table("domains", "Domains (train / dev / test)", heads, rows, notes))
    heads = ["domain", "tokens' hash", "source as pinned", "licence"]
    print_table(Table("sources", "Sources", heads, sources))
    for note in report["notes"]:
        say(f"note: {printable(note)}")
    state = f"finished: {run['record']}" if run["finished"] else "not finished yet"
    say(f"Run {run['id']} ({state})", "bold")
    count = sum(sum(d["tokens"].values()) for d in domains.values())
    say(f"prepared: {len(domains)} domains, {count:,} tokens, cache {report['cache']}")


def _source(pin: dict[str, Any]) -> str:
    """Say in a few words what identifies a text."""
    name = pin.get("package") or pin.get("path") or pin["kind"]
    keys = ("sha256", "members_sha256", "revision", "seed")
    return ", ".join([name, *(f"{key} {str(pin[key])[:12]}" for key in keys if key in pin)])
