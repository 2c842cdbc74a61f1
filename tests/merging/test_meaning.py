"""Faults 27 to 29: inputs that are codes, or mean something else than their base's, and results that would not load."""

import json

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from fusekit import mergekit_private
from fusekit.errors import MergeError
from fusekit.merging import Settings, check, merge
from tests.helpers import edit_tensors, tiny_llama
from tests.merging.test_inputs import Q_PROJ, QUIET, refused


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# ---------------------------------------------------------------- codes in place of weights


def as_fp8(tensors):
    tensors[Q_PROJ] = (tensors[Q_PROJ] * 1000).to(torch.float8_e4m3fn)


def as_fp8_with_scales(tensors):
    as_fp8(tensors)
    tensors[f"{Q_PROJ}_scale_inv"] = torch.full((1, 1), 1e-3)


def as_int8(tensors):
    tensors[Q_PROJ] = (tensors[Q_PROJ] * 100).round().to(torch.int8)


def as_llm_int8(tensors):
    as_int8(tensors)
    tensors[Q_PROJ.replace("weight", "SCB")] = torch.ones(16)


def as_bnb(tensors):
    tensors[Q_PROJ] = torch.zeros(128, 1, dtype=torch.uint8)
    tensors |= {f"{Q_PROJ}.absmax": torch.ones(4), f"{Q_PROJ}.quant_map": torch.ones(16)}


def as_gptq(tensors):
    del tensors[Q_PROJ]
    tensors[Q_PROJ.replace("weight", "qweight")] = torch.zeros(2, 16, dtype=torch.int32)


CODES = (as_fp8, as_fp8_with_scales, as_int8, as_llm_int8, as_bnb, as_gptq)


@pytest.mark.parametrize("quantise", CODES)
@pytest.mark.parametrize("who", ["base", "target1"])
def test_codes_are_not_merged_as_weights(recipe, workshop, who, quantise):
    edit_tensors(workshop / who, quantise)
    refused(recipe, who, Q_PROJ.removesuffix("weight"), "quantised")


@pytest.mark.parametrize("who", ["base", "target2"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantization_config_is_not_passed_on(recipe, workshop, who, nested):
    entry = {"quantization_config": {"quant_method": "fp8"}}
    configure(workshop / who, **({"text_config": entry} if nested else entry))
    refused(recipe, who, "quantization_config", "fp8")


def test_masks_of_bytes_are_no_codes(recipe, workshop):
    masks = {"model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
    edit_tensors(workshop / "target1", lambda tensors: tensors.update(masks))
    assert check(recipe).can_run


@pytest.mark.parametrize("method", ["fusechat_sce", "varm", "widen"])
def test_stock_mergekit_does_not_give_codes_to_our_methods(write_recipe, workshop, method):
    """Cast to float32 they look like weights; the file tells by the scales beside them."""
    edit_tensors(workshop / "target1", as_fp8_with_scales)
    recipe = {"merge_method": method, "base_model": "base", "models": [{"model": "target1"}, {"model": "target2"}]}
    config = MergeConfiguration.model_validate(recipe | {"dtype": "float32"})
    mergekit_private.loaders().clear()  # of models that had these relative names before
    with pytest.raises(MergeError) as error:
        run_merge(config, str(workshop / "out"), MergeOptions(quiet=True))
    assert all(part in str(error.value) for part in ("target1", f"{Q_PROJ}_scale_inv", "quantised"))


# ---------------------------------------------------------------- weights that mean something else


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, ["rope_theta", "1000000.0", "10000.0"]),
        ({"rope_parameters": None, "rope_theta": 1e6}, ["rope_theta", "1000000.0", "10000.0"]),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
            ["factor 4.0", "None", "linear", "default"],
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, ["factor 4.0", "linear"]),
        ({"rms_norm_eps": 1e-3}, ["rms_norm_eps", "0.001", "1e-06"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "30.0", "None"]),
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "50.0", "None"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    ],
)
def test_weights_that_are_read_differently_are_refused_with_both_values(recipe, workshop, changes, parts):
    configure(workshop / "target1", **changes)
    refused(recipe, "target1", "base", "--allow-crimes", *parts)
    lines = []
    merge(recipe, "out", MergeOptions(allow_crimes=True), Settings(say=lines.append))
    assert any(line.startswith("warning") and parts[0] in line for line in lines), lines


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"rms_norm_eps": 1e-5}, ["rms_norm_eps", "1e-05", "1e-06"]),
        ({"sliding_window": 32}, ["sliding_window", "32", "None"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", "true", "false"]),
    ],
)
def test_small_differences_are_warnings_with_both_values(recipe, workshop, changes, parts):
    configure(workshop / "target1", **changes)
    found = check(recipe)
    assert found.can_run
    assert [all(part in line for part in [*parts, "target1", "base"]) for line in found.warnings] == [True]


@pytest.mark.parametrize(
    ("mine", "its"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"rope_type": "linear", "type": "linear", "factor": 4.0}),
    ],
)
def test_rope_scaling_by_its_former_name_is_the_same(recipe, workshop, mine, its):
    for who, scaling in (("base", mine), ("target1", its), ("target2", mine)):
        configure(workshop / who, rope_parameters=None, rope_scaling=scaling)
    assert check(recipe).problems == []


def test_an_activation_that_a_class_does_not_read_is_no_difference(recipe, workshop):
    """The first Gemma was published without hidden_activation, later with it."""
    configure(workshop / "base", hidden_activation="gelu_pytorch_tanh")
    assert check(recipe).problems == []
    configure(workshop / "target1", hidden_activation="gelu")
    refused(recipe, "hidden_activation gelu,", "gelu_pytorch_tanh")


