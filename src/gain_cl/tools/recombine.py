"""``python -m gain_cl recombine RUN``: diagonal gains multiply, so stages can be taken out,
weighted and reordered without training.

Stage k of a run multiplied the weights by diag(f_k), f_k = S_k / S_{k-1}, S_k being its gains (on
their input or output side). The model of any selection is the product of f_k^w_k: w = 0 leaves a
stage out, 1 keeps it, 0.5 takes its geometric half. Products of diagonals commute: every order
gives the same model, which the verb says instead of computing it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gain_cl.config.schema import Gain
from gain_cl.errors import ConfigError, DataError, suggest
from gain_cl.tools import rescore

if TYPE_CHECKING:
    from torch import Tensor


def main(argv: list[str]) -> int:
    """Print perplexity of the recombined model beside the run's, and what each stage contributes to
    each domain."""
    parser = rescore.arguments(
        "recombine",
        "[--drop A,B] [--scale A=0.5,B=2] [--order A,B,C] [--no-contributions] [--to DIR]",
        "Multiply the gains of a run's stages anew, with stages left out, weighted or "
        "reordered; no training.",
    )
    parser.add_argument("--drop", default="", help="stages to leave out, by domain")
    parser.add_argument(
        "--scale", default="", help="powers of stages: medicine=0.5 (1 keeps, 0 drops, -1 undoes)"
    )
    parser.add_argument(
        "--order",
        default="",
        help="the stages in another order (which changes nothing, as is told)",
    )
    parser.add_argument(
        "--no-contributions",
        action="store_true",
        help="skip what each stage contributes (one scoring a stage)",
    )
    parser.add_argument(
        "--to", help="write the recombined gains as a PEFT adapter into this new folder"
    )
    args = parser.parse_args(argv)
    bench = rescore.bench(args)
    weights = _weights(args, bench)
    kept = [name for name, w in weights.items() if w]
    contributions = not args.no_contributions and len(kept) > 1
    try:
        report = _recombine(bench, weights, kept if contributions else [], args.to)
    finally:
        bench.close()
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
    else:
        _show(report, bench, weights, args.order)
    return 0


def _weights(args: Any, bench: rescore.Bench) -> dict[str, float]:
    """Domain -> power of its stage. ConfigError for runs without gains and names that are no
    stage."""
    config, stages = bench.config, bench.record.trained
    if not isinstance(config.adapter, Gain):
        raise ConfigError(
            f"method {config.method} has no gains, which alone multiply",
            bench.record.run_id,
            "use it on a gain_... run",
        )
    if bench.record.config["adapter"].get("init_from"):
        what = "the run began from another adapter, which would count as part of its first stage"
        raise ConfigError(what, bench.record.run_id, "recombine a run without adapter.init_from")
    if args.to is not None:
        from gain_cl.tools import exported

        exported.possible(config, "peft")
        if (folder := Path(args.to)).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError("the folder is not empty", str(folder), "name another one with --to")
    if bench.record.regime != "sequential":
        what = f"the run is {bench.record.regime}: it has no stages one after the other"
        raise ConfigError(what, bench.record.run_id, "use it on a sequential run")
    weights = dict.fromkeys(stages, 1.0)
    for name in filter(None, args.drop.split(",")):
        weights[_known(name, stages, "--drop")] = 0.0
    for part in filter(None, args.scale.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{part!r} has no value", "--scale", "write --scale DOMAIN=0.5")
        if weights[_known(name, stages, "--scale")] == 0:
            raise ConfigError(f"{name} is dropped and scaled", "--scale", "name it once")
        weights[name] = rescore.number(value, "--scale")
    if args.order:
        order = [_known(name, stages, "--order") for name in args.order.split(",")]
        if sorted(order) != sorted(name for name, w in weights.items() if w):
            raise ConfigError(
                "the order is not one of the stages that are kept",
                "--order",
                "name each once, and none that is dropped",
            )
    return weights


def _known(name: str, stages: list[str], where: str) -> str:
    if name not in stages:
        raise ConfigError(f"{name!r} is no stage of this run", where, suggest(name, stages))
    return name


def factors(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """f_k = S_k / S_{k-1} of every stage, float64, by layer. states: trained states after stages 1
    .. T, each {layer: delta} and, after handover=restart, {layer.past: what was frozen}: S = past *
    (1 + delta), or 1 + delta."""
    import torch

    found: list[dict[str, Tensor]] = []
    before: dict[str, Tensor] = {}
    for state in states:
        deltas = {name: t for name, t in state.items() if not name.endswith(".past")}
        in_fp32 = {
            name: 1 + d if f"{name}.past" not in state else state[f"{name}.past"] * (1 + d)
            for name, d in deltas.items()
        }
        s = {
            name: t.double() for name, t in in_fp32.items()
        }  # multiplied in fp32, as the run did: bit for bit its gains
        if any((t == 0).any() for t in s.values()):
            raise DataError(
                "a gain is exactly 0: what came before it cannot be told",
                "stages",
                "lower train.lr",
            )
        found.append({name: t / before.get(name, torch.ones_like(t)) for name, t in s.items()})
        before = s
    return found


def product(parts: list[dict[str, Tensor]], powers: list[float]) -> dict[str, Tensor]:
    """delta = prod f_k^w_k - 1 by layer, fp32. DataError: a broken power of a negative factor is no
    number."""
    import torch

    total = {name: torch.ones_like(t) for name, t in parts[0].items()}
    for part, power in zip(parts, powers, strict=True):
        for name, f in part.items():
            if power != int(power) and (f < 0).any():
                raise DataError(
                    f"a stage turned the sign of a gain of {name}", "--scale", "use whole powers"
                )
            total[name] = total[name] * f**power
    return {name: (t - 1).float() for name, t in total.items()}


def _recombine(
    bench: rescore.Bench, weights: dict[str, float], contributors: list[str], to: str | None
) -> dict[str, Any]:
    parts = factors([bench.state(k) for k in range(1, len(weights) + 1)])
    bench.open(rows=1 + len(contributors))
    adapter = bench.attach(bench.loaded)

    def score_D(powers: dict[str, float]) -> np.ndarray:
        delta = product(parts, list(powers.values()))
        adapter.load_state(delta)
        return bench.score_D(delta)

    losses_D = score_D(weights)
    left_out = {name: score_D({**weights, name: 0.0}) for name in contributors}
    if to is not None:
        from gain_cl.tools import exported

        adapter.load_state(product(parts, list(weights.values())))
        exported.adapter_alone(adapter, bench.loaded, bench.config, Path(to))
    recorded = bench.record.losses()
    return {
        "run_id": bench.record.run_id,
        "protocol": bench.record.protocol,
        "weights": weights,
        "domains": bench.names,
        "loss_nats": {
            "pretrained": recorded[0].tolist(),
            "run": recorded[-1].tolist(),
            "recombined": losses_D.tolist(),
        },
        "contribution_nats": {name: (x - losses_D).tolist() for name, x in left_out.items()},
        "adapter": to,
    }


def _show(
    report: dict[str, Any], bench: rescore.Bench, weights: dict[str, float], order: str
) -> None:
    loss = {key: np.array(values) for key, values in report["loss_nats"].items()}
    chosen = (
        " ".join(f"{name}^{w:g}" if w != 1 else name for name, w in weights.items() if w)
        or "nothing"
    )
    rows = [
        ("pretrained", loss["pretrained"]),
        ("the run", loss["run"]),
        ("recombined", loss["recombined"]),
    ]
    rescore.show(f"Perplexity of {chosen}", bench.names, rows, rescore.perplexity, [])
    change = [
        ("% against pretrained", loss["recombined"] - loss["pretrained"]),
        ("% against the run", loss["recombined"] - loss["run"]),
    ]
    rescore.show("Change of perplexity (below 0: better)", bench.names, change, rescore.percent, [])
    if report["contribution_nats"]:
        rows = [(f"without {name}", np.array(x)) for name, x in report["contribution_nats"].items()]
        notes = ["above 0: the stage helps the domain; below 0: it hurts it"]
        rescore.show(
            "Change of perplexity when a stage is left out, %",
            bench.names,
            rows,
            rescore.percent,
            notes,
        )
    if order:
        print(
            f"order {order}: products of diagonal gains commute, so every order of these stages "
            "is the same model"
        )
    if report["adapter"]:
        print(f"PEFT adapter: {report['adapter']}")
