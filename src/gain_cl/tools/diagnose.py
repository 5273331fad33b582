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

from rich.filesize import decimal as size

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

    from gain_cl.stats.matrix import Parts


KEYS = (*map(str, DIRECTIONS), "all")
"""Numbers of directions, as a record names them."""


def main(argv: list[str]) -> int:
    """Print a summary, write results/diagnostics/RUN_ID.json and diagnostics.png and .pdf into the
    run's folder."""
    about = "What a run changed in the weights: norm, directions, gains; and its KL divergence "
    about += "from the pretrained model."
    parser = Parser("diagnose", *RUN, description=about)
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
    run = Reopened(load_run(args), args.output_dir, given=True)
    path = run.run.path
    results = path.parents[1] if path.parent.name == "runs" else Path(args.results_dir)
    stages, lost = _stages(run, args.stage)
    patterns = [p for p in args.layers.split(",") if p]
    new = _diagnose(run, stages, lost, patterns, not args.no_kl)
    found = _with_earlier(new, results, args.no_kl)
    written = diagnosis.save_diagnosis(found, results)

    from gain_cl.paper.figures import diagnosis as figure

    kinds = ("png", "pdf")
    pictures = {run.folder / f"diagnostics.{kind}": figure.render(found, kind) for kind in kinds}
    write_all(pictures)
    told = found.model_dump(mode="json")
    return print_report(told, args.json, lambda _: _show(found, [written, *pictures]))


def _stages(run: Reopened, asked: str) -> tuple[list[int], list[int]]:
    """Return (stages to diagnose, stages whose trained state was not kept)."""
    every = [*range(1, run.last + 1)]
    given = isinstance(run.config.adapter, Given)
    kept = [k for k in every if given or (run.place(k) / resume.ADAPTER).exists()]
    wanted = [stage_of(asked, run.last)] if asked != "all" else kept or every[-1:]
    if not set(wanted) <= set(kept):
        run.saved(wanted[0])  # says what is not there
    return wanted, [k for k in every if k not in kept]


# --- measuring ------------------------------------------------------------------------------------


def _diagnose(
    run: Reopened, stages: list[int], lost: list[int], patterns: list[str], with_kl: bool
) -> Diagnostics:
    begun = time.perf_counter()
    run.open()
    import torch

    found = []
    try:
        work = _Pretrained(run, patterns, keep=len(stages) > 1)
        for k in stages:
            started = time.perf_counter()
            found.append(work.stage(k, run.folded(k)))
            found[-1].seconds = time.perf_counter() - started
        del work
        for stage in found if with_kl else ():
            run.phase(f"KL of stage {stage.index}")
            started = time.perf_counter()
            _divergences(run, stage)
            stage.seconds += time.perf_counter() - started
    finally:
        run.close()
    told = run.record
    return Diagnostics(
        run_id=told.run_id,
        record_sha256=sha256(run.run.path),
        method=told.method,
        model=told.model,
        dtype=run.config.model.dtype,
        protocol=told.protocol,
        last=run.last,
        directions=list(DIRECTIONS),
        edges=list(EDGES),
        stages=found,
        not_kept=lost,
        seconds=time.perf_counter() - begun,
        peak_bytes=run.inputs.peak_memory(),
        device=str(run.inputs.environment["device"]),
        threads=torch.get_num_threads(),
    )


