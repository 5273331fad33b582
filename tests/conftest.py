"""Tiny models of every family, made on the spot: no download, no GPU, one thread."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

HELPERS = os.pathsep.join(
    [
        *(
            str(p)
            for p in (Path(__file__).parent, *sorted(Path(__file__).parent.iterdir()))
            if p.is_dir()
        ),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
)
"""PYTHONPATH of a process that imports what the tests share."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two threads are slower than one on models this small, and bits depend on the number of
    threads."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


_SMALL: dict[str, Any] = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 257,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "resid_pdrop": 0.1,
    },
    "llama": {"model_type": "llama", **_SMALL},
    "mistral": {"model_type": "mistral", **_SMALL},
    "qwen2": {"model_type": "qwen2", **_SMALL},
    "qwen3": {"model_type": "qwen3", **_SMALL, "head_dim": 8},
    "gemma": {"model_type": "gemma", **_SMALL, "head_dim": 8},
    "gemma2": {"model_type": "gemma2", **_SMALL, "head_dim": 8},
    "gemma3_text": {"model_type": "gemma3_text", **_SMALL, "head_dim": 8},
    "phi3": {"model_type": "phi3", **_SMALL, "pad_token_id": 0},
    "olmo2": {"model_type": "olmo2", **_SMALL},
    "smollm3": {
        "model_type": "smollm3",
        **_SMALL,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        **{k: v for k, v in _SMALL.items() if k != "num_key_value_heads"},
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": 257,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.1,
    },
    "phi": {"model_type": "phi", **_SMALL},
    "cohere": {"model_type": "cohere", **_SMALL},
    "granite": {"model_type": "granite", **_SMALL, "logits_scaling": 8.0},
    "ministral3": {"model_type": "ministral3", **_SMALL},
    "olmo3": {"model_type": "olmo3", **_SMALL},
}


def tiny(family: str, dtype: str = "float32", **keys: Any) -> Any:
    """models.Loaded of a random model of the family, with a byte tokenizer and biases that are not
    zero."""
    import torch

    from gain_cl.config import schema
    from gain_cl.models import load

    attention = (
        "eager" if family == "gemma2" else "sdpa"
    )  # its logit softcap inside attention has no sdpa version
    settings = schema.Model(
        name=f"tiny-{family}", arch={**FAMILIES[family], **keys}, dtype=dtype, attention=attention
    )  # type: ignore[arg-type]
    loaded = load.load_model(settings, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in loaded.model.named_parameters():
            if name.endswith("bias"):  # zero biases would hide a gain that forgets them
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return loaded


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class ListBlocks:
    """A stream of training sequences from an array (for tests that need no corpus)."""

    name, ids = "list", ("only",)

    def __init__(self, tokens: Any, documents: Any = None) -> None:
        import numpy as np

        self.tokens = tokens
        self.documents = np.zeros_like(tokens) if documents is None else documents

    def __getitem__(self, i: int) -> Any:
        import numpy as np

        from gain_cl.domains import Block

        tokens = self.tokens[i % len(self.tokens)]
        return Block(
            tokens, self.documents[i % len(self.tokens)], np.ones(tokens.shape, dtype=bool)
        )
