"""From YAML to a checked recipe: includes, presets, ``--set``; every mistake at once, with its file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fusekit import yaml as safe_yaml
from fusekit.distillation.settings import PRESETS as DISTILLATION
from fusekit.errors import RecipeError
from fusekit.recipe.sections import UNREAD, Recipe
from fusekit.yaml import Document, KeyPath, Mistake, nearest, path_in, together

FUSION = ("pivot", "sources", "include", "preset")  # keys at the top that only fusion recipes have,
MERGEKIT = ("merge_method", "models", "slices", "modules")  # and that only mergekit's have


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

PRESETS: dict[str, dict[str, Any]] = {
    name: {"distill" if section == "training" else section: dict(values) for section, values in sections.items()}
    | _AROUND.get(name, {})
    for name, sections in DISTILLATION.items()
}


@dataclass
class _Written:
    """What files, later ones on top, and ``--set`` say, and where each value was written."""

    top: Document
    data: dict[str, Any] = field(default_factory=dict)
    files: list[tuple[Document, dict[str, Any]]] = field(default_factory=list)
    overrides: list[tuple[KeyPath, str]] = field(default_factory=list)

    def place(self, paths: Sequence[KeyPath]) -> tuple[str, int]:
        """The file and line of a value, or of the nearest that encloses it; of values that clash, of one of them."""
        path = max((path_in(self.data, path) for path in paths), key=len)
        for at, name in reversed(self.overrides):
            if path[: len(at)] == at:
                return name, 0
        for document, data in reversed(self.files):
            if path_in(data, path) == path:
                return document.name, document.line(path)
        # A section that overrides alone made.
        return next((name for at, name in self.overrides if at[: len(path)] == path), self.top.name), 0

    def report(self, mistakes: Iterable[Mistake]) -> str:
        """The text of an error with every mistake and its place, in the order of files and lines."""
        rows = sorted((*self.place(mistake.paths), mistake.says) for mistake in mistakes)
        lines = [f"{name}, line {line}: {says}" if line else f"{name}: {says}" for name, line, says in rows]
        return together(self.top.name, list(dict.fromkeys(lines)))


def load_recipe(
    source: Path | str | Document,
    overrides: Sequence[str] = (),
    check: Callable[[Recipe], Iterable[Mistake]] = lambda _: (),
) -> Recipe:
    """Read a fusion recipe.

    Args:
        source: a YAML file, or what was read from one. ``include: [other.yml]`` takes what other files in its folder
            say, the recipe's own values on top.
        overrides: ``a.b=value`` each, value in YAML, on top of everything; a number is an index into a list.
        check: what else is wrong with a recipe. It gets the recipe without its mistakes, and what it finds is reported
            together with them.

    Raises:
        RecipeError: every mistake with its file and line: unknown keys with the nearest known ones, values of a wrong
            kind or out of range, missing keys, includes that leave the folder or include each other.
    """
    top = source if isinstance(source, Document) else safe_yaml.load(source)
    if kind_of(top) == "mergekit":
        raise RecipeError(
            f"{top.name} is a mergekit recipe, which merges models of one architecture: `fusekit merge {top.name} OUT` "
            "runs it. A fusion recipe names a pivot and sources"
        )
    written = _Written(top)
    written.data = _included(written, top, Path(top.name).parent.resolve(), ())
    for override in overrides:
        written.overrides.append((_override(written.data, override), f"--set {override}"))
    return _checked(written, check)


def _included(written: _Written, document: Document, folder: Path, through: tuple[Path, ...]) -> dict[str, Any]:
    """What a file says on top of what it includes. folder: which no include may leave."""
    path, own = Path(document.name), Path(document.name).resolve()
    if not isinstance(document.data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with `pivot`, `sources` and `data`")
    data = in_full(document.data)
    found: dict[str, Any] = {}
    includes = data.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) and "\0" not in name for name in includes):
        raise RecipeError(f"{path}, line {document.line(('include',))}: include is a file name or a list of them")
    for index, name in enumerate(includes):
        where, included = f"{path}, line {document.line(('include', index))}", (path.parent / name).resolve()
        if not included.is_relative_to(folder):
            raise RecipeError(f"{where}: {name} is outside the recipe's folder {folder}: copy it there")
        if not included.is_file():
            raise RecipeError(f"{where}: there is no file {name!r} in {path.parent}")
        if included in (*through, own):
            raise RecipeError(f"{where}: {name} includes itself: take the line out")
        found = _merged(found, _included(written, safe_yaml.load(path.parent / name), folder, (*through, own)))
    written.files.append((document, data))
    return _merged(found, data)


def _override(data: dict[str, Any], override: str) -> KeyPath:
    """Set a value; returns its path."""
    key, equals, text = override.partition("=")
    value = safe_yaml.loads(text, name=f"--set {override}").data
    target: Any = data
    path: list[Any] = []
    try:
        *within, last = key.strip().split(".") if equals else [""]
        for part in within:
            path.append(int(part) if isinstance(target, list) else part)
            target = target[path[-1]] if isinstance(target, list) else target.setdefault(part, {})
        path.append(int(last) if isinstance(target, list) else last)
        if not last or (isinstance(target, list) and path[-1] not in range(len(target))):
            raise IndexError
        target[path[-1]] = value
    except (AttributeError, IndexError, TypeError, ValueError):
        raise RecipeError(
            f"--set {override}: {key!r} names no value: write section.key=value, and for an item of a list its number, "
            "counted from 0"
        ) from None
    return tuple(path)


def _checked(written: _Written, check: Callable[[Recipe], Iterable[Mistake]]) -> Recipe:
    """The recipe that was written. Raises RecipeError with one line per mistake."""
    written.data = in_full(written.data)
    found: list[Mistake] = []
    name = written.data.get("preset", "fusekit")
    if not isinstance(name, str) or name not in PRESETS:
        found.append(Mistake(f"unknown preset {name!r}{nearest(str(name), PRESETS)}", ("preset",)))
        name = "fusekit"
    recipe, wrong = _validated(written.data | {"preset": name}, PRESETS[name])
    found += wrong
    if recipe is not None:
        found += check(recipe)
    if found or recipe is None:
        raise RecipeError(written.report(found))
    return recipe


def _validated(data: Mapping[str, Any], preset: Mapping[str, Any]) -> tuple[Recipe | None, list[Mistake]]:
    """A recipe without what is wrong with it, None where too much is; and the mistakes."""
    left = plain(data)
    found: list[Mistake] = []
    for _ in range(4):
        try:
            recipe = Recipe.model_validate(_with_preset(left, preset))
            if not (wrong := list(recipe.clashes())):
                return recipe, found
        except ValidationError as error:
            messages: dict[KeyPath, list[str]] = {}  # several where a value may be of several kinds
            for path, message in (_mistake(detail, left) for detail in error.errors(include_url=False)):
                messages.setdefault(path, []).append(message)
            wrong = [Mistake("; or ".join(dict.fromkeys(said)), path) for path, said in messages.items()]
        found += wrong
        for mistake in wrong:
            _take_out(left, max(mistake.paths, key=lambda path: len(path_in(left, path))))
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


def in_full(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with its short forms written out: a pivot or source that is a path, data that are one or several."""
    found: dict[str, Any] = plain(data)
    if isinstance(found.get("pivot"), str):
        found["pivot"] = {"model": found["pivot"]}
    if isinstance(found.get("sources"), list):
        found["sources"] = [{"model": s} if isinstance(s, str) else s for s in found["sources"]]
    if isinstance(found.get("data"), (str, list)):
        found["data"] = {"path": found["data"]}
    return found


