"""Loaders that look at every tensor as it is read for the merge: once, in memory, without another pass of the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex, ShardInfo
from mergekit.io.tasks import LoaderCache

from fusekit.errors import MergeError
from fusekit.hub import Headers
from fusekit.merging.models import Model


class CheckingLoader(LazyTensorLoader):
    """mergekit's loader for one model, refusing tensors that hold NaN or infinity or differ from their header.

    on_read: called with the size in bytes of every tensor on its first read.
    """

    def __init__(
        self, model: Model, folder: Path, headers: Headers, lazy_unpickle: bool, on_read: Callable[[int], None]
    ) -> None:
        super().__init__(_index(folder, headers), lazy_unpickle=lazy_unpickle)
        self.model = model
        self.headers = headers
        self.on_read = on_read
        self.checked: set[str] = set()

    def get_tensor(
        self, key: str, device: str = "cpu", aliases: list[str] | None = None, raise_on_missing: bool = True
    ) -> torch.Tensor | None:
        """As mergekit's, with the checks. Raises MergeError naming tensor, model and file."""
        try:
            tensor: torch.Tensor | None = super().get_tensor(key, device, aliases, raise_on_missing)
        except KeyError:
            raise MergeError(f"{self.model.spelling} lacks the tensor {key}") from None
        except Exception as error:
            file = self.headers[key].file if key in self.headers else "?"
            raise MergeError(
                f"{self.model.spelling}: the tensor {key} cannot be read from {self.index.base_path}/{file}: {error}"
            ) from error
        if tensor is None or key in self.checked:
            return tensor
        header = self.headers.get(key)
        if header is not None:
            if tuple(tensor.shape) != header.shape:
                raise MergeError(
                    f"{self.model.spelling}: {key} has shape {list(tensor.shape)}, its header said "
                    f"{list(header.shape)}: did the file change during the merge?"
                )
            self.on_read(header.nbytes)
        if (found := first_not_finite(tensor)) is not None:
            place, value = found
            raise MergeError(
                f"{self.model.spelling}: the tensor {key} holds {value} at {place} "
                f"({Path(self.index.base_path) / (header.file if header else '?')}): the model is broken, merging it "
                "would break the result"
            )
        self.checked.add(key)
        return tensor


def first_not_finite(tensor: torch.Tensor) -> tuple[list[int], float] | None:
    """Index and value of the first NaN or infinity in a tensor of any dtype and device, or None."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    if tensor.element_size() == 1:  # float8 has no reductions
        tensor = tensor.float()
    # One pass without a mask: NaN and infinities survive a sum. A finite tensor whose sum overflows is looked at twice.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    if torch.isfinite(total):
        return None
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), 1 << 20):
        bad = torch.nonzero(~torch.isfinite(flat[start : start + (1 << 20)]))
        if bad.numel():
            position = start + int(bad[0])
            index = [int(i) for i in torch.unravel_index(torch.tensor(position), tensor.shape)]
            return index, float(flat[position])
    return None


@contextmanager
def registered(models: Iterable[Model], lazy_unpickle: bool, on_read: Callable[[int], None]) -> Iterator[None]:
    """Register a checking loader for every model with mergekit, and take them out again at the end."""
    loaders: dict[Any, Any] = LoaderCache.loaders
    added = []
    try:
        for model in models:
            if model.weights:
                loaders[model.pinned] = CheckingLoader(model, model.folder, model.headers, lazy_unpickle, on_read)
                added.append(model.pinned)
        yield
    finally:
        for pinned in added:
            loaders.pop(pinned).flush()


def _index(folder: Path, headers: Headers) -> Any:
    files: dict[str, list[str]] = {}
    for name, header in headers.items():
        files.setdefault(header.file, []).append(name)
    return ShardedTensorIndex(
        base_path=str(folder),
        is_safetensors=all(file.endswith(".safetensors") for file in files),
        tensor_paths={name: header.file for name, header in headers.items()},
        shards=[ShardInfo(file, names) for file, names in sorted(files.items())],
    )
