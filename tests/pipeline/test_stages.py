"""Parts of a run: which stages, what they need of the others, what verifies what they find."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fusekit import artifacts as artifact
from fusekit.capturing.models import ModelChoice, find_checkpoint, load_tokenizer
from fusekit.cli import cli
from fusekit.cli.common import command_again
from fusekit.distillation.fusion import LM_WEIGHTS
from fusekit.distillation.inputs import Inputs, Source, open_inputs
from fusekit.distillation.projections import NAME, read_map
from fusekit.errors import RecipeError, StorageError
from fusekit.layout import PIVOT, STAGES, Layout
from fusekit.pipeline import evaluating
from fusekit.pipeline.distilling import plain
from fusekit.pipeline.run import TABLE, chosen_stages
from fusekit.pipeline.stage import Context, choice_of
from fusekit.recipe.loading import load_recipe
from fusekit.settings import LmEval
from tests.pipeline.worlds import DEMO, SUMMARIES, changed, flip, go, refused, stamps, write_recipe


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((None, None, None), list(STAGES)),
        (("merge", None, None), ["merge"]),
        ((["align", "data"], None, None), ["data", "align"]),
        ((None, "distill", None), ["distill", "merge", "evaluate", "report"]),
        ((None, "capture", "distill"), ["capture", "align", "distill"]),
        ((None, None, "data"), ["data"]),
    ],
)
def test_stages_are_chosen_in_their_order(asked, expected):
    assert chosen_stages(*asked) == expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("merge", "data", None), "--only is one stage"),
        (("merge", None, "merge"), "--only is one stage"),
        ((None, "merge", "align"), "--from merge comes after --until align"),
        ((None, "mrege", None), "unknown stage 'mrege'; did you mean 'merge'"),
    ],
)
def test_requests_that_clash_are_refused(asked, said):
    with pytest.raises(RecipeError, match=said):
        chosen_stages(*asked)


def test_every_stage_is_in_the_table_and_says_all_that_it_makes(first):
    folder, out = first
    assert list(TABLE) == [PIVOT, *STAGES]
    context = Context(load_recipe(folder / "recipe.yml"), Layout(out))
    for stage in TABLE.values():
        assert set(stage.artifacts(context).values()) <= set(stage.made(context.layout)), stage.name
    made = {path for stage in TABLE.values() for path in stage.made(context.layout)}
    assert {path.parent for path in out.rglob("manifest.json")} <= made


def test_what_a_later_stage_needs_is_checked_not_made(finished):
    path, out = finished
    before = stamps(out)
    go(path, out, start="merge")
    assert changed(before, out) <= SUMMARIES - {"models.json", "report.html"}
    shutil.rmtree(out / "captures")  # they may be on another machine
    go(path, out, start="merge")
    refused(path, out, "captures/pivot is missing: the stage `capture` comes first", only="distill")
    shutil.rmtree(out / "targets" / "llama")
    refused(path, out, "targets/llama is missing: the stage `distill` comes first", start="evaluate")


def test_the_map_that_is_trained_with_is_the_one_of_the_alignment(finished):
    path, out = finished
    recipe, layout = load_recipe(path), Layout(out)
    source, stores = recipe.sources[0], (layout.store("pivot"), layout.store("llama"))

    def opened(folder: Path | None) -> str:
        sources = {"llama": Source(stores[1], source.model, recipe.alignment_of(source), vocabulary_map=folder)}
        inputs = Inputs(choice_of(recipe.pivot), Context(recipe, layout).rows, stores[0], sources)
        return open_inputs(inputs, recipe.settings, ["llama"]).projections["llama"].vocabulary_map.fingerprint

    trained = artifact.read(out / "targets" / "llama").inputs["projections.llama.map"]
    assert opened(None) == opened(layout.alignment("llama")) == trained
    map_file = layout.alignment("llama") / NAME
    flip(map_file)
    with pytest.raises(StorageError, match=rf"{NAME} is damaged.*remove .*alignment/llama"):
        opened(layout.alignment("llama"))
    map_file.unlink()
    with pytest.raises(StorageError, match="the stage `align` comes first"):
        opened(layout.alignment("llama"))


def tokenizer_of(place: str):
    return load_tokenizer(find_checkpoint(ModelChoice(str(DEMO / place))))


@pytest.mark.parametrize(
    ("loss", "vocabulary", "method"),
    [("gold", "matched", "em"), ("grouped_kl", "grouped", "prefix"), ("p_kl", "pieces", "em"), ("alm", "chunks", "em")],
)
def test_a_loss_is_distilled_with_the_map_that_it_needs(captured, loss, vocabulary, method):
    """The demo's pivot and Llama have other tokenizers, so a row has entries of both kinds."""
    path, out = captured
    changes = [f"alignment.vocabulary={vocabulary}", f"distill.loss={loss}", "distill.num_train_epochs=1"]
    changes += ["fusion.include_pivot=false", "fusion.metric=bits_per_byte", "distill.lm_weighting=constant"]
    go(path, out, *changes, until="distill")
    record = json.loads((out / "targets" / "llama" / "training.json").read_text())
    assert all(line["fusion_loss"] > 0 and 0 < line["taught_share"] <= 1 for line in record["log"] if "loss" in line)
    facts = artifact.read(out / "targets" / "llama").inputs
    assert facts["projections.llama.vocabulary"] == vocabulary
    assert ("projections.llama.tail" in facts) == (loss == "grouped_kl")
    made = read_map(out / "alignment" / "llama", method, tokenizer_of("models/pivot"), tokenizer_of("sources/llama"))
    assert 0.1 < np.mean(made.targets >= 0) <= 1
    before = stamps(out / "targets")
    go(path, out, *changes, only="merge")
    assert stamps(out / "targets") == before


