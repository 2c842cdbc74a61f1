"""Reading the inputs of a merge: adapters, and loaders that check every tensor they read.

A plain LoRA adapter (``model+adapter``) is added to the weights as they are read, so that no merged copy is written;
every other kind is merged first, by mergekit.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex, ShardInfo
from mergekit.options import MergeOptions
from safetensors import safe_open
from torch import Tensor

from fusekit import mergekit_private
from fusekit.disk import disk_fault
from fusekit.errors import MergeError
from fusekit.hub import Headers, checkpoint_headers, read_headers, weight_entry
from fusekit.merge_methods.fusion_vectors import is_finite

if TYPE_CHECKING:
    from fusekit.merging.models import Model

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What a plain adapter may say. Anything else that is set (DoRA, patterns, biases, whole modules, ...) is left to peft.
_PLAIN_KEYS = {
    *("r", "lora_alpha", "use_rslora", "fan_in_fan_out", "peft_type", "bias", "init_lora_weights", "rank_pattern"),
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout", "task_type", "peft_version", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying"),
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
    plain = (
        isinstance(config, dict)
        and config.get("peft_type") == "LORA"
        and isinstance(config.get("lora_alpha"), (int, float))
        and config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) in (True, False, "gaussian")
        and not any(value and key not in _PLAIN_KEYS for key, value in config.items())
    )
    if not plain or not (folder / ADAPTER_WEIGHTS).is_file():
        return None
    headers = read_headers(folder / ADAPTER_WEIGHTS, str(folder))
    modules = {name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in headers}
    names = {f"{at}.weight": (f"{_PREFIX}{at}.lora_A.weight", f"{_PREFIX}{at}.lora_B.weight") for at in sorted(modules)}
    transposed = bool(config.get("fan_in_fan_out"))
    if headers.keys() != {each for pair in names.values() for each in pair}:
        return None
    for name, (down, up) in names.items():
        product = (headers[up].shape[0], headers[down].shape[-1])
        if name not in weights or weights[name].shape != (product[::-1] if transposed else product):
            return None
    return Adapter(
        folder / ADAPTER_WEIGHTS, names, float(config["lora_alpha"]), bool(config.get("use_rslora")), transposed
    )


def merge_adapters(models: Iterable[Model], options: MergeOptions) -> bool:
    """Merge every adapter that is not added at reading into its model, by mergekit; returns whether there was any.

    The models are then those in mergekit's adapter cache. mergekit takes any folder there for a finished one, so a
    folder that was begun and not finished is removed.
    """
    with_adapter = [model for model in models if model.merges_adapter]
    for model in with_adapter:
        cache = Path(options.lora_merge_cache)
        before = set(cache.iterdir()) if cache.is_dir() else set()
        try:
            merged = model.pinned.merged(
                cache_dir=str(cache),
                trust_remote_code=options.trust_remote_code,
                lora_merge_dtype=options.lora_merge_dtype,
            )
        except BaseException as error:
            for begun in set(cache.iterdir()) - before if cache.is_dir() else ():
                shutil.rmtree(begun, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            raise disk_fault(error, cache) or MergeError(
                f"the adapter of {model.name} cannot be merged: {' '.join(str(error).split())}"
            ) from error
        folder = model.folder = Path(merged.model.path)
        entry = weight_entry(path.name for path in folder.iterdir())
        if entry is None:
            raise MergeError(f"{folder} was left unfinished by an earlier merge of {model.name}: remove it")
        model.headers = checkpoint_headers(entry, folder, model.name)
    return bool(with_adapter)


class CheckingLoader(LazyTensorLoader):
    """mergekit's loader for one model, which checks every tensor when it is first read: no second pass of the disk.

    on_read: called with the size in bytes of every tensor on its first read.
    """

    def __init__(self, model: Model, lazy_unpickle: bool, on_read: Callable[[int], None]) -> None:
        files: dict[str, list[str]] = {}
        for name, header in model.headers.items():
            files.setdefault(header.file, []).append(name)
        index = ShardedTensorIndex(
            base_path=str(model.folder),
            is_safetensors=all(file.endswith(".safetensors") for file in files),
            tensor_paths={name: header.file for name, header in model.headers.items()},
            shards=[ShardInfo(file, names) for file, names in sorted(files.items())],
        )
        super().__init__(index, lazy_unpickle=lazy_unpickle)
        self.model = model
        self.on_read = on_read
        self.checked: set[str] = set()

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> torch.Tensor | None:
        """As mergekit's, with the checks. Raises MergeError naming tensor, model and file."""
        header = self.model.headers.get(key)
        file = self.model.folder / (header.file if header else "?")
        try:
            tensor: torch.Tensor | None = super().get_tensor(key, device, aliases, raise_on_missing)
        except KeyError:
            raise MergeError(f"{self.model.name} lacks the tensor {key}") from None
        except Exception as error:
            raise MergeError(f"{self.model.name}: the tensor {key} cannot be read from {file}: {error}") from error
        if tensor is not None and self.model.lora is not None:
            tensor = self.model.lora.applied(key, tensor)
        if tensor is None or key in self.checked:
            return tensor
        if header is not None:
            if tuple(tensor.shape) != header.shape:
                raise MergeError(
                    f"{self.model.name}: {key} has shape {list(tensor.shape)}, its header said "
                    f"{list(header.shape)}: did the file change during the merge?"
                )
            self.on_read(header.nbytes)
        if (found := first_not_finite(tensor)) is not None:
            place, value = found
            raise MergeError(
                f"{self.model.name}: the tensor {key} holds {value} at {place} ({file}): the model is broken, merging "
                "it would break the result"
            )
        self.checked.add(key)
        return tensor


@contextmanager
def registered(models: Iterable[Model], lazy_unpickle: bool, on_read: Callable[[int], None]) -> Iterator[None]:
    """Register a checking loader for every model with mergekit, and take them out again at the end."""
    loaders = mergekit_private.loaders()
    ours = {model.pinned: CheckingLoader(model, lazy_unpickle, on_read) for model in models if model.weights}
    loaders.update(ours)
    try:
        yield
    finally:
        for key in ours:
            if key in loaders:
                loaders.pop(key).flush()


def first_not_finite(tensor: torch.Tensor) -> tuple[list[int], float] | None:
    """Index and value of the first NaN or infinity in a tensor of any dtype and device, or None."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    if tensor.element_size() == 1:  # float8 has no reductions
        tensor = tensor.float()
    if is_finite(tensor):
        return None
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), 1 << 20):
        bad = torch.nonzero(~torch.isfinite(flat[start : start + (1 << 20)]))
        if bad.numel():
            position = start + int(bad[0])
            index = [int(i) for i in torch.unravel_index(torch.tensor(position), tensor.shape)]
            return index, float(flat[position])
    return None
