"""What the recipe's line ``evaluate.lm_eval`` may say. It is read with the recipe: no torch, no lm-eval here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LmEvalTask(_Section):
    """A task of lm-eval; its name alone will do.

    Attributes:
        task: the name of a task, a group or a tag.
        metric: which of its metrics is its figure, as ``acc_norm``, or with a filter as
            ``exact_match,flexible-extract``; None: the first that the task lists, with its first filter.
        num_fewshot: examples in the prompt; None: as ``LmEval.num_fewshot`` says.
    """

    task: Annotated[str, Field(min_length=1)] = Field(description="The name of a task, a group or a tag of lm-eval.")
    metric: str | None = Field(default=None, description="As acc_norm; null: the first that the task lists.")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Examples in the prompt.")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler.resolve_ref_schema(handler(core_schema))]}


class LmEval(_Section):
    """Tasks of lm-eval on which every model is scored; a list of tasks alone will do.

    Attributes:
        tasks: what is scored, in order.
        limit: most documents of each task; None: all. For a try: figures of a part say little.
        num_fewshot: examples in the prompt; None: as each task says.
        include_path: folders with tasks of one's own (YAML). lm-eval runs Python code that they name.
        chat_template: put prompts into the model's chat template, and examples into turns of their own.
        batch_size: rows at a time.
        run_unsafe_code: run what a model wrote, for tasks that lm-eval marks as unsafe (humaneval).
    """

    tasks: Annotated[list[LmEvalTask], Field(min_length=1)] = Field(description="What is scored.")
    limit: Annotated[int, Field(gt=0)] | None = Field(default=None, description="Most documents of each task.")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Examples in the prompt; null: as each task says."
    )
    include_path: str | list[str] | None = Field(default=None, description="Folders with tasks of your own.")
    chat_template: bool = Field(default=False, description="Put prompts into the model's chat template.")
    batch_size: Annotated[int, Field(gt=0)] = Field(default=8, description="Rows at a time.")
    run_unsafe_code: bool = Field(default=False, description="Run code that a model wrote, where a task does so.")

    @model_validator(mode="before")
    @classmethod
    def _tasks_alone(cls, value: Any) -> Any:
        if not isinstance(value, (Mapping, list, str)):
            return value
        value = value if isinstance(value, Mapping) else {"tasks": value}
        tasks = value.get("tasks")
        return {**value, "tasks": [tasks]} if isinstance(tasks, str) else value

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
