"""Parts of a run: which stages, what they need of the others, what verifies what they find."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fusekit import artifacts as artifact
from fusekit.artifacts import output_lock
from fusekit.capturing.load import load_tokenizer
from fusekit.capturing.models import find_checkpoint
from fusekit.cli import cli
from fusekit.cli.common import command_again
from fusekit.distillation.fusion import LM_WEIGHTS
from fusekit.distillation.inputs import Inputs, Source, open_inputs
from fusekit.distillation.vocabulary_maps import NAME, map_hash, read_map
from fusekit.errors import FusekitError, RecipeError, StorageError
from fusekit.evaluation import lm_eval
from fusekit.evaluation.settings import LmEval
from fusekit.layout import STAGES, Layout
from fusekit.pipeline import evaluating
from fusekit.pipeline.context import Context, choice_of
from fusekit.pipeline.distilling import plain
from fusekit.pipeline.run import chosen_stages, run
from fusekit.recipe.loading import load_recipe
from tests.pipeline.worlds import DEMO, flip, stamps, write_recipe


def quiet(_line: str) -> None:
    """Says nothing."""


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


def test_what_a_later_stage_needs_is_checked_not_made(finished):
    path, out = finished
    before = stamps(out)
    run(load_recipe(path), out, start="merge", say=quiet)
    after = stamps(out)
    assert {name for name in before if before[name] != after[name]} <= {
        "recipe.resolved.yml",
        "results.json",
        "logs/run.log",
        "merge.yml",  # names the targets where they are now: the run was copied from elsewhere
    }
    for override, said in (
        ("capture.top_k=4", r"targets/llama: its inputs changed:\n  stores\.pivot\.top_k: 8, now 4"),
        (
            "distill.learning_rate=0.01",
            r"targets/llama: its inputs changed:\n  training.learning_rate: 0.0003",
        ),
        ("alignment.vocabulary=ms", r"projections.llama.vocabulary: 'prefix', now 'ms'"),
    ):
        with pytest.raises(StorageError, match=said):
            run(load_recipe(path, [override]), out, start="merge", say=quiet)
    for override, said in (
        ("capture.top_k=4", r"captures/pivot: its inputs changed:\n  top_k: 8, now 4"),
        ("alignment.vocabulary=ms", r"alignment/llama: its inputs changed:\n  vocabulary: 'prefix', now 'ms'"),
    ):
        with pytest.raises(StorageError, match=said):
            run(load_recipe(path, [override]), out, start="distill", say=quiet)
    shutil.rmtree(out / "captures")  # they may be on another machine
    run(load_recipe(path), out, start="merge", say=quiet)
    with pytest.raises(StorageError, match="captures/pivot is missing: the stage `capture` comes first"):
        run(load_recipe(path), out, only="distill", say=quiet)
    shutil.rmtree(out / "targets" / "llama")
    with pytest.raises(StorageError, match="targets/llama is missing: the stage `distill` comes first"):
        run(load_recipe(path), out, start="evaluate", say=quiet)


def test_the_map_that_is_trained_with_is_the_one_of_the_alignment(finished):
    path, out = finished
    recipe, layout = load_recipe(path), Layout(out)
    context = Context(recipe, layout)
    source = recipe.sources[0]
    stores = layout.store("pivot"), layout.store("llama")

    def opened(folder: Path | None) -> str:
        sources = {"llama": Source(stores[1], source.model, recipe.alignment_of(source), vocabulary_map=folder)}
        inputs = Inputs(choice_of(recipe.pivot), context.rows, stores[0], sources)
        return map_hash(open_inputs(inputs, recipe.settings, ["llama"]).projections["llama"].vocabulary_map)

    trained = artifact.read(out / "targets" / "llama").inputs["projections.llama.xxh3"]
    assert opened(None) == opened(layout.alignment("llama")) == trained
    map_file = layout.alignment("llama") / NAME
    flip(map_file)
    with pytest.raises(StorageError, match=rf"{NAME} is damaged.*remove .*alignment/llama"):
        opened(layout.alignment("llama"))
    map_file.unlink()
    with pytest.raises(StorageError, match="the stage `align` comes first"):
        opened(layout.alignment("llama"))


@pytest.mark.parametrize(
    ("loss", "vocabulary", "method"),
    [("gold", "matched", "em"), ("grouped_kl", "grouped", "prefix"), ("p_kl", "pieces", "em"), ("alm", "chunks", "em")],
)
def test_a_loss_is_distilled_with_the_map_that_it_needs(tmp_path, loss, vocabulary, method):
    """The demo's pivot and Llama have other tokenizers, so a row has entries of both kinds."""
    changes = [f"alignment.vocabulary={vocabulary}", f"distill.loss={loss}", "distill.num_train_epochs=1"]
    changes += ["fusion.include_pivot=false", "fusion.metric=bits_per_byte", "distill.lm_weighting=constant"]
    recipe, out = load_recipe(write_recipe(tmp_path, ["llama"]), changes), tmp_path / "out"
    run(recipe, out, until="distill", say=quiet)
    record = json.loads((out / "targets" / "llama" / "training.json").read_text())
    assert all(line["fusion_loss"] > 0 and 0 < line["row_share"] <= 1 for line in record["log"] if "loss" in line)
    facts = artifact.read(out / "targets" / "llama").inputs
    assert facts["projections.llama.vocabulary"] == vocabulary
    assert ("projections.llama.tail" in facts) == (loss == "grouped_kl")
    pivot, source = (load_tokenizer(find_checkpoint(choice_at(place))) for place in ("models/pivot", "sources/llama"))
    made = read_map(out / "alignment" / "llama", method, pivot, source)
    assert 0.1 < np.mean(np.diff(made.matrix.indptr) > 0) <= 1
    before = stamps(out / "targets")
    run(recipe, out, only="merge", say=quiet)
    assert stamps(out / "targets") == before