class _Pretrained:
    """The pretrained weights in fp32, which every stage is measured against.

    patterns: of the layers whose directions are analysed; keep: whether left singular vectors of W
    serve more than one stage.
    """

    def __init__(self, run: Reopened, patterns: list[str], keep: bool) -> None:
        from gain_cl.models import families, load
        from gain_cl.tools import weights

        own = run.fp32 == run.config.model
        loaded = run.loaded if own else load.load_model(run.fp32, run.loaded.device)
        self.run, self.keep = run, keep
        self.left: dict[str, Tensor] = {}
        self.base = {name: p.detach() for name, p in loaded.model.named_parameters()}
        self.norms = {name: _norm(p) for name, p in self.base.items()}
        self.layers = dict(weights.linear_layers(loaded.model))
        self.chosen = _chosen(list(self.layers), patterns)
        self.projections: set[str] = set()
        with suppress(ConfigError):  # a family whose layers nobody named
            self.projections = {*families.targets(loaded.model, ["attn_out"], loaded.roles)}
        self.heads = int(getattr(loaded.model.config.get_text_config(), "num_attention_heads", 0))

    def stage(self, index: int, tuned: dict[str, Tensor]) -> Stage:
        """Measure all of a stage but its KL."""
        norms = {n: _norm(tuned[n] - p) for n, p in self.base.items()}
        moved = [n for n in norms if norms[n] > 0]
        layers = []
        for name in self.layers:
            if (key := f"{name}.weight") in moved:
                self.run.phase(f"stage {index}: {name}")
                layers.append(self._layer(name, tuned[key], norms[key]))
        matrices, total = {f"{n}.weight" for n in self.layers}, math.hypot(*norms.values())
        spans = [x for x in layers if x.residual is not None]
        chances = [{k: _by_chance(x.shape, k) for k in KEYS} for x in spans]
        return Stage(
            index=index,
            domain=str(self.run.record.stages[index].domain),
            total_norm=total,
            total_relative=total / math.hypot(*self.norms.values()),
            layers=layers,
            others=[
                Other(name=n, norm=norms[n], relative=_ratio(norms[n], self.norms[n]))
                for n in moved
                if n not in matrices
            ],
            residual=_means([x.residual or {} for x in spans]),
            own=_means([x.own or {} for x in spans]),
            chance=_means(chances),
            intruders=sum(x.intruders or 0 for x in spans) if spans else None,
            analysed=len(spans),
            kl=None,
            kl_new=None,
            kl_controls=None,
            seconds=0.0,
        )

    def _layer(self, name: str, tuned: Tensor, norm: float) -> Layer:
        from gain_cl.tools import weights

        layer, key, projects = self.layers[name], f"{name}.weight", name in self.projections
        base_OI = weights.out_in(layer, self.base[key])
        tuned_OI = weights.out_in(layer, tuned)
        change_OI = tuned_OI - base_OI
        block, role = _place(name)
        residual, own, cosines, heads = None, None, None, None
        if name in self.chosen:
            left_OR = self.left.get(name)
            if left_OR is None:
                left_OR = weights.left_vectors(base_OI)
                self.left |= {name: left_OR} if self.keep else {}
            residual = _residuals(weights.residual_energies(change_OI, left_OR))
            own = _residuals(weights.residual_energies(base_OI, left_OR))
            first_OK = weights.left_vectors(tuned_OI)[:, :TOP]
            cosines = weights.closest_cosines(first_OK, left_OR).tolist()
        energies = [x.double().square().sum(0) for x in (change_OI, base_OI)]
        parts = [weights.by_head(x, self.heads) for x in energies] if projects else [None]
        if None not in parts:
            heads = [math.sqrt(c / w) if w else 0.0 for c, w in zip(*parts, strict=True)]
        return Layer(
            name=name,
            role=role,
            block=block,
            shape=(base_OI.shape[0], base_OI.shape[1]),
            norm=norm,
            relative=_ratio(norm, self.norms[key]),
            residual=residual,
            own=own,
            intruders=None if cosines is None else sum(c < THRESHOLD for c in cosines),
            cosines=cosines,
            heads=heads,
            gains=_gains(weights.scaling(base_OI, tuned_OI), self.heads * projects),
        )


def _gains(found: Any, heads: int) -> Gains | None:
    """Return what gains are like. found: weights.Scaling or None."""
    import torch

    from gain_cl.tools import weights

    if found is None:
        return None
    moved, edges = found.s - 1, torch.tensor(EDGES, dtype=torch.float64)
    parts = weights.by_head(moved.abs(), heads) if found.side == "input" else None
    bins = torch.bucketize(found.s.cpu(), edges, right=True)
    return Gains(
        side=found.side,
        drift=moved.abs().mean().item(),
        rms=moved.square().mean().sqrt().item(),
        least=found.s.min().item(),
        largest=found.s.max().item(),
        counts=torch.bincount(bins, minlength=len(EDGES) + 1).tolist(),
        heads=None if parts is None else [x * heads / len(moved) for x in parts],
    )


def _chosen(names: list[str], patterns: list[str]) -> set[str]:
    """Return the layers that the patterns mean; without patterns all."""
    found = {p: fnmatch.filter(names, f"*{p}") for p in patterns}
    for p in patterns:
        if not found[p]:
            do = suggest(p, sorted({_place(n)[1] for n in names}))
            raise ConfigError(f"no linear layer's name ends with {p!r}", "--layers", do)
    return {n for chosen in found.values() for n in chosen} if patterns else {*names}


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


Shares = dict[str, float | None]
"""Number of directions (KEYS) -> a share; None where there are not so many."""


def _means(rows: list[Shares]) -> Shares:
    """Return the mean over layers for each number of directions."""
    known = {k: [x for row in rows if (x := row[k]) is not None] for k in KEYS}
    return {k: math.fsum(values) / len(values) if values else None for k, values in known.items()}


def _residuals(energies: Tensor) -> Shares:
    """Return the residual for each number of directions, from weights.residual_energies."""
    shares = (energies / energies[0]).sqrt().tolist()
    found: Shares = {str(k): shares[k] if k < len(shares) else None for k in DIRECTIONS}
    return {**found, "all": shares[-1]}


def _by_chance(shape: tuple[int, int], k: str) -> float | None:
    """Return the residual of a change whose columns point in random directions of R^out: sqrt(1 - k
    / out)."""
    n = min(shape) if k == "all" else int(k)
    return math.sqrt(1 - n / shape[0]) if n <= min(shape) else None


