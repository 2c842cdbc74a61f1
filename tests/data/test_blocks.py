"""Blocks of plain text: none too long for any model, and every byte of every document."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.data.prepare import pack_text
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError
from fusekit.types import Message, Part, Row
from tests.alignment.texts import EDGE_CASES
from tests.alignment.tokenizers import load

NAMES = ["mistral", "qwen", "llama3"]
READERS = {}


def readers():
    for name in NAMES:
        READERS.setdefault(name, RowTokenizer(load(name)))
    return list(READERS.values())


def document(text, dataset="d"):
    return Row((Message("text", text),), dataset)


def documents_of(blocks):
    found, open_ = [], ""
    for block in blocks:
        for i, (role, content) in enumerate(block.messages):
            assert role == "text" or i == len(block.messages) - 1
            open_ += content
            if role == "text":
                found.append(open_)
                open_ = ""
    assert not open_
    return found


@pytest.mark.parametrize("size", [16, 33, 200, 2048])
def test_blocks_hold_every_document_and_fit_every_model(size):
    texts = [*EDGE_CASES.values(), "The quick brown fox. " * 150, *EDGE_CASES.values()]
    blocks = list(pack_text(map(document, texts), readers(), size))
    assert documents_of(blocks) == texts
    lengths = [max(len(reader.tokenize(block)) for reader in readers()) for block in blocks]
    assert max(lengths) <= size
    assert sum(lengths) >= 0.6 * size * (len(lengths) - 1)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=80), min_size=1, max_size=4), size=st.integers(24, 60))
def test_random_documents(texts, size):
    try:
        blocks = list(pack_text(map(document, texts), [readers()[0], readers()[2]], size))
    except DataError as error:
        if "too small" not in str(error):  # a long cluster of one character
            raise
        return
    assert documents_of(blocks) == texts
    assert all(len(reader.tokenize(block)) <= size for block in blocks for reader in (readers()[0], readers()[2]))


def test_the_data_set_of_a_block():
    blocks = list(pack_text([document("a", "x"), document("b", "x")], readers(), 50))
    assert [block.dataset for block in blocks] == ["x"]
    assert [block.dataset for block in pack_text([document("a", "x"), document("b", "y")], readers(), 50)] == [""]


@pytest.mark.parametrize("size", [12, 60, 500])
def test_text_that_is_cut_off_gets_no_end_and_nothing_follows_it(size):
    texts = [("fragment", "a text that goes on in a "), ("text", "a whole one"), ("fragment", "cut again " * 20)]
    rows = [Row((Message(*text),), "d") for text in texts]
    blocks = list(pack_text(rows, readers(), size))
    found = [message for block in blocks for message in block.messages]
    assert "".join(content for _, content in found) == "".join(content for _, content in texts)
    assert [role for role, _ in found].count("text") == 1
    assert all(role == "text" for block in blocks for role, _ in block.messages[:-1])
    for reader in readers():
        ends = sum(int((reader.tokenize(block).part == Part.END).sum()) for block in blocks)
        assert ends == 1
        assert max(len(reader.tokenize(block)) for block in blocks) <= size


def test_refusals():
    with pytest.raises(DataError, match="is a conversation"):
        list(pack_text([Row((Message("user", "a"),))], readers(), 50))
    with pytest.raises(DataError, match="block_tokens 3 is too small"):
        list(pack_text([document("🤖👨‍👩‍👧‍👦" * 3)], readers(), 3))
    with pytest.raises(DataError, match="block_tokens is 1 for 3 models"):
        list(pack_text([], readers(), 1))
    assert list(pack_text([document("")], readers(), 50)) == []
