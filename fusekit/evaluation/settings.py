"""What an evaluation is asked for: its settings, and the held-out examples and the tasks of lm-eval that they name.

Recipes are loaded with it, so it imports neither torch nor lm-eval.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fusekit.errors import RecipeError
from fusekit.types import Row
from fusekit.yaml import Settings, nearest

PATH = "Files, folders or hub ids of examples that nothing is trained on."
_Count = Annotated[int, Field(gt=0)]


class LmEval(Settings):
    """Tasks of lm-eval on which every model is scored; a list of tasks alone is enough."""

    tasks: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = Field(
        description="Names of tasks, groups or tags of lm-eval."
    )
    limit: _Count | None = Field(
        default=None, description="Most documents of each task, for a trial: figures of a part say little; null: all."
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Examples in the prompt; null: as each task says."
    )
    include_path: str | None = Field(
        default=None, description="Folder with your own tasks (YAML); lm-eval runs the Python code that they name."
    )
    chat_template: bool = Field(
        default=False, description="Apply the model's chat template to prompts, with few-shot examples as turns."
    )
    batch_size: _Count = Field(default=8, description="Requests per batch.")

    @model_validator(mode="before")
    @classmethod
    def _tasks_alone(cls, value: Any) -> Any:
        if not isinstance(value, (Mapping, list, str)):
            return value
        value = value if isinstance(value, Mapping) else {"tasks": value}
        tasks = value.get("tasks")
        return {**value, "tasks": tasks.split(",")} if isinstance(tasks, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        whole = handler.resolve_ref_schema(handler(core_schema))
        return {"anyOf": [whole["properties"]["tasks"], whole]}


class EvaluateSettings(Settings):
    """Held-out examples, and what is measured on them; also a recipe's section ``evaluate``."""

    path: str | list[str] = Field(default=[], description=PATH)
    name: str | None = Field(default=None, description="Configuration of a data set on the hub.")
    split: str = Field(default="test", description="Split of a data set on the hub.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a data set on the hub.")
    metrics: list[Literal["bits_per_byte", "exact_match"]] = Field(
        default=["bits_per_byte"],
        description="What to measure; `exact_match` generates the answers and takes longer.",
    )
    limit: _Count | None = Field(
        default=None, description="Most examples of each file, also of each file in a folder; null: all."
    )
    batch_tokens: _Count | None = Field(
        default=None, description="Tokens per batch, padding included; null: what suits the device."
    )
    lm_eval: LmEval | None = Field(
        default=None, description="Tasks of lm-eval, `[hellaswag, gsm8k]` (pip install 'mergekit-fusekit[lm-eval]')."
    )

    @property
    def paths(self) -> list[str]:
        """``path`` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path)


def held_out_rows(settings: EvaluateSettings, paths: list[str] | None = None) -> list[Row]:
    """The held-out examples of all paths, or of some. Raises DataError as :func:`fusekit.data.reading.read_rows`."""
    from fusekit.data.reading import files_of, read_rows

    how: dict[str, Any] = settings.model_dump(include={"split", "revision", "name", "limit"})
    files = chain.from_iterable(map(files_of, settings.paths if paths is None else paths))
    return [row for file in files for row in read_rows(file, **how)]


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
