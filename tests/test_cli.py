"""The command line: the shipped recipes, `fusekit ls`, `cp`, `doctor`, and options made from settings."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import click
import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel, Field

from fusekit.cli import COMMANDS, cli, main
from fusekit.cli.common import given, options_of
from fusekit.errors import RecipeError
from fusekit.recipe import load_recipe, shipped
from tests.processes import fusekit

RECIPES = shipped.recipes()
FUSIONS = [name for name, path in RECIPES.items() if "\npivot:" in path.read_text()]


def invoke(*arguments):
    return CliRunner().invoke(cli, arguments)


def check_header(name, ends, command):
    text = RECIPES[name].read_text()
    for word in ("# Purpose: ", "# Prerequisites: ", "# Sizes: ", f"# Command: {command} "):
        assert word in text[: text.index(ends)], f"{name} does not say its {word}"
    assert all(len(line) <= 120 for line in text.splitlines())
    return text


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_recipe_opens_with_what_one_needs_to_know_follows_the_schema_and_loads(name):
    text = check_header(name, "\npreset:", "fusekit run")
    assert text.splitlines()[0] == "# yaml-language-server: $schema=./fusion.schema.json"
    wrong = jsonschema.Draft202012Validator(shipped.schema()).iter_errors(yaml.safe_load(text))
    assert [error.message for error in wrong] == []
    assert load_recipe(RECIPES[name]).sources
    assert shipped.title(RECIPES[name]) == text.splitlines()[1].removeprefix("# ")


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in FUSIONS])
def test_recipe_opens_with_what_one_needs_to_know_and_is_a_mergekit_recipe(name):
    from mergekit import merge_methods
    from mergekit.config import MergeConfiguration

    import fusekit.merge_methods  # noqa: F401

    text = check_header(name, "merge_method:", "mergekit-yaml")
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    method = merge_methods.get(config.merge_method)
    known = {parameter.name for parameter in method.spec.parameters}
    for parameters in (config.parameters, *(model.parameters for model in config.models or [])):
        assert set(parameters or {}) <= known


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
    assert "did you mean 'fusechat-sce'" in str(invoke("cp", "fusechat-sc").exception)
    assert "known here: demo" in str(invoke("cp", "zzzz").exception)


def test_cp_of_a_fusion_recipe_puts_its_schema_beside_it(tmp_path):
    schema = tmp_path / "fusion.schema.json"
    assert invoke("cp", "demo", str(tmp_path)).output.splitlines() == [str(tmp_path / "demo.yml"), str(schema)]
    assert schema.read_bytes() == (shipped.folder() / shipped.SCHEMA).read_bytes()
    assert invoke("cp", "demo", str(tmp_path / "mine.yml")).output.splitlines() == [str(tmp_path / "mine.yml")]
    schema.write_text("{}")
    assert invoke("cp", "demo", str(tmp_path / "other.yml")).exit_code == 0
    assert schema.read_text() == "{}"
    assert "fusion.schema" not in invoke("ls").output


def test_an_error_is_one_message_and_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fusekit", "cp", "nothing-like-it"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("fusekit: no shipped recipe is called 'nothing-like-it'")


def test_doctor_explains_the_switch():
    result = CliRunner(env={"FUSEKIT_AUTOLOAD": "0"}).invoke(cli, ["doctor"])
    assert result.exit_code == 1
    for words in ("mergekit         0.1", "CPU:", "FUSEKIT_AUTOLOAD=0 turns it off: unset it", "fusekit merge RECIPE"):
        assert words in result.output


def test_help_and_completion_do_not_import_the_commands():
    environment = {**os.environ, "_FUSEKIT_COMPLETE": "bash_complete", "COMP_WORDS": "fusekit v", "COMP_CWORD": "1"}
    program = (
        "import sys; sys.argv[0] = 'fusekit'; from click.testing import CliRunner; from fusekit.cli import cli\n"
        "print(CliRunner().invoke(cli, ['--help']).output)\n"
        "try: cli()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert all(f"  {name} " in done.stdout for name in COMMANDS), done.stderr
    assert done.stdout.split()[-2:] == ["plain,validate", "plain,verify"], done.stderr
    assert done.returncode == 0, done.stderr


def test_names_that_are_no_utf8_are_printed(tmp_path):
    recipe = tmp_path / os.fsdecode(b"\xff.yml")
    recipe.write_text("pivot: org/a\nsources: [org/b]\ndata: none.jsonl\n")
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "fusekit.cli", "validate", recipe, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert str(recipe) in json.loads(done.stdout)["problems"][0]


def print_to_a_full_disk():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux that is always full")
@pytest.mark.parametrize("command", ["ls", "schema"])  # less and more than Python keeps in memory
def test_a_full_disk_under_the_output_is_one_message(tmp_path, command):
    done = fusekit(tmp_path, command, before=print_to_a_full_disk)
    message = "fusekit: No space left on device for a file or the standard output: write elsewhere\n"
    assert (done.exitcode, done.output) == (1, message)


class Settings(BaseModel):
    count: Annotated[int, Field(gt=0)] | None = Field(default=None, description="How many.")
    share: float = Field(default=0.5, ge=0, le=1, description="Which part.")
    kind: Literal["one", "two"] = Field(default="one", description="Which kind.")
    fast: bool = Field(default=False, description="Be fast.")
    place: str | dict[str, int] | None = Field(default=None, description="Where.")


@click.command()
@options_of(Settings)
def command(**options):
    print(given(options, Settings))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--count", "3", "--share", "0", "--kind", "two"], {"count": 3, "share": 0.0, "kind": "two"}),
        (["--no-fast", "--place", "auto"], {"fast": False, "place": "auto"}),
        (["--fast", "--place", '{"a": 1}'], {"fast": True, "place": {"a": 1}}),
    ],
)
def test_only_what_is_given_is_passed_on(arguments, expected):
    done = CliRunner().invoke(command, arguments)
    assert done.output.strip() == str(expected)


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--share", "1.5"], ["--kind", "three"], ["--place", "{"]])
def test_what_the_settings_refuse_the_options_refuse(arguments):
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 2
    assert arguments[1].strip("{") in done.output


def test_the_help_is_the_settings():
    text = CliRunner().invoke(command, ["--help"]).output
    assert all(word in text for word in ("How many.", "[one|two]", "--fast / --no-fast", "0.5", "x>0"))
