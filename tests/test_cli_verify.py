"""``fusekit verify`` on what the stages of a run leave behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from fusekit import artifacts as artifact
from fusekit.cli import cli
from tests.capture.store_processes import write


def verify(path: Path, status: int) -> str:
    result = CliRunner().invoke(cli, ["verify", str(path)])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def run(tmp_path: Path) -> Path:
    artifact.publish(tmp_path / "data", "data", {}, lambda into: (into / "rows.jsonl").write_text("{}\n"))
    write(tmp_path / "captures" / "pivot")
    return tmp_path


def test_stages_and_stores_are_verified_alike(run):
    said = verify(run, 0)
    assert f"{run}/data: 1 file of the stage 'data', all as committed" in said
    assert f"{run}/captures/pivot: " in said
    (run / "data" / "rows.jsonl").write_text("[]\n")
    assert f"{run}/data/rows.jsonl: its content is not what was written" in verify(run, 1)
