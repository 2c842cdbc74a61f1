"""Faults 13, 14 and 26: recipes that are misspelled, hostile or random."""

from contextlib import suppress

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusekit import yaml as safe_yaml
from fusekit.errors import FusekitError, RecipeError
from fusekit.merging import merge
from fusekit.merging.lint import lint
from tests.merging.conftest import OVERWRITE, QUIET, listing

GOOD = """\
merge_method: ties
base_model: base
models:
  - model: base
  - model: target1
    parameters:
      weight: 0.5
      density: [0.2, 0.8]
  - model: target2
    parameters:
      weight:
        - filter: self_attn
          value: 0.1
        - value: 0.5
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
tokenizer: {source: union, tokens: {x: {source: base, force: true}}}
"""


def problems(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        lint(safe_yaml.loads(text, "recipe.yml"))
    return str(caught.value)


def test_a_good_recipe_passes_without_warnings():
    config, warnings = lint(safe_yaml.loads(GOOD))
    assert config.merge_method == "ties"
    assert warnings == []


@pytest.mark.parametrize(
    ("old", "new", "line", "nearest"),
    [
        ("base_model: base", "base_modle: base", 2, "base_model"),
        ("merge_method: ties", "merge_method: tise", 1, "ties"),
        ("- model: target1", "- modell: target1", 5, "model"),
        ("    parameters:\n      weight: 0.5", "    paramters:\n      weight: 0.5", 6, "parameters"),
        ("weight: 0.5", "wieght: 0.5", 7, "weight"),
        ("density:", "densty:", 8, "density"),
        ("filter: self_attn", "fliter: self_attn", 12, "filter"),
        ("- value: 0.5", "- valeu: 0.5", 14, "value"),
        ("normalize: true", "normalise: true", 15, "normalize"),
        ("dtype: bfloat16", "dtype: bfloat", 16, "bfloat16"),
        ("dtype: bfloat16", "dtpye: bfloat16", 16, "dtype"),
        ("force: true", "froce: true", 17, "force"),
        ("source: union", "sauce: union", 17, "source"),
        ("dtype: bfloat16", "dtype: bfloat16\nchat_template: chatlm", 17, "chatml"),
    ],
)
def test_misspelled_names_are_errors_with_the_nearest_name_and_the_line(old, new, line, nearest):
    assert old in GOOD
    message = problems(GOOD.replace(old, new, 1))
    assert f"line {line}: " in message
    assert f"did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("modules: {default: {models: [{model: a, parameters: {wait: 1}}]}}", 3),
        ("modules: {default: {models: [{model: a}], parameters: {wait: 1}}}", 3),
        ("slices: [{sources: [{model: a, layer_range: [0, 1], parameters: {wait: 1}}]}]", 3),
        ("slices: [{sources: [{model: a, layer_range: [0, 1]}], parameters: {wait: 1}}]", 3),
        ("models: [{model: a}]\nparameters: {wait: 1}", 4),
    ],
)
def test_unknown_parameters_in_every_place(place, line):
    message = problems(f"merge_method: linear\ndtype: float32\n{place}\n")
    assert f"recipe.yml, line {line}: unknown parameter 'wait' of linear" in message


def test_shared_parameter_under_one_model_is_an_error():
    message = problems(GOOD.replace("weight: 0.5", "normalize: false", 1))
    assert "line 7" in message
    assert "under one model it has no effect" in message


def test_parameter_of_the_base_that_has_no_effect_is_a_warning():
    _, warnings = lint(safe_yaml.loads(GOOD.replace("- model: base", "- {model: base, parameters: {weight: 1}}")))
    assert len(warnings) == 1
    assert "no effect on the base model" in warnings[0]


@pytest.mark.parametrize("value", ["heavy", "[0.5, heavy]", "{value: heavy}", ".nan", "[0, .inf]"])
def test_values_that_the_method_refuses(value):
    assert "'weight' of ties" in problems(GOOD.replace("weight: 0.5", f"weight: {value}", 1))


