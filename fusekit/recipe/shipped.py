"""The recipes that ship with fusekit: in the wheel beside the package, in a checkout at its top."""

from __future__ import annotations

from pathlib import Path

from fusekit.errors import RecipeError

SCHEMA = "fusion.schema.json"
EDITORS = "# yaml-language-server:"
"""How a line begins by which editors find the schema of a file."""


def folder() -> Path:
    """The folder of the shipped recipes. Raises RecipeError if this installation has none."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "recipes", package.parent / "recipes"):
        if candidate.is_dir():
            return candidate
    raise RecipeError(f"no recipes beside {package}: the installation is incomplete; reinstall fusekit")


def recipes() -> dict[str, Path]:
    """Every shipped recipe by name, in alphabetical order."""
    return {path.stem: path for path in sorted(folder().glob("*.yml"))}


def title(path: Path) -> str:
    """The first line of a recipe, which says what it is; before it there may be one for editors."""
    with path.open(encoding="utf-8") as file:
        first = file.readline()
        line = file.readline() if first.startswith(EDITORS) else first
        return line.lstrip("#").strip()


def schema() -> Path:
    """The JSON schema that fusion recipes name in their first line."""
    return folder() / SCHEMA


def find(name: str) -> Path:
    """The shipped recipe of this name, with or without `.yml`. Raises RecipeError with the nearest names."""
    import difflib

    known = recipes()
    key = name.removesuffix(".yml")
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`fusekit ls` lists them"
    raise RecipeError(f"no shipped recipe is called {key!r}; {hint}")
