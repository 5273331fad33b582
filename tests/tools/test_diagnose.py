"""What a run did to the weights: each number against a plain numpy or torch computation, and the
verb on runs of every kind."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny
from gain_cl import api, cli
from gain_cl.adapters.gain import GainAdapter, MultiplicativeLoraAdapter
from gain_cl.domains import Doc
from gain_cl.errors import ConfigError, DataError
from gain_cl.measure import diagnosis, perplexity, record
from gain_cl.models import families, load
from gain_cl.models.loss import token_divergence
from gain_cl.tools import diagnose, weights


def known(o: int, i: int, values: list[float], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(W, U) with these singular values and left singular vectors U (o, r)."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0][:, : len(values)] for n in (o, i))
    return torch.tensor(u @ np.diag(values) @ v.T, dtype=torch.float32), torch.tensor(
        u, dtype=torch.float32
    )


def intruders(base: np.ndarray, tuned: np.ndarray, k: int = 10, threshold: float = 0.5) -> int:
    """The authors' count, by numpy."""
    u, t = (np.linalg.svd(w, full_matrices=False)[0] for w in (base, tuned))
    return int((np.abs(t.T @ u).max(axis=1)[:k] < threshold).sum())


def ours(base: torch.Tensor, tuned: torch.Tensor) -> int:
    cosines = weights.closest_cosines(
        weights.left_vectors(tuned)[:, : diagnosis.TOP], weights.left_vectors(base)
    )
    return int((cosines < diagnosis.THRESHOLD).sum())


# --- one layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [0, 1, 3])
def test_intruders_are_the_authors_count_on_planted_directions(planted: int) -> None:
    """A direction spread evenly over the base's 16 singular vectors has a cosine of 1/4 with each:
    made large, it is an intruder."""
    from scipy.linalg import hadamard

    base, u = known(16, 16, [float(x) for x in np.linspace(3, 1, 16)])
    spread = u @ torch.tensor(hadamard(16) / 4, dtype=torch.float32)
    tuned = base + sum(
        (100.0 + 50 * j) * torch.outer(spread[:, j], torch.eye(16)[j]) for j in range(planted)
    )
    assert ours(base, tuned) == intruders(base.numpy(), tuned.numpy())
    cosines = weights.closest_cosines(
        weights.left_vectors(tuned)[:, :planted], weights.left_vectors(base)
    )
    assert (cosines < 0.3).all() and ours(base, tuned) >= planted
    assert ours(base, base) == 0


@pytest.mark.parametrize("shape", [(24, 24), (12, 30), (30, 12)])
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
def test_intruders_are_the_authors_count_on_random_changes(
    shape: tuple[int, int], scale: float
) -> None:
    rng = np.random.default_rng(3)
    base = torch.tensor(rng.normal(size=shape), dtype=torch.float32)
    tuned = base + scale * torch.tensor(
        np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1])), dtype=torch.float32
    )
    assert ours(base, tuned) == intruders(base.numpy(), tuned.numpy())


def test_a_direction_outside_the_columns_of_a_tall_matrix_is_one_intruder() -> None:
    base, _ = known(20, 6, [6, 5, 4, 3, 2, 1])
    outside = torch.linalg.svd(base, full_matrices=True).U[:, 10]
    tuned = base + 50 * torch.outer(outside, torch.eye(6)[0])
    assert ours(base, tuned) == intruders(base.numpy(), tuned.numpy()) == 1


@pytest.mark.parametrize("shape", [(24, 24), (12, 30), (30, 12)])
def test_left_vectors_are_numpys(shape: tuple[int, int]) -> None:
    w = torch.tensor(np.random.default_rng(5).normal(size=shape), dtype=torch.float32)
    found, expected = (
        weights.left_vectors(w).numpy(),
        np.linalg.svd(w.numpy(), full_matrices=False)[0],
    )
    assert found.shape == expected.shape == (shape[0], min(shape))
    np.testing.assert_allclose(np.abs((found * expected).sum(0)), 1, atol=1e-4)  # up to their signs


def test_residual_of_a_change_within_and_orthogonal_to_the_top_directions() -> None:
    base, u = known(16, 40, [float(x) for x in range(16, 0, -1)])
    rng = np.random.default_rng(2)
    rows = torch.tensor(rng.normal(size=(16, 40)), dtype=torch.float32)
    change = u[:, 4:] @ rows[4:]
    left = weights.left_vectors(base)
    found = (weights.residual_energies(change, left).sqrt() / change.norm()).numpy()
    assert len(found) == 17 and found[0] == pytest.approx(1, abs=1e-6)
    assert found[4] == pytest.approx(1, abs=1e-5)  # orthogonal to the first four
    assert found[16] < 1e-5  # a matrix of full row rank holds every change
    for k in (6, 10):
        p = left[:, :k].numpy().astype(np.float64)
        plain = np.linalg.norm(change.numpy() - p @ (p.T @ change.numpy())) / np.linalg.norm(
            change.numpy()
        )
        assert found[k] == pytest.approx(plain, rel=1e-4)
    assert (np.diff(found) <= 1e-9).all()