def plain(value: Any) -> Any:
    """A deep copy with keys as text, so that no two layers share an object."""
    if isinstance(value, Mapping):
        return {str(key): plain(child) for key, child in value.items()}
    return [plain(child) for child in value] if isinstance(value, list) else value


def _with_preset(data: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    result = _merged({key: value for key, value in preset.items() if key != "source"}, data)
    if isinstance(result.get("sources"), list):
        per_source = preset.get("source", {})
        result["sources"] = [_merged(per_source, s) if isinstance(s, dict) else s for s in result["sources"]]
    return result


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; anything else, lists too, replaces what was there."""
    result: dict[str, Any] = plain(below)
    for key, value in above.items():
        known = result.get(key)
        result[key] = plain(value)
        if isinstance(value, Mapping) and isinstance(known, dict):
            method = known.get("merge_method")
            # Another merge method has other parameters.
            if key != "merge" or value.get("merge_method", method) == method:
                result[key] = _merged(known, value)
    return result


def _mistake(detail: Any, data: Any) -> tuple[KeyPath, str]:
    """Where a mistake that pydantic found is, and what it is."""
    path = path_in(data, detail["loc"])
    label = ".".join(map(str, path)) or "recipe"
    *within, key = detail["loc"] or ("",)
    if detail["type"] == "missing":
        return (*path, key), f"`{key}` is missing{' in ' + label if path else ''}"
    if detail["type"] == "extra_forbidden":
        return path, f"unknown key {key!r}{nearest(str(key), _fields(within))}"
    text, value = " ".join(detail["msg"].removeprefix("Value error, ").split()), detail["input"]
    is_short = isinstance(value, (str, int, float)) and len(repr(value)) <= 60
    return path, f"{label}: {text}" + (f", not {value!r}" if text.startswith("Input should") and is_short else "")


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
