"""Reading fusion recipes: presets, includes, overrides, and every mistake with its place."""

from __future__ import annotations

import json
import os
import re
import runpy
from dataclasses import fields
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from fusekit.cli import cli
from fusekit.distillation.arguments import training_arguments
from fusekit.distillation.settings import TrainingSettings
from fusekit.errors import FusekitError, RecipeError
from fusekit.layout import Layout
from fusekit.pipeline import capturing
from fusekit.pipeline.run import mistakes
from fusekit.recipe import Recipe
from fusekit.recipe.loading import PRESETS, load_recipe
from fusekit.recipe.shipped import SCHEMA, folder, schema, schema_text
from tests.helpers import refused

SMALL = "pivot: {model: org/pivot}\nsources: [{model: org/first}, {model: org/second}]\ndata: {path: rows.jsonl}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')

    def write_file(text: str, name: str = "recipe.yml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def checked(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, overrides, mistakes)


def test_a_preset_lies_below_the_recipe(write):
    recipe = load_recipe(write(SMALL))
    assert recipe.merge == PRESETS["fusekit"]["merge"]
    recipe = load_recipe(write(SMALL + "preset: fusellm\ndistill: {num_train_epochs: 2, adam_beta1: 0.8}\n"))
    assert (recipe.distill.num_train_epochs, recipe.distill.loss, recipe.distill.lm_weight) == (2, "ce", 0.9)
    assert recipe.distill.trainer == {"adam_beta1": 0.8, "adam_beta2": 0.95, "max_grad_norm": 1.0}
    assert recipe.data.pack
    recipe = load_recipe(write(SMALL + "preset: fusechat\n"))
    assert [source.chat_template for source in recipe.sources] == ["pivot", "pivot"]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_names_real_arguments_loads_to_itself_and_follows_the_schema(write, preset):
    known = {field.name for field in fields(TrainingArguments)} | set(TrainingSettings.model_fields)
    assert set(PRESETS[preset].get("distill", {})) <= known
    recipe = load_recipe(write(SMALL + f"preset: {preset}\n"))
    resolved = recipe.model_dump(mode="json")
    assert load_recipe(write(yaml.safe_dump(resolved, sort_keys=False), "resolved.yml")) == recipe
    assert jsonschema.Draft202012Validator(schema()).is_valid(resolved)


def test_another_merge_method_does_not_inherit_parameters(write):
    recipe = load_recipe(write(SMALL + "merge: {merge_method: ties, parameters: {density: 0.5}}\n"))
    assert recipe.merge == {"merge_method": "ties", "parameters": {"density": 0.5}}
    recipe = load_recipe(write(SMALL + "merge: {parameters: {select_topk: 0.5}}\n"))
    assert recipe.merge["merge_method"] == "fusechat_sce"
    assert recipe.merge["parameters"] == {"select_topk": 0.5, "variant": "paper"}


@pytest.mark.parametrize("data", ["rows.jsonl", ["rows.jsonl", "more.jsonl"]])
def test_a_path_alone_is_a_model_or_data(write, data):
    short = {"pivot": "org/pivot", "sources": ["org/first", {"model": "org/second"}], "data": data}
    recipe = load_recipe(write(yaml.safe_dump(short)), ["sources.0.chat_template=pivot"])
    assert recipe == load_recipe(write(SMALL), [f"data.path={data}", "sources.0.chat_template=pivot"])
    assert [source.chat_template for source in recipe.sources] == ["pivot", "own"]
    recipe = load_recipe(write(SMALL), ["pivot=org/other", "sources.1.name=other", "distill.lora={r: 8}"])
    assert (recipe.pivot.model, recipe.sources[1].label) == ("org/other", "other")
    assert recipe.distill.lora == {"r": 8}
    assert jsonschema.Draft202012Validator(schema()).is_valid(short)


# Mistakes


def assert_rows(error: BaseException | None, expected: list[tuple[int | str, str]]) -> None:
    """A RecipeError of one row per mistake, in order, each with its line or another place, and what it says."""
    assert isinstance(error, RecipeError)
    head, *rows = str(error).splitlines()
    assert head.endswith(f": {len(expected)} problems")
    for row, (place, says) in zip(rows, expected, strict=True):
        assert (f"line {place}: " if isinstance(place, int) else f"{place}: ") in row
        assert says in row


def test_every_mistake_at_once_with_line_and_nearest_name(write):
    path = write(
        "preset: fusechatt\n"
        "pivot: {model: a, lod: {}, load: float32}\n"
        "sources:\n"
        "  - {model: b, chat_templat: own}\n"
        "  - {name: c}\n"
        "data: {path: x, max_length: 1}\n"
        "distil: {}\n"
        "capture: {top_k: -3}\n"
    )
    expected = [
        ("--set data.overlong=cat", "not 'cat'"),
        (1, "'fusechatt'; did you mean 'fusechat'"),
        (2, "pivot.load: "),
        (2, "'lod'; did you mean 'load'"),
        (4, "'chat_templat'; did you mean 'chat_template'"),
        (5, "`model` is missing in sources.1"),
        (6, "data.max_length: Input should be greater than or equal to 2, not 1"),
        (7, "'distil'; did you mean 'distill'"),
        (8, "capture.top_k"),
    ]
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["data.overlong=cat"])
    assert_rows(caught.value, expected)


