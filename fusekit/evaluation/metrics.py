"""Scores of causal language models: bits per byte and exact match on held-out examples, and tasks of lm-eval.

The first two compare models of any tokenizer: one is over bytes, the other over text.
"""

from __future__ import annotations

import copy
import datetime
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError

from fusekit.capturing.models import ModelChoice, find_checkpoint, load_model, load_tokenizer, longest_input, valid_ids
from fusekit.capturing.teacher import BATCH_TOKENS, Teacher, plan_batches
from fusekit.data.reading import files_of, read_rows
from fusekit.data.templates import ChatTemplate
from fusekit.data.tokenize import RowTokenizer
from fusekit.errors import DataError, RecipeError
from fusekit.evaluation.table import document_of
from fusekit.generation.respond import continued, eos_ids, plain_generation, prompt_of
from fusekit.settings import EvaluateSettings, LmEval, Selection
from fusekit.types import Message, Part, Row, TokenizedRow
from fusekit.yaml import nearest, setting_problem

SLACK_TOKENS = 8
"""How much longer than the right answer a reply may be before it is stopped; it is wrong by then."""

BOOTSTRAPS = 1000
"""Bootstrap draws of lm-eval for the standard error of a metric that has no formula for it."""


def evaluate(
    models: str | Path | Sequence[str | Path],
    data: str | Path | Sequence[str | Path] = (),
    *,
    chat_template: str = "own",
    load: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """Score models on held-out examples and on tasks of lm-eval.

    Args:
        models: folders, GGUF files or hub ids; one or several.
        data: files, folders or hub ids of held-out examples; may be left out where ``lm_eval`` names tasks.
        chat_template: ``own``, the name of a shipped template, or a jinja file.
        load: how to load the models, as fields of :class:`fusekit.capturing.models.ModelChoice`: ``dtype``, ...
        settings: fields of :class:`fusekit.settings.EvaluateSettings`: ``metrics``, ``limit``,
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
    models, data = ([one] if isinstance(one, (str, Path)) else one for one in (models, data))
    try:
        asked = EvaluateSettings.model_validate({**settings, "path": [str(path) for path in data]})
    except ValidationError as error:
        raise DataError("; ".join(map(setting_problem, error.errors()))) from error
    choices = [ModelChoice(str(model), **(load or {})) for model in models]
    if not choices:
        raise DataError("there is no model to evaluate")
    found: dict[str, dict[str, dict[str, float]]] = evaluate_all(choices, asked, chat_template)["models"]
    return found


def evaluate_all(choices: Sequence[ModelChoice], settings: EvaluateSettings, template: str) -> dict[str, Any]:
    """Score several models; what ``results.json`` says. Arguments and errors as for :func:`evaluate`."""
    if not settings.paths and settings.lm_eval is None:
        raise DataError("there is nothing to score models on: give held-out examples, or tasks of lm-eval")
    if settings.lm_eval is not None:
        check_tasks(settings.lm_eval, "lm_eval")
    rows = held_out_rows(settings)
    how: Any = settings.model_dump(include={"metrics", "batch_tokens"})
    scores, figures = {}, {}
    for choice in choices:
        scores[choice.model] = evaluate_model(choice, rows, template=template, **how) if settings.paths else {}
        if settings.lm_eval is not None:
            figures[choice.model] = lm_eval_figures(choice, template, settings.lm_eval)
    return document_of(scores, figures)


def evaluate_model(
    choice: ModelChoice,
    rows: Sequence[Row],
    *,
    metrics: Sequence[str] = ("bits_per_byte",),
    template: str = "own",
    batch_tokens: int | None = None,
    date: datetime.date | None = None,
) -> dict[str, dict[str, float]]:
    """Load a model and score it on held-out examples.

    Args:
        choice: the model.
        rows: held-out examples.
        metrics: names in :data:`METRICS`.
        template: ``own``, the name of a shipped template, or a jinja file.
        batch_tokens: most tokens of a batch, padding included; None for what suits the device.
        date: for templates that print today's date; None for today.

    Returns:
        metric -> source of data -> value.

    Raises:
        DataError, CaptureError: the model does not load, an example cannot be used, or there is none.
    """
    if not rows:
        raise DataError("there are no held-out examples to evaluate on")
    model, reader, longest = _load(choice, template, rows, date)
    return {name: METRICS[name](model, reader, rows, batch_tokens=batch_tokens, longest=longest) for name in metrics}


def _load(
    choice: ModelChoice, template: str, rows: Sequence[Row], date: datetime.date | None
) -> tuple[Any, RowTokenizer, int | None]:
    """A model on its device, how it reads examples, and the length of its context, None where it does not say.

    Rows that are too long for it are refused before its weights are read.
    """
    checkpoint = find_checkpoint(choice)
    reader = RowTokenizer(load_tokenizer(checkpoint), ChatTemplate.chosen(template), date=date)
    longest = longest_input(checkpoint)
    if longest is not None and rows:
        _refuse_longer(rows, [reader.tokenize(row) for row in rows], choice.model, longest)
    checkpoint.fetch()
    model = load_model(checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return model, reader, longest


def bits_per_byte(
    model: Any,
    tokenizer: RowTokenizer,
    rows: Sequence[Row],
    *,
    batch_tokens: int | None = None,
    longest: int | None = None,
) -> dict[str, float]:
    """Bits that a model needs per byte of the supervised text: the assistant's messages, or all of a plain text.

    The bits of an end of turn count, its bytes do not: a model has to know when to stop. The end of a plain text does
    not count, since held-out text often comes in blocks that were cut from longer ones.

    Args:
        model: a transformers causal language model on its device, in any dtype.
        tokenizer: reads examples for it.
        rows: held-out examples.
        batch_tokens: most tokens of a batch, padding included; None for what suits the device.
        longest: tokens that the model was made for; None where that is not known.

    Returns:
        By ``Row.dataset``: summed bits over summed bytes.

    Raises:
        DataError: there is no byte to predict, an example is too long for the model, or its distribution is non-finite.
        CaptureError: see :meth:`fusekit.capturing.teacher.Teacher.score`.
    """
    tokens = [tokenizer.tokenize(row) for row in rows]
    _refuse_longer(rows, tokens, tokenizer.name, longest)
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
    return {name: math.fsum(nats[name]) / math.log(2) / sizes[name] for name in sorted(nats)}


def exact_match(
    model: Any,
    tokenizer: RowTokenizer,
    rows: Sequence[Row],
    *,
    batch_tokens: int | None = None,
    longest: int | None = None,
) -> dict[str, float]:
    """Share of examples whose last answer a model writes by greedy decoding, ignoring space around it.

    The prompt is the example up to its last answer, in the tokens of training. A reply may be :data:`SLACK_TOKENS`
    longer than the right one before it is stopped. Of the model's generation_config only eos is used.

    Args:
        model, tokenizer, rows, batch_tokens, longest: as for :func:`bits_per_byte`; the last message is an assistant's.

    Raises:
        DataError: an example does not end with an answer, or is too long for the model.
    """
    if tokenizer.train_on != "assistant":  # what comes before an answer is given, not asked for
        tokenizer = RowTokenizer(tokenizer.tokenizer, tokenizer.template, date=tokenizer.date)
    tokens = [tokenizer.tokenize(row) for row in rows]
    _refuse_longer(rows, tokens, tokenizer.name, longest)
    questions = [_question(row, read, longest) for row, read in zip(rows, tokens, strict=True)]
    # A token that is generated reads all weights, on a CPU too: many rows share the reading.
    found = replies(model, tokenizer, questions, batch_tokens or BATCH_TOKENS)
    right: dict[str, list[bool]] = {}
    for reply, row in zip(found, rows, strict=True):
        right.setdefault(row.dataset, []).append(_is_right(reply, row, tokenizer))
    return {name: sum(of) / len(of) for name, of in sorted(right.items())}


METRICS: Mapping[str, Callable[..., dict[str, float]]] = {"bits_per_byte": bits_per_byte, "exact_match": exact_match}
"""By name: functions of a model, its RowTokenizer and examples that return scores by source of data."""


def _refuse_longer(rows: Sequence[Row], tokens: Sequence[TokenizedRow], name: str, longest: int | None) -> None:
    """Refuse examples longer than the model's context: without them, models would be scored on different examples."""
    over = [(row, len(read)) for row, read in zip(rows, tokens, strict=True) if longest and len(read) > longest]
    if over:
        row, size = max(over, key=lambda entry: entry[1])
        raise DataError(
            f"{len(over)} of {len(rows)} held-out examples are longer than the {longest} tokens of {name}'s context "
            f"(its config.json); the longest has {size}: {_called(row)}. Leave them out or shorten them for all models"
        )


def _called(row: Row) -> str:
    """An example as a user finds it: by its text, since nobody can search for its hash."""
    text = " ".join(row.messages[0].content.split())
    return f"example {row.key} of {row.dataset!r} ({text[:47] + '...' if len(text) > 50 else text!r})"


def held_out_rows(settings: EvaluateSettings, paths: list[str] | None = None) -> list[Row]:
    """The held-out examples of all paths, or of some. Raises DataError as :func:`fusekit.data.reading.read_rows`."""
    how: dict[str, Any] = settings.model_dump(include={"split", "revision", "name", "limit"})
    files = chain.from_iterable(map(files_of, settings.paths if paths is None else paths))
    return [row for file in files for row in read_rows(file, **how)]


class Question(NamedTuple):
    """What a model is asked. prompt: token ids. longest: most tokens of its reply. ends: ids that end a turn."""

    prompt: list[int]
    longest: int
    ends: list[int]


def _question(row: Row, tokens: TokenizedRow, longest: int | None) -> Question:
    last = len(row.messages) - 1
    answer = np.flatnonzero(tokens.labels & (tokens.message == last))
    if row.messages[last].role != "assistant" or row.cut is not None or not len(answer):
        raise DataError(f"{_called(row)} does not end with an assistant's answer, which exact_match needs")
    prompt = tokens.ids[: answer[0]].tolist()
    ends = np.unique(tokens.ids[answer][tokens.part[answer] == Part.END]).tolist()
    room = len(answer) + SLACK_TOKENS
    return Question(prompt, room if longest is None else min(room, longest - len(prompt)), ends)


def _is_right(reply: str, row: Row, tokenizer: RowTokenizer) -> bool:
    answer = row.messages[-1].content.strip()
    # Where a template ends turns with text instead of a token, the model writes that text and continues after it.
    end = tokenizer.turn_end_text
    return reply.strip() == answer or (bool(end) and reply.lstrip().startswith(answer + end))


def replies(model: Any, tokenizer: RowTokenizer, questions: Sequence[Question], batch_tokens: int) -> list[str]:
    """Greedy replies without special tokens, up to the end of the turn, in the order of the questions.

    batch_tokens: most tokens of a batch, padding and replies included.
    """
    written = [""] * len(questions)
    for batch in plan_batches([len(q.prompt) + q.longest for q in questions], batch_tokens):
        ends = {id_ for i in batch for id_ in questions[i].ends}.union(eos_ids(model))
        most = max(questions[i].longest for i in batch)
        found = continued(model, [questions[i].prompt for i in batch], most, ends)
        for i, reply in zip(batch, found, strict=True):
            # A batch is generated up to its longest reply: cut what a shorter one would not have written alone.
            written[i] = _text(tokenizer, reply[: questions[i].longest], ends)
    return written


def _text(tokenizer: RowTokenizer, reply: list[int], ends: Collection[int]) -> str:
    stop = next((at for at, id_ in enumerate(reply) if id_ in ends), len(reply))
    return tokenizer.encoder.surfaces.decode(reply[:stop])


# ---- lm-eval


def check_tasks(settings: LmEval, place: str = "evaluate.lm_eval") -> None:
    """Refuse tasks that lm-eval does not have, before anything is loaded or downloaded.

    place: what errors call the setting. Raises RecipeError: lm-eval is not installed, or a line for each unknown task.
    """
    if find_spec("lm_eval") is None:
        raise RecipeError(f"{place}: lm-eval is not installed: pip install 'mergekit-fusekit[lm-eval]'")
    if settings.include_path is not None and not Path(settings.include_path).expanduser().is_dir():
        raise RecipeError(f"{place}: include_path: there is no folder {settings.include_path}")
    known = task_manager(settings.include_path).all_tasks
    unknown = [name for name in settings.tasks if name not in known]
    if unknown:
        raise RecipeError("\n".join(f"{place}: lm-eval has no task {name!r}{nearest(name, known)}" for name in unknown))


@cache
def task_manager(folder: str | None) -> Any:
    """lm-eval's index of its own tasks and of those in a folder, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(Path(folder).expanduser()))


def lm_eval_figures(
    choice: ModelChoice, template: str, settings: LmEval, date: datetime.date | None = None
) -> dict[str, dict[str, Any]]:
    """Score a model on tasks of lm-eval (EleutherAI's lm-evaluation-harness).

    Args:
        choice, template, date: as for :func:`evaluate_model`. lm-eval uses the tokenizer and, if the settings ask for
            it, the chat template.
        settings: the tasks, and how they are scored.

    Returns:
        By task (a tag, or a group without figures of its own, gives several): ``metric`` (the first that the task
        lists, without the filter ``none``), its ``value``, ``stderr`` (None where there is none) and
        ``higher_is_better``; ``num_fewshot``, ``version``, and all ``metrics`` by ``name,filter``.

    Raises:
        DataError: lm-eval, a data set or the hub refuses; names task and model.
        CaptureError: the model does not load.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model, reader, _ = _load(choice, template, (), date)
    tokenizer, arguments, ends = copy.deepcopy(reader.tokenizer), {}, list[int]()  # lm-eval sets a pad token
    if settings.chat_template:
        tokenizer.chat_template = reader.template.source_on(reader.date)
        written = {"bos_token": reader.template.bos, "eos_token": reader.template.eos}
        arguments = {name: string for name, string in written.items() if string is not None}
        ends = sorted(prompt_of(reader, (Message("user", "a"),)).ends)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns once per request
    figures: dict[str, dict[str, Any]] = {}
    task = ""
    try:
        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=settings.batch_size,
            chat_template_args=arguments,
        )
        for task in settings.tasks:
            with plain_generation(model, ends):  # the task sets how answers are generated
                found = simple_evaluate(
                    model=harness,
                    tasks=[task],
                    num_fewshot=settings.num_fewshot,
                    limit=settings.limit,
                    apply_chat_template=settings.chat_template,
                    fewshot_as_multiturn=settings.chat_template,
                    task_manager=task_manager(settings.include_path),
                    log_samples=False,
                    bootstrap_iters=BOOTSTRAPS,
                )
            figures |= _figures(task, found)
    except Exception as error:  # lm-eval's own, its data sets', the hub's, asserts
        said = " ".join(str(error).split())
        raise DataError(f"lm-eval cannot score {choice.model} on {task!r}: {type(error).__name__}: {said}") from error
    return figures


def _figures(name: str, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The task's own figures if it has any, else those of each task that it stands for."""
    results = {
        task: {key: float(value) for key, value in values.items() if "," in key and isinstance(value, (int, float))}
        for task, values in found["results"].items()
    }
    named = [name] if results.get(name) else [task for task in found["configs"] if results.get(task)]
    figures = {}
    for task in named:
        metrics = {key: value for key, value in results[task].items() if "_stderr," not in key}
        listed = [entry["metric"] for entry in found["configs"].get(task, {}).get("metric_list") or []]
        first = next((key for metric in listed for key in metrics if key.split(",")[0] == metric), next(iter(metrics)))
        figures[task] = {
            "metric": first.removesuffix(",none"),
            "value": metrics[first],
            "stderr": results[task].get(first.replace(",", "_stderr,")),
            "higher_is_better": found["higher_is_better"].get(task, {}).get(first.split(",")[0]),
            "num_fewshot": found["n-shot"].get(task),
            "version": found["versions"].get(task),
            "metrics": metrics,
        }
    return figures
