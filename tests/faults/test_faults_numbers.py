"""Numbers that are none, memory that runs out, a loss that jumps: planted in real runs, and
compared with the undisturbed one.

``python tests/test_faults_numbers.py`` carries out the full campaigns of docs/reliability.md.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from campaign import SMOKE, Outcome, Result, Warm, evidence, evidence_bytes, leftovers, steps

from gain_cl import domains as domains_
from gain_cl.compose import composition
from gain_cl.domains import Doc
from gain_cl.errors import DataError
from gain_cl.measure import perplexity, record
from gain_cl.models import load
from gain_cl.system import checkpoint

TRAINED, STEPS, SEQUENCES = ["smoke_a", "smoke_b"], 3, 4
BASE = (*SMOKE, f"domain=[{','.join(TRAINED)}]", f"train.steps={STEPS}")
FIRST_MIDDLE_LAST = (1, 4, 6)  # of the six steps of the run

Told = tuple[list[str], int]
"""What is wrong (nothing, it is to be hoped) and how many bytes were compared."""


def wrong(**facts: object) -> list[str]:
    """The names of what does not hold."""
    return [name for name, holds in facts.items() if not holds]


def one_line(result: Result, code: int) -> dict[str, object]:
    lines = [line for line in result.err.splitlines() if line.startswith("gain_cl: error:")]
    return {
        f"exit_{code}": result.code == code,
        "one_line": len(lines) == 1 and "Traceback" not in result.err,
    }


class Bench:
    """A warm parent, a place for trials and the undisturbed runs they are compared with (each made
    once)."""

    def __init__(self, warm: Warm, root: Path) -> None:
        self.warm, self.root, self.count = warm, root, 0

    def new(self) -> Path:
        self.count += 1
        return self.root / str(self.count)

    def run(self, folder: Path, *patches: str, **more: Any) -> Result:
        return self.warm.run(
            folder, base=BASE, patch=";".join(f"injections:{p}" for p in patches) or None, **more
        )

    @functools.cached_property
    def undisturbed(self) -> Path:
        folder = self.root / "undisturbed"
        assert self.run(folder, f"trace_batches,{self.root}/batches", "keep_checkpoints").code == 0
        return folder

    @functools.cached_property
    def undisturbed_evidence(self) -> dict[str, str]:
        return evidence(self.undisturbed)

    @functools.cache  # noqa: B019
    def smaller(self, step: int, sequences: int) -> Path:
        """A run without a fault that uses fewer sequences a forward pass from a step on."""
        folder = self.root / f"smaller-{step}-{sequences}"
        assert self.run(folder, f"smaller_from,{step},{sequences}").code == 0
        return folder

    @functools.cached_property
    def documents(self) -> dict[int, tuple[str, list[list[set[str]]]]]:
        """Stage -> domain, and for each block of its stream and each part of it the ids of the
        documents that have this text."""
        config = composition.compose(
            [*BASE, f"output_dir={self.root}/x", f"results_dir={self.root}/x"], [], []
        )
        loaded = load.load_model(config.model, torch.device("cpu"))
        found = {}
        for stage, name in enumerate(TRAINED, start=1):
            domain = domains_.prepare_domain(
                config.domains[name], loaded.tokenizer, loaded.tokenizer_hash
            )
            texts = {d.id: d.tokens.tolist() for d in domain.split_documents("train")}
            stream = domain.train_blocks(config.seed, config.train.block, loaded.separator_id)
            blocks = []
            for i in range(STEPS * SEQUENCES):
                parts = split(stream[i][0].tolist(), loaded.separator_id)
                blocks.append(
                    [
                        {
                            d
                            for d, text in texts.items()
                            if contains([*text, loaded.separator_id], part)
                        }
                        for part in parts
                    ]
                )
            found[stage] = name, blocks
        return found


def split(tokens: list[int], separator: int) -> list[list[int]]:
    """The parts of a block, each up to and with its separator."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        parts[-1].append(token)
        if token == separator:
            parts.append([])
    return [part for part in parts if part]


def contains(text: list[int], part: list[int]) -> bool:
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


def failure(folder: Path) -> dict[str, Any] | None:
    """failure.json of the run, which must be JSON without NaN."""

    def refuse(text: str) -> float:
        raise ValueError(text)

    for path in folder.glob("runs/*/failure.json"):
        return dict(json.loads(path.read_text(), parse_constant=refuse))
    return None