def test_what_is_found_by_the_schema_and_by_the_stages_is_one_round(write, tmp_path):
    path = write(
        "pivot: {model: org/pivot, load: {attn_implementation: foo}}\n"
        "sources:\n"
        "  - {model: org/first, weight: 2}\n"
        "  - {model: ./nowhere, load: {device_map: foo}}\n"
        "  - {model: org/second, name: joint}\n"
        "  - {model: org/second, chat_template: none.jinja}\n"
        "data: none.jsonl\n"
        "seed: true\n"
        "distill:\n"
        "  epochs: 0\n"
        "  weight_dekay: 1\n"
        "  num_train_epochs: .inf\n"
        "  seed: 18446744073709551616\n"
        "  lora: {r: 0}\n"
        "merge: {merge_method: slurp}\n"
        "evaluate: {path: ./none}\n"
    )
    expected = [
        (1, "attn_implementation 'foo'"),
        (3, "'weight'"),
        (4, "'foo'"),
        (4, "./nowhere"),
        (5, "joint"),
        (6, "none.jinja"),
        (7, "none.jsonl"),
        (8, "true"),
        (10, "epochs"),
        (11, "weight_dekay"),
        (12, "finite"),
        (13, "18446744073709551616"),
        (14, "r"),
        (15, "did you mean 'slerp'"),
        (16, "./none"),
    ]
    for command in (["validate", str(path)], ["plan", str(path)], ["run", str(path), str(tmp_path / "out")]):
        assert_rows(CliRunner().invoke(cli, command).exception, expected)
    assert not (tmp_path / "out").exists()
    found = json.loads(CliRunner().invoke(cli, ["validate", str(path), "--json"]).stdout)
    assert (found["valid"], len(found["problems"])) == (False, len(expected))


def test_what_can_never_train_or_merge_is_refused_before_anything_is_captured(write, tmp_path, monkeypatch):
    text = (
        SMALL + "capture: {top_k: 4,\n  temperature: 2}\ndistill:\n  batch_size: 10\n  per_device_train_batch_size: 4\n"
        "  lr_scheduler_type: cosin\n  lora: {lora_alhpa: 4}\n  warmpu_steps: 1\n  gradient_accumulation_steps: 2\n"
        "merge:\n  parameters: {select_topkk: 0.1}\n  modles: []\n"
    )
    path, merge = write(text), "merge.dtype=bf17"
    error = CliRunner().invoke(cli, ["run", str(path), str(tmp_path / "out"), "--set", merge]).exception
    expected = [
        (f"--set {merge}", "unknown dtype 'bf17'"),
        (5, "capture.temperature is 2.0, but distill.temperature is 1.0"),
        (6, "cosin is not a valid SchedulerType"),
        (7, "batch_size 10"),
        (10, "peft refuses the lora settings"),
        (11, "warmpu_steps"),
        (12, "gradient_accumulation_steps is set by batch_size"),
        (14, "did you mean 'select_topk'"),
        (15, "'modles'"),
    ]
    assert_rows(error, expected)
    assert not (tmp_path / "out").exists()
    assert mistakes(load_recipe(path), ["evaluate"]) == []  # nothing is trained
    # Which batches can be divided depends on the processes of the run.
    even = ["distill.batch_size=10", "distill.per_device_train_batch_size=5"]
    checked(write(SMALL), *even)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match=r"--set distill.batch_size=10: batch_size 10 .* 5 x 4 processes"):
        checked(write(SMALL), *even)


@pytest.mark.parametrize(
    ("field", "value", "line", "says"),
    [
        ("optim", "sgdd", 4, "sgdd"),
        ("adam_beta1", "2", 4, "Invalid beta parameter at index 0: 2"),
        ("max_steps", "many", 6, "max_steps is 'many'"),
        ("save_strategy", "no", 6, "quotes"),
        ("lr_scheduler_type", "cosine_with_min_lr", 4, "min_lr"),
        ("eval_strategy", "steps", 6, "eval_strategy cannot be set"),
    ],
)
def test_training_arguments_that_transformers_or_torch_refuse_are_refused_at_their_line(
    write, field, value, line, says
):
    environment = dict(os.environ)
    with refused(RecipeError, f"recipe.yml, line {line}: ", says):
        checked(write(SMALL + f"distill:\n  seed: 1\n  {field}: {value}\n"))
    assert dict(os.environ) == environment


