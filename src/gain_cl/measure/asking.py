"""Ask a live model what lm-eval asks: its HFLM, whose texts, tokens and generation are kept, with
log-likelihoods computed by less.

The context of several choices is forwarded once, its keys and values are kept and each choice is
forwarded after them. Logits exist only where a choice is scored, their softmax is in fp32. Batches
have a fixed order and hold the same rows whatever the order of the items.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from gain_cl.errors import DataError
from gain_cl.models.loss import token_answers

if TYPE_CHECKING:
    from torch import Tensor

    from gain_cl.models.load import Loaded

Answer = tuple[float, bool]
"""log p(choice | context) in nats, and True if the choice is what greedy decoding would say."""


class Row(NamedTuple):
    """One row of a forward pass. shared: tokens that it has in common with others, forwarded once
    before. inputs: the tokens after them. choices: of each request that it answers index and
    tokens; they are predicted by the last inputs."""

    shared: tuple[int, ...]
    inputs: tuple[int, ...]
    choices: list[tuple[int, np.ndarray]]


class Asking(HFLM):  # type: ignore[misc]
    """lm-eval's model class over a model that is there. pairs: texts of a request -> its tokens,
    kept by the caller. tell: called after each batch with the number of requests answered in it.
    truncated: texts that were cut on the left to fit the context."""

    def __init__(
        self,
        loaded: Loaded,
        tokenizer: Any,
        batch_size: int,
        pairs: dict[tuple[str, str], list[np.ndarray]],
        tell: Callable[[int], None] = lambda answered: None,
    ) -> None:
        super().__init__(
            pretrained=loaded.model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=loaded.context,
            prefix_token_id=loaded.prefix_id,  # the context where a task gives none
        )
        self.loaded, self.pairs, self.tell = loaded, pairs, tell
        self.truncated: set[str] = set()
        self.shares: bool | None = None  # contexts with this model: not tried yet

    def ask(self, requests: list[Any]) -> None:
        """Put the answer of each request into its resps."""
        for kind in dict.fromkeys(request.request_type for request in requests):
            part = [request for request in requests if request.request_type == kind]
            for request, answer in zip(part, getattr(self, kind)(part, True), strict=True):
                request.resps = [answer]

    # --- generation -------------------------------------------------------------------------------

    def tok_batch_encode(
        self, strings: list[str], left_truncate_len: int | None = None, **keys: Any
    ) -> tuple[Tensor, Tensor]:
        ids, mask = super().tok_batch_encode(strings, **keys)
        if left_truncate_len:
            long = mask.sum(1) > left_truncate_len
            self.truncated |= {text for text, cut in zip(strings, long, strict=True) if cut}
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_generate(self, context: Tensor, *more: Any, **keys: Any) -> Tensor:
        made: Tensor = super()._model_generate(context, *more, **keys)
        self.tell(len(context))
        return made

    # --- log-likelihoods --------------------------------------------------------------------------

    def _encode_pair(self, context: str, continuation: str) -> list[np.ndarray]:
        key = context, continuation
        if key not in self.pairs:
            self.pairs[key] = [np.array(p, np.int32) for p in super()._encode_pair(*key)]
        return self.pairs[key]

    def _loglikelihood_tokens(self, requests: Any, *_: Any, **more: Any) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for batch in _batches(self._questions(requests), self.batch_size):
            answers |= self._answers(batch)
            self.tell(sum(len(row.choices) for row in batch))
        return [answers[i] for i in range(len(requests))]

    def _questions(self, requests: Any) -> list[list[Row]]:
        """Return what is to be forwarded, the rows that share a context together. Choices of one
        token after the same context need one row."""
        asked: dict[tuple[int, ...], dict[tuple[int, ...], list[tuple[int, np.ndarray]]]] = {}
        for i, (pair, context, choice) in enumerate(requests):
            if len(choice) > self.max_length:
                what = f"a choice of {len(choice)} tokens exceeds the model's context of "
                do = "leave this task out"
                raise DataError(f"{what}{self.max_length}", repr(pair[1][:60]), do)
            tokens = [*map(int, context), *map(int, choice)]
            if len(tokens) - 1 > self.max_length:
                self.truncated.add("".join(pair))
            inputs = tokens[:-1][-self.max_length :]
            split = len(inputs) - len(choice)  # the input behind it predicts the first token
            own = asked.setdefault(tuple(inputs[:split]), {}).setdefault(tuple(inputs[split:]), [])
            own.append((i, np.array(choice, np.int64)))
        rows = ([Row(shared, *part) for part in of.items()] for shared, of in asked.items())
        return [part for of in rows for part in ([of] if len(of) > 1 else [[_whole(of[0])]])]

    def _answers(self, batch: list[Row]) -> dict[int, Answer]:
        """Return the answers of a batch. A model whose cache does not give what the whole text
        gives, but for rounding, is asked with the whole text from then on."""
        whole = [_whole(row) for row in batch]
        if self.shares is None and batch[0].shared:
            self.shares, expected = False, self._forward(whole)
            error = 1e-4 if self.loaded.output[0].dtype == torch.float32 else 0.02
            with contextlib.suppress(Exception):  # of another kind of cache
                found = self._forward(batch)
                pairs = [(found[i][0], e) for i, (e, _) in expected.items()]
                self.shares = all(abs(mine - e) <= error * (1 - e) for mine, e in pairs)
        return self._forward(batch if self.shares else whole)

    def _forward(self, batch: list[Row]) -> dict[int, Answer]:
        """Return the answers by one forward pass after that of what the rows share."""
        own = list(dict.fromkeys(row.shared for row in batch))
        keys: dict[str, Any] = {"use_cache": False}
        if own != [()]:
            cache = self.loaded.body(input_ids=self._ids(own), use_cache=True).past_key_values
            places = [own.index(row.shared) for row in batch]
            cache.reorder_cache(torch.tensor(places, device=self.loaded.device))
            keys = {"use_cache": True, "past_key_values": cache}
        hidden_BTD = self.loaded.hidden(input_ids=self._ids([r.inputs for r in batch]), **keys)
        asked = [
            (i, choice, hidden_TD[: len(row.inputs)][-len(choice) :])
            for hidden_TD, row in zip(hidden_BTD, batch, strict=True)
            for i, choice in row.choices
        ]
        order, choices, hidden = zip(*asked, strict=True)
        targets_N = torch.from_numpy(np.concatenate(choices)).to(self.loaded.device)
        output, softcap = self.loaded.output, self.loaded.softcap
        told = token_answers(torch.cat(hidden), *output, targets_N, softcap)
        logp_N, best_N = (part.cpu().numpy() for part in told)
        starts = np.cumsum([0, *map(len, choices)])[:-1]
        sums = np.add.reduceat(logp_N.astype(np.float64), starts).tolist()
        right = np.logical_and.reduceat(best_N, starts).tolist()
        return dict(zip(order, zip(sums, right, strict=True), strict=True))

    def _ids(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Return (B, T) tokens, padded on the right: causal attention never sees it."""
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for to, row in zip(ids, rows, strict=True):
            to[: len(row)] = row
        return torch.from_numpy(ids).to(self.loaded.device)


def _whole(row: Row) -> Row:
    """Return a row that shares nothing."""
    return Row((), row.shared + row.inputs, row.choices)


def _batches(questions: list[list[Row]], size: int) -> Iterator[list[Row]]:
    """Yield rows by length, longest first, ties by token. The rows of a question are together, and
    those of a batch share as many tokens each."""

    def place(rows: list[Row]) -> tuple[Any, ...]:
        return -len(rows[0].shared), -max(len(row.inputs) for row in rows), *rows[0][:2]

    batch: list[Row] = []
    for rows in sorted(questions, key=place):
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            other = batch and len(part[0].shared) != len(batch[0].shared)
            if other or len(batch) + len(part) > size:
                yield batch
                batch = []
            batch = batch + part
    if batch:
        yield batch
