"""What mergekit ignores silently, as errors: unknown keys, unknown parameters, parameters that would have no effect."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope, ParameterSpec
from pydantic import BaseModel, ValidationError

from fusekit import mergekit_private
from fusekit.errors import MergeError
from fusekit.merge_methods.sce import check_parameters
from fusekit.yaml import Document, KeyPath, Problems, by_place, nearest, reasons

FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def lint(document: Document) -> tuple[MergeConfiguration, list[str]]:
    """Check a mergekit recipe and read it. Returns mergekit's configuration and warnings.

    Raises RecipeError with every problem and its line: keys that mergekit does not know, at any depth; an unknown
    merge method; parameters that the method does not have, that are given where they have no effect, or whose value
    the method would refuse; dtypes and chat templates that do not exist; and whatever mergekit's schema refuses.
    """
    problems = Problems(document)
    config = check(document.data, problems)
    problems.raise_if_any()
    return config, problems.warnings


def check(data: Any, problems: Problems) -> MergeConfiguration | None:
    """Collect what :func:`lint` refuses. Returns mergekit's configuration, None where that cannot be read."""
    if not isinstance(data, dict):
        problems.add((), "a recipe is a mapping with `merge_method` and `models`, `slices` or `modules`")
        return None
    _check_keys(data, MergeConfiguration, (), problems)
    methods = {method.spec.name: method.spec for method in merge_methods.registered_methods()}
    name = data.get("merge_method")
    if name is None:
        problems.add((), f"`merge_method` is missing; one of: {', '.join(sorted(methods))}")
    elif not isinstance(name, str) or name not in methods:
        problems.add(("merge_method",), f"unknown merge method {name!r}{nearest(str(name), methods)}")
    else:
        _check_parameters(data, methods[name], problems)
    _check_names(data, problems)
    config = _validate(data, problems)
    if config is not None and not problems.found:  # else what is missing may be there, misspelled
        _check_inputs(data, methods[data["merge_method"]], problems)
    return config


def _check_keys(value: Any, annotation: Any, path: KeyPath, problems: Problems) -> None:
    """Report every key that the pydantic models in ``annotation`` do not have."""
    annotation = _choose(value, annotation)
    origin = get_origin(annotation)
    if origin in (list, tuple) and isinstance(value, list):
        for index, child in enumerate(value):
            _check_keys(child, get_args(annotation)[0], (*path, index), problems)
    fields = annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    for key, child in value.items() if isinstance(value, dict) else ():
        here = (*path, str(key))
        if origin is dict:
            _check_keys(child, get_args(annotation)[1], here, problems)
        elif fields is not None and key not in fields:
            problems.add(here, f"unknown key {key!r}{nearest(str(key), fields)}")
        elif fields is not None:
            _check_keys(child, fields[key].annotation, here, problems)


def _choose(value: Any, annotation: Any) -> Any:
    """The member of a union that ``value`` is meant for: of several models, the one that knows most of its keys."""
    if get_origin(annotation) is Annotated:
        return _choose(value, get_args(annotation)[0])
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    members = [_choose(value, member) for member in get_args(annotation)]
    if isinstance(value, list):
        return next((m for m in members if get_origin(m) in (list, tuple)), None)
    if not isinstance(value, dict):
        return None
    models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
    mappings = [m for m in members if get_origin(m) is dict]
    return max(models, key=lambda m: len(m.model_fields.keys() & value.keys()), default=next(iter(mappings), None))


def _check_parameters(data: dict[str, Any], spec: MergeMethodSpec, problems: Problems) -> None:
    """Report parameters that a method does not have or whose value it refuses, and those without effect."""
    known = {parameter.name: parameter for parameter in spec.parameters}
    for here, name, setting, owner in _parameters(data):
        if name not in known:
            problems.add(here, f"unknown parameter {name!r} of {spec.name}{nearest(name, known)}")
            continue
        scope = known[name].scope
        if owner is not None and scope == ParameterScope.SHARED:
            problems.add(
                here,
                f"{name!r} is one value for all models in {spec.name}: under one model it has no effect; "
                "move it to the `parameters` of the recipe, a module or a slice",
            )
        elif owner is not None and scope == ParameterScope.NON_BASE and owner == data.get("base_model"):
            problems.warn(here, f"{name!r} has no effect on the base model in {spec.name}")
        for place, value in _values(setting, here):
            if (refusal := _refusal(value, known[name])) is not None:
                problems.add(place, f"{name!r} of {spec.name} cannot be {value!r}: {refusal}")


