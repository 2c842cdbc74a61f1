"""LoRA adapters (``model+adapter``) that are added to the weights as they are read: no merged copy is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fusekit.hub import Headers, read_headers

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What a plain adapter may say. Anything else that is set (DoRA, patterns, biases, whole modules, ...) is left to peft.
_UNDERSTOOD = {"r", "lora_alpha", "use_rslora", "fan_in_fan_out", "peft_type", "bias", "init_lora_weights"}
_NO_MATTER = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout", "task_type", "peft_version", "rank_pattern"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter: W + s B A for some of the weights of its model.

    names: of A and B in ``file``, by the weight's name. alpha, root: s is alpha / rank, or alpha / √rank with root.
    transposed: the weight is kept as [in, out].
    """

    file: Path
    names: Mapping[str, tuple[str, str]]
    alpha: float
    root: bool
    transposed: bool

    def applied(self, name: str, weight: Tensor) -> Tensor:
        """The weight plus s B A, as peft adds it: the product in float32, rounded once to the weight's dtype."""
        if name not in self.names:
            return weight
        with safe_open(self.file, framework="pt", device=str(weight.device)) as file:
            down, up = (file.get_tensor(each).float() for each in self.names[name])
        rank = down.shape[0]
        delta = up @ down
        merged = weight.clone()
        merged += (delta.T if self.transposed else delta) * (self.alpha / (math.sqrt(rank) if self.root else rank))
        return merged


def plain_adapter(folder: Path, weights: Headers) -> Adapter | None:
    """The adapter in a folder, for a model with these weights; None for one that takes more than adding s B A.

    Raises ModelError when the adapter's file is damaged.
    """
    config: Any = None
    with suppress(OSError, ValueError):
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if not (folder / WEIGHTS).is_file() or not _is_plain(config):
        return None
    headers = read_headers(folder / WEIGHTS, str(folder))
    modules = {name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in headers}
    names = {f"{at}.weight": (f"{_PREFIX}{at}.lora_A.weight", f"{_PREFIX}{at}.lora_B.weight") for at in sorted(modules)}
    transposed = bool(config.get("fan_in_fan_out"))
    if headers.keys() != {each for pair in names.values() for each in pair}:
        return None
    for name, (down, up) in names.items():
        product = (headers[up].shape[0], headers[down].shape[-1])
        if name not in weights or weights[name].shape != (product[::-1] if transposed else product):
            return None
    return Adapter(folder / WEIGHTS, names, float(config["lora_alpha"]), bool(config.get("use_rslora")), transposed)


def _is_plain(config: Any) -> bool:
    return (
        isinstance(config, dict)
        and config.get("peft_type") == "LORA"
        and isinstance(config.get("lora_alpha"), (int, float))
        and config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) in (True, False, "gaussian")
        and not any(value and key not in _UNDERSTOOD | _NO_MATTER for key, value in config.items())
    )