def test_bfloat16_needs_no_accelerator(write):
    recipe = checked(write(SMALL + "distill: {bf16: true}\n"))
    args = training_arguments(recipe.distill, Path("unused"))
    assert args.bf16
    assert args.use_cpu == (not torch.accelerator.is_available())


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("alignment:\n  vocabulary: none\n", [], [r"line 5: .*needs a vocabulary map"]),
        ("preset: uld\nfusion: {mode: joint,\n  level: token}\n", [], ["line 6: .*sequence, not token"]),
        (
            "preset: grouped_kl\n",
            ["sources.0.alignment.vocabulary=ms"],
            ["--set sources.0.alignment.vocabulary=ms: .*the loss is grouped_kl and the vocabulary ms"],
        ),
        ("preset: profuser\n", ["sources.0.on_the_fly=true"], ["--set sources.0.on_the_fly=true: .*a schedule reads"]),
        (
            "alignment: {vocabulary: none, tokens: dtw}\n",
            ["sources.0.name=second"],
            ["line 2: two sources are called", "line 4: .*tokens is span, not dtw", "line 4: .*loss kl compares"],
        ),
    ],
)
def test_values_that_clash_are_mistakes_like_others(write, text, overrides, expected):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(SMALL + text), [*overrides, "merge=null"])
    for says in expected:
        assert re.search(says, str(caught.value)), (says, str(caught.value))


@pytest.mark.parametrize("changed", ["fusion.mode=joint", "sources=[{model: org/first}]"])
def test_one_target_has_nothing_to_select_by(write, changed):
    path = write("preset: fusechat\n" + SMALL)
    with pytest.raises(RecipeError, match=r"select_topk is 0\.1 with one target"):
        checked(path, changed)
    checked(path, changed, "merge=null")
    checked(path, changed, "merge.parameters.select_topk=1")


@pytest.mark.parametrize(
    ("sources", "named"),
    [
        ("[{model: a/x}, {model: b/x}]", "'x'"),
        ("[{model: a/pivot}]", "'pivot'"),
        ("[{model: a/b.training}]", "'b.training'"),
        ("[{model: ../..}]", r"'\.\.'"),
        ("[]", "sources"),
        ("text", "sources"),
        (f"[{{model: a/{'b' * 300}}}]", "300 characters"),
        ("[{model: p}]", "the pivot itself"),
        ("[{model: a, name: ../up}]", r"sources\.0\.name"),
    ],
)
def test_sources_have_names_of_their_own(write, sources, named):
    with pytest.raises(RecipeError, match=named):
        load_recipe(write(f"pivot: {{model: p}}\nsources: {sources}\ndata: {{path: x}}\n"))


@pytest.mark.parametrize("key", ["data.path", "evaluate.path"])
def test_what_is_neither_here_nor_an_id_is_missing_data(write, key):
    path = write(SMALL + "evaluate: {path: rows.jsonl}\n")
    (mistake,) = mistakes(load_recipe(path, [f"{key}=a/b/c"]))
    assert "a/b/c" in mistake.says
    assert mistake.paths == (tuple(key.split(".")),)
    assert mistakes(load_recipe(path, [f"{key}=owner/name"])) == []


def test_examples_are_read_before_anything_is_made(write, tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "LOOKED_AT", 1000)
    texts = [json.dumps({"text": f"text {number}"}) for number in range(1, 1201)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*texts[:700], '{"text": ', *texts[701:]]))
    (tmp_path / "held-out").mkdir()
    (tmp_path / "held-out" / "a.jsonl").write_text("\n".join([*texts[:3], "{"]))
    path = write(SMALL + "evaluate: {path: held-out}\n")
    with pytest.raises(RecipeError, match=r"rows\.jsonl, line 701(.*\n)*.*a\.jsonl, line 4"):
        checked(path)
    checked(path, "data.on_bad_row=skip", "evaluate.limit=2")
    checked(path, "data.limit=700", "evaluate.limit=2")  # the broken ones are not used


def test_a_model_that_is_missing_is_no_mistake_once_it_has_served(write, tmp_path):
    recipe, out = load_recipe(write(SMALL), ["sources.0.model=./gone", "data.path=gone.jsonl"]), tmp_path / "out"
    assert len(mistakes(recipe)) == 2
    for place in ("captures/gone", "data"):
        (out / place).mkdir(parents=True)
        (out / place / "manifest.json").touch()
    assert mistakes(recipe, layout=Layout(out)) == []


# Overrides and includes


