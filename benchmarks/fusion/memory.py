"""Examples kept in memory, since the study reads the same few rows in every epoch of every arm and seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fusekit.distillation.batching import Example
from fusekit.distillation.dataset import FusionDataset

_Settings = tuple[Any, ...]


@contextmanager
def examples_in_memory() -> Iterator[None]:
    """Within it, an example is made once per way to make it, about 11 KB each.

    An example is the same every time (:class:`fusekit.distillation.dataset.FusionDataset`), and depends neither on the
    seed nor on the loss, so this changes the time alone: making them again takes as long as learning from them here.
    """
    made: dict[_Settings, dict[int, Example]] = {}
    make = FusionDataset.__getitem__

    def remembered(self: FusionDataset, index: int) -> Example:
        known = made.setdefault(_settings(self), {})
        if index not in known:
            known[index] = make(self, index)
        return known[index]

    FusionDataset.__getitem__ = remembered  # type: ignore[method-assign]
    try:
        yield
    finally:
        FusionDataset.__getitem__ = make  # type: ignore[method-assign]


def _settings(data: FusionDataset) -> _Settings:
    """All that examples are made from."""
    return (
        _place(data.pivot),
        data.fusion.model_dump_json(),
        *(
            (name, _place(store), of.tokens, of.tail, of.conditioning, of.one_hot, of.collisions, method)
            for name, store in data.sources.items()
            for of in [data.projections[name]]
            for method in [of.vocabulary_map and of.vocabulary_map.method]
        ),
    )


def _place(captures: Any) -> Any:
    """What tells captures apart: a store's folder; captures in memory are told apart as they are."""
    return getattr(captures, "path", id(captures))
