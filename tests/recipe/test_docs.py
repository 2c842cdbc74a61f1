"""The table of presets in docs/recipe.md says what the code does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusekit.recipe.loading import PRESETS, load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
# What transformers does where a preset says nothing.
TRAINER = {"adam_beta1": 0.9, "adam_beta2": 0.999, "max_grad_norm": 1.0}


def table() -> dict[str, dict[str, str]]:
    """Value to column to cell."""
    lines = PAGE.read_text(encoding="utf-8").split("## Presets", 1)[1].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in rows}


def resolved(preset: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{preset}.yml"
    path.write_text(f"preset: {preset}\npivot: {{model: a/p}}\nsources: [{{model: b/s}}]\ndata: {{path: x}}\n")
    found: dict[str, Any] = load_recipe(path).model_dump(mode="json")
    found["sources"] = found["sources"][0]
    found["distill"] = TRAINER | found["distill"]
    return found


def looked_up(recipe: dict[str, Any], name: str) -> Any:
    value: Any = recipe
    for part in name.split("."):
        value = None if value is None else value[part]
    return value


def flat(prefix: str, values: dict[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        name = f"{prefix}.{key}"
        yield from flat(name, value) if isinstance(value, dict) and value else [name]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_value_of_the_table_is_that_of_the_code(preset, tmp_path):
    recipe = resolved(preset, tmp_path)
    wrong = []
    for name, cells in table().items():
        cell, value = cells[preset], looked_up(recipe, name)
        said = None if cell == "-" else yaml.safe_load(cell)
        said = float(said) if isinstance(value, float) else said  # 1e-5 is text to YAML
        if said != value:
            wrong.append(f"{name}: {cell} in the table, {value!r} in the code")
    assert wrong == []


def test_every_value_that_a_preset_sets_is_in_the_table():
    sections = {name.replace("source.", "sources.") for values in PRESETS.values() for name in _names(values)}
    assert sorted(sections - table().keys()) == []


def _names(preset: dict[str, Any]) -> Iterator[str]:
    for section, values in preset.items():
        yield from flat(section, values)


def test_what_differs_from_a_paper_is_bold_and_nothing_else():
    for name, cells in table().items():
        for ours, paper in (("fusellm", "FuseLLM"), ("fusechat", "FuseChat")):
            told = cells[paper]
            if told in ("?", "-") or name == "merge.merge_method":
                continue
            assert (told.strip("*") != cells[ours]) == told.startswith("**"), f"{name}: {cells[ours]} and {told}"
