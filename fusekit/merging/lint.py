"""What mergekit ignores silently, as errors: unknown keys, unknown parameters, parameters that would have no effect."""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

from mergekit._data import chat_templates
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import registered_methods
from pydantic import BaseModel, ValidationError

from fusekit.merging.parameters import check_parameters, mappings
from fusekit.yaml import Document, KeyPath, Problems, by_place, nearest

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
    _check_dtypes(data, problems)
    _check_chat_template(data, problems)
    _check_ranges(data, problems)
    return _validate(data, problems)


def _check_keys(value: Any, annotation: Any, path: KeyPath, problems: Problems) -> None:
    """Report every key below ``value`` that the pydantic models in ``annotation`` do not have."""
    annotation = _choose(value, annotation)
    origin = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(value, dict):
        fields = annotation.model_fields
        for key, child in value.items():
            here = (*path, str(key))
            if key not in fields:
                problems.add(here, f"unknown key {key!r}{nearest(str(key), fields)}")
            elif key != "parameters":  # the method's own names, checked by _check_parameters
                _check_keys(child, fields[key].annotation, here, problems)
    elif origin is dict and isinstance(value, dict):
        for key, child in value.items():
            _check_keys(child, get_args(annotation)[1], (*path, str(key)), problems)
    elif origin in (list, tuple) and isinstance(value, list):
        for index, child in enumerate(value):
            _check_keys(child, get_args(annotation)[0], (*path, index), problems)


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
    methods = {method.spec.name: method for method in registered_methods()}
    name = data.get("merge_method")
    if name is None:
        problems.add((), f"`merge_method` is missing; one of: {', '.join(sorted(methods))}")
    elif not isinstance(name, str) or name not in methods:
        problems.add(("merge_method",), f"unknown merge method {name!r}{nearest(str(name), methods)}")
    else:
        check_parameters(data, methods[name].spec, problems)


def _check_dtypes(data: dict[str, Any], problems: Problems) -> None:
    for key in ("dtype", "out_dtype"):
        name = data.get(key)
        if name is not None and str(name).removeprefix("torch.") not in FLOAT_DTYPES:
            problems.add((key,), f"unknown {key} {name!r}{nearest(str(name), FLOAT_DTYPES)}")


def _check_chat_template(data: dict[str, Any], problems: Problems) -> None:
    """mergekit looks at the template only after the weights are written."""
    template = data.get("chat_template")
    if not isinstance(template, str) or not template or template == "auto" or "{" in template:
        return
    import importlib.resources

    folder = importlib.resources.files(chat_templates)
    names = [f.name.removesuffix(".jinja") for f in folder.iterdir() if f.name.endswith(".jinja")]
    if template not in names:
        problems.add(("chat_template",), f"unknown chat template {template!r}{nearest(template, ['auto', *names])}")


def _check_ranges(data: dict[str, Any], problems: Problems) -> None:
    bodies: list[tuple[KeyPath, Any]] = [((), data)]
    if isinstance(modules := data.get("modules"), dict):
        bodies += [(("modules", str(name)), module) for name, module in modules.items()]
    for path, body in bodies:
        slices = body.get("slices") if isinstance(body, dict) else None
        for index, output_slice in mappings(slices):
            for place, source in mappings(output_slice.get("sources")):
                layers = source.get("layer_range")
                if isinstance(layers, list) and len(layers) == 2 and all(type(end) is int for end in layers):
                    here = (*path, "slices", index, "sources", place, "layer_range")
                    if not 0 <= layers[0] < layers[1]:
                        problems.add(here, f"layer_range {layers} is empty: give [first, last + 1], counted from 0")
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
