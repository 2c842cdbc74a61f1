"""A merge that goes well: the same weights as stock mergekit, and everything that belongs beside them."""

import json
import socket

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusekit import mergekit_private
from fusekit.merging import Settings, merge
from tests.helpers import tiny_llama
from tests.merging.conftest import MERGE, traces
from tests.processes import fusekit


def stock(recipe, out, **options):
    mergekit_private.loaders().clear()  # of models that had these relative names before
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text())),
        str(out),
        MergeOptions(quiet=True, write_model_card=False, **options),
    )
    return {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()}


def result(out):
    return {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()}


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
    merged = merge(recipe, "out", settings=Settings(say=lambda _: None))
    expected = stock(recipe, workshop / "stock")
    found = result(workshop / "out")
    assert merged.tensors == len(found) == len(expected) > 10
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    _, info = AutoModelForCausalLM.from_pretrained(workshop / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
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
    for name in ("tied1", "tied2"):
        tiny_llama(workshop / name, seed=hash(name) % 100, tie=True)
    recipe = write_recipe(merge_method="linear", base_model=None, models=[{"model": "tied1"}, {"model": "tied2"}])
    merge(recipe, "out", settings=Settings(say=lambda _: None))
    assert "lm_head.weight" not in result(workshop / "out")
    model = AutoModelForCausalLM.from_pretrained(workshop / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_without_base_the_first_model_gives_tokenizer_and_config(workshop, write_recipe):
    tiny_llama(workshop / "other", seed=9, max_position_embeddings=128)
    for first, expected in (("other", 128), ("target1", 64)):
        second = "target1" if first == "other" else "other"
        recipe = write_recipe(merge_method="linear", base_model=None, models=[{"model": first}, {"model": second}])
        merge(recipe, "out", settings=Settings(overwrite=True, say=lambda _: None))
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
    assert "2 models merged into models/base with Task Arithmetic" in done.output
