"""What in the folder of a run is of its recipe: an earlier one may have left targets, a merged model and scores there.

Nothing large is read: models are told apart by the hashes in their manifests.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from fusekit.artifacts import Artifact, weights_hash
from fusekit.distillation.outputs import targets_of
from fusekit.errors import FusekitError, StorageError
from fusekit.pipeline.layout import BASELINE, PIVOT, Layout
from fusekit.recipe import Recipe
from fusekit.report import text
from fusekit.report.records import Results, Scores

_MODELS = "targets/"


def target_names(recipe: Mapping[str, Any], layout: Layout) -> list[str]:
    """The targets that a recipe asks for; of one that this version cannot read, all that are there."""
    try:
        known = Recipe.model_validate(recipe)
        names = [source.label for source in known.sources]
        return [target.name for target in targets_of(known.settings, names, layout.targets)]
    except (ValidationError, FusekitError):
        there = [path.name for path in layout.targets.glob("*")]
        return sorted(name for name in there if not name.startswith(".") and not name.endswith(".training"))


def merged_of_others(
    recipe: Mapping[str, Any], layout: Layout, merged: Artifact, targets: Collection[str]
) -> str | None:
    """Why a merged model is not the recipe's, None where it is. merged: its manifest. targets: names that are wanted.

    A target that is not there any more, or has no manifest, is taken for the one that was merged.
    """
    if recipe.get("merge") is None:
        return "the recipe merges nothing"
    used = merged_targets(merged)
    if set(used) != set(targets):
        made_from, wanted = text.listed(sorted(used)) or "nothing that is known", text.listed(sorted(targets))
        return f"it was merged from {made_from}, and the recipe's targets are {wanted}"
    changed = [name for name in targets if _hash(layout, f"{_MODELS}{name}") not in (None, used[name])]
    return f"it was merged before the present {text.listed(changed)} was made" if changed else None


def merged_targets(merged: Artifact) -> dict[str, str]:
    """What a merged model was made from: names of targets, and hashes of their weights."""
    used = merged.inputs.get("targets")
    return {str(name): str(known) for name, known in used.items()} if isinstance(used, dict) else {}


def scores_of_others(
    layout: Layout,
    results: Results,
    scored: Mapping[str, tuple[Artifact | None, Scores | None]],
    models: Mapping[str, str | None],
) -> dict[str, str]:
    """The models of ``results.json`` whose scores are not those of the model that is there now, and why.

    Args:
        layout: of the run.
        results: all scores.
        scored: by model of ``models``, the manifest and the scores of its artifact.
        models: those that the recipe has, with a hash for what stands at a target's place, None where none is known.
    """
    found = {}
    for name, scores in results.models.items():
        known, own = scored.get(name, (None, None))
        held_out = {metric: values for metric, values in scores.items() if metric != "lm_eval"}
        if name not in models:
            found[name] = "the recipe has no such model, or it is not there"
        elif name != PIVOT and not name.startswith("sources/"):
            now = _hash(layout, "baselines/sft" if name == BASELINE else name) or models[name]
            if now != (known.inputs.get("model") if known is not None else None):
                found[name] = "they are of another model than the one that is there now"
        if name not in found and own is not None and json.dumps(own.root) != json.dumps(held_out):
            found[name] = "they were made anew, and results.json does not have them yet"
    return found


def _hash(layout: Layout, place: str) -> str | None:
    try:
        return weights_hash(layout.out / place)
    except StorageError:  # not there, no manifest, or a damaged one, which is said elsewhere
        return None
