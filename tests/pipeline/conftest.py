"""A finished run, made once; tests that change it take a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.pipeline.worlds import go, write_recipe


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder and output of a finished run of one source. Not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    go(write_recipe(folder, ["llama"]), folder / "out")
    return folder, folder / "out"


@pytest.fixture
def finished(first: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of it: its recipe, which names the rows of the first, and its output."""
    folder, out = first
    shutil.copytree(out, tmp_path / "out")
    shutil.copyfile(folder / "recipe.yml", tmp_path / "recipe.yml")
    return tmp_path / "recipe.yml", tmp_path / "out"


@pytest.fixture
def captured(finished: tuple[Path, Path]) -> tuple[Path, Path]:
    """A copy of it that has got as far as its captures."""
    recipe, out = finished
    for name in ("alignment", "targets", "baselines", "merged", "evaluation"):
        shutil.rmtree(out / name)
    return recipe, out
