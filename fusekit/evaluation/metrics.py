"""Scores of causal language models on held-out examples: bits per byte, and exact match by greedy generation.

Both compare models of any tokenizer: the first is over bytes, the second over text.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fusekit.capturing.engine import BATCH_TOKENS, Teacher, plan_batches
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_model, load_tokenizer, longest_input, valid_ids
from fusekit.capturing.settings import Selection
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.devices import is_out_of_memory, release
from fusekit.errors import CaptureError, DataError
from fusekit.evaluation import lm_eval
from fusekit.evaluation.settings import EvaluateSettings, LmEval, held_out_rows
from fusekit.generation.respond import continued, device_of, eos_ids, prompt_of
from fusekit.types import Message, Part, Row, TokenizedRow

SLACK_TOKENS = 8
"""How much longer than the right answer a reply may be before it is stopped; it is wrong by then."""


class Score(NamedTuple):
    """A metric over some examples. value: bits per byte, or the share of exact matches. rows: how many examples."""

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
    """Bits that a model needs per byte of the supervised text: the assistant's messages, or all of a plain text.

    The bits of an end of turn count, its bytes do not: a model has to know when to stop. The end of a plain text does
    not count, since held-out text often comes in blocks that were cut from longer ones.

    Args:
        model: a transformers causal language model on its device, in any dtype.
        tokenizer: reads examples for it.
        rows: held-out examples.
        batch_tokens: most tokens of a batch, padding included; None for what suits the device.
        longest: tokens that the model was made for; None where that is not known.
        text_ends: also count the end of every whole plain text (``TEXT``, not ``FRAGMENT``).

    Returns:
        By ``Row.dataset``: summed bits over summed bytes.

    Raises:
        DataError: there is no byte to predict, an example is too long for the model, or its distribution is non-finite.
        CaptureError: see :meth:`fusekit.capturing.engine.Teacher.score`.
    """
    tokens = [tokenizer.tokenize(row) for row in rows]
    _refuse_longer(rows, tokens, tokenizer.name, longest)
    if not text_ends:
        tokens = [
            replace(read, labels=read.labels & (read.part != Part.END)) if row.is_text else read
            for row, read in zip(rows, tokens, strict=True)
        ]
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
        raise DataError(f"the examples of {empty[0]!r} have no byte to predict: do they have an assistant's message?")
    return {name: Score(math.fsum(nats[name]) / math.log(2) / sizes[name], len(nats[name])) for name in sorted(nats)}


def ends_counted(rows: Sequence[Row]) -> dict[str, bool]:
    """By ``Row.dataset``: whether :func:`bits_per_byte` counts ends (of turns), or not (of plain text)."""
    chats = {row.dataset for row in rows if not row.is_text}
    return {name: name in chats for name in sorted({row.dataset for row in rows})}


def exact_match(
    model: Any,
    tokenizer: RowTokenizer,
    rows: Sequence[Row],
    *,
    batch_tokens: int | None = None,
    longest: int | None = None,
) -> dict[str, Score]:
    """Share of examples whose last answer a model writes by greedy decoding, ignoring space around it.

    The prompt is the example up to its last answer, in the tokens of training. A reply may be :data:`SLACK_TOKENS`
    longer than the right one before it is stopped. Of the model's generation_config only eos is used.

    Args:
        model, tokenizer, rows, batch_tokens, longest: as for :func:`bits_per_byte`; the last message is an assistant's.

    Raises:
        DataError: an example does not end with an answer, or is too long for the model.
        CaptureError: an example does not fit into memory alone.
    """
    asked = tokenizer
    if tokenizer.train_on != "assistant":  # what comes before an answer is given, not asked for
        asked = RowTokenizer(tokenizer.tokenizer, tokenizer.template, "assistant", date=tokenizer.date)
    tokens = [asked.tokenize(row) for row in rows]
    _refuse_longer(rows, tokens, asked.name, longest)
    questions = [_question(row, read, longest) for row, read in zip(rows, tokens, strict=True)]
    # A token that is generated reads all weights, on a CPU too: many rows share the reading.
    found = replies(model, asked, questions, batch_tokens or BATCH_TOKENS)
    right: dict[str, list[bool]] = {}
    for reply, row in zip(found, rows, strict=True):
        right.setdefault(row.dataset, []).append(_is_right(reply, row, asked))
    return {name: Score(sum(of) / len(of), len(of)) for name, of in sorted(right.items())}


class Question(NamedTuple):
    """What a model is asked. prompt: token ids. longest: most tokens of its reply. ends: ids that end a turn."""

    prompt: list[int]
    longest: int
    ends: list[int]


def _question(row: Row, tokens: TokenizedRow, longest: int | None) -> Question:
    last = len(row.messages) - 1
    if row.messages[last].role != "assistant" or row.cut is not None:
        raise DataError(
            f"{_called(row)} ends with a message of {row.messages[last].role!r}{' and is cut' if row.cut else ''}: "
            "exact_match needs an assistant's answer at the end; leave such examples out, or use bits_per_byte alone"
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
    # Where a template ends turns with text instead of a token, the model writes that text and continues after it.
    end = tokenizer.turn_end_text
    return bool(end) and reply.lstrip().startswith(answer + end)


def _called(row: Row) -> str:
    """An example as a user finds it: by its text, since nobody can search for its hash."""
    text = " ".join(row.messages[0].content.split())
    return f"example {row.key} of {row.dataset!r} ({text[:47] + '...' if len(text) > 50 else text!r})"


def _refuse_longer(rows: Sequence[Row], tokens: Sequence[TokenizedRow], name: str, longest: int | None) -> None:
    """Refuse examples longer than the model's context: without them, models would be scored on different examples."""
    over = [(row, len(read)) for row, read in zip(rows, tokens, strict=True) if longest and len(read) > longest]
    if over:
        row, size = max(over, key=lambda entry: entry[1])
        raise DataError(
            f"{len(over)} of {len(rows)} held-out examples are longer than the {longest} tokens of {name}'s context "
            f"(its config.json); the longest has {size}: {_called(row)}. Leave them out or shorten them for all models"
        )


