"""Perplexity: every token scored once, equal to lm-eval, independent of batch, order, padding and
training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import ListBlocks, tiny
from gain_cl.adapters.gain import GainAdapter
from gain_cl.config import schema
from gain_cl.domains import Doc
from gain_cl.guards.base import Guard
from gain_cl.measure import perplexity, scoring
from gain_cl.runs import train


def documents(lengths: list[int], seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    return [
        Doc(f"{i:016x}", rng.integers(1, 257, n).astype(np.uint32), np.arange(1, n + 1) * 2)
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("stride", [None, 5, 16])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 40, 64])
def test_every_token_is_scored_exactly_once(length: int, stride: int | None) -> None:
    tokens = np.arange(1, length + 1)
    cuts = perplexity.windows(tokens, 0, 16, stride or 16)
    assert np.concatenate([w.targets for w in cuts]).tolist() == tokens.tolist()
    stream = [0, *tokens]
    for w in cuts:
        assert len(w.inputs) <= 16
        last = w.targets[-1]
        end = stream.index(last)
        assert (
            w.inputs.tolist() == stream[end - len(w.inputs) : end]
        )  # the tokens just before the last target


def test_equals_the_models_own_loss() -> None:
    loaded = tiny("llama")
    doc = documents([30])
    rows = perplexity.score(loaded, doc, None, 64)
    ids = torch.tensor([[loaded.prefix_id, *doc[0].tokens.tolist()]])
    with torch.no_grad():
        mean = loaded.model(ids, labels=ids).loss.item()
    assert rows.nll_nats[0] == pytest.approx(30 * mean, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equals_lm_evals_rolling_log_likelihood(family: str) -> None:
    """Same prefix token, same windows, same number of tokens, on documents below, at and above the
    context."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    loaded = tiny(family)
    texts = ["abc", "the quick brown fox " * 7, "x" * 64, "y z" * 50]
    docs = []
    for i, text in enumerate(texts):
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        docs.append(Doc(str(i), np.array(ids), np.arange(1, len(ids) + 1)))
    context = 48
    ours = perplexity.score(loaded, docs, None, context, batch=3)
    lm = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=1,
        max_length=context,
        prefix_token_id=loaded.prefix_id,
        softmax_dtype="float32",
    )
    requests = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(texts)]
    theirs = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.tokens.tolist() == [len(d.tokens) for d in docs]
    np.testing.assert_allclose(-np.array(theirs), ours.nll_nats, rtol=1e-5)


def test_batch_1_equals_batch_8(family: str) -> None:
    loaded = tiny(family)
    docs = documents([40, 3, 17, 33, 60, 5, 29, 2, 51])
    one, eight = (perplexity.score(loaded, docs, 48, 32, batch=b) for b in (1, 8))
    np.testing.assert_allclose(one.nll_nats, eight.nll_nats, rtol=1e-6)
    assert one.drop(columns="nll_nats").equals(eight.drop(columns="nll_nats"))


def test_documents_do_not_see_each_other() -> None:
    loaded = tiny("llama")
    docs = documents([20, 30, 25])
    before = perplexity.score(loaded, docs, None, 64)
    docs[0] = documents([20], seed=9)[0]
    after = perplexity.score(loaded, docs, None, 64)
    assert before.nll_nats[0] != after.nll_nats[0]
    assert before.nll_nats[1:].tolist() == after.nll_nats[1:].tolist()


def test_window_takes_the_first_tokens_and_their_bytes() -> None:
    rows = perplexity.score(tiny("llama"), documents([50, 10]), 16, 64)
    assert rows.tokens.tolist() == [16, 10] and rows.bytes.tolist() == [32, 20]


def test_ratios_come_from_sums() -> None:
    """Means of means would give another number on documents of unequal length."""
    rows = perplexity.score(tiny("llama"), documents([50, 10]), None, 64)
    total = perplexity.total(rows)
    assert total.loss_nats == pytest.approx(rows.nll_nats.sum() / 60)
    assert total.loss_nats != pytest.approx((rows.nll_nats / rows.tokens).mean(), rel=1e-6)
    assert total.perplexity == pytest.approx(math.exp(total.loss_nats))
    assert total.bits_per_byte == pytest.approx(rows.nll_nats.sum() / math.log(2) / 120)


def test_context_and_stride_change_the_name() -> None:
    names = {
        scoring.protocol(schema.Eval(documents=d, window=w, context=c, stride=s), 0)
        for d, w, c, s in [
            (32, 128, 1024, None),
            (64, 128, 1024, None),
            (32, 64, 1024, None),
            (32, None, 1024, None),
            (32, 128, 512, None),
            (32, 128, 512, 64),
        ]
    }
    assert len(names) == 6


def test_evaluation_does_not_disturb_training() -> None:
    """GPT-2 has dropout: a mode left in eval, or a random number drawn, would change the bits of
    training."""
    ends = []
    for evaluating in (False, True):
        loaded = tiny("gpt2")
        adapter = GainAdapter(["attn_out", "ffn_down"])
        adapter.attach(loaded)
        settings = schema.Train(steps=3, block=16, batch_tokens=32, lr=1e-2)
        blocks = ListBlocks(np.random.default_rng(0).integers(1, 257, (8, 16)))
        optimizer = train.optimizer(adapter, settings)
        for _ in train.stage(
            loaded, adapter, Guard(), blocks, settings, optimizer, index=1, seed=0
        ):
            if evaluating:
                assert loaded.model.training
                perplexity.score(loaded, documents([20, 30]), None, 64)
                assert loaded.model.training
        assert not loaded.model.training
        ends.append(adapter.state())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_evaluation_has_no_dropout() -> None:
    loaded = tiny("gpt2")
    loaded.model.train()
    one, two = (perplexity.score(loaded, documents([30]), None, 64).nll_nats[0] for _ in range(2))
    assert one == two
