"""One run, from a configuration to a record. READ THIS FIRST: it is the whole procedure, top to bottom.

``prepare`` is torch-free: it pins the inputs, names the run and says whether it is finished. ``execute`` does the work:
score the untouched model on every domain (stage 0); attach the adapter; then for each domain learn it and score every
domain again. Nothing here knows what a forgetting matrix is: that is derived from the record afterwards.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from gain_cl import domains as domains_
from gain_cl import models, provenance, record, tasks
from gain_cl.config import RunConfig
from gain_cl.lock import owned

if TYPE_CHECKING:
    from gain_cl.domains import Domain
    from gain_cl.config import Eval
    from gain_cl.models import Loaded
    from gain_cl.track import Tracker


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
    }
    run_id = provenance.run_id(config, pins)
    return Plan(run_id, pins, Path(config.results_dir) / "runs" / f"{run_id}.json", Path(config.output_dir) / run_id)


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

    started = time.time()
    names = [*config.sequence.trained, *config.sequence.controls]
    stages = len(config.sequence.trained)
    with track.Tracker(
        config, plan.run_id, plan.folder, steps_total=stages * config.train.stage_steps, cells_total=(stages + 1) * len(names)
    ) as tracker:
        tracker.phase("import torch and transformers", stage=0, of=stages)
        import torch

        from gain_cl import adapters, evaluate, guards, train

        device = models.device_of(config.compute.device, config.model.dtype)
        torch.set_num_threads(config.compute.threads or _cores())
        torch.use_deterministic_algorithms(config.compute.deterministic)

        tracker.phase(f"load {config.model.name}", stage=0, of=stages)
        loaded = models.load(config.model, device)
        tracker.phase("prepare domains", stage=0, of=stages)
        domains: dict[str, Domain] = {}
        for i, name in enumerate(names):
            tracker.progress(i, len(names), "domains", name)
            domains[name] = domains_.prepare(config.domains[name], loaded.tokenizer, loaded.tokenizer_hash)
        notes = domains_.check(domains, config.train, config.eval, loaded.model.get_input_embeddings().weight.shape[0], config.sequence.controls)
        notes += _advice(config, loaded)
        taskset = tasks.TaskSet(config.tasks, loaded.tokenizer) if config.tasks.names else None
        for note in notes:
            tracker.note(note)

        documents: list[pd.DataFrame] = []
        items: list[pd.DataFrame] = []

        def measure(index: int, domain: str | None, stats: record.TrainStats | None) -> record.StageRecord:
            """Score every domain, and the tasks where asked for."""
            tracker.phase(f"score after {domain}" if domain else "score pretrained", stage=index, of=stages)
            scores, begun = {}, time.perf_counter()
            for i, name in enumerate(names):
                tracker.progress(i, len(names), "cells", name)
                rows = score_domain(loaded, domains[name], config.eval, config.compute.eval_batch)
                documents.append(rows.assign(stage=index, domain=name, split=config.eval.split))
                scores[name] = evaluate.total(rows)
            eval_seconds, begun, task_scores = time.perf_counter() - begun, time.perf_counter(), {}
            if taskset is not None and tasks.due(config.tasks.stages, index, stages):
                tracker.phase("run tasks", stage=index, of=stages)
                task_scores, rows = taskset.score(loaded, progress=lambda done, of: tracker.progress(done, of, "items"))
                items.append(rows.assign(stage=index))
            row = record.StageRecord(
                index=index,
                domain=domain,
                domains=scores,
                tasks=task_scores,
                train=stats,
                eval_seconds=eval_seconds,
                task_seconds=time.perf_counter() - begun,
            )
            tracker.stage(row)
            return row

        total_parameters = sum(p.numel() for p in loaded.model.parameters())
        measured = [measure(0, None, None)]  # before anything is attached: the same for every method of this model

        with torch.random.fork_rng():
            torch.manual_seed(train.seed_of("init", config.seed))
            adapter = adapters.build(config.adapter)
            adapter.attach(loaded)
            parameters = adapter.parameters()
            trainable = sum(p.numel() for p in parameters.values())
            guard = guards.build(config.guard)
            guard.attach(loaded, adapter, train.seed_of("guard", config.seed))
            if config.compute.gradient_checkpointing:
                loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            optimizer = train.optimizer(adapter, config.train)

            for index, name in enumerate(config.sequence.trained, start=1):
                tracker.phase(f"learn {name}", stage=index, of=stages)
                if config.train.optimizer == "fresh":
                    optimizer = train.optimizer(adapter, config.train)
                blocks = domains[name].train_blocks(config.seed, config.train.block, loaded.separator_id)
                log: list[dict[str, Any]] = []
                dev: list[dict[str, float]] = []
                for step in train.stage(
                    loaded,
                    adapter,
                    guard,
                    blocks,
                    config.train,
                    optimizer,
                    index=index,
                    seed=config.seed,
                    micro_batch=config.compute.micro_batch,
                ):
                    log.append(step)
                    tracker.step({"stage": index, "domain": name, "steps": config.train.stage_steps, **step})
                    if config.train.dev_every and step["step"] % config.train.dev_every == 0:
                        total = evaluate.total(score_domain(loaded, domains[name], config.eval, config.compute.eval_batch, split="dev"))
                        dev.append({"step": step["step"], "nll_nats": total.nll_nats, "tokens": total.tokens})
                        tracker.dev({"stage": index, "domain": name, "step": step["step"], "loss_nats": total.loss_nats})
                guard.after_stage(index, name, blocks)
                stats = record.TrainStats(
                    steps=len(log),
                    tokens=sum(s["tokens"] for s in log),
                    seconds=sum(s["seconds"] for s in log),
                    lr=config.train.lr,
                    first_loss_nats=log[0]["loss_nats"],
                    last_loss_nats=log[-1]["loss_nats"],
                    dev=dev,
                )
                _save_stage(adapter.state(), plan.folder / "stages", index, name, keep=config.adapter.kind != "full")
                measured.append(measure(index, name, stats))

        finished = record.RunRecord(
            run_id=plan.run_id,
            model=config.model.name,
            method=config.method,
            sequence=config.sequence.name,
            seed=config.seed,
            trained=config.sequence.trained,
            controls=config.sequence.controls,
            protocol=evaluate.protocol(config.eval, loaded.prefix_id),
            config=config.model_dump(mode="json"),
            pins={**plan.pins, "tokenizer": loaded.tokenizer_hash, "tokens": {n: d.hash for n, d in domains.items()}},
            provenance={
                **provenance.environment(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "threads": torch.get_num_threads(),
                "seconds": time.time() - started,
            },
            trainable_parameters=trainable,
            total_parameters=total_parameters,
            peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else provenance.peak_memory(),
            stages=measured,
            items_sha256="",
            notes=notes,
        )
        run = record.save(
            finished,
            pd.concat(documents, ignore_index=True),
            pd.concat(items, ignore_index=True) if items else pd.DataFrame(columns=record.ITEM_COLUMNS),
            plan.record_path,
        )
        _write_views(run, plan)
        tracker.finish(run)
    return run


def score_domain(loaded: Loaded, domain: Domain, settings: Eval, batch: int, split: str | None = None) -> pd.DataFrame:
    """The first settings.documents documents of a split in hash order, scored by the protocol of settings."""
    from gain_cl import evaluate

    chosen = domain.split_documents(split or settings.split)[: settings.documents]
    return evaluate.score(loaded, chosen, settings.window, settings.context, settings.stride, batch)


def _advice(config: RunConfig, loaded: Loaded) -> list[str]:
    """What a reader of the numbers must know about these settings."""
    notes = []
    if config.lr_tuned_on and config.lr_tuned_on != config.model.name:
        notes.append(f"train.lr={config.train.lr:g} was chosen on {config.lr_tuned_on}, not on {config.model.name}: sweep it before comparing methods")
    if config.tasks.limit:
        notes.append(f"tasks.limit={config.tasks.limit}: task scores are for debugging and may not enter a table")
    return notes


def _save_stage(state: dict[str, Any], folder: Path, index: int, domain: str, keep: bool) -> None:
    """The trained state after a stage, as safetensors; full fine-tuning keeps only the last one."""
    from safetensors.torch import save

    record.write_bytes(folder / f"{index:02d}-{domain}" / "adapter.safetensors", save(state))
    if not keep:
        for old in folder.glob("*/adapter.safetensors"):
            if not old.parent.name.startswith(f"{index:02d}-"):
                old.unlink()


def _write_views(run: record.Run, plan: Plan) -> None:
    """Matrix and heat map: derived from the record, never read back."""
    from gain_cl.figures import heatmap
    from gain_cl.tables import matrix

    record.write_bytes(plan.files["matrix (CSV)"], matrix.csv(run).encode())
    record.write_bytes(plan.files["heat map (PNG)"], heatmap.png(run))


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
