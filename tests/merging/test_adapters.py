"""LoRA adapters, which are added as weights are read, to the bit as peft does."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fusekit.merging import check
from tests.helpers import tensors_of, tiny_llama
from tests.merging.conftest import Q_PROJ, listing, merge_refused, merged_as_by_stock


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


BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("settings", "dtype", "method"),
    [
        ({}, F32, "task_arithmetic"),
        ({}, BF16, "fusechat_sce"),
        ({"use_rslora": True}, F32, "fusechat_sce"),
        ({"r": 8, "rank_pattern": {"q_proj": 2}}, F32, "task_arithmetic"),
        ({"dtype": torch.bfloat16}, BF16, "fusechat_sce"),
        ({"target_modules": "all-linear", "init_lora_weights": "gaussian"}, BF16, "task_arithmetic"),
    ],
    ids=str,
)
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
    merged = merged_as_by_stock(recipe, lora_merge_cache=str(workshop / "cache"))
    assert [name for name in listing(workshop) if name not in before] == [".out.fusekit.lock", "cache", "out", "stock"]
    assert "pivot + adapter1" in (workshop / "out/README.md").read_text()
    assert not torch.equal(merged[Q_PROJ], tensors_of(workshop / "pivot")[Q_PROJ])


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_what_is_more_than_a_product_is_refused(write_recipe, workshop, settings):
    tune("base", workshop / "adapter", **settings)
    merge_refused(write_recipe(models=[{"model": "base+adapter"}, {"model": "target1"}]), "base+adapter", "peft")


def test_an_adapter_of_another_model_is_not_added(write_recipe, workshop):
    tiny_llama(workshop / "wide", seed=5, intermediate_size=32)
    tune("wide", workshop / "adapter")
    merge_refused(write_recipe(models=[{"model": "base+adapter"}]), "base+adapter", "peft")


def test_a_damaged_adapter_is_named(write_recipe, workshop):
    file = tune("base", workshop / "adapter") / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    recipe = write_recipe(models=[{"model": "base+adapter"}])
    merge_refused(recipe, "adapter_model.safetensors", "interrupted")
    start = 8 + int.from_bytes(whole[:8], "little")
    nan = torch.tensor(float("nan")).numpy().tobytes()
    file.write_bytes(whole[:start] + nan + whole[start + 4 :])
    merge_refused(recipe, "base+adapter", "nan")
