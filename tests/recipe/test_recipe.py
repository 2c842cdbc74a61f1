"""Reading fusion recipes: presets, includes, overrides, and every mistake with its place."""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

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
from fusekit.pipeline import stage
from fusekit.pipeline.run import mistakes
from fusekit.recipe import Recipe, reference
from fusekit.recipe.loading import PRESETS, load_recipe
from fusekit.recipe.reference import document, markdown, schema_text

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


def test_defaults_are_the_preset_fusekit(write):
    recipe = load_recipe(write(SMALL))
    assert recipe.preset == "fusekit"
    assert [source.label for source in recipe.sources] == ["first", "second"]
    assert (recipe.alignment.tokens, recipe.alignment.vocabulary) == ("span", "prefix")
    assert recipe.distill.truncation == "tail"
    assert recipe.merge == PRESETS["fusekit"]["merge"]


def test_a_preset_lies_below_the_recipe(write):
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
    assert jsonschema.Draft202012Validator(document()).is_valid(resolved)


def test_another_merge_method_does_not_inherit_parameters(write):
    recipe = load_recipe(write(SMALL + "merge: {merge_method: ties, parameters: {density: 0.5}}\n"))
    assert recipe.merge == {"merge_method": "ties", "parameters": {"density": 0.5}}
    recipe = load_recipe(write(SMALL + "merge: {parameters: {select_topk: 0.5}}\n"))
    assert recipe.merge["merge_method"] == "fusechat_sce"
    assert recipe.merge["parameters"] == {"select_topk": 0.5, "variant": "paper"}


