"""SCE and VaRM as plain dense operations of autograd, for tensors that carry gradients.

mergekit keeps the autograd connections of module parameters that are merged in memory, so its methods do too. Slower
and larger than the chunked forms; the same numbers up to rounding. Selection and signs are piecewise constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusekit.merge_methods.chunks import compute_dtype
from fusekit.merge_methods.sce import Variant, select


def sce(base: Tensor, targets: Sequence[Tensor], *, select_topk: float, variant: Variant) -> Tensor:
    """As `fusekit.merge_methods.sce`, with gradients to base and targets. Returns the merged tensor."""
    deltas = _fusion_vectors(base, targets)
    mask = torch.ones_like(base, dtype=torch.bool) if select_topk == 1 else select(targets, select_topk)
    selected = deltas * mask
    coefficients = _shares(selected).reshape(-1, *[1] * base.ndim)
    merged = deltas if variant == "fuseai" else selected
    kept = torch.where(_vote(base, targets) >= 0, merged > 0, merged < 0)
    update = (coefficients * merged * kept).sum(0)
    if variant != "paper":
        divisor = (coefficients * kept).sum(0)
        update = update / torch.where(divisor == 0, 1, divisor)
    return (base.to(deltas.dtype) + update).to(base.dtype)


def varm(base: Tensor, targets: Sequence[Tensor], elementwise: bool, coefficients: np.ndarray | None) -> Tensor:
    """As `varm` and `varm_elementwise`, with gradients; `coefficients` that are given are constants."""
    deltas = _fusion_vectors(base, targets)
    if elementwise:
        largest = deltas.detach().abs().amax(0)
        squares = (deltas / torch.where(largest == 0, 1, largest)).square()  # relative: no under- or overflow
        total = squares.sum(0)
        weights = squares / torch.where(total == 0, 1, total)
    elif coefficients is not None:
        weights = torch.as_tensor(coefficients, dtype=deltas.dtype, device=base.device).reshape(-1, *[1] * base.ndim)
    else:
        weights = _shares(deltas).reshape(-1, *[1] * base.ndim)
    return (base.to(deltas.dtype) + (weights * deltas).sum(0)).to(base.dtype)


def _fusion_vectors(base: Tensor, targets: Sequence[Tensor]) -> Tensor:
    dtype = compute_dtype(base.dtype)
    return torch.stack([target.to(dtype) - base.to(dtype) for target in targets])


def _vote(base: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Σ_j δ_j as the chunked form has it: before the differences are rounded, where float64 allows it."""
    if base.dtype == torch.float64:
        return torch.stack([(target - base).detach() for target in targets]).sum(0)
    return torch.stack([target.detach().double() for target in targets]).sum(0) - len(targets) * base.detach().double()


def _shares(deltas: Tensor) -> Tensor:
    energies = deltas.double().reshape(len(deltas), -1).square().sum(1)
    total = energies.sum()
    shares = energies / total if total > 0 else torch.full_like(energies, 1 / len(energies))
    return shares.to(deltas.dtype)
