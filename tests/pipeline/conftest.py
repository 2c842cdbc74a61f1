"""Finished runs, made once; tests that change one take a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.pipeline.worlds import RUN, go, on_path, write_profuser, write_recipe
from tests.processes import fusekit


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


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe with every stage, whose run nobody disturbed."""
    folder = write_profuser(tmp_path_factory.mktemp("whole"))
    done = fusekit(folder, *RUN, before=on_path)
    assert done.exitcode == 0, done.output
    return folder


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same recipe, not run yet, in the working directory."""
    folder = write_profuser(tmp_path / "world")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder
