"""The models that a recipe names, and a configuration in which every name stands for one folder on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from pydantic import BaseModel

from fusekit.yaml import KeyPath


class PinnedModel(ModelReference):
    """A model reference whose ``model.path`` is the folder on disk, and whose name is what the recipe says.

    mergekit looks a hub id up again at every step (and even to print a card); pinned, the recipe means one commit from
    the first check to the last file, and nothing asks the network. Tensors come from the loader that was registered
    for the model, so that headers can be planned with before the weights are here.
    """

    spelling: str

    def __str__(self) -> str:
        return self.spelling

    def lazy_loader(self, cache_dir: str | None = None, lazy_unpickle: bool = True) -> Any:  # noqa: ARG002
        return LoaderCache.loaders[self]


class OrderedConfiguration(MergeConfiguration):
    """A configuration that lists its models in the order of the recipe.

    mergekit lists them in the order of a hash set, and takes tokenizer and config from the first of them when there
    is no base model: without this, from another model on every run.
    """

    def referenced_models(self) -> list[Any]:
        wanted = set(super().referenced_models())
        return [model for model in dict.fromkeys(ref for ref, _ in references(self)) if model in wanted]


def references(value: Any, path: KeyPath = ()) -> Iterator[tuple[Any, KeyPath]]:
    """Every model reference in a configuration with its path, in the order of mergekit's fields."""
    if isinstance(value, ModelReference):
        yield value, path
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from references(getattr(value, name), (*path, name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from references(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from references(item, (*path, index))


def pin(config: MergeConfiguration, pinned: Mapping[Any, Any]) -> OrderedConfiguration:
    """The same configuration with every model reference replaced, and its models in the order of the recipe."""

    def replace(value: Any) -> Any:
        if isinstance(value, ModelReference):
            return pinned[value]
        if isinstance(value, BaseModel):
            return value.model_copy(update={name: replace(getattr(value, name)) for name in type(value).model_fields})
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(replace(item) for item in value)
        return value

    return OrderedConfiguration(**{name: replace(getattr(config, name)) for name in MergeConfiguration.model_fields})


def pinned_model(reference: Any, folder: str, adapter: str | None) -> PinnedModel:
    """A pinned model for a reference of the recipe; ``folder`` and ``adapter`` (a LoRA) are absolute paths."""
    return PinnedModel(
        model=ModelPath(path=folder),
        lora=ModelPath(path=adapter) if adapter else None,
        override_architecture=reference.override_architecture,
        spelling=str(reference),
    )
