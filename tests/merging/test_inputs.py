"""Inputs that are broken, are codes, mean something else than their base's, or give a result that would not load."""

import json
import math
import os
import shutil

import pytest
import torch
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from fusekit.errors import FusekitError, MergeError
from fusekit.merge_methods import fusion_vectors
from fusekit.merging import Settings, check, merge
from fusekit.merging.models import first_not_finite
from tests.capture.conftest import DEMO
from tests.helpers import edit_tensors, refused
from tests.merging.conftest import (
    OVERWRITE,
    Q_PROJ,
    QUIET,
    configured,
    made,
    merge_refused,
    stock,
    with_tensor,
    written,
)


def sliced(stop):
    return {
        "models": None,
        "slices": [{"sources": [{"model": m, "layer_range": [0, stop]} for m in ("base", "target1")]}],
    }


def truncated(keep):
    def change(shop):
        file = shop / "target1/model.safetensors"
        os.truncate(file, file.stat().st_size + keep if keep < 0 else keep)

    return change


def hollow(shop):
    """A file of the right size with nothing in it."""
    file = shop / "target1/model.safetensors"
    size = file.stat().st_size
    os.truncate(file, 0)
    os.truncate(file, size)


def gone(shop):
    shutil.rmtree(shop / "target1")
    (shop / "target2/model.safetensors").unlink()


def leads_nowhere(shop):
    """As in a cache of the hub whose files were removed."""
    (shop / "target1/model.safetensors").unlink()
    (shop / "target1/model.safetensors").symlink_to("../blobs/gone")


def adapter_alone(shop):
    (shop / "tuned").mkdir()
    (shop / "tuned/adapter_config.json").write_text('{"base_model_name_or_path": "org/pivot", "peft_type": "LORA"}')
    save_file({"a": torch.zeros(2)}, shop / "tuned/adapter_model.safetensors")


def filled(value, dtype=torch.float32):
    return torch.full((16, 16), value).to(dtype)


def one_bad(value, dtype):
    tensor = torch.zeros(16, 16, dtype=dtype)
    tensor[3, 5] = value
    return tensor


def case(*changes, says, **keys):
    """Changes of the models, what the error says, and keys of the recipe."""
    return changes, keys, says


