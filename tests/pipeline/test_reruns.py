"""What a run makes of an output that is damaged, was moved, or is of another recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fusekit.errors import RecipeError, StorageError
from fusekit.layout import Layout
from fusekit.pipeline.capturing import timed
from fusekit.pipeline.context import Context
from fusekit.pipeline.plan import make_plan
from fusekit.pipeline.run import logged, run
from fusekit.recipe.loading import load_recipe
from tests.pipeline.worlds import stamps


def quiet(_line: str) -> None:
    """Says nothing."""


def test_scores_that_are_damaged_are_made_anew(finished):
    path, out = finished
    before = (out / "results.json").read_bytes()
    (out / "evaluation" / "pivot" / "scores.json").write_text("[]")
    (out / "evaluation" / "merged" / "scores.json").unlink()
    said: list[str] = []
    run(load_recipe(path), out, only="evaluate", say=said.append)
    assert [line.split(":")[0] for line in said] == ["evaluate pivot", "evaluate merged"]
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize("found", ["[]", "5", "{", "[" * 100_000])
def test_times_that_are_damaged_are_begun_anew(found, tmp_path):
    context = Context(None, Layout(tmp_path))
    context.layout.logs.mkdir()
    context.layout.times.write_text(found)
    with timed(context, "pivot"):
        pass
    assert json.loads(context.layout.times.read_text()).keys() == {"pivot"}


def test_an_output_that_was_moved_has_a_merge_recipe_of_its_own_places(finished):
    path, out = finished
    assert f"{out}/targets/llama" not in (out / "merge.yml").read_text()  # it is a copy of another run
    run(load_recipe(path), out, only="merge", say=quiet)
    assert f"model: {out}/targets/llama\n" in (out / "merge.yml").read_text()
    before = stamps(out)["merge.yml"]
    run(load_recipe(path), out, only="merge", say=quiet)
    assert stamps(out)["merge.yml"] == before


def test_a_merged_model_of_other_targets_is_made_anew_one_of_other_settings_refused(finished):
    path, out = finished
    manifest = out / "merged" / "manifest.json"
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(whole | {"inputs": whole["inputs"] | {"targets": {"llama": "0" * 32}}}))
    run(load_recipe(path), out, only="merge", say=quiet)
    assert json.loads(manifest.read_text())["inputs"] == whole["inputs"]
    with pytest.raises(StorageError, match=r"merge\.dtype: 'float32', now 'bfloat16'"):
        run(load_recipe(path, ["merge.dtype=bfloat16"]), out, only="merge", say=quiet)
    manifest.unlink()
    with pytest.raises(StorageError, match=r"merged has no manifest\.json, but holds README\.md \(and \d more\): move"):
        run(load_recipe(path), out, only="merge", say=quiet)


def test_scores_without_the_baseline_that_the_recipe_asks_for_are_refused(finished):
    path, out = finished
    with pytest.raises(StorageError, match=r"baselines/sft: its inputs changed:\n  training.num_train_epochs: 4.0"):
        _only_baseline_changed(path, out)
    shutil.rmtree(out / "baselines")
    with pytest.raises(StorageError, match="baselines/sft is missing: the stage `distill` comes first"):
        run(load_recipe(path), out, only="evaluate", say=quiet)


def _only_baseline_changed(path: Path, out: Path) -> None:
    """A joint target is to be made, and plain fine-tuning is there already, of other epochs."""
    run(load_recipe(path, ["fusion.mode=joint", "distill.num_train_epochs=1"]), out, only="distill", say=quiet)


def test_what_cannot_be_gone_on_with_is_refused_before_anything_is_trained(finished):
    path, out = finished
    with pytest.raises(StorageError, match="baselines/sft"):
        _only_baseline_changed(path, out)
    assert [folder.name for folder in (out / "targets").iterdir() if folder.is_dir()] == ["llama"]


def test_held_out_rows_that_are_not_there_are_missed_at_the_start(finished, tmp_path):
    recipe = load_recipe(finished[0], ["evaluate.path=nowhere.jsonl"])
    with pytest.raises(RecipeError, match=r"nowhere\.jsonl does not exist"):
        run(recipe, tmp_path / "new", say=quiet)
    assert not (tmp_path / "new" / "data").exists()
    plan = make_plan(recipe, "recipe.yml", finished[1])
    assert plan.refused == ["evaluate: nowhere.jsonl does not exist"]


def test_a_plan_of_plain_fine_tuning_counts_no_second_one(finished):
    plan = make_plan(load_recipe(finished[0], ["distill.lm_weight=1.0"]), "recipe.yml", finished[1])
    assert [step.name for step in plan.steps if step.stage in ("distill", "evaluate")] == ["sft", "4 models"]


def test_the_report_is_of_the_recipe_that_made_what_is_there(finished):
    path, out = finished
    before = (out / "recipe.resolved.yml").read_bytes()
    with pytest.raises(StorageError, match=r"another recipe.*\n  distill.num_train_epochs: 4.0, now 9.0\n"):
        run(load_recipe(path, ["distill.num_train_epochs=9"]), out, only="report", say=quiet)
    assert (out / "recipe.resolved.yml").read_bytes() == before
    run(load_recipe(path), out, only="report", say=quiet)


def test_a_log_that_cannot_be_written_does_not_hide_what_stopped_a_run(tmp_path):
    def stopped() -> None:
        with logged(tmp_path / "logs"):
            shutil.rmtree(tmp_path / "logs")
            (tmp_path / "logs").write_text("no folder any more")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
