"""Rows to columns and back: exact where it is exact, within the bound where it is not, and nothing else gets in."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.alignment.rows import MASS_TOLERANCE, checked_rows
from fusekit.capturing.shards import Codec, shard_bytes
from fusekit.errors import StorageError
from fusekit.types import CapturedRow, TokenizedRow, TopK
from tests.capture import reference
from tests.capture.rows import awkward_rows, by_id, captured

ERRORS = [0.0, 0.001, 0.05, 0.2, 1.0]
COORDINATES = ("message", "part", "ends", "lows", "labels", "ids")


@settings(max_examples=300, deadline=None)
@given(awkward_rows(), st.sampled_from(ERRORS))
def test_what_comes_back(awkward, max_error):
    row, vocabulary, k = awkward
    codec = Codec(vocabulary, k, max_error)
    back = codec.decode(codec.encode(row))
    assert back.tokens.key == row.tokens.key
    assert (back.dataset, back.cross_entropy) == (row.dataset, row.cross_entropy)
    for name in COORDINATES:
        found = getattr(back.tokens, name)
        assert found.dtype == (bool if name == "labels" else np.int64)
        assert np.array_equal(found, getattr(row.tokens, name)), name
    assert (back.tokens.lows is back.tokens.ends) == np.array_equal(row.tokens.lows, row.tokens.ends)
    checked_rows(back.rows, vocabulary)
    given_rows, found_rows = by_id(*row.rows[:2]), by_id(*back.rows[:2])
    for given_row, found_row, ids in zip(given_rows, found_rows, back.rows.ids, strict=True):
        assert set(found_row) == set(given_row)
        order = [(-found_row[i], i) for i in ids.tolist() if i >= 0]
        assert order == sorted(order)
        for id_, value in given_row.items():
            assert abs(found_row[id_] - value) <= reference.error_bound(value, max_error) + 1e-9
            assert abs(found_row[id_] - value) <= max(max_error, abs(value) * 2**-24) + 1e-9
    bounds = [reference.error_bound(value, max_error) + 1e-9 for value in row.actual.tolist()]
    assert np.all(np.abs(back.actual - row.actual) <= bounds)
    assert np.array_equal(back.rows.tail == 0, row.rows.tail == 0)
    some = row.rows.tail > 0
    logs = np.log(row.rows.tail[some])
    bounds = [reference.error_bound(value, max_error) + 1e-6 for value in logs.tolist()]
    assert np.all(np.abs(np.log(back.rows.tail[some]) - logs) <= bounds)


@settings(max_examples=100, deadline=None)
@given(st.lists(awkward_rows(vocabulary=300), max_size=4), st.sampled_from(ERRORS))
def test_the_slow_reader_reads_the_same_of_the_file(tmp_path_factory, awkward, max_error):
    codec = Codec(300, 300, max_error)
    encoded = [codec.encode(row) for row, _, _ in awkward]
    path = tmp_path_factory.getbasetemp() / "shard.parquet"
    path.write_bytes(shard_bytes(encoded, codec.exact))
    for columns, slow in zip(encoded, reference.read(path, max_error), strict=True):
        fast = codec.decode(columns)
        for name in COORDINATES:
            assert (
                getattr(fast.tokens, name).tolist() == slow[{"ids": "token_ids", "labels": "is_label"}.get(name, name)]
            )
        assert (fast.tokens.key, fast.dataset) == (slow["key"], slow["dataset"])
        assert fast.cross_entropy == slow["cross_entropy"]
        counts = (slow["tokens"], slow["labels"], slow["bytes"])
        assert counts == (len(fast.tokens), len(fast.actual), fast.tokens.label_bytes)
        for ids, logprobs, entries in zip(*fast.rows[:2], slow["rows"], strict=True):
            assert ids[ids >= 0].tolist() == [id_ for id_, _ in entries]
            np.testing.assert_allclose(logprobs[ids >= 0], [value for _, value in entries], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(fast.rows.tail, slow["tail"], rtol=1e-9)
        np.testing.assert_allclose(fast.actual, slow["actual"], rtol=1e-9, atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(awkward_rows(), st.sampled_from([0.001, 0.05, 0.2, 1.0]))
def test_divergence_is_bounded_and_rows_are_distributions(awkward, max_error):
    row, vocabulary, k = awkward
    back = Codec(vocabulary, k, max_error).decode(Codec(vocabulary, k, max_error).encode(row))
    both = zip(by_id(*row.rows[:2]), by_id(*back.rows[:2]), row.rows.tail, back.rows.tail, strict=True)
    for p, q, p_tail, q_tail in both:
        assert abs(sum(map(math.exp, q.values())) + q_tail - 1) < 1e-9
        divergence = sum(math.exp(p[i]) * (p[i] - q[i]) for i in p)
        divergence += p_tail * math.log(p_tail / q_tail) if p_tail > 0 else 0.0
        assert divergence <= max_error**2 / 8 + 1e-9


def test_rounding_is_finer_for_probable_entries():
    values, codec = np.linspace(-20, 0, 4001), Codec(1000, 1, 0.2)
    apart = np.abs(codec._grid.logprobs(codec._grid.depths(values)) - values)
    for p, most in ((0.9, 0.027), (0.5, 0.036), (0.06, 0.1)):
        assert apart[values > math.log(p)].max() <= most
    assert np.all(np.diff(codec._grid.depths(values)) <= 0)


@pytest.mark.parametrize(("k", "most"), [(10, 33), (50, 120)])
def test_what_a_label_costs(k, most):
    """Bytes per label of ids in random order, the worst case, everything included."""
    vocabulary, T = 151_936, 512
    rng = np.random.default_rng(0)
    codec, encoded, labels = Codec(vocabulary, k), [], 0
    for _ in range(8):
        logits = np.sort(rng.normal(0, 2, (T, 4 * k)) - np.log(np.arange(4 * k) + 10.0))[:, ::-1]
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        ids = np.stack([rng.choice(vocabulary, k, replace=False) for _ in range(T)])
        tail = np.exp(logprobs[:, k:]).sum(axis=1)
        ends = np.cumsum(rng.integers(1, 9, T))
        name, part, is_label = f"{rng.integers(1 << 62):032x}", np.ones(T, np.int64), np.arange(T) > 127
        tokens = TokenizedRow(name, ids[:, 0], part - 1, part, ends, ends, is_label)
        rows = TopK(ids[is_label], logprobs[is_label, :k], tail[is_label])
        encoded.append(codec.encode(CapturedRow(tokens, "chat", rows, rows.logprobs[:, 0], 1.0)))
        labels += T - 128
    assert len(shard_bytes(encoded, exact=False)) / labels <= most


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": 1000}, "token id 1000 is outside the vocabulary of 1000"),
        ({"wide": True}, "5 entries for one label, more than top_k 4"),
        ({"tail": 0.5}, r"label 0 has no distribution: .* tail of 0.5 sum to 1.\d+, not 1"),
        ({"tail": -0.5}, "label 0 has no distribution"),
        ({"tail": math.nan}, "label 0 has no distribution"),
        ({"actual": -math.inf}, "a log-probability is -inf"),
        ({"actual": math.nan}, "a log-probability is nan"),
    ],
)
def test_what_cannot_be_stored_is_named(changes, message):
    row = captured(np.random.default_rng(1), 1000, 4, 9)
    ids, logprobs, tail = (array.copy() for array in row.rows)
    actual = np.r_[changes.get("actual", row.actual[0]), row.actual[1:]]
    ids[0, 0], tail[0] = changes.get("ids", ids[0, 0]), changes.get("tail", tail[0])
    if "wide" in changes:
        ids, logprobs = np.c_[ids, ids[:, 0] ^ 1], np.c_[logprobs, np.full(len(ids), -30.0)]
    with pytest.raises(StorageError, match=f"example .*{message}"):
        Codec(1000, 4).encode(dataclasses.replace(row, rows=TopK(ids, logprobs, tail), actual=actual))


@pytest.mark.parametrize("max_error", [-0.1, 1e-5, 2.0, math.nan])
def test_a_bound_out_of_range_is_refused(max_error):
    with pytest.raises(StorageError, match="max_error"):
        Codec(10, 5, max_error)


def test_a_label_whose_value_is_not_its_entry_keeps_its_own():
    """Truncated softmaxes differ in the last bits; what differs more is not taken from the list."""
    row = captured(np.random.default_rng(2), 50, 50, 12, tail=False)
    other = dataclasses.replace(row, actual=row.actual - 1.5)
    back = Codec(50, 50).decode(Codec(50, 50).encode(other))
    assert np.all(np.abs(back.actual - other.actual) <= 0.2)
    assert np.array_equal(back.tokens.ids, row.tokens.ids)


def test_masses_within_the_tolerance_are_normalised():
    row = captured(np.random.default_rng(4), 1000, 10, 20)
    off = dataclasses.replace(row, rows=row.rows._replace(tail=row.rows.tail + 0.9 * MASS_TOLERANCE))
    back = Codec(1000, 10).decode(Codec(1000, 10).encode(off))
    np.testing.assert_allclose(np.exp(back.rows.logprobs).sum(axis=1) + back.rows.tail, 1, rtol=1e-12)


def test_probabilities_just_above_one_are_one():
    row = captured(np.random.default_rng(3), 2, 1, 9)
    n = len(row.actual)
    certain = TopK(row.tokens.ids[row.tokens.labels][:, None], np.full((n, 1), 1e-7), np.zeros(n))
    back = Codec(2, 1).decode(Codec(2, 1).encode(dataclasses.replace(row, rows=certain, actual=certain.logprobs[:, 0])))
    assert np.array_equal(back.rows.logprobs, np.zeros((n, 1)))
    assert np.array_equal(back.rows.tail, np.zeros(n))
