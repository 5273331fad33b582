"""Load what a run works on: model, domains and tasks, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gain_cl import domains as corpora
from gain_cl.compose import checks
from gain_cl.config.schema import JOINT, RunConfig
from gain_cl.domains import overlap
from gain_cl.measure import provenance, tasks
from gain_cl.models import convert, load, source
from gain_cl.runs import same
from gain_cl.system import signals

if TYPE_CHECKING:
    from gain_cl.domains import Domain, Stream
    from gain_cl.measure.scoring import Teller
    from gain_cl.models.load import Loaded
    from gain_cl.runs.plan import Plan


@dataclass(frozen=True)
class Inputs:
    """What a run works on. notes: what a reader of the numbers must know; facts: what may not
    differ between attempts; environment: of this attempt, what may differ from another; identity:
    all that a score depends on besides weights and what is scored."""

    config: RunConfig
    plan: Plan
    loaded: Loaded
    domains: dict[str, Domain]  # trained ones in order, then the controls
    taskset: tasks.TaskSet | None
    notes: list[str]
    facts: dict[str, Any]
    environment: dict[str, Any]
    identity: dict[str, Any]
    total_parameters: int

    def peak_memory(self) -> int:
        """Return the most memory in use so far, in bytes: of the GPU, or of this process."""
        import torch

        if self.loaded.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.loaded.device)
        return provenance.peak_memory()


def load_inputs(config: RunConfig, plan: Plan, tracker: Teller) -> Inputs:
    """Load model, domains and tasks, and check them against each other."""
    tracker.phase("import torch and transformers")
    if config.compute.deterministic:
        # cuBLAS reads it once, when torch starts it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from gain_cl.models import forward

    device = load.device_of(config.compute.device, config.model.dtype)
    torch.set_num_threads(config.compute.threads or _cores())
    torch.use_deterministic_algorithms(config.compute.deterministic)
    signals.poll()
    tracker.phase(f"load {config.model.name}")
    source.prove_files(config.model, plan.pins["model"])
    loaded = load.load_model(config.model, device)
    checks.limits(config, loaded.model.config.to_dict())
    if config.train.pack == "mask":
        forward.prove_masks(loaded, config.train.block)
    taskset = None
    if config.tasks.names:
        tracker.phase("prepare tasks")
        taskset = tasks.TaskSet(config.tasks, loaded.tokenizer, loaded.context)
    tracker.phase("prepare domains")
    names, domains = [*config.sequence.trained, *config.sequence.controls], {}
    for i, name in enumerate(names):
        signals.poll()
        tracker.progress(i, len(names), "domains", name)
        domains[name] = corpora.prepare_domain(
            config.domains[name],
            loaded.tokenizer,
            loaded.tokenizer_hash,
            plan.pins["domains"][name],
            loaded.prefix_id,
        )
    notes = corpora.check_domains(
        domains, config.train, config.eval, loaded.vocabulary, config.only_scored,
        loaded.tokenizer, "unknown" in config.allow_change,
    )  # fmt: skip
    tracker.phase("compare training text with what is scored")
    trained = config.sequence.trained
    near = overlap.near_duplicates(domains, trained, config.eval)
    shared = overlap.benchmark(domains, trained, tasks.texts(taskset)) if taskset else []
    notes += overlap.notes(near, shared, config.eval) + _advice(config, loaded)
    files, facts = convert.model_files(config.model), same.fixed_facts(config, plan.pins)
    facts["model"]["files"] = files
    facts["data"]["tokens"] = {name: domain.hash for name, domain in domains.items()}
    facts["data"]["validation"] = {
        name: domain.split_hash(config.eval.split) for name, domain in domains.items()
    }
    kind = device.type
    if kind == "cuda":
        kind += f", numerics {provenance.GPU_NUMERICS}"
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
    return Inputs(
        config=config,
        plan=plan,
        loaded=loaded,
        domains=domains,
        taskset=taskset,
        notes=notes,
        facts={**facts, "tokenizer": loaded.tokenizer_hash, "device": kind},
        environment={**machine, "micro_batch": config.compute.micro_batch},
        identity={
            "model": config.scientific()["model"],
            "pin": plan.pins["model"],
            "files": files,
            **machine,
            "deterministic": config.compute.deterministic,
            "machine": provenance.machine(),
            "code": provenance.code(),
        },
        total_parameters=sum(p.numel() for p in loaded.model.parameters()),
    )


def training_streams(config: RunConfig, inputs: Inputs) -> list[Stream]:
    """Return the training text of each stage."""
    separator = inputs.loaded.separator_id
    streams: list[Stream] = [
        inputs.domains[d].train_blocks(config.seed, config.train.block, separator)
        for d in config.sequence.trained
    ]
    return [corpora.Mixture(JOINT, streams, config.seed)] if config.regime == "joint" else streams


def _advice(config: RunConfig, loaded: Loaded) -> list[str]:
    """Return what a reader of the numbers must know about these settings."""
    notes = [config.model.note, *loaded.notes] if config.model.note else [*loaded.notes]
    if config.lr_tuned_on and config.lr_tuned_on != config.model.name:
        notes.append(
            f"train.lr={config.train.lr:g} was chosen on {config.lr_tuned_on}, not on "
            f"{config.model.name}: sweep it before comparing methods"
        )
    if config.tasks.limit:
        notes.append(
            f"tasks.limit={config.tasks.limit}: task scores are for debugging and may not "
            "enter a table"
        )
    return notes


def _cores() -> int:
    """Return the number of cores this process may use, or what OMP_NUM_THREADS says."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
