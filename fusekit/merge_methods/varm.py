"""VaRM: merging by the variation ratio of parameter matrices.

Source: FuseChat v1, arXiv 2402.16107, section 3.3, equation 7.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fusekit.disk import counted
from fusekit.errors import MergeError
from fusekit.merge_methods.fusion_vectors import (
    FusionVectors,
    NonFiniteError,
    Scratch,
    add_in_order,
    add_to_base,
    block_sums,
    check_finite,
    check_weights,
    for_each_chunk,
    shares,
    whole_blocks,
)

Granularity = Literal["matrix", "module", "layer", "model", "element"]
Aggregation = Literal["elements", "matrices"]


@dataclass(frozen=True)
class VaRMMerge:
    """What VaRM made of one parameter matrix.

    tensor: shape and dtype of the inputs. coefficients: W, float64 [K], sums to 1; for `varm_elementwise` their mean
    over the elements that changed.
    """

    tensor: Tensor
    coefficients: np.ndarray


@torch.no_grad()
def varm(
    base: Tensor,
    targets: Sequence[Tensor],
    *,
    coefficients: Sequence[float] | np.ndarray | None = None,
    weights: Sequence[float] | None = None,
) -> VaRMMerge:
    """Merge K fine-tunes into their base by VaRM, one parameter matrix: θ + Σ_j W_j (φ_j - θ). arXiv 2402.16107 eq. 7.

    Args:
        base: θ, any shape; float16, bfloat16, float32 or float64; CPU or CUDA.
        targets: a list of φ_1..φ_K, of the same shape, dtype and device.
        coefficients: W, K shares that sum to 1; None computes W_j = mean(δ_j²) / Σ_j mean(δ_j²) over this matrix.
            For a larger unit (module, layer, model) give the `unit_coefficients` of its matrices.
        weights: K factors w of the contributions: θ + Σ_j w_j W_j δ_j. None is 1 for all, which changes no bit.

    Returns:
        The merged tensor with its coefficients. Arithmetic is float32 (float64 for float64 inputs) with float64 sums;
        where every target equals the base, its bits are kept. Inputs are not modified; the result carries no gradient.

    Raises:
        MergeError: no targets; mixed shapes, dtypes or devices; a wrong number or sum of coefficients; NaN or Inf.

    Example:
        >>> import torch
        >>> from fusekit.merge_methods import varm
        >>> merged = varm(torch.zeros(2), [torch.tensor([3.0, 0.0]), torch.tensor([-1.0, 0.0])])
        >>> merged.coefficients.tolist()
        [0.9, 0.1]
    """
    vectors = FusionVectors.of(base, targets)
    if coefficients is None:
        energies = vectors.energies()
        check_finite(energies)
        ratios = shares(energies)
    else:
        ratios = np.asarray(coefficients, dtype=np.float64)
        if ratios.shape != (len(targets),) or not (ratios >= 0).all() or not abs(ratios.sum() - 1) < 1e-6:
            raise MergeError(
                f"the coefficients are {ratios.tolist()}: give {counted(len(targets), 'share')} of at least 0 that sum "
                "to 1, one for each target"
            )
    factors = ratios * check_weights(weights, len(targets))
    result = vectors.empty_result()

    def update(scratch: Scratch, start: int, stop: int) -> None:
        theta, deltas, _ = vectors.chunk(scratch, start, stop)
        merged = scratch.get("merged", stop - start, vectors.dtype).zero_()
        for delta, factor in zip(deltas, factors, strict=True):
            merged.add_(delta.mul_(float(factor)))
        if coefficients is not None and not math.isfinite(float(merged.sum(dtype=torch.float64))):
            raise NonFiniteError(range(len(factors)))
        result[start:stop].copy_(add_to_base(theta, merged))

    for_each_chunk(update, vectors.numel, vectors.device)
    return VaRMMerge(result.reshape(vectors.shape), ratios)


@torch.no_grad()
def varm_elementwise(base: Tensor, targets: Sequence[Tensor], *, weights: Sequence[float] | None = None) -> VaRMMerge:
    """VaRM with every element a unit of its own: θ + Σ_j w_j δ_j³ / Σ_j δ_j². The ablation of the paper's table 5.

    Inputs, arithmetic and errors as `varm`. Elements that no target changed keep the base's bits. The weights are taken
    on δ; weights on φ (as in the authors' script) vanish for unchanged elements and collapse the model.
    """
    vectors = FusionVectors.of(base, targets)
    factors = check_weights(weights, len(targets))
    check_finite(vectors.energies())
    result = vectors.empty_result()

    def update(scratch: Scratch, start: int, stop: int) -> tuple[np.ndarray, int]:
        theta, deltas, _ = vectors.chunk(scratch, start, stop)
        largest = scratch.get("largest", stop - start, vectors.dtype).zero_()
        for delta in deltas:
            torch.maximum(largest, delta.abs(), out=largest)
        largest.add_(torch.sign(largest).neg_().add_(1))  # zero -> 1
        total = scratch.get("total", stop - start, vectors.dtype).zero_()
        merged = scratch.get("merged", stop - start, vectors.dtype).zero_()
        squares = []
        for delta in deltas:
            squares.append((delta / largest).square_())  # relative to the largest: no under- or overflow
            total.add_(squares[-1])
        changed = int(torch.count_nonzero(total))
        total.add_(torch.sign(total).neg_().add_(1))
        ends = whole_blocks(stop - start)
        sums = np.empty((len(targets), len(ends)))
        for j, (delta, square) in enumerate(zip(deltas, squares, strict=True)):
            sums[j] = block_sums(square.div_(total).double(), ends)
            merged.add_(delta.mul_(square) if factors[j] == 1 else delta.mul_(square).mul_(factors[j]))
        result[start:stop].copy_(add_to_base(theta, merged))
        return sums, changed

    parts = for_each_chunk(update, vectors.numel, vectors.device)
    changed = sum(count for _, count in parts)
    if not changed:
        return VaRMMerge(result.reshape(vectors.shape), np.full(len(targets), 1 / len(targets)))
    return VaRMMerge(result.reshape(vectors.shape), add_in_order([sums for sums, _ in parts]) / changed)


@dataclass(frozen=True)
class MatrixStatistics:
    """Σ δ_j² of one matrix, float64 [K], and its number of elements."""

    energies: np.ndarray
    numel: int


@torch.no_grad()
def matrix_statistics(base: Tensor, targets: Sequence[Tensor]) -> MatrixStatistics:
    """What `unit_coefficients` needs to know of one matrix. Inputs and errors as `varm`."""
    vectors = FusionVectors.of(base, targets)
    energies = vectors.energies()
    check_finite(energies)
    return MatrixStatistics(energies, vectors.numel)


def unit_coefficients(matrices: Sequence[MatrixStatistics], aggregation: Aggregation = "elements") -> np.ndarray:
    """W_j of a unit of several matrices: float64 [K], sums to 1; uniform if nothing changed.

    aggregation: "elements", the mean of δ_j² over all elements of the unit (arXiv 2402.16107 eq. 7); "matrices", the
    sum of the matrices' means, as the authors' code does.
    """
    if aggregation == "elements":
        return shares(np.sum([matrix.energies for matrix in matrices], axis=0))
    if aggregation == "matrices":
        return shares(np.sum([matrix.energies / max(matrix.numel, 1) for matrix in matrices], axis=0))
    raise MergeError(f"aggregation is {aggregation!r}, it must be one of elements, matrices")


# Every architecture that mergekit defines numbers its layers in the tensor names, `<prefix>.<index>.<component>...`.
_LAYER = re.compile(r"^(?P<layer>(?:.*?\.)?\d+)\.(?P<rest>.+)$")
_SUBLAYER = re.compile(r"^(?P<sublayer>[a-z]+\.\d+)\.(?P<rest>.+)$")  # T5: encoder.block.0.layer.1.DenseReluDense.wo
_NORM = re.compile(r"norm\d*$|^ln($|_)|^ln\d+$", re.IGNORECASE)
_INNER_NORM = re.compile(r"\.(?P<norm>LayerNorm)\.")  # BERT: attention.output.LayerNorm closes the block
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MIXER = re.compile(r"^(mixer|mamba|conv|ssm|temporal_block|short_conv|rwkv|time_mix\w*)$", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_forward|DenseReluDense|moe|experts?$|^(linear_)?fc\d+$|^(intermediate|output|channel_mix\w*)$",
    re.IGNORECASE,
)


def unit_of(name: str, granularity: Granularity) -> str:
    """The name of the unit that a tensor belongs to.

    "matrix": the tensor itself. "model": all tensors. "layer": everything under one layer index. "module": within a
    layer its attention, its MLP (or experts), each norm. A tensor outside any layer (embeddings, final norm, head) is a
    unit of its own at both. Raises MergeError where the name does not tell the module.
    """
    if granularity == "model":
        return "model"
    match = _LAYER.match(name)
    if granularity in ("matrix", "element") or match is None:
        return name
    layer, rest = match["layer"], match["rest"]
    if granularity == "layer":
        return layer
    if granularity == "module":
        return f"{layer}.{_module(name, rest)}"
    raise MergeError(f"granularity is {granularity!r}, it must be one of matrix, module, layer, model, element")


def _module(name: str, rest: str) -> str:
    if sublayer := _SUBLAYER.match(rest):
        return f"{sublayer['sublayer']}.{_module(name, sublayer['rest'])}"
    if inner := _INNER_NORM.search(rest):
        return rest[: inner.end() - 1]
    component = rest.split(".", 1)[0]
    if component in ("weight", "bias", "linear", "wte"):
        return "module"  # the layer is one linear map or embedding, as in a Sequential
    if _NORM.search(component) or _ATTENTION.search(component) or _MIXER.search(component):
        return component
    if _MLP.search(component):
        return "mlp"
    raise MergeError(
        f"cannot tell which module tensor {name!r} belongs to: {component!r} names no attention, MLP or norm that is "
        "known; use granularity: matrix or layer (for all tensors, or for this one by a filter)"
    )
