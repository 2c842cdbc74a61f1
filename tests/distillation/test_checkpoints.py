"""Checkpoints with real damage: whatever is missing or changed, the previous good one is used, and it is said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fusekit.distillation import outputs
from tests.distillation import runs

FILES = (
    "config.json",
    "fusekit.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoints of its last two steps, the last over what another run left there."""
    out = tmp_path_factory.mktemp("trained")
    stale = out / "checkpoint-6" / "model-00001-of-00002.safetensors"
    stale.parent.mkdir()
    stale.write_bytes(b"of another run")
    runs.long_run(out, facts={"made_from": {"pivot": "p"}}).train()
    return out


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_the_latest_whole_checkpoint_is_used(trained: Path) -> None:
    said: list[str] = []
    assert [step for step, _ in outputs.checkpoints(trained)] == [6, 5]
    assert outputs.last_good(trained, said.append) == trained / "checkpoint-6"
    assert said == []
    assert tuple(sorted(path.name for path in (trained / "checkpoint-6").iterdir())) == FILES
    facts = outputs.facts_of(trained / "checkpoint-6")
    assert (facts["made_from"], facts["step"], facts["skipped"]) == ({"pivot": "p"}, 6, 0)
    assert facts["counts"]["labels"] > 0  # what a resumed run goes on counting from


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(name: str, damage: str, folder: Path) -> None:
    path = folder / "checkpoint-6" / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    said: list[str] = []
    assert outputs.last_good(folder, said.append) == folder / "checkpoint-5"
    assert len(said) == 1
    assert "checkpoint-6 is not used" in said[0]
    assert name in said[0]


def test_rotation_never_deletes_the_last_good_one(folder: Path) -> None:
    (folder / "checkpoint-6" / "scheduler.pt").unlink()
    (folder / "checkpoint-7").mkdir()  # begun, not finished
    assert outputs.rotate(folder, keep=1) == []
    assert outputs.last_good(folder) == folder / "checkpoint-5"
    (folder / "checkpoint-5" / "scheduler.pt").unlink()
    assert outputs.rotate(folder, keep=1) == []
    assert outputs.last_good(folder) is None


def test_rotation_keeps_as_many_as_asked_and_the_best(folder: Path) -> None:
    for step in (1, 2, 3):
        shutil.copytree(folder / "checkpoint-5", folder / f"checkpoint-{step}")
    deleted = outputs.rotate(folder, keep=2, also=folder / "checkpoint-1")
    assert [path.name for path in deleted] == ["checkpoint-3", "checkpoint-2"]
    assert [step for step, _ in outputs.checkpoints(folder)] == [6, 5, 1]


def test_a_save_that_dies_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former checkpoint may go only once the new one is recorded, also when one is all that is kept."""
    seal = outputs.seal

    def dying(checkpoint: Path, facts: dict[str, Any]) -> None:
        if checkpoint.name == "checkpoint-2":
            raise OSError("the power went")
        seal(checkpoint, facts)

    monkeypatch.setattr(outputs, "seal", dying)
    with pytest.raises(OSError, match="the power went"):
        runs.long_run(tmp_path, save_total_limit=1).train()
    assert [step for step, _ in outputs.checkpoints(tmp_path)] == [2, 1]
    assert outputs.last_good(tmp_path) == tmp_path / "checkpoint-1"
