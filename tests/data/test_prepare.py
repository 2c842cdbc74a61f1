"""Which rows a run uses and where it ends them, alike for every model; blocks of plain text."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.data.prepare import pack_text, prepare
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError
from fusekit.types import Message, Part, Row
from tests.alignment.tokenizers import EDGE_CASES, load
from tests.capture.models import model


@functools.cache
def readers():
    return [model(name) for name in ("openchat-3.5", "qwen", "gemma", "demo")]


@functools.cache
def plain():
    return [RowTokenizer(load(name)) for name in ("mistral", "qwen", "llama3")]


def row(*contents):
    return Row(tuple(Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)))


def test_counts_by_reason_with_the_first_keys():
    long = row("q", "word " * 200)
    rows = [row("a", "b"), row("", " \n"), row("a", "b"), long, row("only a question"), row(), row("c", "d")]
    prepared = prepare(rows, readers(), 100, overlong="drop")
    assert [r.key for r in prepared.rows] == [rows[0].key, rows[6].key]
    counts = prepared.counts
    assert counts.reasons == {"empty": 2, "duplicate": 1, "overlong": 1, "no_label": 1}
    assert counts.keys["overlong"] == [long.key]
    assert (counts.seen, counts.kept, counts.dropped) == (7, 2, 5)
    assert str(counts).startswith("2 of 7 examples kept (")


def test_no_row_left_is_an_error_with_the_counts():
    with pytest.raises(DataError, match=r"no example is left: 0 of 1 examples kept \(1 no_label\)"):
        prepare([row("a")], readers(), 100)
    with pytest.raises(DataError, match=r"1 refused.*cannot render example"):
        prepare([Row((Message("user", "a"), Message("system", "b"), Message("assistant", "c")))], readers(), 100)
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
    faces = row("q", "🤖👾" * 60)  # of several tokens each
    for length in range(40, 46):
        (cut,) = prepare([faces], readers(), length).rows
        assert cut.cut.size % 4 == 0


def test_a_turn_that_just_fits_keeps_its_end():
    source = row("q", "a", "What is it then?", "b")
    openchat = model("openchat-3.5")
    whole = openchat.tokenize(source)
    length = int(np.flatnonzero(whole.part == Part.END)[1]) + 1
    (cut,) = prepare([source], [openchat], length).rows
    assert cut.cut == (2, 0)
    assert np.array_equal(openchat.tokenize(cut).ids, whole.ids[:length])


def document(text, dataset="d"):
    return Row((Message("text", text),), dataset)


def packed(documents, readers, size):
    """The blocks, which fit every model: only the last message of one is cut off."""
    blocks = list(pack_text(documents, readers, size))
    assert all(len(reader.tokenize(block)) <= size for block in blocks for reader in readers)
    assert all(role == "text" for block in blocks for role, _ in block.messages[:-1])
    return blocks


def documents_of(blocks):
    found = [""]
    for role, content in (message for block in blocks for message in block.messages):
        found[-1] += content
        found += [""] * (role == "text")
    assert not found.pop()
    return found


@pytest.mark.parametrize("size", [16, 33, 200, 2048])
def test_blocks_hold_every_document_and_fit_every_model(size):
    texts = [*EDGE_CASES.values(), "The quick brown fox. " * 150, *EDGE_CASES.values()]
    blocks = packed(map(document, texts), plain(), size)
    assert documents_of(blocks) == texts
    lengths = [max(len(reader.tokenize(block)) for reader in plain()) for block in blocks]
    assert sum(lengths) >= 0.6 * size * (len(lengths) - 1)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=80), min_size=1, max_size=4), size=st.integers(24, 60))
def test_random_documents(texts, size):
    try:
        blocks = packed(map(document, texts), plain()[::2], size)
    except DataError as error:
        if "too small" not in str(error):  # a long cluster of one character
            raise
        return
    assert documents_of(blocks) == texts


def test_the_data_set_of_a_block():
    blocks = list(pack_text([document("a", "x"), document("b", "x")], plain(), 50))
    assert [block.dataset for block in blocks] == ["x"]
    assert [block.dataset for block in pack_text([document("a", "x"), document("b", "y")], plain(), 50)] == [""]


@pytest.mark.parametrize("size", [12, 60, 500])
def test_text_that_is_cut_off_gets_no_end_and_nothing_follows_it(size):
    texts = [("fragment", "a text that goes on in a "), ("text", "a whole one"), ("fragment", "cut again " * 20)]
    blocks = packed([Row((Message(*text),)) for text in texts], plain(), size)
    found = [message for block in blocks for message in block.messages]
    assert "".join(content for _, content in found) == "".join(content for _, content in texts)
    assert [role for role, _ in found].count("text") == 1
    for reader in plain():
        assert sum((reader.tokenize(block).part == Part.END).sum() for block in blocks) == 1


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(DataError, match="is a conversation"):
        list(pack_text([Row((Message("user", "a"),))], plain(), 50))
    with pytest.raises(DataError, match="block_tokens 3 is too small"):
        list(pack_text([document("🤖👨‍👩‍👧‍👦" * 3)], plain(), 3))
    with pytest.raises(DataError, match="marked as context"):
        list(pack_text([Row((Message("text", "a"),), context=(0,))], plain(), 50))
    assert list(pack_text([document("")], plain(), 50)) == []
