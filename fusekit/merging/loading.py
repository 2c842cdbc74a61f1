"""Reading the inputs of a merge: adapters, which are merged first, and loaders that check every tensor they read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex, ShardInfo
from mergekit.options import MergeOptions

from fusekit import mergekit_private
from fusekit.artifacts import disk_fault
from fusekit.errors import MergeError
from fusekit.hub import weight_entry
from fusekit.merge_methods.fusion_vectors import is_finite
from fusekit.merging.models import Model, checkpoint_headers


def merge_adapters(models: Iterable[Model], options: MergeOptions) -> bool:
    """Merge every adapter that is not added at reading into its model, by mergekit; returns whether there was any.

    The models are then those in mergekit's adapter cache. mergekit takes any folder there for a finished one, so a
    folder that was begun and not finished is removed. Raises MergeError when an adapter cannot be merged.
    """
    with_adapter = [model for model in models if model.adapter and not model.lora]
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
    """mergekit's loader for one model, refusing tensors that hold NaN or infinity or differ from their header.

    Every tensor is looked at as it is read for the merge: once, in memory, without another pass of the disk.
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
        self.headers = dict(model.headers)
        self.folder = model.folder
        self.on_read = on_read
        self.checked: set[str] = set()

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> torch.Tensor | None:
        """As mergekit's, with the checks. Raises MergeError naming tensor, model and file."""
        header = self.headers.get(key)
        file = self.folder / (header.file if header else "?")
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
    pinned = [model.pinned for model in models if model.weights]
    try:
        for model in models:
            if model.weights:
                loaders[model.pinned] = CheckingLoader(model, lazy_unpickle, on_read)
        yield
    finally:
        for key in pinned:
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
