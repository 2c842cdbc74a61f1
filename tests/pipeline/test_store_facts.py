"""A part of a run is refused where the recipe says of the captures what they are not; what only moved is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from fusekit.errors import CaptureError, StorageError
from fusekit.pipeline.plan import make_plan
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe
from tests.helpers import edit_tensors
from tests.pipeline.worlds import DEMO, stamps


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model with the tokenizer of the source, and other weights."""
    shutil.copytree(DEMO / "sources" / "llama", tmp_path / "other")
    edit_tensors(tmp_path / "other", lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    return tmp_path / "other"


def calling(model: Path | str) -> list[str]:
    """The recipe with another model under the source's name."""
    return [f"sources.0.model={model}", "sources.0.name=llama"]


def with_facts(target: Path, facts: dict[str, object]) -> None:
    """The target as if it had been made from these, too."""
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps(manifest | {"inputs": manifest["inputs"] | facts}))


@pytest.mark.parametrize("stage", ["distill", "merge"])
@pytest.mark.parametrize(
    ("fact", "value"),
    [("training.trainer.max_grad_norm", 0.01), ("training.lora.r", 4), ("stores.neox.model", "org/neox")],
)
def test_what_the_recipe_no_longer_asks_for_is_a_difference(stage, fact, value, finished):
    path, out = finished
    with_facts(out / "targets" / "llama", {fact: value, fact.replace("model", "tokenizer"): value})
    with pytest.raises(StorageError, match=rf"targets/llama: its inputs changed:\n  {fact}: {value!r}, now not"):
        run(load_recipe(path), out, start=stage, say=lambda _: None)
    plan = make_plan(load_recipe(path), "recipe.yml", out)
    assert any(fact in line for line in plan.refused)


def test_a_pinned_source_that_is_not_at_hand_is_the_commit_that_it_was(finished, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path, out = finished
    commit, other = "a" * 40, "b" * 40
    facts = {"stores.llama.model": "nobody/gone", "stores.llama.model_fingerprint": f"commit {commit}"}
    with_facts(out / "targets" / "llama", facts)
    shutil.rmtree(out / "captures" / "llama")
    for revision, expected in ((None, True), (commit, True), (other, False), ("v1", False)):
        changes = calling("nobody/gone") + ([f"sources.0.revision={revision}"] if revision else [])
        recipe = load_recipe(path, changes)
        if expected:
            run(recipe, out, only="merge", say=lambda _: None)
        else:
            with pytest.raises(CaptureError, match=r"nobody/gone is not in the cache"):
                run(recipe, out, only="merge", say=lambda _: None)


@pytest.mark.parametrize("stage", ["distill", "merge", "evaluate"])
def test_another_source_is_refused_by_whatever_stage_begins(stage, finished, other):
    path, out = finished
    before = stamps(out)
    with pytest.raises(StorageError, match=rf"inputs changed:\n(.*\n)*.*model: '.*/llama', now '{other}'"):
        run(load_recipe(path, calling(other)), out, start=stage, say=lambda _: None)
    after = stamps(out)
    assert {name for name in after if before.get(name) != after[name]} <= {"logs/run.log", "logs/begun.yml"}


@pytest.mark.parametrize("stage", ["distill", "merge"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("capture.rows_per_shard=7", "rows_per_shard: 1024, now 7"),
        ("capture.max_error=0.1", "max_error: 0.2, now 0.1"),
        ("sources.0.load={dtype: bfloat16}", "details.dtype: 'float32', now 'bfloat16'"),
        ("sources.0.load={dtype: float32, quantization: {load_in_4bit: true}}", "details.quantization: None, now '{"),
        ("sources.0.chat_template=chatml", "tokenizer: '"),
    ],
)
def test_other_settings_are_refused(stage, override, said, finished):
    path, out = finished
    with pytest.raises(StorageError, match=said):
        run(load_recipe(path, [override]), out, start=stage, say=lambda _: None)


def test_weights_that_changed_in_place_are_refused_before_they_are_trained_with(finished, other):
    path, out = finished
    shutil.rmtree(other)
    shutil.copytree(DEMO / "sources" / "llama", other)
    recipe = load_recipe(path, calling(other))
    run(recipe, out, start="distill", say=lambda _: None)  # the same weights at another place
    shutil.rmtree(out / "captures" / "llama")
    shutil.rmtree(out / "targets" / "llama")
    run(recipe, out, until="distill", say=lambda _: None)
    edit_tensors(other, lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    with pytest.raises(StorageError, match=r"captures/llama: its inputs changed:\n  model_fingerprint"):
        run(recipe, out, start="distill", say=lambda _: None)


def test_a_model_that_moved_or_is_gone_is_the_one_that_taught(finished, tmp_path, monkeypatch):
    path, out = finished
    shutil.copytree(DEMO / "sources" / "llama", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for spelled in (tmp_path / "moved", "./moved"):
        for stage in ("distill", "merge"):
            run(load_recipe(path, calling(spelled)), out, start=stage, until="merge", say=lambda _: None)
    plan = make_plan(load_recipe(path, calling("./moved")), "recipe.yml", out)
    assert plan.can_run
    assert {step.state for step in plan.steps if step.stage in ("capture", "distill", "merge")} == {"done"}
    shutil.rmtree(out / "captures" / "llama")
    shutil.rmtree(out / "targets" / "llama")
    run(load_recipe(path, calling("./moved")), out, until="merge", say=lambda _: None)
    shutil.rmtree(tmp_path / "moved")
    run(load_recipe(path, calling("./moved")), out, start="merge", until="merge", say=lambda _: None)
    with pytest.raises(CaptureError, match=r"there is no folder \./gone"):
        run(load_recipe(path, calling("./gone")), out, start="merge", until="merge", say=lambda _: None)
