"""A part of a run is refused where the recipe says of the captures what they are not; what only moved is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from fusekit.pipeline.run import make_plan
from fusekit.recipe.loading import load_recipe
from tests.helpers import edit_tensors
from tests.pipeline.worlds import DEMO, go, refused, with_inputs


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
    plan = make_plan(load_recipe(path), "recipe.yml", out)
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
    plan = make_plan(load_recipe(path, calling("./moved")), "recipe.yml", out)
    assert plan.can_run
    assert {step.state for step in plan.steps if step.stage in ("capture", "distill", "merge")} == {"done"}
    shutil.rmtree(out / "captures" / "llama")
    shutil.rmtree(out / "targets" / "llama")
    go(path, out, *calling("./moved"), until="merge")
    shutil.rmtree(tmp_path / "moved")
    go(path, out, *calling("./moved"), start="merge", until="merge")
    refused(path, out, r"there is no folder \./gone", *calling("./gone"), start="merge", until="merge")
