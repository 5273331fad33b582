"""``python -m gain_cl prepare``: fetch, tokenise and check everything a run would read, and report what it is. Trains nothing.

What it puts into the cache is what a run looks for there. torch is imported, because transformers' tokenizers do.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from gain_cl import build, checks, models, overlap, signals, sources, spine, tasks
from gain_cl import domains as domains_
from gain_cl.config import PackageSource, RunConfig
from gain_cl.domains import Domain
from gain_cl.domains.base import SplitName
from gain_cl.errors import ConfigError
from gain_cl.verbs import Parser, console, printable

SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")
WORST = 5
"""Near duplicates and shared items that are printed one by one; --json lists all."""

Report = dict[str, Any]


def main(argv: list[str]) -> int:
    """Print the report; DataError (exit 65) when a run could not use the data."""
    parser = Parser(
        "prepare",
        usage="python -m gain_cl prepare [GROUP=NAME] [KEY=VALUE] [bundle=DIR] [--config-dir DIR] [--plugin FILE.py] [--json]",
        description="Fetch, tokenise and check the model, domains and tasks of a run (same overrides as run), and report what they share.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for run")
    parser.add_argument("--config-dir", action="append", default=[], help="a folder with more presets (repeatable)")
    parser.add_argument("--plugin", action="append", default=[], help="a file that registers adapters or guards (repeatable)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, with every pair that was found")
    args = parser.parse_intermixed_args(argv)
    bundles = [word for word in args.overrides if word.startswith("bundle=")]
    config = build.compose([word for word in args.overrides if word not in bundles], args.config_dir, args.plugin)
    with signals.listening():
        report = bundle(config, Path(bundles[-1].partition("=")[2])) if bundles else examine(config)
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        render(report)
    return 0


def examine(config: RunConfig) -> Report:
    """The report, as plain values; its steps are told on stderr as they begin."""
    plan = spine.prepare(config)
    checks.inputs(config)  # what is wrong with local text or a model's files shows before torch is imported
    names, trained = [*config.sequence.trained, *config.sequence.controls], config.sequence.trained
    _say(f"{config.model.name}: files and tokenizer")
    folder = models.locate(config.model)
    checks.limits(config, models.read_config(folder) if folder is not None else config.model.arch or {})
    tokenizer, tokenizer_hash = models.load_tokenizer(config.model)
    rows = models.vocabulary(config.model)
    prefix_id, _ = models.special_tokens(config.model, tokenizer, rows)
    domains: dict[str, Domain] = {}
    for number, name in enumerate(names, start=1):
        signals.poll()
        _say(f"{name}: text and tokens ({number} of {len(names)})")
        domains[name] = domains_.prepare(config.domains[name], tokenizer, tokenizer_hash, plan.pins["domains"][name], prefix_id)
    warnings = domains_.check(domains, config.train, config.eval, rows, config.only_scored)
    _say("near duplicates of scored documents in training text")
    near = overlap.near_duplicates(domains, trained)
    shared: list[overlap.Shared] = []
    if config.tasks.names:
        _say(f"{', '.join(config.tasks.names)}: items, and what they share with training text")
        shared = overlap.benchmark(domains, trained, tasks.texts(tasks.TaskSet(config.tasks, tokenizer)))
    signals.poll()
    return {
        "run": {"id": plan.run_id, "finished": plan.finished, "record": str(plan.record_path)},
        "uses": _uses(config),
        "model": {"name": config.model.name, **plan.pins["model"], "tokenizer": tokenizer_hash, "embedding_rows": rows},
        "domains": {name: _domain(config, domains[name], plan.pins["domains"][name]) for name in names},
        "tasks": plan.pins["tasks"],
        "eval": {"split": config.eval.split, "documents": config.eval.documents},
        "near_duplicates": [asdict(n) for n in near],
        "benchmark_overlap": [asdict(s) for s in shared],
        "notes": warnings + overlap.notes(near, shared, config.eval),
        "cache": str(sources.cache_dir()),
    }


ENVIRONMENT = """\
# A run reads from this folder, without network: . DIR/env.sh
GAIN_CL_CACHE=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")" && pwd)
export GAIN_CL_CACHE HF_HUB_CACHE="$GAIN_CL_CACHE/hub" HF_HUB_OFFLINE=1
"""


def bundle(config: RunConfig, folder: Path) -> Report:
    """Make a cache folder that holds what a run of this configuration reads and nothing else; the report.

    A machine without network runs from it after ``. DIR/env.sh``. What the caches of this machine have is copied, the rest fetched;
    archives stay behind where their text is tokenised or their model converted (other versions of transformers convert its tokenizer
    otherwise, so that it is not left to the other machine).
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "env.sh").exists():
        raise ConfigError("the folder is not empty and no bundle", f"bundle={folder}", "name a new folder")
    here, hub = sources.cache_dir(), Path(os.environ.get("HF_HUB_CACHE") or Path.home() / ".cache/huggingface/hub")
    pins = {name: domains_.pin(domain) for name, domain in config.domains.items()}
    texts = {d.source.files.package for d in config.domains.values() if isinstance(d.source, PackageSource)}
    own = {config.model.package.package} if config.model.package is not None else set()
    for name in sorted(texts | own):
        _copy(here / "packages" / name, folder / "packages" / name)
    for meta in (here / "tokens").glob("*/meta.json"):
        if json.loads(meta.read_bytes()).get("identity", {}).get("pin") in pins.values():
            _copy(meta.parent, folder / "tokens" / meta.parent.name)
    for converted in (here / "models").glob("*/CONVERTED.json"):
        if own and json.loads(converted.read_bytes())["source"] == models.pin(config.model):
            _copy(converted.parent, folder / "models" / converted.parent.name)
    if config.model.path is not None:
        name = "models--" + config.model.path.replace("/", "--")
        _copy(hub / name, folder / "hub" / name)
    os.environ |= {"GAIN_CL_CACHE": str(folder.absolute()), "HF_HUB_CACHE": str((folder / "hub").absolute())}
    (folder / "env.sh").parent.mkdir(parents=True, exist_ok=True)
    (folder / "env.sh").write_text(ENVIRONMENT)
    report = examine(config)
    for name in texts | own:
        shutil.rmtree(folder / "packages" / name, ignore_errors=True)
    for meta in (folder / "tokens").glob("*/meta.json"):
        if json.loads(meta.read_bytes())["identity"]["tokenizer"] != report["model"]["tokenizer"]:
            shutil.rmtree(meta.parent)
    shutil.rmtree(folder / "hashes", ignore_errors=True)  # by path
    return report


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not target.exists():
        shutil.copytree(source, target, symlinks=True)


