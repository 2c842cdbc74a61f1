"""Outputs that are in the way, inputs that may do harm (pickles, code of their own), and who may not be overwritten."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from fusekit.errors import MergeError, RecipeError
from fusekit.merging import Settings, merge
from tests.helpers import edit_tensors, refused, same_tensors, tensors_of
from tests.merging.conftest import OVERWRITE, QUIET, configured, listing, merge_refused, traces


def content(folder: Path) -> dict[str, tuple[bytes, float]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_non_empty_output_is_refused_and_nothing_is_touched(recipe, workshop):
    (workshop / "out").mkdir()
    (workshop / "out/precious.txt").write_text("mine")
    before = content(workshop)
    with pytest.raises(MergeError, match=r"out is not empty \(precious.txt\).*--overwrite"):
        merge(recipe, "out", settings=QUIET)
    with pytest.raises(MergeError, match="does not look like a model"):
        merge(recipe, "out", settings=OVERWRITE)
    assert content(workshop) == before


def test_an_empty_folder_is_fine_and_overwrite_replaces_a_model_entirely(write_recipe, workshop):
    (workshop / "out").mkdir()
    merge(write_recipe(), "out", settings=QUIET)
    first = (workshop / "out/model.safetensors").read_bytes()
    (workshop / "out/model.safetensors.index.json").write_text('{"weight_map": {}}')
    merge(write_recipe(parameters={"weight": 0.9}), "out", settings=OVERWRITE)
    assert (workshop / "out/model.safetensors").read_bytes() != first
    assert not (workshop / "out/model.safetensors.index.json").exists(), "a stale index survived"
    assert traces(workshop) == []


def test_a_failed_overwrite_leaves_the_old_model(recipe, workshop):
    merge(recipe, "out", settings=QUIET)
    before = content(workshop / "out")
    os.truncate(workshop / "target1/model.safetensors", 3000)
    with pytest.raises(MergeError, match="target1"):
        merge(recipe, "out", settings=OVERWRITE)
    assert content(workshop / "out") == before


@pytest.mark.parametrize("out", ["./target1", "link", "holder", "target1/merged"])
def test_an_output_that_is_holds_or_lies_in_an_input_is_refused(write_recipe, workshop, out):
    (workshop / "link").symlink_to("base")
    shutil.copytree(workshop / "base", workshop / "holder")
    shutil.move(workshop / "target2", workshop / "holder/target2")
    recipe = write_recipe(models=[{"model": "target1"}, {"model": "holder/target2"}])
    before = content(workshop)
    with pytest.raises(MergeError, match="is, holds or lies in the input model"):
        merge(recipe, out, settings=OVERWRITE)
    after = content(workshop)
    assert {name: after[name] for name in before} == before


def test_a_file_and_a_mount_point_are_refused(recipe, workshop):
    (workshop / "file").write_text("")
    with pytest.raises(MergeError, match="is a file"):
        merge(recipe, "file", settings=QUIET)
    with pytest.raises(MergeError, match="mount point"):
        merge(recipe, "/proc", settings=OVERWRITE)


def test_a_symlinked_output_keeps_its_link(recipe, workshop):
    (workshop / "disk").mkdir()
    (workshop / "out").symlink_to("disk/model")
    merge(recipe, "out", settings=QUIET)
    assert (workshop / "out").is_symlink()
    assert (workshop / "disk/model/config.json").is_file()


# ---------------------------------------------------------------- pickles and code


def allowing(option: str, name: str) -> Settings:
    return Settings(say=lambda _: None, **{option: frozenset({name})})


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("hacked"),))


def test_pickled_weights_are_refused_and_allowed_by_name(recipe, workshop):
    merge(recipe, "expected", settings=QUIET)
    pickle_weights(workshop / "target1")
    merge_refused(recipe, "its weights are pickled", "--allow-pickle 'target1'")
    merge_refused(recipe, "--allow-pickle 'target1'", settings=allowing("allow_pickle", "target2"))
    merge(recipe, "out", settings=allowing("allow_pickle", "target1"))
    same_tensors(tensors_of(workshop / "out"), tensors_of(workshop / "expected"))
    torch.save({"model.norm.weight": Exploit()}, workshop / "target1/pytorch_model.bin")
    with pytest.raises(MergeError, match=r"target1: .*pytorch_model.bin cannot be read as plain weights"):
        merge(recipe, "again", settings=allowing("allow_pickle", "target1"))
    assert "hacked" not in listing(workshop)


def test_an_index_cannot_smuggle_a_pickle_in(recipe, workshop):
    torch.save({"model.norm.weight": Exploit()}, workshop / "target1/evil.bin")
    (workshop / "target1/model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "evil.bin"}}
    (workshop / "target1/model.safetensors.index.json").write_text(json.dumps(index))
    merge_refused(recipe, "target1: its weights are pickled", "evil.bin")


def with_code(folder: Path, model_type: str) -> None:
    configured(folder.name, model_type=model_type, auto_map={"AutoConfig": "configuration.Config"})(folder.parent)
    (folder / "configuration.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(folder.parent / 'code_ran')!r}).touch()\n"
        "from transformers import LlamaConfig\n"
        "class Config(LlamaConfig):\n"
        f"    model_type = {model_type!r}\n"
    )


def test_remote_code_is_refused_and_named(recipe, workshop):
    with_code(workshop / "target1", "unheard_of")
    merge_refused(recipe, "target1 wants to run Python code", "--allow-remote-code 'target1'")
    configured("target1", model_type=None)(workshop)
    (workshop / "target1/tokenizer_config.json").write_text('{"model_type": "llama"}')
    merge_refused(recipe, "target1 wants to run Python code")


def test_leave_for_one_model_is_no_leave_for_another(recipe, workshop):
    # transformers knows this type, so that without the switch the code would stay unused.
    with_code(workshop / "target1", "llama")
    merge(recipe, "harmless", settings=QUIET)
    merge_refused(recipe, "target1 wants to run Python code", settings=allowing("allow_remote_code", "base"))
    assert "code_ran" not in listing(workshop)


@pytest.mark.parametrize("globally", [False, True])
def test_code_runs_once_it_is_allowed(recipe, workshop, globally):
    with_code(workshop / "target1", "llama")
    settings = QUIET if globally else allowing("allow_remote_code", "target1")
    merge(recipe, "out", MergeOptions(trust_remote_code=globally), settings)
    assert "code_ran" in listing(workshop)


def test_leave_for_a_model_that_is_not_in_the_recipe_is_an_error(recipe):
    settings = allowing("allow_pickle", "taget1")
    merge_refused(recipe, "--allow-pickle taget1: ", "did you mean 'target1'", kind=RecipeError, settings=settings)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda out: edit_tensors(out, lambda t: t.pop(NORM)), [NORM, "lacks"]),
        (lambda out: edit_tensors(out, lambda t: t.update({NORM: t[NORM][:8]})), [NORM, "[8]", "[16]"]),
        (lambda out: edit_tensors(out, lambda t: t.update({NORM: t[NORM].half()})), [NORM, "float16", "float32"]),
        (lambda out: edit_tensors(out, lambda t: t.update(more=t[NORM].clone())), ["more", "plan"]),
        (lambda out: edit_tensors(out, lambda t: t[NORM].fill_(float("nan"))), [NORM, "nan at [0]"]),
        (lambda out: (out / "model.safetensors").unlink(), ["no weights"]),
        (lambda out: (out / "config.json").write_text("{"), ["config.json"]),
        (lambda out: (out / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
        (lambda out: [path.unlink() for path in out.glob("tokenizer*")], ["no tokenizer"]),
    ],
)
def test_a_result_that_is_not_as_planned_is_not_published(recipe, workshop, monkeypatch, damage, named):
    def merged_otherwise(config: Any, out_path: str, *args: Any, **options: Any) -> None:
        run_merge(config, out_path, *args, **options)
        damage(Path(out_path))

    monkeypatch.setattr("fusekit.merging.run.run_merge", merged_otherwise)
    with refused(MergeError, *named):
        merge(recipe, "out", settings=QUIET)
    assert not (workshop / "out").exists()
    assert traces(workshop) == []
