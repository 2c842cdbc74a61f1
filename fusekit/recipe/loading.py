"""From YAML to a checked recipe: includes, presets, ``--set``; every mistake at once, with its file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fusekit import yaml as safe_yaml
from fusekit.distillation.settings import PRESETS as DISTILLATION
from fusekit.errors import RecipeError
from fusekit.recipe.sections import UNREAD, Layers, Mistake, Recipe, in_full, plain
from fusekit.yaml import Document, KeyPath, nearest, path_in

MAX_INCLUDES = 16
FUSION = ("pivot", "sources", "include", "preset")  # keys at the top that only fusion recipes have,
MERGEKIT = ("merge_method", "models", "slices", "modules")  # and that only mergekit's have
RENAMED = {"represent": "capture"}  # former names of sections, and what they are called now


def _sce(select_topk: float, variant: str) -> dict[str, Any]:
    parameters = {"select_topk": select_topk, "variant": variant}
    return {"merge_method": "fusechat_sce", "parameters": parameters, "dtype": "bfloat16"}


# FuseChat's τ is 0.1. In the form that the authors' repository computes it selects what the coefficients are computed
# from; in the paper's form it also drops the other nine tenths of every fusion vector.
_AROUND: dict[str, dict[str, Any]] = {
    **{name: {"merge": _sce(1.0, "paper")} for name in ("fusekit", "grouped_kl", "uld", "gold", "p_kl", "alm")},
    "fusechat": {"source": {"chat_template": "pivot"}, "merge": _sce(0.1, "fuseai")},
    "fusellm": {"data": {"train_on": "all", "pack": True}},
    "profuser": {"respond": {}, "merge": _sce(1.0, "paper")},
}


def _preset(name: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"distill" if section == "training" else section: dict(values) for section, values in sections.items()}
    return renamed | _AROUND.get(name, {})


PRESETS: dict[str, dict[str, Any]] = {name: _preset(name, sections) for name, sections in DISTILLATION.items()}


def load_recipe(
    source: Path | str | Document,
    overrides: Sequence[str] = (),
    check: Callable[[Recipe], Iterable[Mistake]] = lambda _: (),
) -> Recipe:
    """Read a fusion recipe.

    Args:
        source: a YAML file, ``-`` for the standard input, or what was read from one. ``include: [other.yml]`` takes
            what other files in its folder say, its own values on top.
        overrides: ``a.b=value`` each, value in YAML, on top of everything; a number is an index into a list.
        check: what else is wrong with a recipe. It gets the recipe without its mistakes, and what it finds is reported
            together with them.

    Raises:
        RecipeError: every mistake with its file and line: unknown keys with the nearest known ones, values of a wrong
            kind or out of range, missing keys, includes that leave the folder or include each other.
    """
    top = source if isinstance(source, Document) else safe_yaml.load(source)  # once: it may be a pipe
    layers, path = Layers(top), Path(top.name)
    # A pipe includes files of the working folder.
    beside = path.parent if path.is_file() or not path.exists() else Path()
    _include(layers, top, beside, beside.resolve(), ())
    if layers.data.keys() & set(MERGEKIT) and not layers.data.keys() & set(FUSION):
        raise RecipeError(
            f"{path} is a mergekit recipe, which merges models of one architecture: `fusekit merge {path} OUT` runs "
            "it. A fusion recipe names a pivot and sources"
        )
    for override in overrides:
        _override(layers, override)
    return _checked(layers, check)


def _include(layers: Layers, document: Document, beside: Path, folder: Path, through: tuple[Path, ...]) -> None:
    """Add a file on top of what it includes. beside: where its includes are looked for, within ``folder``."""
    path = document.name
    if not isinstance(document.data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with `pivot`, `sources` and `data`")
    data, own = dict(document.data), Path(path).resolve()
    includes = data.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise RecipeError(f"{path}, line {document.line(('include',))}: include is a file name or a list of them")
    for index, name in enumerate(includes):
        where = f"{path}, line {document.line(('include', index))}"
        included = (beside / name.replace("\0", "")).resolve()
        if not included.is_relative_to(folder):
            raise RecipeError(f"{where}: {name} is outside the recipe's folder {folder}: copy it there")
        if "\0" in name or not included.is_file():  # no file system has \0
            raise RecipeError(f"{where}: there is no file {name!r} in {beside}")
        if included in (*through, own):
            raise RecipeError(f"{where}: {name} includes itself: take the line out")
        if len(through) >= MAX_INCLUDES:
            raise RecipeError(f"{where}: includes are nested more than {MAX_INCLUDES} deep")
        _include(layers, safe_yaml.load(beside / name), (beside / name).parent, folder, (*through, own))
    layers.add(document, in_full(data))


def _override(layers: Layers, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: write it as section.key=value")
    document = safe_yaml.loads(text, name=f"--set {override}")
    path: KeyPath = tuple(key.strip().split("."))
    target: Any = layers.data
    for depth, part in enumerate(path):
        if not isinstance(target, (dict, list)):
            raise RecipeError(f"--set {override}: {'.'.join(map(str, path[:depth]))} is {target!r}, not a section")
        at: Any = part
        if isinstance(target, list):
            if not str(part).isdigit() or int(part) >= len(target):
                items = f"a list of {len(target)}; they count from 0"
                raise RecipeError(f"--set {override}: {part!r} is not an item of {items}")
            at = int(part)
        if depth == len(path) - 1:
            target[at] = document.data
        else:
            target = target[at] if isinstance(target, list) else target.setdefault(at, {})
    layers.documents[tuple(int(p) if str(p).isdigit() else p for p in path)] = document


def _checked(layers: Layers, check: Callable[[Recipe], Iterable[Mistake]]) -> Recipe:
    """The recipe that the layers make. Raises RecipeError with one line per mistake, in the order of the files."""
    layers.data = in_full(layers.data)
    found: list[Mistake] = []
    name = layers.data.get("preset", "fusekit")
    if not isinstance(name, str) or name not in PRESETS:
        found.append(Mistake(f"unknown preset {name!r}{nearest(str(name), PRESETS)}", ("preset",)))
        name = layers.data["preset"] = "fusekit"
    recipe, wrong = _validated(layers.data, PRESETS[name])
    found += wrong
    if recipe is not None:
        recipe._layers = layers
        found += check(recipe)
    if found:
        raise RecipeError(layers.report(found))
    assert recipe is not None
    return recipe


def _validated(written: Mapping[str, Any], preset: Mapping[str, Any]) -> tuple[Recipe | None, list[Mistake]]:
    """A recipe without what is wrong with it, None where too much is; and the mistakes."""
    found: list[Mistake] = []
    for _ in range(4):
        try:
            return Recipe.model_validate(_with_preset(written, preset)), found
        except ValidationError as error:
            grouped: dict[tuple[KeyPath, ...], list[str]] = {}
            for detail in error.errors(include_url=False):
                paths, message = _mistake(detail, written)
                if message not in grouped.setdefault(paths, []):
                    grouped[paths].append(message)
        found += [Mistake("; or ".join(messages), *paths) for paths, messages in grouped.items()]
        written = plain(written)
        for paths in grouped:
            _take_out(written, max(paths, key=lambda path: len(path_in(written, path))))
    return None, found


def _take_out(data: Any, path: KeyPath) -> None:
    """Remove what is at a path, the whole of a list but that of sources, or put a stand-in where one has to be."""
    while path and isinstance(path[-1], int) and path[:-1] != ("sources",):
        path = path[:-1]
    *within, key = path or ("",)
    if path_in(data, within) != tuple(within):
        return
    for part in within:
        data = data[part]
    unread = UNREAD + ".".join(map(str, within))
    stand_ins = {"pivot": {"model": UNREAD}, "data": {"path": UNREAD}, "sources": [{"model": f"{UNREAD}sources.0"}]}
    if isinstance(key, int):
        data[key] = {"model": f"{unread}.{key}"}
    elif key in ("model", "path"):
        data[key] = unread
    elif isinstance(data, dict):
        data.pop(key, None)
        data.update({key: stand_ins[key]} if key in stand_ins else {})


def _with_preset(data: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    per_source = preset.get("source", {})
    result = _merged({key: value for key, value in preset.items() if key != "source"}, data)
    if isinstance(result.get("sources"), list):
        result["sources"] = [_merged(per_source, s) if isinstance(s, dict) else s for s in result["sources"]]
    return result


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = {key: plain(value) for key, value in below.items()}
    for key, value in above.items():
        known = result.get(key)
        result[key] = plain(value)
        if isinstance(value, Mapping) and isinstance(known, dict):
            method = known.get("merge_method")
            # A recipe that names another merge method does not want the preset's parameters for its own.
            if key != "merge" or value.get("merge_method", method) == method:
                result[key] = _merged(known, value)
    return result


def _mistake(detail: Any, data: Any) -> tuple[tuple[KeyPath, ...], str]:
    """Where a mistake that pydantic found is, and what it is."""
    if "paths" in detail.get("ctx", {}):  # several, where values clash
        paths: tuple[KeyPath, ...] = tuple(detail["ctx"]["paths"])
        written = max(paths, key=lambda path: len(path_in(data, path)))
        label = ".".join(map(str, path_in(data, written)))
        return paths, f"{label}: {detail['msg']}"
    path = path_in(data, detail["loc"])
    label = ".".join(map(str, path)) or "recipe"
    *within, key = detail["loc"] or ("",)
    if detail["type"] == "missing":
        return ((*path, key),), f"`{key}` is missing{' in ' + label if path else ''}"
    if detail["type"] == "extra_forbidden":
        now = RENAMED.get(str(key))
        hint = f": it is called {now!r} now" if now else nearest(str(key), _fields(within))
        return (path if path[-1:] == (key,) else (*path, key),), f"unknown key {key!r}{hint}"
    return (path,), _worded(detail, label)


def _worded(detail: Any, label: str) -> str:
    """What pydantic says of the value that ``label`` names, in the words of a recipe where its own are of Python."""
    if detail["type"] == "model_type":
        return f"{label}: write a mapping with keys such as {', '.join(_fields(detail['loc'])[:3])}"
    if detail["type"] == "too_short":
        return f"{label} is empty: name at least one"
    if detail["type"] == "string_pattern_mismatch" and detail["loc"][-1] == "name":
        said = "begin with a letter or a digit, and use no others than a-z, A-Z, 0-9, '.', '_' and '-'"
        return f"{label} is {detail['input']!r}, which becomes the name of a folder: {said}"
    text, value = " ".join(str(detail["msg"]).removeprefix("Value error, ").split()), detail["input"]
    is_short = isinstance(value, (str, int, float, NoneType)) and len(repr(value)) <= 60
    return f"{label}: {text}" + (f", not {value!r}" if text.startswith("Input should") and is_short else "")


def _fields(location: Sequence[int | str]) -> list[str]:
    """The keys of the section at a pydantic location."""
    model: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            model = _section(model.model_fields[part].annotation) or Recipe
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation holds, within optionals, lists and constraints."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Annotated, list, Union, UnionType):
        return next((found for member in get_args(annotation) if (found := _section(member))), None)
    return None


def kind_of(document: Document) -> Literal["fusion", "mergekit"]:
    """What a recipe is for: ``fusion`` (fusekit run) or ``mergekit`` (mergekit-yaml, fusekit merge).

    Raises RecipeError when it has keys of both, or of neither.
    """
    path, data = document.name, document.data
    ours, theirs = ([key for key in keys if isinstance(data, dict) and key in data] for keys in (FUSION, MERGEKIT))
    if ours and theirs:
        raise RecipeError(
            f"{path}: {ours[0]!r} is a key of fusion recipes, {theirs[0]!r} of mergekit recipes: keep one kind. In a "
            "fusion recipe mergekit's keys go under `merge`"
        )
    if not ours and not theirs:
        raise RecipeError(
            f"{path} is neither a fusion recipe ({', '.join(FUSION[:2])}, data) nor a mergekit recipe "
            f"({' or '.join(MERGEKIT[:2])}): `fusekit ls` lists examples of both"
        )
    return "fusion" if ours else "mergekit"
