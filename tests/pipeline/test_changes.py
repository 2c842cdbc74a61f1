"""What changes under the artifacts of a run is noticed by every stage that uses them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from fusekit.errors import StorageError
from fusekit.layout import Layout
from fusekit.pipeline import capturing, evaluating
from fusekit.pipeline.context import Context
from fusekit.pipeline.run import run
from fusekit.recipe.loading import load_recipe

DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    shutil.copytree(DEMO / "models" / "pivot", tmp_path / "pivot")
    text = (
        f"pivot: {{model: {tmp_path / 'pivot'}}}\n"
        f"sources: [{{model: {DEMO / 'sources' / 'llama'}}}]\n"
        f"data: {{path: {DEMO / 'rows' / 'train.jsonl'}, limit: 4, max_length: 128}}\n"
        f"evaluate: {{path: {DEMO / 'rows' / 'held-out' / 'add.jsonl'}, limit: 2, baseline: false}}\n"
        "merge: null\n"
    )
    (tmp_path / "recipe.yml").write_text(text)
    return tmp_path / "recipe.yml"


def test_a_refused_recipe_is_not_said_to_be_that_of_the_run(recipe, tmp_path):
    out = tmp_path / "out"
    run(load_recipe(recipe), out, until="data", say=lambda _: None)
    changed = load_recipe(recipe, ["data.max_length=64"])
    for how in ({"until": "data"}, {"only": "capture"}):
        with pytest.raises(StorageError, match="max_length: 128, now 64"):
            run(changed, out, say=lambda _: None, **how)
    assert yaml.safe_load(Layout(out).recipe.read_text())["data"]["max_length"] == 128
    assert not Layout(out).store("pivot").exists()


def test_rows_are_cut_for_the_tokenizer_that_a_name_stands_for_now(recipe, tmp_path):
    out = tmp_path / "out"
    run(load_recipe(recipe), out, until="data", say=lambda _: None)
    other = load_recipe(recipe, [f"sources.0.model={DEMO / 'sources' / 'neox'}", "sources.0.name=llama"])
    context = Context(other, Layout(out))
    rows = context.rows
    assert capturing.rows_of(context, "pivot") is rows
    assert capturing.rows_of(context, "llama") is not rows


def test_scores_are_made_anew_when_the_template_or_the_questions_change(recipe, tmp_path):
    loaded = load_recipe(recipe)
    said: list[str] = []
    context = Context(loaded, Layout(tmp_path / "out"), said.append)
    every = evaluating.models_of(context)
    models = {name: every[name] for name in ("pivot", "sources/llama")}
    evaluating.make(context, models)
    assert [line.split(":")[0] for line in said] == ["evaluate pivot", "evaluate sources/llama"]
    evaluating.make(context, models)
    assert len(said) == 2
    template = tmp_path / "pivot" / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    evaluating.make(context, models)
    assert len(said) == 3
    assert said[2].startswith("evaluate pivot")
    assert json.loads(context.layout.results.read_text())["models"].keys() == {"pivot", "sources/llama"}


def test_a_quiet_run_says_nothing(recipe, tmp_path, capsys):
    run(load_recipe(recipe), tmp_path / "out", until="capture", say=lambda _: None, quiet=True)
    assert Layout(tmp_path / "out").store("pivot").is_dir()
    assert "capturing" not in capsys.readouterr().err
