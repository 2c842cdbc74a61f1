"""LoRA adapters, added as weights are read to the bit as peft does, and mixtures of experts, in parts or in one."""

import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fusekit.merging import check, merge
from tests.helpers import edit_tensors, save_tiny_tokenizer, tiny_llama
from tests.merging.conftest import Q_PROJ, QUIET, configured, listing, refused, result, same_tensors, stock

# ---------------------------------------------------------------- adapters


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
    merge(recipe, "out", settings=QUIET)
    assert [name for name in listing(workshop) if name not in before] == [".out.fusekit.lock", "out"]
    assert "pivot + adapter1" in (workshop / "out/README.md").read_text()
    merged = result(workshop / "out")
    same_tensors(merged, stock(recipe, workshop / "stock", lora_merge_cache=str(workshop / "cache")))
    assert not torch.equal(merged[Q_PROJ], result(workshop / "pivot")[Q_PROJ])


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
    refused(write_recipe(models=[{"model": "base+adapter"}, {"model": "target1"}]), "base+adapter", "peft")


def test_an_adapter_of_another_model_is_not_added(write_recipe, workshop):
    tiny_llama(workshop / "wide", seed=5, intermediate_size=32)
    tune("wide", workshop / "adapter")
    refused(write_recipe(models=[{"model": "base+adapter"}]), "base+adapter", "peft")


def test_a_damaged_adapter_is_named(write_recipe, workshop):
    file = tune("base", workshop / "adapter") / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    recipe = write_recipe(models=[{"model": "base+adapter"}])
    refused(recipe, "adapter_model.safetensors", "interrupted")
    start = 8 + int.from_bytes(whole[:8], "little")
    nan = torch.tensor(float("nan")).numpy().tobytes()
    file.write_bytes(whole[:start] + nan + whole[start + 4 :])
    refused(recipe, "base+adapter", "nan")


# ---------------------------------------------------------------- experts

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
KINDS = {
    "qwen3": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4)),
}
FUSED = "model.layers.0.mlp.experts.down_proj"
METHODS = ["fusechat_sce", "varm", "widen", "linear"]


@pytest.fixture(scope="module", params=KINDS)
def models(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    kind, config = KINDS[request.param]
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        kind(config).save_pretrained(root / name)
        save_tiny_tokenizer(root / name)
    return root


@pytest.fixture
def shop(models, tmp_path, monkeypatch):
    folder = tmp_path / "shop"
    shutil.copytree(models, folder)
    monkeypatch.chdir(folder)
    return folder


def write(folder, method="fusechat_sce", **changes):
    recipe = {"merge_method": method, "base_model": "base", "models": [{"model": "one"}, {"model": "two"}]}
    recipe |= {"parameters": {"weight": 0.5} if method == "linear" else {}, "dtype": "float32"}
    if method == "linear":
        del recipe["base_model"]
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def an_expert(folder):
    """The name of one tensor of one expert."""
    return next(name for name in load_file(folder / "model.safetensors") if "experts.3." in name)


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_experts_are_those_of_stock_mergekit_and_load(shop, method):
    recipe = write(shop, method)
    found = check(recipe, "out")
    assert (found.problems, found.warnings) == ([], [])
    merge(recipe, "out", settings=QUIET)
    merged = result(shop / "out")
    same_tensors(merged, stock(recipe, shop / "stock"))
    size = sum(tensor.numel() * tensor.element_size() for tensor in merged.values())
    assert found.nbytes == size, "experts count in the estimates"
    assert found.read_bytes == (3 if "base_model" in yaml.safe_load(recipe.read_text()) else 2) * size
    _, info = AutoModelForCausalLM.from_pretrained(shop / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_fused_and_separate_experts_are_the_same_model(shop):
    """A merge writes the experts of a layer as one tensor; such a model and one with a tensor per expert mix."""
    merge(write(shop, "linear", models=[{"model": "one"}]), "fused", settings=QUIET)
    assert load_file("fused/model.safetensors")[FUSED].shape[0] == 4
    assert FUSED not in load_file("one/model.safetensors")
    for method in ("fusechat_sce", "varm"):
        merge(write(shop, method), f"separate-{method}", settings=QUIET)
        recipe = write(shop, method, models=[{"model": "fused"}, {"model": "two"}])
        merge(recipe, f"mixed-{method}", settings=QUIET)
        same_tensors(result(shop / f"mixed-{method}"), result(shop / f"separate-{method}"))


def test_an_expert_that_is_missing_or_broken_is_named(shop):
    name = an_expert(shop / "one")
    edit_tensors(shop / "one", lambda tensors: tensors.pop(name))
    refused(write(shop), "experts.")
    shutil.copy(shop / "base/model.safetensors", shop / "one")
    edit_tensors(shop / "two", lambda tensors: tensors[name][1].fill_(float("nan")))
    refused(write(shop), "two", name, "nan at [1, 0]")
    edit_tensors(shop / "two", lambda tensors: tensors.update({name: torch.zeros(2, 2).to(torch.float8_e4m3fn)}))
    refused(write(shop), "two", name, "float8")


def test_another_number_of_experts_per_token_is_refused(shop):
    configured("one", num_experts_per_tok=1)(shop)
    refused(write(shop), "one", "num_experts_per_tok 1", "base has 2")
