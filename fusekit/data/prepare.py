"""Which rows a run uses, and where it ends them: the same rows and the same bytes for every model of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from fusekit.data.reading import DROPPED, REASONS, DataCounts
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import AlignmentError, DataError
from fusekit.types import FRAGMENT, TEXT, Cut, IntArray, Message, Part, Row, TokenizedRow


@dataclass(frozen=True)
class Prepared:
    """The rows of a run. rows: with the cut that is common to all models. counts: what became of the others."""

    rows: list[Row]
    counts: DataCounts


def prepare(
    rows: Iterable[Row],
    tokenizers: Sequence[RowTokenizer],
    max_length: int,
    overlong: str = "cut",
    counts: DataCounts | None = None,
) -> Prepared:
    """Drop and cut rows so that every model of a run reads the same bytes of each.

    Args:
        rows: the data, in order.
        tokenizers: of every model of the run.
        max_length: the most tokens that a row may have for any of them.
        overlong: ``cut`` at the smallest byte end over all models (``Row.cut``), or ``drop``.
        counts: what the reader of ``rows`` has counted; the rest is counted here.

    Raises:
        DataError: no row is left (with the counts).
    """
    kept: list[Row] = []
    counts = DataCounts() if counts is None else counts
    seen: set[str] = set()
    for row in rows:
        counts.seen += 1
        reason = None
        if not any(message.content.strip() for message in row.messages):
            reason = "empty"
        elif row.key in seen:
            reason = "duplicate"
        else:
            seen.add(row.key)
            reason, row = _fit(row, tokenizers, max_length, overlong, counts)  # noqa: PLW2901
        if reason is not None:
            counts.add(reason, row.key)
        else:
            counts.kept += 1
            kept.append(row)
    if counts.seen and not kept:
        meaning = "; ".join(f"{reason}: {REASONS[reason]}" for reason in DROPPED if reason in counts.reasons)
        first = counts.first_refusal or "".join(counts.keys.get("unusable", [])[:1])
        raise DataError(f"no example is left: {counts} ({meaning}). {first}".strip())
    return Prepared(kept, counts)


def _fit(
    row: Row, tokenizers: Sequence[RowTokenizer], max_length: int, overlong: str, counts: DataCounts
) -> tuple[str | None, Row]:
    """Why the row is dropped, or None and the row with its cut."""
    try:
        tokens = [tokenizer.tokenize(row) for tokenizer in tokenizers]
        cut = False
        while any(len(of_model) > max_length for of_model in tokens):
            if overlong == "drop":
                return "overlong", row
            shorter = _cut(row, tokens, max_length)
            if shorter is None:
                return "no_label", row
            row, cut = dataclasses.replace(row, cut=shorter), True
            tokens = [tokenizer.tokenize(row) for tokenizer in tokenizers]
    except (DataError, AlignmentError) as error:
        counts.first_refusal = counts.first_refusal or str(error)
        return "refused", row
    if not all(of_model.labels.any() for of_model in tokens):
        return "no_label", row
    if cut:
        counts.add("cut", row.key)
    remarks = {remark for of_model in tokens for remark in _remarks(row, of_model)}
    for remark in sorted(remarks, key=list(REASONS).index):
        counts.add(remark, row.key)
    return None, row


def _cut(row: Row, tokens: Sequence[TokenizedRow], max_length: int) -> Cut | None:
    """The furthest place that all models reach within ``max_length``, before the present cut; None for none."""
    reached, sizes = [], [len(message.content.encode()) for message in row.messages]
    for of_model in tokens:
        last = min(len(of_model), max_length) - 1
        if len(of_model) <= max_length:
            continue
        message = int(of_model.message[last])
        if of_model.part[last] == Part.END and message + 1 < len(row.messages):
            reached.append((message + 1, 0))  # with the end of the turn
            continue
        size = min(int(of_model.ends[last]), int(of_model.lows[last]))
        reached.append((message, min(size, sizes[message])) if message < len(sizes) else (len(sizes) - 1, sizes[-1]))
    message, size = min(reached)
    if row.cut is not None and (message, size) >= tuple(row.cut):  # encoding the shorter text took as many tokens
        message, size = row.cut.message, row.cut.size - 1
        if size < 0:
            message -= 1
            if message < 0:
                return None
            size = sizes[message]
    content = row.messages[message].content.encode()
    while 0 < size < len(content) and content[size] & 0xC0 == 0x80:
        size -= 1
    return Cut(message, size) if message or size else None


def _remarks(row: Row, tokens: TokenizedRow) -> Iterator[str]:
    """What a model does not link or learn of a row."""
    inside = set(tokens.message[tokens.part == Part.CONTENT].tolist())
    ended = set(tokens.message[tokens.part == Part.END].tolist())
    whole = row.messages if row.cut is None else row.messages[: row.cut.message]
    if any(message.content.strip() and i not in inside for i, message in enumerate(whole)):
        yield "unlinked"
    if any(message.role in ("assistant", TEXT) and i not in ended for i, message in enumerate(whole)):
        yield "unended"
    for i in (i for i, message in enumerate(row.messages) if message.role == "assistant"):
        first = int(np.argmax((tokens.message == i) & (tokens.part != Part.TEMPLATE)))
        dropped = int(tokens.ends[first - 1]) if first and tokens.message[first - 1] == i else 0
        if tokens.part[first] == Part.CONTENT and row.messages[i].content.encode()[:dropped].strip():
            yield "shortened"


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
        DataError: an example is not plain text, a model has no eos, or a block is too small for a single character.
    """
    block = _Block(tokenizers, block_tokens)
    for document in documents:
        if not document.is_text:
            raise DataError(f"example {document.key} is a conversation: only plain text is packed into blocks")
        if document.context:
            raise DataError(f"example {document.key} is marked as context, but all text of a block is supervised")
        for message in document.messages:
            if message.content:
                yield from _pack(message, document.dataset, block)
    if block.messages:
        yield block.close()


