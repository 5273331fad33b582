"""The typed configuration of a run. Torch-free: every mistake here is reported before torch is
imported.

Top-level sections are *scientific* (they change results and enter the run id) unless listed in
``EXECUTION``. Extra keys are forbidden everywhere, which catches what Hydra's ``+key=`` and
``++key=`` let through.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    model_validator,
)

NAME = re.compile(r"^(?![.-])[A-Za-z0-9._-]{1,100}\Z")
SHA1 = re.compile(r"^[0-9a-f]{40}\Z")
SHA256 = re.compile(r"^[0-9a-f]{64}\Z")

EXECUTION = (
    "compute",
    "track",
    "checkpoint",
    "resume",
    "allow_change",
    "output_dir",
    "results_dir",
    "force",
    "plugins",
    "lr_tuned_on",
)
"""Sections that say how a run is carried out, not what it computes: recorded, but not part of the
run id. ``compute.compile`` is, where it compiles."""


def _name(value: Any) -> Any:
    if not isinstance(value, str) or not NAME.match(value):
        raise ValueError(
            f"{value!r} is no name; use 1-100 of [A-Za-z0-9._-], not starting with '.' or '-'"
        )
    return value


Name = Annotated[str, BeforeValidator(_name)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Sha256 = Annotated[str, Field(pattern=SHA256)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[Finite, Field(gt=0)]
NotNegative = Annotated[Finite, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


JOINT = "joint"
"""Name of the stage that trains on all domains mixed."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# --- where bytes come from ------------------------------------------------------------------------


class PackageFile(Section):
    """Members of a pinned archive of the Python package index, read without installing it."""

    package: str  # NAME==VERSION
    members: str  # glob inside the archive; matched against the end of each member's path
    sha256: Sha256 | None = None  # of the archive; None when the wheel is per platform
    members_sha256: Sha256 | None = None  # of the one member, when the archive cannot be pinned


class Delta(Section):
    """A low-rank change of a model's weights, added in fp32 when it is first loaded:
    scripts/delta.py writes such files."""

    # safetensors: MODULE.lora_A (r, in) and MODULE.lora_B (out, r); a path, or a name beside the
    # shipped model presets
    file: str
    sha256: Sha256


class PackageSource(Section):
    kind: Literal["package"]
    recipe: Name  # a function in domains/recipes.py: archive members -> documents
    files: PackageFile
    max_bytes: PositiveInt | None = None  # of text, taken in hash order of the documents


class RowSource(Section):
    """Rows with fields. Those of instruction data hold a prompt and a completion, or the turns of a
    conversation. What the assistant says is trained on and scored, nothing else."""

    prompt: str | None = None  # field
    completion: str | None = None  # field
    messages: str | None = None  # field: a list of turns, each with role and content
    # model: the tokenizer's own, and what turns have without; FILE.jinja; None: prompt and
    # completion joined by a line end
    chat_template: str | None = None

    @property
    def turns(self) -> list[str]:
        """Return the fields that turns are made of: none for plain text."""
        return [field for field in (self.messages, self.prompt, self.completion) if field]

    @property
    def template(self) -> str | None:
        """Return the chat template that shows the turns."""
        return self.chat_template or ("model" if self.messages else None)

    @model_validator(mode="after")
    def _turns(self) -> RowSource:
        if (self.prompt is None) != (self.completion is None):
            there, other = (
                ("prompt", "completion") if self.completion is None else ("completion", "prompt")
            )
            raise ValueError(
                f"source.{there} is given without source.{other}; give both fields, or none for "
                "plain text"
            )
        if self.prompt is not None and self.prompt == self.completion:
            raise ValueError(
                f"source.prompt and source.completion are the same field, {self.prompt!r}; name two"
            )
        plain = getattr(self, "fields", None) or getattr(self, "field", "text") != "text"
        ways = [self.messages, self.prompt, plain]
        if sum(map(bool, ways)) > 1:
            raise ValueError(
                "source.field (fields), source.prompt with source.completion and source.messages "
                "are three ways to say what is read, given beside each other; give one of them"
            )
        if self.chat_template is None:
            return self
        if self.chat_template != "model" and not self.chat_template.endswith(".jinja"):
            raise ValueError(
                f"source.chat_template={self.chat_template!r} is no template; use model (the "
                "tokenizer's own) or FILE.jinja"
            )
        if not self.turns:
            raise ValueError(
                "source.chat_template is for instruction data; give source.prompt and "
                "source.completion, or source.messages, with it"
            )
        return self


