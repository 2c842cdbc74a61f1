"""Real tokenizers with the special tokens of the chat models that the shipped templates are for."""

from __future__ import annotations

import functools
import pickle
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer

from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from tests.alignment.tokenizers import fast, load, sharing

IM = ["<|im_start|>", "<|im_end|>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>"]


def extended(base: str, tokens: list[Any], *, scheme: str | None = None, **roles: str) -> Any:
    """A tokenizer of tests/alignment with further special tokens. scheme: when Metaspace prepends its dummy space."""
    original = load(base)
    backend = sharing(original.backend_tokenizer)
    if scheme is not None:
        own = pickle.loads(pickle.dumps(backend.pre_tokenizer))  # the original keeps its scheme
        own.prepend_scheme = scheme
        backend.pre_tokenizer = own
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) if isinstance(t, str) else t for t in tokens]
    )
    kept = {k: v for k, v in original.special_tokens_map.items() if isinstance(v, str)}
    return fast(backend, f"{base} with {len(tokens)} tokens", **{**kept, **roles})


def _phi() -> Any:
    swallowing = [
        AddedToken(t, rstrip=True, normalized=False, special=True)
        for t in ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    ]
    return extended("mistral", ["<|endoftext|>", *swallowing], scheme="always", eos_token="<|endoftext|>")


@functools.cache
def _mistral() -> Any:
    return extended("mistral", [], scheme="always")


MODELS = {
    "chatml": lambda: load("qwen"),
    "gemma": lambda: extended(
        "mistral", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], bos_token="<bos>", eos_token="<eos>"
    ),
    "internlm2": lambda: extended("mistral", [*IM, "<|action_start|>"], scheme="always"),
    "llama-3": lambda: extended("llama3", HEADERS),
    "llama-3.1": lambda: extended("llama3", [*HEADERS, "<|eom_id|>", "<|python_tag|>"]),
    "mistral": _mistral,
    "openchat-3.5": lambda: extended(
        "mistral", ["<|end_of_turn|>", "<|pad_0|>"], scheme="always", eos_token="<|end_of_turn|>"
    ),
    "phi-3": _phi,
    "qwen": lambda: load("qwen"),
    "solar": _mistral,
    "vicuna": _mistral,
    "yi": lambda: extended("mistral", ["<|startoftext|>", *IM], eos_token="<|im_end|>"),
}


@functools.cache
def tokenizer_for(name: str) -> Any:
    """The tokenizer for a shipped template."""
    return MODELS[name]()


@functools.cache
def model(name: str, train_on: str = "assistant") -> RowTokenizer:
    """A shipped template with its tokenizer; ``demo`` for the pivot of the demo, under its own template."""
    if name == "demo":
        return RowTokenizer(AutoTokenizer.from_pretrained("demo/models/pivot"), train_on=train_on)
    return RowTokenizer(tokenizer_for(name), ChatTemplate.named(name), train_on)
