"""Three small models, a recipe of them, and what tests of merges ask of a merge."""

from __future__ import annotations

import json
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
from safetensors.torch import load_file

from fusekit import mergekit_private
from fusekit.errors import FusekitError, MergeError
from fusekit.merging import Settings, merge
from tests.helpers import edit_tensors, family, tiny_llama

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
def _family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    family(root, targets=2, dtype=torch.float32)
    return root


@pytest.fixture
def workshop(_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, and the working directory, with the models base, target1 and target2."""
    folder = tmp_path / "shop"
    shutil.copytree(_family, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def write_recipe(workshop: Path) -> Callable[..., Path]:
    """Write recipe.yml: a task arithmetic merge of the three models, with top-level keys replaced (None: removed)."""

    def write(**changes: Any) -> Path:
        content: dict[str, Any] = {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": "target1"}, {"model": "target2"}],
            "parameters": {"weight": 0.5},
            "dtype": "float32",
        } | changes
        path = workshop / "recipe.yml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
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


def refused(
    recipe: Path,
    *parts: str,
    kind: type[FusekitError] = MergeError,
    settings: Settings = QUIET,
    options: MergeOptions | None = None,
) -> str:
    """A merge is an error that names these parts, and leaves nothing behind; its message."""
    before = [name for name in listing(recipe.parent) if not name.endswith(".lock")]
    with pytest.raises(kind) as caught:
        merge(recipe, "out", options, settings)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert [name for name in listing(recipe.parent) if not name.endswith(".lock")] == before
    return message


def result(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model."""
    return {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()}


def stock(recipe: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """What mergekit itself makes of a recipe."""
    mergekit_private.loaders().clear()  # of models that had these relative names before
    config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
    run_merge(config, str(out), MergeOptions(quiet=True, write_model_card=False, **options))
    return result(out)


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and values to the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def configured(who: str, **changes: Any) -> Change:
    """Change keys of a model's config.json; None removes one."""

    def change(shop: Path) -> None:
        file = shop / who / "config.json"
        content = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def edited(who: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change the tensors of a model."""
    return lambda shop: edit_tensors(shop / who, edit)


def with_tensor(who: str, name: str, tensor: torch.Tensor | None) -> Change:
    """Give a model a tensor of this name; None removes it."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return edited(who, edit)


def written(name: str, text: str) -> Change:
    """Write a file."""
    return lambda shop: (shop / name).write_text(text)


def made(who: str, **config: Any) -> Change:
    """Make a model of random weights."""
    return lambda shop: tiny_llama(shop / who, seed=5, **config)
