"""Mixtures of experts: checkpoints with one tensor per expert, as transformers saves them, and with all in one."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fusekit.merging import check, merge
from tests.helpers import edit_tensors, save_tiny_tokenizer
from tests.merging.conftest import QUIET, configured, refused, result, same_tensors, stock

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
def test_weights_are_those_of_stock_mergekit_and_load(shop, method):
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
