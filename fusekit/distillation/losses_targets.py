"""What a fused row of targets is to a loss: a few probabilities by id, the rest as one number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fusekit.alignment.projection import NO_ID
from fusekit.errors import DistillationError


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
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    taught: Tensor
    temperature: float = 1.0

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.ids, self.logprobs, self.tail, self.taught

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """The same on another device."""
        ids, logprobs, tail, taught = (t.to(device, non_blocking=non_blocking) for t in self._tensors)
        return SparseTargets(ids, logprobs, tail, taught, self.temperature)

    def pin_memory(self) -> SparseTargets:
        """The same in page-locked memory; what a ``DataLoader`` with ``pin_memory`` calls."""
        ids, logprobs, tail, taught = (t.pin_memory() for t in self._tensors)
        return SparseTargets(ids, logprobs, tail, taught, self.temperature)

    def select(self, rows: Tensor) -> SparseTargets:
        """Some of the rows. rows: int64 or bool index."""
        ids, logprobs, tail, taught = (t[rows] for t in self._tensors)
        return SparseTargets(ids, logprobs, tail, taught, self.temperature)


def check_targets(
    targets: SparseTargets, labels: int, vocabulary: int | None, temperature: float, *, without_ids: bool = False
) -> None:
    """Refuse targets that a loss cannot mean anything with.

    Args:
        targets: what to check.
        labels: n, how many labels they are for.
        vocabulary: ids are below it; None for ids of another model's vocabulary.
        temperature: of the loss.
        without_ids: whether the loss compares entries without an id.

    Raises:
        DistillationError: shapes or dtypes that do not fit, another temperature, ids outside the vocabulary or twice
            in a row, values that are no probabilities.
    """
    ids, logprobs, tail, taught = targets.ids, targets.logprobs, targets.tail, targets.taught
    if ids.ndim != 2 or logprobs.shape != ids.shape or tail.shape != ids.shape[:1] or taught.shape != ids.shape[:1]:
        raise DistillationError(
            "targets need ids [n, k], logprobs [n, k], tail [n] and taught [n], not "
            f"{tuple(ids.shape)}, {tuple(logprobs.shape)}, {tuple(tail.shape)} and {tuple(taught.shape)}"
        )
    if len(ids) != labels:
        raise DistillationError(f"{len(ids)} rows of targets for {labels} labels: there is one row for every label")
    if ids.dtype != torch.int64 or taught.dtype != torch.bool:
        raise DistillationError(f"ids are {ids.dtype} and taught is {taught.dtype}: they must be int64 and bool")
    if not math.isclose(targets.temperature, temperature, rel_tol=1e-6):
        raise DistillationError(
            f"the targets were captured at temperature {targets.temperature:g} and the loss is asked for at "
            f"{temperature:g}: a top-k row cannot be carried to another temperature; capture at {temperature:g}, or "
            f"distil at {targets.temperature:g}"
        )
    _check_values(targets, vocabulary, NO_ID if without_ids else -1)


def _check_values(targets: SparseTargets, vocabulary: int | None, least: int) -> None:
    ids, taught = targets.ids, targets.taught[:, None]
    used = (ids != -1) & taught
    outside = ids < least
    if vocabulary is not None:
        outside = outside | (ids >= vocabulary)
    in_order = torch.where(taught, ids, -1).sort(dim=1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    # Written so that NaN is wrong too.
    wrong = used & ~(targets.logprobs <= 1e-2) | (taught & ~((targets.tail >= 0) & (targets.tail <= 1 + 1e-2))[:, None])
    problems = torch.stack([(outside & taught).any(), twice.any(), wrong.any()]).tolist()  # one wait for the device
    if problems[0]:
        row, entry = (int(x) for x in (outside & taught).nonzero()[0])
        out = "were the targets projected into another vocabulary?"
        if int(ids[row, entry]) == NO_ID:
            out = (
                "that is an entry without an id, which only the loss gold compares; other losses need a vocabulary map"
            )
        raise DistillationError(
            f"row {row} of the targets lists token id {int(ids[row, entry])}, the logits have {vocabulary} columns: "
            f"{out}"
        )
    if problems[1]:
        row, entry = (int(x) for x in twice.nonzero()[0])
        raise DistillationError(
            f"row {row} of the targets lists token id {int(in_order[row, entry])} twice: add up its probabilities "
            "(fusekit.alignment.projection.merge_entries)"
        )
    if problems[2]:
        row = int(wrong.any(dim=1).nonzero()[0])
        raise DistillationError(
            f"row {row} of the targets is no distribution: logprobs {targets.logprobs[row].tolist()}, tail "
            f"{float(targets.tail[row]):g}; logprobs are natural logarithms, tail is a probability"
        )