def test_of_a_tall_matrix_input_gains_stay_in_the_column_span_and_output_gains_and_lora_leave_it() -> (
    None
):
    base = torch.tensor(np.random.default_rng(0).normal(size=(30, 8)), dtype=torch.float32)
    left, draw = weights.left_vectors(base), torch.Generator().manual_seed(0)
    inward = base * (1 + 0.1 * torch.randn(8, generator=draw))
    outward = base * (1 + 0.1 * torch.randn(30, 1, generator=draw))
    low_rank = base + 0.1 * torch.randn(30, 2, generator=draw) @ torch.randn(2, 8, generator=draw)
    ends = [
        (weights.residual_energies(t - base, left).sqrt() / (t - base).norm())[-1].item()
        for t in (inward, outward, low_rank)
    ]
    assert ends[0] < 1e-5 and ends[1] > 0.5 and ends[2] > 0.5


@pytest.mark.parametrize("side", ["input", "output"])
def test_gains_are_read_off_the_weights(side: str) -> None:
    base = torch.tensor(np.random.default_rng(0).normal(size=(9, 14)), dtype=torch.float32)
    s = 1 + 0.05 * torch.randn(
        14 if side == "input" else 9, generator=torch.Generator().manual_seed(1)
    )
    found = weights.scaling(base, base * (s if side == "input" else s[:, None]))
    assert found is not None and found.side == side
    torch.testing.assert_close(found.s.float(), s, rtol=0, atol=1e-6)
    rank_one = base + 0.01 * torch.outer(torch.ones(9), torch.ones(14))
    assert weights.scaling(base, rank_one) is None
    assert (
        weights.scaling(base, base + 1e-7 * torch.ones(9, 14)) is None
    )  # a change as small as its own rounding


def test_counts_of_the_histogram() -> None:
    s = torch.tensor(
        [-0.5, 0.0, 0.93, 0.9995, 1.0, 1.0005, 1.001, 1.03, 2.0, 9.0], dtype=torch.float64
    )
    found = diagnose._gains(weights.Scaling("input", s))
    assert (
        found is not None
        and sum(found.counts) == len(s)
        and len(found.counts) == len(diagnosis.EDGES) + 1
    )
    edges = [-np.inf, *diagnosis.EDGES, np.inf]
    assert found.counts == [int(((s >= a) & (s < b)).sum()) for a, b in itertools.pairwise(edges)]
    assert found.drift == pytest.approx((s - 1).abs().mean().item()) and (
        found.least,
        found.largest,
    ) == (-0.5, 9.0)


