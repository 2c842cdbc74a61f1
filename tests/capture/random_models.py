"""Tiny models with random weights, one per architecture, and rows of random tokens to score with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xxhash

from fusekit.types import Part, TokenizedRow

VOCABULARY = 515  # more than the groups of a search for the top k, and no multiple of their size

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# name -> (class of the configuration, what differs from SMALL)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "sliding_window": 8},
    ),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.5}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}


def random_model(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A causal language model of an architecture, with weights large enough that its distributions are not flat."""
    import transformers

    name, own = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**(SMALL | own | changes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.to(dtype).eval()


def row_of(ids: list[int], labels: list[int]) -> TokenizedRow:
    """A row with these tokens; ``labels`` are positions. Its coordinates are those of a text of one byte per token."""
    n = len(ids)
    chosen = np.zeros(n, bool)
    chosen[labels] = True
    ends = np.arange(1, n + 1)
    return TokenizedRow(
        xxhash.xxh3_128_hexdigest(str(ids).encode()),
        np.array(ids, np.int64),
        np.zeros(n, np.int64),
        np.full(n, Part.CONTENT, np.int64),
        ends,
        ends,
        chosen,
    )


def random_rows(lengths: list[int], seed: int = 0, vocabulary: int = VOCABULARY) -> list[TokenizedRow]:
    """Rows of random tokens; about half of the tokens after the first are labels, scattered."""
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = rng.integers(0, vocabulary, length).tolist()
        labels = [i for i in range(1, length) if rng.random() < 0.5] or [length - 1]
        rows.append(row_of(ids, labels))
    return rows
