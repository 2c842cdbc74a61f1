"""Every reach of fusekit beyond mergekit's public interface, in one place. Checked against mergekit 0.1.5.

`USED` lists the names; a test fails by name when one of them moves. Imports are local: stock mergekit imports the merge
methods, and with them this module, while its own packages are still loading.
"""

from __future__ import annotations

import importlib.resources
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

USED = (
    "mergekit.merge_methods.task_adapter.ExecuteMergeMethodTask",
    "mergekit.graph.Executor",
    "mergekit.graph.TaskUniverse",
    "mergekit.io.tasks.GatherTensors",
    "mergekit.io.tasks.LoaderCache.loaders",
    "mergekit.merge._model_out_config",
    "mergekit.card.is_hf",
    "mergekit._data.chat_templates",
)


def running_task() -> tuple[Any, Any] | None:
    """The graph's task that the calling merge method runs for, and the graph (its `tasks` are all tasks).

    They are found on the call stack: there is no other way from a method to the executor that called it. None outside
    of a graph.
    """
    from mergekit.graph import Executor
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    task = None
    for frame, _ in traceback.walk_stack(None):
        owner = frame.f_locals.get("self")
        if task is None and isinstance(owner, ExecuteMergeMethodTask):
            task = owner
        elif task is not None and isinstance(owner, Executor):
            return task, owner.universe
    return None


def loaders() -> dict[Any, Any]:
    """mergekit's loaders of weights, by model reference; a loader that is put here is used for its model."""
    from mergekit.io.tasks import LoaderCache

    found: dict[Any, Any] = LoaderCache.loaders
    return found


def out_config(config: Any, architecture: Any, trust_remote_code: bool) -> Any:
    """The transformers configuration that the merged model will get."""
    from mergekit.merge import _model_out_config

    return _model_out_config(config, architecture, trust_remote_code=trust_remote_code)


def chat_templates() -> list[str]:
    """Names of the chat templates that a recipe may give."""
    from mergekit._data import chat_templates as folder

    names = (file.name for file in importlib.resources.files(folder).iterdir())
    return sorted(name.removesuffix(".jinja") for name in names if name.endswith(".jinja"))


@contextmanager
def hub_models(is_on_hub: Callable[[str], bool]) -> Iterator[None]:
    """Let mergekit write its card with this answer to whether a model path is a repository of the hub.

    To tell a local folder with one slash in its name from a hub id, mergekit asks the hub: a merge without a network
    fails at its very last step, and names of private folders are sent out.
    """
    import mergekit.card

    original = mergekit.card.is_hf
    mergekit.card.is_hf = is_on_hub
    try:
        yield
    finally:
        mergekit.card.is_hf = original
