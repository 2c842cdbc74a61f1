"""Fault 12: pickled weights and remote code are refused unless allowed for that model."""

import json
from pathlib import Path

import pytest
import torch
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from fusekit.errors import MergeError, RecipeError
from fusekit.merging import Settings, merge
from tests.merging.conftest import listing

QUIET = Settings(say=lambda _: None)


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("hacked"),))


def test_pickled_weights_are_refused_and_allowed_by_name(recipe, workshop):
    merge(recipe, "expected", settings=QUIET)
    pickle_weights(workshop / "target1")
    with pytest.raises(MergeError, match=r"only pickled weights.*--allow-pickle 'target1'"):
        merge(recipe, "out", settings=QUIET)
    with pytest.raises(MergeError, match="--allow-pickle 'target1'"):
        merge(recipe, "out", settings=Settings(allow_pickle=frozenset({"target2"}), say=lambda _: None))
    merge(recipe, "out", settings=Settings(allow_pickle=frozenset({"target1"}), say=lambda _: None))
    expected = load_file(workshop / "expected/model.safetensors")
    found = load_file(workshop / "out/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_allowed_pickle_still_runs_no_code(recipe, workshop):
    pickle_weights(workshop / "target1")
    torch.save({"model.norm.weight": Exploit()}, workshop / "target1/pytorch_model.bin")
    with pytest.raises(MergeError, match=r"target1: .*pytorch_model.bin cannot be read as plain weights"):
        merge(recipe, "out", settings=Settings(allow_pickle=frozenset({"target1"}), say=lambda _: None))
    assert "hacked" not in listing(workshop)


def test_an_index_cannot_smuggle_a_pickle_in(recipe, workshop):
    torch.save({"model.norm.weight": Exploit()}, workshop / "target1/evil.bin")
    (workshop / "target1/model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "evil.bin"}}
    (workshop / "target1/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MergeError, match=r"its index names the pickle evil.bin"):
        merge(recipe, "out", settings=QUIET)
    assert "hacked" not in listing(workshop)


def with_code(folder: Path, model_type: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "configuration.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(folder.parent / 'code_ran')!r}).touch()\n"
        "from transformers import LlamaConfig\n"
        "class Config(LlamaConfig):\n"
        f"    model_type = {model_type!r}\n"
    )


def test_remote_code_is_refused_and_named(recipe, workshop):
    with_code(workshop / "target1", "unheard_of")
    with pytest.raises(MergeError, match=r"target1 wants to run Python code.*--allow-remote-code 'target1'"):
        merge(recipe, "out", settings=QUIET)
    assert "code_ran" not in listing(workshop)


def test_leave_for_one_model_is_no_leave_for_another(recipe, workshop):
    # transformers knows this type, so that without the switch the code would stay unused.
    with_code(workshop / "target1", "llama")
    merge(recipe, "harmless", settings=QUIET)
    assert "code_ran" not in listing(workshop)
    with pytest.raises(MergeError, match="target1 wants to run Python code"):
        merge(recipe, "out", settings=Settings(allow_remote_code=frozenset({"base"}), say=lambda _: None))
    assert "code_ran" not in listing(workshop)


@pytest.mark.parametrize("globally", [False, True])
def test_code_runs_once_it_is_allowed(recipe, workshop, globally):
    with_code(workshop / "target1", "llama")
    allowed = frozenset() if globally else frozenset({"target1"})
    merge(
        recipe,
        "out",
        MergeOptions(trust_remote_code=globally),
        Settings(allow_remote_code=allowed, say=lambda _: None),
    )
    assert "code_ran" in listing(workshop)


def test_leave_for_a_model_that_is_not_in_the_recipe_is_an_error(recipe):
    with pytest.raises(RecipeError, match=r"--allow-pickle taget1: .*did you mean 'target1'"):
        merge(recipe, "out", settings=Settings(allow_pickle=frozenset({"taget1"}), say=lambda _: None))


def test_pickled_results_are_refused(recipe, workshop):
    with pytest.raises(MergeError, match="safetensors only"):
        merge(recipe, "out", MergeOptions(safe_serialization=False), QUIET)