class _Block:
    """A block that is being filled; tokens are counted per model."""

    def __init__(self, tokenizers: Sequence[RowTokenizer], size: int) -> None:
        self.tokenizers, self.size = tokenizers, size
        self.overhead = self.lengths(Message(FRAGMENT, ""))
        self.messages: list[Message] = []
        self.datasets: set[str] = set()
        self.used = self.overhead.copy()

    @property
    def room(self) -> IntArray:
        left: IntArray = self.size - self.used
        return left

    def lengths(self, message: Message) -> IntArray:
        return np.array([len(tokenizer.tokenize(Row((message,)))) for tokenizer in self.tokenizers])

    def take(self, message: Message, dataset: str, needs: IntArray | None = None) -> bool:
        """Add a message if there is room for it. needs: its tokens for each model, where they are known."""
        needs = self.lengths(message) - self.overhead if needs is None else needs
        if not (needs <= self.room).all():
            return False
        self.messages.append(message)
        self.datasets.add(dataset)
        self.used = self.used + needs
        return True

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
            if block.take(rest, dataset, None if start else left + (document.role == TEXT)):
                if document.role == FRAGMENT:  # what follows would look like its continuation
                    yield block.close()
                return
        first = int(np.searchsorted(borders, start, side="right"))
        fitting = first + int(np.searchsorted((tokens_at[first:-1] - read > block.room).any(axis=1), True))
        for n in reversed(range(first, fitting)):  # by itself it may take more tokens than as part of its document
            if block.take(Message(FRAGMENT, data[start : int(borders[n])].decode()), dataset):
                read, start = tokens_at[n], int(borders[n])
                break
        else:
            if not block.messages:
                raise DataError(
                    f"block_tokens {block.size} is too small: {data[start : start + 40].decode(errors='ignore')!r} has "
                    "no place within it where every model can start over"
                )
        yield block.close()