@pytest.mark.parametrize("weighting", ["constant", "soft", "hard_and_decay"])
def test_the_baseline_learns_from_the_text_alone_whatever_the_weighting(tmp_path, weighting):
    recipe = load_recipe(write_recipe(tmp_path, ["llama"]), [f"distill.lm_weighting={weighting}"])
    assert not recipe.settings.plain
    alone = plain(recipe.settings)
    assert alone.plain
    assert {LM_WEIGHTS[alone.training.lm_weighting](alone.training.lm_weight, [0.5], at) for at in (0.0, 1.0)} == {1.0}
    # Of `soft` lm_weight decides nothing: there are targets to compare the baseline with.
    ones = load_recipe(tmp_path / "recipe.yml", [f"distill.lm_weighting={weighting}", "distill.lm_weight=1"])
    assert ones.wants_baseline == (weighting == "soft") == (not ones.settings.plain)


def test_a_weighting_by_rows_has_a_baseline_too(finished):
    path, out = finished
    shutil.rmtree(out / "targets")
    shutil.rmtree(out / "baselines")
    run(load_recipe(path, ["distill.lm_weighting=soft", "distill.num_train_epochs=1"]), out, only="distill", say=quiet)
    record = json.loads((out / "baselines" / "sft" / "training.json").read_text())
    assert record["sources"] == []
    assert record["settings"]["training"]["lm_weight"] == 1
    assert not any(line.get("fusion_loss") for line in record["log"])
    assert json.loads((out / "targets" / "llama" / "training.json").read_text())["sources"] == ["llama"]


