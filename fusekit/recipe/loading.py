"""From YAML to a checked recipe: includes, presets, ``--set``; every mistake at once, with its file and line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fusekit import yaml as safe_yaml
from fusekit.distillation.presets import PRESETS as DISTILLATION
from fusekit.errors import RecipeError
from fusekit.recipe.sections import Places, Recipe
from fusekit.yaml import Document, KeyPath, nearest

MAX_INCLUDES = 16
FUSION = ("pivot", "sources", "include", "preset")
MERGEKIT = ("merge_method", "models", "slices", "modules")
"""Keys at the top that only fusion recipes have, and that only mergekit's have."""
RENAMED = {"represent": "capture"}
"""Former names of sections, and what they are called now."""


def _sce(select_topk: float, variant: str) -> dict[str, Any]:
    parameters = {"select_topk": select_topk, "variant": variant}
    return {"merge_method": "fusechat_sce", "parameters": parameters, "dtype": "bfloat16"}


# FuseChat's τ is 0.1. In the form that the authors' repository computes it selects what the coefficients are computed
# from; in the paper's form it also drops the other nine tenths of every fusion vector.
_AROUND: dict[str, dict[str, Any]] = {
    "fusekit": {"merge": _sce(1.0, "paper")},
    "fusechat": {"source": {"chat_template": "pivot"}, "merge": _sce(0.1, "fuseai")},
    "fusellm": {"data": {"train_on": "all", "pack": True}},
    "uld": {"merge": _sce(1.0, "paper")},
    "gold": {"merge": _sce(1.0, "paper")},
}


def _preset(name: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"distill" if section == "training" else section: dict(values) for section, values in sections.items()}
    return renamed | _AROUND.get(name, {})


PRESETS: dict[str, dict[str, Any]] = {name: _preset(name, sections) for name, sections in DISTILLATION.items()}


@dataclass(frozen=True)
class Place:
    """Where a value of a recipe was written: a document and its path there; what errors call it is ``str``."""

    document: Document
    path: KeyPath

    def __str__(self) -> str:
        name = self.document.name
        return name if name.startswith("--") else f"{name}, line {self.document.line(self.path)}"


class _Layers:
    """Values from several documents, later ones on top, and where each came from."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.places: dict[KeyPath, Place] = {}

    def add(self, document: Document, data: Mapping[str, Any], at: KeyPath = ()) -> None:
        """Mappings are merged key by key; anything else, lists too, replaces what was there."""
        target: Any = self.data
        for key in at:
            target = target[key]
        for key, value in data.items():
            path = (*at, str(key))
            if isinstance(value, Mapping) and isinstance(target.get(str(key)), dict):
                self.add(document, value, path)
            else:
                target[str(key)] = _plain(value)
                for known in [known for known in self.places if known[: len(path)] == path]:
                    del self.places[known]
            self.places[path] = Place(document, path)

    def written(self, fallback: Document) -> dict[KeyPath, str]:
        """Where every value was written, as errors say it."""
        return {path: str(self.place(path, fallback)) for path in _paths(self.data)}

    def place(self, path: KeyPath, fallback: Document) -> Place:
        """Where the value at ``path``, or the nearest one that encloses it, was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return Place(self.places[path[:length]].document, path)
        return Place(fallback, path)


def _plain(value: Any) -> Any:
    """A deep copy with keys as text, so that no layer shares an object with another."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, list) else value


def _paths(value: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Of everything within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*at, key)
        yield from _paths(child, (*at, key))


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a fusion recipe.

    Args:
        path: a YAML file, or ``-`` for the standard input. ``include: [other.yml]`` takes what other files in its
            folder say, its own values on top.
        overrides: ``a.b=value`` each, value in YAML, on top of everything; a number is an index into a list.

    Raises:
        RecipeError: every mistake with its file and line: unknown keys with the nearest known ones, values of a wrong
            kind or out of range, missing keys, includes that leave the folder or include each other.
    """
    path = Path("/dev/stdin" if str(path) == "-" else path)
    layers = _Layers()
    # A pipe, which can be read once, includes files of the working folder.
    beside = path.parent if path.is_file() or not path.exists() else Path()
    top = _include(layers, path, beside, beside.resolve(), ())
    ours, theirs = _kinds(layers.data)
    if theirs and not ours:
        raise RecipeError(
            f"{path} is a mergekit recipe, which merges models of one architecture: `fusekit merge {path} OUT` runs "
            "it. A fusion recipe names a pivot and sources"
        )
    for override in overrides:
        _override(layers, override)
    return _checked(layers, top)


def _include(layers: _Layers, path: Path, beside: Path, folder: Path, through: tuple[Path, ...]) -> Document:
    """Add a file on top of what it includes. beside: where its includes are looked for, within ``folder``."""
    document = safe_yaml.load(path)
    data = document.data
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with `pivot`, `sources` and `data`")
    own = path.resolve()
    includes = data.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise RecipeError(f"{path}, line {document.line(('include',))}: include is a file name or a list of them")
    for index, name in enumerate(includes):
        where = f"{path}, line {document.line(('include', index))}"
        if "\0" in name:  # which no file system has
            raise RecipeError(f"{where}: there is no file {name!r} in {beside}")
        included = (beside / name).resolve()
        if not included.is_relative_to(folder):
            raise RecipeError(f"{where}: {name} is outside the recipe's folder {folder}: copy it there")
        if not included.is_file():
            raise RecipeError(f"{where}: there is no file {name!r} in {beside}")
        if included in (*through, own):
            raise RecipeError(f"{where}: {name} includes itself: take the line out")
        if len(through) >= MAX_INCLUDES:
            raise RecipeError(f"{where}: includes are nested more than {MAX_INCLUDES} deep")
        _include(layers, beside / name, (beside / name).parent, folder, (*through, own))
    layers.add(document, data)
    return document


