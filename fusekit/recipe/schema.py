"""The JSON schema of fusion recipes: what an editor needs to complete and to check one.

It ships as ``recipes/fusion.schema.json``, which ``fusekit schema > recipes/fusion.schema.json`` writes anew.
"""

from __future__ import annotations

import json
from typing import Any

from fusekit.recipe.presets import PRESETS
from fusekit.recipe.sections import Recipe


def document() -> dict[str, Any]:
    """The schema. A recipe that includes others may leave to them what has to be there."""
    found: dict[str, Any] = Recipe.model_json_schema()
    include = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    about = "Files in the recipe's folder to build upon; the recipe's own values lie on top."
    required = found.pop("required")
    found["properties"] = {"include": include | {"description": about}} | found["properties"]
    found["properties"]["preset"]["enum"] = sorted(PRESETS)
    found["anyOf"] = [{"required": ["include"]}, {"required": required}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "Fusion recipe of fusekit"}


def schema_text() -> str:
    """The schema as it stands in its file."""
    return json.dumps(document(), indent=2, ensure_ascii=False) + "\n"