def _domain(config: RunConfig, domain: Domain, pin: dict[str, Any]) -> Report:
    trained = domain.name in config.sequence.trained
    return {
        "trained": trained,
        "documents": {split: domain.n_documents(split) for split in SPLITS},
        "tokens": {split: domain.n_tokens(split) for split in SPLITS},
        "prompt_tokens": {split: domain.n_prompt_tokens(split) for split in SPLITS},
        "bytes": {split: domain.n_bytes(split) for split in SPLITS},
        "split_sha256": {split: domain.split_hash(split) for split in SPLITS},
        "learned_share": config.train.stage_steps * config.train.batch_tokens / domain.n_tokens("train") if trained else 0.0,
        "hash": domain.hash,
        "pin": pin,
        "licence": config.domains[domain.name].licence,
    }


def _uses(config: RunConfig) -> list[str]:
    """What a run of this configuration does, in words."""
    stages, train, evaluation = len(config.sequence.trained), config.train, config.eval
    tokens = train.stage_steps * train.batch_tokens
    window = f"the first {evaluation.window} tokens" if evaluation.window else "all tokens"
    documents = f"{evaluation.documents} {evaluation.split} documents of {stages + len(config.sequence.controls)} domains"
    lines = [
        f"learns {stages} domains, {tokens:,} tokens each: {train.stage_steps} steps of {train.batch_tokens} tokens",
        f"scores {window} of {documents}, {stages + 1} times",
    ]
    if config.tasks.names:
        times = sum(tasks.due(config.tasks.stages, index, stages) for index in range(stages + 1))
        lines.append(f"scores {', '.join(config.tasks.names)}, {times} times")
    return lines


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- printing ----------------------------------------------------------------------------------------------------------


