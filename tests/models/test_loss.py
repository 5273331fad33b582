"""Chunked cross-entropy equals the plain one, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gain_cl.models import loss


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loss, "CHUNK_LOGITS", {"cpu": 7 * 50}
    )  # 7 rows of 50 logits: several chunks, a short last one


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_equals_plain_cross_entropy(bias: bool, softcap: float | None) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(33, 16), torch.randn(50, 16), torch.randn(50)]
    targets = torch.randint(0, 50, (33,))

    def plain(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, w, b if bias else None)
        return F.cross_entropy(
            softcap * torch.tanh(logits / softcap) if softcap else logits, targets, reduction="sum"
        )

    def chunked(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return loss.sum_cross_entropy(h, w, b if bias else None, targets, softcap)

    results = []
    for f in (plain, chunked):
        copies = [x.clone().requires_grad_() for x in leaves]
        value = f(*copies)
        (value * 0.37).backward()
        results.append([value.detach(), *(c.grad for c in copies[: 3 if bias else 2])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=2e-6)
    each = loss.token_nll(leaves[0], leaves[1], leaves[2] if bias else None, targets, softcap)
    assert each.shape == (33,)
    torch.testing.assert_close(each.sum(), results[0][0], rtol=1e-6, atol=1e-6)


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = loss._logits
    monkeypatch.setattr(
        loss, "_logits", lambda h, *rest: sizes.append(len(h)) or original(h, *rest)
    )
    loss.sum_cross_entropy(
        torch.randn(33, 16, requires_grad=True),
        torch.randn(50, 16),
        None,
        torch.zeros(33, dtype=torch.long),
    ).backward()
    assert sizes == [7, 7, 7, 7, 5]


def test_softmax_is_fp32_for_bf16_inputs() -> None:
    torch.manual_seed(0)
    h, w, t = (
        torch.randn(20, 16).bfloat16(),
        torch.randn(50, 16).bfloat16(),
        torch.randint(0, 50, (20,)),
    )
    expected = F.cross_entropy((h @ w.T).float(), t, reduction="none")
    torch.testing.assert_close(loss.token_nll(h, w, None, t), expected, rtol=1e-6, atol=1e-6)


def test_frozen_head_gets_no_gradient() -> None:
    w = torch.randn(50, 16)
    h = torch.randn(9, 16, requires_grad=True)
    loss.sum_cross_entropy(h, w, None, torch.zeros(9, dtype=torch.long)).backward()
    assert h.grad is not None and w.grad is None


def test_total_is_summed_in_float64() -> None:
    """An fp32 counter of 2^24 + 1 does not move."""
    h = torch.zeros(3, 1, requires_grad=True)
    w = torch.zeros(50, 1)
    assert loss.sum_cross_entropy(
        h, w, None, torch.zeros(3, dtype=torch.long)
    ).item() == pytest.approx(3 * torch.log(torch.tensor(50.0)).item())
