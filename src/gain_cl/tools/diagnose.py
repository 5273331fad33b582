"""``python -m gain_cl diagnose RUN``: what a run did to the weights, for any method, and how far
its predictions moved from the base.

From the effective change of the weights alone (the adapter folded in, in fp32, minus the pretrained
weights), per kept stage and linear layer: norm, column-span residual, intruder dimensions, and
gains where the change is a diagonal (weights.py). Beside it KL(base || tuned) on the scored text,
both models computing as the run computed. docs/diagnostics.md has the formulas.
"""

from __future__ import annotations

import fnmatch
import math
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gain_cl.config.schema import Given
from gain_cl.errors import ConfigError, DataError, printable, suggest
from gain_cl.measure import diagnosis, record
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
from gain_cl.runs import resume
from gain_cl.stats import format
from gain_cl.system.files import sha256, write_all
from gain_cl.system.terminal import console, size
from gain_cl.tools import rescore
from gain_cl.tools.command import find_record

if TYPE_CHECKING:
    from torch import Tensor

    from gain_cl.stats.inference import Parts


def main(argv: list[str]) -> int:
    """Print a summary, write results/diagnostics/RUN_ID.json and diagnostics.png and .pdf into the
    run's folder."""
    parser = rescore.arguments(
        "diagnose",
        "[--stage K|all] [--layers A,B] [--no-kl]",
        "What a run changed in the weights: norm, directions, gains; and its KL divergence "
        "from the pretrained model.",
    )
    parser.add_argument(
        "--stage",
        default="all",
        help="a stage, or all whose trained state was kept (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        default="",
        help="layers whose directions to analyse, by the end of their name, * allowed: o_proj",
    )
    parser.add_argument(
        "--no-kl",
        action="store_true",
        help="leave out the KL divergence, which scores the text again",
    )
    args = parser.parse_args(argv)
    run = record.load(find_record(args.run, Path(args.results_dir)))
    bench = rescore.Bench(run, args.output_dir, given=True)
    results = run.path.parent.parent if run.path.parent.name == "runs" else Path(args.results_dir)
    stages, lost = _stages(bench, args.stage)
    try:
        found = _diagnose(
            bench, run, stages, lost, [p for p in args.layers.split(",") if p], not args.no_kl
        )
    finally:
        bench.close()
    found = _with_earlier(found, results, args.no_kl)
    path = diagnosis.save_diagnosis(found, results)

    from gain_cl.paper.figures import diagnosis as figure

    pictures = {
        bench.folder / f"diagnostics.{kind}": figure.render(found, kind) for kind in ("png", "pdf")
    }
    write_all(pictures)
    if args.json:
        print(path.read_text(), end="")
    else:
        _show(found, [path, *pictures])
    return 0


def _stages(bench: rescore.Bench, asked: str) -> tuple[list[int], list[int]]:
    """(stages to diagnose, stages whose trained state was not kept)."""
    last = len(bench.record.stages) - 1
    if asked != "all" and not (asked.isdecimal() and 1 <= int(asked[:9]) <= last):
        raise ConfigError(
            f"stage {asked!r} is not among 1..{last}", "--stage", "give one of them, or all"
        )
    if isinstance(bench.config.adapter, Given):
        kept = list(range(1, last + 1))
    else:
        folders = {
            k: bench.folder / "stages" / f"{k:02d}-{bench.record.stages[k].domain}"
            for k in range(1, last + 1)
        }
        kept = [k for k, folder in folders.items() if (folder / resume.ADAPTER).exists()]
    wanted = [int(asked)] if asked != "all" else kept or [last]
    if not set(wanted) <= set(kept):
        bench.state(wanted[0])  # says what is not there
    return wanted, sorted(set(range(1, last + 1)) - set(kept))


# --- measuring ------------------------------------------------------------------------------------


