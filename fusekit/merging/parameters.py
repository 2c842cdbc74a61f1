"""The `parameters:` blocks of a recipe: names, places and values against what the merge method declares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope
from pydantic import ValidationError

from fusekit.yaml import KeyPath, Problems, nearest, reasons


def check_parameters(data: dict[str, Any], spec: MergeMethodSpec, problems: Problems) -> None:
    """Report parameters that the method of ``spec`` does not have, that have no effect where they stand, or whose
    value it would refuse, in every ``parameters:`` of the recipe ``data``."""
    for path, block, owner in _parameter_blocks(data):
        if isinstance(block, dict):
            for name, setting in block.items():
                here = (*path, str(name))
                if not _known(name, here, spec, problems):
                    continue
                if owner is not None:
                    _check_scope(name, here, spec, owner == data.get("base_model"), problems)
                _Setting(f"{name!r} of {spec.name}", _parameter(spec, name).validate, problems).check(setting, here)
        elif block is not None:
            problems.add(path, "`parameters` is a mapping of names to values")


def mappings(value: Any) -> list[tuple[int, dict[str, Any]]]:
    """The mappings in a list with their indices; nothing if ``value`` is not a list."""
    if not isinstance(value, list):
        return []
    return [(index, item) for index, item in enumerate(value) if isinstance(item, dict)]


def _parameter_blocks(data: dict[str, Any]) -> Iterator[tuple[KeyPath, Any, Any]]:
    """Every ``parameters:`` of a recipe: its path, its content, and the model it belongs to (None: not one model)."""

    def inputs(items: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any, Any]]:
        for index, item in mappings(items):
            if "parameters" in item:
                yield (*path, index, "parameters"), item["parameters"], item.get("model", "?")

    def output(body: dict[str, Any], path: KeyPath) -> Iterator[tuple[KeyPath, Any, Any]]:
        if "parameters" in body:
            yield (*path, "parameters"), body["parameters"], None
        yield from inputs(body.get("models"), (*path, "models"))
        for index, output_slice in mappings(body.get("slices")):
            here: KeyPath = (*path, "slices", index)
            if "parameters" in output_slice:
                yield (*here, "parameters"), output_slice["parameters"], None
            yield from inputs(output_slice.get("sources"), (*here, "sources"))

    yield from output(data, ())
    modules = data.get("modules")
    if isinstance(modules, dict):
        for name, module in modules.items():
            if isinstance(module, dict):
                yield from output(module, ("modules", str(name)))


def _parameter(spec: MergeMethodSpec, name: Any) -> Any:
    return next((parameter for parameter in spec.parameters if parameter.name == name), None)


def _known(name: Any, path: KeyPath, spec: MergeMethodSpec, problems: Problems) -> bool:
    if _parameter(spec, name) is not None:
        return True
    names = [parameter.name for parameter in spec.parameters]
    problems.add(path, f"unknown parameter {name!r} of {spec.name}{nearest(str(name), names)}")
    return False


def _check_scope(name: str, path: KeyPath, spec: MergeMethodSpec, is_base: bool, problems: Problems) -> None:
    """A parameter that stands under one model: mergekit drops a shared one without a word."""
    scope = _parameter(spec, name).scope
    if scope == ParameterScope.SHARED:
        problems.add(
            path,
            f"{name!r} is one value for all models in {spec.name}: under one model it has no effect; "
            "move it to the `parameters` of the recipe, a module or a slice",
        )
    elif scope == ParameterScope.NON_BASE and is_base:
        problems.warn(path, f"{name!r} has no effect on the base model in {spec.name}")


class _Setting:
    """Checks one value: a number, string or boolean, a gradient (list), a filter, or a list of filters."""

    def __init__(self, label: str, validate: Callable[[Any], Any], problems: Problems) -> None:
        self.label = label
        self.validate = validate
        self.problems = problems

    def check(self, setting: Any, path: KeyPath) -> None:
        if isinstance(setting, list):
            self._check_list(setting, path)
        elif isinstance(setting, dict):
            self._check_filter(setting, path)
        else:
            self._check_scalar(setting, path)

    def _check_list(self, items: list[Any], path: KeyPath) -> None:
        filters = sum(isinstance(item, dict) for item in items)
        if not items:
            self.problems.add(path, f"{self.label} is an empty list, which mergekit ignores")
        elif filters not in (0, len(items)):
            self.problems.add(path, f"{self.label} mixes values and filters: give every item a `value`")
        else:
            for index, item in enumerate(items):
                if isinstance(item, list):
                    self.problems.add((*path, index), f"{self.label}: lists do not nest")
                else:
                    self.check(item, (*path, index))

    def _check_filter(self, setting: dict[str, Any], path: KeyPath) -> None:
        for key in setting:
            if key not in ("value", "filter"):
                hint = nearest(str(key), ["value", "filter"])
                self.problems.add((*path, str(key)), f"unknown key {key!r} of {self.label}{hint}")
        if "value" not in setting:
            self.problems.add(path, f"{self.label}: a filter needs a `value`")
        elif isinstance(setting["value"], dict):
            self.problems.add(path, f"{self.label}: filters do not nest")
        else:
            self.check(setting["value"], (*path, "value"))

    def _check_scalar(self, value: Any, path: KeyPath) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            self.problems.add(path, f"{self.label} cannot be {value}: not a finite number")
            return
        try:
            self.validate(value)
        except ValidationError as error:
            self.problems.add(path, f"{self.label} cannot be {value!r}: {'; '.join(reasons(error))}")
