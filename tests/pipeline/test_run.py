"""A recipe from sources to a merged model: what is there is kept, what is missing is made, what changed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from fusekit.cli import cli
from fusekit.errors import StorageError
from fusekit.pipeline.run import run
from fusekit.recipe import load_recipe
from fusekit.storage import Store, artifact

DEMO = Path(__file__).parents[2] / "demo"
ROWS = [
    {
        "dataset": "add",
        "messages": [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": str(a + b)}],
    }
    for a in range(10, 14)
    for b in range(20, 26)
]


def write_recipe(folder: Path, sources: list[str], **changes: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    recipe: dict[str, Any] = {
        "pivot": {"model": str(DEMO / "models" / "pivot"), "load": {"dtype": "float32"}},
        "sources": [{"model": str(DEMO / "sources" / name), "load": {"dtype": "float32"}} for name in sources],
        "data": {"path": str(folder / "rows.jsonl"), "max_length": 64},
        "represent": {"top_k": 8},
        "distill": {"lm_weight": 0.5, "epochs": 4, "learning_rate": 3e-4, "batch_size": 6, "micro_batch_size": 6},
        "merge": {"merge_method": "linear", "parameters": {"weight": 1.0}, "dtype": "float32"},
        "evaluate": {"path": str(folder / "held_out.jsonl"), "metrics": ["bits_per_byte"]},
    }
    for name, values in changes.items():
        recipe[name] = recipe.get(name, {}) | values
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def stamps(folder: Path) -> dict[str, int]:
    """When each file of the artifacts was written; inodes tell a folder that was made anew from one that was kept."""
    return {
        str(path.relative_to(folder)): path.stat().st_ino + path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of one source."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, ["llama"])
    run(load_recipe(recipe), folder / "out", say=lambda _: None)
    return folder, folder / "out"


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
    assert len(Store.open(out / "representations" / "llama", verify=True)) == len(ROWS)
    for name in ("data", "alignment/llama", "merged", "evaluation/merged"):
        assert artifact.problems(out / name) == []
    recipe = yaml.safe_load((out / "recipe.resolved.yml").read_text())
    assert recipe["represent"]["top_k"] == 8
    assert recipe["distill"]["loss"] == load_recipe(out / "recipe.resolved.yml").distill.loss


@pytest.mark.slow
def test_a_second_run_does_nothing_and_a_second_source_only_its_own(first: tuple[Path, Path]) -> None:
    folder, out = first
    before = stamps(out)
    run(load_recipe(folder / "recipe.yml"), out, say=lambda _: None)
    after = stamps(out)
    redone = {name for name in before if before[name] != after.get(name)}
    assert redone <= {"recipe.resolved.yml", "results.json"}

    recipe = write_recipe(folder, ["llama", "neox"])
    run(load_recipe(recipe), out, say=lambda _: None)
    later = stamps(out)
    anew = ("merge", "evaluation/merged", "recipe", "results", "report", "models.json", "logs")
    kept = [name for name in before if not name.startswith(anew)]
    assert [name for name in kept if before[name] != later[name]] == []
    assert (out / "targets" / "neox" / "config.json").is_file()
    assert yaml.safe_load((out / "merge.yml").read_text())["models"][1]["model"] == str(out / "targets" / "neox")
    assert before["merged/model.safetensors"] != later["merged/model.safetensors"]
    assert "targets/neox" in json.loads((out / "results.json").read_text())["models"]


@pytest.mark.slow
def test_changed_inputs_are_refused_with_the_difference(first: tuple[Path, Path]) -> None:
    folder, out = first
    recipe = write_recipe(folder, ["llama"])
    before = stamps(out)
    with pytest.raises(StorageError, match=r"max_length: 64, now 32"):
        run(load_recipe(recipe, ["data.max_length=32"]), out, say=lambda _: None)
    with pytest.raises(StorageError, match=r"top_k: 8, now 4"):
        run(load_recipe(recipe, ["represent.top_k=4"]), out, say=lambda _: None)
    with pytest.raises(Exception, match=r"learning_rate: 0.0003, now 0.01"):
        run(load_recipe(recipe, ["distill.learning_rate=0.01"]), out, say=lambda _: None)
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(ROWS[0] | {"dataset": "more"}) + "\n")
    with pytest.raises(StorageError, match=r"files\..*rows\.jsonl: '[0-9a-f]{32}', now '[0-9a-f]{32}'"):
        run(load_recipe(recipe), out, say=lambda _: None)
    after = stamps(out)
    assert {name for name in before if before[name] != after[name]} <= {"recipe.resolved.yml"}


def test_what_is_missing_or_foreign_is_said(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ["llama"])
    result = CliRunner().invoke(cli, ["run", str(recipe), str(tmp_path / "out"), "--only", "merge"])
    assert isinstance(result.exception, StorageError)
    assert "the stage `data` comes first" in str(result.exception)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    result = CliRunner().invoke(cli, ["run", str(recipe), str(tmp_path / "mine")])
    assert "is no run of fusekit, but holds 'thesis.tex'" in str(result.exception)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["thesis.tex"]


@pytest.mark.slow
def test_represent_takes_a_recipe(first: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ["llama"])
    result = CliRunner().invoke(cli, ["represent", str(recipe), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "out" / "representations").iterdir() if p.is_dir()) == ["llama", "pivot"]
    assert not (tmp_path / "out" / "targets").exists()
    result = CliRunner().invoke(cli, ["represent", str(recipe), str(tmp_path / "out"), "--top-k", "3"])
    assert "--top-k with a recipe" in result.output
