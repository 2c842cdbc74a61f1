from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers import family

MERGE = ("merge", "recipe.yml", "out")
"""Words of a command."""


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