def replies(model: Any, tokenizer: RowTokenizer, questions: Sequence[Question], batch_tokens: int) -> list[str]:
    """Greedy replies, up to the end of the turn, in the order of the questions.

    Of the model's generation_config only eos is used: neither sampling nor a repetition penalty.

    Args:
        model: a transformers causal language model on its device(s).
        tokenizer: reads examples for it; its special tokens are left out of the replies.
        questions: the prompts.
        batch_tokens: most tokens of a batch, padding and replies included.

    Raises:
        CaptureError: one question does not fit into memory alone.
    """
    written = [""] * len(questions)
    waiting = plan_batches([len(q.prompt) + q.longest for q in questions], batch_tokens)[::-1]
    while waiting:
        batch, failure = waiting.pop(), None
        try:
            for index, text in zip(batch, _replies(model, tokenizer, [questions[i] for i in batch]), strict=True):
                written[index] = text
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = " ".join(str(error).split()) or type(error).__name__  # a MemoryError may say nothing
        if failure is not None:
            release(device_of(model))
            if len(batch) == 1:
                question = questions[batch[0]]
                raise CaptureError(
                    f"{tokenizer.name}: a prompt of {len(question.prompt)} tokens and a reply of {question.longest} do "
                    f"not fit into memory even alone ({failure}): load the model in less memory (dtype bfloat16, "
                    "quantization) or over several devices (device_map auto)"
                )
            half = (len(batch) + 1) // 2
            waiting += [batch[half:], batch[:half]]
    return written


def _replies(model: Any, tokenizer: RowTokenizer, questions: Sequence[Question]) -> list[str]:
    ends = {id_ for question in questions for id_ in question.ends}.union(eos_ids(model))
    most = max(question.longest for question in questions)
    found = continued(model, [question.prompt for question in questions], most, ends)
    # A batch is generated up to its longest reply: cut what a shorter one would not have written alone.
    return [_text(tokenizer, reply[: q.longest], ends) for reply, q in zip(found, questions, strict=True)]


def _text(tokenizer: RowTokenizer, reply: list[int], ends: Collection[int]) -> str:
    stop = next((at for at, id_ in enumerate(reply) if id_ in ends), len(reply))
    return tokenizer.encoder.surfaces.decode(reply[:stop])


def turn_ends(tokenizer: RowTokenizer) -> list[int]:
    """The ids that end an assistant's turn under a tokenizer's template; none where text ends it."""
    try:
        return sorted(prompt_of(tokenizer, (Message("user", "a"),)).ends)
    except DataError:
        return []


METRICS: Mapping[str, Callable[..., dict[str, Score]]] = {"bits_per_byte": bits_per_byte, "exact_match": exact_match}
"""By name: functions of a model, its RowTokenizer and examples that return scores by source of data."""


