"""``python -m gain_cl interpolate RUN``: W = W_base + alpha (W_tuned - W_base), for any method: a whole front from one run.

WiSE-FT (Wortsman et al. 2022, 2109.01903): alpha = 0 is the pretrained model, 1 the run's. The tuned weights are the folded
ones, in fp32; each row is rounded once to the model's dtype.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from gain_cl.errors import ConfigError
from gain_cl.verbs import rescore


def main(argv: list[str]) -> int:
    """Print the front: change of perplexity against the pretrained model for every alpha."""
    parser = rescore.arguments(
        "interpolate",
        "[--alpha 0,0.25,0.5,0.75,1] [--stage K]",
        "Score the models between the pretrained one and a stage's (WiSE-FT), without training.",
    )
    parser.add_argument("--alpha", default="0,0.25,0.5,0.75,1", help="shares of the change of the weights (default: %(default)s)")
    parser.add_argument("--stage", type=int, help="stage whose model is the far end (default: the last)")
    args = parser.parse_args(argv)
    bench = rescore.bench(args)
    alphas = [rescore.number(text, "--alpha") for text in args.alpha.split(",")]
    last = len(bench.record.stages) - 1
    stage = last if args.stage is None else args.stage
    if not 1 <= stage <= last:
        raise ConfigError(f"stage {stage} is not among 1..{last}", "--stage", "stage 0 is alpha=0")
    try:
        report = _front(bench, alphas, stage)
    finally:
        bench.close()
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        _show(report, bench)
    return 0


def _front(bench: rescore.Bench, alphas: list[float], stage: int) -> dict[str, Any]:
    import torch

    from gain_cl import models

    state = bench.state(stage)
    bench.open(rows=len(alphas))
    whole = models.load(bench.config.model.model_copy(update={"dtype": "float32"}), bench.loaded.device)
    base = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    adapter = bench.attach(whole)
    adapter.load_state(state)
    adapter.absorb()
    changes = {name: p.detach() - base[name] for name, p in whole.model.named_parameters() if not torch.equal(p, base[name])}
    model = bench.loaded.model
    rows = []
    for alpha in alphas:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in changes:
                    p.copy_(base[name] + alpha * changes[name])
        rows.append(bench.score_D(state, alpha=alpha, folded=True))
    pretrained = bench.record.losses()[0]
    learned, controls = slice(0, len(bench.record.trained)), slice(len(bench.record.trained), None)
    return {
        "run_id": bench.record.run_id,
        "protocol": bench.record.protocol,
        "stage": stage,
        "domains": bench.names,
        "pretrained_nats": pretrained.tolist(),
        "front": [
            {
                "alpha": alpha,
                "loss_nats": row.tolist(),
                "from_base_nats": float((row - pretrained)[learned].mean()),
                "controls_from_base_nats": float((row - pretrained)[controls].mean()) if bench.record.controls else None,
            }
            for alpha, row in zip(alphas, rows, strict=True)
        ],
    }


def _show(report: dict[str, Any], bench: rescore.Bench) -> None:
    base = np.array(report["pretrained_nats"])
    names = ["trained", *(["controls"] if bench.record.controls else []), *bench.names]
    rows = []
    for row in report["front"]:
        means = [row["from_base_nats"], *([row["controls_from_base_nats"]] if bench.record.controls else [])]
        rows.append((f"alpha {row['alpha']:g}", np.array([*means, *(np.array(row["loss_nats"]) - base)])))
    title = f"Change of perplexity from the pretrained model, % (below 0: better), towards stage {report['stage']}"
    rescore.show(title, names, rows, rescore.percent, ["trained, controls: means over these domains"])
