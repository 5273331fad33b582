"""``python -m gain_cl interpolate RUN``: W = W_base + alpha (W_tuned - W_base), for any method: a
whole front from one run.

WiSE-FT (Wortsman et al. 2022, 2109.01903): alpha = 0 is the pretrained model, 1 the run's. The
tuned weights are the folded ones, in fp32. Each row is rounded once to the model's dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gain_cl.tools import reopen
from gain_cl.tools.command import RUN, Parser, load_run, print_report


def main(argv: list[str]) -> int:
    """Print the front: change of perplexity against the pretrained model for every alpha."""
    parser = Parser("interpolate", *RUN)
    shares = "shares of the change of the weights (default: %(default)s)"
    parser.option("--alpha", shares, "0,0.25,0.5,0.75,1")
    parser.option("--stage", "stage whose model is the far end (default: the last)", type=int)
    args = parser.read(argv)
    run = reopen.Reopened(load_run(args), args.output_dir)
    alphas = [reopen.number(alpha, "--alpha") for alpha in args.alpha.split(",")]
    stage = reopen.stage_of(args.stage, run.last)
    pretrained, learned = run.record.losses()[0], len(run.record.trained)
    front = []
    for alpha, loss in zip(alphas, _losses(run, alphas, stage), strict=True):
        change = loss - pretrained
        controls = float(change[learned:].mean()) if run.record.controls else None
        means = {"from_base_nats": change[:learned].mean(), "controls_from_base_nats": controls}
        front.append({"alpha": alpha, "loss_nats": loss.tolist(), **means})
    report = {
        "run_id": run.record.run_id,
        "protocol": run.record.protocol,
        "stage": stage,
        "domains": run.names,
        "pretrained_nats": pretrained.tolist(),
        "front": front,
    }
    return print_report(report, args.json, _show)


def _losses(run: reopen.Reopened, alphas: list[float], stage: int) -> list[np.ndarray]:
    """Return the losses of every domain, of the model at each alpha towards a stage's."""
    import torch

    from gain_cl.models import families, load

    losses = []
    with run.opened() as loaded:
        families.can_merge(dict(loaded.model.named_modules()))
        whole = load.load_model(run.fp32, loaded.device).model
        base = {name: p.detach() for name, p in whole.named_parameters()}
        tuned = run.folded(stage)
        for alpha in alphas:
            with torch.no_grad():
                for name, p in loaded.model.named_parameters():
                    p.copy_(base[name] + alpha * (tuned[name] - base[name]))
            losses.append(run.losses_D(alpha=alpha, stage=stage, folded=True))
    return losses


def _show(report: dict[str, Any]) -> None:
    means = {"from_base_nats": "trained", "controls_from_base_nats": "controls"}
    shown = [key for key in means if report["front"][0][key] is not None]
    rows = {}
    for row in report["front"]:
        change = np.subtract(row["loss_nats"], report["pretrained_nats"])
        rows[f"alpha {row['alpha']:g}"] = [*(row[key] for key in shown), *change]
    title = "Change of perplexity from the pretrained model, % (below 0: better), towards stage "
    names = [*(means[key] for key in shown), *report["domains"]]
    note = "trained, controls: means over these domains"
    reopen.show(f"{title}{report['stage']}", names, rows, note)
