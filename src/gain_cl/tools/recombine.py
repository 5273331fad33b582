"""``python -m gain_cl recombine RUN``: diagonal gains multiply, so stages can be taken out and
weighted without training.

Stage k of a run multiplied the weights by diag(f_k), f_k = S_k / S_{k-1}, S_k being its gains (on
their input or output side). The model of any selection is the product of f_k^w_k: w = 0 leaves a
stage out, 1 keeps it, 0.5 takes its geometric half. Products of diagonals commute: every order
gives the same model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gain_cl.config.schema import Gain
from gain_cl.errors import ConfigError, DataError, suggest
from gain_cl.paper.table import say
from gain_cl.stats import format
from gain_cl.tools import export, reopen
from gain_cl.tools.command import RUN, Parser, load_run, new_folder, print_report

if TYPE_CHECKING:
    from torch import Tensor


def main(argv: list[str]) -> int:
    """Print perplexity of the recombined model beside the run's, and what each stage contributes to
    each domain."""
    parser = Parser("recombine", *RUN)
    parser.option("--drop", "stages to leave out, by domain: law,medicine", "")
    parser.option("--scale", "powers of stages: medicine=0.5 (1 keeps, 0 drops, -1 undoes)", "")
    parser.option(
        "--no-contributions", "skip what each stage contributes (one scoring a stage)", False
    )
    parser.option("--to", "write the recombined gains as a PEFT adapter into this new folder")
    args = parser.read(argv)
    run = reopen.Reopened(load_run(args), args.output_dir)
    _check(run)
    if args.to is not None:
        export.possible(run.config, "peft")
        new_folder(Path(args.to))
    return print_report(_recombine(run, _weights(args, run.record.trained), args), args.json, _show)


def _check(run: reopen.Reopened) -> None:
    """Raise ConfigError for a run whose stages are no factors."""
    r = run.record
    if not isinstance(run.config.adapter, Gain):
        what = f"method {r.method} has no gains, which alone multiply"
    elif r.config["adapter"].get("init_from"):
        what = "the run began from another adapter, which would count as part of its first stage"
    elif r.regime != "sequential":
        what = f"the run is {r.regime}: it has no stages one after the other"
    else:
        return
    raise ConfigError(what, r.run_id, "use it on a sequential run of a gain_... method")


def _weights(args: Any, stages: list[str]) -> dict[str, float]:
    """Return domain -> power of its stage."""
    weights = dict.fromkeys(stages, 1.0)
    asked = [(f"{name}=0", "--drop") for name in args.drop.split(",") if name]
    asked += [(part, "--scale") for part in args.scale.split(",") if part]
    for part, where in asked:
        name, _, power = part.partition("=")
        if name not in stages:
            raise ConfigError(f"{name!r} is no stage of this run", where, suggest(name, stages))
        weights[name] = reopen.number(power, f"{where} {part}")
    return weights


def factors(states: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return f_k = S_k / S_{k-1} of every stage, float64, by layer.

    states: trained states after stages 1 .. T, each {layer: delta} and, after handover=restart,
    {layer.past: what was frozen}: S = past * (1 + delta), or 1 + delta. DataError: a gain is 0.
    """
    found: list[dict[str, Tensor]] = []
    before: dict[str, Tensor] = {}
    for state in states:
        s = {}
        for name in [name for name in state if not name.endswith(".past")]:
            past = state.get(f"{name}.past", 1)
            s[name] = (past * (1 + state[name])).double()  # in fp32, as the run did: bit for bit
            if (s[name] == 0).any():
                what = "a gain is exactly 0: what came before it cannot be told"
                raise DataError(what, name, "lower train.lr")
        found.append({name: t / before.get(name, 1) for name, t in s.items()})
        before = s
    return found


def product(parts: list[dict[str, Tensor]], powers: Iterable[float]) -> dict[str, Tensor]:
    """Return delta = prod f_k^w_k - 1 by layer, fp32. DataError: a broken power of a negative
    factor is no number."""
    total: dict[str, Any] = dict.fromkeys(parts[0], 1)
    for part, power in zip(parts, powers, strict=True):
        for name, f in part.items():
            total[name] = total[name] * f**power
            if total[name].isnan().any():
                what = f"a stage turned the sign of a gain of {name}"
                raise DataError(what, "--scale", "use whole powers")
    return {name: (t - 1).float() for name, t in total.items()}


def _recombine(run: reopen.Reopened, weights: dict[str, float], args: Any) -> dict[str, Any]:
    """Score the recombined model, and the same without each of its stages."""
    parts = factors([run.state(k) for k in range(1, run.last + 1)])
    kept = [name for name, w in weights.items() if w]
    left_out = [] if args.no_contributions or len(kept) < 2 else kept
    with run.opened() as loaded:
        adapter = run.attach(loaded)

        def score_D(powers: dict[str, float]) -> np.ndarray:
            adapter.load_state(product(parts, powers.values()))
            return run.losses_D(powers=powers)

        without = {name: score_D({**weights, name: 0.0}) for name in left_out}
        losses_D = score_D(weights)
        if args.to is not None:
            export.write_adapter(adapter, loaded, run.config, Path(args.to))
    recorded = run.record.losses()
    loss = {"pretrained": recorded[0], "run": recorded[-1], "recombined": losses_D}
    return {
        "run_id": run.record.run_id,
        "protocol": run.record.protocol,
        "weights": weights,
        "domains": run.names,
        "loss_nats": {name: row.tolist() for name, row in loss.items()},
        "contribution_nats": {name: (x - losses_D).tolist() for name, x in without.items()},
        "adapter": args.to,
    }


def _show(report: dict[str, Any]) -> None:
    powers = (f"{name}^{power:g}" for name, power in report["weights"].items() if power)
    loss, names = report["loss_nats"], report["domains"]
    title = f"Perplexity of {' '.join(powers) or 'nothing'}"
    reopen.show(title, names, loss, write=format.perplexity)
    change = {of: np.subtract(loss["recombined"], loss[of]) for of in ("pretrained", "run")}
    reopen.show("Change of perplexity against, % (below 0: better)", names, change)
    if left_out := report["contribution_nats"]:
        note = "above 0: the stage helps the domain; below 0: it hurts it"
        title = "Change of perplexity when a stage is left out, %"
        reopen.show(title, names, left_out, note)
    if report["adapter"]:
        say(f"PEFT adapter: {report['adapter']}")
