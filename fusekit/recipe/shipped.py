"""The recipes that ship with fusekit, in the wheel beside the package or in a checkout at its top, and their schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusekit.errors import RecipeError
from fusekit.recipe.loading import PRESETS
from fusekit.recipe.sections import Recipe
from fusekit.yaml import nearest

SCHEMA = "fusion.schema.json"
EDITORS = "# yaml-language-server:"  # how a line begins by which editors find the schema of a file

NEW = """\
# yaml-language-server: $schema=./fusion.schema.json
# A fusion recipe: check it with `fusekit validate`, see what it takes with `fusekit plan`, run it with `fusekit run`.

# The model to train, a folder or a name on the Hugging Face hub; the result has its architecture and tokenizer.
pivot: HuggingFaceTB/SmolLM2-135M-Instruct

# The models that it learns from, of any architecture and tokenizer. A mapping says more than the name:
#   - {model: Qwen/Qwen2.5-0.5B-Instruct, load: {dtype: bfloat16}}
sources:
  - HuggingFaceTB/SmolLM2-360M-Instruct
  - Qwen/Qwen2.5-0.5B-Instruct

# Examples that all of them read: a .jsonl, .json, .parquet or .txt file, or a name on the hub.
data: examples.jsonl

# Examples that nothing is trained on, to score every model on:
# evaluate: {path: held-out.jsonl}
"""
"""What ``fusekit new`` writes."""


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
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(EDITORS))
    return next(lines).lstrip("#").strip()


def find(name: str) -> Path:
    """The shipped recipe of this name, with or without `.yml`. Raises RecipeError with the nearest names."""
    known, key = recipes(), name.removesuffix(".yml")
    if key not in known:
        raise RecipeError(f"no shipped recipe is called {key!r}{nearest(key, known)}")
    return known[key]


def schema() -> dict[str, Any]:
    """The JSON schema of fusion recipes. One that includes others may leave to them what has to be there."""
    found: dict[str, Any] = Recipe.model_json_schema()
    include = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    about = "Files in the recipe's folder to build upon; the recipe's own values lie on top."
    required = found.pop("required")
    found["properties"] = {"include": include | {"description": about}} | found["properties"]
    found["properties"]["preset"]["enum"] = sorted(PRESETS)
    text = {"type": "string"}
    for section, short in (
        (found["properties"]["pivot"], [text]),
        (found["properties"]["sources"]["items"], [text]),
        (found["properties"]["data"], [text, {"type": "array", "items": text, "minItems": 1}]),
    ):
        section["anyOf"] = [*short, {"$ref": section.pop("$ref")}]
    found["properties"]["data"]["description"] = Recipe.model_fields["data"].description
    found["anyOf"] = [{"required": ["include"]}, {"required": required}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "Fusion recipe of fusekit"}


def schema_text() -> str:
    """The schema as it stands in its file."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