def test_everything_is_reported_at_once_in_the_order_of_the_lines():
    text = GOOD.replace("base_model", "base_modle").replace("normalize", "normalise").replace("bfloat16", "bf16")
    message = problems(text)
    assert "3 problems" in message
    assert message.index("line 2:") < message.index("line 15:") < message.index("line 16:")


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\n",
        "merge_method: linear\nmodels: [{model: a}]\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
        "merge_method: linear\nmodels: [{model: a@b@c}]\n",
        "merge_method: [linear]\nmodels: [{model: a}]\n",
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: base\ntokenizer: {source: base}\n",
        "merge_method: linear\nmodels: [{model: a, parameters: 3}]\n",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: [1, {value: 2}]}}]\n",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: [[1]]}}]\n",
        "",
        "[]",
        "3",
    ],
)
def test_recipes_that_mean_nothing(text):
    assert "recipe.yml" in problems(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n",
            ["line 1", "'t' of slerp is missing"],
        ),
        (
            "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nmodels: [{model: a}]\n",
            ["slerp", "2 inputs", "got 1"],
        ),
        ("merge_method: ties\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n", ["ties", "base"]),
        ("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: a}]\n", ["linear", "Duplicate"]),
        (
            "merge_method: fusechat_sce\nbase_model: a\nmodels: [{model: b}]\nparameters: {select_topk: 0.5}\n",
            ["line 4: select_topk is 0.5 with one target"],
        ),
    ],
)
def test_what_a_method_needs_is_known_from_the_recipe_alone(text, parts):
    message = problems(text)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nmodels: [{model: b}]\n",
        "merge_method: ties\nbase_model: a\nmodels: [{model: a}, {model: b, parameters: {weight: 1}}]\n",
        "merge_method: slerp\nbase_model: a\n"
        "slices: [{parameters: {t: 1}, sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}]\n",
        "merge_method: linear\nmodules: {default: {models: [{model: a}], parameters: {weight: 1}}}\n",
    ],
)
def test_a_parameter_may_be_given_wherever_mergekit_looks(text):
    lint(safe_yaml.loads(text))


@pytest.mark.parametrize(
    "line",
    [
        "base_model: !!python/object/apply:os.system ['touch hacked']",
        "base_model: !!python/name:os.system",
        "a: &a [*a]",
        "include: ../../etc/passwd",
    ],
)
def test_hostile_yaml_is_refused_and_runs_nothing(workshop, line):
    recipe = workshop / "recipe.yml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: base}}]\n{line}\n")
    before = listing(workshop)
    with pytest.raises(RecipeError, match="line 3"):
        merge(recipe, "out", settings=QUIET)
    assert listing(workshop) == before


WORDS = "base target1 linear ties bfloat16 union * ~/x no/such @"
KEYS = """model models parameters weight density value filter sources layer_range merge_method slices modules default
tokenizer source tokens base_model dtype kind lora path"""

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.sampled_from([*WORDS.split(), "", "a\x00b"]),
    st.text(max_size=5),
)
keys = st.sampled_from(KEYS.split())
trees = st.recursive(
    scalars, lambda t: st.one_of(st.lists(t, max_size=3), st.dictionaries(keys, t, max_size=4)), max_leaves=12
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(keys, trees, max_size=6))
def test_random_recipes_give_fusekit_errors_only(content):
    content.setdefault("merge_method", "linear")
    with suppress(FusekitError):
        lint(safe_yaml.loads(yaml.safe_dump(content)))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_good_recipe_with_one_random_value_is_merged_or_refused(write_recipe, workshop, data):
    """Through the whole command: models, plan, estimate, merge, verification."""
    recipe = write_recipe()
    content = yaml.safe_load(recipe.read_text())
    places = [(content, key) for key in content] + [(content["models"][0], "model"), (content["models"], 1)]
    holder, key = data.draw(st.sampled_from(places))
    holder[key] = data.draw(trees)
    recipe.write_text(yaml.safe_dump(content))
    try:
        merge(recipe, "out", settings=OVERWRITE)
    except FusekitError:
        assert [name for name in listing(workshop) if name.startswith(".out.staging")] == []
    else:
        assert (workshop / "out/model.safetensors").is_file()
