"""Finished runs without a model: per-document losses drawn from a seeded model of continual
learning, saved as real records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gain_cl.config.schema import RunConfig
from gain_cl.measure import record
from gain_cl.system.sealed import seal_of

# domain -> perplexity of the pretrained model (shared/data.md; the rest of the same order)
OFFLINE = {
    "medicine": 23.3,
    "law": 22.2,
    "code": 10.1,
    "maths": 9.4,
    "news": 33.7,
    "science": 27.5,
    "politics": 31.2,
    "scripture": 18.9,
}
CONTROLS = {"geography": 19.7, "encyclopedia": 24.6}


def config(
    trained: list[str] | None = None,
    controls: list[str] | None = None,
    *,
    tokens: int = 8192,
    tasks: list[str] | None = None,
    **track: object,
) -> RunConfig:
    """A valid configuration whose domains are generated text."""
    trained, controls = trained or list(OFFLINE), list(CONTROLS) if controls is None else controls
    return RunConfig.model_validate(
        {
            "model": {"name": "smollm2", "path": "org/name", "dtype": "float32"},
            "method": "gain_ffn",
            "adapter": {"kind": "gain", "roles": ["attn_out", "ffn_down"]},
            "guard": {"kind": "none"},
            "sequence": {"name": "offline", "domains": trained, "controls": controls},
            "domains": {
                d: {"name": d, "source": {"kind": "generated", "seed": i}}
                for i, d in enumerate(trained + controls)
            },
            "tasks": {"names": tasks or []},
            "train": {"tokens": tokens, "lr": 3e-3},
            "eval": {},
            "seed": 0,
            "compute": {},
            "track": track,
            "output_dir": "runs",
            "results_dir": "results",
        }
    )


def documents(
    bases: dict[str, float],
    trained: list[str],
    *,
    count: int = 32,
    seed: int = 0,
    learn: float = 0.15,
    forget: float = 0.02,
) -> pd.DataFrame:
    """Document rows: each domain loses ``learn`` nats in its own stage, gains ``forget`` in each
    later one; all drift by -0.01."""
    rng = np.random.default_rng(seed)
    rows = []
    for domain, perplexity in bases.items():
        tokens = np.minimum(128, rng.integers(60, 200, count))
        level = np.log(perplexity) + rng.normal(0, 0.35, count)
        for stage in range(len(trained) + 1):
            if stage:
                own = trained[stage - 1] == domain
                earlier = domain in trained[: stage - 1]
                level = level - 0.01 - learn * own + forget * earlier + rng.normal(0, 0.03, count)
            rows += [
                {
                    "stage": stage,
                    "domain": domain,
                    "split": "test",
                    "document": f"{domain}{i:012d}",
                    "nll_nats": float(level[i] * tokens[i]),
                    "tokens": int(tokens[i]),
                    "bytes": int(tokens[i]) * 4,
                }
                for i in range(count)
            ]
    return pd.DataFrame(rows)


def items(stages: list[int], *, count: int = 100, seed: int = 0) -> pd.DataFrame:
    """BoolQ-like items: two choices, margins that drift from stage to stage."""
    rng = np.random.default_rng(seed)
    gold = (rng.random(count) < 0.62).astype(int)
    margin = rng.normal(0.3, 1.0, count)
    rows = []
    for stage in stages:
        margin = margin + rng.normal(-0.05 * (stage > 0), 0.3, count)
        yes = -np.log1p(np.exp(-np.where(gold == 1, margin, -margin)))
        no = np.log1p(-np.exp(yes))
        rows += [
            {
                "stage": stage,
                "task": f"boolq@{count}",
                "item": f"{i:016x}",
                "gold": int(gold[i]),
                "logprobs": [no[i], yes[i]],
                "choice_bytes": [2, 3],
                "choice_chars": [2, 3],
            }
            for i in range(count)
        ]
    return pd.DataFrame(rows, columns=record.ITEM_COLUMNS)


def run(
    path: Path,
    *,
    bases: dict[str, float] | None = None,
    controls: list[str] | None = None,
    tokens: int = 8192,
    with_items: bool = True,
    count: int = 32,
    seed: int = 0,
    notes: list[str] | None = None,
    **shape: float,
) -> record.Run:
    """A finished run, saved to ``path`` and read back."""
    bases = {**OFFLINE, **CONTROLS} if bases is None else bases
    controls = list(CONTROLS) if controls is None else controls
    trained = [d for d in bases if d not in controls]
    table = documents(bases, trained, count=count, seed=seed, **shape)
    last = len(trained)
    answers = (
        items([0, last], seed=seed) if with_items else pd.DataFrame(columns=record.ITEM_COLUMNS)
    )
    settings = config(trained, controls, tokens=tokens, tasks=["boolq@100"] if with_items else None)
    stages = []
    for stage in range(last + 1):
        scores = {
            d: record.DomainScore(
                nll_nats=float(r.nll_nats.sum()),
                tokens=int(r.tokens.sum()),
                bytes=int(r.bytes.sum()),
                documents=len(r),
            )
            for d, r in table[table.stage == stage].groupby("domain")
        }
        tasks = {}
        for task, rows in answers[answers.stage == stage].groupby("task"):
            correct = sum(
                int(np.argmax(lp)) == g for lp, g in zip(rows.logprobs, rows.gold, strict=True)
            )
            tasks[str(task)] = record.TaskScore(
                items=len(rows), correct=correct, correct_norm=correct, fewshot=0
            )
        train = (
            record.TrainStats(
                steps=8,
                tokens=tokens,
                seconds=41.5,
                lr=3e-3,
                first_loss_nats=3.1,
                last_loss_nats=2.9,
            )
            if stage
            else None
        )
        stages.append(
            record.StageRecord(
                index=stage,
                domain=trained[stage - 1] if stage else None,
                domains=scores,
                tasks=tasks,
                train=train,
                eval_seconds=33.0,
                task_seconds=12.0 if tasks else 0.0,
            )
        )
    return record.save(
        record.RunRecord(
            run_id="smollm2-gain_ffn-offline-s0-0123456789",
            model="smollm2",
            method="gain_ffn",
            sequence="offline",
            seed=0,
            trained=trained,
            controls=controls,
            protocol="ppl-test-first128x32-prefix0-ctx1024",
            config=settings.model_dump(mode="json"),
            pins={},
            provenance={
                "commit": "0" * 40,
                "dirty": False,
                "device": "cpu",
                "threads": 2,
                "seconds": 700.0,
            },
            trainable_parameters=63_360,
            total_parameters=134_515_008,
            peak_memory_bytes=2_900_000_000,
            stages=stages,
            items_sha256="",
            notes=notes or [],
        ),
        table,
        answers,
        path,
    )


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a record's JSON data and seal it again."""
    data = json.loads(path.read_bytes())
    change(data)
    data["seal"] = seal_of(data)
    path.write_text(json.dumps(data))