def _diagnose(
    bench: rescore.Bench,
    run: record.Run,
    stages: list[int],
    lost: list[int],
    patterns: list[str],
    with_kl: bool,
) -> Diagnostics:
    begun = time.perf_counter()
    bench.open(rows=0)
    bench.close()
    import torch

    watch = _Watch()
    found, estimate = [], 0.0
    with watch.bar:
        work = _Weights(bench, patterns, keep=len(stages) > 1)
        for k in stages:
            started = time.perf_counter()
            tuned = bench.folded(k)
            if k == stages[0]:
                estimate = _announce(bench, work, tuned, stages, with_kl, watch)
            found.append(work.stage(k, tuned, watch))
            found[-1].seconds = time.perf_counter() - started
        del work, tuned
        for stage in found if with_kl else []:
            started = time.perf_counter()
            _divergences(bench, stage, watch)
            stage.seconds += time.perf_counter() - started
    told = bench.record
    return Diagnostics(
        run_id=told.run_id,
        record_sha256=sha256(run.path),
        method=told.method,
        model=told.model,
        dtype=bench.config.model.dtype,
        protocol=told.protocol,
        last=len(told.stages) - 1,
        directions=list(DIRECTIONS),
        top=TOP,
        threshold=THRESHOLD,
        edges=list(EDGES),
        stages=found,
        not_kept=lost,
        estimate_seconds=estimate,
        seconds=time.perf_counter() - begun,
        peak_bytes=bench.inputs.peak_memory(),
        device=str(bench.inputs.environment["device"]),
        threads=torch.get_num_threads(),
    )


