"""Fault 23: broken inputs are named, tensor and model, and nothing is published."""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusekit.errors import FusekitError, MergeError
from fusekit.merging import Settings, check, merge
from fusekit.merging.loading import first_not_finite
from tests.helpers import edit_tensors, tiny_llama
from tests.merging.conftest import listing, traces

QUIET = Settings(say=lambda _: None)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def refused(recipe, *parts, kind=MergeError, settings=QUIET, options=None):
    before = [name for name in listing(recipe.parent) if not name.endswith(".lock")]
    with pytest.raises(kind) as caught:
        merge(recipe, "out", options, settings)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert [name for name in listing(recipe.parent) if not name.endswith(".lock")] == before
    assert traces(recipe.parent) == []
    return message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_in_an_input_is_named(recipe, workshop, value, dtype):
    def poison(tensors):
        tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)
        tensors[Q_PROJ][3, 5] = value

    edit_tensors(workshop / "target2", poison)
    refused(recipe, "target2", Q_PROJ, str(value), "[3, 5]", "model.safetensors")


def test_nan_in_the_base_is_named(recipe, workshop):
    edit_tensors(workshop / "base", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    refused(recipe, "base", "model.norm.weight", "nan at [0]")


def test_nan_that_a_merge_produces_is_named(write_recipe, workshop):
    # Finite in float16, but their sum is not.
    edit_tensors(workshop / "target1", lambda tensors: tensors[Q_PROJ].fill_(60000.0))
    edit_tensors(workshop / "target2", lambda tensors: tensors[Q_PROJ].fill_(60000.0))
    recipe = write_recipe(dtype="float16", parameters={"weight": 1.0})
    refused(recipe, "the result", Q_PROJ, "inf", "dtype: float32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_first_not_finite_agrees_with_the_obvious(dtype):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.full((7, 11, 3), 400.0).to(dtype)  # sums to infinity in float16
    assert first_not_finite(tensor) is None
    assert first_not_finite(torch.zeros(0, 3, dtype=dtype)) is None
    values = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), -float("nan"), math.inf, -math.inf]
    for sign in (1, -1):
        for value in values * 4:
            place = tuple(int(torch.randint(size, (1,), generator=generator)) for size in tensor.shape)
            broken = sign * tensor.float()
            broken[place] = value
            for each in (broken.to(dtype), broken.to(dtype).transpose(0, 1)):
                found = first_not_finite(each)
                assert found is not None
                assert found[0] == list(place if each.shape == tensor.shape else (place[1], place[0], place[2]))
                assert str(found[1]) == str(float(each[tuple(found[0])]))
    if dtype != torch.float8_e4m3fn:
        limits = torch.finfo(dtype)
        for value in (limits.max, limits.min, limits.tiny, -0.0):
            assert first_not_finite(torch.full((5,), value, dtype=dtype)) is None


def test_values_whose_sum_overflows_are_accepted():
    assert first_not_finite(torch.full((4,), 3e38)) is None
    assert first_not_finite(torch.full((4,), 1e308, dtype=torch.float64)) is None


def test_missing_tensor_is_named(recipe, workshop):
    edit_tensors(workshop / "target1", lambda tensors: tensors.pop(Q_PROJ))
    refused(recipe, "target1", Q_PROJ, "lacks the tensor", "line 4")


def test_wrong_shape_is_named_with_both_shapes(recipe, workshop):
    edit_tensors(workshop / "target2", lambda tensors: tensors.update({Q_PROJ: torch.zeros(16, 20)}))
    refused(recipe, "target2", "base", Q_PROJ, "[16, 16]", "[16, 20]", "not a fine-tune")


def test_other_vocabulary_gets_the_advice_to_align_it(recipe, workshop):
    tiny_llama(workshop / "target2", seed=5, vocab_size=70)
    refused(recipe, "target2", "[64, 16]", "[70, 16]", "tokenizer: {source: base}")


def test_wrong_base_with_other_shapes(write_recipe, workshop):
    tiny_llama(workshop / "wrong", seed=5, intermediate_size=32)
    message = refused(write_recipe(base_model="wrong"), "wrong", "target1", "[32, 16]", "[24, 16]", "more of the same")
    assert message.count("\n") < 12


