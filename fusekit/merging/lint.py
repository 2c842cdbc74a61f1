"""What mergekit ignores silently, as errors: unknown keys, unknown parameters, parameters that would have no effect."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.base import MergeMethodSpec, ParameterScope
from pydantic import BaseModel, ValidationError

from fusekit import mergekit_private
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
    _check_method(data, problems)
    _check_names(data, problems)
    _check_ranges(data, problems)
    config = _validate(data, problems)
    if config is not None and not problems.found:  # else what is missing may be there, misspelled
        for path, body, _ in _bodies(data):
            if isinstance(body.get("models"), list) or isinstance(body.get("sources"), list):
                _check_inputs(data, path, body, problems)
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
        elif fields is not None and key != "parameters":  # the method's own names, checked by _check_parameters
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


def _check_method(data: dict[str, Any], problems: Problems) -> None:
    methods = {method.spec.name: method for method in merge_methods.registered_methods()}
    name = data.get("merge_method")
    if name is None:
        problems.add((), f"`merge_method` is missing; one of: {', '.join(sorted(methods))}")
    elif not isinstance(name, str) or name not in methods:
        problems.add(("merge_method",), f"unknown merge method {name!r}{nearest(str(name), methods)}")
    else:
        _check_parameters(data, methods[name].spec, problems)


def _check_parameters(data: dict[str, Any], spec: MergeMethodSpec, problems: Problems) -> None:
    """Report parameters that a method does not have or whose value it refuses, and those without effect."""
    known = {parameter.name: parameter for parameter in spec.parameters}
    for place, body, owner in _bodies(data):
        path, block = (*place, "parameters"), body.get("parameters")
        if block is None:
            continue
        if not isinstance(block, dict):
            problems.add(path, "`parameters` is a mapping of names to values")
            continue
        for name, setting in block.items():
            here = (*path, str(name))
            if name not in known:
                problems.add(here, f"unknown parameter {name!r} of {spec.name}{nearest(str(name), known)}")
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
            _check_setting(setting, here, f"{name!r} of {spec.name}", known[name].validate, problems)


def _check_inputs(data: dict[str, Any], path: KeyPath, output: dict[str, Any], problems: Problems) -> None:
    """Report models that are too few or too many for the method, and required parameters that are given nowhere."""
    spec = merge_methods.get(data["merge_method"]).spec
    key = "models" if "models" in output else "sources"
    inputs, base = _mappings(output.get(key), (*path, key)), output.get("base_model", data.get("base_model"))
    names = [str(item.get("model")) for _, item in inputs]
    if inputs and key == "models" and base is not None and str(base) not in names:
        names.append(str(base))  # mergekit adds it
    try:
        spec.contract.validate_ids(names, None if base is None else str(base))
    except ValueError as error:
        problems.add(path or ("models",), f"{spec.name} cannot merge these models: {error}")
    enclosing = [
        level.get("parameters") for level in (data, output, *(body for at, body in _outputs(data) if at == path[:2]))
    ]
    for parameter in spec.parameters:
        if not parameter.required or any(isinstance(given, dict) and parameter.name in given for given in enclosing):
            continue
        missing = f"the parameter {parameter.name!r} of {spec.name} is missing"
        if parameter.scope == ParameterScope.SHARED:
            problems.add((*path, "parameters"), f"{missing}: give it under `parameters`")
            continue
        for here, item in inputs:
            exempt = parameter.scope == ParameterScope.NON_BASE and item.get("model") == base
            if not exempt and parameter.name not in (item.get("parameters") or ()):
                problems.add(here, f"{missing} for {item.get('model')}: give it there, or for all under `parameters`")


def _outputs(data: dict[str, Any]) -> list[tuple[KeyPath, dict[str, Any]]]:
    """What a recipe makes, by place: itself, and each of its modules."""
    modules = data.get("modules")
    found = modules.items() if isinstance(modules, dict) else ()
    return [((), data), *((("modules", str(name)), module) for name, module in found if isinstance(module, dict))]


def _mappings(value: Any, path: KeyPath) -> list[tuple[KeyPath, dict[str, Any]]]:
    """The mappings in a list with their paths; nothing if ``value`` is not a list."""
    items = enumerate(value) if isinstance(value, list) else ()
    return [((*path, index), item) for index, item in items if isinstance(item, dict)]


def _bodies(data: dict[str, Any]) -> Iterator[tuple[KeyPath, dict[str, Any], Any]]:
    """Everything in a recipe that may have `parameters`, and the model it stands for (None: not one model)."""
    for path, body in _outputs(data):
        yield path, body, None
        inputs = _mappings(body.get("models"), (*path, "models"))
        for here, output in _mappings(body.get("slices"), (*path, "slices")):
            yield here, output, None
            inputs += _mappings(output.get("sources"), (*here, "sources"))
        for here, item in inputs:
            yield here, item, item.get("model", "?")


def _check_setting(
    setting: Any, path: KeyPath, label: str, validate: Callable[[Any], Any], problems: Problems, *, inside: str = ""
) -> None:
    """Check one parameter: a number, string or boolean, a gradient (list), a filter, or a list of filters."""
    parts: list[tuple[KeyPath, Any]] = []
    kind = "list" if isinstance(setting, list) else "filter" if isinstance(setting, dict) else "value"
    if kind == "value":
        _check_value(setting, path, label, validate, problems)
    elif kind == inside:
        problems.add(path, f"{label}: {kind}s do not nest")
    elif kind == "list":
        filters = sum(isinstance(item, dict) for item in setting)
        if not setting:
            problems.add(path, f"{label} is an empty list, which mergekit ignores")
        elif filters not in (0, len(setting)):
            problems.add(path, f"{label} mixes values and filters: give every item a `value`")
        else:
            parts = [((*path, index), item) for index, item in enumerate(setting)]
    else:
        for key in setting.keys() - {"value", "filter"}:
            hint = nearest(str(key), ["value", "filter"])
            problems.add((*path, str(key)), f"unknown key {key!r} of {label}{hint}")
        if "value" not in setting:
            problems.add(path, f"{label}: a filter needs a `value`")
        else:
            parts = [((*path, "value"), setting["value"])]
    for place, part in parts:
        _check_setting(part, place, label, validate, problems, inside=kind)


def _check_value(value: Any, path: KeyPath, label: str, validate: Callable[[Any], Any], problems: Problems) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        problems.add(path, f"{label} cannot be {value}: not a finite number")
        return
    try:
        validate(value)
    except ValidationError as error:
        problems.add(path, f"{label} cannot be {value!r}: {'; '.join(reasons(error))}")


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


def _check_ranges(data: dict[str, Any], problems: Problems) -> None:
    for path, body, _ in _bodies(data):
        layers = body.get("layer_range")
        if not isinstance(layers, list) or [type(end) for end in layers] != [int, int]:
            continue  # mergekit's own schema says what is wrong
        if not 0 <= layers[0] < layers[1]:
            problems.add(
                (*path, "layer_range"), f"layer_range {layers} is empty: give [first, last + 1], counted from 0"
            )
    tokenizer = data.get("tokenizer")
    multiple = tokenizer.get("pad_to_multiple_of") if isinstance(tokenizer, dict) else None
    if type(multiple) is int and not 1 <= multiple <= 65536:
        problems.add(("tokenizer", "pad_to_multiple_of"), f"pad_to_multiple_of {multiple} is not between 1 and 65536")


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