NAN, INF = math.nan, math.inf
WHILE_READING = {
    "NaN of float32": case(
        with_tensor("target2", Q_PROJ, one_bad(NAN, torch.float32)),
        says=["target2", Q_PROJ, "nan at [3, 5]", "model.safetensors"],
    ),
    "inf of bfloat16": case(
        with_tensor("target2", Q_PROJ, one_bad(INF, torch.bfloat16)), says=["target2", Q_PROJ, "inf at [3, 5]"]
    ),
    "-inf of float16": case(
        with_tensor("base", Q_PROJ, one_bad(-INF, torch.float16)), says=["base", Q_PROJ, "-inf at [3, 5]"]
    ),
    # Finite in float16, but their sum is not.
    "NaN that the merge makes": case(
        *[with_tensor(who, Q_PROJ, filled(60000.0)) for who in ("target1", "target2")],
        says=["the result", Q_PROJ, "inf", "dtype: float32"],
        dtype="float16",
        parameters={"weight": 1.0},
    ),
}
BEFORE_READING = {
    "a missing tensor": case(
        with_tensor("target1", Q_PROJ, None), says=["target1", Q_PROJ, "lacks the tensor", "line 4"]
    ),
    "a missing output head": case(
        with_tensor("target1", "lm_head.weight", None), says=["target1 lacks the tensor lm_head.weight", "line 4"]
    ),
    "another shape": case(
        with_tensor("target2", Q_PROJ, torch.zeros(16, 20)),
        says=["target2", "base", Q_PROJ, "[16, 16]", "[16, 20]", "not a fine-tune"],
    ),
    "another vocabulary": case(
        made("target2", vocab_size=70), says=["target2", "[64, 16]", "[70, 16]", "tokenizer: {source: base}"]
    ),
    "a base of other shapes": case(
        made("wrong", intermediate_size=32),
        says=["wrong", "target1", "[32, 16]", "[24, 16]"],
        base_model="wrong",
    ),
    "a base of another meaning": case(
        made("wrong", num_attention_heads=8, num_key_value_heads=4, head_dim=2),
        says=["num_attention_heads 4", "wrong has 8", "num_key_value_heads"],
        base_model="wrong",
    ),
    "another architecture": case(
        configured("target1", architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
        says=["target1 is a Qwen2ForCausalLM", "base is a LlamaForCausalLM"],
    ),
    "an output head that would be lost": case(
        made("tied", tie=True), says=["target1", "tie_word_embeddings", "would be lost"], base_model="tied"
    ),
    "another spelling of the base": case(
        lambda shop: (shop / "link").symlink_to("base"),
        says=["'link'", "'base'", "same model"],
        base_model="link",
        models=[{"model": "base"}, {"model": "target1"}],
    ),
    "layers that do not exist": case(says=["layer_range [0, 9]", "has 2 layers"], **sliced(9)),
    "another depth": case(made("target1", num_hidden_layers=3), says=["target1 has 3 layers", "base has 2"]),
    "all models at once": case(
        gone,
        says=["2 problems", "there is no folder ./target1", "target2 has no weights"],
        models=[{"model": "./target1"}, {"model": "target2"}],
    ),
    "a part of a header": case(truncated(500), says=["target1", "model.safetensors", "interrupted"]),
    "all but a byte": case(truncated(-1), says=["target1", "model.safetensors", "interrupted"]),
    "a hollow file": case(hollow, says=["target1", "damaged"]),
    "a link to weights that are gone": case(leads_nowhere, says=["target1/model.safetensors is not there"]),
    "an adapter alone": case(
        adapter_alone, says=["tuned is an adapter", "org/pivot+tuned"], models=[{"model": "tuned"}]
    ),
    "the page of a model": case(
        says=["no folder https://", "OWNER/NAME"], base_model="https://huggingface.co/org/name"
    ),
    "a broken tokenizer": case(written("base/tokenizer.json", "{"), says=["base", "tokenizer.json"]),
    "a broken tokenizer of a union": case(
        written("target2/tokenizer.json", "{}"), says=["target2", "tokenizer.json"], tokenizer={"source": "union"}
    ),
    "a broken generation config": case(
        written("base/generation_config.json", "{"), says=["base", "generation_config.json"]
    ),
    "a vocabulary that does not fit": case(
        configured("base", vocab_size=900), says=["base", "config.json", "embed_tokens.weight", "[64, 16]", "[900, 16]"]
    ),
    "a quantization config": case(
        configured("base", quantization_config={"quant_method": "fp8"}), says=["base", "quantization_config", "fp8"]
    ),
    "a nested quantization config": case(
        configured("target2", text_config={"quantization_config": {"quant_method": "fp8"}}),
        says=["target2", "quantization_config", "fp8"],
    ),
}


@pytest.mark.parametrize("case", WHILE_READING)
def test_what_is_not_finite_is_named(write_recipe, workshop, case):
    changes, keys, parts = WHILE_READING[case]
    for change in changes:
        change(workshop)
    merge_refused(write_recipe(**keys), *parts)


@pytest.mark.parametrize("case", BEFORE_READING)
def test_broken_inputs_are_named_before_anything_is_read(write_recipe, workshop, case):
    changes, keys, parts = BEFORE_READING[case]
    for change in changes:
        change(workshop)
    said = []
    message = merge_refused(write_recipe(**keys), *parts, settings=Settings(say=said.append))
    assert said == []
    assert message.count("\n") < 12


@pytest.mark.parametrize("method", ["fusechat_sce", "task_arithmetic"])
def test_finite_weights_that_overflow_float16_are_said_to(write_recipe, workshop, method):
    with_tensor("target1", Q_PROJ, filled(1e6))(workshop)
    parameters = {"weight": 0.5} if method == "task_arithmetic" else {}
    merge_refused(
        write_recipe(merge_method=method, parameters=parameters, dtype="float16"), Q_PROJ, "float16", "overflow"
    )


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_first_not_finite_agrees_with_the_obvious(dtype, on_cpu, monkeypatch):
    monkeypatch.setattr(fusion_vectors, "on_cpu", lambda _: on_cpu)
    generator = torch.Generator().manual_seed(0)
    tensor = torch.full((7, 11, 3), 400.0, dtype=dtype)  # sums to infinity in float16
    assert first_not_finite(tensor) is None
    assert first_not_finite(torch.zeros(0, 3, dtype=dtype)) is None
    for value in [NAN, -NAN, INF, -INF] * 8:
        place = [int(torch.randint(size, (1,), generator=generator)) for size in tensor.shape]
        broken = tensor.clone()
        broken[tuple(place)] = value
        assert first_not_finite(broken) == f"{value} at {place}"
        assert first_not_finite(broken.transpose(0, 1)) == f"{value} at {[place[1], place[0], place[2]]}"
    limits = torch.finfo(dtype)
    for value in (limits.max, limits.min, limits.tiny, -0.0):  # the sums of the first two overflow
        assert first_not_finite(torch.full((5,), value, dtype=dtype)) is None
    assert first_not_finite(torch.full((7, 11), NAN, dtype=dtype)) == "nan at [0, 0]"


# ---------------------------------------------------------------- files


def test_a_changed_header_byte_never_gets_through_unnoticed(recipe, workshop):
    """Every 197th byte of the header, changed: a named error, or a model that is equal to the intended one."""
    file = workshop / "target1/model.safetensors"
    original = file.read_bytes()
    length = int.from_bytes(original[:8], "little")
    outcomes = set()
    for position in range(0, 8 + length, 197):
        mutated = bytearray(original)
        mutated[position] ^= 0x15
        file.write_bytes(mutated)
        try:
            merge(recipe, "out", settings=OVERWRITE)
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
    assert check(recipe).can_run
    swapped = {name: second if file == first else first for name, file in weight_map.items()}
    index.write_text(json.dumps({"weight_map": swapped}))
    merge_refused(recipe, "target1", "its index says", second)
    for evil in ("../base/model.safetensors", "/etc/passwd", "weights.pkl", 3):
        index.write_text(json.dumps({"weight_map": weight_map | {Q_PROJ: evil}}))
        merge_refused(recipe, "target1", repr(evil), "not a weight file in the same folder")
    index.write_text(json.dumps({"weight_map": weight_map}))
    (workshop / "target1" / second).unlink()
    merge_refused(recipe, "target1", second, "is not there")


def test_an_index_of_other_files_beside_a_single_file_is_refused(recipe, workshop):
    """MLX writes an index beside every checkpoint. mergekit would read the index, transformers the single file."""
    folder = workshop / "target1"
    index = folder / "model.safetensors.index.json"
    names = load_file(folder / "model.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert check(recipe).can_run
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    merge_refused(recipe, "target1", f"both model.safetensors and {index.name}")


def test_a_tokenizer_that_is_lost_while_merging_is_noticed(recipe, workshop):
    def lose(line):
        if "to read" in line:
            (workshop / "base/tokenizer_config.json").unlink()
            (workshop / "base/tokenizer.json").write_text("{}")

    merge_refused(recipe, "no tokenizer", settings=Settings(say=lose))


# ---------------------------------------------------------------- codes in place of weights


CODES = {
    "fp8": {Q_PROJ: torch.zeros(16, 16).to(torch.float8_e4m3fn)},
    "scales of fp8": {f"{Q_PROJ}_scale_inv": torch.full((1, 1), 1e-3)},
    "int8": {Q_PROJ: torch.zeros(16, 16, dtype=torch.int8)},
    "scales of LLM.int8": {Q_PROJ.replace("weight", "SCB"): torch.ones(16)},
    "bnb": {f"{Q_PROJ}.absmax": torch.ones(4), f"{Q_PROJ}.quant_map": torch.ones(16)},
    "GPTQ": {Q_PROJ.replace("weight", "qweight"): torch.zeros(2, 16, dtype=torch.int32)},
}


@pytest.mark.parametrize("kind", CODES)
def test_codes_are_not_merged_as_weights(recipe, workshop, kind):
    edit_tensors(workshop / "target1", lambda tensors: tensors.update(CODES[kind]))
    merge_refused(recipe, "target1", Q_PROJ.removesuffix("weight"), "quantised")


@pytest.mark.parametrize("method", ["fusechat_sce", "varm", "widen"])
def test_stock_mergekit_does_not_give_codes_to_our_methods(write_recipe, workshop, method):
    """Cast to float32 they look like weights; the file tells by the scales beside them."""
    edit_tensors(workshop / "target1", lambda tensors: tensors.update(CODES["fp8"] | CODES["scales of fp8"]))
    with refused(MergeError, "target1", f"{Q_PROJ}_scale_inv", "quantised"):
        stock(write_recipe(merge_method=method, parameters=None), workshop / "out")


# ---------------------------------------------------------------- what configs mean


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"rope_parameters": None, "rope_theta": 1e6}, ["rope_theta", "1000000.0", "10000.0"]),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
            ["factor 4.0", "None", "linear", "default"],
        ),
        ({"rms_norm_eps": 1e-3}, ["rms_norm_eps", "0.001", "1e-06"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "30.0", "None"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    ],
)
def test_weights_that_are_read_differently_are_refused_with_both_values(recipe, workshop, changes, parts):
    configured("target1", **changes)(workshop)
    merge_refused(recipe, "target1", "base", "--allow-crimes", *parts)
    found = check(recipe, options=MergeOptions(allow_crimes=True))
    assert found.can_run
    assert parts[0] in "".join(found.warnings)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (configured("target1", rms_norm_eps=1e-5), ["target1", "base", "rms_norm_eps", "1e-05", "1e-06"]),
        (configured("target1", sliding_window=32), ["target1", "base", "sliding_window", "32", "None"]),
        (configured("target1", tie_word_embeddings=True), ["target1", "base", "tie_word_embeddings", "True", "False"]),
        (with_tensor("target1", "extra.weight", torch.zeros(2)), ["target1: extra.weight will not be in the result"]),
    ],
)
def test_small_differences_are_warnings_with_both_values(recipe, workshop, change, parts):
    change(workshop)
    found = check(recipe)
    assert found.can_run
    assert [all(part in line for part in parts) for line in found.warnings] == [True]


