"""What is in an output and not of the run is never replaced, and is told at the start, by a run and by its plan."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from fusekit import artifacts as artifact
from fusekit.errors import FusekitError
from fusekit.pipeline.run import run
from fusekit.pipeline.stage import STALE
from fusekit.recipe.loading import load_recipe
from tests.helpers import edit_tensors
from tests.pipeline.worlds import DEMO, go, planned, refused, with_inputs, with_sources


def foreign(recipe: Path, out: Path, message: str, step: str) -> None:
    """Run and plan say it, and nothing that is there is touched."""
    refused(recipe, out, message)
    plan = planned(recipe, out)
    assert [f"{each.stage} {each.name}" for each in plan.steps if each.state == STALE] == [step]
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
def test_folders_without_a_manifest_are_not_replaced(place, step, first, tmp_path):
    recipe, out = first[0] / "recipe.yml", tmp_path / "mine"
    (out / place).parent.mkdir(parents=True)
    (out / place).write_text("the only copy")
    (out / place).with_name("z.txt").write_text("too")
    folder = next(path for path in (out / place).parents if path.name in ("data", "llama", "sft", "merged"))
    name = re.escape(str((out / place).relative_to(folder)))
    foreign(recipe, out, rf"{folder}.* holds {name} \(and 1 more\), ", step)
    assert (out / place).read_text() == "the only copy"
    assert not (out / "recipe.resolved.yml").exists()


def test_a_file_beside_merged_weights_is_not_lost_when_they_are_made_anew(finished):
    recipe, out = finished
    mine = out / "merged" / "model-q4.gguf"
    mine.write_text("mine")
    go(recipe, out)  # they stay, and so does it
    two = with_sources(recipe, ["llama", "neox"])
    said = r"merged holds model-q4\.gguf, which no manifest\.json lists"
    foreign(two, out, said, "merge linear")
    refused(two, out, said, start="capture")
    assert not (out / "captures" / "neox").exists()
    mine.unlink()
    (out / "merged" / "README.md").write_text("a card of its own")  # listed: it goes with what it is the card of
    with_inputs(out / "merged", {"targets": {"llama": "0" * 32}})
    go(recipe, out, only="merge")
    assert artifact.problems(out / "merged") == []


def test_a_file_that_comes_while_a_target_is_trained_is_not_lost(finished):
    """Nor is one beside the merged model, which the target that is trained again may still be of."""
    recipe, out = finished
    target, mine = out / "targets" / "llama", out / "merged" / "model-q4.gguf"
    mine.write_text("mine")
    shutil.rmtree(target)

    def say(line: str) -> None:
        if "step 10 of" in line:
            target.mkdir()
            (target / "notes.txt").write_text("mine")

    with pytest.raises(FusekitError, match=r"targets/llama holds notes\.txt"):
        run(load_recipe(recipe), out, until="distill", say=say)
    assert (target / "notes.txt").read_text() == "mine"
    shutil.rmtree(target)
    go(recipe, out, until="merge")
    assert mine.read_text() == "mine"
    assert artifact.problems(target) == []


def test_a_file_beside_scores_is_not_lost_when_they_are_made_anew(finished):
    recipe, out = finished
    (out / "evaluation" / "pivot" / "mine.csv").write_text("mine")
    go(recipe, out, only="evaluate")
    with pytest.raises(FusekitError, match=r"evaluation/pivot.* holds mine\.csv"):
        go(recipe, out, "evaluate.limit=2", only="evaluate")
    assert (out / "evaluation" / "pivot" / "mine.csv").read_text() == "mine"


def test_a_folder_that_no_stage_comes_to_is_left_alone(finished):
    recipe, out = finished
    (out / "targets" / "mine").mkdir()
    (out / "targets" / "mine" / "model.safetensors").write_text("mine")
    shutil.rmtree(out / "merged")
    (out / "merged").mkdir()
    (out / "merged" / "mine.txt").write_text("mine")
    go(recipe, out, "merge=null")
    go(recipe, out, until="distill")
    assert (out / "merged" / "mine.txt").is_file()


def test_a_merged_model_that_a_dead_process_moved_aside_is_put_back(finished):
    recipe, out = finished
    manifest = out / "merged" / "manifest.json"
    whole = json.loads(manifest.read_text())
    with_inputs(out / "merged", {"targets": {"llama": "0" * 32}})
    (out / "merged").rename(out / ".merged.previous-0123abcd")
    go(recipe, out, only="merge")  # it is of other targets, and replaced
    assert json.loads(manifest.read_text())["inputs"] == whole["inputs"]
    (out / "merged").rename(out / ".merged.previous-0123abcd")
    assert go(recipe, out, only="merge") == []
    assert artifact.problems(out / "merged") == []
    assert not list(out.glob(".merged.previous-*"))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model with the tokenizer of the source, and other weights."""
    shutil.copytree(DEMO / "sources" / "llama", tmp_path / "other")
    edit_tensors(tmp_path / "other", lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    return tmp_path / "other"


def calling(model: Path | str) -> list[str]:
    """The recipe with another model under the source's name."""
    return [f"sources.0.model={model}", "sources.0.name=llama"]


@pytest.mark.parametrize("stage", ["distill", "merge"])
@pytest.mark.parametrize(
    ("fact", "value"),
    [("training.trainer.max_grad_norm", 0.01), ("training.lora.r", 4), ("stores.neox.model", "org/neox")],
)
def test_what_the_recipe_no_longer_asks_for_is_a_difference(stage, fact, value, finished):
    path, out = finished
    with_inputs(out / "targets" / "llama", {fact: value, fact.replace("model", "tokenizer"): value})
    refused(path, out, rf"targets/llama: its inputs changed:\n  {fact}: {value!r}, now not", start=stage)
    plan = planned(path, out)
    assert any(fact in line for line in plan.refused)


def test_a_pinned_source_that_is_not_at_hand_is_the_commit_that_it_was(finished, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path, out = finished
    commit, other = "a" * 40, "b" * 40
    facts = {"stores.llama.model": "nobody/gone", "stores.llama.model_fingerprint": f"commit {commit}"}
    with_inputs(out / "targets" / "llama", facts)
    shutil.rmtree(out / "captures" / "llama")
    for revision in (None, commit):
        go(path, out, *calling("nobody/gone"), f"sources.0.revision={revision or 'null'}", only="merge")
    for revision in (other, "v1"):
        changes = [*calling("nobody/gone"), f"sources.0.revision={revision}"]
        refused(path, out, r"nobody/gone is not in the cache", *changes, only="merge")


@pytest.mark.parametrize("stage", ["distill", "merge", "evaluate"])
def test_another_source_is_refused_by_whatever_stage_begins(stage, finished, other):
    path, out = finished
    refused(path, out, rf"inputs changed:\n(.*\n)*.*model: '.*/llama', now '{other}'", *calling(other), start=stage)


@pytest.mark.parametrize("stage", ["distill", "merge"])
def test_other_settings_are_refused(stage, finished):
    for override, said in (
        ("capture.top_k=4", r"stores\.pivot\.top_k: 8, now 4" if stage == "merge" else r"pivot.*\n  top_k: 8, now 4"),
        ("capture.rows_per_shard=7", "rows_per_shard: 1024, now 7"),
        ("capture.max_error=0.1", "max_error: 0.2, now 0.1"),
        ("sources.0.load={dtype: bfloat16}", "details.dtype: 'float32', now 'bfloat16'"),
        ("sources.0.load={dtype: float32, quantization: {load_in_4bit: true}}", "details.quantization: None, now '{"),
        ("sources.0.chat_template=chatml", "tokenizer: '"),
        ("alignment.vocabulary=ms", "vocabulary: 'prefix', now 'ms'"),
        ("distill.learning_rate=0.01", r"targets/llama: its inputs changed:\n  training.learning_rate: 0.0003"),
    ):
        refused(*finished, said, override, start=stage)


def test_weights_that_changed_in_place_are_refused_before_they_are_trained_with(finished, other):
    path, out = finished
    shutil.rmtree(other)
    shutil.copytree(DEMO / "sources" / "llama", other)
    go(path, out, *calling(other), start="distill")  # the same weights at another place
    shutil.rmtree(out / "captures" / "llama")
    go(path, out, *calling(other), only="capture")
    edit_tensors(other, lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    refused(path, out, r"captures/llama: its inputs changed:\n  model_fingerprint", *calling(other), start="distill")


def test_a_model_that_moved_or_is_gone_is_the_one_that_taught(finished, tmp_path, monkeypatch):
    path, out = finished
    shutil.copytree(DEMO / "sources" / "llama", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for spelled in (tmp_path / "moved", "./moved"):
        for stage in ("distill", "merge"):
            go(path, out, *calling(spelled), start=stage, until="merge")
    plan = planned(path, out, *calling("./moved"))
    assert plan.can_run
    assert {step.state for step in plan.steps if step.stage in ("capture", "distill", "merge")} == {"done"}
    shutil.rmtree(out / "captures" / "llama")
    shutil.rmtree(out / "targets" / "llama")
    go(path, out, *calling("./moved"), until="merge")
    shutil.rmtree(tmp_path / "moved")
    go(path, out, *calling("./moved"), start="merge", until="merge")
    refused(path, out, r"there is no folder \./gone", *calling("./gone"), start="merge", until="merge")