def test_a_section_that_only_overrides_give_is_blamed_on_them(write):
    with pytest.raises(RecipeError, match=r"--set distill\.optim=sgdd: .*sgdd"):
        checked(write(SMALL), "distill.optim=sgdd")


@pytest.mark.parametrize("override", ["novalue", "=3", "sources.7.name=x", "sources.x.name=y", "data.path.deep=1"])
def test_overrides_that_name_nothing(write, override):
    with pytest.raises(RecipeError, match="--set"):
        load_recipe(write(SMALL), [override])


def test_includes_lie_below_and_keep_their_lines(write):
    write("capture: {top_k: 4}\ndata:\n  path: rows.jsonl\n  max_length: 0\n", "parts/base.yml")
    path = write("include: parts/base.yml\npivot: {model: p}\nsources: [{model: a}]\ndata: {max_length: 64}\n")
    recipe = load_recipe(path)
    assert (recipe.capture.top_k, recipe.data.path, recipe.data.max_length) == (4, "rows.jsonl", 64)
    path.write_text("include: parts/base.yml\npivot: {model: p}\nsources: [{model: a}]\n")
    with pytest.raises(RecipeError, match=r"base\.yml, line 4: data\.max_length"):
        load_recipe(path)


def test_includes_stay_in_the_folder_and_do_not_turn_in_circles(write, tmp_path):
    (tmp_path / "outside.yml").write_text("seed: 1\n")
    path = write("include: [../outside.yml]\n", "inner/recipe.yml")
    with pytest.raises(RecipeError, match=r"line 1: \.\./outside\.yml is outside the recipe's folder"):
        load_recipe(path)
    (tmp_path / "inner" / "link.yml").symlink_to(tmp_path / "outside.yml")
    path.write_text("include: link.yml\n")
    with pytest.raises(RecipeError, match="outside the recipe's folder"):
        load_recipe(path)
    path.write_text("include: nowhere.yml\n")
    with pytest.raises(RecipeError, match=r"line 1: there is no file 'nowhere\.yml'"):
        load_recipe(path)
    path.write_text('include: "a\\0.yml"\n')
    with pytest.raises(RecipeError, match="line 1: include"):
        load_recipe(path)
    write("include: b.yml\n", "a.yml")
    with pytest.raises(RecipeError, match="includes itself"):
        load_recipe(write("include: a.yml\n", "b.yml"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_fuzzed_recipes_raise_only_our_errors(tmp_path, data):
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=8), child, max_size=3),
        max_leaves=8,
    )
    recipe = yaml.safe_load(SMALL + "preset: fusechat\ncapture: {top_k: 3}\ninclude: []\n")
    key = data.draw(st.sampled_from(sorted(recipe)))
    if isinstance(recipe[key], dict) and data.draw(st.booleans()):
        recipe[key][data.draw(st.sampled_from([*recipe[key], "other"]))] = data.draw(value)
    else:
        recipe[key] = data.draw(value)
    path = tmp_path / "fuzzed.yml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    try:
        said = f"{path} {len(load_recipe(path).sources)}"
    except FusekitError as error:
        said = str(error)
    assert str(path) in said


# Commands, schema


def test_validate_and_new(write, tmp_path):
    path = write(SMALL)
    run = CliRunner()
    result = run.invoke(cli, ["validate", str(path)])
    assert str(path) in result.stdout
    assert "org/first" in result.stderr  # on the hub, which is not asked
    result = run.invoke(cli, ["validate", str(path), "--resolved", "--set", "seed=7"])
    assert yaml.safe_load(result.stdout)["seed"] == 7
    assert run.invoke(cli, ["new"]).output.split() == ["fusion.yml", "fusion.schema.json"]
    assert len(load_recipe(tmp_path / "fusion.yml").sources) == 2
    assert isinstance(run.invoke(cli, ["new"]).exception, RecipeError)


def test_the_schema_and_the_page_of_keys_are_those_of_the_sections():
    assert CliRunner().invoke(cli, ["schema"]).output == schema_text()
    assert schema_text() == (folder() / SCHEMA).read_text(encoding="utf-8"), "fusekit schema > recipes/" + SCHEMA
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "recipe_keys.py"))["markdown"]()
    assert page == (docs / "recipe-keys.md").read_text(encoding="utf-8"), "python docs/recipe_keys.py"


def test_the_schema_takes_what_loads_and_refuses_what_does_not():
    validator, small = jsonschema.Draft202012Validator(schema()), yaml.safe_load(SMALL)
    assert validator.is_valid({"include": "base.yml", "distill": {"num_train_epochs": 1}})
    assert validator.is_valid(small)
    for wrong in ({"distil": {}}, {"preset": "other"}, {"capture": {"top_k": 0}}, {"sources": []}):
        assert not validator.is_valid(small | wrong)
    assert not validator.is_valid({"pivot": {"model": "a"}})
