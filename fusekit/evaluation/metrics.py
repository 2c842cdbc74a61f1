"""Scores of a causal language model on held-out rows, by source of data."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from fusekit.capturing.engine import BATCH_TOKENS, Teacher
from fusekit.capturing.load import load_model, load_tokenizer, longest_input, valid_ids
from fusekit.capturing.models import ModelChoice, find_checkpoint
from fusekit.capturing.settings import Selection
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError
from fusekit.evaluation.generation import Question, replies
from fusekit.types import Part, Row, TokenizedRow

SLACK_TOKENS = 8
"""A reply may be that much longer than the right answer before it is stopped; it is wrong by then."""


class Score(NamedTuple):
    """A metric over some rows. value: bits per byte, or the share of exact matches. rows: how many."""

    value: float
    rows: int


def bits_per_byte(
    model: Any,
    tokenizer: RowTokenizer,
    rows: Sequence[Row],
    *,
    batch_tokens: int | None = None,
    longest: int | None = None,
    text_ends: bool = False,
) -> dict[str, Score]:
    """Bits that a model needs per byte of the contents that are learnt (the assistant's, or all of a text).

    The bits of an end of turn count, its bytes do not: a model has to know when to stop. No end of a plain text counts:
    held-out text often comes in blocks that were cut from longer ones, which no file says.

    Args:
        model: a transformers causal language model on its device, in any dtype.
        tokenizer: reads rows for it.
        rows: held-out rows.
        batch_tokens: most tokens of a batch, padding included; None for what suits the device.
        longest: tokens that the model was made for; None where that is not known.
        text_ends: also count the end of every plain text that is whole (``TEXT``, not ``FRAGMENT``).

    Returns:
        By ``Row.dataset``: summed bits over summed bytes.

    Raises:
        DataError: no row has a byte to predict, a row is too long for the model, or the model gives no distribution
            for one (names it).
        CaptureError: see :meth:`fusekit.capturing.engine.Teacher.score`.
    """
    tokens = [tokenizer.tokenize(row) for row in rows]
    _refuse_longer(rows, tokens, tokenizer.name, longest)
    if not text_ends:
        tokens = [_without_ends(read) if row.is_text else read for row, read in zip(rows, tokens, strict=True)]
    valid = valid_ids(tokenizer.tokenizer)
    teacher = Teacher(model, valid, Selection(k=1), batch_tokens=batch_tokens, name=tokenizer.name)
    scored = teacher.score(tokens, [row.dataset for row in rows])
    if scored.quarantined:
        key, why = next(iter(scored.quarantined.items()))
        broken = next(row for row in rows if row.key == key)
        raise DataError(f"{tokenizer.name} cannot be evaluated on {_called(broken)}: {why}")
    nats: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for row in scored.rows:
        nats.setdefault(row.dataset, []).append(row.cross_entropy)
        sizes[row.dataset] = sizes.get(row.dataset, 0) + row.tokens.label_bytes
    if empty := [name for name, size in sizes.items() if not size]:
        raise DataError(f"the rows of {empty[0]!r} have no byte to predict: is there an assistant's message in them?")
    return {name: Score(math.fsum(nats[name]) / math.log(2) / sizes[name], len(nats[name])) for name in sorted(nats)}


def _without_ends(tokens: TokenizedRow) -> TokenizedRow:
    return replace(tokens, labels=tokens.labels & (tokens.part != Part.END))


def ends_counted(rows: Sequence[Row]) -> dict[str, bool]:
    """By ``Row.dataset``: whether :func:`bits_per_byte` counts ends: those of turns, none of plain text."""
    return {name: any(row.dataset == name and not row.is_text for row in rows) for name in _datasets(rows)}


def _datasets(rows: Sequence[Row]) -> list[str]:
    return sorted({row.dataset for row in rows})


def exact_match(
    model: Any,
    tokenizer: RowTokenizer,
    rows: Sequence[Row],
    *,
    batch_tokens: int | None = None,
    longest: int | None = None,
) -> dict[str, Score]:
    """Share of rows whose last answer a model writes by greedy decoding, space around it aside.

    The prompt is the row up to its last answer, in the tokens of training; a reply may be :data:`SLACK_TOKENS` longer
    than the right one before it is stopped. Of the model's generation_config only its eos is heeded.

    Args:
        model, tokenizer, rows, batch_tokens, longest: as for :func:`bits_per_byte`; the last message is an assistant's.

    Raises:
        DataError: a row has no answer at its end, or is too long for the model.
        CaptureError: a row does not fit into memory alone.
    """
    asked = _answering(tokenizer)
    tokens = [asked.tokenize(row) for row in rows]
    _refuse_longer(rows, tokens, asked.name, longest)
    questions = [_question(row, read, longest) for row, read in zip(rows, tokens, strict=True)]
    # A token that is generated reads all weights, on a CPU too: many rows share the reading.
    found = replies(model, asked, questions, batch_tokens or BATCH_TOKENS)
    right = np.array([_is_right(reply, row, asked) for reply, row in zip(found, rows, strict=True)], bool)
    names = np.array([row.dataset for row in rows], dtype=object)
    return {name: Score(float(right[names == name].mean()), int((names == name).sum())) for name in _datasets(rows)}


def _answering(tokenizer: RowTokenizer) -> RowTokenizer:
    """As it reads rows of which only answers are learnt: what comes before an answer is then given, not asked for."""
    if tokenizer.train_on == "assistant":
        return tokenizer
    return RowTokenizer(tokenizer.tokenizer, tokenizer.template, "assistant", date=tokenizer.date)


def _question(row: Row, tokens: TokenizedRow, longest: int | None) -> Question:
    last = len(row.messages) - 1
    if row.messages[last].role != "assistant" or row.cut is not None:
        raise DataError(
            f"{_called(row)} ends with a message of {row.messages[last].role!r}"
            f"{' and is cut' if row.cut else ''}: exact match needs an assistant's answer at the end; leave such rows "
            "out, or measure bits_per_byte alone"
        )
    answer = np.flatnonzero(tokens.labels & (tokens.message == last))
    if not len(answer):
        raise DataError(f"{_called(row)} has no token to answer with under this template")
    prompt = tokens.ids[: answer[0]].tolist()
    ends = np.unique(tokens.ids[answer][tokens.part[answer] == Part.END]).tolist()
    room = len(answer) + SLACK_TOKENS
    return Question(prompt, room if longest is None else min(room, longest - len(prompt)), ends)


def _is_right(reply: str, row: Row, tokenizer: RowTokenizer) -> bool:
    answer = row.messages[-1].content.strip()
    if reply.strip() == answer:
        return True
    # Where the template ends a turn with text, the model writes it out, and goes on after it.
    end = tokenizer.turn_end_text
    return bool(end) and reply.lstrip().startswith(answer + end)


def _called(row: Row) -> str:
    """A row as a user finds it: its hash alone tells nobody where it is."""
    text = " ".join(row.messages[0].content.split())
    return f"row {row.key} of {row.dataset!r} ({text[:47] + '...' if len(text) > 50 else text!r})"


def _refuse_longer(rows: Sequence[Row], tokens: Sequence[TokenizedRow], name: str, longest: int | None) -> None:
    """A row longer than a model was made for has no figure that compares; left out, models are scored on other rows."""
    over = [(row, len(read)) for row, read in zip(rows, tokens, strict=True) if longest and len(read) > longest]
    if over:
        row, size = max(over, key=lambda entry: entry[1])
        raise DataError(
            f"{len(over)} of {len(rows)} held-out rows are longer than the {longest} tokens that {name} was made for "
            f"(its config.json); the longest has {size}: {_called(row)}. Leave them out or shorten them for all models"
        )


METRICS: Mapping[str, Callable[..., dict[str, Score]]] = {"bits_per_byte": bits_per_byte, "exact_match": exact_match}
"""By name: functions of a model, its RowTokenizer and rows that return scores by source of data."""


def evaluate_model(
    choice: ModelChoice,
    rows: Sequence[Row],
    *,
    metrics: Sequence[str] = ("bits_per_byte",),
    template: str = "own",
    batch_tokens: int | None = None,
    date: datetime.date | None = None,
) -> dict[str, dict[str, Score]]:
    """Load a model and score it.

    Args:
        choice: the model.
        rows: held-out rows.
        metrics: names in :data:`METRICS`.
        template: ``own`` (or the shipped one that fits), the name of a shipped template, or a jinja file.
        batch_tokens: most tokens of a batch, padding included; None for what suits the device.
        date: the day that a template prints which asks for today's; None for today.

    Returns:
        metric -> source of data -> score.

    Raises:
        DataError, CaptureError: the model does not load, a row cannot be used; unknown metric.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise DataError(f"unknown metric {unknown[0]!r}: there are {', '.join(METRICS)}")
    if not rows:
        raise DataError("no held-out row to evaluate on")
    loaded = load_scored(choice, template, rows, date)
    return {
        name: METRICS[name](loaded.model, loaded.tokenizer, rows, batch_tokens=batch_tokens, longest=loaded.longest)
        for name in metrics
    }


class Loaded(NamedTuple):
    """A model on its device, how it reads rows, and how many tokens it was made for (None: it does not say)."""

    model: Any
    tokenizer: RowTokenizer
    longest: int | None


def load_scored(
    choice: ModelChoice, template: str = "own", rows: Sequence[Row] = (), date: datetime.date | None = None
) -> Loaded:
    """Load a model to score it; ``rows`` that are too long for it are refused before its weights are read.

    date: as for :func:`evaluate_model`.

    Raises:
        DataError, CaptureError: as :func:`evaluate_model`.
    """
    checkpoint = find_checkpoint(choice)
    reads = RowTokenizer(load_tokenizer(checkpoint), ChatTemplate.chosen(template), date=date)
    longest = longest_input(checkpoint)
    if longest is not None and rows:
        _refuse_longer(rows, [reads.tokenize(row) for row in rows], choice.model, longest)
    checkpoint.fetch()
    model = load_model(checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Loaded(model, reads, longest)
