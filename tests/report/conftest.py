"""One finished run for all tests, and a copy of it for those that change it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.report.worlds import make_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "out")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))