def resumed(bench: Bench, folder: Path, expected: dict[str, str]) -> dict[str, object]:
    """The same command without the fault: the undisturbed outcome, nothing left over, every step
    once."""
    again = bench.run(folder)
    return {
        "resume_exit_0": again.code == 0,
        "resume_identical": evidence(folder) == expected,
        "no_leftovers": leftovers(folder) == [],
        "each_step_once": steps(folder) == [(s, i) for s in (1, 2) for i in range(1, STEPS + 1)],
    }


# --- NaN and Inf ----------------------------------------------------------------------------------

NOT_FINITE = [
    (where, value, step)
    for where in ("loss", "gradient", "gain", "hidden")
    for value in ("nan", "inf")
    for step in FIRST_MIDDLE_LAST
]


def not_finite(bench: Bench, where: str, value: str, step: int, *twin: str) -> Told:
    """The update does not happen, the batch is named, the newest state is the undisturbed one, and
    the run goes on from it."""
    folder = bench.new()
    result = bench.run(
        folder,
        f"not_finite,{where},{value},{step}",
        f"parameters_untouched,{folder}/parameters",
        *twin,
    )
    told, (stage, within) = failure(folder) or {}, (1 + (step - 1) // STEPS, 1 + (step - 1) % STEPS)
    name, documents = bench.documents[stage]
    blocks = list(range((within - 1) * SEQUENCES, within * SEQUENCES))
    owners = [part for block in blocks for part in documents[block]]
    newest = next(
        iter(checkpoint.steps(next(folder.glob("runs/*/run.json")).parent / "ckpt")), None
    )
    state = newest and (newest / "adapter.safetensors").read_bytes()
    same = (
        next(bench.undisturbed.glob("runs/*/run.json")).parent
        / "ckpt"
        / f"step-{step - 1}"
        / "adapter.safetensors"
    )
    facts = one_line(result, 65) | {
        "no_record": not list(folder.glob("results/runs/*")),
        "parameters_untouched": (folder / "parameters").exists()
        and (folder / "parameters").read_text() == "untouched",
        "where": (told.get("stage"), told.get("domain"), told.get("step")) == (stage, name, within),
        "blocks": told.get("blocks") == blocks,
        "documents": all(part & set(told.get("documents", [])) for part in owners)
        and set(told.get("documents", [])) <= set().union(*owners),
        "newest_state": state == (same.read_bytes() if step > 1 else None)
        and (newest is None or checkpoint.verify(newest)),
    }
    facts |= resumed(bench, folder, bench.undisturbed_evidence)
    return wrong(**facts), evidence_bytes(folder)


def not_finite_score(bench: Bench, value: str, at: int, *twin: str) -> Told:
    folder = bench.new()
    result = bench.run(folder, f"not_finite,score,{value},{at}", *twin)
    facts = one_line(result, 65) | {
        "no_record": not list(folder.glob("results/runs/*")),
        "noted": failure(folder),
    }
    return wrong(**facts, **resumed(bench, folder, bench.undisturbed_evidence)), evidence_bytes(
        folder
    )


# --- memory ---------------------------------------------------------------------------------------

MEMORY = [
    (where, kind, step)
    for where in ("forward", "backward")
    for kind in ("cuda", "cpu", "python")
    for step in FIRST_MIDDLE_LAST
]


def out_of_memory(
    bench: Bench, where: str, kind: str, step: int, times: int = 1, *twin: str
) -> Told:
    """The step is done again with half the sequences a forward pass (twice: a quarter) and the run
    goes on so, also when it is killed after the step and resumed."""
    folder, killed = bench.new(), bench.new()
    patch = f"out_of_memory,{where},{kind}," + ",".join(
        str(step + 2 * i) for i in range(times)
    )  # +2: in the repeated step, halfway
    fits = SEQUENCES // 2**times
    result = bench.run(folder, patch, f"trace_batches,{folder}/batches", *twin)
    stage, within = 1 + (step - 1) // STEPS, 1 + (step - 1) % STEPS
    event = (
        f"out of memory at step {within} of stage {stage}: from there {fits} sequences a "
        "forward pass"
    )
    smaller = bench.smaller(step, fits)
    facts: dict[str, object] = {"exit_0": result.code == 0}
    if result.code == 0:
        facts |= {
            "as_with_that_micro_batch": evidence(folder) == evidence(smaller),
            "close_to_undisturbed": gap(folder, bench.undisturbed) < 1e-5,
            "same_batches": (folder / "batches").read_text()
            == (bench.root / "batches").read_text(),
            "recorded": event in notes(folder),
            "rows": micro_batches(folder) == [SEQUENCES] * (step - 1) + [fits] * (7 - step),
        }
        dead = bench.run(killed, patch, env={"GAIN_CL_FAILPOINT": f"commit@{step}"})
        facts |= {"killed": dead.code == -9} | resumed(bench, killed, evidence(smaller))
        facts |= {
            "inherited": event in notes(killed),
            "rows_resumed": micro_batches(killed) == micro_batches(folder),
        }
    return wrong(**facts), evidence_bytes(folder) + evidence_bytes(killed)


def no_memory_left(bench: Bench, patch: str, *overrides: str) -> Told:
    """Where nothing can be halved: one line with advice, exit 74, and the state before it is
    good."""
    folder = bench.new()
    result = bench.warm.run(folder, *overrides, base=BASE, patch=f"injections:{patch}")
    facts = one_line(result, 74) | {
        "advice": "gradient_checkpointing=true" in result.err,
        "noted": failure(folder),
    }
    again = bench.warm.run(folder, *overrides, base=BASE)
    facts |= {"resume_exit_0": again.code == 0, "no_leftovers": leftovers(folder) == []}
    if not overrides:
        facts["resume_identical"] = evidence(folder) == bench.undisturbed_evidence
    return wrong(**facts), evidence_bytes(folder)


def gap(folder: Path, other: Path) -> float:
    """Largest relative difference of a document's loss."""
    ours, theirs = (
        record.load(next(f.glob("results/runs/*.json"))).documents.nll_nats.to_numpy()
        for f in (folder, other)
    )
    return float(np.max(np.abs(ours / theirs - 1)))


def notes(folder: Path) -> list[str]:
    return record.load(next(folder.glob("results/runs/*.json"))).record.notes


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    (path,) = folder.glob("runs/*/metrics.jsonl")
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == kind]


