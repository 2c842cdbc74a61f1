"""Dynamic time warping against the table filled cell by cell, ties included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.alignment import vocabulary_surfaces
from fusekit.alignment.alignment import align
from fusekit.alignment.papers import cost_matrix, warp
from fusekit.errors import AlignmentError
from tests.alignment import reference
from tests.alignment.texts import EDGE_CASES
from tests.alignment.tokenizers import load


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_random_tables_with_ties(n, m, largest, seed):
    costs = np.random.default_rng(seed).integers(0, largest, (n, m))
    rows, columns = warp(costs.astype(np.int64))
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == reference.warp(costs.tolist())


@pytest.mark.parametrize(("pivot", "source"), [("mistral", "qwen"), ("qwen", "anthropic"), ("tekken", "mistral")])
def test_real_rows(pivot, source):
    for text in EDGE_CASES.values():
        alignment = align(text, load(pivot), load(source), method="dtw")
        p = [vocabulary_surfaces(load(pivot)).of[i] for i in alignment.pivot_ids.tolist()]
        s = [vocabulary_surfaces(load(source)).of[i] for i in alignment.source_ids.tolist()]
        costs = [[reference.token_cost(a, b) for b in s] for a in p]
        assert cost_matrix(p, s).tolist() == costs
        path = reference.warp(costs)
        first, stop = alignment.matched
        assert [(i, j) for i in range(len(p)) for j in range(first[i], stop[i])] == path
        closed = [i for i in range(len(p)) if i == len(p) - 1 or not set(ends(path, i)) & set(ends(path, i + 1))]
        assert np.flatnonzero(alignment.source_at >= 0).tolist() == closed
        assert all(alignment.source_at[i] == ends(path, i)[-1] for i in closed)


def ends(path, i):
    return [j for k, j in path if k == i]


def test_empty_and_too_large(monkeypatch):
    empty = align("", load("mistral"), load("qwen"), method="dtw")
    assert empty.source_at.shape == (0,)
    monkeypatch.setattr("fusekit.alignment.alignment.MAX_CELLS", 10)
    with pytest.raises(AlignmentError, match="cells"):
        align("a long enough text to align", load("mistral"), load("qwen"), method="dtw")