LINEAR = {"type": "linear", "factor": 4.0}
SAME = {"rope_type": "linear", "factor": 4.0}
EVERYONE = ("base", "target1", "target2")


@pytest.mark.parametrize(
    "changes",
    [
        # Another spelling of the default, and fields that do not change how weights are read.
        [configured("target1", rope_parameters=None, rope_theta=10000, max_position_embeddings=4096, eos_token_id=5)],
        [configured(who, rope_parameters=None, rope_scaling=SAME if who == "base" else LINEAR) for who in EVERYONE],
        # The first Gemma was published without it, later with it.
        [configured("base", hidden_activation="gelu_pytorch_tanh")],
        # Masks of bytes are no codes, and pickles that are not read may be there.
        [with_tensor("target1", "model.layers.0.attn.bias", torch.ones(1, 1, 4, 4, dtype=torch.uint8))],
        [
            written("target1/pytorch_model.bin", "old"),
            written("target1/pytorch_model.bin.index.json", '{"weight_map": {}}'),
        ],
        [written("target2/tokenizer.json", "{}")],
    ],
)
def test_what_means_the_same_is_no_difference(recipe, workshop, changes):
    for change in changes:
        change(workshop)
    found = check(recipe)
    assert found.problems == []
    assert not [line for line in found.warnings if " has " in line]