def _divergences(run: Reopened, stage: Stage) -> None:
    """Put KL(base || tuned) into a stage: both models in the run's dtype, the adapter on the tuned
    one."""
    from gain_cl.measure import perplexity

    told, asked, parts = run.record, run.config.eval, {}
    tuned, _ = run.tuned(run.config.model, stage.index)
    protocol = asked.window, asked.context, asked.stride, run.config.compute.eval_batch
    for name, domain in run.inputs.domains.items():
        documents = domain.split_documents(asked.split)[: asked.documents]
        rows = perplexity.divergence(run.loaded, tuned, documents, *protocol)
        parts[name] = rows.kl_nats.to_numpy(), rows.tokens.to_numpy(dtype="float64")
    learned = {"joint": told.trained, "sequential": told.trained[: stage.index]}
    new = learned.get(told.regime, told.trained[stage.index - 1 : stage.index])
    stage.kl = {name: _divergence({name: part}) for name, part in parts.items()}
    stage.kl_new = _divergence({n: parts[n] for n in new})
    stage.kl_controls = _divergence({n: parts[n] for n in told.controls}) if told.controls else None


def _divergence(parts: Parts) -> Divergence:
    """Return the mean over domains of nats per token, with its interval over documents."""
    from gain_cl.stats import inference

    shares = {name: (kl / len(parts), tokens) for name, (kl, tokens) in parts.items()}
    found = inference.bootstrap_t(shares)
    ends = [None if math.isnan(x) else max(x, 0.0) for x in (found.low, found.high)]
    tokens = int(sum(t.sum() for _, t in parts.values()))  # no divergence is negative
    return Divergence(nats=found.value, low=ends[0], high=ends[1], documents=found.n, tokens=tokens)


def _with_earlier(found: Diagnostics, results: Path, no_kl: bool) -> Diagnostics:
    """Return it with the stages, and where it was left out the KL, of an earlier diagnosis of the
    same record."""
    known: dict[int, Stage] = {}
    with suppress(DataError):  # of another record
        earlier = diagnosis.load_diagnosis(results, found.run_id)
        if earlier and earlier.protocol == found.protocol:
            known = {stage.index: stage for stage in earlier.stages}
    for stage in found.stages:
        before = known.pop(stage.index, None)
        if no_kl and before:
            stage.kl, stage.kl_new, stage.kl_controls = before.kl, before.kl_new, before.kl_controls
    stages = sorted([*found.stages, *known.values()], key=lambda stage: stage.index)
    return found.model_copy(update={"stages": stages})


# --- showing --------------------------------------------------------------------------------------


def _show(found: Diagnostics, paths: list[Path]) -> None:
    rows = []
    for s in found.stages:
        of = sum(len(x.cosines or []) for x in s.layers)
        count = None if s.intruders is None else f"{s.intruders} of {of}"
        norms = [Value(x, write=_three) for x in (s.total_norm, 100 * s.total_relative)]
        kl = [_interval(x) for x in (s.kl_new, s.kl_controls)]
        rows.append(Row([f"{s.index} {s.domain}", *norms, *_shares(s.residual), count, *kl]))
    end = found.stages[-1]
    for label, shares in (("W itself", end.own), ("by chance", end.chance)):
        rows.append(Row([label, "", "", *_shares(shares), "", "", ""]))
    heads = ["stage", "||dW||", "% of ||W||", *(f"outside {k}" for k in KEYS), "intruders"]
    heads += ["KL new", "KL controls"]
    notes = [
        "outside k: share of ||dW|| beyond the first k left singular vectors of W, mean over "
        f"{end.analysed} changed linear layers; all: beyond every one, 0 for any method where a "
        "layer is not taller than wide",
        "W itself: of W's own spectrum; by chance: of a change in random directions",
        f"intruders: of the first {found.top} left singular vectors of the tuned W, those with no "
        f"|cosine| of {found.threshold:g} with W's",
        "KL(base || tuned): nats per token; new: domains learned up to the stage",
    ]
    if end.others:
        norm = math.hypot(*(x.norm for x in end.others))
        notes.append(f"beside linear layers {len(end.others)} parameters changed, norm {norm:.4g}")
    if found.not_kept:
        lost = ", ".join(map(str, found.not_kept))
        notes.append(f"not diagnosed, their trained state was not kept: stages {lost}")
    took, peak = format.duration(found.seconds), size(found.peak_bytes)
    title = f"What {found.method} changed in {found.model}, against the pretrained weights"
    notes += [f"time: {took}, peak memory: {peak}", *map(str, paths)]
    print_table(Table("stages", title, heads, rows, notes))


def _three(x: float) -> str:
    return f"{x:.3g}"


def _shares(of: Shares) -> list[Value | None]:
    return [None if (x := of.get(k)) is None else Value(x, write=plain(3)) for k in KEYS]


def _interval(x: Divergence | None) -> Value | None:
    if x is None:
        return None
    low, high = (math.nan if end is None else end for end in (x.low, x.high))
    return Value(x.nats, low, high, plain(4))
