"""Rows to columns and back: exact where it is exact, within the bound where it is not, and nothing else gets in."""

import dataclasses
import math
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.alignment.rows import MASS_TOLERANCE, checked_rows
from fusekit.capturing.shards import Codec, shard_bytes
from fusekit.errors import FusekitError, StorageError
from fusekit.types import CapturedRow, TokenizedRow, TopK
from tests.capture import reference
from tests.capture.rows import awkward_rows, by_id, captured

ERRORS = [0.0, 0.001, 0.05, 0.2, 1.0]
COORDINATES = ("message", "part", "ends", "lows", "labels", "ids")


def change(row, **changes):
    """A row with other fields; those of its tokens too."""
    names = {field.name for field in dataclasses.fields(TokenizedRow)}
    tokens = dataclasses.replace(row.tokens, **{name: value for name, value in changes.items() if name in names})
    others = {name: value for name, value in changes.items() if name not in names}
    return dataclasses.replace(row, tokens=tokens, **others)


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
            assert abs(found_row[id_] - value) <= codec.error_bound(np.array(value)) + 1e-9
            assert abs(found_row[id_] - value) <= max(max_error, abs(value) * 2**-24) + 1e-9
    assert np.all(np.abs(back.actual - row.actual) <= codec.error_bound(row.actual) + 1e-9)
    assert np.array_equal(back.rows.tail == 0, row.rows.tail == 0)
    some = row.rows.tail > 0
    logs = np.log(row.rows.tail[some])
    assert np.all(np.abs(np.log(back.rows.tail[some]) - logs) <= codec.error_bound(logs) + 1e-6)


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
    codec = Codec(1000, 10, 0.2)
    bound = codec.error_bound(np.log([1.0, 0.5, 1 / 16, 1e-3])) - 0.1
    np.testing.assert_allclose(bound, [0.025, 0.025 * math.sqrt(2), 0.1, 0.1], rtol=0.03)
    grid = np.linspace(-20, 0, 4001)
    depths = codec._grid.depths(grid)
    assert np.all(np.diff(depths) <= 0)
    assert depths[-1] == 0
    assert np.all(np.abs(codec._grid.logprobs(depths) - grid) <= codec._grid.rounding(grid) + 1e-12)


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


@settings(max_examples=200, deadline=None)
@given(awkward_rows(), st.sampled_from([0.0, 0.2]), st.data())
def test_columns_that_are_not_of_a_row_are_refused_or_read(awkward, max_error, data):
    """Any other numbers: a row or an error, nothing else."""
    row, vocabulary, k = awkward
    codec = Codec(vocabulary, k, max_error)
    columns = codec.encode(row)
    name = data.draw(st.sampled_from([name for name, column in columns.items() if isinstance(column, np.ndarray)]))
    column = columns[name].copy()
    if len(column) and data.draw(st.booleans()):
        column[data.draw(st.integers(0, len(column) - 1))] = data.draw(st.integers(-3, 100))
    else:
        column = np.resize(column, data.draw(st.integers(0, 2 * len(column) + 1)))
    with suppress(FusekitError):
        checked_rows(codec.decode(columns | {name: column}).rows, vocabulary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": 1000}, "token id 1000 is outside the vocabulary of 1000"),
        ({"twice": True}, "label 0 has the token id 7 twice"),
        ({"wide": True}, "5 entries for one label, more than top_k 4"),
        ({"tail": 0.5}, r"label 0 has no distribution: .* tail of 0.5 sum to 1.\d+, not 1"),
        ({"tail": -0.5}, "label 0 has no distribution"),
        ({"tail": math.nan}, "label 0 has no distribution"),
        ({"actual": -math.inf}, "a log-probability is -inf"),
        ({"actual": math.nan}, "a log-probability is nan"),
        ({"actual": 0.5}, "finite ones from -10000 to 0"),
        ({"cross_entropy": math.nan}, "its cross-entropy is nan"),
        ({"key": "row 7"}, "the key 'row 7', but keys are 32 hexadecimal digits"),
        ({"short": True}, "labels, but ids"),
        ({"message": np.zeros(3, np.int64)}, "9 ids, but message of shape"),
    ],
)
def test_what_cannot_be_stored_is_named(changes, message):
    row = captured(np.random.default_rng(1), 1000, 4, 9)
    ids, logprobs, tail = (array.copy() for array in row.rows)
    changes = dict(changes)
    if "ids" in changes:
        ids[0, 0] = changes.pop("ids")
    if changes.pop("twice", False):
        ids[0, :2] = 7
    if changes.pop("wide", False):
        ids, logprobs = np.c_[ids, ids[:, 0] ^ 1], np.c_[logprobs, np.full(len(ids), -30.0)]
    if changes.pop("short", False):
        ids = ids[1:]
    if "tail" in changes:
        tail[0] = changes.pop("tail")
    if "actual" in changes:
        changes["actual"] = np.r_[changes["actual"], row.actual[1:]]
    with pytest.raises(StorageError, match=f"row .*{message}"):
        Codec(1000, 4).encode(change(row, rows=TopK(ids, logprobs, tail), **changes))


@pytest.mark.parametrize(
    "arguments", [(10, 0), (10, 11), (0, 1), (1 << 31, 5), (10, 5, -0.1), (10, 5, 2.0), (10, 5, math.nan)]
)
def test_codecs_that_cannot_be(arguments):
    with pytest.raises(StorageError):
        Codec(*arguments)


def test_a_label_whose_value_is_not_its_entry_keeps_its_own():
    """Truncated softmaxes differ in the last bits; what differs more is not taken from the list."""
    row = captured(np.random.default_rng(2), 50, 50, 12, tail=False)
    other = dataclasses.replace(row, actual=row.actual - 1.5)
    back = Codec(50, 50).decode(Codec(50, 50).encode(other))
    assert np.all(np.abs(back.actual - other.actual) <= 0.2)
    assert np.array_equal(back.tokens.ids, row.tokens.ids)


def test_probabilities_just_above_one_are_one():
    row = captured(np.random.default_rng(3), 2, 1, 9)
    n = len(row.actual)
    certain = TopK(row.tokens.ids[row.tokens.labels][:, None], np.full((n, 1), 1e-7), np.zeros(n))
    back = Codec(2, 1).decode(Codec(2, 1).encode(change(row, rows=certain, actual=certain.logprobs[:, 0])))
    assert np.array_equal(back.rows.logprobs, np.zeros((n, 1)))
    assert np.array_equal(back.rows.tail, np.zeros(n))


def test_masses_within_the_tolerance_are_normalised():
    row = captured(np.random.default_rng(4), 1000, 10, 20)
    off = change(row, rows=row.rows._replace(tail=row.rows.tail + 0.9 * MASS_TOLERANCE))
    back = Codec(1000, 10).decode(Codec(1000, 10).encode(off))
    np.testing.assert_allclose(np.exp(back.rows.logprobs).sum(axis=1) + back.rows.tail, 1, rtol=1e-12)
