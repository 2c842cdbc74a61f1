"""Random and nasty inputs for merge methods: name -> (base, targets) in float64, to be cast by the tests."""

from __future__ import annotations

import torch
from torch import Tensor

Case = tuple[Tensor, list[Tensor]]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def cast(case: Case, dtype: torch.dtype) -> Case:
    base, targets = case
    return base.to(dtype), [target.to(dtype) for target in targets]


def assert_close(actual: Tensor, expected: Tensor, base: Tensor, targets: list[Tensor]) -> None:
    """Equal up to the rounding of the result, or, in float32, that of a few operations on the fusion vectors."""
    largest = max([0.0, *(float((t - base).abs().max()) for t in targets if t.numel())])
    assert actual.dtype == base.dtype
    assert actual.shape == base.shape
    tolerance = torch.finfo(base.dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=8 * 2**-24 * largest)


def random_case(shape: tuple[int, ...], k: int, *, scale: float = 1e-2, seed: int = 0) -> Case:
    """Fusion vectors of different sizes on a base of ordinary weights."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
    sizes = [scale * (1 + j) for j in range(k)]
    return base, [base + torch.randn(shape, generator=generator, dtype=torch.float64) * size for size in sizes]


def tied_case(shape: tuple[int, ...], k: int, *, seed: int = 0) -> Case:
    """Fusion vectors that are small multiples of 1/64: most variances and many votes are tied."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-8, 9, shape, generator=generator).double() / 8
    return base, [base + torch.randint(-2, 3, shape, generator=generator) / 64 for _ in range(k)]


def nasty_cases() -> dict[str, Case]:
    base, (first, second) = random_case((7, 5), 2)
    grid = (base * 64).round() / 64  # so that the models below cancel out exactly in every dtype
    conflict = grid + 1 / 64
    cases = {
        "no target moved": (base, [base.clone(), base.clone()]),
        "one target did not move": (base, [first, base.clone()]),
        "all targets are equal": (base, [first, first.clone(), first.clone()]),
        "two models in exact conflict": (grid, [conflict, 2 * grid - conflict]),
        "conflict with a third": (base, [first, 2 * base - first, second]),
        "ties": tied_case((6, 9), 5),
        "ties of two": tied_case((6, 9), 2, seed=3),
        "zero base": (torch.zeros(4, 4, dtype=torch.float64), [first[:4, :4] - base[:4, :4], second[:4, :4]]),
        "sparse fusion vectors": (base, [torch.where(first > base + 0.01, first, base), second]),
        "one element": random_case((1,), 3),
        "scalar": random_case((), 2),
        "empty": random_case((0, 4), 2),
        "1-D": random_case((50,), 3),
        "3-D": random_case((3, 4, 5), 3),
        "one big outlier": (base, [base + torch.eye(7, 5, dtype=torch.float64) * 100, second]),
        "strided": (base.T, [first.T, second.T]),
        "strided slices": (base[::2, 1:4], [first[::2, 1:4], second[::2, 1:4]]),
    }
    for exponent in (-6, -3, 0, 3):
        cases[f"scale 1e{exponent}"] = random_case((8, 6), 3, scale=10.0**exponent, seed=exponent + 10)
    return cases
