"""What an evaluation is asked for: its settings, and the held-out examples that they name.

Recipes are loaded with it, so it imports neither torch nor lm-eval.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fusekit import artifacts as artifact
from fusekit.types import Row
from fusekit.yaml import Settings

PATH = "Files, folders or hub ids of examples that nothing is trained on."
_Count = Annotated[int, Field(gt=0)]


class LmEvalTask(Settings):
    """A task of lm-eval; its name alone is enough."""

    task: Annotated[str, Field(min_length=1)] = Field(description="The name of a task, a group or a tag of lm-eval.")
    metric: str | None = Field(
        default=None,
        description="The metric that tables show, as acc_norm or exact_match,flexible-extract (with its filter); null: "
        "the first that the task lists.",
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Examples in the prompt; null: as lm_eval.num_fewshot says."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler.resolve_ref_schema(handler(core_schema))]}


class LmEval(Settings):
    """Tasks of lm-eval on which every model is scored; a list of tasks alone is enough."""

    tasks: Annotated[list[LmEvalTask], Field(min_length=1)] = Field(description="The tasks, in order.")
    limit: _Count | None = Field(
        default=None, description="Most documents of each task, for a trial: figures of a part say little; null: all."
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Examples in the prompt; null: as each task says."
    )
    include_path: str | list[str] | None = Field(
        default=None, description="Folders with your own tasks (YAML); lm-eval runs the Python code that they name."
    )
    chat_template: bool = Field(
        default=False, description="Apply the model's chat template to prompts, with few-shot examples as turns."
    )
    batch_size: _Count = Field(default=8, description="Requests per batch.")
    run_unsafe_code: bool = Field(
        default=False, description="Run code that a model wrote, for tasks that lm-eval marks as unsafe (humaneval)."
    )

    @model_validator(mode="before")
    @classmethod
    def _tasks_alone(cls, value: Any) -> Any:
        if not isinstance(value, (Mapping, list, str)):
            return value
        value = value if isinstance(value, Mapping) else {"tasks": value}
        tasks = value.get("tasks")
        return {**value, "tasks": tasks.split(",")} if isinstance(tasks, str) else value

    @model_validator(mode="after")
    def _no_task_twice(self) -> LmEval:
        names = [task.task for task in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the task {twice[0]!r} is given twice")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        whole = handler.resolve_ref_schema(handler(core_schema))
        return {"anyOf": [whole["properties"]["tasks"], whole]}

    @property
    def folders(self) -> list[str]:
        """``include_path`` as a list."""
        return [self.include_path] if isinstance(self.include_path, str) else list(self.include_path or [])


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


def held_out_rows(
    path: str, *, limit: int | None = None, split: str = "test", revision: str | None = None, name: str | None = None
) -> list[Row]:
    """Read held-out examples.

    Args:
        path: a file, a folder of files, or the id of a data set on the hub.
        limit: most examples of each file, and of a data set on the hub; None for all.
        split, revision, name: of a data set on the hub; ``name`` is its configuration. The default is not ``train``,
            which the models may have learned from.

    Raises DataError as :func:`fusekit.data.reading.read_rows` does.
    """
    from fusekit.data.reading import files_of, read_rows

    how: dict[str, Any] = {"split": split, "revision": revision, "name": name, "limit": limit}
    return [row for file in files_of(path) for row in read_rows(file, **how)]


def kept_scores(
    folder: Path, inputs: artifact.Inputs, score: Callable[[], Any], made: Callable[[float], artifact.Inputs]
) -> tuple[Any, bool]:
    """The scores in a folder where they are whole and of these inputs, else those of ``score``, which are put there.

    made: the circumstances to record, given when the scoring was begun (``time.monotonic``). Returns also whether the
    scores are new. Raises StorageError for files that are not of the folder's manifest.
    """
    is_new = not artifact.is_kept(folder, inputs)
    if is_new:
        artifact.refuse_foreign(folder)  # now, not once the scores are there
        started = time.monotonic()
        text = json.dumps(score(), indent=1, ensure_ascii=False) + "\n"

        def write(into: Path) -> None:
            (into / "scores.json").write_text(text, encoding="utf-8")

        artifact.publish(folder, "evaluate", inputs, write, made(started))
    return json.loads((folder / "scores.json").read_text(encoding="utf-8")), is_new


def held_out_hash(path: str, files: str | None, limit: int | None, rows: list[Row]) -> str:
    """What identifies held-out examples: the hash of their files, else of the examples themselves.

    A data set on the hub can change under its name, and with a limit a folder gives the beginning of each file.

    Args:
        path: where the examples were read from.
        files: hash of the file or the folder; None for the hub.
        limit: most examples of each file.
        rows: the examples.
    """
    if files is not None and (limit is None or not Path(path).expanduser().is_dir()):
        return files
    return artifact.joined_hash(f"{row.key} {row.dataset!a}" for row in rows)