def render(report: Report) -> None:
    """Print the report; the last line sums it up."""
    out = console()

    def say(text: str = "", style: str = "") -> None:
        out.print(Text(printable(text)), style=style)

    def table(head: list[str], rows: list[list[str]], left: int = 1) -> None:
        """left: how many columns are words, which come first."""
        view = Table(box=SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(head):
            view.add_column(name, justify="left" if i < left else "right", overflow="fold")
        for row in rows:
            view.add_row(*(Text(printable(cell)) for cell in row))
        out.print(view)

    domains = report["domains"]
    say("Domains (train / dev / test)", "bold")
    table(
        ["domain", "documents", "tokens", "MB", "learned"],
        [
            [
                name if d["trained"] else f"{name} (control)",
                " / ".join(f"{d['documents'][s]:,}" for s in SPLITS),
                " / ".join(f"{d['tokens'][s]:,}" for s in SPLITS),
                " / ".join(f"{d['bytes'][s] / 1e6:.1f}" for s in SPLITS),
                f"{d['learned_share']:.1%}" if d["trained"] else "-",
            ]
            for name, d in domains.items()
        ],
    )
    for name, d in domains.items():
        if of := sum(d["prompt_tokens"].values()):
            share = of / sum(d["tokens"].values())
            say(f"  {name}: instruction data, {share:.0%} of the tokens are prompts, read and not scored; MB are completions")
    say("Sources", "bold")
    table(
        ["domain", "tokens' hash", "source as pinned", "licence"],
        [[name, d["hash"][:12], _source(d["pin"]), d["licence"]] for name, d in domains.items()],
        left=4,
    )
    _near(report, say, table)
    _benchmark(report, say, table)
    for note in report["notes"]:
        say(f"note: {note}")
    if report["notes"]:
        say()
    state = f"finished: {report['run']['record']}" if report["run"]["finished"] else "not finished yet"
    say(f"Run {report['run']['id']} ({state})", "bold")
    for line in report["uses"]:
        say(f"  {line}")
    say()
    tokens = sum(sum(d["tokens"].values()) for d in domains.values())
    print(f"prepared: {len(domains)} domains, {tokens:,} tokens, cache {printable(report['cache'])}", flush=True)


def _source(pin: dict[str, Any]) -> str:
    if pin["kind"] == "package":
        kind, sha = ("sha256", pin["sha256"]) if "sha256" in pin else ("sha256 of its member", pin["members_sha256"])
        return f"{pin['package']}, {kind} {sha[:12]}"
    if pin["kind"] == "hub":
        return f"{pin['path']} at {pin['revision'][:12]}"
    return f"files, sha256 {pin['sha256'][:12]}" if pin["kind"] == "files" else f"generated, seed {pin['seed']}"


def _near(report: Report, say: Any, table: Any) -> None:
    pairs, split, count = report["near_duplicates"], report["eval"]["split"], report["eval"]["documents"]
    say(
        f"Near duplicates: {overlap.NEAR_SHARE:.0%} or more of the {overlap.NEAR_WORDS}-grams of a document are in one training document",
        "bold",
    )
    rows = []
    for name in dict.fromkeys(p["domain"] for p in pairs):
        own = [p for p in pairs if p["domain"] == name]
        scored = {p["document"] for p in own if p["split"] == split and p["place"] < count}
        held_out = sum(report["domains"][name]["documents"][s] for s in ("dev", "test"))
        found = len({p["document"] for p in own})
        where = ", ".join(dict.fromkeys(p["in_domain"] for p in own))
        rows.append([name, where, f"{len(scored)} of {count}", f"{found} of {held_out:,}", f"{own[0]['share']:.2f}"])
    if not rows:
        say("  none")
        say()
        return
    table(["domain", "in training text of", "scored documents", "test and dev documents", "worst"], rows, left=2)
    for p in pairs[:WORST]:
        say(f"  {p['share']:.2f}  {p['domain']} {p['split']} {p['document']}: {p['in_domain']} train {p['in_document']}")
    if len(pairs) > WORST:
        say(f"  ... {len(pairs):,} pairs in all; --json lists them")
    say()


def _benchmark(report: Report, say: Any, table: Any) -> None:
    shared = report["benchmark_overlap"]
    if not shared:
        return
    say(f"Task items that share a {overlap.BENCHMARK_WORDS}-gram with a training document", "bold")
    rows = []
    for task in dict.fromkeys(s["task"] for s in shared):
        own = [s for s in shared if s["task"] == task]
        hits = {s["domain"]: len(s["found"]) for s in own if s["found"]}
        count = len({item for s in own for item in s["found"]})
        where = ", ".join(f"{domain} {n}" for domain, n in hits.items()) or "-"
        rows.append([task, where, f"{count:,}", f"{own[0]['long_enough']:,}", f"{own[0]['items']:,}"])
    table(["task", "by domain", "share one", f"have {overlap.BENCHMARK_WORDS} words", "items"], rows, left=2)
    examples = [(s["task"], item, s["domain"], document) for s in shared for item, document in s["found"].items()]
    for task, item, domain, document in examples[:WORST]:
        say(f"  {task} {item}: {domain} train {document}")
    if len(examples) > WORST:
        say(f"  ... {len(examples):,} in all; --json lists them")
    say()