class HubSource(RowSource):
    kind: Literal["hub"]
    path: str  # org/name
    revision: str | None = None  # 40-hex commit
    files: str  # glob of data files in the repository
    fields: list[
        str
    ] = []  # of plain text, joined by blank lines; dots descend into structs; lists are joined
    max_bytes: PositiveInt  # UTF-8 bytes of text read from the stream before it stops

    @model_validator(mode="after")
    def _text(self) -> HubSource:
        if not self.fields and not self.turns:
            raise ValueError(
                "no field is named; give source.fields, or source.prompt and source.completion, or "
                "source.messages"
            )
        return self


class FilesSource(RowSource):
    kind: Literal["files"]
    path: str  # a .txt .jsonl .parquet or .json file, or a folder of them
    field: str = "text"  # text field of jsonl, parquet and json
    # what stands between the documents of a .txt: a string, or line for a document a line. None: a
    # .txt of a folder is one document, a single .txt is cut at blank lines
    split_on: Annotated[str, Field(min_length=1)] | None = None
    max_document_bytes: PositiveInt = 10_000_000


class GeneratedSource(Section):
    """Text drawn from a seeded grammar: for smoke runs and tests."""

    kind: Literal["generated"]
    seed: int = Field(ge=0)
    documents: int = Field(200, gt=0, le=100_000)


class Split(Section):
    """Shares of the documents, assigned by the hash of the normalised text."""

    test: Fraction = 0.15
    dev: Fraction = 0.1

    @model_validator(mode="after")
    def _check(self) -> Split:
        if self.test + self.dev > 1:
            raise ValueError(
                f"test={self.test} and dev={self.dev} are more than all documents; lower them"
            )
        return self


class Domain(Section):
    name: Name
    source: Annotated[
        PackageSource | HubSource | FilesSource | GeneratedSource, Field(discriminator="kind")
    ]
    split: Split = Split()
    licence: str = "unknown"
    note: str = ""


# --- the axes -------------------------------------------------------------------------------------


class Model(Section):
    name: Name
    path: str | None = None  # hub id (org/name) or local folder
    revision: str | None = None  # 40-hex commit of a hub id
    package: PackageFile | None = None  # a GGUF file inside a package
    delta: Delta | None = None  # what is added to its weights
    # transformers config keys incl. model_type: counts on the meta device; no path: random weights
    arch: dict[str, Any] | None = None
    init_seed: int = 0  # of random weights
    dtype: Literal["float32", "bfloat16", "float16"]
    # quantise the linear layers when loading (bitsandbytes, a CUDA GPU)
    load_in: Literal["4bit", "8bit"] | None = None
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    # the one token before every scored text; None: bos, else eos
    prefix_token_id: int | None = None
    separator_token_id: int | None = None  # between packed training documents; None: eos
    note: str = ""  # what a reader of its numbers must know
    # role -> suffix of module names, for a family that families.ROLES does not know
    roles: dict[str, str] | None = None

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.delta is not None and (self.package is None or self.path is not None):
            raise ValueError(
                "model.delta is for a model from a package; merge it into a folder of your own "
                "and give model.path"
            )
        return self


Role = Literal["attn_out", "ffn_down"]


class Gain(Section):
    kind: Literal["gain"]
    roles: list[Role] = Field(min_length=1)
    side: Literal["input", "output"] = "input"
    basis: Literal["own", "random"] = "own"  # random: gains in a fixed random orthogonal basis
    basis_seed: int = Field(0, ge=0, lt=2**31)  # of the random basis
    # an IA3 adapter of PEFT to begin from: a folder, or ORG/NAME@COMMIT
    init_from: str | None = None


class MultiplicativeLora(Section):
    kind: Literal["multiplicative_lora"]
    roles: list[Role] = Field(min_length=1)
    rank: PositiveInt
    alpha: Positive  # the product is scaled by alpha / rank


class Full(Section):
    kind: Literal["full"]
    # norms: weights (and biases) of the normalisation layers alone
    select: Literal["all", "norms"] = "all"


class Peft(Section):
    kind: Literal["peft"]
    peft_type: str  # LORA, IA3, ... : a name of peft.PeftType
    config: dict[str, Any]  # keyword arguments of that type's PEFT config class
    # in place of config.target_modules: the layers that play these roles
    roles: list[Role] | None = None
    # a saved adapter of PEFT, of this type and config, to begin from: a folder, or ORG/NAME@COMMIT
    init_from: str | None = None


