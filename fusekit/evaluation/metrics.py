"""Scores of a causal language model on held-out rows, by source of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fusekit.errors import DataError
from fusekit.representation.batches import plan_batches
from fusekit.representation.chat_template import ChatTemplate
from fusekit.representation.checkpoint import ModelChoice, find_checkpoint
from fusekit.representation.load import load_model, load_tokenizer
from fusekit.representation.row_tokenizer import RowTokenizer
from fusekit.representation.rows import Row
from fusekit.representation.teacher import DEFAULT_BATCH_TOKENS, Teacher
from fusekit.representation.tokenized_row import Part
from fusekit.representation.topk import Selection

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
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> dict[str, Score]:
    """Bits that a model needs per byte of the contents that are learnt (the assistant's, or all of a text).

    The bits of an end of turn count, its bytes do not: a model has to know when to stop.

    Args:
        model: a transformers causal language model on its device, in any dtype.
        tokenizer: reads rows for it.
        rows: held-out rows.
        batch_tokens: most tokens of a batch, padding included.

    Returns:
        By ``Row.dataset``: summed bits over summed bytes.

    Raises:
        DataError: no row has a byte to predict, or the model gives no distribution for a row (names it).
        CaptureError: see :meth:`fusekit.representation.teacher.Teacher.score`.
    """
    teacher = Teacher(model, _valid_ids(tokenizer), Selection(k=1), batch_tokens=batch_tokens, name=tokenizer.name)
    scored = teacher.score([tokenizer.tokenize(row) for row in rows], [row.dataset for row in rows])
    if scored.quarantined:
        key, why = next(iter(scored.quarantined.items()))
        raise DataError(f"{tokenizer.name} cannot be evaluated on row {key}: {why}")
    nats: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for row in scored.rows:
        nats.setdefault(row.dataset, []).append(row.cross_entropy)
        sizes[row.dataset] = sizes.get(row.dataset, 0) + row.tokens.label_bytes
    if empty := [name for name, size in sizes.items() if not size]:
        raise DataError(f"the rows of {empty[0]!r} have no byte to predict: is there an assistant's message in them?")
    return {name: Score(math.fsum(nats[name]) / math.log(2) / sizes[name], len(nats[name])) for name in sorted(nats)}


def exact_match(
    model: Any,
    tokenizer: RowTokenizer,
    rows: Sequence[Row],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> dict[str, Score]:
    """Share of rows whose last answer a model writes by greedy decoding, space around it aside.

    The prompt is the row up to its last answer, in the tokens of training; a reply may be :data:`SLACK_TOKENS` longer
    than the right one before it is stopped.

    Args:
        model, tokenizer, rows, batch_tokens: as for :func:`bits_per_byte`; the last message is an assistant's.

    Raises:
        DataError: a row has no answer at its end.
    """
    questions = [_question(row, tokenizer) for row in rows]
    budget = [len(question.prompt) + question.longest for question in questions]
    right = np.zeros(len(rows), bool)
    for batch in plan_batches(budget, batch_tokens):
        replies = _replies(model, tokenizer, [questions[i] for i in batch])
        right[batch] = [reply == questions[i].answer for i, reply in zip(batch, replies, strict=True)]
    names = np.array([row.dataset for row in rows], dtype=object)
    return {
        name: Score(float(right[names == name].mean()), int((names == name).sum()))
        for name in sorted({row.dataset for row in rows})
    }


class _Question(NamedTuple):
    prompt: list[int]
    answer: str
    longest: int
    ends: list[int]


def _question(row: Row, tokenizer: RowTokenizer) -> _Question:
    last = len(row.messages) - 1
    if row.messages[last].role != "assistant" or row.cut is not None:
        raise DataError(
            f"row {row.key} of {row.dataset!r} ends with a message of {row.messages[last].role!r}"
            f"{' and is cut' if row.cut else ''}: exact match needs an assistant's answer at the end; leave such rows "
            "out, or measure bits_per_byte alone"
        )
    tokens = tokenizer.tokenize(row)
    answer = np.flatnonzero(tokens.labels & (tokens.message == last))
    if not len(answer):
        raise DataError(f"row {row.key} of {row.dataset!r} has no token to answer with under this template")
    prompt = tokens.ids[: answer[0]].tolist()
    ends = np.unique(tokens.ids[answer][tokens.part[answer] == Part.END]).tolist()
    return _Question(prompt, row.messages[last].content.strip(), len(answer) + SLACK_TOKENS, ends)


@torch.inference_mode()
def _replies(model: Any, tokenizer: RowTokenizer, questions: Sequence[_Question]) -> list[str]:
    """Greedy replies, up to the end of the turn."""
    width = max(len(question.prompt) for question in questions)
    ends = sorted({id_ for question in questions for id_ in question.ends} | set(_eos_ids(model)))
    device = model.get_input_embeddings().weight.device
    # What stands before a prompt is masked: any token does.
    ids = torch.tensor([[q.prompt[0]] * (width - len(q.prompt)) + q.prompt for q in questions], device=device)
    mask = torch.tensor([[0] * (width - len(q.prompt)) + [1] * len(q.prompt) for q in questions], device=device)
    stop: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": ends[0]} if ends else {"pad_token_id": 0}
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max(question.longest for question in questions),
        **stop,
    )[:, width:].tolist()
    return [_text(tokenizer, reply, ends) for reply in written]


def _text(tokenizer: RowTokenizer, reply: list[int], ends: Sequence[int]) -> str:
    stop = next((at for at, id_ in enumerate(reply) if id_ in ends), len(reply))
    text: str = tokenizer.tokenizer.decode(reply[:stop], skip_special_tokens=True)
    return text.strip()


def _eos_ids(model: Any) -> list[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    return [found] if isinstance(found, int) else list(found or [])


def _valid_ids(tokenizer: RowTokenizer) -> Any:
    return np.unique(np.fromiter(tokenizer.tokenizer.get_vocab().values(), np.int64))


METRICS: Mapping[str, Callable[..., dict[str, Score]]] = {"bits_per_byte": bits_per_byte, "exact_match": exact_match}
"""By name: functions of a model, its RowTokenizer and rows that return scores by source of data."""


def evaluate_model(
    choice: ModelChoice,
    rows: Sequence[Row],
    *,
    metrics: Sequence[str] = ("bits_per_byte",),
    template: str = "own",
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> dict[str, dict[str, Score]]:
    """Load a model and score it.

    Args:
        choice: the model.
        rows: held-out rows.
        metrics: names in :data:`METRICS`.
        template: ``own`` (or the shipped one that fits), the name of a shipped template, or a jinja file.
        batch_tokens: most tokens of a batch, padding included.

    Returns:
        metric -> source of data -> score.

    Raises:
        DataError, CaptureError: the model does not load, a row cannot be used; unknown metric.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise DataError(f"unknown metric {unknown[0]!r}: there are {', '.join(METRICS)}")
    if not rows:
        raise DataError("no held-out row to evaluate on")
    checkpoint = find_checkpoint(choice)
    checkpoint.fetch()
    tokenizer = load_tokenizer(checkpoint)
    reads = RowTokenizer(tokenizer, ChatTemplate.chosen(template))
    model = load_model(checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {name: METRICS[name](model, reads, rows, batch_tokens=batch_tokens) for name in metrics}
