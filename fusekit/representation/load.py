"""Models and tokenizers from transformers, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fusekit.alignment.arrays import IntArray
from fusekit.errors import CaptureError
from fusekit.representation.checkpoint import Checkpoint
from fusekit.representation.memory import is_out_of_memory


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The model's own tokenizer. Raises CaptureError saying why it does not load."""
    from transformers import AutoTokenizer

    choice = checkpoint.choice
    with _explained(checkpoint, "the tokenizer"):
        return AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=choice.trust_remote_code, local_files_only=True
        )


def load_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The model, its weights on ``device`` or where its ``device_map`` says, ready to be run.

    Raises CaptureError: memory, a package that is missing, weights that do not fit the configuration.
    """
    from transformers import AutoModelForCausalLM

    choice = checkpoint.choice
    device_map: Any = choice.device_map
    if device_map is None and device.type != "cpu":
        device_map = {"": device}  # weights go there straight from the file
    with _explained(checkpoint, "the model"):
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            dtype=choice.dtype if choice.dtype == "auto" else getattr(torch, choice.dtype),
            device_map=device_map,
            quantization_config=_quantization(choice.quantization),
            attn_implementation=choice.attn_implementation,
            trust_remote_code=choice.trust_remote_code,
            use_safetensors=None if choice.allow_pickle else True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise CaptureError(
            f"{choice.model} lacks {len(missing)} tensors, which would be random: {missing[0]}: are its weights of "
            "another model?"
        )
    return model.eval()


def valid_ids(tokenizer: Any) -> IntArray:
    """int64, sorted: the ids that are tokens. A model may have more rows, and a tokenizer may leave holes."""
    return np.unique(np.fromiter(tokenizer.get_vocab().values(), np.int64))


def longest_input(checkpoint: Checkpoint) -> int | None:
    """Tokens that the model's configuration allows for, None where it does not say."""
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, dict) else {}):
        for name in ("max_position_embeddings", "n_positions"):
            if isinstance(config.get(name), int):
                return int(config[name])
    return None


def _quantization(fields: dict[str, Any] | None) -> Any:
    if fields is None:
        return None
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(dict(fields))


@contextmanager
def _explained(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    name = checkpoint.choice.model
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if is_out_of_memory(error):
            hint = "load it smaller (--dtype bfloat16, --quantization) or over several devices (--device-map auto)"
        elif isinstance(error, ImportError):
            hint = "install the package that it names"
        elif "trust_remote_code" in text:
            raise CaptureError(
                f"{what} of {name} wants to run Python code of its own: if you trust its author, allow it for this "
                "model with --trust-remote-code"
            ) from error
        else:
            hint = f"check the files in {checkpoint.folder}"
        raise CaptureError(f"{what} {name} cannot be loaded: {type(error).__name__}: {text}; {hint}") from error
