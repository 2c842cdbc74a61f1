"""Which rows a run uses, and that every model reads the same bytes of each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.data.prepare import prepare
from fusekit.errors import DataError
from fusekit.types import Message, Part, Row
from tests.capture.models import model

NAMES = ["openchat-3.5", "qwen", "gemma", "demo"]


def row(*contents):
    return Row(tuple(Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)))


def readers():
    return [model(name) for name in NAMES]


def test_counts_by_reason_with_the_first_keys():
    long = row("q", "word " * 200)
    rows = [row("a", "b"), row("", " \n"), row("a", "b"), long, row("only a question"), row(), row("c", "d")]
    prepared = prepare(rows, readers(), 100, overlong="drop")
    assert [r.key for r in prepared.rows] == [rows[0].key, rows[6].key]
    counts = prepared.counts
    assert counts.reasons == {"empty": 2, "duplicate": 1, "overlong": 1, "no_label": 1}
    assert counts.keys["overlong"] == [long.key]
    assert (counts.seen, counts.kept, counts.dropped) == (7, 2, 5)
    assert counts.as_dict()["reasons"] == counts.reasons
    assert str(counts).startswith("2 of 7 examples kept (")


def test_no_row_left_is_an_error_with_the_counts():
    with pytest.raises(DataError, match=r"no example is left: 0 of 1 examples kept \(1 no_label\)"):
        prepare([row("a")], readers(), 100)
    with pytest.raises(DataError, match=r"1 refused.*cannot render example"):
        prepare([Row((Message("user", "a"), Message("system", "b"), Message("assistant", "c")))], readers(), 100)
    with pytest.raises(DataError, match="overlong is 'skip'"):
        prepare([], readers(), 100, overlong="skip")
    with pytest.raises(DataError, match="max_length is 1 for 4 models"):
        prepare([], readers(), 1)
    assert prepare([], readers(), 100).rows == []


@settings(max_examples=40, deadline=None)
@given(
    contents=st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Mn"]), min_size=1, max_size=60), min_size=2, max_size=5
    ),
    max_length=st.integers(12, 60),
)
def test_cut_rows_have_the_same_bytes_for_every_model(contents, max_length):
    source = row(*contents)
    try:
        (cut,) = prepare([source], readers(), max_length).rows
    except DataError as error:
        if not any(reason in str(error) for reason in ("no_label", "refused", "empty")):
            raise
        return
    tokens = [reader.tokenize(cut) for reader in readers()]
    assert all(len(t) <= max_length and t.labels.any() for t in tokens)
    if cut.cut is None:
        return
    number, size = cut.cut
    source.messages[number].content.encode()[:size].decode()
    for t in tokens:
        assert t.message.max() <= number
        inside = (t.message == number) & (t.part == Part.CONTENT)
        if size and inside.any():
            assert t.ends[-1] == size


def test_the_cut_is_as_late_as_the_first_model_allows():
    source = row("q", "The quick brown fox jumps over the lazy dog. " * 20)
    (cut,) = prepare([source], readers(), 64).rows
    lengths = [len(reader.tokenize(cut)) for reader in readers()]
    assert max(lengths) == 64
    assert cut.key == source.key
    (again,) = prepare([cut], readers(), 64).rows
    assert again.cut == cut.cut


def test_a_turn_that_just_fits_keeps_its_end():
    source = row("q", "a", "What is it then?", "b")
    openchat = model("openchat-3.5")
    whole = openchat.tokenize(source)
    length = int(np.flatnonzero(whole.part == Part.END)[1]) + 1
    (cut,) = prepare([source], [openchat], length).rows
    assert cut.cut == (2, 0)
    assert np.array_equal(openchat.tokenize(cut).ids, whole.ids[:length])