def _override(layers: _Layers, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: write it as section.key=value")
    document = safe_yaml.loads(text, name=f"--set {override}")
    path: KeyPath = tuple(key.strip().split("."))
    target: Any = layers.data
    for depth, part in enumerate(path[:-1]):
        if isinstance(target, list):
            target = target[_index(target, str(part), override)]
        else:
            target = target.setdefault(str(part), {})
        if not isinstance(target, (dict, list)):
            raise RecipeError(f"--set {override}: {'.'.join(map(str, path[: depth + 1]))} is {target!r}, not a section")
    if isinstance(target, list):
        target[_index(target, str(path[-1]), override)] = document.data
    else:
        target[str(path[-1])] = document.data
    layers.places[tuple(int(p) if str(p).isdigit() else p for p in path)] = Place(document, ())


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"--set {override}: {part!r} is not an item of a list of {len(items)}; they count from 0")
    return int(part)


def _checked(layers: _Layers, top: Document) -> Recipe:
    name = layers.data.get("preset", "fusekit")
    if not isinstance(name, str) or name not in PRESETS:
        place = layers.place(("preset",), top)
        raise RecipeError(f"{place}: unknown preset {name!r}{nearest(str(name), PRESETS)}")
    data = _with_preset(layers.data, PRESETS[name])
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_report(error, layers, top)) from None
    recipe._places = Places(layers.written(top))
    return recipe


def _with_preset(data: dict[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    per_source = preset.get("source", {})
    result = _merged({key: value for key, value in preset.items() if key != "source"}, data)
    if isinstance(result.get("sources"), list):
        result["sources"] = [_merged(per_source, s) if isinstance(s, dict) else s for s in result["sources"]]
    return result


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = {key: _plain(value) for key, value in below.items()}
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), dict)
        # A recipe that names another merge method does not want the preset's parameters for its own.
        if both and not (
            key == "merge"
            and value.get("merge_method", result[key].get("merge_method")) != result[key].get("merge_method")
        ):
            result[key] = _merged(result[key], value)
        else:
            result[key] = _plain(value)
    return result


def _report(error: ValidationError, layers: _Layers, top: Document) -> str:
    """One line per mistake, in the order of the files' lines."""
    found: dict[KeyPath, list[str]] = {}
    for detail in error.errors(include_url=False):
        named = detail.get("ctx", {}).get("paths", [detail["loc"]])  # several, where values clash
        path = max((_path_in(layers.data, location) for location in named), key=len)
        label = ".".join(map(str, path)) or "recipe"
        if detail["type"] == "missing":
            message = f"`{detail['loc'][-1]}` is missing{' in ' + label if path else ''}"
        elif detail["type"] == "extra_forbidden":
            *within, key = detail["loc"]
            path = path if path[-1:] == (key,) else (*path, key)
            now = RENAMED.get(str(key))
            hint = f": it is called {now!r} now" if now else nearest(str(key), _fields(within))
            message = f"unknown key {key!r}{hint}"
        else:
            text = " ".join(str(detail["msg"]).removeprefix("Value error, ").split())
            message = f"{label}: {text}" + (f", not {detail['input']!r}" if _short(detail["input"]) else "")
        if message not in found.setdefault(path, []):
            found[path].append(message)
    entries = []
    for path, messages in found.items():
        place = layers.place(path, top)
        entries.append((place.document.name, place.document.line(path), f"{place}: {'; or '.join(messages)}"))
    rows = [text for _, _, text in sorted(entries)]
    return rows[0] if len(rows) == 1 else f"{top.name}: {len(rows)} problems\n" + "\n".join(f"  {row}" for row in rows)


def _short(value: Any) -> bool:
    return isinstance(value, (str, int, float, NoneType)) and len(repr(value)) <= 60


def _path_in(data: Any, location: Sequence[int | str]) -> KeyPath:
    """The part of a pydantic location that is in the data: names of union members, and what a short form leaves out,
    are not."""
    path: KeyPath = ()
    for part in location:
        if isinstance(data, Mapping) and part in data:
            data, path = data[part], (*path, str(part))
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data, path = data[part], (*path, part)
    return path


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


def _kinds(data: Mapping[Any, Any]) -> tuple[list[str], list[str]]:
    """The keys of data that only fusion recipes have, and those that only mergekit's have."""
    return [key for key in FUSION if key in data], [key for key in MERGEKIT if key in data]


def kind_of(path: Path | str) -> Literal["fusion", "mergekit"]:
    """What a recipe is for: ``fusion`` (fusekit run) or ``mergekit`` (mergekit-yaml, fusekit merge).

    Raises RecipeError when it has keys of both, or of neither, or cannot be read.
    """
    data = safe_yaml.load(path).data
    ours, theirs = _kinds(data if isinstance(data, dict) else {})
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
