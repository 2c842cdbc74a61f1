"""Three small models, a recipe of them, and what tests of merges ask of a merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM

from fusekit import mergekit_private
from fusekit.errors import FusekitError, MergeError
from fusekit.merging import Settings, merge
from tests.helpers import edit_config, edit_tensors, family, merge_recipe, refused, same_tensors, tensors_of, tiny_llama

MERGE = ("merge", "recipe.yml", "out")
"""Words of a command."""
QUIET = Settings(say=lambda _: None)
OVERWRITE = Settings(overwrite=True, say=lambda _: None)
UNESTIMATED = Settings(ignore_estimates=True, say=lambda _: None)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"

Change = Callable[[Path], object]
"""Does something to the folder of the models."""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests ask no network, whatever name a random recipe makes up; the hub's tests run in processes of their own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models base, target1 and target2."""
    root = tmp_path_factory.mktemp("family")
    family(root, targets=2)
    return root


@pytest.fixture
def workshop(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the models' folder, and the working directory."""
    folder = tmp_path / "shop"
    shutil.copytree(models, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def write_recipe(workshop: Path) -> Callable[..., Path]:
    """Write recipe.yml: a task arithmetic merge of the three models, with top-level keys replaced (None: removed)."""

    def write(**changes: Any) -> Path:
        keys: dict[str, Any] = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}} | changes
        path = workshop / "recipe.yml"
        path.write_text(yaml.safe_dump(merge_recipe("base", ["target1", "target2"], **keys), sort_keys=False))
        return path

    return write


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe()


def listing(folder: Path) -> list[str]:
    """Names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def traces(folder: Path) -> list[str]:
    """What a merge left beside its output: staging folders and the like; the empty lock file may stay."""
    return [name for name in listing(folder) if name.startswith(".") and not name.endswith(".lock")]


def merge_refused(
    recipe: Path,
    *parts: str,
    kind: type[FusekitError] = MergeError,
    settings: Settings = QUIET,
    options: MergeOptions | None = None,
) -> str:
    """A merge is an error that names these parts, and leaves nothing behind; its message."""
    before = [name for name in listing(recipe.parent) if not name.endswith(".lock")]
    with refused(kind, *parts) as caught:
        merge(recipe, "out", options, settings)
    assert [name for name in listing(recipe.parent) if not name.endswith(".lock")] == before
    return str(caught.value)


def stock(recipe: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """What mergekit itself makes of a recipe."""
    mergekit_private.loaders().clear()  # of models that had these relative names before
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    run_merge(config, str(out), MergeOptions(quiet=True, write_model_card=False, **options))
    return tensors_of(out)


def merged_as_by_stock(recipe: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Merge to "out": its tensors are those of mergekit itself to the bit, and transformers takes exactly them."""
    done = merge(recipe, "out", settings=QUIET)
    out = recipe.parent / "out"
    found = tensors_of(out)
    assert done.tensors == len(found)
    same_tensors(found, stock(recipe, recipe.parent / "stock", **options))
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return found


def configured(who: str, **changes: Any) -> Change:
    """Change keys of a model's config.json; None removes one."""
    return lambda shop: edit_config(shop / who, **changes)


def with_tensor(who: str, name: str, tensor: torch.Tensor | None) -> Change:
    """Give a model a tensor of this name; None removes it."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return lambda shop: edit_tensors(shop / who, edit)


def written(name: str, text: str) -> Change:
    """Write a file."""
    return lambda shop: (shop / name).write_text(text)


def made(who: str, **config: Any) -> Change:
    """Make a model of random weights."""
    return lambda shop: tiny_llama(shop / who, seed=5, **config)