class _Watch:
    """Progress in seconds of the estimate, and the time left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=rescore.stderr(), transient=True)
        self.task = self.bar.add_task("fold the adapter", total=None)
        self.rate = 0.0  # seconds for one unit of weights.cost

    def expect(self, seconds: float) -> None:
        self.bar.update(self.task, total=max(seconds, 1e-9))

    def done(self, seconds: float, what: str) -> None:
        self.bar.update(self.task, advance=seconds, description=what)


def _announce(
    bench: rescore.Bench,
    work: _Weights,
    tuned: dict[str, Tensor],
    stages: list[int],
    with_kl: bool,
    watch: _Watch,
) -> float:
    """Say what it will cost before it begins; seconds. What changes is taken from the first
    stage."""
    import torch

    from gain_cl.tools import weights

    shapes = [work.base[f"{n}.weight"].shape for n in work.changed(tuned) if n in work.chosen]
    matrix = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(
        bench.loaded.device
    )
    for _ in range(2):  # the first call starts the library
        started = time.perf_counter()
        weights.left_vectors(matrix).sum().item()
        watch.rate = (time.perf_counter() - started) / weights.cost(matrix.shape)
    for_weights = watch.rate * sum(weights.cost(s) for s in shapes) * (1 + len(stages))
    for_kl = sum(_kl_seconds(bench, k) for k in stages) if with_kl else 0.0
    watch.expect(for_weights + for_kl)
    parameters = sum(p.numel() for p in work.base.values())
    vectors = (
        sum(min(s) * math.prod(s) // max(s) if s[0] < s[1] else math.prod(s) for s in shapes)
        if work.keep
        else 0
    )
    other = 0 if work.own else 2 * parameters  # the run's own model beside it
    what = f"{len(shapes)} linear layers, {format.counted(len(stages), 'stage')}"
    kl = f" ({format.duration(for_kl)} of it for KL)" if with_kl else ""
    memory = size(4 * (2 * parameters + vectors) + other)
    print(
        f"diagnose: {what}: about {format.duration(for_weights + for_kl)}{kl}, {memory} "
        "for weights",
        file=sys.stderr,
    )
    return for_weights + for_kl


class _Weights:
    """The pretrained weights in fp32 and what every stage is measured against.

    patterns: of the layers whose directions are analysed; keep: whether left singular vectors of W
    serve more than one stage.
    """

    def __init__(self, bench: rescore.Bench, patterns: list[str], keep: bool) -> None:
        from gain_cl.models import families, load
        from gain_cl.tools import weights

        self.record, self.keep, self.own = bench.record, keep, bench.fp32 == bench.config.model
        loaded = bench.loaded if self.own else load.load_model(bench.fp32, bench.loaded.device)
        self.base = {name: p.detach() for name, p in loaded.model.named_parameters()}
        self.total = math.fsum(_norm(p) ** 2 for p in self.base.values()) ** 0.5
        self.layers = dict(weights.linear_layers(loaded.model))
        self.chosen = _chosen(list(self.layers), patterns)
        try:
            self.projections = set(families.targets(loaded.model, ["attn_out"], loaded.roles))
        except ConfigError:
            self.projections = set()  # a family whose layers nobody named
        self.heads = int(getattr(loaded.model.config.get_text_config(), "num_attention_heads", 0))
        self.left: dict[str, Tensor] = {}

    def changed(self, tuned: dict[str, Tensor]) -> list[str]:
        """The linear layers that a stage changed."""
        import torch

        return [
            n
            for n in self.layers
            if not torch.equal(self.base[f"{n}.weight"], tuned[f"{n}.weight"])
        ]

    def stage(self, index: int, tuned: dict[str, Tensor], watch: _Watch) -> Stage:
        """All of a stage but its KL."""
        changed = self.changed(tuned)
        matrices = {f"{n}.weight" for n in self.layers}
        norms = {n: _norm(tuned[n] - p) for n, p in self.base.items()}
        total = math.fsum(x**2 for x in norms.values()) ** 0.5
        layers = [
            self._layer(n, tuned[f"{n}.weight"], norms[f"{n}.weight"], index, watch)
            for n in changed
        ]
        analysed = [x for x in layers if x.residual is not None]
        keys = [*map(str, DIRECTIONS), "all"]
        return Stage(
            index=index,
            domain=str(self.record.stages[index].domain),
            total_norm=total,
            total_relative=total / self.total,
            layers=layers,
            others=[
                Other(name=n, norm=x, relative=_ratio(x, _norm(self.base[n])))
                for n, x in norms.items()
                if x > 0 and n not in matrices
            ],
            residual={k: _mean([x.residual[k] for x in analysed if x.residual]) for k in keys},
            own={k: _mean([x.own[k] for x in analysed if x.own]) for k in keys},
            chance={k: _mean([_by_chance(x.shape, k) for x in analysed]) for k in keys},
            intruders=sum(x.intruders or 0 for x in analysed) if analysed else None,
            analysed=len(analysed),
            kl=None,
            kl_new=None,
            kl_controls=None,
            seconds=0.0,
        )

    def _layer(self, name: str, tuned: Tensor, norm: float, index: int, watch: _Watch) -> Layer:
        from gain_cl.tools import weights

        layer = self.layers[name]
        base_OI = weights.out_in(layer, self.base[f"{name}.weight"])
        tuned_OI = weights.out_in(layer, tuned)
        change_OI = tuned_OI - base_OI
        block, role = _place(name)
        residual, own, intruders, cosines, heads = None, None, None, None, None
        if name in self.chosen:
            left_OR = self.left.get(name)
            if left_OR is None:
                left_OR = weights.left_vectors(base_OI)
                watch.done(watch.rate * weights.cost(base_OI.shape), f"stage {index} {name}")
                if self.keep:
                    self.left[name] = left_OR
            residual, own = (
                _residuals(weights.residual_energies(x, left_OR)) for x in (change_OI, base_OI)
            )
            cosines = weights.closest_cosines(
                weights.left_vectors(tuned_OI)[:, :TOP], left_OR
            ).tolist()
            intruders = sum(c < THRESHOLD for c in cosines)
            watch.done(watch.rate * weights.cost(base_OI.shape), f"stage {index} {name}")
        if name in self.projections:
            parts = [
                weights.by_head(x.double().square().sum(0), self.heads)
                for x in (change_OI, base_OI)
            ]
            if parts[0] is not None and parts[1] is not None:
                heads = [
                    math.sqrt(c / w) if w else 0.0
                    for c, w in zip(parts[0].sum(1).tolist(), parts[1].sum(1).tolist(), strict=True)
                ]
        return Layer(
            name=name,
            role=role,
            block=block,
            shape=(base_OI.shape[0], base_OI.shape[1]),
            norm=norm,
            relative=_ratio(norm, _norm(base_OI)),
            residual=residual,
            own=own,
            intruders=intruders,
            cosines=cosines,
            heads=heads,
            gains=_gains(
                weights.scaling(base_OI, tuned_OI), self.heads if name in self.projections else 0
            ),
        )


def _gains(found: Any, heads: int) -> Gains | None:
    """found: weights.Scaling or None."""
    import torch

    from gain_cl.tools import weights

    if found is None:
        return None
    moved = found.s - 1
    parts = weights.by_head(moved.abs(), heads) if found.side == "input" else None
    bins = torch.bucketize(found.s.cpu(), torch.tensor(EDGES, dtype=torch.float64), right=True)
    return Gains(
        side=found.side,
        drift=moved.abs().mean().item(),
        rms=moved.square().mean().sqrt().item(),
        least=found.s.min().item(),
        largest=found.s.max().item(),
        counts=torch.bincount(bins, minlength=len(EDGES) + 1).tolist(),
        heads=None if parts is None else parts.mean(1).tolist(),
    )


def _chosen(names: list[str], patterns: list[str]) -> set[str]:
    """The layers that the patterns mean; without patterns all."""
    for p in patterns:
        if not any(fnmatch.fnmatchcase(n, f"*{p}") for n in names):
            raise ConfigError(
                f"no linear layer's name ends with {p!r}",
                "--layers",
                suggest(p, sorted({_place(n)[1] for n in names})),
            )
    return {
        n for n in names if not patterns or any(fnmatch.fnmatchcase(n, f"*{p}") for p in patterns)
    }


def _place(name: str) -> tuple[int | None, str]:
    """(block, name within the block) of a layer: model.layers.3.mlp.up_proj is 3, mlp.up_proj."""
    found = re.search(r"\.(\d+)\.(.+)$", name)
    return (int(found[1]), found[2]) if found else (None, name)


def _norm(tensor: Tensor) -> float:
    """Frobenius norm, summed in float64."""
    return float(tensor.double().square().sum().sqrt())


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 else None


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None


def _residuals(energies: Tensor) -> dict[str, float | None]:
    """k -> residual, from weights.residual_energies."""
    shares = (energies / energies[0]).sqrt().tolist()
    ends = {**{str(k): k for k in DIRECTIONS}, "all": len(shares) - 1}
    return {k: shares[end] if end < len(shares) else None for k, end in ends.items()}


def _by_chance(shape: tuple[int, int], k: str) -> float | None:
    """Residual of a change whose columns point in random directions of R^out: sqrt(1 - k / out)."""
    n = min(shape) if k == "all" else int(k)
    return math.sqrt(1 - n / shape[0]) if n <= min(shape) else None


def _kl_seconds(bench: rescore.Bench, stage: int) -> float:
    """Two models score what the run scored with one."""
    return 2 * bench.record.stages[stage].eval_seconds


def _divergences(bench: rescore.Bench, stage: Stage, watch: _Watch) -> None:
    """KL(base || tuned) of a stage, into it: both models in the run's dtype, the adapter on the
    tuned one."""
    from gain_cl.measure import perplexity

    told, settings, parts = bench.record, bench.config.eval, {}
    tuned, _ = bench.tuned(bench.config.model, stage.index)
    for name, domain in bench.inputs.domains.items():
        watch.done(0, f"stage {stage.index} KL {name}")
        documents = domain.split_documents(settings.split)[: settings.documents]
        rows = perplexity.divergence(
            bench.loaded,
            tuned,
            documents,
            settings.window,
            settings.context,
            settings.stride,
            bench.config.compute.eval_batch,
        )
        parts[name] = rows.kl_nats.to_numpy(), rows.tokens.to_numpy(dtype="float64")
        watch.done(
            _kl_seconds(bench, stage.index) / len(bench.inputs.domains),
            f"stage {stage.index} KL {name}",
        )
    new = told.trained[: stage.index]
    if told.regime != "sequential":
        new = told.trained if told.regime == "joint" else [told.trained[stage.index - 1]]
    stage.kl = {name: _divergence({name: part}) for name, part in parts.items()}
    stage.kl_new = _divergence({n: parts[n] for n in new})
    stage.kl_controls = _divergence({n: parts[n] for n in told.controls}) if told.controls else None


def _divergence(parts: Parts) -> Divergence:
    """Mean over domains of nats per token, with its interval over documents."""
    from gain_cl.stats import inference

    found = inference.bootstrap_t(
        {name: (kl / len(parts), tokens) for name, (kl, tokens) in parts.items()}
    )
    low, high = (
        None if math.isnan(x) else max(x, 0.0) for x in (found.low, found.high)
    )  # no divergence is negative
    return Divergence(
        nats=found.value,
        low=low,
        high=high,
        documents=found.n,
        tokens=int(sum(t.sum() for _, t in parts.values())),
    )


def _with_earlier(found: Diagnostics, results: Path, no_kl: bool) -> Diagnostics:
    """With the stages, and where it was left out the KL, of an earlier diagnosis of the same
    record."""
    try:
        earlier = diagnosis.load_diagnosis(results, found.run_id)
    except DataError:  # of another record
        return found
    known = (
        {s.index: s for s in earlier.stages}
        if earlier and earlier.protocol == found.protocol
        else {}
    )
    for stage in found.stages:
        before = known.pop(stage.index, None)
        if no_kl and before:
            stage.kl, stage.kl_new, stage.kl_controls = before.kl, before.kl_new, before.kl_controls
    return found.model_copy(
        update={"stages": sorted([*found.stages, *known.values()], key=lambda s: s.index)}
    )


# --- showing --------------------------------------------------------------------------------------


def _show(found: Diagnostics, paths: list[Path]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def table(title: str, first: str, *columns: str) -> Table:
        made = Table(
            title=title,
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 0, 0, 1),
            pad_edge=False,
            show_edge=False,
        )
        for i, name in enumerate((first, *columns)):
            made.add_column(name, justify="right" if i else "left")
        return made

    out = console()
    keys = [*map(str, found.directions), "all"]
    summary = table(
        f"What {found.method} changed in {found.model}, against the pretrained weights",
        "stage", "||dW||", "% of ||W||", *(f"outside {k}" for k in keys), "intruders", "KL new", "KL controls",
    )  # fmt: skip
    for s in found.stages:
        summary.add_row(
            printable(f"{s.index} {s.domain}"),
            f"{s.total_norm:.4g}",
            f"{100 * s.total_relative:.3g}",
            *(_number(s.residual[k]) for k in keys),
            "-" if s.intruders is None else f"{s.intruders} of {_countable(found, s)}",
            _interval(s.kl_new),
            _interval(s.kl_controls),
        )
    end = found.stages[-1]
    summary.add_row(
        "W itself", "", "", *(_number(end.own[k]) for k in keys), "", "", "", style="dim"
    )
    summary.add_row(
        "by chance", "", "", *(_number(end.chance[k]) for k in keys), "", "", "", style="dim"
    )
    out.print(summary)
    out.print()
    most = table(
        f"Layers that moved most after stage {end.index}",
        "layer",
        "% of ||W||",
        f"outside {keys[1]}",
        "intruders",
        "gains: drift, range",
    )
    for x in sorted(end.layers, key=lambda x: -(x.relative or 0.0))[:5]:
        gains = (
            f"{x.gains.drift:.4f}, {x.gains.least:.3f} to {x.gains.largest:.3f}" if x.gains else "-"
        )
        inside = _number(x.residual[keys[1]]) if x.residual else "-"
        count = "-" if x.intruders is None else f"{x.intruders} of {len(x.cosines or [])}"
        most.add_row(printable(x.name), f"{100 * (x.relative or 0.0):.3g}", inside, count, gains)
    out.print(most)
    out.print()
    others = math.sqrt(math.fsum(x.norm**2 for x in end.others))
    took = f"{format.duration(found.seconds)} (estimated {format.duration(found.estimate_seconds)})"
    notes = [
        "outside k: share of ||dW|| beyond the first k left singular vectors of W, mean over "
        f"{end.analysed} changed linear layers; all: "
        "beyond every one, 0 for any method where a layer is not taller than wide",
        "W itself: of W's own spectrum, where random gains on its inputs would be; by "
        "chance: of a change in random directions",
        f"intruders: of the first {found.top} left singular vectors of the tuned W, those "
        f"with no |cosine| of {found.threshold:g} with W's",
        "KL(base || tuned): nats per token; 95% interval over documents; new: domains "
        "learned up to the stage",
    ]
    if end.others:
        notes.append(
            f"beside linear layers {len(end.others)} other parameters changed, norm {others:.4g}"
        )
    if found.not_kept:
        notes.append(
            "not diagnosed, their trained state was not kept: stages "
            f"{', '.join(map(str, found.not_kept))}"
        )
    notes.append(f"time: {took}, peak memory: {size(found.peak_bytes)}")
    for note in [*notes, *map(str, paths)]:
        out.print(note, markup=False, highlight=False, soft_wrap=True)


def _countable(found: Diagnostics, stage: Stage) -> int:
    return sum(len(x.cosines or []) for x in stage.layers)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(x: Divergence | None) -> str:
    if x is None:
        return "-"
    return f"{x.nats:.4f}" + (
        f" ({x.low:.4f} to {x.high:.4f})" if x.low is not None and x.high is not None else ""
    )
