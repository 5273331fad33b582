"""From tokens to the sum of their losses: what training minimises, and what a guard may look at
besides.

Axes: B sequences of T tokens, N scored tokens among them, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gain_cl.errors import ConfigError
from gain_cl.models import load
from gain_cl.models.loss import sum_cross_entropy, token_nll
from gain_cl.system import watchdog

if TYPE_CHECKING:
    from gain_cl.models.load import Loaded

TokenPenalty = Callable[[dict[str, Any], torch.Tensor, torch.Tensor], torch.Tensor | None]
"""guards.Guard.token_penalty."""


def loss_sum(
    loaded: Loaded,
    tokens_BT: np.ndarray,
    documents_BT: np.ndarray | None = None,
    scored_BT: np.ndarray | None = None,
    token_penalty: TokenPenalty | None = None,
) -> torch.Tensor:
    """Sum of -ln p over the scored tokens (None: all), each sequence starting after the prefix
    token, as in evaluation; its gradient is also that of a guard's token penalty. documents_BT: see
    ``inputs_of``."""
    watchdog.beat()  # a step may be made of many
    inputs = inputs_of(loaded, tokens_BT, documents_BT)
    rows = np.arange(tokens_BT.size) if scored_BT is None else np.flatnonzero(scored_BT)
    rows_N, targets_N = on_device(rows, loaded), on_device(tokens_BT.reshape(-1)[rows], loaded)
    hidden = loaded.hidden(**inputs).flatten(0, 1)
    if len(rows) < len(hidden):
        hidden = hidden[rows_N]
    compiled = loaded.compiled.loss if loaded.compiled is not None else None
    total = sum_cross_entropy(hidden, *loaded.output, targets_N, loaded.softcap, compiled)
    extra = token_penalty(inputs, rows_N, hidden) if token_penalty is not None else None
    return total if extra is None else total + (extra - extra.detach())


def on_device(array: np.ndarray, loaded: Loaded) -> torch.Tensor:
    """Return an array on the model's device. The copy to a GPU waits for nothing: not for the work
    that the GPU still has to do."""
    tensor = torch.from_numpy(array)
    if loaded.device.type != "cuda":
        return tensor.to(loaded.device)
    return tensor.pin_memory().to(loaded.device, non_blocking=True)


def inputs_of(
    loaded: Loaded, tokens_BT: np.ndarray, documents_BT: np.ndarray | None = None
) -> dict[str, Any]:
    """Return what the model's body is called with to predict tokens_BT, each sequence after the
    prefix token.

    documents_BT: a token attends only within its own document, and positions restart there; None:
    to all before it. The mask is one for all layers, or transformers makes that of each layer from
    the positions (loaded.own_masks, see ``prove_masks``).
    """
    inputs_BT = np.concatenate(
        [np.full((len(tokens_BT), 1), loaded.prefix_id), tokens_BT[:, :-1]], axis=1
    )
    inputs: dict[str, Any] = {
        "input_ids": on_device(inputs_BT, loaded),
        "use_cache": False,
    }
    if documents_BT is not None:
        if not loaded.own_masks:
            same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
            seen_BTT = on_device(np.tril(same_BTT), loaded)
            mask_BTT = torch.zeros(seen_BTT.shape, dtype=loaded.model.dtype, device=loaded.device)
            inputs["attention_mask"] = mask_BTT.masked_fill(
                ~seen_BTT, torch.finfo(loaded.model.dtype).min
            )[:, None]
        inputs["position_ids"] = on_device(_positions(documents_BT), loaded)
    return inputs


def _positions(documents_BT: np.ndarray) -> np.ndarray:
    """Return 0, 1, 2, ... from the start of each document's part of a sequence."""
    starts = np.ones_like(documents_BT, dtype=bool)
    starts[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    index = np.broadcast_to(np.arange(documents_BT.shape[1]), documents_BT.shape)
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


def prove_masks(loaded: Loaded, block: int) -> None:
    """Prove on a block of tokens what train.pack=mask says: one document that fills it costs what
    it costs in a stream, and another first document leaves the loss of the second as it was.
    Where one mask for all layers fails (a local window), the layers make their own. ConfigError
    names the family that cannot."""
    half, ids = block // 2, 1 + np.arange(block)[None] % (loaded.vocabulary - 1)
    other = np.concatenate([ids[:, :half][:, ::-1], ids[:, half:]], axis=1)
    other[:, half - 1] = ids[:, half - 1]  # what the second begins after
    one, two = np.zeros_like(ids), (np.arange(block)[None] >= half).astype(int)

    def nll_T(tokens: np.ndarray, documents: np.ndarray | None) -> torch.Tensor:
        hidden = loaded.hidden(**inputs_of(loaded, tokens, documents))[0]
        targets = torch.from_numpy(tokens[0]).to(loaded.device)
        return token_nll(hidden, *loaded.output, targets, loaded.softcap)

    most, cause = 1e-4 if loaded.model.dtype == torch.float32 else 2e-2, None
    for loaded.own_masks in (False, True):
        with torch.no_grad(), load.eval_mode(loaded.model):
            try:
                parts = [nll_T(ids, one) - nll_T(ids, None), nll_T(ids, two) - nll_T(other, two)]
                if all(part.abs().mean() < most for part in (parts[0], parts[1][half:])):
                    return
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                if "out of memory" in str(error).lower():
                    raise
                cause = error
    what = f"{loaded.model.config.model_type} does not keep packed documents apart"
    raise ConfigError(what, "train.pack=mask", "use train.pack=stream") from cause
