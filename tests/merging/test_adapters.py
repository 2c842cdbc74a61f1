"""LoRA adapters as inputs: added as weights are read, to the bit as peft does; others through mergekit's cache."""

import json

import pytest
import torch
from mergekit.options import MergeOptions
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fusekit.errors import MergeError
from fusekit.merging import check, merge
from fusekit.merging.lora import plain_adapter
from fusekit.merging.models import checkpoint_headers
from tests.helpers import tiny_llama
from tests.merging.conftest import listing, traces
from tests.merging.test_inputs import QUIET, refused
from tests.merging.test_merge import result, stock


def tune(model, folder, seed=0, dtype=None, **settings):
    """Write an adapter of a model with random factors, as peft saves it."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.to(dtype or parameter.dtype)
    tuned.save_pretrained(folder)
    return folder


PLAIN = [
    {},
    {"use_rslora": True},
    {"r": 8, "rank_pattern": {"q_proj": 2}},
    {"dtype": torch.bfloat16},
    {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
]


@pytest.mark.parametrize("settings", PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["task_arithmetic", "fusechat_sce"])
def test_weights_are_those_of_stock_mergekit_and_no_copy_is_written(write_recipe, workshop, method, dtype, settings):
    tiny_llama(workshop / "pivot", seed=3, dtype=dtype)
    for number in (1, 2):
        tune("pivot", workshop / f"adapter{number}", seed=number, **settings)
    recipe = write_recipe(
        merge_method=method,
        base_model="pivot",
        models=[{"model": "pivot+adapter1"}, {"model": "pivot+adapter2"}],
        parameters={"weight": 0.5},
        dtype=str(dtype).removeprefix("torch."),
    )
    before = listing(workshop)
    found = check(recipe)
    assert (found.problems, found.models) == ([], ["pivot+adapter1", "pivot+adapter2"])
    merge(recipe, "out", settings=QUIET)
    assert [name for name in listing(workshop) if name not in before] == ["out", ".out.fusekit.lock"][::-1]
    assert "pivot + adapter1" in (workshop / "out/README.md").read_text()
    expected, merged = (
        stock(recipe, workshop / "stock", lora_merge_cache=str(workshop / "cache")),
        result(workshop / "out"),
    )
    assert expected.keys() == merged.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name
    changed = merged["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(
        changed, load_file(workshop / "pivot/model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    )
    assert traces(workshop) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_what_is_more_than_a_product_goes_through_mergekits_cache(write_recipe, workshop, settings):
    tune("base", workshop / "adapter", **settings)
    assert (
        plain_adapter(workshop / "adapter", checkpoint_headers("model.safetensors", workshop / "base", "base")) is None
    )
    recipe = write_recipe(models=[{"model": "base+adapter"}, {"model": "target1"}])
    refused(recipe, "base+adapter", "--lora-merge-cache")
    if not settings.get("lora_bias"):  # the linear maps of a Llama have none to merge it into
        merge(recipe, "out", MergeOptions(lora_merge_cache="cache"), QUIET)
        expected = stock(recipe, workshop / "stock", lora_merge_cache=str(workshop / "cache2"))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in result(workshop / "out").items())


def test_a_dtype_for_the_merge_of_adapters_needs_the_cache(write_recipe, workshop):
    tune("base", workshop / "adapter")
    recipe = write_recipe(models=[{"model": "base+adapter"}])
    assert check(recipe).can_run
    assert "--lora-merge-cache" in check(recipe, options=MergeOptions(lora_merge_dtype="bfloat16")).problems[0]


def test_an_adapter_of_another_model_is_not_added(write_recipe, workshop):
    tiny_llama(workshop / "wide", seed=5, intermediate_size=32)
    tune("wide", workshop / "adapter")
    refused(write_recipe(models=[{"model": "base+adapter"}]), "base+adapter", "--lora-merge-cache")


@pytest.mark.parametrize("content", ["{", "[]", '{"peft_type": "IA3"}', '{"peft_type": "LORA"}'])
def test_an_adapter_whose_config_says_nothing_is_left_to_peft(workshop, content):
    folder = tune("base", workshop / "adapter")
    headers = checkpoint_headers("model.safetensors", workshop / "base", "base")
    assert plain_adapter(folder, headers) is not None
    (folder / "adapter_config.json").write_text(content)
    assert plain_adapter(folder, headers) is None


def test_a_damaged_adapter_is_named(write_recipe, workshop):
    file = tune("base", workshop / "adapter") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    refused(write_recipe(models=[{"model": "base+adapter"}]), "adapter_model.safetensors", "interrupted")


def test_factors_that_are_not_finite_are_named_with_the_model(write_recipe, workshop):
    file = tune("base", workshop / "adapter") / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + length])
    raw[8 + length : 12 + length] = torch.tensor(float("nan")).numpy().tobytes()
    file.write_bytes(raw)
    refused(write_recipe(models=[{"model": "base+adapter"}]), "base+adapter", "nan", kind=MergeError)
