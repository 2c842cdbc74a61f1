"""Errors by what they name; tiny real checkpoints: a Llama written in milliseconds, with a tokenizer that loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusekit.artifacts import MANIFEST, own_hash

VOCABULARY_ROWS = 64
"""Rows of the embedding of a tiny model; its tokenizer uses fewer."""


@contextmanager
def refused(kind: type[Exception], *named: object) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """An error of this type is raised, and its message has each of these in it, in any order."""
    with pytest.raises(kind) as error:
        yield error
    assert [name for name in named if str(name) not in str(error.value)] == [], str(error.value)


def tiny_config(*, tie: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A LlamaConfig with hidden size 16 and 2 layers; ``changes`` override its fields."""
    from transformers import LlamaConfig

    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY_ROWS,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tie,
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": dtype,
    }
    return LlamaConfig(**(fields | changes))


def save_tiny_tokenizer(path: Path) -> None:
    """A byte-free word-level tokenizer with <unk>, <s>, </s> and 29 words, saved the way transformers saves one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(chr(ord("a") + i) for i in range(26)), "one", "two", "three"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(path)


def llama_tensors(config: Any, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights of a Llama of this configuration, under the names of its checkpoint, from ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    hidden, wide = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (queries, hidden),
            layer + "self_attn.k_proj.weight": (keys, hidden),
            layer + "self_attn.v_proj.weight": (keys, hidden),
            layer + "self_attn.o_proj.weight": (hidden, queries),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "mlp.gate_proj.weight": (wide, hidden),
            layer + "mlp.up_proj.weight": (wide, hidden),
            layer + "mlp.down_proj.weight": (hidden, wide),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes.items()}


def tiny_llama(
    path: Path | str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    tie: bool = False,
    perturb_of: Path | str | None = None,
    scale: float = 1e-2,
    tokenizer: bool = True,
    **config: Any,
) -> Path:
    """Write a tiny Llama with its tokenizer to ``path`` and return it.

    perturb_of: a model written by this function; the new one is its weights plus ``scale`` times unit Gaussian noise,
    a "fine-tune" of it. Without it the weights are random. config: fields of LlamaConfig to change.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    settings = tiny_config(tie=tie, dtype=dtype, **config)
    if perturb_of is None:
        tensors = llama_tensors(settings, seed, dtype)
    else:
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: (t.float() + scale * torch.randn(t.shape, generator=generator)).to(dtype)
            for name, t in sorted(load_file(Path(perturb_of) / "model.safetensors").items())
        }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    settings.save_pretrained(path)
    if tokenizer:
        save_tiny_tokenizer(path)
    return path


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weights of a model in place: ``change`` gets the dict of its tensors and edits it."""
    file = Path(path) / "model.safetensors"
    # Clones: load_file may hand out views of the mapped file that is about to be replaced.
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(path: Path, **changes: Any) -> None:
    """Change fields of a model's config.json in place; None removes one."""
    file = Path(path) / "config.json"
    content = json.loads(file.read_text()) | changes
    removed = {key for key, value in changes.items() if value is None}
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in removed}))


def family(root: Path, targets: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Path, list[Path]]:
    """A base model and ``targets`` fine-tunes of it under ``root``: (base, [target, ...])."""
    base = tiny_llama(root / "base", seed=0, dtype=dtype, **options)
    return base, [
        tiny_llama(root / f"target{i}", seed=i, dtype=dtype, perturb_of=base, **options) for i in range(1, targets + 1)
    ]


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and its hash, as if it had been written so."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["xxh3"]
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"xxh3": own_hash(manifest)}))


def merge_recipe(
    base: Path | str | None, models: Iterable[Path | str], /, method: str = "fusechat_sce", **keys: Any
) -> dict[str, Any]:
    """A mergekit recipe in float32, with more keys or others; a key that is None is left out."""
    content = {"merge_method": method, "base_model": None if base is None else str(base)}
    content |= {"models": [{"model": str(model)} for model in models], "dtype": "float32"} | keys
    return {key: value for key, value in content.items() if value is not None}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model, from one file or several."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and values to the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
