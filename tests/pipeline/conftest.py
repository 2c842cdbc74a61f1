"""A finished run, made once; tests that change it take a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe
from tests.pipeline.worlds import write_recipe


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder and output of a finished run of one source. Not to be changed."""
    folder = tmp_path_factory.mktemp("run")
    run(load_recipe(write_recipe(folder, ["llama"])), folder / "out", say=lambda _: None)
    return folder, folder / "out"


@pytest.fixture
def finished(first: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of it: its recipe, which names the rows of the first, and its output."""
    folder, out = first
    shutil.copytree(out, tmp_path / "out")
    shutil.copyfile(folder / "recipe.yml", tmp_path / "recipe.yml")
    return tmp_path / "recipe.yml", tmp_path / "out"
