"""Models and tokenizers from transformers, with errors that say what to do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusekit import artifacts as artifact
from fusekit.capturing.estimate import dequantise_needs
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint
from fusekit.devices import is_out_of_memory, missing_device, refuse_lacking
from fusekit.disk import counted
from fusekit.errors import CaptureError
from fusekit.gguf import GgufHeader, split
from fusekit.types import IntArray
from fusekit.yaml import nearest


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The model's own tokenizer. Raises CaptureError saying why it does not load."""
    from transformers import AutoTokenizer

    choice = checkpoint.choice
    with _explained(checkpoint, "the tokenizer"):
        if (header := checkpoint.gguf) is not None:
            return _gguf_tokenizer(checkpoint.folder, header, choice.model, checkpoint.weights[header.file])
        return AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=choice.trust_remote_code, local_files_only=True
        )


@lru_cache(maxsize=8)
def _gguf_tokenizer(folder: Path, header: GgufHeader, name: str, _size: int) -> Any:
    """The tokenizer in a GGUF file, which takes seconds: half a minute of a large vocabulary."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=header.file, local_files_only=True)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in state["added_tokens"] if token["id"] < header.tokens]
    if len(own) < len(state["added_tokens"]):
        # transformers adds GPT-2's <|endoftext|> to any byte-level BPE: the model has no row for it.
        backend = Tokenizer.from_str(json.dumps(state | {"added_tokens": own}))
        tokenizer = type(tokenizer)(tokenizer_object=backend, **tokenizer.init_kwargs)
    tokenizer.name_or_path = name
    return tokenizer


def load_model(checkpoint: Checkpoint, device: torch.device, kind: Any = None) -> Any:
    """The model, its weights on ``device`` or where its ``device_map`` says, ready to be run.

    A GGUF file is dequantised, on the CPU first; ``auto`` is then float32, but of a file without blocks its own dtype.
    kind: an auto class of transformers; None for a causal language model.

    Raises CaptureError: memory, a package that is missing, weights that do not fit the configuration.
    """
    from transformers import AutoModelForCausalLM

    choice = checkpoint.choice
    device_map: Any = choice.device_map
    if device_map is None and device.type != "cpu":
        device_map = {"": device}  # weights go there straight from the file
    with _explained(checkpoint, "the model"):
        model, report = (kind or AutoModelForCausalLM).from_pretrained(
            checkpoint.folder,
            **_weights_of(checkpoint),
            device_map=device_map,
            attn_implementation=choice.attn_implementation,
            trust_remote_code=choice.trust_remote_code,
            use_safetensors=None if choice.allow_pickle else True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise CaptureError(
            f"{choice.model} lacks {counted(len(missing), 'tensor')}, which would be random: {missing[0]}: are its "
            "weights of another model?"
        )
    return model.eval()


def loading_mistakes(how: Any) -> Iterator[tuple[str, str]]:
    """Fields of a ModelChoice, or of a recipe's ``load``, that transformers or this machine do not know, and why."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known, attention = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()], how.attn_implementation
    if attention is not None and "/" not in attention and attention not in known:  # those with one are kernels' names
        yield "attn_implementation", f"unknown attn_implementation {attention!r}{nearest(attention, known)}"
    for device in how.device_map.values() if isinstance(how.device_map, dict) else [how.device_map]:
        if device not in _DEVICE_MAPS and (says := missing_device(device)):
            yield "device_map", says
    try:
        _quantization(how.quantization)
    except Exception as error:  # transformers', and those of the packages that it asks
        yield "quantization", f"transformers refuses the quantization: {' '.join(str(error).split())}"


_DEVICE_MAPS = (None, "auto", "balanced", "balanced_low_0", "sequential", "disk")


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


def dequantise(
    choice: ModelChoice | str,
    folder: Path | str,
    *,
    overwrite: bool = False,
    ignore_estimates: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Write a GGUF file's weights, dequantised, with its configuration and tokenizer as a plain checkpoint, once.

    It is published in one step. The caller holds the lock of what ``folder`` is in.

    Args:
        choice: the GGUF file and the dtype to store (auto: see :func:`load_model`).
        folder: where it goes; one that is there already, of the same file and dtype, stays.
        overwrite: replace one of another file or dtype.
        ignore_estimates: start although disk or memory do not seem to suffice.
        say: told what is done.

    Raises:
        CaptureError: it is no GGUF file, does not fit, or cannot be loaded.
        StorageError: ``folder`` was made from other inputs (says which), is damaged, or holds other files.
    """
    choice, folder = ModelChoice(choice) if isinstance(choice, str) else choice, Path(folder)
    if split(choice.model) is None:
        raise CaptureError(f"{choice.model} is no GGUF file: there is nothing to dequantise")
    choice = replace(choice, dequantised=None, device_map=None)
    known = artifact.read(folder)
    if known is not None:
        changed = artifact.differences(known.inputs, dequantised_from(choice, known))
        if not overwrite:
            artifact.refuse_changes(folder, changed)
        if not changed:
            artifact.require_whole(folder)
            return
    checkpoint = find_checkpoint(choice)
    for line in [*checkpoint.notices, f"dequantising {choice.model} into {folder}, which is done once"]:
        say(line)
    if not ignore_estimates:
        way_out = "Free some, write elsewhere, or choose the dtype bfloat16; --ignore-estimates starts it all the same"
        refuse_lacking(dequantise_needs(checkpoint, folder), "this model does not fit:", way_out, CaptureError)
    inputs = dequantised_from(choice)
    made: artifact.Inputs = {**artifact.circumstances(), "model": choice.model}
    started = time.monotonic()

    def write(into: Path) -> None:
        load_model(checkpoint, torch.device("cpu")).save_pretrained(into)
        load_tokenizer(checkpoint).save_pretrained(into)
        made["seconds"] = round(time.monotonic() - started, 3)

    artifact.publish(folder, "dequantise", inputs, write, made)


def dequantised_from(choice: ModelChoice, known: artifact.Artifact | None = None) -> artifact.Inputs:
    """What :func:`dequantise` makes a plain checkpoint of. known: one that is there, whose file may be gone by now.

    Raises CaptureError where the file cannot be found, and none is known of that name.
    """
    try:
        found = find_checkpoint(replace(choice, dequantised=None), weights=False).fingerprint()
    except CaptureError:
        if known is None or known.made.get("model") != choice.model:
            raise
        found = str(known.inputs.get("gguf"))
    return {"gguf": found, "dtype": choice.dtype}


def _weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of ``from_pretrained``: file, dtype and quantization of the weights."""
    import transformers

    choice, header = checkpoint.choice, checkpoint.gguf
    if header is None:
        dtype = choice.dtype if choice.dtype == "auto" else getattr(torch, choice.dtype)
        return {"dtype": dtype, "quantization_config": _quantization(choice.quantization)}
    config = transformers.AutoConfig.for_model(**checkpoint.config)  # it would be read again, which takes seconds
    found = {"gguf_file": header.file, "config": config}
    found["dtype"] = getattr(torch, header.dtype if choice.dtype == "auto" else choice.dtype)
    # Versions before 5.23 have no such class, and always dequantise.
    if hasattr(transformers, "GgufConfig"):
        found["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return found


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
            if type(error).__name__ == "SafetensorError":
                checkpoint.headers()  # says which file is cut off, and both sizes
            hint = f"check the files in {checkpoint.folder}"
        raise CaptureError(f"{what} {name} cannot be loaded: {type(error).__name__}: {text}; {hint}") from error