def _refusal(value: Any, parameter: ParameterSpec) -> str | None:
    """Why a method refuses the value of a parameter, None where it does not."""
    try:
        read = parameter.validate(value)
    except ValidationError as error:
        return "; ".join(reasons(error))
    return "not a finite number" if isinstance(read, float) and not math.isfinite(read) else None


def _check_inputs(data: dict[str, Any], spec: MergeMethodSpec, problems: Problems) -> None:
    """Report required parameters that are given nowhere, and models that are too few or too many for the method."""
    given = {name for _, name, _, _ in _parameters(data)}
    for parameter in spec.parameters:
        if parameter.required and parameter.name not in given:
            problems.add(("parameters",), f"the parameter {parameter.name!r} of {spec.name} is missing")
    if not data.get("models"):
        return
    names = [str(item["model"]) for item in data["models"]]
    base = None if data.get("base_model") is None else str(data["base_model"])
    if base is not None and base not in names:
        names.append(base)  # mergekit adds it
    try:
        spec.contract.validate_ids(names, base)
    except ValueError as error:
        problems.add(("models",), f"{spec.name} cannot merge these models: {error}")
    if spec.name != "fusechat_sce" or len(names) != 2:
        return
    for here, name, setting, _ in _parameters(data):
        for place, value in _values(setting, here) if name == "select_topk" else ():
            try:
                check_parameters(1, float(value), "paper")
            except MergeError as error:
                problems.add(place, str(error))


def _parameters(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str, Any, Any]]:
    """Every parameter of a recipe: its path, name and setting, and the model it stands under, None for several."""
    for path, body, owner in _bodies(data):
        block = body.get("parameters")
        for name, setting in block.items() if isinstance(block, dict) else ():
            yield (*path, "parameters", str(name)), str(name), setting, owner


def _bodies(data: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any], Any]]:
    """Everything in a recipe that may have `parameters`, and the model it stands for, None for several."""
    modules = data.get("modules")
    found = modules.items() if isinstance(modules, dict) else ()
    outputs = [((), data), *((("modules", str(name)), module) for name, module in found if isinstance(module, dict))]
    for path, output in outputs:
        yield path, output, None
        inputs = _mappings(output.get("models"), (*path, "models"))
        for here, piece in _mappings(output.get("slices"), (*path, "slices")):
            yield here, piece, None
            inputs += _mappings(piece.get("sources"), (*here, "sources"))
        for here, item in inputs:
            yield here, item, item.get("model", "?")


def _mappings(value: Any, path: KeyPath) -> list[tuple[KeyPath, dict[str, Any]]]:
    """The mappings in a list with their paths; nothing if ``value`` is not a list."""
    items = enumerate(value) if isinstance(value, list) else ()
    return [((*path, index), item) for index, item in items if isinstance(item, dict)]


def _values(setting: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """The values of a parameter with their paths: of a plain one, a gradient (list), a filter, or a list of filters."""
    if isinstance(setting, list):
        for index, item in enumerate(setting):
            yield from _values(item, (*path, index))
    elif isinstance(setting, dict):
        if "value" in setting:
            yield from _values(setting["value"], (*path, "value"))
    else:
        yield path, setting


def _check_names(data: dict[str, Any], problems: Problems) -> None:
    """Report unknown dtypes, and chat templates, at which mergekit looks only after the weights are written."""
    for key in ("dtype", "out_dtype"):
        name = data.get(key)
        if name is not None and str(name).removeprefix("torch.") not in FLOAT_DTYPES:
            problems.add((key,), f"unknown {key} {name!r}{nearest(str(name), FLOAT_DTYPES)}")
    template = data.get("chat_template")
    if isinstance(template, str) and template and "{" not in template:
        names = ["auto", *mergekit_private.chat_templates()]
        if template not in names:
            problems.add(("chat_template",), f"unknown chat template {template!r}{nearest(template, names)}")


def _validate(data: dict[str, Any], problems: Problems) -> MergeConfiguration | None:
    """mergekit's own schema. Its validators raise what they like, without a place."""
    try:
        return MergeConfiguration.model_validate(data)
    except ValidationError as error:
        for path, messages in by_place(error, data).items():
            label = ".".join(str(part) for part in path) or "recipe"
            if not problems.near(path):
                problems.add(path, f"{label}: {'; or '.join(messages)}")
    except Exception as error:
        problems.add((), f"mergekit refuses the recipe: {error}")
    return None