@pytest.mark.parametrize("allowed", [True, False])
def test_a_source_may_bring_code_of_its_own_to_every_stage(finished, allowed):
    path, _ = finished
    model = path.with_name("llama")
    shutil.copytree(DEMO / "sources" / "llama", model)
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "homemade", "auto_map": own}))
    (model / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'homemade'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    recipe = load_recipe(path, [f"sources.0.model={model}", f"sources.0.trust_remote_code={str(allowed).lower()}"])
    out = path.with_name("with-code")
    if allowed:
        run(recipe, out, until="distill", say=quiet)
        assert artifact.problems(out / "targets" / "llama") == []
    else:
        with pytest.raises(RecipeError, match="wants to run Python code of its own"):
            run(recipe, out, until="distill", say=quiet)


def test_a_map_of_other_tokenizers_is_refused(first):
    _, out = first
    tokenizers = [
        load_tokenizer(find_checkpoint(choice)) for choice in map(choice_at, ("models/pivot", "sources/neox"))
    ]
    with pytest.raises(StorageError, match="of other tokenizers than the run's"):
        read_map(out / "alignment" / "llama", "prefix", *tokenizers)
    with pytest.raises(StorageError, match="a map by 'prefix', but the run asks for 'em'"):
        read_map(out / "alignment" / "llama", "em", *tokenizers)


def choice_at(place: str):
    """A model of the demo."""
    from fusekit.capturing.models import ModelChoice

    return ModelChoice(str(DEMO / place))


def test_a_target_with_a_flipped_bit_is_named_and_not_merged(finished):
    path, out = finished
    damaged = out / "targets" / "llama" / "model.safetensors"
    flip(damaged)
    result = CliRunner().invoke(cli, ["verify", str(out), "--quiet"])
    assert result.exit_code == 1
    assert f"{damaged}: its content is not what was written" in result.output
    shutil.rmtree(out / "merged")
    said = "model.safetensors: its content is not what was written\nIt is not used.*remove .*targets/llama"
    with pytest.raises(StorageError, match=said):
        run(load_recipe(path), out, start="merge", say=quiet)
    assert not (out / "merged").exists()
    # Scores of what is damaged are not taken either.
    shutil.rmtree(out / "evaluation" / "targets")
    with pytest.raises(StorageError, match="its content is not what was written"):
        run(load_recipe(path, ["merge=null"]), out, only="evaluate", say=quiet)
    (out / "targets" / "llama" / "manifest.json").unlink()
    with pytest.raises(FusekitError, match=r"targets/llama has no manifest\.json.*remove it"):
        run(load_recipe(path), out, only="distill", say=quiet)


def test_lm_eval_does_not_score_a_model_that_is_damaged(finished, monkeypatch):
    monkeypatch.setattr(lm_eval, "_inputs", lambda *_: {})  # which asks lm-eval for its version
    path, out = finished
    target = out / "targets" / "llama"
    flip(target / "model.safetensors")
    recipe = load_recipe(path)
    context = Context(recipe, Layout(out))
    model, asked = replace(choice_of(recipe.pivot), model=str(target)), LmEval(tasks=["sums"])
    with pytest.raises(StorageError, match="its content is not what was written\nIt is not used"):
        evaluating._lm_eval(context, asked, "targets/llama", (model, "own"), {"model": "x"})


def test_align_needs_no_capture(tmp_path):
    recipe, out = load_recipe(write_recipe(tmp_path, ["llama"])), tmp_path / "out"
    run(recipe, out, only=["data", "align"], say=quiet)
    assert {path.name for path in out.iterdir() if path.name[0] != "."} == {
        "alignment",
        "data",
        "logs",
        "recipe.resolved.yml",
    }
    found = artifact.read(out / "alignment" / "llama")
    assert sorted(found.files) == ["quality.json", "samples.json", NAME]
    assert artifact.problems(out / "alignment" / "llama") == []


def test_align_measures_the_teacher_once_both_are_captured(tmp_path):
    recipe, out = load_recipe(write_recipe(tmp_path, ["llama"])), tmp_path / "out"
    folder, said = out / "alignment" / "llama", []
    worth = folder / "worth.json"
    run(recipe, out, only=["data", "align"], say=quiet)
    assert not worth.exists()
    run(recipe, out, only="capture", say=quiet)
    run(recipe, out, only="align", say=said.append)
    first = worth.read_bytes()
    found = json.loads(first)
    assert (found["examples"], found["tail"]) == (24, "back_off")
    assert artifact.problems(folder) == []
    lines = [line for line in said if line.startswith("warning")]
    assert len(lines) == bool(found["warnings"])
    assert all(warning in lines[0] for warning in found["warnings"])
    said.clear()
    run(recipe, out, only="align", say=said.append)
    assert (worth.read_bytes(), said) == (first, [])
    other = load_recipe(tmp_path / "recipe.yml", ["alignment.tail=keep"])
    run(other, out, only="align", say=quiet)
    found = json.loads(worth.read_bytes())
    assert found["tail"] == "keep"
    assert artifact.problems(folder) == []
    shutil.rmtree(out / "captures" / "llama")
    run(other, out, only="align", say=quiet)  # what was measured stays
    assert json.loads(worth.read_bytes()) == found


def test_what_is_published_names_models_and_other_options_are_another_result(finished):
    path, out = finished
    recipe, before = load_recipe(path), stamps(out / "targets")
    shutil.rmtree(out / "merged")
    run(recipe, out, only="merge", say=quiet, merge_options={"out_shard_size": 500_000})
    assert (out / "merged" / "model.safetensors.index.json").is_file()
    assert stamps(out / "targets") == before
    # The recipe that repeats the merge names folders of this machine; what is published does not.
    for name in ("README.md", "mergekit_config.yml"):
        published = (out / "merged" / name).read_text()
        assert "targets/llama" in published
        assert str(out) not in published, name
    assert str(out / "targets" / "llama") in (out / "merge.yml").read_text()
    assert artifact.problems(out / "merged") == []
    with pytest.raises(StorageError, match=r"options.out_shard_size: 500000, now not given"):
        run(recipe, out, only="merge", say=quiet)


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


def test_a_second_run_and_a_clean_are_told_who_holds_the_output(finished):
    path, out = finished
    with output_lock(out.resolve()):
        for arguments in (["run", str(path), str(out)], ["clean", str(out), "--yes"]):
            error = CliRunner().invoke(cli, arguments).exception
            assert isinstance(error, StorageError)
            assert f"{out}: already being written by process {os.getpid()} on " in str(error)


def test_the_log_has_what_was_said_and_how_it_ended(finished):
    path, out = finished
    run(load_recipe(path), out, only="data", say=quiet)
    with pytest.raises(StorageError):
        run(load_recipe(path, ["data.max_length=32"]), out, only="data", say=quiet)
    lines = (out / "logs" / "run.log").read_text().splitlines()
    assert all(line[:4].isdecimal() and line[10] == "T" for line in lines)
    assert [line.split(" ", 1)[1] for line in lines if line.endswith(" done")] == ["done", "done"]
    assert any("distill llama: step 16 of 16: loss " in line for line in lines)
    assert any("stopped by StorageError: " in line for line in lines[-4:])
    assert any(line.endswith("max_length: 64, now 32") for line in lines[-4:])


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


@pytest.mark.slow
def test_a_run_that_is_terminated_says_how_to_go_on(tmp_path):
    recipe = write_recipe(tmp_path, ["llama"])
    command = [sys.executable, "-m", "fusekit.cli", "run", str(recipe), str(tmp_path / "out"), "--from", "data"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    heard = []
    for line in process.stderr:
        heard.append(line)
        if line.startswith("capture pivot: "):
            process.send_signal(signal.SIGTERM)
            break
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143, [*heard, said]
    assert f"To resume:\n  python -m fusekit.cli run {recipe} {tmp_path / 'out'} --from data\n" in said
    log = (tmp_path / "out" / "logs" / "run.log").read_text()
    assert "stopped by TerminatedError" in log.splitlines()[-1]
    assert artifact.problems(tmp_path / "out" / "data") == []
    assert json.loads((tmp_path / "out" / "data" / "counts.json").read_text())["kept"] == 24