class Given(Section):
    """Nothing trains: checkpoints made elsewhere, one a stage. What the verb ``score`` composes."""

    kind: Literal["given"]
    checkpoints: list[str]  # folders, or ORG/NAME@COMMIT: PEFT adapters or whole models


KNOWN_CHANGE = ("LORA", "IA3", "VERA", "HIRA")
"""PEFT types whose change of the weights is a known function of their parameters: several can be
active at once, one trained and the others frozen, and be absorbed together (handover=restart); its
size can be penalised (guard l2_base). Not LoRA's variants (DoRA)."""


class NoGuard(Section):
    kind: Literal["none"] = "none"


class Ewc(Section):
    kind: Literal["ewc"]
    strength: NotNegative  # lambda
    sequences: PositiveInt  # for the Fisher information of a stage
    gamma: float = Field(1.0, ge=0, le=1)  # share of the earlier Fisher information that is kept


class Replay(Section):
    kind: Literal["replay"]
    fraction: Share  # of the sequences of a step


class SelfReplay(Section):
    kind: Literal["self_replay"]
    fraction: Share  # of the sequences of a step
    samples: PositiveInt  # sequences drawn from the pretrained model
    temperature: Positive = 1.0


class Strength(Section):
    """Guards with one number."""

    kind: Literal["kl_base", "l2_base", "orthogonal"]
    strength: NotNegative


class Ema(Section):
    kind: Literal["ema"]
    decay: Share  # a step


class Plugin(BaseModel):
    """A guard or adapter registered by a plugin. Its keywords are checked against its
    constructor."""

    model_config = ConfigDict(extra="allow", frozen=True)
    kind: Name


class PluginAdapter(Plugin):
    @model_validator(mode="before")
    @classmethod
    def _begun_from_nothing(cls, given: Any) -> Any:
        """Drop the presets' ``init_from: null``, which asks nothing of a plugin that takes their
        place."""
        if isinstance(given, dict) and given.get("init_from", 0) is None:
            return {k: v for k, v in given.items() if k != "init_from"}
        return given


ADAPTERS = ("gain", "multiplicative_lora", "full", "peft", "given")
GUARDS = ("none", "ewc", "replay", "self_replay", "kl_base", "l2_base", "orthogonal", "ema")
"""Kinds that gain_cl brings; any other is a plugin's."""


def _kind(known: tuple[str, ...]) -> Discriminator:
    """Return the tag of a section by its kind: known, or plugin."""

    def tag(section: Any) -> str:
        kind = section.get("kind") if isinstance(section, dict) else section.kind
        return "known" if kind in known else "plugin"

    return Discriminator(tag)


KnownAdapter = Annotated[
    Gain | MultiplicativeLora | Full | Peft | Given, Field(discriminator="kind")
]
Adapter = Annotated[
    Annotated[KnownAdapter, Tag("known")] | Annotated[PluginAdapter, Tag("plugin")],
    _kind(ADAPTERS),
]
KnownGuard = Annotated[
    NoGuard | Ewc | Replay | SelfReplay | Strength | Ema, Field(discriminator="kind")
]
Guard = Annotated[
    Annotated[KnownGuard, Tag("known")] | Annotated[Plugin, Tag("plugin")], _kind(GUARDS)
]


class Sequence(Section):
    name: Name
    domains: list[Name] = Field(min_length=1)
    controls: list[Name] = []
    order: list[int] | None = None  # a permutation of range(len(domains)); None: as listed

    @model_validator(mode="after")
    def _check(self) -> Sequence:
        both = [*self.domains, *self.controls]
        repeated = sorted({d for d in both if both.count(d) > 1})
        if repeated:
            raise ValueError(f"repeated domain: {', '.join(repeated)}; name each once")
        if self.order is not None and sorted(self.order) != list(range(len(self.domains))):
            raise ValueError(
                f"order {self.order} is not a permutation of 0..{len(self.domains) - 1}; name "
                "each position once"
            )
        return self

    @property
    def trained(self) -> list[str]:
        """Return the domains in the order they are trained."""
        order = range(len(self.domains)) if self.order is None else self.order
        return [self.domains[i] for i in order]


class Tasks(Section):
    names: list[str] = []  # lm-eval tasks; boolq@100 = the first 100 items by item hash
    source: Literal["package", "hub"] = "package"
    include_path: Folder | None = None  # a folder of lm-eval tasks of one's own (YAML)
    run_code: bool = False  # run the Python that they name by !function
    revisions: list[str] = []  # ORG/NAME@COMMIT of hub data sets
    fewshot: int | None = Field(None, ge=0)  # None: as the task says, else none
    chat_template: bool = False  # prompts as the tokenizer's template writes them
    system_instruction: str | None = None  # before each prompt
    batch_size: PositiveInt = 8  # fixed: BoolQ moves with it (lm-eval 3055)
    stages: Literal["ends", "all"] | list[int] = "ends"
    limit: PositiveInt | None = None  # debugging only: never in a table