def test_conv1d_is_its_transpose() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(6, 4)  # 6 outputs, 4 inputs
    linear = torch.nn.Linear(4, 6)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
    assert weights.out_in(conv).shape == (6, 4)
    torch.testing.assert_close(weights.out_in(conv), weights.out_in(linear))
    torch.testing.assert_close(
        weights.out_in(conv, conv.weight * 2), weights.out_in(linear, linear.weight * 2)
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_every_linear_layer_is_found_once_and_a_tied_head_is_an_embedding(family: str) -> None:
    loaded = tiny(family, tie_word_embeddings=family == "llama")
    found = dict(weights.linear_layers(loaded.model))
    matrices = {n for n, p in loaded.model.named_parameters() if p.dim() == 2}
    assert {f"{n}.weight" for n in found} == {
        n for n in matrices if not any(e in n for e in ("embed_tokens", "wte", "wpe", "embed_in"))
    }
    heads = set(found) & {"lm_head", "embed_out"}
    assert len(heads) == (0 if family == "llama" else 1)


# --- KL -------------------------------------------------------------------------------------------


def documents(lengths: list[int]) -> list[Doc]:
    rng = np.random.default_rng(0)
    return [
        Doc(f"{i:016x}", rng.integers(1, 257, n).astype(np.uint32), np.arange(1, n + 1) * 2)
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_divergence_of_tokens_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    draw = torch.Generator().manual_seed(0)
    h, g, w, v = (torch.randn(n, 8, generator=draw) for n in (7, 7, 50, 50))
    monkeypatch.setattr("gain_cl.models.loss.CHUNK_LOGITS", {"cpu": 50 * chunk})
    for softcap in (None, 2.0):
        cap = (lambda x: 2.0 * torch.tanh(x / 2.0)) if softcap else (lambda x: x)
        p, q = (cap(x.double() @ y.double().T).softmax(-1) for x, y in ((g, v), (h, w)))
        found = token_divergence(h, w, None, (g, v, None), softcap)
        torch.testing.assert_close(
            found.double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6
        )
    assert (token_divergence(h, w, None, (h, w, None)) == 0).all()


@pytest.mark.parametrize("batch", [1, 3])
def test_divergence_of_documents_is_that_of_the_models_own_logits(batch: int) -> None:
    base, tuned = tiny("llama"), tiny("llama")
    adapter = GainAdapter(["attn_out", "ffn_down"])
    adapter.attach(tuned)
    for p in adapter.parameters().values():
        p.data = 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    docs = documents([5, 30, 12])
    found = perplexity.divergence(base, tuned, docs, 20, 64, batch=batch)
    assert found.tokens.tolist() == [5, 20, 12] and found.document.tolist() == [d.id for d in docs]
    for row, d in zip(found.itertuples(), docs, strict=True):
        ids = torch.tensor([[base.prefix_id, *d.tokens[:20].tolist()]])[:, :-1]
        with torch.no_grad():
            p, q = (m.model(ids).logits[0].double().log_softmax(-1) for m in (base, tuned))
        assert row.kl_nats == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)
    assert (perplexity.divergence(base, base, docs, 20, 64).kl_nats == 0).all()


# --- the verb -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diagnose")


def run(folder: Path, *words: str) -> record.Run:
    return api.run(
        "debug=smoke",
        "train.lr=3e-2",
        *words,
        f"output_dir={folder}/runs",
        f"results_dir={folder}/results",
    )


def ask(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert diagnose.main([*argv, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def changes(made: record.Run, stage: int) -> dict[str, np.ndarray]:
    """dW of every parameter that changed, by an independent way: the adapter's state, folded in
    here."""
    from gain_cl.tools.reopen import Reopened

    bench = Reopened(made, None)
    plain, tuned = (load.load_model(bench.config.model, torch.device("cpu")) for _ in range(2))
    adapter = bench.attach(tuned)
    adapter.load_state(bench.state(stage))
    adapter.absorb()
    base = dict(plain.model.named_parameters())
    pairs = (
        (n, (p.detach().double() - base[n].detach().double()).numpy())
        for n, p in tuned.model.named_parameters()
    )
    return {n: x for n, x in pairs if np.any(x)}


@pytest.mark.parametrize(
    "method",
    ["gain_ffn", "gain_ffn_output", "lora", "multiplicative_lora", "full", "ia3", "ln_only"],
)
def test_the_verb_on_runs_of_every_kind(
    folder: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    made = run(folder, f"method={method}")
    found = ask(capsys, str(made.path))
    kept = [3] if method == "full" else [1, 2, 3]
    assert [s["index"] for s in found["stages"]] == kept and found["not_kept"] == [
        k for k in (1, 2, 3) if k not in kept
    ]
    expected = changes(made, 3)
    end = found["stages"][-1]
    norms = {f"{x['name']}.weight": x["norm"] for x in end["layers"]} | {
        x["name"]: x["norm"] for x in end["others"]
    }
    assert norms == {n: pytest.approx(np.linalg.norm(x), rel=1e-5) for n, x in expected.items()}
    assert end["total_norm"] == pytest.approx(
        np.sqrt(sum(np.square(x).sum() for x in expected.values())), rel=1e-6
    )
    assert all(
        0 <= x["residual"]["all"] < 1e-5 for x in end["layers"] if x["shape"][0] <= x["shape"][1]
    )
    assert all(x["residual"]["128"] is None for x in end["layers"])  # the model is 64 wide
    assert all(x["own"]["8"] < end["chance"]["8"] for x in end["layers"])
    assert (
        set(end["kl"]) == {*made.record.trained, *made.record.controls}
        and end["kl_new"]["documents"] == 24
    )
    assert all(x["nats"] > 0 for x in end["kl"].values())
    gains = [x["gains"] for x in end["layers"]]
    if method.startswith("gain"):
        side = "output" if method == "gain_ffn_output" else "input"
        assert [g["side"] for g in gains] == [side] * 4
        assert sum(sum(g["counts"]) for g in gains) == made.record.trainable_parameters
        heads = [x for x in end["layers"] if x["heads"]]
        assert [x["role"] for x in heads] == ["self_attn.o_proj"] * 2 and all(
            len(x["heads"]) == 4 for x in heads
        )
    elif method != "ia3":  # which is gains, too
        assert gains == [None] * len(gains)
    else:
        assert all(gains) and len(gains)
    read = diagnosis.load_diagnosis(folder / "results", made.record.run_id)
    assert (
        read is not None
        and read.total_norm == end["total_norm"]
        and read.kl is not None
        and read.model_dump(mode="json") == found
    )
    for kind, head in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (
            (folder / "runs" / made.record.run_id / f"diagnostics.{kind}")
            .read_bytes()
            .startswith(head)
        )


def test_intruders_of_a_run_are_those_that_peft_finds(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT has the authors' definition in its repair of intruder dimensions, whose log counts
    them."""
    peft_lora = pytest.importorskip("peft.tuners.lora.intruders")
    from gain_cl.tools.reopen import Reopened

    made = api.run(
        "debug=smoke",
        "method=lora",
        "train.lr=0.3",
        *[f"{k}_dir={folder}/{v}" for k, v in (("output", "runs"), ("results", "results"))],
    )
    end = ask(capsys, str(made.path), "--stage", "3", "--no-kl")["stages"][-1]
    bench, told = Reopened(made, None), []
    adapter = bench.attach(load.load_model(bench.config.model, torch.device("cpu")))
    adapter.load_state(bench.state(3))
    peft_lora.reduce_intruder_dimension(adapter.peft, logging_sink=told.append)  # type: ignore[attr-defined]
    lines = dict(
        line.removeprefix("base_model.model.").split(": ", 1) for line in told if "ntruders" in line
    )
    theirs = {
        name: int(text.removeprefix("Intruders: ")) if text[-1].isdigit() else 0
        for name, text in lines.items()
    }
    assert {x["name"]: x["intruders"] for x in end["layers"]} == theirs and end["intruders"] > 0


def test_gains_of_the_weights_are_the_runs_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gain_cl.tools.reopen import Reopened

    made = run(folder, "method=gain_ffn")
    found = ask(capsys, str(made.path), "--stage", "2", "--no-kl")
    state = Reopened(made, None).state(2)
    stage = next(s for s in found["stages"] if s["index"] == 2)
    assert {x["name"] for x in stage["layers"]} == set(state)
    for x in stage["layers"]:
        delta = state[x["name"]]
        assert x["gains"]["drift"] == pytest.approx(delta.abs().mean().item(), rel=1e-4)
        assert x["gains"]["largest"] == pytest.approx(1 + delta.max().item(), abs=1e-6)


def test_kl_of_a_run_is_that_of_its_models(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(folder, "method=lora")
    found = ask(capsys, str(made.path))["stages"][0]
    both = [found["kl"][d]["nats"] for d in made.record.trained]
    assert found["kl_new"]["nats"] == pytest.approx(both[0])  # after stage 1 one domain is learned
    assert found["kl_controls"]["nats"] == pytest.approx(
        np.mean([found["kl"][d]["nats"] for d in made.record.controls])
    )
    assert found["kl_new"]["low"] < found["kl_new"]["nats"] < found["kl_new"]["high"]


def test_one_stage_some_layers_and_no_kl_leave_what_was_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(folder, "method=multiplicative_lora", "seed=1")
    whole = ask(capsys, str(made.path))
    part = ask(capsys, str(made.path), "--stage", "2", "--layers", "o_proj", "--no-kl")
    assert [s["index"] for s in part["stages"]] == [1, 2, 3]
    assert (
        part["stages"][0] == whole["stages"][0]
        and part["stages"][1]["kl"] == whole["stages"][1]["kl"]
    )
    assert (
        part["stages"][1]["total_norm"] == whole["stages"][1]["total_norm"]
        and part["stages"][1]["analysed"] == 2
    )
    assert [x["residual"] is None for x in part["stages"][1]["layers"]] == [
        x["role"] != "self_attn.o_proj" for x in part["stages"][1]["layers"]
    ]


def test_the_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    made = run(folder, "method=gain_ffn")
    assert diagnose.main([str(made.path)]) == 0
    shown = capsys.readouterr()
    for word in (
        "outside 8",
        "intruders",
        "KL controls",
        "by chance",
        "diagnostics.png",
    ):
        assert word in shown.out, word


def test_a_bf16_run_is_diagnosed_in_fp32(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gains below bf16's resolution change nothing that the run computes, and are seen in the
    weights."""
    made = api.run(
        "debug=smoke",
        "model.dtype=bfloat16",
        "train.lr=1e-4",
        "domain=[smoke_a]",
        f"output_dir={folder}/runs",
        f"results_dir={folder}/results",
    )
    end = ask(capsys, str(made.path))["stages"][-1]
    assert len(end["layers"]) == 4 and all(0 < x["gains"]["drift"] < 1e-3 for x in end["layers"])
    assert end["kl"]["smoke_a"]["nats"] < 1e-4


def test_checkpoints_trained_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run(folder, "method=lora", "domain=[smoke_a,smoke_b]")
    for stage, to in ((1, "peft"), (2, "merged")):
        assert (
            cli.main(["export", str(made.path), f"stage={stage}", f"to={to}", f"dir={folder}/{to}"])
            == 0
        )
    places = [f"output_dir={folder}/runs", f"results_dir={folder}/results"]
    assert (
        cli.main(
            [
                "score",
                f"{folder}/peft",
                f"{folder}/merged",
                "domain=[smoke_a,smoke_b]",
                "debug=smoke",
                *places,
            ]
        )
        == 0
    )
    (scored,) = (folder / "results/runs").glob("*given*.json")
    own, found = ask(capsys, str(made.path)), ask(capsys, str(scored))
    for a, b in zip(own["stages"], found["stages"], strict=True):
        assert a["total_norm"] == pytest.approx(b["total_norm"], rel=1e-4) and len(
            a["layers"]
        ) == len(b["layers"])
        assert a["kl"]["smoke_b"]["nats"] == pytest.approx(b["kl"]["smoke_b"]["nats"], rel=1e-2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stage", "9"], "stage '9' is not among 1..3"),
        (["--stage", "0"], "stage '0' is not among 1..3"),
        (["--stage", "last"], "stage 'last' is not among 1..3"),
        (["--layers", "lm_head"], "no linear layer's name ends with 'lm_head'"),
    ],
)
def test_mistakes(folder: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")) as error:
        diagnose.main([str(run(folder, "method=gain_ffn").path), *argv])
    assert error.value.exit_code == 64 and "\n" not in str(error.value)


def test_an_unknown_run_and_a_state_that_was_not_kept(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no run 'nothing'"):
        diagnose.main(["nothing", "--results-dir", str(folder / "results")])
    with pytest.raises(DataError, match="was not kept"):
        diagnose.main([str(run(folder, "method=full").path), "--stage", "1"])


def test_a_diagnosis_of_another_record_is_noticed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(folder, "method=gain_attn")
    results, name = folder / "results", made.record.run_id
    assert diagnosis.load_diagnosis(results, name) is None
    ask(capsys, str(made.path), "--no-kl")
    assert diagnosis.load_diagnosis(results, name) is not None
    text = made.path.read_text()
    made.path.write_text(text + " ")
    with pytest.raises(DataError, match="of another record"):
        diagnosis.load_diagnosis(results, name)
    assert (
        ask(capsys, str(made.path), "--stage", "3", "--no-kl")["stages"][0]["index"] == 3
    )  # nothing of it is taken over
    diagnosis.diagnosis_path(results, name).write_text("{}")
    with pytest.raises(DataError, match="no diagnosis: "):
        diagnosis.load_diagnosis(results, name)
    made.path.write_text(text)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gpt_neox", "opt"])
def test_changes_are_measured_in_every_layout(family: str) -> None:
    """The folded change of a Conv1D and of nn.Linear layers, with biases and wide heads: norm,
    gains, column span."""
    for adapter in (
        GainAdapter(["attn_out", "ffn_down"]),
        MultiplicativeLoraAdapter(["attn_out", "ffn_down"], 2, 4),
    ):
        base, tuned = tiny(family), tiny(family)
        adapter.attach(tuned)
        draw = torch.Generator().manual_seed(0)
        for p in adapter.parameters().values():
            p.data = 0.1 * torch.randn(p.shape, generator=draw)
        adapter.absorb()
        before, after = (dict(weights.linear_layers(x.model)) for x in (base, tuned))
        moved = [n for n in before if not torch.equal(before[n].weight, after[n].weight)]
        assert moved == list(families.targets(base.model, ["attn_out", "ffn_down"]))
        for n in moved:
            w, t = weights.out_in(before[n]), weights.out_in(after[n])
            assert w.shape == (families.output_width(before[n]), families.input_width(before[n]))
            energies = weights.residual_energies(t - w, weights.left_vectors(w))
            assert (energies[-1] / energies[0]).sqrt() < 1e-5
            found = weights.scaling(w, t)
            assert (found is not None) == isinstance(adapter, GainAdapter) and (
                found is None or found.side == "input"
            )
