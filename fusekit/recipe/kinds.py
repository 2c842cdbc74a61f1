"""Whether a YAML file is a fusion recipe or one of mergekit's: by its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fusekit import yaml as safe_yaml
from fusekit.errors import RecipeError

FUSION = ("pivot", "sources", "include", "preset")
MERGEKIT = ("merge_method", "models", "slices", "modules")

Kind = Literal["fusion", "mergekit"]


def kind_of(path: Path | str) -> Kind:
    """What a recipe is for: ``fusion`` (fusekit run) or ``mergekit`` (mergekit-yaml, fusekit merge).

    Raises RecipeError when it has keys of both, or of neither, or cannot be read.
    """
    data = safe_yaml.load(path).data
    keys = set(map(str, data)) if isinstance(data, dict) else set()
    ours, theirs = [key for key in FUSION if key in keys], [key for key in MERGEKIT if key in keys]
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