def test_every_mistake_at_once_with_line_and_nearest_name(write):
    path = write(
        "preset: fusechat\n"
        "pivot: {model: a, lod: {}, load: float32}\n"
        "sources:\n"
        "  - {model: b, chat_templat: own}\n"
        "  - {name: c}\n"
        "data: {path: x, max_length: 1}\n"
        "distil: {}\n"
        "capture: {top_k: -3}\n"
        "evaluate: c.jsonl\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["data.overlong=cat"])
    assert str(caught.value).splitlines() == [
        f"{path}: 9 problems",
        "  --set data.overlong=cat: data.overlong: Input should be 'cut' or 'drop', not 'cat'",
        f"  {path}, line 2: pivot.load: write a mapping with keys such as dtype, device_map, quantization",
        f"  {path}, line 2: unknown key 'lod'; did you mean 'load'?",
        f"  {path}, line 4: unknown key 'chat_templat'; did you mean 'chat_template'?",
        f"  {path}, line 5: `model` is missing in sources.1",
        f"  {path}, line 6: data.max_length: Input should be greater than or equal to 2, not 1",
        f"  {path}, line 7: unknown key 'distil'; did you mean 'distill'?",
        f"  {path}, line 8: capture.top_k: Input should be greater than 0, not -3",
        f"  {path}, line 9: evaluate: write a mapping with keys such as path, name, split",
    ]


def test_a_section_that_is_missing_and_a_list_that_is_none(write):
    path = write("pivot: a\nsources: b\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 2 problems",
        f"  {path}, line 1: `data` is missing",
        f"  {path}, line 2: sources: Input should be a valid list, not 'b'",
    ]


def test_what_is_found_by_the_schema_and_by_the_stages_is_one_round(write, tmp_path):
    text = (
        "pivot: {model: org/pivot, load: {attn_implementation: foo}}\n"
        "sources:\n"
        "  - {model: org/first, weight: 2}\n"
        "  - {model: ./nowhere, load: {device_map: foo}}\n"
        "  - {model: org/pivot, name: same}\n"
        f"  - {{model: org/{'x' * 300}}}\n"
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
    path = write(text)
    expected = [
        (1, "attn_implementation 'foo'"),
        (3, "'weight'"),
        (4, "./nowhere"),
        (4, "'foo'"),
        (5, "same"),
        (6, "300"),
        (7, "none.jinja"),
        (8, "none.jsonl"),
        (9, "true"),
        (11, "epochs is no setting"),
        (12, "did you mean 'weight_decay'"),
        (13, "finite"),
        (14, "18446744073709551616"),
        (15, "r"),
        (16, "did you mean 'slerp'"),
        (17, "./none"),
    ]
    for command in (["validate", str(path)], ["run", str(path), str(tmp_path / "out")]):
        error = CliRunner().invoke(cli, command).exception
        assert isinstance(error, RecipeError)
        rows = str(error).splitlines()[1:]
        for line, says in expected:
            assert any(f"line {line}: " in row and says in row for row in rows), (line, says, rows)
    assert len(rows) == len(expected)
    assert not (tmp_path / "out").exists()
    found = json.loads(CliRunner().invoke(cli, ["validate", str(path), "--json"]).stdout)
    assert (found["valid"], len(found["problems"])) == (False, len(expected))


def test_examples_are_read_far_and_it_is_said_how_far(write, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "LOOKED_AT", 1000)
    texts = [json.dumps({"text": f"text {number}"}) for number in range(1, 1201)]
    lines = [*texts[:700], '{"text": ', *texts[701:]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "held-out").mkdir()
    for name in ("a", "b"):
        (tmp_path / "held-out" / f"{name}.jsonl").write_text("\n".join(texts[:3]))
    path = write(SMALL + "evaluate: {path: held-out}\n")

    def found(*overrides: str) -> dict[str, Any]:
        options = [word for override in overrides for word in ("--set", override)]
        result = CliRunner().invoke(cli, ["validate", str(path), "--json", *options])
        return json.loads(result.stdout)

    assert "rows.jsonl, line 701" in found()["problems"][0]
    assert found("data.on_bad_row=skip")["read"] == {
        "data": {"examples": 1000, "all": False, "skipped": 1},
        "evaluate": {"examples": 6, "all": True, "skipped": 0},
    }
    assert found("data.limit=700", "evaluate.limit=2")["read"] == {  # the broken one is not used
        "data": {"examples": 700, "all": True, "skipped": 0},
        "evaluate": {"examples": 4, "all": True, "skipped": 0},  # of each file
    }
    said = CliRunner().invoke(cli, ["validate", str(path), "--set", "data.on_bad_row=skip"]).stderr
    assert "data: the first 1,000" in said


@pytest.mark.parametrize("key", ["data.path", "evaluate.path"])
@pytest.mark.parametrize("name", ["nope", "a/b/c"])
def test_what_is_neither_here_nor_an_id_is_missing_data(write, key, name):
    path = write(SMALL + "evaluate: {path: rows.jsonl}\n")
    (mistake,) = mistakes(load_recipe(path, [f"{key}={name}"]))
    assert name in mistake.says
    assert mistake.paths == (tuple(key.split(".")),)
    assert mistakes(load_recipe(path, [f"{key}=owner/name"])) == []


def test_words_that_yaml_reads_as_truth_values_are_to_be_quoted(write):
    path = write(SMALL)
    overrides = ["distill.save_strategy=no", "distill.hub_strategy=on", "data.name=no"]
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides, mistakes)
    said = str(error.value).splitlines()[1:]
    assert len(said) == 3
    assert all("quotes" in line for line in said)
    quoted = ["distill.save_strategy='no'", "distill.adam_epsilon=1e-8"]
    assert mistakes(load_recipe(path, quoted)) == []


def test_a_model_that_is_missing_is_no_mistake_once_it_has_served(write, tmp_path):
    recipe, out = load_recipe(write(SMALL), ["sources.0.model=./gone", "data.path=gone.jsonl"]), tmp_path / "out"
    assert len(mistakes(recipe)) == 2
    for folder in ("captures/gone", "data"):
        (out / folder).mkdir(parents=True)
        (out / folder / "manifest.json").touch()
    assert mistakes(recipe, layout=Layout(out)) == []


@pytest.mark.parametrize("data", ["rows.jsonl", ["rows.jsonl", "more.jsonl"]])
def test_a_path_alone_is_a_model_or_data(write, data):
    short = {"pivot": "org/pivot", "sources": ["org/first", {"model": "org/second"}], "data": data}
    recipe = load_recipe(write(yaml.safe_dump(short)), ["sources.0.chat_template=pivot"])
    whole = load_recipe(write(SMALL, "whole.yml"), [f"data.path={data}", "sources.0.chat_template=pivot"])
    assert recipe == whole
    assert load_recipe(write(SMALL), ["pivot=org/other"]).pivot.model == "org/other"
    assert jsonschema.Draft202012Validator(document()).is_valid(short)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (
            "alignment:\n  vocabulary: none\n",
            [],
            [r"line 5: alignment.vocabulary: .*loss kl .* needs a vocabulary map"],
        ),
        ("preset: uld\ndistill:\n  loss: ce\n", [], ["line 6: distill.loss: loss ce .*not vocabulary none"]),
        (
            "preset: gold\ndistill:\n  loss: kl\n",
            [],
            ["line 6: distill.loss: .*the loss is kl and the vocab.* matched"],
        ),
        ("preset: uld\nfusion: {mode: joint,\n  level: token}\n", [], ["line 6: fusion.level: .*sequence, not token"]),
        ("preset: uld\nfusion:\n  function: avg_ce\n", [], ["line 6: fusion.function: .*not avg_ce"]),
        ("distill:\n  loss: reverse_kl\npreset: fusellm\n", [], ["line 5: distill.loss: .* renormalize is infinite"]),
        (
            "preset: grouped_kl\n",
            ["sources.0.alignment.vocabulary=ms"],
            ["--set sources.0.alignment.vocabulary=ms: .*the loss is grouped_kl and the vocabulary ms"],
        ),
        ("preset: profuser\n", ["sources.0.on_the_fly=true"], ["--set sources.0.on_the_fly=true: .*a schedule reads"]),
        ("preset: uld\n", ["alignment.tokens=dtw"], ["--set alignment.tokens=dtw: .*where tokens is span, not dtw"]),
        (
            "alignment: {vocabulary: none, tokens: dtw}\n",
            ["sources.0.name=second"],
            ["line 2: .*two sources are called", "line 4: .*tokens is span, not dtw", "line 4: .*loss kl compares"],
        ),
    ],
)
def test_values_that_clash_are_mistakes_like_others(write, text, overrides, expected):
    path = write(SMALL + text)
    arguments = [str(path), *(part for override in overrides for part in ("--set", override))]
    for command in ("validate", "plan"):
        error = CliRunner().invoke(cli, [command, *arguments, "--set", "merge=null"]).exception
        assert isinstance(error, RecipeError)
        for says in expected:
            assert re.search(says, str(error)), (says, str(error))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("preset: fusechatt\n", r"line 4: unknown preset 'fusechatt'; did you mean 'fusechat'"),
        ("represent: {top_k: 4}\n", r"line 4: unknown key 'represent'.*'capture'"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_way_out(write, text, expected):
    with pytest.raises(RecipeError, match=expected):
        load_recipe(write(SMALL + text))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{model: a/x}, {model: b/x}]", "two sources are called 'x'"),
        ("[{model: a/pivot}]", "no source may be called 'pivot'"),
        ("[{model: a/b, name: joint}]", "no source may be called 'joint'"),
        ("[{model: a/sft}]", "no source may be called 'sft'"),
        ("[{model: a/b.training}]", "no source may be called 'b.training'"),
        ("[{model: ../..}]", "no source may be called '..'"),
        ("[]", "sources is empty: name at least one"),
        ("[{model: a, name: ../up}]", r"sources.0.name is '../up', which becomes .* begin with a letter"),
    ],
)
def test_sources_have_names_of_their_own(write, sources, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(f"pivot: {{model: p}}\nsources: {sources}\ndata: {{path: x}}\n"))


