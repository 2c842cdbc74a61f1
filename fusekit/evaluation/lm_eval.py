"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness), an optional extra: scores, kept per model and task."""

from __future__ import annotations

import copy
import datetime
import difflib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs
from fusekit.errors import DataError, RecipeError
from fusekit.evaluation.settings import LmEval, LmEvalTask, kept_scores

FOLDER = "lm_eval"
"""Where its scores are kept, next to those of held-out examples."""
INSTALL = "pip install 'mergekit-fusekit[lm-eval]'"

BOOTSTRAPS = 1000
"""Bootstrap draws for the standard error of a metric that has no formula for it."""

TaskScores = dict[str, dict[str, Any]]
"""By task: ``metrics`` (figures by ``metric,filter``), ``primary`` (the first one that the task lists), ``stderr`` and
``higher_is_better`` (by the same names), ``documents``, ``num_fewshot``, ``version``."""


def check(settings: LmEval, place: str = "evaluate.lm_eval") -> None:
    """Refuse what cannot be scored before anything is loaded or downloaded.

    place: what errors call the setting.

    Raises RecipeError: lm-eval is not installed, a folder does not exist, or tasks are unknown (all at once, with the
    nearest names).
    """
    if find_spec("lm_eval") is None:
        raise RecipeError(f"{place}: lm-eval is not installed: {INSTALL}, or remove {place}")
    for folder in settings.folders:
        if not Path(folder).expanduser().is_dir():
            raise RecipeError(f"{place}: include_path: there is no folder {folder} (looked from {Path.cwd()})")
    try:
        known = _index(settings).all_tasks
    except ImportError as error:
        raise RecipeError(f"{place}: lm-eval cannot be imported ({error}): {INSTALL}") from error
    lines = []
    for name in [task.task for task in settings.tasks if task.task not in known]:
        close = " or ".join(map(repr, difflib.get_close_matches(name, known, n=3)))
        hint = f"did you mean {close}?" if close else "`lm-eval ls tasks` lists all tasks"
        lines.append(f"{place}: lm-eval has no task {name!r}; {hint}")
    if lines:
        raise RecipeError("\n".join(lines))


def _index(settings: LmEval) -> Any:
    """lm-eval's TaskManager; where all tasks are the user's own, it does not read lm-eval's thousands of files."""
    folders = tuple(str(Path(folder).expanduser().resolve()) for folder in settings.folders)
    if folders:
        own = _manager(folders, False)
        found = [own.task_index.get(task.task) for task in settings.tasks]
        if all(entry is not None and entry.kind.name != "GROUP" for entry in found):  # a group may name others
            return own
    return _manager(folders, True)


@lru_cache(maxsize=8)
def _manager(folders: tuple[str, ...], with_theirs: bool) -> Any:
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=list(folders), include_defaults=with_theirs)