def test_a_filter_that_matches_nothing_is_told(write_recipe):
    weights = [{"filter": "self_atn", "value": 0.1}, {"value": 0.5}]
    (warning,) = check(write_recipe(parameters={"weight": weights})).warnings
    assert "'self_atn' matches no tensor; did you mean 'self_attn'?" in warning


@pytest.mark.parametrize("method", ["linear", "passthrough"])
def test_what_a_recipe_leaves_out_is_not_called_dropped(write_recipe, method):
    """Layers, and a base that gives only its config."""
    sources = [{"model": "target1", "layer_range": [0, 1]}, {"model": "target2", "layer_range": [1, 2]}]
    weight = {"parameters": {"weight": 1.0}} if method == "linear" else {}
    slices = [{"sources": [source | weight]} for source in sources]
    found = check(write_recipe(merge_method=method, models=None, parameters=None, slices=slices))
    assert (found.problems, found.warnings, found.models) == ([], [], ["target1", "target2"])
    assert "  " not in str(found)


# ---------------------------------------------------------------- tokenizers and generation configs


def test_a_model_without_a_tokenizer_is_merged_and_that_is_said(recipe, workshop, caplog):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (workshop / "base" / name).unlink()
    lines = []
    merge(recipe, "out", settings=Settings(say=lines.append))
    assert any("warning" in line and "base has no tokenizer" in line for line in lines)
    assert "Failed to copy tokenizer" not in caplog.text


@pytest.mark.parametrize(("renamed", "warned"), [(0, False), (2, False), (300, True)])
def test_ids_that_mean_other_tokens_are_warned_of(write_recipe, workshop, renamed, warned):
    """A fine-tune may give special tokens another name; the tokenizer of another model is a mistake."""
    shutil.copytree(DEMO / "numbers", workshop / "numbers")
    file = workshop / "numbers" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = sorted(vocabulary, key=vocabulary.__getitem__)[768 - renamed :]
    vocabulary |= dict(zip(last, [vocabulary[token] for token in last[1:] + last[:1]], strict=True))
    file.write_text(json.dumps(tokenizer, indent=1))
    models = [{"model": "numbers"}, {"model": str(DEMO / "facts")}]
    found = check(write_recipe(base_model=str(DEMO / "pivot"), models=models))
    said = [line for line in found.warnings if "tokenizer" in line]
    assert bool(said) == warned
    assert all(named in line for line in said for named in ("numbers", "pivot", f"{renamed} of 768"))


@pytest.mark.parametrize(
    ("changes", "copy_tokenizer", "ends"),
    [
        ({}, True, [2, 5]),
        ({}, False, [2, 5]),
        ({"tokenizer": {"source": "union"}}, False, [2, 5]),
        ({"tokenizer": {"source": "target1"}}, True, [7]),  # it goes with the tokens
    ],
)
def test_the_generation_config_is_the_bases(write_recipe, workshop, changes, copy_tokenizer, ends):
    for name, its in (("base", [2, 5]), ("target1", [7])):
        GenerationConfig(eos_token_id=its).save_pretrained(workshop / name)
    merge(write_recipe(**changes), "out", MergeOptions(copy_tokenizer=copy_tokenizer), QUIET)
    assert GenerationConfig.from_pretrained(workshop / "out").eos_token_id == ends