def test_overrides_reach_into_lists_and_are_yaml(write):
    recipe = load_recipe(write(SMALL), ["sources.1.name=other", "capture.top_k=3", "distill.lora={r: 8}"])
    assert recipe.sources[1].label == "other"
    assert recipe.capture.top_k == 3
    assert recipe.distill.lora == {"r": 8}


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
    path.write_text('include: "a\\0.yml"\n')
    with pytest.raises(RecipeError, match=r"line 1: there is no file 'a\\x00\.yml'"):
        load_recipe(path)
    write("include: b.yml\n", "a.yml")
    with pytest.raises(RecipeError, match="includes itself"):
        load_recipe(write("include: a.yml\n", "b.yml"))
    for depth in range(20):
        write(f"include: c{depth + 1}.yml\n", f"c{depth}.yml")
    with pytest.raises(RecipeError, match="nested more than 16 deep"):
        load_recipe(tmp_path / "c0.yml")


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
        said = f"{path}: {len(load_recipe(path).sources)} sources"
    except FusekitError as error:
        said = str(error)
    assert str(path) in said


def test_commands(write):
    path = write(SMALL)
    run = CliRunner()
    result = run.invoke(cli, ["validate", str(path)])
    assert result.stdout == f"{path}: valid; pivot org/pivot, 2 sources: first, second\n"
    assert "org/first" in result.stderr  # on the hub, which is not asked
    result = run.invoke(cli, ["validate", str(path), "--resolved", "--set", "seed=7"])
    assert yaml.safe_load(result.stdout)["seed"] == 7
    schema = json.loads(run.invoke(cli, ["schema"]).output)
    assert {"pivot", "sources", "include", "preset"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    assert schema_text() == reference.schema().read_text(encoding="utf-8"), (
        "the recipe's sections have changed: fusekit schema > recipes/fusion.schema.json"
    )
    page = Path(__file__).parents[2] / "docs" / "recipe-keys.md"
    assert markdown() == page.read_text(encoding="utf-8"), "fusekit schema --markdown > docs/recipe-keys.md"


def test_new_writes_a_recipe_that_loads_and_its_schema(write, tmp_path):
    said = CliRunner().invoke(cli, ["new"])
    assert said.output.split() == ["fusion.yml", "fusion.schema.json"]
    assert len(load_recipe(tmp_path / "fusion.yml").sources) == 2
    assert isinstance(CliRunner().invoke(cli, ["new"]).exception, RecipeError)


def test_every_field_of_the_schema_says_what_it_is():
    found = document()
    sections = {"recipe": found, **found["$defs"]}
    silent = [
        f"{name}.{field}"
        for name, section in sections.items()
        for field, about in section.get("properties", {}).items()
        if "description" not in about
        and "description" not in sections.get(about.get("$ref", "").rsplit("/", 1)[-1], {})
    ]
    assert silent == []
    assert found["properties"]["preset"]["enum"] == sorted(PRESETS)


def test_the_schema_takes_what_loads_and_refuses_what_does_not():
    validator, small = jsonschema.Draft202012Validator(document()), yaml.safe_load(SMALL)
    assert validator.is_valid({"include": "base.yml", "distill": {"num_train_epochs": 1}})
    assert validator.is_valid(small)
    for wrong in ({"distil": {}}, {"preset": "other"}, {"capture": {"top_k": 0}}, {"sources": []}):
        assert not validator.is_valid(small | wrong)
    assert not validator.is_valid({"pivot": {"model": "a"}})


def test_what_can_never_train_or_merge_is_refused_before_anything_is_captured(write, tmp_path, monkeypatch):
    text = (
        SMALL + "capture: {top_k: 4,\n  temperature: 2}\ndistill:\n  batch_size: 10\n  per_device_train_batch_size: 4\n"
        "  lr_scheduler_type: cosin\n  lora: {lora_alhpa: 4}\n  warmpu_steps: 1\n  gradient_accumulation_steps: 2\n"
        "merge:\n  parameters: {select_topkk: 0.1}\n  modles: []\n"
    )
    path, merge = write(text), "merge.dtype=bf17"
    for command in (["validate", str(path)], ["run", str(path), str(tmp_path / "out")], ["plan", str(path)]):
        error = CliRunner().invoke(cli, [*command, "--set", merge]).exception
        assert isinstance(error, RecipeError)
        for line, says in (
            (5, "capture.temperature is 2.0, but distill.temperature is 1.0"),
            (7, "batch_size 10 (examples per optimizer step) cannot be divided by per_device_train_batch_size 4 x 1"),
            (6, "transformers refuses the training arguments: cosin is not a valid SchedulerType"),
            (10, "peft refuses the lora settings: "),
            (11, "warmpu_steps is no setting of fusekit and no field of TrainingArguments"),
            (12, "gradient_accumulation_steps is set by batch_size"),
            (14, "unknown parameter 'select_topkk' of fusechat_sce; did you mean 'select_topk'?"),
            (15, "unknown key 'modles'; did you mean 'mod"),
        ):
            assert f"{path}, line {line}: {says}" in str(error)
        assert f"--set {merge}: unknown dtype 'bf17'" in str(error)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match=r"--set merge.parameters.select_topk=7: .*cannot be 7"):
        checked(write(SMALL), "merge.parameters.select_topk=7")
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
        ("lr_scheduler_kwargs", "{min_lr_rat: 1}", 4, "min_lr_rat"),
        ("eval_strategy", "steps", 6, "eval_strategy cannot be set"),
    ],
)
def test_training_arguments_that_transformers_or_torch_refuse_are_refused_at_their_line(
    write, field, value, line, says
):
    environment = dict(os.environ)
    with pytest.raises(RecipeError) as caught:
        checked(write(SMALL + f"distill:\n  seed: 1\n  {field}: {value}\n"))
    assert f"recipe.yml, line {line}: " in str(caught.value)
    assert says in str(caught.value)
    assert dict(os.environ) == environment


