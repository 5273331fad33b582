"""``python -m gain_cl diagnose RUN``: what a run did to the weights, for any method, and how far
its predictions moved from the base.

From the effective change of the weights alone (the adapter folded in, in fp32, minus the pretrained
weights), per kept stage and linear layer: norm, column-span residual, intruder dimensions, and
gains where the change is a diagonal (tools/weights.py). Beside it KL(base || tuned) on the scored
text, both models computing as the run computed. docs/diagnostics.md has the formulas.
"""

from __future__ import annotations

import fnmatch
import math
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gain_cl.config.schema import Given
from gain_cl.errors import ConfigError, DataError, suggest
from gain_cl.measure import diagnosis
from gain_cl.measure.diagnosis import (
    DIRECTIONS,
    EDGES,
    THRESHOLD,
    TOP,
    Diagnostics,
    Divergence,
    Gains,
    Layer,
    Other,
    Stage,
)
from gain_cl.paper.table import Row, Table, Value, plain, print_table
from gain_cl.runs import resume
from gain_cl.stats import format
from gain_cl.system.files import sha256, write_all
from gain_cl.tools.command import RUN, Parser, load_run, print_report
from gain_cl.tools.reopen import Reopened, stage_of

if TYPE_CHECKING:
    from torch import Tensor


KEYS = (*map(str, DIRECTIONS), "all")
"""Numbers of directions, as a record names them."""

Shares = dict[str, float | None]
"""Number of directions (KEYS) -> a share; None where there are not so many."""


def main(argv: list[str]) -> int:
    """Print a summary, write results/diagnostics/RUN_ID.json and diagnostics.png and .pdf into the
    run's folder."""
    parser = Parser("diagnose", *RUN)
    parser.option(
        "--stage", "a stage, or all whose trained state was kept (default: %(default)s)", "all"
    )
    parser.option(
        "--layers",
        "layers whose directions to analyse, by the end of their name, * allowed: o_proj",
        "",
    )
    parser.option("--no-kl", "leave out the KL divergence, which scores the text again", False)
    args = parser.read(argv)
    run = Reopened(load_run(args), args.output_dir)
    path = run.run.path
    results = path.parents[1] if path.parent.name == "runs" else Path(args.results_dir)
    new = _diagnose(run, args.stage, [p for p in args.layers.split(",") if p], not args.no_kl)
    found = _with_earlier(new, results)
    written = diagnosis.save_diagnosis(found, results)

    from gain_cl.paper.figures import diagnosis as figure

    kinds = ("png", "pdf")
    pictures = {run.folder / f"diagnostics.{kind}": figure.render(found, kind) for kind in kinds}
    write_all(pictures)
    told = found.model_dump(mode="json")
    return print_report(told, args.json, lambda _: _show(found, [written, *pictures]))


# --- measuring ------------------------------------------------------------------------------------


def _diagnose(run: Reopened, asked: str, patterns: list[str], with_kl: bool) -> Diagnostics:
    """Measure the stages that were asked for, or all whose trained state was kept."""
    begun, every = time.perf_counter(), [*range(1, run.last + 1)]
    given = isinstance(run.config.adapter, Given)
    kept = [k for k in every if given or (run.place(k) / resume.ADAPTER).exists()]
    stages = (kept or every[-1:]) if asked == "all" else [stage_of(asked, run.last)]
    if stages[0] not in kept:
        run.saved(stages[0])  # says what is not there
    with run.opened():
        work = _Pretrained(run, patterns)
        found = [work.stage(k) for k in stages]
        del work
        for stage in found if with_kl else ():
            _divergences(run, stage)
    told = run.record
    return Diagnostics(
        run_id=told.run_id,
        record_sha256=sha256(run.run.path),
        method=told.method,
        model=told.model,
        dtype=run.config.model.dtype,
        protocol=told.protocol,
        last=run.last,
        stages=found,
        not_kept=[k for k in every if k not in kept],
        seconds=time.perf_counter() - begun,
    )


