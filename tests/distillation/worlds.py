"""A small world to distil in: rows of text, two tokenizers that cut it differently, and what models say about it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from fusekit.alignment.ends import tokenize
from fusekit.alignment.vocabulary_map import VocabularyMap, build_vocabulary_map
from fusekit.types import FRAGMENT, TEXT, CapturedRow, Message, Part, Row, TokenizedRow, TopK

SPECIALS = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<end>")
ENGLISH = "the a fusion of several models learns what each model knows and none of them forgets where two texts part"
OTHERS = "naïve café résumé 東京 大阪 🙂 👩‍🚀 x=1; y+=x; return(x) 12 345 6789"
WORDS = np.array([*ENGLISH.split(), *OTHERS.split()])


@functools.cache
def tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; another ``size`` cuts text differently."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=size < 400)
    backend.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(size)
    backend.train_from_iterator([" ".join(rng.choice(WORDS, 40)) for _ in range(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


PIVOT, SOURCE = tokenizer(320), tokenizer(420)
ROLES = {"end_of_turn": PIVOT.convert_tokens_to_ids("<end>")}


@functools.cache
def vocabulary_map(method: str = "prefix", pivot: Any = PIVOT, source: Any = SOURCE) -> VocabularyMap:
    """A map of one of the tokenizers here into another."""
    return build_vocabulary_map(pivot, source, method=method, pivot_roles=ROLES, source_roles=ROLES, cache=False)


def conversations(count: int, seed: int = 0) -> list[Row]:
    """Questions and answers of random words; every third has two turns."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, 12)))

    rows = []
    for number in range(count):
        messages = [Message("user", text()), Message("assistant", text())]
        if number % 3 == 0:
            messages += [Message("user", text()), Message("assistant", " " + text())]
        rows.append(Row(tuple(messages), dataset="odd" if number % 2 else "even"))
    return rows


def read(row: Row, tokenizer: Any, limit: tuple[int, int] | None = None) -> TokenizedRow:
    """A row as a model reads it: bos, then of every message a role token, the content and the end of turn.

    limit: (message, bytes): only tokens that end there or before.
    """
    ids, message, part, ends, lows, labels = [], [], [], [], [], []

    def add(id_: int, number: int, kind: Part, end: int, low: int, label: bool) -> None:
        if limit is None or (number, end + (kind == Part.END)) <= limit:
            ids.append(id_), message.append(number), part.append(kind)
            ends.append(end), lows.append(low), labels.append(label and len(ids) > 1)

    known = tokenizer.convert_tokens_to_ids
    add(known("<bos>"), 0, Part.TEMPLATE, 0, 0, False)
    for number, (role, content) in enumerate(row.messages):
        learned = role in ("assistant", TEXT, FRAGMENT)
        if role in ("user", "assistant"):
            add(known(f"<{role}>"), number, Part.TEMPLATE, 0, 0, False)
        text = tokenize(content, tokenizer)
        for id_, end, low in zip(text.ids.tolist(), text.ends.tolist(), text.lows.tolist(), strict=True):
            add(id_, number, Part.CONTENT, end, low, learned)
        size = len(content.encode())
        if role != FRAGMENT:
            add(known("<eos>" if role == TEXT else "<end>"), number, Part.END, size, size, learned)
    arrays = [np.array(values, np.int64) for values in (ids, message, part, ends)]
    same = lows == ends
    return TokenizedRow(row.key, *arrays, arrays[3] if same else np.array(lows, np.int64), np.array(labels, bool))


class Reader:
    """What the trainer needs of a row tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def tokenize(self, row: Row) -> TokenizedRow:
        """See :func:`read`."""
        return read(row, self.tokenizer)


def certain(tokens: TokenizedRow) -> CapturedRow:
    """A model that knows the text: every row is its label."""
    labels = tokens.ids[tokens.label_positions]
    n = len(labels)
    return CapturedRow(tokens, "", TopK(labels[:, None], np.zeros((n, 1)), np.zeros(n)), np.zeros(n), 0.0)


def guessing(tokens: TokenizedRow, vocabulary: int, k: int = 4, seed: int = 0, sharpness: float = 1.0) -> CapturedRow:
    """A model with random opinions: the top k of random distributions over the vocabulary."""
    rng = np.random.default_rng(seed)
    labels = tokens.ids[tokens.label_positions]
    n = len(labels)
    scores = rng.normal(0, 2, (n, vocabulary))
    scores[np.arange(n), labels] += sharpness
    logprobs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    top = np.take_along_axis(logprobs, ids, 1)
    actual = logprobs[np.arange(n), labels]
    tail = np.maximum(1 - np.exp(top).sum(axis=1), 0.0)
    return CapturedRow(tokens, "", TopK(ids, top, tail), actual, float(-actual.sum()))


def masses(rows: TopK, at: int) -> dict[int, float]:
    """{id: probability} of the entries of one row."""
    return {int(i): math.exp(p) for i, p in zip(rows.ids[at], rows.logprobs[at], strict=True) if i >= 0}


def captured(
    rows: Sequence[Row], tokenizer: Any, k: int = 4, seed: int = 0, sharpness: float = 1.0
) -> dict[str, CapturedRow]:
    """What a model with random opinions says about rows, as a data set takes it."""
    return by_key([guessing(read(row, tokenizer), len(tokenizer), k, seed, sharpness) for row in rows])


def by_key(rows: Sequence[CapturedRow]) -> dict[str, CapturedRow]:
    """Rows as a data set takes them."""
    return {row.tokens.key: row for row in rows}
