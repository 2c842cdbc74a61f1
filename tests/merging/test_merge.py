"""A merge that goes well: the weights of stock mergekit, and everything that belongs beside them."""

import json
import shutil
import socket

import pytest
import yaml
from mergekit.options import MergeOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusekit.errors import MergeError
from fusekit.merging import Settings, merge
from fusekit.yaml import loads
from tests.helpers import merge_recipe, refused, tensors_of, tiny_llama
from tests.merging.conftest import MERGE, OVERWRITE, QUIET, listing, merged_as_by_stock, traces
from tests.processes import fusekit


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"merge_method": "linear", "base_model": None, "dtype": "bfloat16"},
        {"dtype": "float32", "out_dtype": "float16"},
        {"tokenizer": {"source": "union"}},
        {"models": None, "slices": [{"sources": [{"model": m, "layer_range": [0, 1]} for m in ("base", "target1")]}]},
    ],
    ids=["base", "no base", "out_dtype", "tokenizer", "slices"],
)
def test_weights_are_those_of_stock_mergekit(write_recipe, workshop, changes):
    recipe = write_recipe(**changes)
    found = merged_as_by_stock(recipe)
    assert len(found) > 10
    assert "coefficients.json" not in listing(workshop / "out")
    assert AutoTokenizer.from_pretrained(workshop / "out")("a b").input_ids
    assert json.loads((workshop / "out/config.json").read_text())["dtype"] == str(next(iter(found.values())).dtype)[6:]
    assert traces(workshop) == []


def test_shards_card_and_recipe(recipe, workshop):
    lines = []
    merge(recipe, "nested/out", MergeOptions(out_shard_size=3000), Settings(say=lines.append))
    out = workshop / "nested/out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert AutoModelForCausalLM.from_pretrained(out)
    card = (out / "README.md").read_text()
    assert "# out\n" in card
    assert "using base as a base" in card
    assert card.index("* target1") < card.index("* target2")
    assert (out / "mergekit_config.yml").read_text() == recipe.read_text()
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1, "weights must be readable for whom the config is"
    assert any("to read" in line for line in lines)


def test_tied_and_untied_heads(workshop, write_recipe):
    for seed, name in enumerate(("tied1", "tied2")):
        tiny_llama(workshop / name, seed=seed, tie=True)
    recipe = write_recipe(merge_method="linear", base_model=None, models=[{"model": "tied1"}, {"model": "tied2"}])
    merge(recipe, "out", settings=QUIET)
    assert "lm_head.weight" not in tensors_of(workshop / "out")
    model = AutoModelForCausalLM.from_pretrained(workshop / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_without_base_the_first_model_gives_tokenizer_and_config(workshop, write_recipe):
    tiny_llama(workshop / "other", seed=9, max_position_embeddings=128)
    for first, expected in (("other", 128), ("target1", 64)):
        second = "target1" if first == "other" else "other"
        recipe = write_recipe(merge_method="linear", base_model=None, models=[{"model": first}, {"model": second}])
        merge(recipe, "out", settings=OVERWRITE)
        assert json.loads((workshop / "out/config.json").read_text())["max_position_embeddings"] == expected


def refuse_network():
    def refuse(*_arguments, **_options):
        raise AssertionError("network")

    socket.socket.connect = socket.getaddrinfo = refuse


def test_no_network_is_asked_for_local_models(recipe, workshop):
    """A relative path with one slash looks like a hub id to mergekit's card, which then asks the hub."""
    (workshop / "models").mkdir()
    (workshop / "base").rename(workshop / "models/base")
    recipe.write_text(recipe.read_text().replace("base_model: base", "base_model: models/base"))
    done = fusekit(workshop, *MERGE, before=refuse_network)
    assert done.exitcode == 0, done.output
    assert "models/base" in (workshop / "out/README.md").read_text()
    assert "\r" not in done.output, "not a terminal: no bar that is redrawn"
    assert "2 models merged on the base models/base with Task Arithmetic" in done.output


# ---------------------------------------------------------------- fusekit's own methods


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("fusechat_sce", {"select_topk": [0.2, 1.0], "variant": "fuseai"}),
        ("varm", {"granularity": "model"}),
    ],
)
def test_weights_coefficients_and_card(write_recipe, workshop, method, parameters):
    recipe = write_recipe(merge_method=method, parameters=parameters)
    expected = merged_as_by_stock(recipe)
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


def test_models_keep_the_names_of_the_recipe_wherever_they_are(workshop, tmp_path):
    """Folders are given beside the recipe: nothing that is published names one, and no name is looked up."""
    text = yaml.safe_dump(merge_recipe("org/pivot", ["targets/one", "targets/one.and-two"]))
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
    with refused(MergeError, "targets/one ", "gone"):
        merge(loads(text, "merge.yml"), workshop / "again", settings=moved)