def evaluate(
    models: str | Path | Sequence[str | Path],
    data: str | Path | Sequence[str | Path] = (),
    *,
    chat_template: str = "own",
    notify: Callable[[str], None] = lambda _line: None,
    load: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """Score models on held-out examples and on tasks of lm-eval.

    Args:
        models: folders, GGUF files or hub ids; one or several.
        data: files, folders or hub ids of held-out examples; may be left out where ``lm_eval`` names tasks.
        chat_template: ``own``, the name of a shipped template, or a jinja file.
        notify: gets a line about what the user should know.
        load: how to load the models, as fields of :class:`fusekit.capturing.models.ModelChoice`: ``dtype``, ...
        settings: fields of :class:`fusekit.evaluation.settings.EvaluateSettings`: ``metrics``, ``limit``,
            ``lm_eval``, ...

    Returns:
        model -> metric -> skill -> value, as ``results.json`` has it: bits per byte, the share of exact matches, and
        the figure of each task of lm-eval. A skill is the ``dataset`` field of the examples, else their file's name.

    Raises:
        DataError, CaptureError: a model does not load, or an example cannot be used.
        RecipeError: lm-eval is not installed, or has no such task.

    Example:
        >>> from pathlib import Path
        >>> from fusekit.evaluation import evaluate
        >>> file = Path("sums.jsonl")
        >>> _ = file.write_text('{"messages": [{"role": "user", "content": "57+68="}, '
        ...                     '{"role": "assistant", "content": "125"}]}')
        >>> evaluate("demo/models/numbers", file, metrics=["exact_match"])
        {'demo/models/numbers': {'exact_match': {'sums': 1.0}}}
    """
    asked = EvaluateSettings.model_validate({**settings, "path": [str(path) for path in _several(data)]})
    choices = [ModelChoice(str(model), **(load or {})) for model in _several(models)]
    document = evaluate_all(choices, asked, chat_template, notify)
    found: dict[str, dict[str, dict[str, float]]] = document["models"]
    return found


def _several(values: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [values] if isinstance(values, (str, Path)) else values


def evaluate_all(
    choices: Sequence[ModelChoice], settings: EvaluateSettings, template: str, notify: Callable[[str], None]
) -> dict[str, Any]:
    """Score several models; what ``results.json`` says. Arguments and errors as for :func:`evaluate`."""
    if not settings.paths and settings.lm_eval is None:
        raise DataError("there is nothing to score models on: give held-out examples, or tasks of lm-eval")
    if settings.lm_eval is not None:
        lm_eval.check(settings.lm_eval, "lm_eval")
    how: dict[str, Any] = settings.model_dump(include={"limit", "split", "revision", "name"})
    rows = list(chain.from_iterable(held_out_rows(path, **how) for path in settings.paths))
    models = {choice.model: choice for choice in choices}
    asked: dict[str, Any] = settings.model_dump(include={"metrics", "batch_tokens"})
    return results_of(
        models,
        settings,
        rows,
        lambda name: values_of(evaluate_model(models[name], rows, template=template, **asked)),
        lambda name, tasks: lm_eval.scores(models[name], template, tasks, notify),
    )


def results_of(
    models: Iterable[str],
    settings: EvaluateSettings,
    rows: Sequence[Row],
    scores: Callable[[str], dict[str, Any]],
    figures: Callable[[str, LmEval], dict[str, Any]],
) -> dict[str, Any]:
    """What ``results.json`` says of some models.

    Args:
        models: their names.
        settings: what is measured.
        rows: the held-out examples.
        scores: of a model on them, by metric and skill.
        figures: of a model on tasks of lm-eval, by task (:func:`fusekit.evaluation.lm_eval.figure`).
    """
    results: dict[str, dict[str, Any]] = {}
    shown: dict[str, dict[str, Any]] = {}
    for name in models:
        results[name] = scores(name) if settings.paths else {}
        if settings.lm_eval is not None:
            shown[name] = figures(name, settings.lm_eval)
            results[name]["lm_eval"] = {task: known["value"] for task, known in shown[name].items()}
    document: dict[str, Any] = {"models": results}
    if settings.paths and "bits_per_byte" in settings.metrics:
        document["ends_counted"] = ends_counted(rows)
    return document | ({"lm_eval": lm_eval.described(shown)} if shown else {})


def values_of(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, float]]:
    """The values of scores, by metric and skill."""
    return {metric: {skill: score.value for skill, score in found.items()} for metric, found in scores.items()}


def evaluate_model(
    choice: ModelChoice,
    rows: Sequence[Row],
    *,
    metrics: Sequence[str] = ("bits_per_byte",),
    template: str = "own",
    batch_tokens: int | None = None,
    date: datetime.date | None = None,
) -> dict[str, dict[str, Score]]:
    """Load a model and score it on held-out examples.

    Args:
        choice: the model.
        rows: held-out examples.
        metrics: names in :data:`METRICS`.
        template: ``own`` (or the shipped one that fits), the name of a shipped template, or a jinja file.
        batch_tokens: most tokens of a batch, padding included; None for what suits the device.
        date: for templates that print today's date; None for today.

    Returns:
        metric -> source of data -> score.

    Raises:
        DataError, CaptureError: the model does not load, an example cannot be used, or there is none.
    """
    if not rows:
        raise DataError("there is no held-out example to evaluate on")
    model, reads, longest = load_scored(choice, template, rows, date)
    return {
        name: METRICS[name](model, reads, rows, batch_tokens=batch_tokens, longest=longest)
        for name in dict.fromkeys(metrics)
    }


def load_scored(
    choice: ModelChoice, template: str = "own", rows: Sequence[Row] = (), date: datetime.date | None = None
) -> tuple[Any, RowTokenizer, int | None]:
    """A model on its device, how it reads examples, and the length of its context, None where it does not say.

    ``rows`` that are too long for it are refused before its weights are read; else as for :func:`evaluate_model`.
    """
    checkpoint = find_checkpoint(choice)
    reads = RowTokenizer(load_tokenizer(checkpoint), ChatTemplate.chosen(template), date=date)
    longest = longest_input(checkpoint)
    if longest is not None and rows:
        _refuse_longer(rows, [reads.tokenize(row) for row in rows], choice.model, longest)
    checkpoint.fetch()
    model = load_model(checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return model, reads, longest
