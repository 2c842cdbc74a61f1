"""The shipped recipes, `fusekit ls`, `fusekit cp`, and `fusekit doctor`."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner

from fusekit.cli import COMMANDS, cli
from fusekit.errors import RecipeError
from fusekit.recipe import shipped as shipped_recipes

RECIPES = shipped_recipes.recipes()
FUSIONS = [name for name, path in RECIPES.items() if "\npivot:" in path.read_text()]


def invoke(*arguments):
    return CliRunner().invoke(cli, arguments)


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_recipe_opens_with_what_one_needs_to_know_and_loads(name):
    from fusekit.recipe.loading import load_recipe

    text = RECIPES[name].read_text()
    header = text[: text.index("\npreset:")]
    for word in ("# Purpose: ", "# Prerequisites: ", "# Sizes: ", "# Command: fusekit run "):
        assert word in header, f"{name} does not say its {word}"
    assert all(len(line) <= 120 for line in text.splitlines())
    assert load_recipe(RECIPES[name]).sources


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in FUSIONS])
def test_recipe_opens_with_what_one_needs_to_know_and_is_a_mergekit_recipe(name):
    from mergekit import merge_methods
    from mergekit.config import MergeConfiguration

    import fusekit.merge_methods  # noqa: F401

    text = RECIPES[name].read_text()
    header = text[: text.index("merge_method:")]
    for word in ("# Purpose: ", "# Prerequisites: ", "# Sizes: ", "# Command: mergekit-yaml "):
        assert word in header, f"{name} does not say its {word}"
    assert all(len(line) <= 120 for line in text.splitlines())
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    method = merge_methods.get(config.merge_method)
    known = {parameter.name for parameter in method.spec.parameters}
    assert set(config.parameters or {}) <= known
    for model in config.models or []:
        assert set(model.parameters or {}) <= known


def test_published_settings():
    def load(name):
        return yaml.safe_load(RECIPES[name].read_text())

    sce = load("fusechat-sce")
    assert (sce["parameters"], sce["dtype"]) == ({"select_topk": 0.1, "variant": "fuseai"}, "bfloat16")
    targets = [f"FuseAI/OpenChat-3.5-7B-{t}-v2.0" for t in ("Starling", "SOLAR", "InternLM", "Mixtral", "Qwen")]
    for name in ("fusechat-sce", "fusechat-ta", "fusechat-ties", "fusechat-dare"):
        assert [m["model"] for m in load(name)["models"]] == ["openchat/openchat_3.5", *targets]
    assert [m["model"] for m in load("fusechat-linear")["models"]] == targets
    fuseo1 = [name for name in RECIPES if name.startswith("fuseo1-")]
    assert len(fuseo1) == 5
    for name in fuseo1:
        recipe = load(name)
        assert recipe["parameters"] == {"select_topk": 1.0, "variant": "renormalized"}
        assert recipe["models"][0]["model"] == recipe["base_model"]


def test_ls_names_every_recipe_with_its_title():
    result = invoke("ls")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == list(RECIPES)
    assert "FuseChat-7B-v2.0" in result.output
    assert json.loads(invoke("ls", "--json").output).keys() == RECIPES.keys()


def test_cp_writes_the_recipe_and_spares_what_is_there(tmp_path):
    target = tmp_path / "mine.yml"
    assert invoke("cp", "fusechat-sce", str(target)).exit_code == 0
    assert target.read_bytes() == RECIPES["fusechat-sce"].read_bytes()
    target.write_text("precious")
    refused = invoke("cp", "fusechat-varm", str(target))
    assert isinstance(refused.exception, RecipeError)
    assert "exists already; --force replaces it" in str(refused.exception)
    assert target.read_text() == "precious"
    assert invoke("cp", "--force", "fusechat-varm.yml", str(target)).exit_code == 0
    assert target.read_bytes() == RECIPES["fusechat-varm"].read_bytes()
    assert invoke("cp", "fusechat-varm", str(tmp_path)).exit_code == 0
    assert (tmp_path / "fusechat-varm.yml").is_file()
    assert "No such file" in str(invoke("cp", "fusechat-varm", str(tmp_path / "a" / "b.yml")).exception)


def test_cp_of_a_fusion_recipe_puts_its_schema_beside_it(tmp_path):
    schema = tmp_path / "fusion.schema.json"
    assert invoke("cp", "demo", str(tmp_path)).output.splitlines() == [str(tmp_path / "demo.yml"), str(schema)]
    assert schema.read_bytes() == shipped_recipes.schema().read_bytes()
    assert invoke("cp", "demo", str(tmp_path / "mine.yml")).output.splitlines() == [str(tmp_path / "mine.yml")]
    schema.write_text("{}")
    said = invoke("cp", "demo", str(tmp_path / "other.yml")).output
    assert "is another one and stays; `fusekit schema` prints this version's" in said
    assert schema.read_text() == "{}"
    assert "fusion.schema" not in invoke("ls").output


def test_cp_suggests_the_nearest_name():
    assert "did you mean 'fusechat-sce'" in str(invoke("cp", "fusechat-sc").exception)
    assert "known here: demo" in str(invoke("cp", "zzzz").exception)


def test_help_lists_the_commands_without_importing_torch():
    program = (
        "import sys; from click.testing import CliRunner; from fusekit.cli import cli; "
        "print(CliRunner().invoke(cli, ['--help']).output); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_an_error_is_one_message_and_exit_status_1():
    command = [sys.executable, "-c", "from fusekit.cli import main; main()", "cp", "nothing-like-it"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("fusekit: no shipped recipe is called 'nothing-like-it'")
    assert "Traceback" not in done.stderr


def test_doctor_explains_the_switch():
    environment = {**os.environ, "FUSEKIT_AUTOLOAD": "0"}
    command = [sys.executable, "-c", "from fusekit.cli import main; main()", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    for words in ("mergekit         0.1", "CPU:", "FUSEKIT_AUTOLOAD=0 turns it off: unset it", "fusekit merge RECIPE"):
        assert words in done.stdout


def test_the_shell_completes_commands_without_importing_them():
    environment = {**os.environ, "_FUSEKIT_COMPLETE": "bash_complete", "COMP_WORDS": "fusekit v", "COMP_CWORD": "1"}
    program = (
        "import sys; sys.argv[0] = 'fusekit'; from fusekit.cli import cli\n"
        "try: cli()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == ["plain,validate", "plain,verify"], done.stderr
