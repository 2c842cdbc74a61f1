"""Fusion vectors δ_j = φ_j - θ, read chunk by chunk and never all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusekit.errors import MergeError
from fusekit.merge_methods.chunks import (
    Scratch,
    add_in_order,
    block_sums,
    compute_dtype,
    for_each_chunk,
    whole_blocks,
)
from fusekit.merge_methods.selection import Selection


@dataclass(frozen=True)
class Chunk:
    """Some elements of base and fusion vectors, in buffers that the next chunk reuses.

    base: [n] of the compute dtype, None without a base. vectors: K x [n]. vote: Σ_j δ_j, float64 [n], if asked for.
    """

    base: Tensor | None
    vectors: list[Tensor]
    vote: Tensor | None


@dataclass(frozen=True)
class FusionVectors:
    """K fusion vectors of one parameter matrix, as flat views of the models' tensors.

    base: [numel], or None if `targets` are fusion vectors already. targets: K tensors [numel].
    """

    base: Tensor | None
    targets: tuple[Tensor, ...]
    shape: torch.Size

    @classmethod
    def of(cls, base: Tensor | None, targets: Sequence[Tensor]) -> FusionVectors:
        """Check and flatten. Contiguous tensors are borrowed, others are copied. Nothing is ever written to them."""
        tensors = [*targets] if base is None else [base, *targets]
        if not targets:
            raise MergeError("no targets to merge: give at least one tensor besides the base")
        first = tensors[0]
        for index, tensor in enumerate(tensors):
            if not tensor.is_floating_point():
                raise MergeError(f"tensor {index} has dtype {tensor.dtype}: only floating-point tensors can be merged")
            for what in ("shape", "dtype", "device"):
                mine, theirs = getattr(tensor, what), getattr(first, what)
                if mine != theirs:
                    raise MergeError(
                        f"tensor {index} has {what} {_plain(mine)}, tensor 0 has {_plain(theirs)}: bring them to one"
                    )
        flat = [tensor.detach().reshape(-1) for tensor in tensors]
        if base is None:
            return cls(None, tuple(flat), first.shape)
        return cls(flat[0], tuple(flat[1:]), first.shape)

    @property
    def numel(self) -> int:
        return self.targets[0].numel()

    @property
    def device(self) -> torch.device:
        return self.targets[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return compute_dtype(self.targets[0].dtype)

    def chunk(
        self, scratch: Scratch, start: int, stop: int, positions: Tensor | None = None, *, vote: bool = False
    ) -> Chunk:
        """The elements start:stop, or those of them at `positions` (relative to start), in buffers of `scratch`."""

        def load(name: str, source: Tensor) -> Tensor:
            elements = source[start:stop]
            if positions is not None:
                elements = elements.index_select(0, positions)
            return scratch.get(name, elements.numel(), self.dtype).copy_(elements)

        base = None if self.base is None else load("base", self.base)
        vectors = [load(f"vector{j}", target) for j, target in enumerate(self.targets)]
        total = scratch.get("vote", vectors[0].numel(), torch.float64).zero_() if vote else None
        if total is not None and base is not None and self.dtype != torch.float64:
            # Σφ_j - Kθ in float64, before the differences are rounded: exact for these dtypes, so that models that
            # cancel out but for their last digits still vote with those.
            for vector in vectors:
                total.add_(vector)
            total.sub_(base, alpha=len(vectors))
        if base is not None:
            for vector in vectors:
                vector.sub_(base)
        if total is not None and (base is None or self.dtype == torch.float64):
            for vector in vectors:
                total.add_(vector)
        return Chunk(base, vectors, total)

    def energies(self, selection: Selection | None = None, chunk_size: int | None = None) -> np.ndarray:
        """Σ δ_j² over all elements, or over the selected ones: float64 [K].

        Squares are taken in float64: exact for float32 fusion vectors, and free of underflow.
        """

        def sums(scratch: Scratch, start: int, stop: int) -> np.ndarray:
            positions, ends = None, whole_blocks(stop - start)
            if selection is not None:
                positions = selection.indices(start)
                ends = np.searchsorted(positions.cpu().numpy(), ends)
            vectors = self.chunk(scratch, start, stop, positions).vectors
            squares = scratch.get("squares", vectors[0].numel(), torch.float64)
            result = np.empty((len(vectors), len(ends)))
            for j, vector in enumerate(vectors):
                squares.copy_(vector)
                result[j] = block_sums(squares.mul_(squares), ends)
            return result

        if self.numel == 0:
            return np.zeros(len(self.targets))
        return add_in_order(for_each_chunk(sums, self.numel, self.device, chunk_size))

    def empty_result(self) -> Tensor:
        """An uninitialised flat result: [numel] of the inputs' dtype."""
        return torch.empty_like(self.targets[0], memory_format=torch.contiguous_format)


def shares(energies: np.ndarray) -> np.ndarray:
    """energies / Σ energies, uniform only where the sum is exactly zero. float64 [K] -> float64 [K], sums to 1."""
    total = energies.sum()
    return energies / total if total > 0 else np.full(len(energies), 1 / len(energies))


def add_to_base(base: Tensor | None, update: Tensor) -> Tensor:
    """base + update, in place of `update`; where the update is zero, the bits of the base.

    x - (+0) is x for every x, while -0 + (+0) is +0: so the update is subtracted with its sign turned and its zeros
    made positive.
    """
    if base is None:
        return update
    return torch.sub(base, update.neg_().add_(0.0), out=update)


def check_finite(energies: np.ndarray) -> None:
    """Raise MergeError with the positions of the targets whose fusion vectors have NaN or Inf among them."""
    if not np.isfinite(energies).all():
        bad = [j for j, energy in enumerate(energies) if not np.isfinite(energy)]
        raise NonFiniteError(bad)


class NonFiniteError(MergeError):
    """Some fusion vectors contain NaN or Inf. `targets` are their positions among the targets."""

    def __init__(self, targets: Sequence[int]) -> None:
        self.targets = tuple(targets)
        super().__init__(f"the fusion vectors of target(s) {list(targets)} (counted from 0) contain NaN or Inf")


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value
