"""``python -m gain_cl export``: what a run has learned, as files that others load without gain_cl:
to=peft, the adapter alone, in PEFT's format; to=merged, an ordinary transformers checkpoint. With a
model card and the measured merge error.

What is merged are base weights and the saved fp32 state, multiplied in fp32, never weights already
merged, and rounded once.
Importing this module imports neither torch nor peft.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gain_cl import domains
from gain_cl.config.schema import Full, Gain, RunConfig
from gain_cl.errors import ConfigError, GainError, StorageError
from gain_cl.measure import scoring
from gain_cl.measure.record import DomainScore
from gain_cl.models import convert, source
from gain_cl.paper.table import render, say
from gain_cl.system.files import write_all
from gain_cl.tools.command import Parser, load_run, new_folder
from gain_cl.tools.reopen import Reopened, absorb, stage_of

if TYPE_CHECKING:
    from gain_cl.adapters.base import Adapter
    from gain_cl.measure.record import Run
    from gain_cl.models.load import Loaded

DTYPES = ("float32", "bfloat16", "float16")
DOCUMENTS = 4
"""Scored documents of each trained domain on which the merge is measured."""


class Merge(NamedTuple):
    """Scores of the same tokens: of the unmerged model computing in dtype, and of the merged
    weights rounded to dtype. why: it was not measured."""

    dtype: str
    unmerged: DomainScore | None
    merged: DomainScore | None
    why: str

    @property
    def told(self) -> list[str]:
        """Return the losses in nats per token and their difference, in words."""
        if self.unmerged is None or self.merged is None:
            return ["", "", f"not measured: {self.why}"]
        a, b = self.unmerged.loss_nats, self.merged.loss_nats
        return [f"{a:.6f}", f"{b:.6f}", f"{b - a:+.1e}"]


class Exported(NamedTuple):
    """folder: what was written. gap: by how much folding in fp32 moves the logits, as a share of
    the largest (None: nothing can be merged)."""

    folder: Path
    gap: float | None
    merge: list[Merge]

    @property
    def tokens(self) -> int:
        """How many tokens the merge was measured on."""
        return max((m.merged.tokens for m in self.merge if m.merged), default=0)


def main(argv: list[str]) -> int:
    """Write the model after a stage, and print what was measured."""
    parser = Parser("export", "run", "--results-dir", "--output-dir")
    parser.add_argument("--to", choices=["peft", "merged"], required=True, help="to=peft|merged")
    parser.add_argument("--stage", help="stage=K (default: the last)")
    parser.add_argument("--dir", type=Path, help="dir=DIR, a new folder (default: exports/...)")
    parser.add_argument("--dtype", choices=DTYPES, help="of to=merged (default: float32)")
    args = parser.read(argv)
    if args.to == "peft" and args.dtype:
        raise ConfigError("dtype= with to=peft: an adapter is fp32", "export", "leave it out")
    dtype = args.dtype or DTYPES[0]
    done = export(load_run(args), args.to, args.dir, args.stage, args.output_dir, dtype)
    if done.gap is not None:
        say(f"folded against unfolded, fp32: {done.gap:.1e} of the largest logit")
    for m in done.merge:
        unit = f" nats per token, on {done.tokens:,} tokens" if m.merged else ""
        say(f"merge error in {m.dtype}: {m.told[-1]}{unit}")
    say(f"{'adapter' if args.to == 'peft' else 'checkpoint'}: {done.folder}")
    return 0


def export(
    run: Run,
    to: str,
    folder: Path | None = None,
    stage: int | None = None,
    output_dir: str | None = None,
    dtype: str = DTYPES[0],
) -> Exported:
    """Write the model after a stage (default: the last) into a new folder (default:
    exports/RUN_ID-stageK-TO), with a model card that states the measured merge error.

    ConfigError: a stage that is not in the run, a folder that is not empty, a method that has no
    such form. DataError: the state is gone or is not what was saved.
    """
    opened = Reopened(run, output_dir)
    stage = stage_of(stage, opened.last)
    folder = new_folder(folder or Path("exports") / f"{run.record.run_id}-stage{stage}-{to}")
    possible(opened.config, to)
    opened.saved(stage)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".tmp-{folder.name}-"))
    try:
        if to == "peft":
            loaded, adapter = opened.tuned(opened.fp32, stage)
            write_adapter(adapter, loaded, opened.config, work)
            del loaded, adapter
        done = Exported(folder, *_measured(opened, stage, work, dtype if to == "merged" else ""))
        text = card(opened, stage, f"{to} {dtype}", done)
        write_all({work / "README.md": text.encode()})
        _publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return done


def write_adapter(adapter: Adapter, loaded: Loaded, config: RunConfig, folder: Path) -> None:
    """Write an attached adapter in PEFT's format into a new folder, without a card. ConfigError as
    for ``export``."""
    from gain_cl.adapters import portable

    found = portable.adapter_files(adapter, loaded, *_base(config))
    write_all({new_folder(folder) / name: data for name, data in found.items()})


def possible(config: RunConfig, to: str) -> None:
    """Raise ConfigError for what is known without torch to have no such form."""
    adapter, packed = config.adapter, config.model.load_in
    if packed and to == "merged":
        what = f"model.load_in={packed}: what was trained beside quantised weights is not merged"
        raise ConfigError(what, f"to={to}", "to=peft works, but for multiplicative_lora")
    if to == "peft" and isinstance(adapter, Full):
        what = f"adapter full (select={adapter.select})"
    elif to == "peft" and isinstance(adapter, Gain) and adapter.basis == "random":
        what = "gains in a random basis"
    elif to == "peft" and adapter.kind == "multiplicative_lora":
        what = "multiplicative_lora"
    else:
        return
    raise ConfigError(f"{what} has no form in PEFT's format", "to=peft", "to=merged works")


def _base(config: RunConfig) -> tuple[str, str | None]:
    """Return (name, revision) of the base model: its hub id and commit where it has one, never a
    folder of this machine."""
    model = config.model
    if model.path is None or model.revision is None or Path(model.path).expanduser().is_dir():
        return model.name, None
    return model.path, model.revision


def _measured(
    run: Reopened, stage: int, work: Path, wanted: str
) -> tuple[float | None, list[Merge]]:
    """Measure the merge in every dtype, and write the merged model of the wanted one (empty: none)
    into ``work``."""
    import torch

    if run.config.model.load_in is not None:
        why = "nothing is merged into quantised weights"
        return None, [Merge(dtype, None, None, why) for dtype in DTYPES]
    gap, merge, weights = 0.0, list[Merge](), dict[str, Any]()
    for dtype in DTYPES:
        try:
            loaded, adapter = run.tuned(run.fp32.model_copy(update={"dtype": dtype}), stage)
            above, why = _score(run, loaded)
            if weights:
                adapter.absorb()  # gives the parameters their names back
                with torch.no_grad():
                    for name, weight in loaded.model.named_parameters():
                        weight.copy_(weights[name])
            else:
                gap = absorb(loaded, adapter)
                weights = dict(loaded.model.named_parameters())
            if wanted == dtype:
                _save(loaded, work, source.locate_model(run.config.model))
            merge.append(Merge(dtype, above, _score(run, loaded)[0], why))
        except (GainError, RuntimeError) as error:
            # not every device computes in every dtype, and float16 overflows
            if dtype in (DTYPES[0], wanted):
                raise
            merge.append(Merge(dtype, None, None, str(error).split("\n")[0]))
    return gap, merge


def _score(run: Reopened, loaded: Loaded) -> tuple[DomainScore | None, str]:
    """Return the sums over the first scored documents of the trained domains by the run's protocol,
    cut at eval.context tokens, or why there are none: a record can be exported where its data is
    not."""
    import pandas as pd

    from gain_cl.measure import perplexity

    config, most, rows = run.config, run.config.eval, []
    window = min(most.window or most.context, most.context)
    few = {"documents": min(DOCUMENTS, most.documents), "window": window}
    for name in run.record.trained:
        text, reader = config.domains[name], (loaded.tokenizer, loaded.tokenizer_hash)
        pin = run.record.pins["domains"][name]
        try:
            domain = domains.prepare_domain(text, *reader, pin, loaded.prefix_id)
        except GainError as error:
            return None, error.what
        settings, batch = most.model_copy(update=few), config.compute.eval_batch
        rows.append(scoring.score_domain(loaded, domain, settings, batch))
    return perplexity.total(pd.concat(rows)), ""


def _save(loaded: Loaded, folder: Path, base: Path | None) -> None:
    """Write an ordinary transformers checkpoint. base: the model's folder. ConfigError: the folded
    model has parameters that transformers, which builds it from its configuration, would not
    read."""
    import torch
    from safetensors import SafetensorError

    net = loaded.model
    with torch.device("meta"):
        plain = {name for name, _ in type(net)(net.config).named_parameters()}
    if other := sorted(plain ^ {name for name, _ in net.named_parameters()}):
        kind = type(net).__name__
        what = f"{other[0]} is not a parameter of both the folded model and a {kind} of its "
        do = "an ordinary checkpoint cannot hold what this adapter learns"
        raise ConfigError(f"{what}configuration", "to=merged", do)
    net.config.use_cache = True
    try:
        convert.save_model(net, loaded.tokenizer, folder, base)
    except SafetensorError as error:
        raise StorageError(f"cannot write: {error}", str(folder), "free space") from error


def _publish(work: Path, folder: Path) -> None:
    """Give the finished folder its name, readable as a new file of this user's is: mkdtemp and
    safetensors make private ones."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (work, *work.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    if folder.exists():
        folder.rmdir()
    work.rename(folder)


# --- the model card -------------------------------------------------------------------------------


def card(run: Reopened, stage: int, form: str, made: Exported) -> str:
    """Return README.md of an export: what it is, how it was made, what was measured.

    form: peft or merged, and the dtype.
    """
    r, (base, revision) = run.record, _base(run.config)
    of = {"joint": r.trained, "individual": r.trained[stage - 1 : stage]}
    return render(
        "card.md.j2",
        r=r,
        c=run.config,
        made=made,
        md=md,
        form=form,
        stage=stage,
        learned=", ".join(of.get(r.regime, r.trained[:stage])),
        peft=form.startswith("peft"),
        base=base,
        named=revision and re.fullmatch(r"[\w./-]+", base),
        at=f'"{base}", revision="{revision}"' if revision else '"FOLDER OF THE BASE MODEL"',
    )


def md(text: object) -> str:
    """Return text from elsewhere on one line of Markdown, every character that means something
    there escaped."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", line)
