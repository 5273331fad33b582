"""``python -m gain_cl prepare``: fetch, tokenise and check everything a run would read, and report
what it is. Trains nothing.

What it puts into the cache is what a run looks for there. torch is imported, because transformers'
tokenizers do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
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
from gain_cl.tools import bundle
from gain_cl.tools.command import CONFIGURATION, Parser, print_report

SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")
Report = dict[str, Any]


def main(argv: list[str]) -> int:
    """Print the report. DataError (exit 65): a run could not use the data."""
    parser = Parser("prepare", *CONFIGURATION, "--json")
    parser.epilog = "bundle=DIR: into a folder from which a machine without network runs"
    args = parser.read(argv)
    words = [w for w in args.overrides if not w.startswith("bundle=")]
    named = [w.partition("=")[2] for w in args.overrides if w not in words]
    config = composition.compose(words, args.config_dir, args.plugin)
    with signals.listening():
        if named:
            given = [w for w in argv if w not in ("--json", f"bundle={named[-1]}")]
            report = bundle.make(config, given, Path(named[-1]).expanduser())
        else:
            report = examine(config)
    return print_report(report, args.json, render)


def examine(config: RunConfig) -> Report:
    """Return the report as plain values. Its steps are told on stderr as they begin."""
    plan = runs.prepare(config)
    # what is wrong with local text or a model's files shows before torch is imported
    checks.inputs(config)
    trained, pins = config.sequence.trained, plan.pins["domains"]
    _tell(f"{config.model.name}: files and tokenizer")
    folder = source.locate_model(config.model)
    arch = config.model.arch or {} if folder is None else source.read_config(folder)
    checks.limits(config, arch)
    tokenizer, tokenizer_hash = load.load_tokenizer(config.model)
    rows = load.vocabulary(config.model)
    prefix_id, _ = load.special_tokens(config.model, tokenizer, rows)
    domains: dict[str, Domain] = {}
    for name in [*trained, *config.sequence.controls]:
        _tell(f"{name}: text and tokens")
        reader = tokenizer, tokenizer_hash, pins[name], prefix_id
        domains[name] = texts.prepare_domain(config.domains[name], *reader)
    notes = texts.check_domains(
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
        "domains": {name: _domain(config, d, pins[name]) for name, d in domains.items()},
        "near_duplicates": [asdict(n) for n in near],
        "benchmark_overlap": [asdict(s) for s in shared],
        "notes": notes + overlap.notes(near, shared, config.eval),
        "cache": str(hashes.cache_dir()),
    }


def _domain(config: RunConfig, domain: Domain, pin: dict[str, Any]) -> Report:
    """Return what there is of a domain, by split, and the share of it that is learned."""
    counts: dict[str, Callable[[SplitName], Any]] = {
        "documents": domain.n_documents,
        "tokens": domain.n_tokens,
        "prompt_tokens": domain.n_prompt_tokens,
        "bytes": domain.n_bytes,
        "split_sha256": domain.split_hash,
    }
    trained = domain.name in config.sequence.trained
    learned = config.train.stage_steps * config.train.batch_tokens * trained
    return {
        "trained": trained,
        **{name: {split: of(split) for split in SPLITS} for name, of in counts.items()},
        "learned_share": learned / domain.n_tokens("train"),
        "hash": domain.hash,
        "pin": pin,
        "licence": config.domains[domain.name].licence,
    }


def _tell(text: str) -> None:
    """Tell a step on stderr, unless a signal asked to stop."""
    signals.poll()
    print(text, file=sys.stderr, flush=True)


# --- printing -------------------------------------------------------------------------------------


def render(report: Report) -> None:
    """Print the report. The last line sums it up."""
    domains, run, rows = report["domains"], report["run"], []
    for name, d in domains.items():
        label = name if d["trained"] else f"{name} (control)"
        counts = (" / ".join(f"{x:,}" for x in d[of].values()) for of in ("documents", "tokens"))
        source = d["pin"].get("package") or d["pin"].get("path") or d["pin"]["kind"]
        share = f"{d['learned_share']:.1%}" if d["trained"] else None
        rows.append(Row([label, *counts, share, d["hash"][:12], source, d["licence"]]))
    heads = ["domain", "documents", "tokens", "learned", "tokens' hash", "source", "licence"]
    print_table(Table("domains", "Domains (train / dev / test)", heads, rows))
    for note in report["notes"]:
        say(f"note: {printable(note)}")
    state = f"finished: {run['record']}" if run["finished"] else "not finished yet"
    say(f"Run {run['id']} ({state})", "bold")
    count = sum(sum(d["tokens"].values()) for d in domains.values())
    say(f"prepared: {len(domains)} domains, {count:,} tokens, cache {report['cache']}")