class _Pretrained:
    """The pretrained weights in fp32, which every stage is measured against. patterns: of the
    layers whose directions are analysed."""

    def __init__(self, run: Reopened, patterns: list[str]) -> None:
        from gain_cl.models import families, load
        from gain_cl.tools import weights

        own = run.fp32 == run.config.model
        loaded = run.loaded if own else load.load_model(run.fp32, run.loaded.device)
        self.run = run
        self.left: dict[str, Tensor] = {}
        self.base = {name: p.detach() for name, p in loaded.model.named_parameters()}
        self.layers = dict(weights.linear_layers(loaded.model))
        self.chosen = set[str]()
        for pattern in patterns or [""]:
            if not (names := fnmatch.filter(self.layers, f"*{pattern}")):
                do = suggest(pattern, {_place(n)[1] for n in self.layers})
                raise ConfigError(f"no linear layer's name ends with {pattern!r}", "--layers", do)
            self.chosen.update(names)
        self.projections = set[str]()
        with suppress(ConfigError):  # a family whose layers nobody named
            self.projections = {*families.targets(loaded.model, ["attn_out"], loaded.roles)}
        self.heads = int(getattr(loaded.model.config.get_text_config(), "num_attention_heads", 0))

    def stage(self, index: int) -> Stage:
        """Measure all of a stage but its KL."""
        tuned, layers, others, norms = self.run.folded(index), [], [], []
        for key, base in self.base.items():
            norms.append(norm := _norm(tuned[key] - base))
            name = key.removesuffix(".weight")
            if norm and name in self.layers:
                self.run.phase(f"stage {index}: {name}")
                layers.append(self._layer(name, tuned[key], norm))
            elif norm:
                others.append(Other(name=key, norm=norm, relative=_ratio(norm, _norm(base))))
        spans, total = [x for x in layers if x.residual is not None], math.hypot(*norms)
        return Stage(
            index=index,
            domain=str(self.run.record.stages[index].domain),
            total_norm=total,
            total_relative=total / math.hypot(*map(_norm, self.base.values())),
            layers=layers,
            others=others,
            residual=_means([x.residual or {} for x in spans]),
            own=_means([x.own or {} for x in spans]),
            chance=_means([_by_chance(*x.shape) for x in spans]),
            intruders=sum(x.intruders or 0 for x in spans) if spans else None,
            analysed=len(spans),
        )

    def _layer(self, name: str, tuned: Tensor, norm: float) -> Layer:
        from gain_cl.tools import weights

        layer, base = self.layers[name], self.base[f"{name}.weight"]
        base_OI, tuned_OI = (weights.out_in(layer, w) for w in (base, tuned))
        change_OI = tuned_OI - base_OI
        block, role = _place(name)
        found: dict[str, Any] = {}
        if name in self.chosen:
            if name not in self.left:
                self.left[name] = weights.left_vectors(base_OI)
            left_OR = self.left[name]
            first_OK = weights.left_vectors(tuned_OI)[:, :TOP]
            cosines = weights.closest_cosines(first_OK, left_OR).tolist()
            found = {"cosines": cosines, "intruders": sum(c < THRESHOLD for c in cosines)}
            found["residual"] = _residuals(weights.residual_energies(change_OI, left_OR))
            found["own"] = _residuals(weights.residual_energies(base_OI, left_OR))
        if name in self.projections and self.heads and base_OI.shape[1] % self.heads == 0:
            parts = (x.double().square().sum(0) for x in (change_OI, base_OI))
            change_H, base_H = (x.reshape(self.heads, -1).sum(1) for x in parts)
            found["heads"] = (change_H / base_H).nan_to_num(0.0, 0.0).sqrt().tolist()
        return Layer(
            name=name,
            role=role,
            block=block,
            shape=(base_OI.shape[0], base_OI.shape[1]),
            norm=norm,
            relative=_ratio(norm, _norm(base)),
            gains=_gains(weights.scaling(base_OI, tuned_OI)),
            **found,
        )


def _gains(found: Any) -> Gains | None:
    """Return what gains are like. found: weights.Scaling or None."""
    if found is None:
        return None
    s = found.s.cpu().numpy()
    return Gains(
        side=found.side,
        drift=np.abs(s - 1).mean(),
        rms=math.sqrt(np.square(s - 1).mean()),
        least=s.min(),
        largest=s.max(),
        counts=np.histogram(s, [-np.inf, *EDGES, np.inf])[0].tolist(),
    )