class Train(Section):
    tokens: PositiveInt | None = None  # training tokens per domain; either tokens or steps
    steps: PositiveInt | None = None  # optimiser steps per domain
    block: int = Field(256, gt=1)  # tokens a training sequence
    batch_tokens: PositiveInt = 512  # tokens an optimiser step
    pack: Literal["stream", "mask"] = "stream"  # mask: a token attends only within its own document
    lr: float = Field(gt=0, le=1000)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Fraction = 0.1  # share of a stage's steps with a linearly rising rate
    final_lr: float = Field(0.1, ge=0, le=1)  # cosine ends at this share of lr
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    clip: Positive | None = 1.0  # global gradient norm; None: no clipping
    optimizer: Literal["fresh", "carried"] = "fresh"  # AdamW moments at a new stage
    # steps between dev perplexities of the current domain and of the controls
    dev_every: PositiveInt | None = None

    @model_validator(mode="after")
    def _check(self) -> Train:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError(
                "train.tokens and train.steps are both given; set one of them to null"
                if self.tokens
                else "neither train.tokens nor train.steps is given; give one"
            )
        if self.batch_tokens % self.block:
            raise ValueError(
                f"train.batch_tokens={self.batch_tokens} is not a multiple of "
                f"train.block={self.block}; change one of them"
            )
        if self.tokens is not None and self.tokens % self.batch_tokens:
            raise ValueError(
                f"train.tokens={self.tokens} is not a multiple of "
                f"train.batch_tokens={self.batch_tokens}; change one of them"
            )
        return self

    @property
    def stage_steps(self) -> int:
        """Return the optimiser steps of one stage."""
        return self.steps if self.steps is not None else self.tokens // self.batch_tokens  # type: ignore[operator]

    @property
    def sequences(self) -> int:
        """Return the training sequences in one optimiser step."""
        return self.batch_tokens // self.block


class Eval(Section):
    documents: int = Field(32, ge=2)  # test documents per domain
    window: PositiveInt | None = 32  # first W tokens of each document; None: all
    context: int = Field(1024, gt=1)  # longest input of one forward pass, in tokens
    # tokens scored per forward pass of a long document; None: context
    stride: PositiveInt | None = None
    split: Literal["test", "dev"] = "test"

    @model_validator(mode="after")
    def _check(self) -> Eval:
        if self.stride is not None and self.stride > self.context:
            raise ValueError(
                f"eval.stride={self.stride} exceeds eval.context={self.context}, tokens would be "
                "skipped; lower it"
            )
        return self


class Compute(Section):
    """Execution only: recorded, not in the run id, but for ``compile``, whose numbers differ by
    rounding and, with dropout, by what is drawn."""

    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    threads: int | None = Field(None, gt=0, le=1024)  # CPU threads; None: all cores
    # sequences per forward pass of training; None: the whole step
    micro_batch: PositiveInt | None = None
    eval_batch: PositiveInt = 16  # documents per forward pass of evaluation
    hang_minutes: Positive | None = 30.0  # without a step: the run ends with 74; None: never
    gradient_checkpointing: bool = False
    deterministic: bool = False
    # layers: each layer and the loss are compiled, in training
    compile: Literal["none", "layers"] = "none"


class Track(Section):
    backend: Literal["none", "wandb"] = "none"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = Field("gain_cl", min_length=1, max_length=128)
    entity: str | None = None
    # lengths as wandb's server takes them
    group: str | None = Field(None, max_length=128)
    job_type: str = Field("train", max_length=64)
    name: str | None = Field(None, max_length=128)  # None: the run id
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = []
    init_timeout_seconds: int = Field(15, gt=0, le=15)


class Checkpoint(Section):
    """Execution only: when the state of a run is saved, and how much of it stays."""

    every_minutes: Positive | None = 10.0  # and never more than 1/40 of the time
    every_steps: PositiveInt | None = None  # optimiser steps, besides
    # trained state of finished stages; None: all where it is small
    keep_stages: Literal["all", "last"] | None = None


Change = Literal[
    "numerics", "model", "data", "tokenizer", "dtype", "device", "eval_batch", "unknown"
]
"""What may not differ between the attempts of one run, unless ``allow_change`` names it. unknown:
more than 1% unknown tokens in a domain, which is refused otherwise."""


