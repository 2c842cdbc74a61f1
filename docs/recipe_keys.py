"""The page of every key of a recipe and every value of a preset: python docs/recipe_keys.py > docs/recipe-keys.md"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fusekit.artifacts import flat
from fusekit.recipe import shipped
from fusekit.recipe.loading import PRESETS, load_recipe
from fusekit.yaml import loads

_HEAD = """# Every key of a recipe

`python docs/recipe_keys.py` writes this page from the settings, as `fusekit schema` writes the JSON schema for editors.
[The recipe](recipe.md) says how they work together. Where nothing stands as a default, the key has to be there.
"""


def markdown() -> str:
    """The page, as it stands in its file."""
    schema = shipped.schema()
    sections = {name: about for name, about in schema["properties"].items() if _section(about, schema)}
    others = {name: about for name, about in schema["properties"].items() if name not in sections}
    parts = [_HEAD, *_table({"properties": others, "required": schema["anyOf"][-1]["required"]}, schema)]
    pivot = _section(schema["properties"]["pivot"], schema)["properties"]
    for name, about in sections.items():
        section = _section(about, schema)
        what = about.get("description") or section["description"]
        if section.get("additionalProperties"):
            what += " Any other field of transformers' `TrainingArguments` is a key of it, too."
        if name == "sources":
            own = {key: value for key, value in section["properties"].items() if value != pivot.get(key)}
            section, what = {"properties": own}, f"{what} Each has the keys of `pivot`, and these:"
        parts += ["", f"## {name}", "", what, "", *_table(section, schema)]
    parts += ["", "## Presets", "", "What each preset sets, or has as the default.", "", *_presets()]
    return "\n".join(parts) + "\n"


def _section(about: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The definition that a property or its items refer to, empty where there is none."""
    for option in (about, about.get("items", {}), *about.get("anyOf", []), *about.get("items", {}).get("anyOf", [])):
        if "$ref" in option:
            found: dict[str, Any] = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]]
            return next((whole for whole in found.get("anyOf", ()) if "properties" in whole), found)
    return {}


def _table(section: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    return ["| key | value | default | what it is |", "|---|---|---|---|", *_rows(section, schema, "")]


def _rows(section: Mapping[str, Any], schema: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, about in section.get("properties", {}).items():
        inner = _section(about, schema)
        text = about.get("description") or inner.get("description", "")
        default = about.get("default")
        shown = "" if name in section.get("required", ()) or isinstance(default, dict) else f"`{_plain(default)}`"
        cells = [f"`{prefix}{name}`", _kind(about, schema), shown, " ".join(text.split())]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield from _rows(inner, schema, f"{prefix}{name}.")


def _kind(about: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in about["enum"])
    if "anyOf" in about:
        return " or ".join(dict.fromkeys(_kind(option, schema) for option in about["anyOf"]))
    if "$ref" in about:
        found = schema["$defs"][about["$ref"].rsplit("/", 1)[-1]]
        return "a mapping" if "properties" in found else _kind(found, schema)
    if about.get("type") == "array":
        return f"a list: {_kind(about.get('items', {}), schema)}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = ", ".join(f"{sign} {about[name]:.12g}" for name, sign in bounds.items() if name in about)
    names = {"string": "text", "object": "a mapping", "integer": "an integer", "number": "a number", "null": "`null`"}
    return " ".join(filter(None, [names.get(about.get("type", ""), "`true` or `false`"), limits]))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value if isinstance(value, str) else json.dumps(value))


def _presets() -> list[str]:
    """Every value that a preset sets, in all of them."""
    models = "pivot: pivot\nsources: [source]\ndata: rows.jsonl\n"
    values = {}
    for name in PRESETS:
        found = load_recipe(loads(f"preset: {name}\n{models}")).model_dump(mode="json")
        values[name] = flat(found | {"sources": found["sources"][0]})
    named = {name for preset in PRESETS.values() for name in flat(preset)}
    keys = [
        key
        for key in dict.fromkeys(key for found in values.values() for key in found)
        if key.replace("sources.", "source.", 1) in named
    ]
    rows = ["| value | " + " | ".join(PRESETS) + " |", "|---" * (len(PRESETS) + 1) + "|"]
    return rows + [
        f"| `{key}` | " + " | ".join(_plain(found[key]) if key in found else "" for found in values.values()) + " |"
        for key in keys
    ]


if __name__ == "__main__":
    print(markdown(), end="")
