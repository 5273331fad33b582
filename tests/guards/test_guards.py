"""Guards against closed forms, explicit loops and the plain torch functions; their memory survives
an interruption."""

from __future__ import annotations

import copy
import hashlib
import math
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from campaign import Warm, evidence, leftovers
from torch import nn
from torch.nn import functional as F

from conftest import ListBlocks, tiny
from gain_cl import adapters, api, guards
from gain_cl.compose import composition
from gain_cl.config import presets, schema
from gain_cl.domains import Block, Doc, Mixture
from gain_cl.domains.stream import Blocks
from gain_cl.errors import ConfigError
from gain_cl.guards.base import Batch, Guard
from gain_cl.guards.ewc import EwcGuard, fisher
from gain_cl.guards.near_base import EmaGuard, KlBaseGuard, L2BaseGuard, OrthogonalGuard
from gain_cl.guards.replay import ReplayGuard, SelfReplayGuard, sample
from gain_cl.models import forward, load, loss
from gain_cl.runs import train
from gain_cl.runs.inputs import training_streams
from gain_cl.tools.reopen import Reopened

GAIN = schema.Gain(kind="gain", roles=["attn_out", "ffn_down"])
FULL = schema.Full(kind="full")
LORA = schema.Peft(
    kind="peft", peft_type="LORA", config={"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
)


def attached(
    settings: schema.Adapter, family: str = "llama", dtype: str = "float32"
) -> tuple[load.Loaded, adapters.base.Adapter]:
    loaded = tiny(family, dtype)
    torch.manual_seed(0)
    adapter = adapters.build_adapter(settings)
    adapter.attach(loaded)
    return loaded, adapter


def shake(adapter: adapters.base.Adapter, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters().values():
            p.add_(size * torch.randn(p.shape, generator=generator))
    adapter.after_step()


def blocks(seed: int = 0, count: int = 8, length: int = 16) -> ListBlocks:
    return ListBlocks(np.random.default_rng(seed).integers(1, 257, (count, length)))


def batch(rows: int = 4, length: int = 16) -> Batch:
    return train.batch_at(blocks(9, rows, length), 0, rows)  # type: ignore[arg-type]


# --- EWC ------------------------------------------------------------------------------------------


def test_ewc_on_a_linear_model_ends_at_the_closed_form() -> None:
    """argmin of 1/2 (w-a)'H(w-a) + lambda/2 sum F (w-w*)^2 is (H + lambda F)^-1 (H a + lambda F
    w*)."""
    generator = torch.Generator().manual_seed(0)
    x, w = (
        torch.randn(50, 6, generator=generator, dtype=torch.float64),
        nn.Parameter(torch.zeros(6, dtype=torch.float64)),
    )
    y = x @ torch.randn(6, generator=generator, dtype=torch.float64)
    f, anchor = (
        torch.rand(6, generator=generator, dtype=torch.float64),
        torch.randn(6, generator=generator, dtype=torch.float64),
    )
    guard = EwcGuard(strength=3.0, sequences=1)
    guard.parameters, guard.fisher, guard.anchor = {"w": w}, {"w": f}, {"w": anchor}
    optimizer = torch.optim.LBFGS(
        [w],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def total() -> torch.Tensor:
        optimizer.zero_grad()
        value = 0.5 * (x @ w - y).square().mean() + guard.penalty()
        value.backward()
        return value

    optimizer.step(total)
    hessian = x.T @ x / len(x)
    expected = torch.linalg.solve(
        hessian + 3.0 * torch.diag(f), x.T @ y / len(x) + 3.0 * f * anchor
    )
    torch.testing.assert_close(w.detach(), expected, rtol=1e-6, atol=1e-8)


def test_fisher_of_the_output_layer_is_its_closed_form() -> None:
    """The gradient of a sequence's summed loss in the head W is sum_t (p_t - e_t) h_t', its square
    the Fisher information."""
    loaded, adapter = attached(FULL)
    assert loaded.head.weight is not loaded.model.get_input_embeddings().weight
    stream = blocks(count=3)
    (name,) = (n for n, p in loaded.model.named_parameters() if p is loaded.head.weight)
    found = fisher(loaded, adapter.parameters(), [stream[i] for i in range(3)])[name]
    expected = torch.zeros_like(found)
    with torch.no_grad():
        for i in range(3):
            tokens = torch.from_numpy(stream[i].tokens_T)
            ids = torch.cat([torch.tensor([loaded.prefix_id]), tokens[:-1]])
            h = loaded.body(input_ids=ids[None]).last_hidden_state[0]
            error = torch.softmax(h @ loaded.head.weight.T, -1) - F.one_hot(
                tokens, loaded.vocabulary
            )
            expected += (error.T @ h).square() / 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_fisher_does_not_depend_on_the_batch_and_is_not_the_square_of_its_mean() -> None:
    found = []
    for rows, micro in ((4, 4), (4, 1), (2, 2)):
        loaded, adapter = attached(GAIN)
        guard = EwcGuard(1e5, sequences=6)
        guard.attach(loaded, adapter, 0)
        setup = schema.Train(steps=1, block=16, batch_tokens=16 * rows, lr=1e-9)
        stream = blocks()
        list(
            train.stage(
                loaded,
                adapter,
                guard,
                stream,
                setup,
                train.optimizer(adapter, setup),
                index=1,
                seed=0,
                micro_batch=micro,
            )
        )  # type: ignore[arg-type]
        guard.after_stage(1, "a", stream)  # type: ignore[arg-type]
        found.append(guard.fisher)
    for other in found[1:]:
        for name, f in found[0].items():
            torch.testing.assert_close(other[name], f, rtol=1e-3, atol=1e-9)
    loaded, adapter = attached(GAIN)
    stream = blocks()
    forward.loss_sum(loaded, np.stack([stream[i].tokens_T for i in range(6)])).backward()
    twin = {name: (p.grad / 6).square() for name, p in adapter.parameters().items()}  # type: ignore[operator]
    assert not any(torch.allclose(twin[n], f, rtol=0.1) for n, f in found[0].items())


def test_fishers_add_up_and_the_anchor_is_the_latest() -> None:
    loaded, adapter = attached(GAIN)
    guard = EwcGuard(2.0, sequences=2, gamma=0.5)
    guard.attach(loaded, adapter, 0)
    assert guard.penalty() is None and guard.state() == {}
    guard.after_stage(1, "a", blocks(0))  # type: ignore[arg-type]
    first = {n: f.clone() for n, f in guard.fisher.items()}
    assert guard.penalty().item() == 0  # type: ignore[union-attr]
    shake(adapter)
    expected = sum((first[n] * p.square()).sum().item() for n, p in adapter.parameters().items())
    assert guard.penalty().item() == pytest.approx(expected, rel=1e-5)  # type: ignore[union-attr]
    second = fisher(loaded, adapter.parameters(), [blocks(1)[i] for i in range(2)])
    guard.after_stage(2, "b", blocks(1))  # type: ignore[arg-type]
    assert all(torch.allclose(guard.fisher[n], 0.5 * first[n] + second[n]) for n in first)
    assert guard.penalty().item() == 0  # type: ignore[union-attr]
    other = EwcGuard(2.0, sequences=2)
    other.attach(loaded, adapter, 0)
    other.load_state(guard.state())
    shake(adapter)
    assert other.penalty().item() == guard.penalty().item() > 0  # type: ignore[union-attr]


# --- replay ---------------------------------------------------------------------------------------


def stream_of(name: str, documents: int = 9) -> Blocks:
    """Token n * 1000 + i: which domain, which place."""
    base = {"a": 1000, "b": 2000, "c": 3000}[name]
    tokens = np.arange(base, base + 40 * documents, dtype=np.uint32).reshape(documents, 40)
    return Blocks(
        name,
        [
            Doc(f"{name}{i:015d}", t, np.arange(1, 41, dtype=np.uint32))
            for i, t in enumerate(tokens)
        ],
        0,
        8,
        0,
    )


def test_replayed_sequences_are_ones_that_were_trained_on() -> None:
    """Every row is either its own or one of the first `sequences` blocks of an earlier stream;
    domains equally often; a quarter of the rows on average although a step has two; the same
    whatever was drawn before."""
    past = [stream_of("a"), stream_of("b")]
    guard = ReplayGuard(0.25)
    guard.attach(None, None, 7)  # type: ignore[arg-type]
    own, seen, owners = stream_of("c"), Counter[int](), Counter[str]()
    plain = train.batch_at(own, 0, 2)
    guard.before_stage(1, [], 12)
    assert guard.mix(plain, 1, 0) is plain
    guard.before_stage(3, past, 12)
    known = {s.name: {tuple(s[i].tokens_T): i for i in range(12)} for s in past}
    for step in range(2000):
        before = train.batch_at(own, step, 2)
        mixed = guard.mix(before, 3, step)
        assert mixed.tokens_ST.shape == before.tokens_ST.shape
        changed = [
            i for i in range(2) if not np.array_equal(mixed.tokens_ST[i], before.tokens_ST[i])
        ]
        seen[len(changed)] += 1
        for i in changed:
            (owner,) = (s for s in known if tuple(mixed.tokens_ST[i]) in known[s])
            owners[owner] += 1
            assert (mixed.documents_ST[i] < 0).all() and mixed.scored_ST[i].all()
        kept = [i for i in range(2) if i not in changed]
        assert all((mixed.documents_ST[i] == before.documents_ST[i]).all() for i in kept)
    assert seen[0] + seen[1] == 2000 and seen[1] == pytest.approx(1000, abs=4 * math.sqrt(500))
    assert owners["a"] == pytest.approx(owners["b"], rel=0.2)
    again = ReplayGuard(0.25)
    again.attach(None, None, 7)  # type: ignore[arg-type]
    again.before_stage(3, [stream_of("a"), stream_of("b")], 12)
    late = train.batch_at(own, 1234, 2)
    assert np.array_equal(again.mix(late, 3, 1234).tokens_ST, guard.mix(late, 3, 1234).tokens_ST)


def test_the_replayed_stream_is_the_one_worked_out_by_hand() -> None:
    """By sha256sum of "(7, 3, STEP, 3, 'domain')" and so on: a quarter of four rows is the last
    one, of two every other step's."""
    own, past = stream_of("c"), [stream_of("a"), stream_of("b")]
    guard = ReplayGuard(0.25)
    guard.attach(None, None, 7)  # type: ignore[arg-type]
    guard.before_stage(3, past, 12)
    for step, (domain, block) in enumerate([(0, 4), (1, 10), (1, 9), (0, 3), (0, 3), (0, 5)]):
        before = train.batch_at(own, step, 4)
        mixed = guard.mix(before, 3, step)
        assert np.array_equal(mixed.tokens_ST[:3], before.tokens_ST[:3])
        assert np.array_equal(mixed.tokens_ST[3], past[domain][block].tokens_T)
        assert np.array_equal(mixed.documents_ST[3], -1 - past[domain][block].documents_T)
    pairs = [
        (train.batch_at(own, step, 2), guard.mix(train.batch_at(own, step, 2), 3, step))
        for step in range(8)
    ]
    assert [not np.array_equal(a.tokens_ST[1], b.tokens_ST[1]) for a, b in pairs] == [
        False,
        True,
        True,
        True,
        True,
        False,
        True,
        True,
    ]
    assert all(np.array_equal(a.tokens_ST[0], b.tokens_ST[0]) for a, b in pairs)


def test_a_run_with_replay_trains_on_exactly_that_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the loss in every step of three stages, against the domains' own streams and the
    hashes."""
    seen: list[np.ndarray] = []
    real = train._gradient

    def spy(loaded: load.Loaded, guard: Guard, batch: Batch, *rest: object) -> float | None:
        seen.append(batch.tokens_ST)
        return real(loaded, guard, batch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "_gradient", spy)
    made = api.run(
        "debug=smoke",
        "method=gain_ffn_replay",
        "eval.documents=2",
        f"output_dir={tmp_path}/runs",
        f"results_dir={tmp_path}/results",
    )
    bench = Reopened(made, None)
    with bench.opened():
        pass
    streams = training_streams(bench.config, bench.inputs)
    seed = train.seed_of("guard", 0)

    def share(*parts: int | str) -> float:
        return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:16], 16) / 16**16

    assert len(seen) == 12
    for place, tokens in enumerate(seen):
        stage, step = place // 4 + 1, place % 4
        expected = [streams[stage - 1][4 * step + i].tokens_T for i in range(4)]
        if stage > 1:
            past = streams[int(share(seed, stage, step, 3, "domain") * (stage - 1))]
            expected[3] = past[int(share(seed, stage, step, 3, "sequence") * 16)].tokens_T
        assert np.array_equal(tokens, np.stack(expected))


def test_self_replay_is_text_of_the_pretrained_model() -> None:
    """At a low temperature it is the greedy continuation, computed without a cache; no end token
    stops it."""
    loaded, adapter = attached(GAIN)
    found = sample(loaded, 2, 12, 1e-7, seed=1)
    ids = torch.tensor([[loaded.prefix_id]])
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, loaded.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids[:, 1:].expand(2, 12))
    guard = SelfReplayGuard(0.5, samples=3)
    guard.attach(loaded, adapter, 5)
    before = batch()
    mixed = guard.mix(before, 1, 0)
    memory = guard.state()["tokens"]
    assert memory.shape == (3, 16) and (mixed.tokens_ST[:2] == before.tokens_ST[:2]).all()
    assert all(mixed.tokens_ST[i].tolist() in memory.tolist() for i in (2, 3))
    shake(adapter, 1.0)
    other = SelfReplayGuard(0.5, samples=3)
    other.attach(loaded, adapter, 5)
    other.load_state(guard.state())
    assert np.array_equal(other.mix(before, 2, 7).tokens_ST, guard.mix(before, 2, 7).tokens_ST)


def test_sampling_follows_the_models_probabilities() -> None:
    loaded = tiny("llama")
    first = sample(loaded, 4000, 1, 1.0, seed=0)[:, 0]
    with torch.no_grad():
        p = torch.softmax(loaded.model(torch.tensor([[loaded.prefix_id]])).logits[0, -1], -1)
    counts = torch.bincount(first, minlength=len(p)).double()
    chi = ((counts - 4000 * p).square() / (4000 * p)).sum().item()
    assert abs(chi - 256) < 5 * math.sqrt(2 * 256)


# --- near the base --------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_divergence_equals_torchs(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    h, w, b = (
        torch.randn(*s, generator=generator, requires_grad=True)
        for s in ((40, 8), (300, 8), (300,))
    )
    base = tuple(torch.randn(*s, generator=generator) for s in ((40, 8), (300, 8), (300,)))
    before, loss.CHUNK_LOGITS["cpu"] = loss.CHUNK_LOGITS["cpu"], 300 * 7
    try:
        found = loss.sum_divergence(h, w, b, base, softcap)  # type: ignore[arg-type]
        found.backward()
    finally:
        loss.CHUNK_LOGITS["cpu"] = before
    ours = [h.grad.clone(), w.grad.clone(), b.grad.clone()]  # type: ignore[union-attr]
    h.grad = w.grad = b.grad = None
    cap = (lambda x: softcap * torch.tanh(x / softcap)) if softcap else (lambda x: x)
    p, q = (F.log_softmax(cap(F.linear(*t)), -1) for t in ((h, w, b), base))
    expected = F.kl_div(p, q, log_target=True, reduction="sum")
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, p in zip(ours, (h, w, b), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gain", "full", "full bfloat16", "lora"])
def test_kl_base_is_the_divergence_from_the_untouched_model(kind: str) -> None:
    """Value and gradient against a copy of the pretrained model kept aside."""
    settings = {"gain": GAIN, "lora": LORA}.get(kind, FULL)
    loaded, adapter = attached(settings, dtype="bfloat16" if "bfloat16" in kind else "float32")
    base = tiny("llama", loaded.model.dtype.__str__().removeprefix("torch."))
    guard = KlBaseGuard(5.0)
    guard.attach(loaded, adapter, 0)
    shake(adapter, {"gain": 0.5, "lora": 0.3}.get(kind, 0.02))
    tokens = batch().tokens_ST

    def gradients(value: torch.Tensor) -> list[torch.Tensor]:
        for p in adapter.parameters().values():
            p.grad = None
        value.backward()
        return [p.grad.clone() for p in adapter.parameters().values()]  # type: ignore[union-attr]

    plain = forward.loss_sum(loaded, tokens)
    both = forward.loss_sum(loaded, tokens, token_penalty=guard.token_penalty)
    assert both.item() == plain.item()  # what is logged is the loss of the text
    ours = gradients(both)
    inputs = forward.inputs_of(loaded, tokens)
    with torch.no_grad():
        q = F.log_softmax(base.model(inputs["input_ids"]).logits.float(), -1)
    p = F.log_softmax(loaded.model(inputs["input_ids"]).logits.float(), -1)
    nll = F.nll_loss(p.flatten(0, 1), torch.from_numpy(tokens.reshape(-1)), reduction="sum")
    expected = gradients(nll + 5.0 * F.kl_div(p, q, log_target=True, reduction="sum"))
    alone = gradients(
        F.nll_loss(
            F.log_softmax(loaded.model(inputs["input_ids"]).logits.float(), -1).flatten(0, 1),
            torch.from_numpy(tokens.reshape(-1)),
            reduction="sum",
        )
    )
    near = 1e-4 if "bfloat16" not in kind else 5e-2
    ours_, expected_, alone_ = (
        torch.cat([g.flatten() for g in gs]) for gs in (ours, expected, alone)
    )
    assert (ours_ - expected_).norm() < near * expected_.norm()
    assert (alone_ - expected_).norm() > 3 * near * expected_.norm()


def test_l2_base_is_half_the_squared_distance() -> None:
    loaded, adapter = attached(FULL)
    guard = L2BaseGuard(3.0)
    guard.attach(loaded, adapter, 0)
    assert guard.penalty().item() == 0  # type: ignore[union-attr]
    before = {n: p.detach().clone() for n, p in adapter.parameters().items()}
    shake(adapter)
    expected = 1.5 * sum(
        (p - before[n]).square().sum().item() for n, p in adapter.parameters().items()
    )
    assert guard.penalty().item() == pytest.approx(expected, rel=1e-5)  # type: ignore[union-attr]


def test_ema_ends_a_stage_at_the_weighted_mean_of_what_it_passed() -> None:
    loaded, adapter = attached(GAIN)
    guard, path = EmaGuard(0.8), []
    guard.attach(loaded, adapter, 0)
    name = next(iter(adapter.parameters()))
    setup = schema.Train(steps=5, block=16, batch_tokens=32, lr=1e-2)
    for _ in train.stage(
        loaded, adapter, guard, blocks(), setup, train.optimizer(adapter, setup), index=1, seed=0
    ):  # type: ignore[arg-type]
        path.append(adapter.parameters()[name].detach().clone())
    guard.after_stage(1, "a", blocks())  # type: ignore[arg-type]
    expected = sum(
        0.2 * 0.8 ** (4 - i) * p for i, p in enumerate(path)
    )  # and 0.8^5 of the start, which is 0
    torch.testing.assert_close(adapter.parameters()[name].detach(), expected, rtol=1e-5, atol=1e-8)
    assert guard.state() == {}


def test_orthogonal_is_the_sum_of_squared_products() -> None:
    class Stack:
        def lora_inputs(self) -> dict[str, list[torch.Tensor]]:
            return {"x": self.matrices, "y": self.matrices[:2]}

    stack = Stack()
    stack.matrices = [torch.randn(2, 5), torch.randn(2, 5), nn.Parameter(torch.randn(2, 5))]  # type: ignore[attr-defined]
    guard = OrthogonalGuard(0.5)
    guard.attach(None, stack, 0)  # type: ignore[arg-type]
    a, b, c = stack.matrices  # type: ignore[attr-defined]
    expected = 0.5 * sum(
        (u @ v).item() ** 2 for old, new in ((a, c), (b, c), (a, b)) for u in old for v in new
    )
    assert guard.penalty().item() == pytest.approx(expected, rel=1e-4)  # type: ignore[union-attr]
    stack.matrices = [c]  # type: ignore[attr-defined]
    assert guard.penalty() is None
    with pytest.raises(ConfigError, match="does not offer LoRA matrices"):
        guard.attach(None, attached(GAIN)[1], 0)  # type: ignore[arg-type]


def test_every_guard_preset_builds_and_none_moves_a_step_without_a_past() -> None:
    for name in presets.names("guard"):
        settings = composition.compose(
            [
                "debug=smoke",
                f"guard={name}",
                *(["method=lora", "handover=restart"] if name == "orthogonal" else []),
            ]
        )
        assert settings.guard.kind == name
        assert isinstance(guards.build_guard(settings.guard), Guard)


# --- combinations that make no sense --------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (
            ["method=lora_ewc", "handover=restart"],
            "its penalty is about parameters of the stage before",
        ),
        (["method=full", "handover=restart"], "full fine-tuning has no adapter to freeze"),
        (
            ["method=gain_ffn", "handover=restart", "train.optimizer=carried"],
            "moments are of parameters that no longer train",
        ),
        (
            ["method=lora", "handover=restart", "++adapter.config.use_dora=true"],
            "can keep the old beside a new one",
        ),
        (
            ["method=gain_ffn", "guard=orthogonal", "handover=restart"],
            "keeps the LoRA of a stage orthogonal",
        ),
        (["method=o_lora", "handover=continue"], "keeps the LoRA of a stage orthogonal"),
        (["method=joint", "guard=ewc"], "there is no stage before to keep"),
        (["method=individual", "guard=replay"], "there is no stage before to keep"),
        (["method=individual", "handover=restart"], "nothing is handed over"),
        (["method=joint", "train.optimizer=carried"], "nothing is handed over"),
    ],
)
def test_refused_before_torch(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        composition.compose(["debug=smoke", *overrides])


# --- in a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as parent:
        yield parent


SLOW = pytest.mark.slow
KINDS = [
    ["method=ewc"],
    pytest.param(["method=lora_replay"], marks=SLOW),
    pytest.param(["method=gain_ffn", "guard=self_replay", "guard.samples=4"], marks=SLOW),
    pytest.param(["method=lora_kl"], marks=SLOW),
    pytest.param(["method=gain_ffn", "guard=l2_base", "guard.strength=1"], marks=SLOW),
    pytest.param(["method=gain_ffn", "guard=ema"], marks=SLOW),
    pytest.param(["method=o_lora"], marks=SLOW),
    ["method=gain_ffn", "handover=restart"],
    pytest.param(["method=multiplicative_lora", "handover=restart"], marks=SLOW),
    ["method=individual"],
    pytest.param(["method=joint"], marks=SLOW),
]


@pytest.mark.parametrize("extra", KINDS, ids=" ".join)
def test_killed_in_the_second_domain_and_resumed(
    warm: Warm, tmp_path: Path, extra: list[str]
) -> None:
    done = warm.run(tmp_path / "undisturbed", *extra)
    assert done.code == 0, done.err
    assert (
        warm.run(tmp_path / "killed", *extra, env={"GAIN_CL_FAILPOINT": "commit@6"}).code
        == -signal.SIGKILL
    )
    done = warm.run(tmp_path / "killed", *extra)
    assert done.code == 0, done.err
    assert "resumed at stage" in done.out
    assert evidence(tmp_path / "killed") == evidence(tmp_path / "undisturbed")
    assert not leftovers(tmp_path / "killed")


def test_a_mixture_gives_each_stream_the_blocks_it_would_have_had_alone() -> None:
    parts = [stream_of("a"), stream_of("b"), stream_of("c")]
    mixed = Mixture("joint", parts, 3)
    found = [mixed[i] for i in range(30)]
    for stream in parts:
        own = [tuple(stream[i].tokens_T) for i in range(10)]
        assert [tuple(b.tokens_T) for b in found if tuple(b.tokens_T) in own] == own
    for i in range(0, 30, 3):
        assert {mixed.ids[int(b.documents_T[0])][0] for b in found[i : i + 3]} == {"a", "b", "c"}
    assert (
        len(
            {
                tuple(mixed.ids[int(b.documents_T[0])][0] for b in found[i : i + 3])
                for i in range(0, 30, 3)
            }
        )
        > 1
    )
    assert isinstance(mixed[0], Block) and copy.copy(mixed).ids == mixed.ids


def test_out_of_memory_in_the_base_pass_leaves_dropout_on() -> None:
    """The step is taken again with half the sequences; the mode of the model is what it was."""
    loaded, adapter = attached(GAIN, "gpt2")
    guard = KlBaseGuard(1.0)
    guard.attach(loaded, adapter, 0)
    loaded.model.train()
    real, calls = loaded.model.transformer.forward, Counter[str]()

    def once(*a: object, **k: object) -> object:
        calls["passes"] += 1
        if calls["passes"] == 2:  # the first is the tuned model's
            raise torch.OutOfMemoryError("planted")
        return real(*a, **k)

    loaded.model.transformer.forward = once
    with pytest.raises(torch.OutOfMemoryError):
        forward.loss_sum(loaded, batch().tokens_ST, token_penalty=guard.token_penalty)
    assert loaded.model.training and adapter.active
