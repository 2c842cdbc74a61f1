"""What is known before anything is read: ``fusekit merge --check``, its function, and options that mean nothing."""

import json
import shutil

import pytest
from click.testing import CliRunner
from mergekit.options import MergeOptions

from fusekit.cli import cli
from fusekit.errors import MergeError
from fusekit.merging import Settings, check, merge
from tests.helpers import edit_tensors
from tests.merging.conftest import listing

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def run(*arguments):
    return CliRunner().invoke(cli, ["merge", *map(str, arguments)], standalone_mode=False)


def test_a_check_says_what_a_merge_would_do_and_writes_nothing(recipe, workshop):
    before = listing(workshop)
    found = check(recipe, "out")
    assert (found.base, found.models, found.tensors) == ("base", ["target1", "target2"], 21)
    assert found.can_run
    assert [line.split()[0].strip(",:") for line in found.needs] == ["disk", "memory"]
    assert listing(workshop) == before
    merged = merge(recipe, "out", settings=Settings(say=lambda _: None))
    assert (merged.method, merged.base, merged.models) == (found.method, found.base, found.models)
    weights = (workshop / "out/model.safetensors").stat().st_size
    assert found.nbytes <= weights <= found.nbytes + 10_000
    assert found.read_bytes == 3 * found.nbytes
    assert len(check(recipe, "out").problems) == 1, "the output is not empty now"
    assert check(recipe).can_run


def test_all_problems_are_found_at_once(write_recipe, workshop):
    (workshop / "out").mkdir()
    (workshop / "out/precious.txt").write_text("mine")
    (workshop / "target2/model.safetensors").unlink()
    recipe = write_recipe(parameters={"wieght": 0.5}, models=[{"model": "./gone"}, {"model": "target2"}])
    before = listing(workshop)
    found = check(recipe, "out", MergeOptions(device="cuda:99"))
    for part in ("wieght", "./gone", "target2 has no weights", "precious.txt", "cuda:99"):
        assert len([line for line in found.problems if part in line]) == 1, (part, found.problems)
    assert listing(workshop) == before


def test_problems_of_tensors_and_of_the_machine(recipe, workshop, monkeypatch):
    edit_tensors(workshop / "target1", lambda tensors: tensors.pop(Q_PROJ))
    assert [Q_PROJ in line for line in check(recipe).problems] == [True]
    shutil.copytree(workshop / "target2", workshop / "target1", dirs_exist_ok=True)
    monkeypatch.setattr("fusekit.merging.estimate.free_bytes", lambda _: 100)
    assert ["100 bytes free" in line for line in check(recipe).problems] == [True]
    assert check(recipe, settings=Settings(ignore_estimates=True)).can_run


def test_the_command_exits_with_1_and_prints_json(recipe, workshop):
    good = run(recipe, "--check", "--json")
    assert good.exit_code == 0
    assert json.loads(good.stdout)["models"] == ["target1", "target2"]
    (workshop / "target1/model.safetensors").unlink()
    bad = run(recipe, "out", "--check")
    assert isinstance(bad.exception, SystemExit) or bad.exit_code == 1
    assert "target1 has no weights" in bad.stdout
    shutil.copytree(workshop / "target2", workshop / "target1", dirs_exist_ok=True)
    done = run(recipe, "out", "--json", "--quiet")
    assert done.exception is None, done.output
    facts = json.loads(done.stdout)
    assert (facts["base"], facts["tensors"], facts["path"]) == ("base", 21, str(workshop / "out"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([""], ["empty"]),
        (["a" * 300], ["300 bytes", "236"]),
        (["ä" * 150], ["300 bytes"]),
        (["out", "-j", "-1"], ["-1"]),
        (["out", "--out-shard-size", "-1"], ["'-1'"]),
        (["out", "--out-shard-size", "-3K"], ["-3000"]),
        (["out", "--out-shard-size", "big"], ["'big'"]),
        (["out", "--device", "foo"], ["'foo'"]),
        (["out", "--device", "cuda:99"], ["cuda:99"]),
        ([], ["OUT"]),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(recipe, workshop, arguments, parts):
    before = listing(workshop)
    failed = run(recipe, *arguments)
    message = str(failed.exception) + getattr(failed.exception, "message", "")
    assert all(part in message for part in parts), message
    assert listing(workshop) == before


def test_the_longest_name_that_is_let_through_can_be_written(recipe, workshop):
    merge(recipe, "a" * 236, settings=Settings(say=lambda _: None))
    with pytest.raises(MergeError, match="237"):
        merge(recipe, "a" * 237, settings=Settings(say=lambda _: None))
    assert (workshop / ("a" * 236) / "config.json").is_file()