def test_what_means_the_same_is_no_difference(recipe, workshop):
    """Another spelling of the default, and fields that do not change how weights are read."""
    configure(
        workshop / "target1", rope_parameters=None, rope_theta=10000, max_position_embeddings=4096, eos_token_id=5
    )
    found = check(recipe)
    assert (found.problems, found.warnings) == ([], [])


def test_a_width_of_heads_may_be_given_or_left_to_the_default(recipe, workshop):
    for who in ("base", "target1", "target2"):
        written = {"head_dim": 4 if who == "target1" else None}
        configure(workshop / who, model_type="granite", architectures=["GraniteForCausalLM"], **written)
    assert check(recipe).can_run


@pytest.mark.parametrize("who", ["base", "target1"])
def test_another_depth_names_both_models_and_their_layers(recipe, workshop, who):
    tiny_llama(workshop / who, seed=0, num_hidden_layers=3)
    message = refused(recipe, "target1 has", "base has", "3 layers" if who == "target1" else "2 layers")
    assert ("base has 3" in message) == (who == "base")


def test_an_adapter_alone_is_told_from_a_model(write_recipe, workshop):
    folder = workshop / "tuned"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/pivot", "peft_type": "LORA"}')
    save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
    refused(write_recipe(models=[{"model": "tuned"}]), "tuned is an adapter", "org/pivot+tuned")


@pytest.mark.parametrize("name", ["https://huggingface.co/org/name", "https://huggingface.co/org/name/tree/main"])
def test_the_page_of_a_model_is_not_its_id(write_recipe, name):
    refused(write_recipe(base_model=name), "such as org/name")


@pytest.mark.parametrize("method", ["fusechat_sce", "varm", "task_arithmetic"])
def test_finite_weights_that_overflow_float16_are_not_called_damaged(write_recipe, workshop, method):
    edit_tensors(workshop / "target1", lambda tensors: tensors[Q_PROJ].fill_(1e6))
    parameters = {"weight": 0.5} if method == "task_arithmetic" else {}
    message = refused(write_recipe(merge_method=method, parameters=parameters, dtype="float16"), Q_PROJ, "float16")
    assert "damaged" not in message
    assert "dtype: " in message


# ---------------------------------------------------------------- results that would not load


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0", "model": {"type": "BPE"}}', ""])
def test_a_tokenizer_that_does_not_load_is_found_before_anything_is_read(recipe, workshop, content):
    (workshop / "base/tokenizer.json").write_text(content)
    lines = []
    refused(recipe, "base", "tokenizer.json", settings=Settings(say=lines.append))
    assert lines == []
    assert check(recipe, options=MergeOptions(copy_tokenizer=False)).can_run


def test_a_tokenizer_of_any_model_counts_where_one_is_built(write_recipe, workshop):
    (workshop / "target2/tokenizer.json").write_text("{}")
    assert check(write_recipe()).can_run
    refused(write_recipe(tokenizer={"source": "union"}), "target2", "tokenizer.json")


def test_tokens_beyond_the_embedding_are_told(recipe, workshop):
    tokenizer = AutoTokenizer.from_pretrained(workshop / "base")
    tokenizer.add_tokens([f"<extra{number}>" for number in range(60)])
    tokenizer.save_pretrained(workshop / "base")
    assert [f"{len(tokenizer) - 1}" in line and "64 rows" in line for line in check(recipe).warnings] == [True]


def test_a_model_without_a_tokenizer_is_merged_and_that_is_said(recipe, workshop, caplog):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (workshop / "base" / name).unlink()
    lines = []
    merge(recipe, "out", settings=Settings(say=lines.append))
    assert any("warning" in line and "base has no tokenizer" in line for line in lines)
    assert "Failed to copy tokenizer" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"vocab_size": 900}, ["embed_tokens.weight", "[64, 16]", "[900, 16]"]),
        ({"intermediate_size": 48}, ["mlp.", "24", "48"]),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_found_before_anything_is_read(recipe, workshop, changes, parts):
    configure(workshop / "base", **changes)
    lines = []
    refused(recipe, "base", "config.json", *parts, settings=Settings(say=lines.append))
    assert lines == []


@pytest.mark.parametrize("changes", [{}, {"chat_template": "chatml"}, {"tokenizer": {"source": "union"}}])
@pytest.mark.parametrize("copy_tokenizer", [True, False])
def test_the_generation_config_is_the_bases(write_recipe, workshop, changes, copy_tokenizer):
    for name, ends in (("base", [2, 5]), ("target1", [7])):
        GenerationConfig(eos_token_id=ends).save_pretrained(workshop / name)
    merge(write_recipe(**changes), "out", MergeOptions(copy_tokenizer=copy_tokenizer), QUIET)
    assert GenerationConfig.from_pretrained(workshop / "out").eos_token_id == [2, 5]


def test_the_generation_config_goes_with_the_tokens(write_recipe, workshop):
    GenerationConfig(eos_token_id=[7]).save_pretrained(workshop / "target1")
    merge(write_recipe(tokenizer={"source": "target1"}), "out", settings=QUIET)
    assert GenerationConfig.from_pretrained(workshop / "out").eos_token_id == [7]


def test_a_generation_config_that_does_not_load_is_found_before_anything_is_read(recipe, workshop):
    (workshop / "base/generation_config.json").write_text("{")
    assert ["generation_config.json" in line for line in check(recipe).problems] == [True]
