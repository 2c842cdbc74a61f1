"""WIDEN against plain loops in float64 and against worked examples."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from fusekit.errors import MergeError
from fusekit.merge_methods.widen import widen
from tests import reference
from tests.helpers import refused
from tests.merge_methods.cases import DTYPES, cast, nasty_cases, random_case, tied_case

MATRICES = {name: case for name, case in nasty_cases().items() if case[0].ndim == 2 and case[0].numel()}
MATRICES["columns of zeros"] = (
    torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 1.0, 0.0, 1.0]], dtype=torch.float64),
    [
        torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 2.0, 1.5]], dtype=torch.float64),
        torch.tensor([[0.0, 1.1, 0.0, 2.0], [0.0, 1.0, 0.5, 1.0]], dtype=torch.float64),
    ],
)


def test_a_worked_matrix():
    base, *targets = torch.tensor(
        [
            [[3, 0, 1, 2], [4, 2, 1, 0]],
            [[3, 0.1, 1, 2], [4.4, 2, 1.5, 0.2]],
            [[3.3, 0, 1, 1], [4, 2.4, 1.1, 1]],
        ],
        dtype=torch.float64,
    )
    merged = widen(base, targets)
    expected = [[3.1500, 0.0470, 1.0, 1.0], [4.2876, 2.2876, 1.5660, 1.1378]]
    torch.testing.assert_close(merged.tensor, torch.tensor(expected, dtype=torch.float64), atol=5e-5, rtol=0)
    weights = [[0.7189, 0.4699, 1, 0.6888], [0.5, 0.7189, 0.6604, 1]]
    np.testing.assert_allclose(merged.scores, np.mean(weights, 1), atol=5e-5)


def test_a_worked_vector():
    base, targets = torch.ones(3), [torch.tensor([1.1, 1, 1.02]), torch.tensor([1, 1.3, 1.01])]
    torch.testing.assert_close(widen(base, targets).tensor, torch.tensor([1.1, 1.3, 1.0150]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("ties", ["index", "average"])
@pytest.mark.parametrize("name", MATRICES)
def test_nasty_matrices_equal_the_reference(name, ties):
    for dtype in (torch.float64, torch.bfloat16):
        base, targets = cast(MATRICES[name], dtype)
        merged = widen(base, targets, ties=ties)
        expected, weights = reference.widen(base, targets, 1.0, 1.0, ties)
        assert merged.tensor.dtype == dtype
        torch.testing.assert_close(merged.tensor, torch.tensor(expected, dtype=torch.float64).to(dtype))
        np.testing.assert_allclose(merged.scores, np.mean(weights, axis=1), rtol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("threshold", "score"), [(1.0, 1.0), (0.5, 0.7), (2.5, 1.0)])
def test_random_matrices_equal_the_reference(dtype, threshold, score, monkeypatch):
    monkeypatch.setattr(sys.modules["fusekit.merge_methods.widen"], "_CHUNK_ELEMENTS", 50)  # several pieces
    base, targets = cast(random_case((17, 23), 3, seed=4), dtype)
    merged = widen(base, targets, threshold=threshold, score=score).tensor
    expected, _ = reference.widen(base, targets, threshold, score, "average")
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float64).to(dtype))


def test_the_rows_of_an_embedding_are_its_columns():
    base, targets = random_case((9, 5), 2)
    merged = widen(base, targets, columns_are_rows=True)
    turned = widen(base.T, [target.T for target in targets])
    torch.testing.assert_close(merged.tensor, turned.tensor.T)
    assert not torch.allclose(merged.tensor, widen(base, targets).tensor)


def test_experts_are_merged_one_by_one():
    base, targets = random_case((4, 6, 5), 2)
    merged = widen(base, targets).tensor
    for expert in range(4):
        alone = widen(base[expert], [target[expert] for target in targets]).tensor
        assert torch.equal(merged[expert], alone)


def test_one_model_is_given_back():
    for shape in ((5,), (6, 7), (2, 3, 4)):
        base, targets = random_case(shape, 1)
        torch.testing.assert_close(widen(base, targets).tensor, targets[0])


def test_columns_that_nobody_changed_keep_their_bits_and_share_a_rank():
    base, targets = tied_case((6, 9), 3, seed=2)
    base[0, 0] = -0.0
    for target in targets:
        target[:, :4] = base[:, :4]
    merged = widen(base, targets)
    assert torch.equal(merged.tensor[:, :4].view(torch.int64), base[:, :4].view(torch.int64))


def test_small_changes_are_ranked_beyond_the_precision_of_a_float32_cosine():
    """Column j turns by j times 1e-5: 1 - cos is below 1e-8, which float32 rounds to zero."""
    base = torch.zeros(2, 8, dtype=torch.float32)
    base[0] = 1
    target = base.clone()
    target[1] = torch.arange(8) * 1e-5
    other = base.clone()
    other[1] = torch.arange(8).flip(0) * 1e-5
    merged = widen(base, [target, other]).tensor[1]
    expected = torch.tensor(reference.widen(base, [target, other], 1.0, 1.0, "average")[0][1], dtype=torch.float32)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": 0.0}, ("threshold", "0.0")),
        ({"ties": "first"}, ("first", "average")),
        ({"targets": []}, ("no targets",)),
        ({"targets": [torch.zeros(2, 3, dtype=torch.float64)]}, ("[2, 3]", "[3, 3]")),
        ({"base": torch.zeros(1, 1, 1, 1), "targets": [torch.zeros(1, 1, 1, 1)]}, ("3 dimensions", "(1, 1, 1, 1)")),
    ],
)
def test_bad_inputs_are_named(change, said):
    base, targets = random_case((3, 3), 2)
    with refused(MergeError, *said):
        widen(**{"base": base, "targets": targets} | change)
