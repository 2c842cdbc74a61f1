"""A recipe from sources to a merged model: what is there is kept, what is missing is made, what changed is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fusekit import artifacts as artifact
from fusekit.capturing.store import Store
from fusekit.cli import cli
from fusekit.errors import StorageError
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe
from fusekit.report.card import write_report
from tests.pipeline.worlds import ROWS, stamps, weights, with_sources, write_recipe

SUMMARIES = {
    "recipe.resolved.yml",
    "results.json",
    "models.json",
    "report.html",
    "logs/run.log",
    "logs/captures.json",
    "merge.yml",  # names the targets where they are now: the run was copied from elsewhere
}


@pytest.mark.slow
def test_a_run_leaves_models_that_load_and_figures(first: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, out = first
    for name in ("targets/llama", "baselines/sft", "merged"):
        assert AutoModelForCausalLM.from_pretrained(out / name).config.vocab_size == 768
        assert len(AutoTokenizer.from_pretrained(out / name)) <= 768
    results = json.loads((out / "results.json").read_text())
    assert set(results["ends_counted"].values()) == {True}
    results = results["models"]
    assert list(results) == ["pivot", "baseline", "sources/llama", "targets/llama", "merged"]
    # Trained on the very rows, both are better than the pivot; a merge of one model is that model.
    figures = {name: found["bits_per_byte"]["add"] for name, found in results.items()}
    assert figures["baseline"] < figures["pivot"]
    assert figures["targets/llama"] < figures["pivot"]
    assert figures["merged"] == pytest.approx(figures["targets/llama"], rel=1e-3)
    assert len(Store.open(out / "captures" / "llama", verify=True)) == len(ROWS)
    for name in ("data", "alignment/llama", "targets/llama", "baselines/sft", "merged", "evaluation/merged"):
        assert artifact.problems(out / name) == []
    recipe = yaml.safe_load((out / "recipe.resolved.yml").read_text())
    assert recipe["capture"]["top_k"] == 8
    assert recipe["distill"]["loss"] == load_recipe(out / "recipe.resolved.yml").distill.loss


@pytest.mark.slow
def test_a_second_run_does_nothing_and_a_second_source_only_its_own(finished: tuple[Path, Path]) -> None:
    path, out = finished
    before, hashes = stamps(out), weights(out)
    run(load_recipe(path), out, say=lambda _: None)
    after = stamps(out)
    redone = {name for name in before if before[name] != after.get(name)}
    assert redone <= SUMMARIES

    two = with_sources(path, ["llama", "neox"])
    run(load_recipe(two), out, until="merge", say=lambda _: None)
    write_report(out)  # before the new model is scored
    assert (
        "The scores of merged are left out: they were measured on an earlier model" in (out / "report.html").read_text()
    )
    assert "| merged model |" not in (out / "merged" / "README.md").read_text()
    run(load_recipe(two), out, say=lambda _: None)
    assert (
        "The scores of merged are left out: they were measured on an earlier model"
        not in (out / "report.html").read_text()
    )
    assert "| merged model |" in (out / "merged" / "README.md").read_text()
    later = stamps(out)
    anew = ("merge", "evaluation/merged", "recipe", "results", "report", "models.json", "logs")
    kept = [name for name in before if not name.startswith(anew)]
    assert [name for name in kept if before[name] != later[name]] == []
    assert (out / "targets" / "neox" / "config.json").is_file()
    assert yaml.safe_load((out / "merge.yml").read_text())["models"][1]["model"] == str(out / "targets" / "neox")
    assert hashes["merged"] != weights(out)["merged"]
    assert "targets/neox" in json.loads((out / "results.json").read_text())["models"]

    # In another order nothing is made again.
    run(load_recipe(with_sources(path, ["neox", "llama"])), out, say=lambda _: None)
    reordered = stamps(out)
    card = {"merged/README.md", "merged/manifest.json"}  # which lists the sources in the recipe's order
    assert {name for name in later if later[name] != reordered.get(name)} <= SUMMARIES | card
    assert list(json.loads((out / "results.json").read_text())["models"])[2:4] == ["sources/neox", "sources/llama"]

    # Without the first source only the merge is made again; what it left stays until it is cleaned away.
    run(load_recipe(with_sources(path, ["neox"])), out, say=lambda _: None)
    less = stamps(out)
    kept = [name for name in later if not name.startswith(("merge", "evaluation/merged")) and name not in SUMMARIES]
    assert [name for name in kept if later[name] != less.get(name)] == []
    assert weights(out)["merged"] != weights(out)["targets/llama"]
    assert "targets/llama" not in json.loads((out / "results.json").read_text())["models"]


@pytest.mark.slow
def test_changed_inputs_are_refused_with_the_difference(finished: tuple[Path, Path]) -> None:
    recipe, out = finished
    rows = out.parent / "rows.jsonl"
    shutil.copyfile(yaml.safe_load(recipe.read_text())["data"]["path"], rows)
    before = stamps(out)
    with pytest.raises(StorageError, match=r"max_length: 64, now 32"):
        run(load_recipe(recipe, ["data.max_length=32"]), out, say=lambda _: None)
    with pytest.raises(StorageError, match=r"top_k: 8, now 4"):
        run(load_recipe(recipe, ["capture.top_k=4"]), out, say=lambda _: None)
    with pytest.raises(Exception, match=r"learning_rate: 0.0003, now 0.01"):
        run(load_recipe(recipe, ["distill.learning_rate=0.01"]), out, say=lambda _: None)
    with rows.open("a") as file:
        file.write(json.dumps(ROWS[0] | {"dataset": "more"}) + "\n")
    with pytest.raises(StorageError, match=r"files\..*rows\.jsonl: not given, now '[0-9a-f]{32}'"):
        run(load_recipe(recipe, [f"data.path={rows}"]), out, say=lambda _: None)
    after = stamps(out)
    assert {name for name in before if before[name] != after[name]} <= SUMMARIES


def test_what_is_missing_or_foreign_is_said(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ["llama"])
    result = CliRunner().invoke(cli, ["run", str(recipe), str(tmp_path / "out"), "--only", "merge"])
    assert isinstance(result.exception, StorageError)
    assert "the stage `data` comes first" in str(result.exception)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    result = CliRunner().invoke(cli, ["run", str(recipe), str(tmp_path / "mine")])
    assert "is not the output of a run, but holds 'thesis.tex'" in str(result.exception)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["thesis.tex"]


@pytest.mark.parametrize("out", ["/dev/null", "x" * 300, "recipe.yml"])
def test_an_output_that_cannot_be_a_folder_is_named(out: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, ["llama"])
    for command in ("run", "plan"):
        done = CliRunner().invoke(cli, [command, "recipe.yml", out])
        assert done.exit_code != 0
        assert done.exception is None or isinstance(done.exception, (StorageError, SystemExit))
        assert out[:20] in " ".join(f"{done.output} {done.exception}".split())