def test_a_scheduler_that_lacks_what_it_needs_is_refused_at_its_line(write):
    path = write(SMALL + "distill:\n  lr_scheduler_type: cosine_with_min_lr\n")
    with pytest.raises(RecipeError, match=r"recipe.yml, line 4: .*min_lr"):
        checked(path)
    checked(path, "distill.lr_scheduler_kwargs={min_lr: 1.0e-7}")


def test_bfloat16_needs_no_accelerator(write):
    recipe = checked(write(SMALL + "distill: {bf16: true}\n"))
    args = training_arguments(recipe.distill, Path("unused"))
    assert args.bf16
    assert args.use_cpu == (not torch.accelerator.is_available())


@pytest.mark.parametrize("changed", ["fusion.mode=joint", "sources=[{model: org/first}]"])
def test_one_target_has_nothing_to_select_by(write, changed):
    path = write("preset: fusechat\n" + SMALL)
    with pytest.raises(RecipeError, match=r"select_topk is 0\.1 with one target"):
        checked(path, changed)
    checked(path, changed, "merge=null")
    checked(path, changed, "merge.parameters.select_topk=1")
    checked(write(SMALL), changed)  # the default preset keeps everything


@pytest.fixture
def piped():
    """Gives a text to the standard input of this process, through a pipe."""
    kept = os.dup(0)

    def feed(text: str) -> None:
        read, write = os.pipe()
        os.write(write, text.encode())
        os.close(write)
        os.dup2(read, 0)
        os.close(read)

    yield feed
    os.dup2(kept, 0)
    os.close(kept)


@pytest.mark.parametrize("place", ["-", "/dev/stdin", "/dev/fd/0"])
def test_a_recipe_may_come_through_a_pipe(place, write, piped):
    write("seed: 7\n", "base.yml")
    piped(SMALL + "include: base.yml\n")
    result = CliRunner().invoke(cli, ["validate", place, "--resolved"])
    assert yaml.safe_load(result.stdout)["seed"] == 7
    piped(SMALL.replace("pivot:", "pivto:"))
    with pytest.raises(RecipeError, match="line 1: unknown key 'pivto'"):
        load_recipe(place)
