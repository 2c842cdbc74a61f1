"""What is in an output and not of the run is never replaced, and is told at the start, by a run and by its plan."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from fusekit import artifacts as artifact
from fusekit.errors import FusekitError, StorageError
from fusekit.pipeline.context import STALE
from fusekit.pipeline.plan import make_plan
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe
from tests.pipeline.worlds import stamps, with_sources


def refused(recipe: Path, out: Path, message: str, *steps: str, **options: object) -> None:
    """Run and plan say it, and nothing that is there is touched."""
    before = stamps(out)
    with pytest.raises(StorageError, match=message):
        run(load_recipe(recipe), out, say=lambda _: None, quiet=True, **options)
    assert stamps(out) == {**before, **{name: at for name, at in stamps(out).items() if name.startswith("logs/")}}
    plan = make_plan(load_recipe(recipe), "recipe.yml", out)
    assert [f"{step.stage} {step.name}" for step in plan.steps if step.state == STALE] == list(steps)
    assert any(re.search(message, line) for line in plan.refused)


@pytest.mark.parametrize(
    ("place", "step"),
    [
        ("data/train.jsonl", "data rows"),
        ("captures/llama/train.jsonl", "capture llama"),
        ("alignment/llama/notes/thesis.txt", "align llama"),
        ("targets/llama/model.safetensors", "distill llama"),
        ("baselines/sft/model.safetensors", "distill baseline"),
        ("merged/model.gguf", "merge linear"),
        ("evaluation/sources/llama/mine.json", "evaluate 5 models"),
    ],
)
def test_folders_without_a_manifest_are_not_replaced(place, step, finished, tmp_path):
    recipe, out = finished[0], tmp_path / "mine"
    (out / place).parent.mkdir(parents=True)
    (out / place).write_text("the only copy")
    folder = next(path for path in (out / place).parents if path.name in ("data", "llama", "sft", "merged"))
    name = re.escape(str((out / place).relative_to(folder)))
    refused(recipe, out, rf"{folder}.* holds {name}", step)
    assert (out / place).read_text() == "the only copy"
    assert not (out / "recipe.resolved.yml").exists()
    run(load_recipe(recipe), tmp_path / "out", until="data", say=lambda _: None)  # another output


def test_files_that_are_called_like_those_of_a_run_are_not_replaced(finished, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    with pytest.raises(StorageError, match=r"mine is not the output of a run, but holds 'report\.html'"):
        run(load_recipe(finished[0]), tmp_path / "mine", say=lambda _: None)


def test_a_file_beside_merged_weights_is_not_lost_when_they_are_made_anew(finished):
    recipe, out = finished
    mine = out / "merged" / "model-q4.gguf"
    mine.write_text("mine")
    run(load_recipe(recipe), out, say=lambda _: None)  # they stay, and so does it
    two = with_sources(recipe, ["llama", "neox"])
    said = r"merged is to be replaced, but holds model-q4\.gguf, which its manifest\.json does not list"
    refused(two, out, said, "merge linear")
    with pytest.raises(StorageError, match=said):
        run(load_recipe(two), out, start="capture", say=lambda _: None)
    assert not (out / "captures" / "neox").exists()
    mine.unlink()
    (out / "merged" / "README.md").write_text("a card of its own")  # listed: it goes with what it is the card of
    manifest = out / "merged" / "manifest.json"
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(whole | {"inputs": whole["inputs"] | {"targets": {"llama": "0" * 32}}}))
    run(load_recipe(recipe), out, start="merge", say=lambda _: None)
    assert artifact.problems(out / "merged") == []


def test_a_file_beside_merged_weights_stays_while_a_target_is_trained_again(finished):
    recipe, out = finished
    mine = out / "merged" / "model-q4.gguf"
    mine.write_text("mine")
    shutil.rmtree(out / "targets" / "llama")
    run(load_recipe(recipe), out, until="merge", say=lambda _: None)
    assert mine.read_text() == "mine"
    assert (out / "targets" / "llama" / "model.safetensors").is_file()


def test_a_folder_in_the_place_of_the_merged_model_is_told_at_the_start(finished):
    recipe, out = finished
    shutil.rmtree(out / "merged")
    (out / "merged" / "notes").mkdir(parents=True)
    refused(recipe, out, "merged holds notes, a folder that no run made", "merge linear")
    assert (out / "merged" / "notes").is_dir()


def test_a_file_that_comes_while_a_target_is_trained_is_not_lost(finished):
    recipe, out = finished
    target = out / "targets" / "llama"
    shutil.rmtree(target)

    def say(line: str) -> None:
        if "step 10 of" in line:
            target.mkdir()
            (target / "notes.txt").write_text("mine")

    with pytest.raises(FusekitError, match=r"targets/llama has no manifest\.json, but holds notes\.txt"):
        run(load_recipe(recipe), out, until="distill", say=say)
    assert (target / "notes.txt").read_text() == "mine"
    shutil.rmtree(target)
    run(load_recipe(recipe), out, until="merge", say=lambda _: None)
    assert artifact.problems(target) == []


def test_a_file_beside_scores_is_not_lost_when_they_are_made_anew(finished):
    recipe, out = finished
    (out / "evaluation" / "pivot" / "mine.csv").write_text("mine")
    run(load_recipe(recipe), out, only="evaluate", say=lambda _: None)
    with pytest.raises(StorageError, match=r"evaluation/pivot is to be replaced, but holds mine\.csv"):
        run(load_recipe(recipe, ["evaluate.limit=2"]), out, only="evaluate", say=lambda _: None)
    assert (out / "evaluation" / "pivot" / "mine.csv").read_text() == "mine"


def test_a_folder_that_no_stage_comes_to_is_left_alone(finished):
    recipe, out = finished
    (out / "targets" / "mine").mkdir()
    (out / "targets" / "mine" / "model.safetensors").write_text("mine")
    shutil.rmtree(out / "merged")
    (out / "merged").mkdir()
    (out / "merged" / "mine.txt").write_text("mine")
    run(load_recipe(recipe, ["merge=null"]), out, say=lambda _: None)
    run(load_recipe(recipe), out, until="distill", say=lambda _: None)
    assert (out / "merged" / "mine.txt").is_file()


def test_a_merged_model_that_a_dead_process_moved_aside_is_put_back(finished):
    recipe, out = finished
    manifest = out / "merged" / "manifest.json"
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(whole | {"inputs": whole["inputs"] | {"targets": {"llama": "0" * 32}}}))
    (out / "merged").rename(out / ".merged.previous-0123abcd")
    run(load_recipe(recipe), out, only="merge", say=lambda _: None)  # it is of other targets, and replaced
    assert json.loads(manifest.read_text())["inputs"] == whole["inputs"]
    (out / "merged").rename(out / ".merged.previous-0123abcd")
    said: list[str] = []
    run(load_recipe(recipe), out, only="merge", say=said.append)
    assert said == []
    assert artifact.problems(out / "merged") == []
    assert not list(out.glob(".merged.previous-*"))