class Harness:
    """A model that lm-eval scores; loaded here.

    Args:
        choice, template, date: as for :func:`fusekit.evaluation.metrics.evaluate_model`. lm-eval uses the tokenizer
            and, if the settings ask for it, the chat template.
        settings: how tasks are scored.
        say: gets lines for the user.

    Raises DataError, CaptureError: the model does not load.
    """

    def __init__(
        self,
        choice: Any,
        template: str,
        settings: LmEval,
        say: Callable[[str], None],
        date: datetime.date | None = None,
    ) -> None:
        from lm_eval.models.huggingface import HFLM

        from fusekit.evaluation.metrics import load_scored, turn_ends

        model, tokenizer, _ = load_scored(choice, template, date=date)
        self.name, self.settings, self.say = tokenizer.name, settings, say
        self._model, self._ends = model, list[int]()
        reader, arguments = copy.deepcopy(tokenizer.tokenizer), {}  # lm-eval sets a pad token
        if settings.chat_template:
            reader.chat_template = tokenizer.template.source_on(tokenizer.date)
            written = {"bos_token": tokenizer.template.bos, "eos_token": tokenizer.template.eos}
            arguments = {name: string for name, string in written.items() if string is not None}
            self._ends = turn_ends(tokenizer)
        with _quiet(), self._explained("the model"):
            self._lm = HFLM(
                pretrained=model,
                tokenizer=reader,
                backend="causal",
                batch_size=settings.batch_size,
                chat_template_args=arguments,
            )

    def score(self, task: LmEvalTask) -> TaskScores:
        """Score the model on a task; a tag, or a group without figures of its own, gives several.

        Raises DataError, which names task and model: lm-eval or the data set refused, as for a data set that cannot be
        fetched, a task that runs code, or a context that is too short for the replies.
        """
        from lm_eval import simple_evaluate

        from fusekit.generation.respond import plain_generation

        settings = self.settings
        plain = plain_generation(self._model, self._ends)  # the task sets how answers are generated
        with _quiet() as heard, plain, self._explained(f"the task {task.task!r}"):
            found = simple_evaluate(
                model=self._lm,
                tasks=[task.task],
                num_fewshot=settings.num_fewshot if task.num_fewshot is None else task.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.chat_template,
                fewshot_as_multiturn=settings.chat_template,
                task_manager=_index(settings),
                log_samples=False,
                bootstrap_iters=BOOTSTRAPS,
                confirm_run_unsafe_code=settings.run_unsafe_code,
            )
        if any("runcat" in line for line in heard):
            self.say(f"{task.task}: some prompts exceed {self.name}'s context; lm-eval cut off their beginning")
        return _scores(task.task, found)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        from fusekit.devices import is_out_of_memory

        try:
            yield
        except Exception as error:  # lm-eval's own, its data sets', the hub's, asserts
            text = " ".join(str(error).split())
            hint = ""
            if is_out_of_memory(error):
                hint = f"; give a batch_size below {self.settings.batch_size}"
            elif "marked as unsafe" in text:
                hint = "; it runs code that the model wrote: allow it with run_unsafe_code, or leave the task out"
            elif isinstance(error, (ConnectionError, FileNotFoundError, TimeoutError)) or "ffline" in text:
                hint = "; its data set is downloaded from the hub once: is there a network?"
            raise DataError(
                f"lm-eval cannot score {self.name}: {what}: {type(error).__name__}: {text}{hint}"
            ) from error


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep lm-eval's warnings off the screen while the body runs (it writes one per request); yields them."""
    heard: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, keep = logging.getLogger("lm_eval"), Keep(logging.WARNING)
    before = logger.level, logger.propagate
    logger.addHandler(keep)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.removeHandler(keep)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _scores(name: str, found: Mapping[str, Any]) -> TaskScores:
    """The task's own figures if it has any, else those of each task that it stands for."""
    results = {
        task: {k: float(v) for k, v in values.items() if "," in k and isinstance(v, (int, float)) and v is not True}
        for task, values in found["results"].items()
    }
    names = [name] if results.get(name) else [task for task in found["configs"] if results.get(task)]
    if not names:
        raise DataError(f"lm-eval reports no figure for the task {name!r}")
    return {task: _score(task, results[task], found) for task in names}


