"""A recipe from sources to a merged model: what is there is kept, what is missing is made, what changed is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fusekit import artifacts as artifact
from fusekit.capturing.store import Store
from fusekit.cli import cli
from fusekit.errors import StorageError
from fusekit.layout import Layout
from fusekit.pipeline import capturing
from fusekit.pipeline.evaluating import Evaluate
from fusekit.pipeline.stage import STALE, Context
from fusekit.recipe.loading import load_recipe
from fusekit.report.card import write_report
from tests.helpers import edit_tensors
from tests.pipeline.worlds import DEMO, SUMMARIES, changed, go, planned, refused, stamps, with_sources, write_recipe


@pytest.mark.slow
def test_a_run_leaves_models_that_load_and_figures(first: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, out = first
    for name in ("targets/llama", "baselines/sft", "merged"):
        assert AutoModelForCausalLM.from_pretrained(out / name).config.vocab_size == 768
        assert len(AutoTokenizer.from_pretrained(out / name)) <= 768
    results = json.loads((out / "results.json").read_text())["models"]
    assert list(results) == ["pivot", "baseline", "sources/llama", "targets/llama", "merged"]
    # Trained on the very rows, both are better than the pivot; a merge of one model is that model.
    figures = {name: found["bits_per_byte"]["add"] for name, found in results.items()}
    assert figures["baseline"] < figures["pivot"]
    assert figures["targets/llama"] < figures["pivot"]
    assert figures["merged"] == pytest.approx(figures["targets/llama"], rel=1e-3)
    assert len(Store.open(out / "captures" / "llama", verify=True)) == 24
    for name in ("data", "alignment/llama", "targets/llama", "baselines/sft", "merged", "evaluation/merged"):
        assert artifact.problems(out / name) == []
    recipe = yaml.safe_load((out / "recipe.resolved.yml").read_text())
    assert recipe["capture"]["top_k"] == 8
    assert recipe["distill"]["loss"] == load_recipe(out / "recipe.resolved.yml").distill.loss
    lines = (out / "logs" / "run.log").read_text().splitlines()
    assert all(line[:4].isdecimal() and line[10] == "T" for line in lines)
    assert any("distill llama: step 16 of 16: loss " in line for line in lines)
    assert any(re.search(r"stage \d of \d: distill$", line) for line in lines)
    assert lines[-1].endswith(" done")


@pytest.mark.slow
def test_a_second_run_does_nothing_and_a_second_source_only_its_own(finished: tuple[Path, Path]) -> None:
    path, out = finished
    merged, target = (out / name / "model.safetensors" for name in ("merged", "targets/llama"))
    anew = ("merge", "evaluation/merged")

    def scored() -> list[str]:
        return list(json.loads((out / "results.json").read_text())["models"])

    before, first_merge, earlier = stamps(out), merged.read_bytes(), "The scores of merged are left out"
    go(path, out)
    assert changed(before, out) <= SUMMARIES

    two = with_sources(path, ["llama", "neox"])
    go(two, out, until="merge")
    write_report(out)  # before the new model is scored
    assert earlier in (out / "report.html").read_text()
    assert "| merged model |" not in (out / "merged" / "README.md").read_text()
    go(two, out)
    assert earlier not in (out / "report.html").read_text()
    assert "| merged model |" in (out / "merged" / "README.md").read_text()
    made = {name for name in changed(before, out) - SUMMARIES if not name.startswith(anew)}
    assert not made & before.keys()
    assert "targets/neox/config.json" in made
    assert yaml.safe_load((out / "merge.yml").read_text())["models"][1]["model"] == str(out / "targets" / "neox")
    assert merged.read_bytes() != first_merge
    assert "targets/neox" in scored()

    # In another order nothing is made again.
    before = stamps(out)
    go(with_sources(path, ["neox", "llama"]), out)
    card = {"merged/README.md", "merged/manifest.json"}  # which lists the sources in the recipe's order
    assert changed(before, out) <= SUMMARIES | card
    assert scored()[2:4] == ["sources/neox", "sources/llama"]

    # Without the first source only the merge is made again; what it left stays until it is cleaned away.
    go(with_sources(path, ["neox"]), out)
    assert [name for name in changed(before, out) - SUMMARIES if not name.startswith(anew)] == []
    assert merged.read_bytes() != target.read_bytes()
    assert "targets/llama" not in scored()


def change_a_weight(world: Path) -> None:
    edit_tensors(world / "pivot", lambda tensors: tensors["model.norm.weight"].mul_(1.5))


def change_the_template(world: Path) -> None:
    template = world / "pivot" / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")


def change_the_tokenizer(world: Path) -> None:
    tokenizer = json.loads((world / "pivot" / "tokenizer.json").read_text())
    del tokenizer["model"]["merges"][-1]
    (world / "pivot" / "tokenizer.json").write_text(json.dumps(tokenizer))


def add_a_row(world: Path) -> None:
    with (world / "rows.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')


@pytest.mark.parametrize(
    ("change", "override", "step", "message"),
    [
        (change_a_weight, "pivot.model={}/pivot", "capture pivot", "model_fingerprint: 'xxh3 "),
        (change_the_tokenizer, "pivot.model={}/pivot", "capture pivot", "tokenizer: '"),
        (change_the_template, "pivot.model={}/pivot", "capture pivot", "tokenizer: '"),
        (add_a_row, "data.path={}/rows.jsonl", "data rows", r"files\..*rows\.jsonl: not given, now '[0-9a-f]{32}'"),
        (None, "data.max_length=32", "data rows", "max_length: 64, now 32"),
        (None, "capture.top_k=4", "capture llama", "top_k: 8, now 4"),
        (None, "alignment.vocabulary=em", "align llama", "vocabulary: 'prefix', now 'em'"),
        (None, "distill.learning_rate=0.01", "distill llama", "learning_rate: 0.0003, now 0.01"),
        (None, "merge.parameters.weight=0.5", "merge linear", "merge.parameters.weight: 1.0, now 0.5"),
    ],
)
def test_what_changed_is_refused_with_the_difference_by_a_run_and_its_plan(
    change, override, step, message, finished, tmp_path
):
    recipe, out = finished
    if change is not None:
        shutil.copytree(DEMO / "models" / "pivot", tmp_path / "pivot")
        shutil.copyfile(yaml.safe_load(recipe.read_text())["data"]["path"], tmp_path / "rows.jsonl")
        change(tmp_path)
    override = override.replace("{}", str(tmp_path))
    refused(recipe, out, message, override)
    # A recipe that was refused is not said to be that of the run; the log has how it ended.
    resolved = yaml.safe_load((out / "recipe.resolved.yml").read_text())
    assert (resolved["data"]["max_length"], resolved["capture"]["top_k"]) == (64, 8)
    assert any("stopped by " in line for line in (out / "logs" / "run.log").read_text().splitlines())
    plan = planned(recipe, out, override)
    assert step in {f"{step.stage} {step.name}" for step in plan.steps if step.state == STALE}
    assert any(re.search(message, line) for line in plan.refused)
    assert not plan.can_run


def test_what_is_missing_or_foreign_is_said(tmp_path):
    recipe = write_recipe(tmp_path, ["llama"])
    with pytest.raises(StorageError, match="the stage `data` comes first"):
        go(recipe, tmp_path / "out", only="merge")
    (tmp_path / "mine").mkdir()
    for name in ("report.html", "thesis.tex"):  # also one that is called like a file of a run
        (tmp_path / "mine" / name).write_text("x")
        refused(recipe, tmp_path / "mine", "is not the output of a run, but holds 'report.html'")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["report.html", "thesis.tex"]


@pytest.mark.parametrize("out", ["/dev/null", "/dev/null/x", "recipe.yml", "recipe.yml/x/y", "x" * 300])
def test_an_output_that_cannot_be_a_folder_is_named(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, ["llama"])
    for command in ("run", "plan"):
        done = CliRunner().invoke(cli, [command, "recipe.yml", out])
        assert done.exit_code != 0
        assert done.exception is None or isinstance(done.exception, (StorageError, SystemExit))
        assert out[:20] in " ".join(f"{done.output} {done.exception}".split())


# An output that is damaged, was moved, or is of another recipe


def test_scores_that_are_damaged_are_made_anew(finished):
    path, out = finished
    before = (out / "results.json").read_bytes()
    (out / "evaluation" / "pivot" / "scores.json").write_text("[]")
    (out / "evaluation" / "merged" / "scores.json").unlink()
    said = go(path, out, only="evaluate")
    assert [line.split(":")[0] for line in said] == ["evaluate pivot", "evaluate merged"]
    assert (out / "results.json").read_bytes() == before


def test_an_output_that_was_moved_has_a_merge_recipe_of_its_own_places(finished):
    path, out = finished
    assert f"{out}/targets/llama" not in (out / "merge.yml").read_text()  # it is a copy of another run
    go(path, out, only="merge")
    assert f"model: {out}/targets/llama\n" in (out / "merge.yml").read_text()
    before = stamps(out)["merge.yml"]
    go(path, out, only="merge")
    assert stamps(out)["merge.yml"] == before


def test_a_baseline_that_is_missing_or_of_other_settings_is_refused_before_anything_is_trained(finished):
    path, out = finished
    said = r"baselines/sft: its inputs changed:\n  training.num_train_epochs: 4.0"
    refused(path, out, said, "fusion.mode=joint", "distill.num_train_epochs=1", only="distill")
    assert [folder.name for folder in (out / "targets").iterdir() if folder.is_dir()] == ["llama"]
    shutil.rmtree(out / "baselines")
    refused(path, out, "baselines/sft is missing: the stage `distill` comes first", only="evaluate")


def test_held_out_rows_that_are_not_there_are_missed_at_the_start(finished, tmp_path):
    refused(finished[0], tmp_path / "new", r"nowhere\.jsonl does not exist", "evaluate.path=nowhere.jsonl")
    assert not (tmp_path / "new" / "data").exists()
    plan = planned(finished[0], finished[1], "evaluate.path=nowhere.jsonl")
    assert [line.startswith("evaluate: nowhere.jsonl does not exist") for line in plan.refused] == [True]


def test_rows_are_cut_for_the_tokenizer_that_a_name_stands_for_now(first):
    folder, out = first
    other = load_recipe(folder / "recipe.yml", [f"sources.0.model={DEMO / 'sources' / 'neox'}", "sources.0.name=llama"])
    context = Context(other, Layout(out))
    assert capturing.rows_of(context, "pivot") is context.rows
    assert capturing.rows_of(context, "llama") is not context.rows


def test_scores_are_made_anew_when_the_template_changes(finished, tmp_path, capsys):
    path, out = finished
    shutil.copytree(DEMO / "models" / "pivot", tmp_path / "pivot")
    said: list[str] = []
    context = Context(load_recipe(path, [f"pivot.model={tmp_path / 'pivot'}"]), Layout(out), said.append)
    Evaluate().make(context, {"pivot", "sources/llama"})
    assert said == []
    template = tmp_path / "pivot" / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    Evaluate().make(context, {"pivot", "sources/llama"})
    assert [line.split(":")[0] for line in said] == ["evaluate pivot"]
    assert json.loads(context.layout.results.read_text())["models"].keys() == {"pivot", "sources/llama"}
    shutil.rmtree(out / "captures")
    go(path, out, only="capture")
    assert "capturing" not in capsys.readouterr().err  # quiet
