"""Mixtures of experts, whose experts are one tensor each or one tensor for all of a layer."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fusekit.merging import check, merge
from tests.helpers import edit_tensors, same_tensors, save_tiny_tokenizer, tensors_of
from tests.merging.conftest import QUIET, configured, merge_refused, merged_as_by_stock

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
METHODS = {method: {"merge_method": method, "parameters": None} for method in ("fusechat_sce", "varm", "widen")}
METHODS["linear"] = {"merge_method": "linear", "base_model": None}


@pytest.fixture(scope="module", params=KINDS)
def models(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    kind, config = KINDS[request.param]
    for seed, name in enumerate(("base", "target1", "target2")):
        torch.manual_seed(seed)
        kind(config).save_pretrained(root / name)
        save_tiny_tokenizer(root / name)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_experts_are_those_of_stock_mergekit_and_load(write_recipe, method):
    recipe = write_recipe(**METHODS[method])
    found = check(recipe, "out")
    assert (found.problems, found.warnings) == ([], [])
    size = sum(tensor.numel() * tensor.element_size() for tensor in merged_as_by_stock(recipe).values())
    assert found.nbytes == size, "experts count in the estimates"
    assert found.read_bytes == (2 if method == "linear" else 3) * size


def test_fused_and_separate_experts_are_the_same_model(write_recipe, workshop):
    """A merge writes the experts of a layer as one tensor; such a model and one with a tensor per expert mix."""
    merge(write_recipe(**METHODS["linear"], models=[{"model": "target1"}]), "fused", settings=QUIET)
    assert load_file("fused/model.safetensors")[FUSED].shape[0] == 4
    assert FUSED not in load_file("target1/model.safetensors")
    for method in ("fusechat_sce", "varm"):
        merge(write_recipe(**METHODS[method]), f"separate-{method}", settings=QUIET)
        recipe = write_recipe(**METHODS[method], models=[{"model": "fused"}, {"model": "target2"}])
        merge(recipe, f"mixed-{method}", settings=QUIET)
        same_tensors(tensors_of(workshop / f"mixed-{method}"), tensors_of(workshop / f"separate-{method}"))


def test_an_expert_that_is_missing_or_broken_is_named(write_recipe, workshop):
    recipe = write_recipe(**METHODS["fusechat_sce"])
    one, two = workshop / "target1", workshop / "target2"
    name = next(name for name in tensors_of(one) if "experts.3." in name)
    edit_tensors(one, lambda tensors: tensors.pop(name))
    merge_refused(recipe, "experts.")
    shutil.copy(workshop / "base/model.safetensors", one)
    edit_tensors(two, lambda tensors: tensors[name][1].fill_(float("nan")))
    merge_refused(recipe, "target2", name, "nan at [1, 0]")
    edit_tensors(two, lambda tensors: tensors.update({name: torch.zeros(2, 2).to(torch.float8_e4m3fn)}))
    merge_refused(recipe, "target2", name, "float8")


def test_another_number_of_experts_per_token_is_refused(write_recipe, workshop):
    configured("target1", num_experts_per_tok=1)(workshop)
    merge_refused(write_recipe(**METHODS["fusechat_sce"]), "target1", "num_experts_per_tok 1", "base has 2")