def _score(task: str, values: Mapping[str, float], found: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {key: value for key, value in values.items() if not _is_error(key)}
    better = found["higher_is_better"].get(task, {})
    config = found["configs"].get(task, {})
    listed = [entry.get("metric") for entry in config.get("metric_list") or [] if isinstance(entry, Mapping)]
    first = next((key for metric in listed for key in metrics if key.split(",")[0] == metric), next(iter(metrics)))
    counts = found["n-samples"]
    parts = [task] if task in counts else list(counts)
    return {
        "metrics": metrics,
        "primary": first,
        "stderr": {key.replace("_stderr,", ","): value for key, value in values.items() if _is_error(key)},
        "higher_is_better": {key: better.get(key.split(",")[0]) for key in metrics},
        "documents": sum(int(counts[part]["effective"]) for part in parts),
        "num_fewshot": found["n-shot"].get(task),
        "version": found["versions"].get(task),
    }


def _is_error(key: str) -> bool:
    return key.partition(",")[0].endswith("_stderr")


def figure(task: LmEvalTask, name: str, score: Mapping[str, Any]) -> dict[str, Any]:
    """The one figure that tables show for a task: the metric that was asked for, or its first.

    Returns:
        ``metric`` (without the filter ``none``), ``value``, ``stderr`` (None where there is none),
        ``higher_is_better``, ``documents``, ``num_fewshot``, ``version``.

    Raises:
        DataError: the task has no such metric; names those it has.
    """
    metrics = score["metrics"]
    wanted = task.metric or score["primary"]
    key = next((key for key in metrics if wanted in (key, key.split(",")[0])), None)
    if key is None:
        raise DataError(f"lm-eval's task {name!r} has no metric {wanted!r}: there are {', '.join(metrics)}")
    return {
        "metric": key.removesuffix(",none"),
        "value": metrics[key],
        "stderr": score["stderr"].get(key),
        "higher_is_better": score["higher_is_better"].get(key),
        **{field: score[field] for field in ("documents", "num_fewshot", "version")},
    }


def folder_of(task: str) -> str:
    """Name of the folder of a task's scores."""
    return task.replace("/", "--")


def cached_scores(
    settings: LmEval,
    folder: Path,
    identity: Inputs,
    *,
    load: Callable[[], Harness],
    made: Callable[[float], Inputs],
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Figures (:func:`figure`) of one model by task, each scored once and kept in ``folder``.

    Args:
        settings: the tasks, and how they are scored.
        folder: this model's; it gets a folder per task.
        identity: what identifies the model, and how it is loaded and read.
        load: loads the model; called once, and only if a task's scores are missing.
        made: the circumstances to record, given when the task was begun (``time.monotonic``).
        say: gets a line per task that was scored.
    """
    figures: dict[str, dict[str, Any]] = {}
    harness = cache(load)

    def score(task: LmEvalTask) -> TaskScores:
        return harness().score(task)

    for task in settings.tasks:
        place, inputs = folder / folder_of(task.task), identity | _inputs(settings, task)
        scores, is_new = kept_scores(place, inputs, partial(score, task), made)
        found = {name: figure(task, name, known) for name, known in scores.items()}
        if is_new:
            say(", ".join(f"{name} {shown['metric']} {shown['value']:.4f}" for name, shown in found.items()))
        figures |= found
    return figures


def scores(choice: Any, template: str, settings: LmEval, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Figures (:func:`figure`) of a model by task. Arguments and errors as for :class:`Harness`."""
    harness = Harness(choice, template, settings, say)
    return {name: figure(task, name, score) for task in settings.tasks for name, score in harness.score(task).items()}


def described(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What ``results.json`` says about each task. figures: model -> task -> :func:`figure`.

    Returns by task: ``metric``, ``higher_is_better``, ``documents``, ``num_fewshot``, ``version``, and ``stderr`` by
    model.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for model, found in figures.items():
        for name, shown in found.items():
            plain = {field: value for field, value in shown.items() if field not in ("value", "stderr")}
            tasks.setdefault(name, plain | {"stderr": {}})["stderr"][model] = shown["stderr"]
    return tasks


def _inputs(settings: LmEval, task: LmEvalTask) -> Inputs:
    """What changes a task's figures; neither the batch size nor the choice of the figure that is shown does."""
    return {
        "task": task.task,
        "num_fewshot": settings.num_fewshot if task.num_fewshot is None else task.num_fewshot,
        "limit": settings.limit,
        "apply_chat_template": settings.chat_template,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "own_tasks": _own_tasks_hash(settings, task.task),
    }


def _own_tasks_hash(settings: LmEval, task: str) -> str | None:
    """Hash of all files in the folders of the user's own tasks, which may hold their data; None for lm-eval's tasks."""
    place = getattr(_index(settings).task_index.get(task), "yaml_path", None)
    folders = [Path(folder).expanduser().resolve() for folder in settings.folders]
    if not folders or (place is not None and not any(Path(place).resolve().is_relative_to(f) for f in folders)):
        return None
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    return artifact.joined_hash(
        f"{file.name} {artifact.file_hash(file)}" for file in files if "__pycache__" not in file.parts
    )
