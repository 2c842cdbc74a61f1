"""Plain text in blocks of a number of tokens, for continued training in the manner of FuseLLM (arXiv 2401.10491)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce

import numpy as np

from fusekit.alignment.arrays import IntArray
from fusekit.errors import DataError
from fusekit.representation.row_tokenizer import RowTokenizer
from fusekit.representation.rows import FRAGMENT, TEXT, Message, Row


def pack_text(documents: Iterable[Row], tokenizers: Sequence[RowTokenizer], block_tokens: int) -> Iterator[Row]:
    """Pack documents into rows that have at most ``block_tokens`` tokens for every model, bos and eos included.

    A document that does not fit is cut where a token ends in every model's reading of it, at a character boundary; the
    pieces of a document, in order, are the document. One that is cut off itself (``FRAGMENT``) ends its block. Only one
    block is in memory at a time.

    Args:
        documents: rows of plain text (:attr:`Row.is_text`), one message each or more.
        tokenizers: of every model of the run.
        block_tokens: the most tokens of a block.

    Raises:
        DataError: a row is no plain text, a model has no eos, or a block is too small for a single character.
    """
    if block_tokens < 2 or not tokenizers:
        raise DataError(f"block_tokens is {block_tokens} for {len(tokenizers)} models: at least 2 and one model")
    block = _Block(tokenizers, block_tokens)
    for document in documents:
        if not document.is_text:
            raise DataError(f"row {document.key} is a conversation: only plain text is packed into blocks")
        for message in document.messages:
            if message.content:
                yield from _pack(message, document.dataset, block)
    if block.messages:
        yield block.close()


class _Block:
    """A block that is being filled."""

    def __init__(self, tokenizers: Sequence[RowTokenizer], size: int) -> None:
        self.tokenizers, self.size = tokenizers, size
        self.overhead = np.array([len(tokenizer.tokenize(Row((Message(FRAGMENT, ""),)))) for tokenizer in tokenizers])
        self.messages: list[Message] = []
        self.datasets: set[str] = set()
        self.used = self.overhead.copy()

    @property
    def room(self) -> IntArray:
        """Tokens that are left, per model."""
        left: IntArray = self.size - self.used
        return left

    def needs(self, message: Message) -> IntArray:
        """Tokens that a message takes, per model."""
        row = Row((message,))
        lengths: IntArray = np.array([len(tokenizer.tokenize(row)) for tokenizer in self.tokenizers])
        taken: IntArray = lengths - self.overhead
        return taken

    def add(self, message: Message, needs: IntArray, dataset: str) -> None:
        self.messages.append(message)
        self.datasets.add(dataset)
        self.used = self.used + needs

    def close(self) -> Row:
        """The block as a row; of the documents' data set where that is one and the same."""
        row = Row(tuple(self.messages), self.datasets.pop() if len(self.datasets) == 1 else "")
        self.messages, self.datasets, self.used = [], set(), self.overhead.copy()
        return row


def _pack(document: Message, dataset: str, block: _Block) -> Iterator[Row]:
    """Put a document into blocks; gives those that are full, and the one that ends where the document is cut off."""
    data = document.content.encode()
    whole = Row((Message(FRAGMENT, document.content),))
    readings = [tokenizer.tokenize(whole) for tokenizer in block.tokenizers]
    certain = [np.unique(r.ends[(r.ends == r.lows) & (r.ends > 0)]) for r in readings]
    borders = reduce(np.intersect1d, certain)
    borders = borders[[int(at) < len(data) and data[int(at)] & 0xC0 != 0x80 for at in borders]]
    counts = [np.searchsorted(reading.ends, np.append(borders, len(data)), side="right") for reading in readings]
    tokens_at = np.stack(counts, axis=1)  # tokens that each model has read at each border
    start, read = 0, block.overhead
    while start < len(data):
        left = tokens_at[-1] - read
        if (left <= 2 * block.room + 8).all():  # by itself it may take fewer tokens, or more, than in its document
            rest = Message(document.role, data[start:].decode())
            needs = block.needs(rest) if start else left + (document.role == TEXT)
            if (needs <= block.room).all():
                block.add(rest, needs, dataset)
                if document.role == FRAGMENT:  # nothing may follow it as if it went on so
                    yield block.close()
                return
        first = int(np.searchsorted(borders, start, side="right"))
        fitting = first + int(np.searchsorted((tokens_at[first:-1] - read > block.room).any(axis=1), True))
        piece = _longest_piece(data, start, borders[first:fitting], block)
        if piece is not None:
            message, taken, stop = piece
            block.add(message, taken, dataset)
            read = tokens_at[int(np.searchsorted(borders, stop))]
            start = stop
        elif not block.messages:
            raise DataError(
                f"block_tokens {block.size} is too small: {data[start : start + 40].decode(errors='ignore')!r} has no "
                "place within it where every model can begin anew"
            )
        yield block.close()


def _longest_piece(data: bytes, start: int, borders: IntArray, block: _Block) -> tuple[Message, IntArray, int] | None:
    """The longest piece up to a border that fits: by itself it may take more tokens than as part of its document."""
    for stop in reversed(borders.tolist()):
        message = Message(FRAGMENT, data[start:stop].decode())
        needs = block.needs(message)
        if (needs <= block.room).all():
            return message, needs, int(stop)
    return None
