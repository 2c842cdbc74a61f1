"""What a student's labels are taught: the top of a distribution each, with what it leaves out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusekit.alignment.rows import MASS_TOLERANCE, NO_ID
from fusekit.errors import DistillationError


@dataclass(frozen=True, eq=False)
class Members:
    """Which of the student's tokens stand for each id of the targets: a sparse matrix [U, V], row after row.

    Attributes:
        starts: int64 [U + 1], where the tokens of each id begin.
        tokens: int64 [m], below V.
        shares: float32 [m], which part of a token's probability counts; None for all of it, where no token is listed
            twice.
    """

    starts: Tensor
    tokens: Tensor
    shares: Tensor | None = None

    def to(self, device: torch.device | str) -> Members:
        """The same on another device."""
        shares = None if self.shares is None else self.shares.to(device)
        return Members(self.starts.to(device), self.tokens.to(device), shares)

    def of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of many ids. ids: int64 [e], -1 for none. Returns entry numbers and places in ``tokens``."""
        known = ids.clamp(min=0)
        first = self.starts[known]
        size = torch.where(ids >= 0, self.starts[known + 1] - first, 0)
        entry = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), size)
        before = torch.cumsum(size, 0) - size
        return entry, first[entry] + torch.arange(len(entry), device=ids.device) - before[entry]


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Top-k target distributions of n labels, k entries at most.

    Attributes:
        ids: int64 [n, k], distinct within a row; -1 for no entry, ``NO_ID`` (-2), any number of times, for an entry
            of a token that the student does not have, which only the loss ``gold`` compares.
        logprobs: float32 or float64 [n, k], natural logarithms; ignored where there is no entry.
        tail: float32 or float64 [n], the probability of everything that is not listed.
        taught: bool [n], whether the row teaches at all; False gives no loss, whatever the rest of the row says.
        temperature: what the teacher's logits were divided by before these probabilities were taken.
        members: which of the student's tokens stand for an id, for the losses ``grouped_kl`` and ``p_kl``.
        chunks: int64 [n], the number of the stretch of text that a label is in, for the losses ``p_kl`` and ``alm``;
            labels of one stretch follow each other and have the same row. -1 for none.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    taught: Tensor
    temperature: float = 1.0
    members: Members | None = None
    chunks: Tensor | None = None

    def _changed(self, change: Callable[[Tensor], Tensor]) -> SparseTargets:
        chunks = None if self.chunks is None else change(self.chunks)
        ids, logprobs, tail, taught = map(change, (self.ids, self.logprobs, self.tail, self.taught))
        return replace(self, ids=ids, logprobs=logprobs, tail=tail, taught=taught, chunks=chunks)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """The same on another device."""
        moved = self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return moved if self.members is None else replace(moved, members=self.members.to(device))

    def pin_memory(self) -> SparseTargets:
        """The same in page-locked memory; what a ``DataLoader`` with ``pin_memory`` calls."""
        return self._changed(Tensor.pin_memory)

    def select(self, rows: Tensor | slice) -> SparseTargets:
        """Some of the rows. rows: int64 or bool index, or a slice."""
        return self._changed(lambda tensor: tensor[rows])

    def check(self, labels: int, vocabulary: int | None, temperature: float, *, without_ids: bool = False) -> None:
        """Raise DistillationError unless these are targets for a loss over so many labels at a temperature.

        vocabulary: ids are below it; None for ids of another model's vocabulary. without_ids: whether the loss compares
        entries without an id.
        """
        ids, logprobs, tail, taught = self.ids, self.logprobs, self.tail, self.taught
        fits = logprobs.shape == ids.shape == (labels, *ids.shape[1:2]) and tail.shape == taught.shape == (labels,)
        if ids.ndim != 2 or not fits or ids.dtype != torch.int64 or taught.dtype != torch.bool:
            given = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in (ids, logprobs, tail, taught))
            raise DistillationError(
                f"targets of {labels} labels need ids int64 [n, k], logprobs [n, k], tail [n] and taught bool [n], one "
                f"row for every label, not {given}"
            )
        if not math.isclose(self.temperature, temperature, rel_tol=1e-6):
            raise DistillationError(
                f"the targets were captured at temperature {self.temperature:g} and the loss is asked for at "
                f"{temperature:g}: a top-k row cannot be carried to another temperature; capture at {temperature:g}, "
                f"or distil at {self.temperature:g}"
            )
        taught = taught[:, None]
        outside = ids < (NO_ID if without_ids else -1)
        if vocabulary is not None:
            outside |= ids >= vocabulary
        outside &= taught
        in_order = torch.where(taught, ids, -1).sort(dim=1).values
        twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
        # Written so that NaN is wrong too.
        is_share = (tail >= 0) & (tail <= 1 + MASS_TOLERANCE)
        wrong = taught & (((ids != -1) & ~(logprobs <= MASS_TOLERANCE)) | ~is_share[:, None])
        found = torch.stack([outside.any(), twice.any(), wrong.any()]).tolist()  # one wait for the device
        if found[0]:
            row, entry = (int(x) for x in outside.nonzero()[0])
            raise DistillationError(
                f"row {row} of the targets lists token id {int(ids[row, entry])}, but the logits have {vocabulary} "
                f"columns: were the targets projected into another vocabulary? Only the loss gold takes the id {NO_ID}"
            )
        if found[1]:
            row, entry = (int(x) for x in twice.nonzero()[0])
            raise DistillationError(
                f"row {row} of the targets lists token id {int(in_order[row, entry])} twice: add up its probabilities "
                "(fusekit.alignment.rows.merge_entries)"
            )
        if found[2]:
            row = int(wrong.any(dim=1).nonzero()[0])
            raise DistillationError(
                f"row {row} of the targets is not a distribution: logprobs {logprobs[row].tolist()}, tail "
                f"{float(tail[row]):g}; logprobs are natural logarithms, tail is a probability"
            )