def _place(name: str) -> tuple[int | None, str]:
    """Return (block, name within the block) of a layer: model.layers.3.mlp.up_proj is 3,
    mlp.up_proj."""
    found = re.search(r"\.(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else (None, name)


def _norm(tensor: Tensor) -> float:
    """Return the Frobenius norm, summed in float64."""
    return float(tensor.double().square().sum().sqrt())


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 else None


def _means(rows: list[Shares]) -> Shares:
    """Return the mean over layers for each number of directions."""
    known = {k: [x for row in rows if (x := row[k]) is not None] for k in KEYS}
    return {k: math.fsum(values) / len(values) if values else None for k, values in known.items()}


def _residuals(energies: Any) -> Shares:
    """Return the residual for each number of directions, from weights.residual_energies."""
    shares = (energies / energies[0]).sqrt().tolist()
    found: Shares = {str(k): shares[k] if k < len(shares) else None for k in DIRECTIONS}
    return {**found, "all": shares[-1]}


def _by_chance(out: int, inputs: int) -> Shares:
    """Return the residual of a change whose columns point in random directions of R^out: sqrt(1 - k
    / out)."""
    import torch

    return _residuals(1 - torch.arange(min(out, inputs) + 1, dtype=torch.float64) / out)


def _divergences(run: Reopened, stage: Stage) -> None:
    """Put KL(base || tuned) into a stage: both models in the run's dtype, the adapter on the tuned
    one."""
    from gain_cl.measure import perplexity
    from gain_cl.stats import inference

    run.phase(f"KL of stage {stage.index}")
    told, asked, parts = run.record, run.config.eval, {}
    tuned, _ = run.tuned(run.config.model, stage.index)
    protocol = asked.window, asked.context, asked.stride, run.config.compute.eval_batch
    for name, domain in run.inputs.domains.items():
        documents = domain.split_documents(asked.split)[: asked.documents]
        rows = perplexity.divergence(run.loaded, tuned, documents, *protocol)
        parts[name] = rows.kl_nats.to_numpy(), rows.tokens.to_numpy(dtype="float64")

    def mean(names: list[str]) -> Divergence:
        """Return the mean over domains of nats per token, with its interval over documents."""
        shares = {n: (parts[n][0] / len(names), parts[n][1]) for n in names}
        found = inference.bootstrap_t(shares)
        low, high = (None if math.isnan(x) else max(x, 0.0) for x in (found.low, found.high))
        tokens = int(sum(parts[n][1].sum() for n in names))  # no divergence is negative
        return Divergence(nats=found.value, low=low, high=high, documents=found.n, tokens=tokens)

    learned = {"joint": told.trained, "sequential": told.trained[: stage.index]}
    stage.kl = {name: mean([name]) for name in parts}
    stage.kl_new = mean(learned.get(told.regime, told.trained[stage.index - 1 : stage.index]))
    stage.kl_controls = mean(told.controls) if told.controls else None


def _with_earlier(found: Diagnostics, results: Path) -> Diagnostics:
    """Return it with the stages, and where it was left out the KL, of an earlier diagnosis of the
    same record."""
    stages = {stage.index: stage for stage in found.stages}
    with suppress(DataError):  # of another record
        earlier = diagnosis.load_diagnosis(results, found.run_id)
        for before in earlier.stages if earlier else ():
            now = stages.setdefault(before.index, before)
            if now.kl is None:
                now.kl, now.kl_new, now.kl_controls = before.kl, before.kl_new, before.kl_controls
    return found.model_copy(update={"stages": [stages[k] for k in sorted(stages)]})


# --- showing --------------------------------------------------------------------------------------


def _show(found: Diagnostics, paths: list[Path]) -> None:
    rows = []
    for s in found.stages:
        of = sum(len(x.cosines or []) for x in s.layers)
        count = None if s.intruders is None else f"{s.intruders} of {of}"
        norms = [
            Value(x, write=lambda x: f"{x:.3g}") for x in (s.total_norm, 100 * s.total_relative)
        ]
        kl = [
            None if x is None else Value(x.nats, plain(4), x.low or 0.0, x.high or math.nan)
            for x in (s.kl_new, s.kl_controls)
        ]
        rows.append(Row([f"{s.index} {s.domain}", *norms, *_shares(s.residual), count, *kl]))
    end = found.stages[-1]
    for label, shares in (("W itself", end.own), ("by chance", end.chance)):
        rows.append(Row([label, "", "", *_shares(shares), "", "", ""]))
    heads = ["stage", "||dW||", "% of ||W||", *(f"outside {k}" for k in KEYS), "intruders"]
    heads += ["KL new", "KL controls"]
    lost = ", ".join(map(str, found.not_kept)) or "none"
    notes = [
        "outside k: share of ||dW|| beyond the first k left singular vectors of W, mean over "
        f"{end.analysed} changed linear layers; all: beyond every one, 0 for any method where a "
        "layer is not taller than wide",
        "W itself: of W's own spectrum; by chance: of a change in random directions",
        f"intruders: of the first {found.top} left singular vectors of the tuned W, those with no "
        f"|cosine| of {found.threshold:g} with W's",
        "KL(base || tuned): nats per token; new: domains learned up to the stage",
        f"beside linear layers {len(end.others)} parameters changed; stages whose trained state "
        f"was not kept: {lost}",
        f"time: {format.duration(found.seconds)}",
        *map(str, paths),
    ]
    title = f"What {found.method} changed in {found.model}, against the pretrained weights"
    print_table(Table("stages", title, heads, rows, notes))


def _shares(of: Shares) -> list[Value | None]:
    return [None if (x := of.get(k)) is None else Value(x, write=plain(3)) for k in KEYS]
