"""One run, from a configuration to a record. READ THIS FIRST: it is the whole procedure, top to bottom.

``prepare`` is torch-free: it pins the inputs, names the run and says whether it is finished. ``execute`` does the work:
score the untouched model on every domain (stage 0); attach the adapter; then for each domain learn it and score every
domain again. Nothing here knows what a forgetting matrix is: that is derived from the record afterwards.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from gain_cl import adapters, checks, guards, models, provenance, record, tasks
from gain_cl import domains as domains_
from gain_cl.config import RunConfig
from gain_cl.files import write_bytes
from gain_cl.lock import owned

if TYPE_CHECKING:
    from gain_cl.config import Eval
    from gain_cl.domains import Domain
    from gain_cl.models import Loaded


@dataclass(frozen=True)
class Plan:
    """Identity and places of a run. folder: output_dir/<run_id>; finished: the record is there already."""

    run_id: str
    pins: dict[str, Any]
    record_path: Path
    folder: Path

    @property
    def finished(self) -> bool:
        return self.record_path.exists()

    @property
    def files(self) -> dict[str, Path]:
        """What a user is told to look at."""
        return {
            "per-item values": record.items_path(self.record_path),
            "matrix (CSV)": self.folder / "matrix.csv",
            "heat map (PNG)": self.folder / "matrix.png",
            "metrics": self.folder / "metrics.jsonl",
            "adapters": self.folder / "stages",
        }


def prepare(config: RunConfig) -> Plan:
    """Pin model, data and tasks and derive the run id. Torch-free; reads local files, downloads nothing."""
    pins = {
        "model": models.pin(config.model),
        "domains": {name: domains_.pin(domain) for name, domain in config.domains.items()},
        "tasks": tasks.pin(config.tasks),
        "plugins": {"adapter": adapters.pin(config.adapter.kind), "guard": guards.pin(config.guard.kind)},
    }
    run_id = provenance.run_id(config, pins)
    plan = Plan(run_id, pins, Path(config.results_dir) / "runs" / f"{run_id}.json", Path(config.output_dir) / run_id)
    if not plan.finished or config.force:
        for domain in config.domains.values():
            if domain.source.kind == "files":  # a bad line shows now, not after a model was loaded
                deque(domains_.documents(domain), maxlen=0)
    return plan


def execute(config: RunConfig, plan: Plan) -> record.Run:
    """Carry the run out, or read it when it is finished and force is off."""
    if plan.finished and not config.force:
        return show_again(plan)
    with owned(plan.folder):
        if plan.finished and not config.force:  # another process finished it while we waited
            return show_again(plan)
        return _execute(config, plan)


def show_again(plan: Plan) -> record.Run:
    """A finished run; its pictures are made again where they are missing."""
    run = record.load(plan.record_path)
    if not all(plan.files[k].exists() for k in ("matrix (CSV)", "heat map (PNG)")):
        _write_views(run, plan)
    return run


def _execute(config: RunConfig, plan: Plan) -> record.Run:
    from gain_cl import track

    started, origin = time.time(), provenance.environment()
    trained, names = config.sequence.trained, [*config.sequence.trained, *config.sequence.controls]
    last = len(trained)
    steps, cells = last * config.train.stage_steps, (last + 1) * len(names)
    with track.Tracker(config, plan.run_id, plan.folder, steps_total=steps, cells_total=cells) as tracker:
        tracker.phase("import torch and transformers", stage=0, of=last)
        if config.compute.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, when torch starts it
        import torch

        from gain_cl import evaluate, train

        device = models.device_of(config.compute.device, config.model.dtype)
        torch.set_num_threads(config.compute.threads or _cores())
        torch.use_deterministic_algorithms(config.compute.deterministic)

        tracker.phase(f"load {config.model.name}", stage=0, of=last)
        loaded = models.load(config.model, device)
        checks.limits(config, loaded.model.config.to_dict())
        total_parameters = sum(p.numel() for p in loaded.model.parameters())
        tracker.phase("prepare domains", stage=0, of=last)
        domains: dict[str, Domain] = {}
        for i, name in enumerate(names):
            tracker.progress(i, len(names), "domains", name)
            domains[name] = domains_.prepare(config.domains[name], loaded.tokenizer, loaded.tokenizer_hash)
        notes = domains_.check(domains, config.train, config.eval, loaded.vocabulary, config.sequence.controls) + _advice(config, loaded)
        for note in notes:
            tracker.note(note)
        taskset = tasks.TaskSet(config.tasks, loaded.tokenizer) if config.tasks.names else None

        documents: list[pd.DataFrame] = []  # a row per scored document and stage
        items: list[pd.DataFrame] = []  # a row per task item and stage

        def measure(index: int, domain: str | None, stats: record.TrainStats | None) -> record.StageRecord:
            """Score every domain, and the tasks when they are due."""
            tracker.phase(f"score after {domain}" if domain else "score pretrained", stage=index, of=last)
            scores, begun = {}, time.perf_counter()
            for i, name in enumerate(names):
                tracker.progress(i, len(names), "cells", name)
                rows = score_domain(loaded, domains[name], config.eval, config.compute.eval_batch)
                documents.append(rows.assign(stage=index, domain=name, split=config.eval.split))
                scores[name] = evaluate.total(rows)
            scored = time.perf_counter()
            task_scores: dict[str, record.TaskScore] = {}
            if taskset is not None and tasks.due(config.tasks.stages, index, last):
                tracker.phase("run tasks", stage=index, of=last)
                task_scores, answers = taskset.score(loaded, progress=lambda done, of: tracker.progress(done, of, "items"))
                items.append(answers.assign(stage=index))
            row = record.StageRecord(
                index=index,
                domain=domain,
                domains=scores,
                tasks=task_scores,
                train=stats,
                eval_seconds=scored - begun,
                task_seconds=time.perf_counter() - scored,
            )
            tracker.stage(row)
            return row

        stages = [measure(0, None, None)]  # before anything is attached: the same for every method of this model

        with torch.random.fork_rng():
            torch.manual_seed(train.seed_of("init", config.seed))
            adapter = adapters.build(config.adapter)
            adapter.attach(loaded)
            guard = guards.build(config.guard)
            guard.attach(loaded, adapter, train.seed_of("guard", config.seed))
            if config.compute.gradient_checkpointing:
                models.checkpoint_activations(loaded.model)

            for index, name in enumerate(trained, start=1):
                tracker.phase(f"learn {name}", stage=index, of=last)
                if index == 1 or config.train.optimizer == "fresh":
                    optimizer = train.optimizer(adapter, config.train)
                blocks = domains[name].train_blocks(config.seed, config.train.block, loaded.separator_id)
                micro = config.compute.micro_batch
                log: list[dict[str, Any]] = []
                dev: list[dict[str, float]] = []
                for row in train.stage(
                    loaded, adapter, guard, blocks, config.train, optimizer, index=index, seed=config.seed, micro_batch=micro
                ):
                    log.append(row)
                    tracker.step({"stage": index, "domain": name, "steps": config.train.stage_steps, **row})
                    if config.train.dev_every and row["step"] % config.train.dev_every == 0:
                        on_dev = config.eval.model_copy(update={"split": "dev"})
                        score = evaluate.total(score_domain(loaded, domains[name], on_dev, config.compute.eval_batch))
                        dev.append({"step": row["step"], "nll_nats": score.nll_nats, "tokens": score.tokens})
                        tracker.dev({"stage": index, "domain": name, "step": row["step"], "loss_nats": score.loss_nats})
                guard.after_stage(index, name, blocks)
                _save_stage(adapter.state(), plan.folder / "stages", index, name, keep=adapter.keep_stages)
                stats = record.TrainStats(
                    steps=len(log),
                    tokens=sum(r["tokens"] for r in log),
                    seconds=sum(r["seconds"] for r in log),
                    lr=config.train.lr,
                    first_loss_nats=log[0]["loss_nats"],
                    last_loss_nats=log[-1]["loss_nats"],
                    dev=dev,
                )
                stages.append(measure(index, name, stats))

        finished = record.RunRecord(
            run_id=plan.run_id,
            model=config.model.name,
            method=config.method,
            sequence=config.sequence.name,
            seed=config.seed,
            trained=trained,
            controls=config.sequence.controls,
            protocol=evaluate.protocol(config.eval, loaded.prefix_id),
            config=config.model_dump(mode="json"),
            pins={
                **plan.pins,
                "model_files": models.files(config.model),
                "tokenizer": loaded.tokenizer_hash,
                "tokens": {n: d.hash for n, d in domains.items()},
            },
            provenance={
                **origin,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "threads": torch.get_num_threads(),
                "seconds": time.time() - started,
            },
            trainable_parameters=sum(p.numel() for p in adapter.parameters().values()),
            total_parameters=total_parameters,
            peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else provenance.peak_memory(),
            stages=stages,
            items_sha256="",
            notes=notes,
        )
        answers = pd.concat(items, ignore_index=True) if items else pd.DataFrame(columns=record.ITEM_COLUMNS)
        run = record.save(finished, pd.concat(documents, ignore_index=True), answers, plan.record_path)
        _write_views(run, plan)
        tracker.finish(run)
    return run


def score_domain(loaded: Loaded, domain: Domain, settings: Eval, batch: int) -> pd.DataFrame:
    """The first settings.documents documents of settings.split in hash order, scored by the protocol of settings."""
    from gain_cl import evaluate

    chosen = domain.split_documents(settings.split)[: settings.documents]
    return evaluate.score(loaded, chosen, settings.window, settings.context, settings.stride, batch)


def _advice(config: RunConfig, loaded: Loaded) -> list[str]:
    """What a reader of the numbers must know about these settings."""
    notes = [config.model.note] if config.model.note else []
    own = loaded.model.config.to_dict()
    for key, stated in (config.model.arch or {}).items():
        if key in own and own[key] != stated and not (isinstance(stated, float) and math.isclose(own[key], stated, rel_tol=1e-6)):
            notes.append(f"model.arch.{key}={stated} is not what the weights say, {own[key]}: the weights count")
    if config.lr_tuned_on and config.lr_tuned_on != config.model.name:
        chosen = f"train.lr={config.train.lr:g} was chosen on {config.lr_tuned_on}, not on {config.model.name}"
        notes.append(f"{chosen}: sweep it before comparing methods")
    if config.tasks.limit:
        notes.append(f"tasks.limit={config.tasks.limit}: task scores are for debugging and may not enter a table")
    return notes


def _save_stage(state: dict[str, Any], folder: Path, index: int, domain: str, keep: bool) -> None:
    """The trained state after a stage, as safetensors; full fine-tuning keeps only the last one."""
    from safetensors.torch import save

    write_bytes(folder / f"{index:02d}-{domain}" / "adapter.safetensors", save(state))
    if not keep:
        for old in folder.glob("*/adapter.safetensors"):
            if not old.parent.name.startswith(f"{index:02d}-"):
                old.unlink()


def _write_views(run: record.Run, plan: Plan) -> None:
    """Matrix and heat map: derived from the record, never read back."""
    from gain_cl.figures import heatmap
    from gain_cl.tables import matrix

    write_bytes(plan.files["matrix (CSV)"], matrix.csv(run).encode())
    write_bytes(plan.files["heat map (PNG)"], heatmap.png(run))


def _cores() -> int:
    """Cores this process may use, or what OMP_NUM_THREADS says."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