Regime = Literal["sequential", "joint", "individual"]
"""One domain after another; all domains mixed in one stage; each domain alone, from the pretrained
model."""


class RunConfig(Section):
    model: Model
    method: Name
    adapter: Adapter
    guard: Guard
    # restart: a stage freezes what was learned and trains a new adapter
    handover: Literal["continue", "restart"] = "continue"
    regime: Regime = "sequential"
    lr_tuned_on: str | None = None  # model whose dev split chose train.lr
    sequence: Sequence
    domains: dict[str, Domain]  # every domain and control of the sequence, by name
    tasks: Tasks
    train: Train
    eval: Eval
    # data order, adapter initialisation, replay: separate streams of one seed
    seed: int = Field(ge=0, lt=2**31)
    compute: Compute
    track: Track
    checkpoint: Checkpoint = Checkpoint()
    resume: Literal["auto", "never", "must"] = "auto"  # go on where an earlier attempt was stopped
    # go on although this differs; the record is then marked tainted
    allow_change: list[Change] = []
    output_dir: Folder  # runs/<run_id>/: metrics.jsonl, matrix.csv, matrix.png, stages/
    results_dir: Folder  # runs/<run_id>.json and .items.parquet
    force: bool = False  # run again although the record exists
    plugins: list[str] = []  # python files that register adapters or guards

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        micro = self.compute.micro_batch
        if micro is not None and self.train.sequences % micro:
            raise ValueError(
                f"compute.micro_batch={micro} does not divide the {self.train.sequences} "
                "sequences of a step; use a divisor of them"
            )
        steps = self.train.stage_steps
        if self.train.warmup and round(self.train.warmup * steps) >= steps:
            raise ValueError(
                f"train.warmup={self.train.warmup} leaves no step after it; lower it or "
                "train longer"
            )
        return self

    @property
    def stages(self) -> list[str]:
        """Return the names of the trained stages in order: their domains. The one stage of joint
        training is called joint."""
        return [JOINT] if self.regime == "joint" else self.sequence.trained

    @property
    def stage(self) -> Train:
        """Return the training settings of one stage. Joint training spends the budget of all
        domains in one."""
        times = len(self.sequence.domains) if self.regime == "joint" else 1
        tokens, steps = self.train.tokens, self.train.steps
        return self.train.model_copy(
            update={"tokens": tokens and times * tokens, "steps": steps and times * steps}
        )

    @property
    def only_scored(self) -> list[str]:
        """Return the domains of which no text is trained on here: the controls, or all of them if
        the training was done elsewhere."""
        return (
            list(self.domains) if isinstance(self.adapter, Given) else list(self.sequence.controls)
        )

    def scientific(self) -> dict[str, Any]:
        """Return what the run id is a hash of: every setting that changes a result."""
        settings = self.model_dump(mode="json", exclude=set(EXECUTION))
        if isinstance(self.adapter, Given):
            del settings["train"]  # nothing is trained here
        elif self.compute.compile != "none":
            settings["compile"] = self.compute.compile
        for about in (settings["model"], *settings["domains"].values()):
            for words in ("licence", "note"):  # about the model or data, not the thing itself
                about.pop(words, None)
        if (delta := settings["model"].pop("delta")) is not None:
            settings["model"]["delta"] = delta["sha256"]  # its bytes count, not its place
        for told in (
            "include_path",
            "run_code",
            "revisions",
            "chat_template",
            "system_instruction",
        ):
            del settings["tasks"][told]  # the pins say what they come to
        settings["tasks"]["fewshot"] = self.tasks.fewshot or 0
        for domain in settings["domains"].values():
            for key in ("messages", "split_on"):  # newer than many a run: absent where not given
                if domain["source"].get(key, "") is None:
                    del domain["source"][key]
        for order in ("domains", "order"):  # trained is what they come to
            del settings["sequence"][order]
        settings["sequence"]["trained"] = self.sequence.trained
        return settings


@functools.cache
def known_keys() -> frozenset[str]:
    """Return the dotted names of all keys of a run. The name of a domain is written *."""
    return frozenset(_keys(RunConfig))


def _keys(annotation: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys below a section, a union of sections or sections by name."""
    for part in get_args(annotation):
        yield from _keys(part, prefix + "*." * (get_origin(annotation) is dict))
    for name, field in getattr(annotation, "model_fields", {}).items():
        yield prefix + name
        yield from _keys(field.annotation, f"{prefix}{name}.")
