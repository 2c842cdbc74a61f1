"""What the study compares: ways to train, each the demo's recipe with some values changed, and ways to merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusekit.distillation.settings import PRESETS
from fusekit.recipe import Recipe
from fusekit.recipe.loading import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "demo-pairwise.yml"

TRAINING_OF_A_LOSS = ("lm_weight", "loss", "truncation")


@dataclass(frozen=True)
class Arm:
    """A way to train. title: for the tables. overrides: of the demo's recipe, ``a.b=value`` each. merged: whether it
    makes a target per source, which are then merged as :func:`merges_of` says. tier: arms of a lower one are done
    first, in every seed."""

    title: str
    overrides: tuple[str, ...]
    merged: bool = False
    tier: int = 1


def of_preset(preset: str, **changes: str) -> tuple[str, ...]:
    """What a preset says about alignment, fusion and loss, over the demo's epochs, learning rate and batches.

    changes: of the section ``alignment``.
    """
    values = PRESETS[preset]
    found = {f"alignment.{name}": value for name, value in (values.get("alignment", {}) | changes).items()}
    found |= {f"fusion.{name}": value for name, value in values.get("fusion", {}).items()}
    found |= {f"distill.{n}": value for n, value in values.get("training", {}).items() if n in TRAINING_OF_A_LOSS}
    return tuple(f"{name}={json.dumps(value)}" for name, value in found.items())


JOINT = ("fusion.mode=joint",)

ARMS: dict[str, Arm] = {
    "pairwise": Arm("pairwise, the demo's settings", (), merged=True, tier=0),
    "fusechat": Arm("pairwise, FuseChat's loss and MS", of_preset("fusechat"), merged=True, tier=2),
    "plain": Arm("plain fine-tuning", ("distill.lm_weight=1",), tier=0),
    "joint-prefix": Arm("joint, span and prefix map", JOINT, tier=0),
    "joint-em": Arm("joint, EM", (*JOINT, "alignment.vocabulary=em")),
    "joint-mined": Arm("joint, MinED", (*JOINT, "alignment.vocabulary=mined")),
    "joint-ms": Arm("joint, MS", (*JOINT, "alignment.vocabulary=ms")),
    "joint-avg": Arm("joint, prefix map, AvgCE", (*JOINT, "fusion.function=avg_ce"), tier=3),
    "joint-weight-0.9": Arm("joint, prefix map, λ 0.9", (*JOINT, "distill.lm_weight=0.9")),
    "joint-renormalize": Arm("joint, prefix map, renormalized", (*JOINT, "distill.truncation=renormalize"), tier=3),
    "fusellm": Arm("joint, FuseLLM's loss, dtw, MinED", of_preset("fusellm", tokens="dtw")),
    "fusellm-em": Arm("joint, FuseLLM's loss, dtw, EM", of_preset("fusellm", tokens="dtw", vocabulary="em"), tier=4),
    "fusellm-ms": Arm("joint, FuseLLM's loss, dtw, MS", of_preset("fusellm", tokens="dtw", vocabulary="ms"), tier=4),
}
"""By name, in the order in which a seed's are done: the long ones first, so that processes end together."""


@dataclass(frozen=True)
class Merge:
    """A way to merge: a method of mergekit or fusekit, its parameters, and those of each model."""

    title: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    per_target: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, pivot: Path, targets: Sequence[Path]) -> dict[str, Any]:
        """What ``mergekit-yaml`` reads."""
        models = [
            {"model": str(target), **({"parameters": dict(self.per_target)} if self.per_target else {})}
            for target in targets
        ]
        document: dict[str, Any] = {"merge_method": self.method, "models": models, "dtype": "bfloat16"}
        if self.parameters:
            document["parameters"] = dict(self.parameters)
        return document if self.method == "linear" else {**document, "base_model": str(pivot)}


SHARES = {"paper": (0.1, 0.2, 0.5, 1.0), "renormalized": (0.1, 0.5, 1.0), "fuseai": (0.1, 0.5, 1.0)}

# The baselines have FuseChat's settings: equal weights, 0.3 each in task arithmetic, density 0.6 in TIES and DARE.
MERGES: dict[str, Merge] = {
    "linear": Merge("linear", "linear", {}, {"weight": 1.0}),
    "task-arithmetic": Merge("task arithmetic, 0.3 each", "task_arithmetic", {"normalize": False}, {"weight": 0.3}),
    "ties": Merge("TIES, density 0.6", "ties", {"normalize": True}, {"density": 0.6, "weight": 0.2}),
    "dare": Merge("DARE, density 0.6", "dare_linear", {"normalize": True}, {"density": 0.6, "weight": 0.2}),
    "varm": Merge("VaRM, matrix", "varm", {"granularity": "matrix"}),
} | {
    f"sce-{variant}-{share}": Merge(
        f"SCE {variant}, τ {share}", "fusechat_sce", {"select_topk": share, "variant": variant}
    )
    for variant, shares in SHARES.items()
    for share in shares
}

FEWER = ("linear", "task-arithmetic", "ties", "dare", "varm", "sce-paper-0.1", "sce-paper-1.0", "sce-fuseai-0.1")
"""How the targets of the arms of other losses are merged, and which merges get every figure."""


def merges_of(arm: str) -> tuple[str, ...]:
    """How the targets of an arm are merged: those of the demo's settings in every way, others in the published ones."""
    return tuple(MERGES) if arm == "pairwise" else FEWER


def recipe_of(arm: str | None, common: Sequence[str], seed: int = 0, recipe: Path = RECIPE) -> Recipe:
    """The demo's recipe as an arm changes it. arm: None for what is common to all. Raises RecipeError."""
    changes = ARMS[arm].overrides if arm is not None else ()
    return load_recipe(recipe, [*common, f"distill.seed={seed}", *changes])