@pytest.mark.parametrize("weighting", ["constant", "soft", "hard_and_decay"])
def test_the_baseline_learns_from_the_text_alone_whatever_the_weighting(first, weighting):
    path, asked = first[0] / "recipe.yml", f"distill.lm_weighting={weighting}"
    recipe = load_recipe(path, [asked])
    assert not recipe.settings.plain
    alone = plain(recipe.settings)
    assert alone.plain
    assert {LM_WEIGHTS[alone.training.lm_weighting](alone.training.lm_weight, [0.5], at) for at in (0.0, 1.0)} == {1.0}
    # Of `soft` lm_weight decides nothing: there are targets to compare the baseline with.
    ones = load_recipe(path, [asked, "distill.lm_weight=1"])
    assert ones.wants_baseline == (weighting == "soft") == (not ones.settings.plain)


def test_a_source_may_bring_code_of_its_own_to_every_stage(tmp_path):
    path, model, out = write_recipe(tmp_path, ["llama"]), tmp_path / "llama", tmp_path / "out"
    shutil.copytree(DEMO / "sources" / "llama", model)
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "homemade", "auto_map": own}))
    (model / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'homemade'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    changes = [f"sources.0.model={model}", "evaluate=null", "data.limit=6", "distill.num_train_epochs=1"]
    refused(path, out, "wants to run Python code of its own", *changes, until="distill")
    go(path, out, *changes, "sources.0.trust_remote_code=true", until="distill")
    assert artifact.problems(out / "targets" / "llama") == []


def test_a_target_with_a_flipped_bit_is_named_and_not_merged_or_scored(finished, monkeypatch):
    path, out = finished
    target = out / "targets" / "llama"
    damaged = target / "model.safetensors"
    flip(damaged)
    result = CliRunner().invoke(cli, ["verify", str(out), "--quiet"])
    assert result.exit_code == 1
    assert f"{damaged}: its content is not what was written" in result.output
    for folder in ("merged", "evaluation/targets"):
        shutil.rmtree(out / folder)
    said = "model.safetensors: its content is not what was written\nIt is not used.*remove .*targets/llama"
    refused(path, out, said, start="merge")
    with pytest.raises(StorageError, match=said):
        go(path, out, "merge=null", only="evaluate")
    monkeypatch.setattr(evaluating, "version", lambda _: "1")  # of lm-eval, which may not be installed
    recipe = load_recipe(path)
    model, asked = replace(choice_of(recipe.pivot), model=str(target)), LmEval(tasks=["sums"])
    with pytest.raises(StorageError, match=said):
        evaluating._lm_eval(Context(recipe, Layout(out)), asked, "targets/llama", (model, "own"), {"model": "x"})
    (target / "manifest.json").unlink()
    refused(path, out, "targets/llama holds ", only="distill")


def test_align_needs_no_capture_and_measures_the_teacher_once_both_are_captured(tmp_path):
    path, out = write_recipe(tmp_path, ["llama"]), tmp_path / "out"
    folder = out / "alignment" / "llama"
    worth = folder / "worth.json"
    go(path, out, only=["data", "align"])
    assert sorted(path.name for path in out.glob("[!.]*")) == ["alignment", "data", "logs", "recipe.resolved.yml"]
    assert sorted(artifact.read(folder).files) == ["quality.json", "samples.json", NAME]
    assert artifact.problems(folder) == []
    go(path, out, only="capture")
    said = go(path, out, only="align")
    before = worth.read_bytes()
    found = json.loads(before)
    assert (found["examples"], found["tail"]) == (24, "back_off")
    assert artifact.problems(folder) == []
    lines = [line for line in said if line.startswith("warning")]
    assert len(lines) == bool(found["warnings"])
    assert all(warning in lines[0] for warning in found["warnings"])
    assert go(path, out, only="align") == []
    assert worth.read_bytes() == before
    go(path, out, "alignment.tail=keep", only="align")
    found = json.loads(worth.read_bytes())
    assert found["tail"] == "keep"
    assert artifact.problems(folder) == []
    shutil.rmtree(out / "captures" / "llama")
    go(path, out, "alignment.tail=keep", only="align")  # what was measured stays
    assert json.loads(worth.read_bytes()) == found


def test_what_is_published_names_models_and_other_options_are_another_result(finished):
    path, out = finished
    before = stamps(out / "targets")
    shutil.rmtree(out / "merged")
    go(path, out, only="merge", merge_options={"out_shard_size": 500_000})
    assert (out / "merged" / "model.safetensors.index.json").is_file()
    assert stamps(out / "targets") == before
    # The recipe that repeats the merge names folders of this machine; what is published does not.
    for name in ("README.md", "mergekit_config.yml"):
        published = (out / "merged" / name).read_text()
        assert "targets/llama" in published
        assert str(out) not in published, name
    assert str(out / "targets" / "llama") in (out / "merge.yml").read_text()
    assert artifact.problems(out / "merged") == []
    refused(path, out, r"options.out_shard_size: 500000, now not given", only="merge")
    refused(path, out, r"merge\.dtype: 'float32', now 'bfloat16'", "merge.dtype=bfloat16", only="merge")


def test_the_kind_of_a_recipe_is_told_by_its_keys(tmp_path):
    recipe = tmp_path / "r.yml"

    def said(command: str, text: str) -> str:
        recipe.write_text(text)
        return str(CliRunner().invoke(cli, [command, str(recipe), str(tmp_path / "out")]).exception)

    both = "pivot: {model: a}\nmerge_method: linear\n"
    assert "'pivot' is a key of fusion recipes, 'merge_method' of mergekit" in said("merge", both)
    assert "is neither a fusion recipe (pivot, sources, data) nor a mergekit recipe" in said("merge", "a: 1\n")
    mergekit = "merge_method: linear\nmodels: []\n"
    assert f"`fusekit merge {recipe} OUT`" in said("run", mergekit)
    for command in ("plan", "validate"):
        done = CliRunner().invoke(cli, [command, str(recipe), "--json"])  # what `fusekit merge --check` prints
        assert (done.exit_code, json.loads(done.stdout)["can_run"]) == (1, False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "launched", "expected"),
    [
        (["/usr/bin/fusekit", "run", "my recipe.yml", "out"], False, "fusekit run 'my recipe.yml' out"),
        (["/x/fusekit/cli/__main__.py", "run", "r.yml", "out"], False, "python -m fusekit.cli run r.yml out"),
        (["/usr/bin/mergekit-fuse", "r.yml", "out", "--cuda"], False, "mergekit-fuse r.yml out --cuda"),
        (["fusekit", "capture", "m", "--overwrite", "out"], False, "fusekit capture m out"),
        (["/x/fusekit/cli/__main__.py", "run", "r"], True, "accelerate launch -m fusekit.cli run r "),
    ],
)
def test_the_command_that_resumes_can_be_typed(argv, launched, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    again = command_again("--overwrite")
    assert again.startswith(expected) if launched else again == expected