def micro_batches(folder: Path) -> list[int]:
    return [row["micro_batch"] for row in rows(folder, "step")]


def in_task(bench: Bench, fault: str, at: int) -> Told:
    """In a batch of the task after training: NaN is an error, no memory a stop; nothing is computed
    twice when it goes on."""
    folder, calm = bench.new(), bench.root / "tasks"
    base = [*(word for word in BASE if word != "tasks=none"), "tasks=boolq_100", "tasks.limit=4"]
    if not calm.exists():
        assert bench.warm.run(calm, base=base).code == 0
    result = bench.warm.run(folder, base=base, patch=f"injections:in_task,{fault},{at}")
    facts = one_line(result, 74 if fault == "cuda" else 65) | {
        "no_record": not list(folder.glob("results/runs/*")),
        "noted": failure(folder),
    }
    again = bench.warm.run(folder, base=base)
    facts |= {
        "resume_exit_0": again.code == 0,
        "identical": evidence(folder) == evidence(calm),
        "no_leftovers": leftovers(folder) == [],
    }
    return wrong(**facts), evidence_bytes(folder)


# --- a loss that jumps ----------------------------------------------------------------------------

LONG = (
    *(s for s in SMOKE if "every_steps" not in s),
    "domain=[smoke_a]",
    "train.steps=40",
    "checkpoint.every_steps=20",
)


def spike(bench: Bench, at: int, kill: bool) -> Told:
    """It is recorded and nothing is skipped; also when the run was killed between, for the losses
    before it are remembered."""
    folder, calm = bench.new(), bench.root / "calm"
    if not calm.exists():
        assert bench.warm.run(calm, base=LONG).code == 0
    if kill:
        assert (
            bench.warm.run(folder, base=LONG, env={"GAIN_CL_FAILPOINT": "commit@1"}).code == -9
        )  # after step 20
    result = bench.warm.run(folder, base=LONG, patch=f"injections:spike,{at - 20 * kill},5")
    told, undisturbed = (
        [{k: row[k] for k in ("stage", "step")} for row in rows(f, "spike")] for f in (folder, calm)
    )
    first, second = (
        record.load(next(f.glob("results/runs/*.json"))).record.stages[1].train
        for f in (folder, calm)
    )
    weights = [
        next(f.glob("runs/*/stages/01-*/adapter.safetensors")).read_bytes() for f in (folder, calm)
    ]
    facts = {
        "exit_0": result.code == 0,
        "told": told == [{"stage": 1, "step": at}] and "loss spike" in result.out,
        "none_undisturbed": undisturbed == [] and second is not None and second.spikes == [],
        "recorded": first is not None and first.spikes == [at],
        "nothing_skipped": weights[0] == weights[1],
    }
    return wrong(**facts), evidence_bytes(folder)