def test_wrong_base_with_equal_shapes_and_another_meaning(write_recipe, workshop):
    tiny_llama(workshop / "wrong", seed=5, num_attention_heads=8, num_key_value_heads=4, head_dim=2)
    refused(write_recipe(base_model="wrong"), "num_attention_heads 4", "wrong has 8", "num_key_value_heads")


def test_other_architecture_names_both(recipe, workshop):
    config = json.loads((workshop / "target1/config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (workshop / "target1/config.json").write_text(json.dumps(config))
    refused(recipe, "target1 is a Qwen2ForCausalLM", "base is a LlamaForCausalLM")


def test_output_head_that_would_be_lost(write_recipe, workshop):
    tiny_llama(workshop / "tied", seed=5, tie=True)
    refused(write_recipe(base_model="tied"), "target1", "tie_word_embeddings", "would be lost")


@pytest.mark.parametrize("spelling", ["./base", "../shop/base", "link", "absolute"])
def test_base_spelled_differently_is_an_error_that_names_both(write_recipe, workshop, spelling):
    (workshop / "link").symlink_to("base")
    spelling = str(workshop / "base") if spelling == "absolute" else spelling
    recipe = write_recipe(base_model=spelling, models=[{"model": "base"}, {"model": "target1"}])
    refused(recipe, repr(spelling), "'base' (line 4)", "same model")


def test_layers_that_do_not_exist(write_recipe):
    slices = [{"sources": [{"model": m, "layer_range": [0, 9]} for m in ("base", "target1")]}]
    refused(write_recipe(models=None, slices=slices), "layer_range [0, 9]", "has 2 layers")


def test_huge_layer_range_is_refused_before_it_is_planned(write_recipe):
    slices = [{"sources": [{"model": m, "layer_range": [0, 10**12]} for m in ("base", "target1")]}]
    refused(write_recipe(models=None, slices=slices), "has 2 layers")


def test_all_broken_models_are_reported_at_once(recipe, workshop):
    shutil.rmtree(workshop / "target1")
    (workshop / "target2/model.safetensors").unlink()
    recipe.write_text(recipe.read_text().replace("model: target1", "model: ./target1"))
    refused(recipe, "2 problems", "there is no folder ./target1", "target2 has no weights")


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_safetensors_is_found_before_the_merge(recipe, workshop, keep):
    file = workshop / "target1/model.safetensors"
    os.truncate(file, file.stat().st_size - 1 if keep < 0 else keep)
    refused(recipe, "target1", "model.safetensors", "interrupted")


def test_sparse_file_of_the_right_size_is_not_taken_for_whole(recipe, workshop):
    file = workshop / "target1/model.safetensors"
    size = file.stat().st_size
    os.truncate(file, 0)
    os.truncate(file, size)
    refused(recipe, "target1", "damaged")


def test_a_changed_header_byte_never_gets_through_unnoticed(recipe, workshop):
    """Every 97th byte of the header, changed: a named error, or a model that is equal to the intended one."""
    file = workshop / "target1/model.safetensors"
    original = file.read_bytes()
    length = int.from_bytes(original[:8], "little")
    outcomes = set()
    for position in range(0, 8 + length, 97):
        mutated = bytearray(original)
        mutated[position] ^= 0x15
        file.write_bytes(mutated)
        try:
            merge(recipe, "out", settings=Settings(overwrite=True, say=lambda _: None))
            outcomes.add("merged")
        except FusekitError as error:
            outcomes.add("target1" in str(error))
    assert True in outcomes
    assert False not in outcomes, "an error that does not name the model"


def shard(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_missing_shard_and_wrong_index(recipe, workshop):
    weight_map = shard(workshop / "target1")
    index = workshop / "target1/model.safetensors.index.json"
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    merge(recipe, "whole", settings=QUIET)

    swapped = {name: second if file == first else first for name, file in weight_map.items()}
    index.write_text(json.dumps({"weight_map": swapped}))
    refused(recipe, "target1", "its index says", second)

    for evil in ("../base/model.safetensors", "/etc/passwd", "weights.pkl", 3):
        index.write_text(json.dumps({"weight_map": weight_map | {Q_PROJ: evil}}))
        refused(recipe, "target1", repr(evil), "not a weight file in the same folder")

    index.write_text(json.dumps({"weight_map": weight_map}))
    (workshop / "target1" / second).unlink()
    refused(recipe, "target1", second, "is not there")


def test_stale_index_beside_a_single_file(recipe, workshop):
    """mergekit would read the index, transformers the single file."""
    shard(workshop / "target1")
    shutil.copy(workshop / "target2/model.safetensors", workshop / "target1")
    for file in (workshop / "target1").glob("model-0*"):
        file.unlink()
    refused(recipe, "target1", "both model.safetensors and model.safetensors.index.json")


@pytest.mark.parametrize("whole", [True, False])
def test_an_index_of_one_file_has_to_list_all_of_it(recipe, workshop, whole):
    """MLX writes one beside every checkpoint."""
    names = sorted(load_file(workshop / "target1/model.safetensors"))[0 if whole else 1 :]
    index = workshop / "target1/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    if whole:
        assert check(recipe).can_run
    else:
        refused(recipe, "target1", f"both model.safetensors and {index.name}")


def test_pickles_that_are_not_read_may_be_there(recipe, workshop):
    (workshop / "target1/pytorch_model.bin").write_bytes(b"old")
    (workshop / "target1/pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    assert check(recipe).can_run


def test_file_that_changes_during_the_merge_is_noticed(recipe, workshop):
    def shrink(line):
        # Between the checks and the reading.
        if "to read" in line:
            edit_tensors(workshop / "target1", lambda tensors: tensors.update({Q_PROJ: torch.zeros(4, 16)}))

    refused(recipe, "target1", Q_PROJ, "did the file change", settings=Settings(say=shrink))


def test_tokenizer_that_cannot_be_written_is_an_error_not_a_log_line(recipe, workshop):
    def break_it(line):
        if "to read" in line:
            (workshop / "base/tokenizer_config.json").unlink()
            (workshop / "base/tokenizer.json").write_text("{}")

    refused(recipe, "no tokenizer", settings=Settings(say=break_it))


def test_filters_that_match_nothing_and_tensors_that_are_dropped_are_told(write_recipe, workshop):
    edit_tensors(workshop / "target1", lambda tensors: tensors.update({"extra.weight": torch.zeros(2)}))
    weights = [{"filter": "self_atn", "value": 0.1}, {"value": 0.5}]
    lines = []
    merge(write_recipe(parameters={"weight": weights}), "out", settings=Settings(say=lines.append))
    assert any("'self_atn' matches no tensor; did you mean 'self_attn'?" in line for line in lines)
    assert any("target1: extra.weight will not be in the result" in line for line in lines)


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_what_a_recipe_leaves_out_is_not_called_dropped(write_recipe, method):
    """Layers, and a base that gives only its config."""
    sources = [{"model": "target1", "layer_range": [0, 1]}, {"model": "target2", "layer_range": [1, 2]}]
    weight = {"parameters": {"weight": 1.0}} if method == "linear" else {}
    slices = [{"sources": [source | weight]} for source in sources]
    found = check(write_recipe(merge_method=method, models=None, parameters=None, slices=slices))
    assert (found.problems, found.warnings, found.models) == ([], [], ["target1", "target2"])
    assert "  " not in str(found)


def test_what_only_the_method_knows_is_asked_before_anything_is_read(write_recipe, monkeypatch):
    from mergekit import merge_methods

    recipe = write_recipe(merge_method="linear", base_model=None)
    asked = []

    def check(targets, parameters, tensor):
        asked.append((targets, parameters, tensor))
        raise MergeError(f"{tensor}: refused by the method")

    method = merge_methods.get("linear")
    monkeypatch.setattr(method, "check_parameters", check, raising=False)
    lines = []
    refused(recipe, "refused by the method", settings=Settings(say=lines.append))
    assert asked[0][0] == 2
    assert "normalize" in asked[0][1]
    assert lines == []
