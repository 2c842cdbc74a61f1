"""fusekit's own methods through ``fusekit merge``: the weights of stock mergekit, and the coefficients beside them."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fusekit.errors import MergeError
from fusekit.merge_methods import sce
from fusekit.merging import Settings, merge
from fusekit.yaml import loads
from tests.merging.conftest import listing
from tests.merging.test_merge import stock

QUIET = Settings(say=lambda _: None)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("fusechat_sce", {"select_topk": 0.5}),
        ("fusechat_sce", {"select_topk": [0.2, 1.0], "variant": "fuseai"}),
        ("varm", {"granularity": "matrix"}),
        ("varm", {"granularity": "layer"}),
        ("varm", {"granularity": "model"}),
    ],
)
def test_weights_coefficients_and_card(write_recipe, workshop, method, parameters):
    recipe = write_recipe(merge_method=method, parameters=parameters)
    merge(recipe, "out", settings=QUIET)
    expected = stock(recipe, workshop / "stock")
    found = load_file(workshop / "out/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    record = json.loads((workshop / "out/coefficients.json").read_text())
    assert record["base"] == "base"
    assert set(record["tensors"]) == set(expected)
    for entry in record["tensors"].values():
        assert set(entry["coefficients"]) == {"target1", "target2"}, "models have the names of the recipe"
        assert sum(entry["coefficients"].values()) == pytest.approx(1)
    card = (workshop / "out/README.md").read_text()
    assert "### Merge coefficients" in card
    assert "| target1 |" in card
    assert str(workshop) not in card


def test_coefficients_are_those_of_the_function(write_recipe, workshop):
    merge(write_recipe(merge_method="fusechat_sce", parameters={"select_topk": 0.5}), "out", settings=QUIET)
    record = json.loads((workshop / "out/coefficients.json").read_text())["tensors"]
    base, *targets = (load_file(workshop / name / "model.safetensors") for name in ("base", "target1", "target2"))
    for name, tensor in base.items():
        expected = sce(tensor, [target[name] for target in targets], select_topk=0.5).coefficients
        found = record[name]["coefficients"]
        np.testing.assert_allclose([found["target1"], found["target2"]], expected, rtol=1e-12)


def test_models_keep_the_names_of_the_recipe_wherever_they_are(workshop, tmp_path):
    """Folders are given beside the recipe: nothing that is published names one, and no name is looked up."""
    text = yaml.safe_dump(
        {
            "merge_method": "fusechat_sce",
            "base_model": "org/pivot",
            "models": [{"model": "targets/one"}, {"model": "targets/one.and-two"}],
            "dtype": "float32",
        }
    )
    names = {"org/pivot": "base", "targets/one": "target1", "targets/one.and-two": "target2"}
    places = tmp_path / "a folder with spaces, and + and @"
    for folder in names.values():
        shutil.move(workshop / folder, places / folder)
    folders = {name: places / folder for name, folder in names.items()}
    settings = Settings(folders=folders, say=lambda _: None)
    merge(loads(text, "merge.yml"), workshop / "out", settings=settings)
    published = {path.name: path.read_text() for path in (workshop / "out").iterdir() if path.suffix != ".safetensors"}
    assert [name for name, content in published.items() if str(tmp_path) in content] == []
    assert published["mergekit_config.yml"] == text
    record = json.loads(published["coefficients.json"])
    assert record["base"] == "org/pivot"
    for entry in record["tensors"].values():
        assert set(entry["coefficients"]) == set(entry["erased"]) == {"targets/one", "targets/one.and-two"}
    card = published["README.md"]
    assert "using org/pivot as a base" in card
    assert "* targets/one.and-two\n" in card
    assert "huggingface.co" not in card
    moved = Settings(folders=folders | {"targets/one": places / "gone"}, say=lambda _: None)
    with pytest.raises(MergeError, match=r"targets/one .*gone"):
        merge(loads(text, "merge.yml"), workshop / "again", settings=moved)


def test_no_record_for_methods_of_mergekit(recipe, workshop):
    merge(recipe, "out", settings=QUIET)
    assert "coefficients.json" not in listing(workshop / "out")


def test_one_target_with_a_share_below_one_is_refused_before_anything_is_read(write_recipe, workshop):
    models = [{"model": "target1"}]
    recipe = write_recipe(merge_method="fusechat_sce", models=models, parameters={"select_topk": 0.5})
    lines = []
    with pytest.raises(MergeError, match="select_topk"):
        merge(recipe, "out", settings=Settings(say=lines.append))
    assert lines == []
    assert "out" not in listing(workshop)
