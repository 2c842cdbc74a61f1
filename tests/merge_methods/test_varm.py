"""VaRM against the loops of reference.py, for every granularity and aggregation."""

import numpy as np
import pytest
import torch

from fusekit.errors import MergeError
from fusekit.merge_methods import matrix_statistics, unit_coefficients, varm, varm_elementwise
from tests import reference
from tests.helpers import refused
from tests.merge_methods.cases import DTYPES, assert_close, cast, nasty_cases, random_case

NASTY = nasty_cases()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_random_tensors_equal_the_reference(k, dtype):
    base, targets = cast(random_case((23, 17), k, seed=k), dtype)
    merged = varm(base, targets)
    assert_close(merged.tensor, reference.varm(base, targets), base, targets)
    np.testing.assert_allclose(
        merged.coefficients, reference.coefficients(reference.fusion_vectors(base, targets)), rtol=1e-5
    )
    assert_close(varm_elementwise(base, targets).tensor, reference.varm_element(base, targets), base, targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [(1.0, 0.3, 2.0), (1.0, 0.0, -0.5)], ids=str)
def test_weights_equal_the_reference_and_those_of_one_change_no_bit(weights, dtype):
    base, targets = cast(random_case((23, 17), 3), dtype)
    ratios = reference.coefficients(reference.fusion_vectors(base, targets))
    merged = varm(base, targets, weights=weights)
    expected = reference.varm(base, targets, [w * r for w, r in zip(weights, ratios, strict=True)])
    assert_close(merged.tensor, expected, base, targets)
    np.testing.assert_allclose(merged.coefficients, ratios, rtol=1e-5)
    elements = varm_elementwise(base, targets, weights=weights).tensor
    assert_close(elements, reference.varm_element(base, targets, weights), base, targets)
    for method in (varm, varm_elementwise):
        assert torch.equal(method(base, targets, weights=[1, 1, 1]).tensor, method(base, targets).tensor)


@pytest.mark.parametrize("name", NASTY)
def test_nasty_tensors_equal_the_reference(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        base, targets = cast(NASTY[name], dtype)
        assert_close(varm(base, targets).tensor, reference.varm(base, targets), base, targets)
        assert_close(varm_elementwise(base, targets).tensor, reference.varm_element(base, targets), base, targets)


@pytest.mark.parametrize("aggregation", ["elements", "matrices"])
def test_units_of_several_matrices_equal_the_reference(aggregation):
    matrices = [random_case(shape, 3, scale=scale, seed=i) for i, (shape, scale) in
                enumerate([((4, 6), 1e-2), ((30,), 1e-1), ((0, 3), 1.0), ((2, 2, 2), 1e-3)])]  # fmt: skip
    statistics = [matrix_statistics(base, targets) for base, targets in matrices]
    expected = reference.unit_coefficients(matrices, aggregation)
    weights = unit_coefficients(statistics, aggregation)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    for base, targets in matrices:
        merged = varm(base, targets, coefficients=weights).tensor
        assert_close(merged, reference.varm(base, targets, expected), base, targets)


def test_the_aggregations_differ_where_matrices_differ_in_size():
    small = random_case((2, 2), 2, scale=1.0, seed=1)
    large = random_case((50, 50), 2, scale=1e-2, seed=2)
    statistics = [matrix_statistics(*small), matrix_statistics(*large)]
    assert abs(unit_coefficients(statistics, "elements")[0] - unit_coefficients(statistics, "matrices")[0]) > 1e-3


@pytest.mark.parametrize("aggregation", ["elements", "matrices"])
def test_a_unit_of_empty_matrices_is_uniform(aggregation):
    empty = matrix_statistics(*random_case((0, 3), 2))
    assert unit_coefficients([empty, empty], aggregation).tolist() == [0.5, 0.5]


def test_no_variation_is_uniform_and_keeps_the_bits_of_the_base():
    base = torch.tensor([[-0.0, 1.0], [0.0, -2.0]])
    for method in (varm, varm_elementwise):
        merged = method(base, [base.clone(), base.clone()])
        assert torch.equal(merged.tensor.view(torch.int32), base.view(torch.int32))
        assert merged.coefficients.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("coefficients", "named"),
    [
        ([1.0], ["[1.0]", "2 shares"]),
        ([1.0, 0.5], ["[1.0, 0.5]", "sum to 1"]),
        ([3.0, -2.0], ["[3.0, -2.0]", "at least 0"]),
    ],
)
def test_bad_coefficients_are_named(coefficients, named):
    with refused(MergeError, *named):
        varm(*random_case((3, 3), 2), coefficients=coefficients)


def test_bad_units_and_nan_beside_given_coefficients_are_named():
    base, targets = random_case((3, 3), 2)
    with pytest.raises(MergeError, match=r"'mean'.*elements, matrices"):
        unit_coefficients([matrix_statistics(base, targets)], "mean")
    targets[0][0, 0] = float("nan")
    with pytest.raises(MergeError, match="NaN or Inf"):
        varm(base, targets, coefficients=[0.5, 0.5])