# --- sums by hand ---------------------------------------------------------------------------------

BITS = np.array([[1, 2, 3, 3], [2, 1, 3, 3], [3, 3, 1, 2], [2, 3, 3, 1]])
"""-log2 of the probability of token b after token a: each row's probabilities add up to 1."""
DOCUMENTS = [[1, 1, 2, 3, 0], [3, 2]]
BY_HAND = [2 + 1 + 3 + 2 + 2, 3 + 3]
"""Bits of the two documents after the prefix token 0, added up by hand."""


class Table(torch.nn.Module):
    """A language model that is a table: what comes next depends on the token before alone."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(input_ids, 4).float())


def by_hand(broken: bool = False) -> None:
    """Scores of the table model are the sums by hand, and a number that is none is an error."""
    model, weight_VD = Table(), torch.tensor(-math.log(2) * BITS.T, dtype=torch.float32)
    if broken:
        weight_VD[2, 1] = math.nan
    loaded = SimpleNamespace(
        model=model,
        hidden=lambda **inputs: model(**inputs).last_hidden_state,
        prefix_id=0,
        device=torch.device("cpu"),
        output=(weight_VD, None),
        softcap=None,
    )
    documents = [
        Doc(str(i), np.array(d, np.uint32), np.arange(1, len(d) + 1, dtype=np.uint32))
        for i, d in enumerate(DOCUMENTS)
    ]
    scored = perplexity.score(loaded, documents, None, context=2)  # type: ignore[arg-type]
    assert not broken
    assert scored.tokens.tolist() == [5, 2]
    assert scored.nll_nats.tolist() == pytest.approx(
        [math.log(2) * bits for bits in BY_HAND], rel=1e-6
    )
    total = perplexity.total(scored)
    assert (total.tokens, total.documents) == (7, 2)
    assert total.loss_nats == pytest.approx(math.log(2) * Fraction(sum(BY_HAND), 7), rel=1e-6)


def mean_of_means(rows: Any) -> record.DomainScore:
    tokens = int(rows.tokens.sum())
    mean = float((rows.nll_nats / rows.tokens).mean())
    return record.DomainScore(
        nll_nats=mean * tokens, tokens=tokens, bytes=int(rows.bytes.sum()), documents=len(rows)
    )


def last_block_dropped(*a: Any) -> list[perplexity.Window]:
    return windows(*a)[:-1] or windows(*a)


def nan_filtered(*a: Any) -> torch.Tensor:
    return token_nll(*a).nan_to_num(0)


windows, token_nll = perplexity.windows, perplexity.token_nll
TWINS: list[tuple[str, Callable[..., Any], bool]] = [
    ("total", mean_of_means, False),
    ("windows", last_block_dropped, False),
    ("token_nll", nan_filtered, True),
]


def test_scores_by_hand() -> None:
    by_hand()
    with pytest.raises(DataError, match="not finite"):
        by_hand(broken=True)


@pytest.mark.parametrize(
    ("place", "twin", "broken"), TWINS, ids=[twin.__name__ for _, twin, _ in TWINS]
)
def test_a_broken_score_is_noticed(
    place: str, twin: Callable[..., Any], broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, place, twin)
    with pytest.raises(AssertionError):
        by_hand(broken)


# --- what CI does ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Warm(composed_once=True) as warm:
        yield Bench(warm, tmp_path_factory.mktemp("numbers"))


QUICK = [("loss", "inf", 1), ("gain", "nan", 4)]


def some(trials: list[tuple[str, str, int]], quick: list[tuple[str, str, int]]) -> list[Any]:
    """The quick ones in the default run, the others with the slow tests."""
    return [
        pytest.param(*t, marks=[] if t in quick else pytest.mark.slow, id="-".join(map(str, t)))
        for t in trials
    ]


@pytest.mark.parametrize(("where", "value", "step"), some(NOT_FINITE, QUICK))
def test_not_finite(bench: Bench, where: str, value: str, step: int) -> None:
    assert not_finite(bench, where, value, step)[0] == []


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_not_finite_score(bench: Bench, value: str) -> None:
    assert not_finite_score(bench, value, 5)[0] == []


def test_a_skipped_step_is_noticed(bench: Bench) -> None:
    assert {"exit_65", "resume_identical"} <= set(
        not_finite(bench, "gradient", "nan", 4, "twin_step_skipped")[0]
    )


@pytest.mark.slow
def test_filtered_nan_is_noticed(bench: Bench) -> None:
    assert {"exit_65", "resume_identical"} <= set(
        not_finite_score(bench, "nan", 5, "twin_nan_is_zero")[0]
    )


@pytest.mark.parametrize(("where", "kind", "step"), some(MEMORY, [("backward", "cpu", 4)]))
def test_out_of_memory(bench: Bench, where: str, kind: str, step: int) -> None:
    assert out_of_memory(bench, where, kind, step)[0] == []


@pytest.mark.slow
def test_out_of_memory_twice(bench: Bench) -> None:
    assert out_of_memory(bench, "forward", "cuda", 2, 2)[0] == []


@pytest.mark.slow
def test_broken_halving_is_noticed(bench: Bench) -> None:
    assert (
        "as_with_that_micro_batch"
        in out_of_memory(bench, "backward", "cuda", 4, 1, "twin_gradient_kept")[0]
    )
    assert "same_batches" in out_of_memory(bench, "backward", "cuda", 4, 1, "twin_batch_dropped")[0]


NOWHERE = ["score,cuda,2", "score,cpu,8", "update,python,4"]


@pytest.mark.parametrize(
    "patch", [NOWHERE[0], *(pytest.param(p, marks=pytest.mark.slow) for p in NOWHERE[1:])]
)
def test_no_memory_to_score_or_update(bench: Bench, patch: str) -> None:
    assert no_memory_left(bench, f"out_of_memory,{patch}")[0] == []


@pytest.mark.slow
def test_no_memory_for_one_sequence(bench: Bench) -> None:
    assert no_memory_left(bench, "out_of_memory,forward,cuda,9", "compute.micro_batch=1")[0] == []


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("fault", "at"), [("nan", 2), ("cuda", 1)])
def test_in_task(bench: Bench, fault: str, at: int) -> None:
    assert in_task(bench, fault, at)[0] == []


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_spike(bench: Bench, kill: bool) -> None:
    assert spike(bench, 36, kill)[0] == []


# --- the full campaigns ---------------------------------------------------------------------------


def carry_out(name: str, trials: list[Callable[[], Told]]) -> Outcome:
    outcome, begun = Outcome(name), time.monotonic()
    for number, trial in enumerate(trials):
        complaints, compared = trial()
        outcome.count(1, complaints, f"trial {number}", compared)
    outcome.seconds = time.monotonic() - begun
    print(outcome.row(), *outcome.failures, sep="\n", flush=True)
    return outcome


def main() -> int:
    with tempfile.TemporaryDirectory() as root, Warm(composed_once=True) as warm:
        bench = Bench(warm, Path(root))
        of = functools.partial
        done = [
            carry_out("NaN and Inf in training", [of(not_finite, bench, *t) for t in NOT_FINITE]),
            carry_out("NaN and Inf in " "evaluation", [of(not_finite_score, bench, v, at) for v in ("nan", "inf") for at in (1, 5, 9)]),
            carry_out("out of memory in training", [*(of(out_of_memory, bench, *t) for t in MEMORY),
                      *(of(out_of_memory, bench, w, "cuda", 2, 2) for w in ("forward", "backward"))]),
            carry_out("out of memory " "elsewhere", [*(of(no_memory_left, bench, f"out_of_memory,{p}") for p in NOWHERE),
                      of(no_memory_left, bench, "out_of_memory,forward,cuda,9", "compute.micro_batch=1")]),
            carry_out("NaN and out of memory " "in a task", [of(in_task, bench, f, at) for f in ("nan", "cuda") for at in (1, 2)]),
            carry_out("loss spike", [of(spike, bench, at, kill) for at in (34, 40) for kill in (False, True)]),
        ]  # fmt: skip
    return any(outcome.failures for outcome in done)


if __name__ == "__main__":
    sys.exit(main())
