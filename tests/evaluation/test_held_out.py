"""Held-out rows: which are read, from files and from the hub, and what tells that they are others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fusekit.cli import cli
from fusekit.data import reading
from fusekit.errors import DataError
from fusekit.evaluation.settings import held_out_hash, held_out_rows
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe
from tests.pipeline.conftest import finished, first  # noqa: F401
from tests.pipeline.worlds import stamps

PIVOT = str(Path(__file__).parents[2] / "demo" / "models" / "pivot")


def record(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def skills(tmp_path: Path) -> Path:
    folder = tmp_path / "held-out"
    folder.mkdir()
    for skill in ("add", "facts"):
        rows = [record(f"{skill} {number}", str(number)) for number in range(5)]
        (folder / f"{skill}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "notes.md").write_text("no rows")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, object]]]:
    """What a data set on the hub holds, by split; its revision and configuration are looked at as they are asked."""
    held: dict[str, list[dict[str, object]]] = {"test": [record("1+1=", "2")], "asked": []}

    def records(repository: str, *, split: str, **asked: object):
        held["asked"].append({"split": split, **asked})
        return iter([(f"{repository}, row", row) for row in held[split]])

    monkeypatch.setattr(reading, "hub_records", records)
    return held


def test_a_limit_is_of_each_file_of_a_folder(skills: Path) -> None:
    rows = held_out_rows(str(skills), limit=2)
    assert [(row.dataset, row.messages[1].content) for row in rows] == [
        ("add", "0"),
        ("add", "1"),
        ("facts", "0"),
        ("facts", "1"),
    ]
    assert len(held_out_rows(str(skills))) == 10
    assert len(held_out_rows(str(skills / "add.jsonl"), limit=2)) == 2
    (skills / "add.jsonl").unlink()
    (skills / "facts.jsonl").unlink()
    with pytest.raises(DataError, match="is a folder without a file that ends in"):
        held_out_rows(str(skills))


def test_files_are_told_apart_by_their_hash_and_the_rest_by_its_rows(skills: Path) -> None:
    file, folder, rows = str(skills / "add.jsonl"), str(skills), held_out_rows(str(skills), limit=2)
    assert held_out_hash(file, "of the file", 2, rows) == "of the file"
    assert held_out_hash(folder, "of the files", None, rows) == "of the files"
    assert held_out_hash(folder, "of the files", 2, rows) == held_out_hash("org/set", None, 2, rows)
    assert held_out_hash("org/set", None, 2, rows) != held_out_hash("org/set", None, 2, rows[1:])


@pytest.mark.slow
def test_scores_on_rows_of_the_hub_are_made_anew_when_they_change(finished, hub) -> None:  # noqa: F811
    path, out = finished
    recipe = load_recipe(
        path, ["evaluate.path=org/set", "evaluate.revision=v1", "evaluate.name=sums", "evaluate.baseline=false"]
    )

    def scored() -> dict[str, int]:
        run(recipe, out, only="evaluate", say=lambda _: None)
        return stamps(out / "evaluation")

    before = scored()
    assert hub["asked"] == [{"split": "test", "revision": "v1", "name": "sums", "streaming": False}]
    assert scored() == before
    hub["test"] = [record("1+1=", "2"), record("2+2=", "4")]
    after = scored()
    assert all(after[f"{name}/scores.json"] != before[f"{name}/scores.json"] for name in ("pivot", "merged"))


def test_the_command_takes_folders_split_configuration_and_revision(hub, skills: Path) -> None:
    hub["validation"] = [record("1+1=", "2")]
    options = ["--split", "validation", "--name", "sums", "--revision", "v1", "--limit", "1", "--data", str(skills)]
    result = CliRunner().invoke(cli, ["evaluate", PIVOT, "--data", "org/set", *options])
    assert result.exit_code == 0, result.output
    assert "| add | facts | org/set | mean |" in result.output
    assert hub["asked"] == [{"split": "validation", "revision": "v1", "name": "sums", "streaming": False}]
