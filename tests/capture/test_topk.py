"""Top-k rows against sorted lists and sums in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.capturing.forward import GROUP, score_blocks, score_logits
from fusekit.settings import Selection
from tests import reference

# More than two groups per entry, so that the groups are used, with a rest that is no whole group.
WIDE = 9 * GROUP + 5


def assert_true(found, logits, labels, selection, invalid=()):
    valid = set(range(logits.shape[1])) - set(map(int, invalid))
    for j, label in enumerate(labels.tolist()):
        ids, logprobs, tail, actual, at_one = reference.label_row(logits[j].tolist(), label, selection, valid)
        assert found.ids[j].tolist() == ids + [-1] * (selection.k - len(ids))
        np.testing.assert_allclose(found.logprobs[j, : len(ids)], logprobs, atol=2e-6, rtol=1e-6)
        assert float(found.tail[j]) == pytest.approx(tail, rel=1e-5, abs=0)
        assert float(found.actual[j]) == pytest.approx(actual, abs=2e-6, rel=1e-6)
        assert float(found.nll[j]) == pytest.approx(-at_one, abs=2e-6, rel=1e-6)
    assert found.finite.all()


@pytest.mark.parametrize("vocabulary", [3, 50, GROUP, 2 * GROUP + 1, WIDE])
@pytest.mark.parametrize("k", [1, 4, 40, 300])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.4])
def test_rows_are_those_of_a_full_softmax(vocabulary, k, temperature):
    generator = torch.Generator().manual_seed(vocabulary + k)
    logits = torch.randn(3, vocabulary, generator=generator) * 4
    labels, selection = torch.tensor([0, vocabulary - 1, vocabulary // 2]), Selection(k, temperature=temperature)
    assert_true(score_logits(logits.clone(), labels, selection), logits, labels, selection)


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "shuffled"])
def test_blocks_of_any_width_and_order_give_the_rows_of_the_whole(order, temperature):
    """Rising logits displace every group that was held before, and exceed the range of one shift."""
    count = 40 * GROUP + 5
    logits = torch.linspace(-300, 300, count).repeat(3, 1)
    logits = {"rising": logits, "falling": logits.flip(1), "equal": logits * 0, "shuffled": logits}[order]
    if order == "shuffled":
        logits = logits[:, torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    labels, selection = torch.tensor([0, count // 2, count - 1]), Selection(3, temperature=temperature)
    for width in (GROUP, 7 * GROUP, 64 * GROUP):
        blocks = (logits[:, start : start + width].clone() for start in range(0, count, width))
        assert_true(score_blocks(blocks, labels, selection), logits, labels, selection)


@settings(max_examples=60, deadline=None)
@given(
    levels=st.integers(1, 6), k=st.integers(1, 12), vocabulary=st.integers(1, 30 * GROUP), seed=st.integers(0, 1 << 20)
)
def test_equal_logits_come_in_the_order_of_their_ids(levels, k, vocabulary, seed):
    x = torch.randint(-levels, levels, (2, vocabulary), generator=torch.Generator().manual_seed(seed)).float()
    x[0] *= -0.0 if levels == 1 else 1.0  # zeros of both signs are equal
    blocks = (x[:, start : start + 4 * GROUP].clone() for start in range(0, vocabulary, 4 * GROUP))
    for row, found in zip(x.tolist(), score_blocks(blocks, torch.tensor([0, 0]), Selection(k)).ids, strict=True):
        assert found[found >= 0].tolist() == sorted(range(vocabulary), key=lambda i: (-row[i], i))[:k]


@pytest.mark.parametrize("vocabulary", [20, WIDE])
def test_padding_ids_and_holes_get_no_mass(vocabulary):
    logits = torch.randn(4, vocabulary)
    invalid = torch.tensor([2, 7, vocabulary - 2, vocabulary - 1])
    logits[:, invalid] = 50.0
    labels = torch.tensor([0, 3, 5, 11])
    for selection in (Selection(6), Selection(vocabulary)):
        found = score_logits(logits.clone(), labels, selection, invalid)
        assert_true(found, logits, labels, selection, invalid)
    assert found.tail.tolist() == [0.0] * 4  # all of the mass is listed, exactly


def test_a_tiny_remaining_mass_keeps_its_precision():
    logits = torch.full((1, WIDE), -30.0)
    logits[0, 5] = 10.0
    found = score_logits(logits.clone(), torch.tensor([5]), Selection(1))
    expected = (WIDE - 1) * math.exp(-40) / (1 + (WIDE - 1) * math.exp(-40))
    assert float(found.tail) == pytest.approx(expected, rel=1e-5)  # 1 - sum would be 0 in float32, and rounding noise


def test_entries_are_kept_until_the_mass_is_reached():
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625], [0.97, 0.01, 0.01, 0.005, 0.005]])
    found = score_logits(probabilities.log(), torch.tensor([4, 0]), Selection(4, keep_mass=0.75))
    assert found.ids.tolist() == [[0, 1, -1, -1], [0, -1, -1, -1]]
    np.testing.assert_allclose(found.tail, [0.25, 0.03], rtol=1e-6)
    np.testing.assert_allclose(found.logprobs[0, :2].exp(), [0.5, 0.25], rtol=1e-6)
    assert found.logprobs[0, 2:].tolist() == [-math.inf] * 2
    assert float(found.actual[0]) == pytest.approx(math.log(0.0625), abs=1e-6)  # known although it is not kept


def test_half_precision_is_read_exactly_and_computed_with_in_float32():
    logits, labels = (torch.randn(5, WIDE) * 4).bfloat16(), torch.arange(5)
    assert_true(score_logits(logits.clone(), labels, Selection(5)), logits, labels, Selection(5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("vocabulary", [20, WIDE])
def test_rows_that_are_no_distributions_are_told_apart(bad, vocabulary):
    logits = torch.randn(3, vocabulary)
    logits[1, 4] = bad  # the label: minus infinity elsewhere only says that an id is impossible
    found = score_logits(logits.clone(), torch.tensor([4, 4, 4]), Selection(3))
    assert found.finite.tolist() == [True, False, True]
    logits[1] = -math.nan
    assert score_logits(logits, torch.tensor([4, 4, 4]), Selection(3)).finite.tolist() == [True, False, True]
