"""The order of the rows of an epoch, the same for every split of a batch over devices, accumulation and processes."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Sampler

IGNORED = -100
"""The label of a position that is not learnt, as everywhere in transformers."""


class EpochSampler(Sampler[int]):
    """A permutation of the rows from the seed and the epoch alone, filled up with blanks.

    accelerate makes the batches of all processes equal by training the first rows of the epoch once more, so the number
    of processes would change what is learnt. Blanks (numbers from ``len(data)`` on) weigh nothing.

    Args:
        data: what has the rows.
        seed: of the order; None for the data's own order.
        multiple: rows per batch times processes; the length is filled up to a multiple of it.
        lengths: of each row, in any unit; the rows of an optimizer step are then taken from the longest to the
            shortest, so that micro-batches have little padding. What a step learns stays the same.
        step: rows of an optimizer step.
    """

    def __init__(
        self,
        data: Sized,
        seed: int | None,
        multiple: int = 1,
        *,
        lengths: npt.NDArray[np.int64] | None = None,
        step: int = 1,
    ) -> None:
        self.size = len(data)
        self.seed = seed
        self.lengths, self.step = lengths, step
        self.length = -(-self.size // multiple) * multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.length)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order[: self.size] = torch.randperm(self.size, generator=generator).numpy()
        if self.lengths is not None and self.step > 1:
            tokens = np.concatenate([self.lengths, np.zeros(self.length - self.size, np.int64)])
            for start in range(0, self.length, self.step):
                block = order[start : start + self.step]
                order[start : start + self.step] = block[np.argsort(-tokens[block], kind="stable")]
        yield from order.tolist()


class WithBlanks(Dataset[Any]):
    """A data set that also has the blanks of :class:`EpochSampler`: one token, no label."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    @property
    def lengths(self) -> npt.NDArray[np.int64] | None:
        """How long each row is, if the data knows."""
        return getattr(self.data, "lengths", None)

    def __getitem__(self, index: int) -> Any:
        if index < len(self.data):
            return self.data[index]
        return {"input_ids": np.zeros(1, np.int64), "labels": np.full(1, IGNORED, np.int64)}
