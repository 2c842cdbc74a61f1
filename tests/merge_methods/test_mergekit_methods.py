"""The merge methods as mergekit sees them: its own entry points, its conventions, its graphs."""

import json
import threading

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.architecture import WeightInfo
from mergekit.architecture.json_definitions import JSON_ARCHITECTURES
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import GatherTensors
from mergekit.merge import run_merge
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge
from mergekit.scripts.multimerge import main as multimerge
from safetensors.torch import save_file

from fusekit.errors import MergeError
from fusekit.merge_methods import record_coefficients, sce, unit_of, varm, widen
from tests import reference
from tests.helpers import edit_tensors, family, merge_recipe, refused, same_tensors, tensors_of
from tests.merge_methods.cases import random_case

METHODS = ("fusechat_sce", "varm")
UNITS = ("module", "layer", "model")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: a base, and two fine-tunes of it."""
    base, targets = family(tmp_path_factory.mktemp("models"), 2, vocab_size=32)
    return [base, *targets]


@pytest.fixture(scope="module")
def tensors(models):
    return [tensors_of(model) for model in models]


def run(recipe, out):
    run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions(quiet=True))
    return tensors_of(out)


def merged(out, models, method="fusechat_sce", parameters=None, **keys):
    """What mergekit makes of these folders, of which the first is the base."""
    return run(merge_recipe(models[0], models[1:], method, parameters=parameters or {}, **keys), out)


# ---------------------------------------------------------------- in memory


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_merge_tensors_is_the_pure_function(dtype, device):
    base, targets = random_case((9, 7), 3)
    tensors = [t.to(device, dtype) for t in (base, *targets)]
    parameters = {"select_topk": 0.3, "variant": "renormalized", "int8_mask": True}
    merged = merge_tensors(tensors, "fusechat_sce", base_index=0, parameters=parameters)
    assert merged.device.type == device
    assert torch.equal(merged, sce(tensors[0], tensors[1:], select_topk=0.3, variant="renormalized").tensor)
    assert torch.equal(merge_tensors(tensors, "varm", base_index=0), varm(tensors[0], tensors[1:]).tensor)


@pytest.mark.parametrize("method", METHODS)
def test_dtypes_are_those_that_mergekit_promises(method):
    """Each weight is promoted by itself, buffers are copied, autocast around a merge changes nothing."""
    half, short, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    dtypes = {
        "low": [short] * 3,
        "mixed": [short, half, short],
        "double": [double, single, double],
        "norm": [single] * 3,
    }
    models = [{"counter": torch.tensor(7)} for _ in range(3)]
    for name, each in dtypes.items():
        base, targets = random_case((6, 6), 2)
        for model, tensor, dtype in zip(models, (base, *targets), each, strict=True):
            model[name] = tensor.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = merge_state_dicts(models, method, base=0)
    for name, dtype in {"low": short, "mixed": single, "double": double, "norm": single}.items():
        expected = merge_tensors([model[name].to(dtype) for model in models], method, base_index=0)
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], expected)
    assert (merged["counter"], merged["counter"].dtype) == (7, torch.int64)
    for dtype, out_dtype in ((short, None), (None, short), (double, single)):
        found = merge_state_dicts(models, method, base=0, dtype=dtype, out_dtype=out_dtype)["norm"]
        expected = merge_tensors([m["norm"].to(dtype or single) for m in models], method, base_index=0)
        assert torch.equal(found, expected.to(out_dtype or expected.dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", ["paper", "renormalized", "fuseai"])
def test_cuda_selects_and_merges_as_the_cpu_does(variant):
    base, targets = random_case((700, 300), 3)
    tensors = [t.bfloat16() for t in (base, *targets)]
    cpu = sce(tensors[0], tensors[1:], select_topk=0.2, variant=variant, count_erased=True)
    gpu = sce(tensors[0].cuda(), [t.cuda() for t in tensors[1:]], select_topk=0.2, variant=variant, count_erased=True)
    np.testing.assert_allclose(gpu.coefficients, cpu.coefficients, rtol=1e-12)
    torch.testing.assert_close(gpu.tensor.cpu(), cpu.tensor, rtol=2**-8, atol=0)
    assert gpu.selected == cpu.selected
    assert gpu.erased.tolist() == cpu.erased.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_a_base_and_a_target_are_required(method):
    with pytest.raises(ValueError, match="requires a base"):
        merge_tensors([torch.zeros(2), torch.ones(2)], method)
    with pytest.raises(ValueError, match="at least 1 non-base"):
        merge_tensors([torch.zeros(2)], method, base_index=0)


@pytest.mark.parametrize("method", [*METHODS, "widen"])
def test_parameters_of_modules_are_merged_and_the_result_has_no_gradient(method):
    modules = [torch.nn.Linear(3, 4) for _ in range(3)]
    merged = merge_state_dicts(modules, method, base=0)["weight"]
    assert not merged.requires_grad
    assert torch.equal(merged, merge_tensors([m.weight.detach() for m in modules], method, base_index=0))


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_models_in_a_recipe_and_in_memory(method, tmp_path, models, tensors):
    recipe = merge_recipe(models[0], models[1:], method)
    recipe["models"][0]["parameters"] = {"weight": [0.25, 0.5]}  # a gradient over the layers
    recipe["models"][1]["parameters"] = {"weight": [{"filter": "mlp", "value": 0}, {"value": 2}]}
    with record_coefficients() as record:
        found = run(recipe, tmp_path / "out")
    function = sce if method == "fusechat_sce" else varm
    for name, tensor in found.items():
        first = 0.25 if "layers.0" in name or "embed" in name or "layers" not in name else 0.5
        weights = [first, 0 if "mlp" in name else 2]
        base, *targets = [model[name] for model in tensors]
        expected = function(base, targets, weights=weights)
        assert torch.equal(tensor, expected.tensor), name
        assert list(record.tensors[name].parameters["weight"].values()) == weights
        np.testing.assert_allclose(list(record.tensors[name].coefficients.values()), expected.coefficients)
    base, *targets = norms = [model["model.norm.weight"] for model in tensors]
    expected = function(base, targets, weights=[0.5, 2]).tensor
    assert torch.equal(merge_tensors(norms, method, base_index=0, parameters={"weight": [0.5, 2]}), expected)
    same_tensors(merged(tmp_path / "ones", models, method, {"weight": 1}), merged(tmp_path / "plain", models, method))


def test_a_difference_that_overflows_is_said_to():
    with pytest.raises(MergeError, match=r"^the difference of a model to the base overflows torch.float32; use dtype"):
        merge_tensors([torch.tensor([-3e38]), torch.tensor([3e38])], "fusechat_sce", base_index=0)


# ---------------------------------------------------------------- units in memory


def state_dicts():
    names = {
        "model.embed_tokens.weight": (8, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.self_attn.o_proj.weight": (4, 4),
        "model.layers.0.mlp.up_proj.weight": (8, 4),
        "model.layers.1.mlp.up_proj.weight": (8, 4),
        "model.norm.weight": (4,),
    }
    cases = {name: random_case(shape, 2, scale=10.0**-i, seed=i) for i, (name, shape) in enumerate(names.items())}
    base = {name: case[0] for name, case in cases.items()}
    return [base, *({name: case[1][j] for name, case in cases.items()} for j in range(2))]


@pytest.mark.parametrize("aggregation", ["elements", "matrices"])
@pytest.mark.parametrize("granularity", UNITS)
def test_units_of_state_dicts(granularity, aggregation):
    models = state_dicts()
    with record_coefficients() as record:
        parameters = {"granularity": granularity, "aggregation": aggregation}
        found = merge_state_dicts(models, "varm", base=0, parameters=parameters)
    for name, tensor in found.items():
        unit = unit_of(name, granularity)
        members = [n for n in models[0] if unit_of(n, granularity) == unit]
        matrices = [(models[0][n], [m[n] for m in models[1:]]) for n in members]
        weights = reference.unit_coefficients(matrices, aggregation)
        torch.testing.assert_close(tensor, reference.varm(models[0][name], [m[name] for m in models[1:]], weights))
        assert record.tensors[name].unit == unit
        np.testing.assert_allclose(list(record.tensors[name].coefficients.values()), weights)


def test_units_of_state_dicts_are_measured_in_the_dtype_of_the_merge():
    models, found = state_dicts(), []
    cast = [{name: tensor.bfloat16() for name, tensor in model.items()} for model in models]
    for inputs in (models, cast):
        with record_coefficients() as record:
            merge_state_dicts(inputs, "varm", base=0, dtype=torch.bfloat16, parameters={"granularity": "model"})
        found.append(record.as_dict())
    assert found[0] == found[1]


@pytest.mark.parametrize("granularity", UNITS)
def test_one_tensor_alone_has_no_unit(granularity):
    alone, name = [torch.zeros(3), torch.ones(3)], "model.layers.0.mlp.w"
    with refused(MergeError, "passes one tensor alone", "granularity: matrix"):
        merge_tensors(alone, "varm", base_index=0, name=name, parameters={"granularity": granularity})


def test_a_module_that_the_name_does_not_tell_is_named():
    models = [{"a.0.frobnicator.weight": torch.zeros(2), "a.0.mlp.weight": torch.zeros(2)} for _ in range(2)]
    with refused(MergeError, "a.0.frobnicator.weight", "granularity: matrix or layer"):
        merge_state_dicts(models, "varm", base=0, parameters={"granularity": "module"})


# ---------------------------------------------------------------- graphs


def assert_as_in_memory(folder, method, parameters, *, tie, dtype="float32", **keys):
    """A graph merges as merge_state_dicts does with the weights in the dtype of the recipe."""
    base, targets = family(folder, 3, tie=tie, vocab_size=32)
    found = merged(folder / "out", [base, *targets], method, parameters, dtype=dtype, **keys)
    cast = [{n: t.to(getattr(torch, dtype)) for n, t in tensors_of(each).items()} for each in (base, *targets)]
    same_tensors(found, merge_state_dicts(cast, method, base=0, parameters=parameters))
    assert ("lm_head.weight" in found) == (not tie)


@pytest.mark.parametrize(
    ("dtype", "tie"), [("float32", True), ("bfloat16", False), ("float16", False), ("float64", True)]
)
@pytest.mark.parametrize(("method", "parameters"), [("fusechat_sce", {"select_topk": 0.3}), ("varm", {})])
def test_a_graph_merges_as_in_memory_in_the_dtype_of_the_recipe(tmp_path, method, parameters, dtype, tie):
    assert_as_in_memory(tmp_path, method, parameters, dtype=dtype, tie=tie)


@pytest.mark.parametrize("granularity", UNITS)
def test_units_in_a_graph_are_those_in_memory(tmp_path, granularity):
    """With a cast on the way: the siblings' statistics are taken in the planned dtype, as the merge is."""
    assert_as_in_memory(tmp_path, "varm", {"granularity": granularity}, dtype="bfloat16", tie=True)


def test_units_with_a_tokenizer_configured(tmp_path):
    assert_as_in_memory(tmp_path, "varm", {"granularity": "layer"}, tie=False, tokenizer={"source": "base"})


@pytest.mark.parametrize("method", METHODS)
def test_base_listed_among_the_models_changes_nothing(tmp_path, method, models):
    one = merged(tmp_path / "one", models, method)
    same_tensors(merged(tmp_path / "other", [models[0], *models], method), one)


def test_widen_merges_embeddings_by_their_tokens_and_heads_by_their_columns(tmp_path, models, tensors):
    found = merged(tmp_path / "out", models, "widen", {"threshold": 1.2})
    assert found.keys() == tensors[0].keys()
    assert "lm_head.weight" in found
    for name, tensor in found.items():
        base, *targets = [model[name] for model in tensors]
        expected = widen(base, targets, threshold=1.2, columns_are_rows="embed_tokens" in name).tensor
        torch.testing.assert_close(tensor, expected)


def test_parameters_by_filter_and_gradient(tmp_path, models):
    granularity = [{"filter": "mlp", "value": "layer"}, {"value": "matrix"}]
    topk = [{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 1.0}]
    mlp, attention = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    with record_coefficients() as units:
        merged(tmp_path / "varm", models, "varm", {"granularity": granularity})
    assert (units.tensors[mlp].unit, units.tensors[attention].unit) == ("model.layers.1", None)
    with record_coefficients() as record:
        merged(tmp_path / "sce", models, parameters={"select_topk": topk})
    selected = {name: each.parameters["select_topk"] for name, each in record.tensors.items()}
    assert selected[mlp.replace("1", "0")] == pytest.approx(0.2)
    assert (selected[mlp], selected[attention]) == (pytest.approx(0.6), 1)
    assert record.tensors[mlp].selected == pytest.approx(0.6, abs=0.01)


def test_model_unit_with_a_tokenizer_is_a_named_error(tmp_path, models):
    with refused(MergeError, "embed_tokens", "is loaded by PermutedVocabulary", "granularity: matrix"):
        merged(tmp_path / "out", models, "varm", {"granularity": "model"}, tokenizer={"source": "base"})


def sliced(models, ranges, granularity):
    slices = [{"sources": [{"model": str(model), "layer_range": each} for model in models]} for each in ranges]
    return merge_recipe(models[0], (), "varm", models=None, slices=slices, parameters={"granularity": granularity})


@pytest.mark.parametrize("granularity", UNITS)
def test_slices_that_rename_tensors_are_refused_beyond_a_matrix(tmp_path, models, granularity):
    assert len(run(sliced(models, [[1, 2], [0, 1]], "matrix"), tmp_path / "matrix")) == 21
    with refused(MergeError, "not possible with these `slices:`", "layers.0.", "layers.1."):
        run(sliced(models, [[1, 2], [0, 1]], granularity), tmp_path / granularity)


def test_slices_that_keep_names_are_fine(tmp_path, models):
    found = run(sliced(models, [[0, 1], [1, 2]], "layer"), tmp_path / "sliced")
    same_tensors(found, merged(tmp_path / "whole", models, "varm", {"granularity": "layer"}))


def merge_files(models, tmp_path, **recipe):
    """By mergekit-pytorch."""
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(len(models))]
    for path, model in zip(paths, models, strict=True):
        save_file(model, path)
    config = RawPyTorchMergeConfig(models=[{"model": p} for p in paths[1:]], base_model=paths[0], **recipe)
    Executor(plan_flat_merge(config, str(tmp_path / "out"), False, False, MergeOptions())).execute()
    return tensors_of(tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_mergekit_pytorch(tmp_path, method):
    found = merge_files(state_dicts(), tmp_path, merge_method=method, dtype="bfloat16")
    same_tensors(found, merge_state_dicts(state_dicts(), method, base=0, dtype=torch.bfloat16))


def test_mergekit_pytorch_knows_no_units(tmp_path):
    with refused(MergeError, "TensorDictWrapper", "granularity: matrix"):
        merge_files(state_dicts()[:2], tmp_path, merge_method="varm", parameters={"granularity": "model"})


def test_mergekit_multi(tmp_path, models, tensors):
    base, one, two = models
    unit, share = {"granularity": "module"}, {"select_topk": 0.5}
    first = {"name": "first", **merge_recipe(base, [one, two], "varm", parameters=unit)}
    final = merge_recipe(base, ["first", one], parameters=share)
    (tmp_path / "multi.yml").write_text(yaml.safe_dump_all([first, final]))
    arguments = [str(tmp_path / "multi.yml"), "--out-path", str(tmp_path / "out"), "-I", str(tmp_path / "steps")]
    result = CliRunner().invoke(multimerge, [*arguments, "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0
    step = merge_state_dicts(tensors, "varm", base=0, parameters=unit)
    expected = merge_state_dicts([tensors[0], step, tensors[1]], "fusechat_sce", base=0, parameters=share)
    same_tensors(tensors_of(tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("fusechat_sce", {"select_topk": 1.0, "variant": "paper", "int8_mask": False}),
        ("varm", {"granularity": "matrix", "aggregation": "elements"}),
    ],
)
def test_optional_weights(method, parameters):
    refs = base_ref, one, two = tuple(ModelReference.model_validate(name) for name in ("base", "a", "b"))
    weight = WeightInfo(name="model.layers.0.self_attn.q_proj.bias", optional=True)
    task = ExecuteMergeMethodTask(
        method_name=method,
        gather_tensors=GatherTensors(weight_info=ImmutableMap(dict.fromkeys(refs, weight))),
        model_order=refs,
        base_model=base_ref,
        output_weight=weight,
        parameters=ImmutableMap(parameters),
        input_parameters=ImmutableMap({ref: ImmutableMap({"weight": 1.0}) for ref in refs}),
    )
    base, first, second = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]), torch.tensor([1.0, 3.0])
    both = task.execute({base_ref: base, one: first, two: second})
    torch.testing.assert_close(both, merge_tensors([base, first, second], method, base_index=0))
    # One target lacks it: the others decide. None has it: the base's. The base lacks it: nothing to measure against.
    torch.testing.assert_close(task.execute({base_ref: base, two: second}), second)
    torch.testing.assert_close(task.execute({base_ref: base}), base)
    with pytest.raises(ValueError, match=r"Base input is not present.*q_proj\.bias"):
        task.execute({one: first, two: second})


def test_one_target_below_one_is_named_with_its_tensor(tmp_path, models):
    with pytest.raises(MergeError, match=r"^\S+: select_topk is 0.5 with one target"):
        merged(tmp_path / "out", models[:2], parameters={"select_topk": 0.5})


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_named_with_tensor_and_model(tmp_path, method):
    base, targets = family(tmp_path, 2)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(targets[1], lambda tensors: tensors[name][0].fill_(float("nan")))
    with refused(MergeError, f"{name}: NaN or Inf in the weights of", "target2:"):
        merged(tmp_path / "out", [base, *targets], method)


# ---------------------------------------------------------------- against mergekit's own sce


@pytest.mark.parametrize("select_topk", [0.2, 1.0])
def test_renormalized_is_mergekits_sce_where_that_is_right(select_topk):
    """Large deltas in float32, where mergekit's thresholds of 1e-6 do not bite."""
    base, targets = random_case((64, 48), 3, scale=1.0)
    tensors = [t.float() for t in (base, *targets)]
    theirs = merge_tensors(tensors, "sce", base_index=0, parameters={"select_topk": select_topk})
    ours = merge_tensors(
        tensors, "fusechat_sce", base_index=0, parameters={"select_topk": select_topk, "variant": "renormalized"}
    )
    torch.testing.assert_close(ours, theirs)


def test_mergekits_sce_weighs_small_deltas_uniformly_and_ours_does_not():
    """Deltas of RMS 2e-4 and 6e-4, as ordinary fine-tunes have: η is 0.1 and 0.9, mergekit's `sce` takes 0.5 and 0.5.

    The day this fails mergekit has mended it, and the docs may say so.
    """
    base = torch.zeros(32, 32)
    tensors = [base, base + 2e-4, base + 6e-4]
    theirs = merge_tensors(tensors, "sce", base_index=0)
    ours = merge_tensors(tensors, "fusechat_sce", base_index=0, parameters={"variant": "renormalized"})
    torch.testing.assert_close(ours, torch.full_like(base, 0.1 * 2e-4 + 0.9 * 6e-4))
    torch.testing.assert_close(theirs, torch.full_like(base, 0.5 * 2e-4 + 0.5 * 6e-4))


# ---------------------------------------------------------------- names


def test_units_of_every_architecture_that_mergekit_defines():
    """Every numbered tensor of every definition has a layer and a module, and every other tensor a unit."""
    seen = 0
    for architecture in JSON_ARCHITECTURES:
        for module in architecture.modules.values():
            definition, prefix = module.architecture.definition, module.weight_prefix or ""
            for weight in (*definition.pre_weights, *definition.post_weights):
                unit_of(prefix + weight.name.replace("${num_layers+1}", "5"), "module")
            for weight in definition.layer_templates.weights:
                if "${layer_index}" in weight.name:
                    name = prefix + weight.name.replace("${layer_index}", "3")
                    layer = unit_of(name, "layer")
                    assert name.startswith(layer + "."), (architecture.expected_model_type, name)
                    assert layer.endswith(".3") or layer == "3", (architecture.expected_model_type, name)
                    assert unit_of(name, "module").startswith(layer + "."), (architecture.expected_model_type, name)
                    seen += 1
    assert seen > 400


def test_modules_of_known_layers():
    expected = {
        "model.layers.3.self_attn.q_proj.weight": "model.layers.3.self_attn",
        "model.layers.3.self_attn.q_norm.weight": "model.layers.3.self_attn",
        "model.layers.3.mlp.up_proj.weight": "model.layers.3.mlp",
        "model.layers.3.mlp.experts.7.up_proj.weight": "model.layers.3.mlp",
        "model.layers.3.block_sparse_moe.gate.weight": "model.layers.3.mlp",
        "model.layers.3.input_layernorm.weight": "model.layers.3.input_layernorm",
        "gpt_neox.layers.3.input_layernorm.bias": "gpt_neox.layers.3.input_layernorm",
        "gpt_neox.layers.3.attention.query_key_value.bias": "gpt_neox.layers.3.attention",
        "transformer.h.3.ln_1.weight": "transformer.h.3.ln_1",
        "transformer.h.3.attn.c_attn.weight": "transformer.h.3.attn",
        "encoder.block.3.layer.1.DenseReluDense.wo.weight": "encoder.block.3.layer.1.mlp",
        "encoder.block.3.layer.0.layer_norm.weight": "encoder.block.3.layer.0.layer_norm",
        "bert.encoder.layer.3.attention.output.LayerNorm.bias": "bert.encoder.layer.3.attention.output.LayerNorm",
        "bert.encoder.layer.3.output.dense.weight": "bert.encoder.layer.3.mlp",
        "model.decoder.layers.3.encoder_attn.k_proj.weight": "model.decoder.layers.3.encoder_attn",
        "model.decoder.layers.3.encoder_attn_layer_norm.bias": "model.decoder.layers.3.encoder_attn_layer_norm",
        "model.decoder.layers.3.fc1.weight": "model.decoder.layers.3.mlp",
        "model.embed_tokens.weight": "model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
    }
    assert {name: unit_of(name, "module") for name in expected} == expected
    assert unit_of("model.norm.weight", "layer") == "model.norm.weight"
    assert unit_of("model.norm.weight", "model") == "model"
    with pytest.raises(MergeError, match="granularity is 'layers', it must be one of"):
        unit_of("model.layers.0.mlp.w", "layers")


# ---------------------------------------------------------------- records

ZERO, SMALL, LARGE = torch.zeros(4), torch.full((4,), 2e-4), torch.full((4,), 6e-4)


def merge_small(method="fusechat_sce", name="w", ids=("base", "a", "b"), **parameters):
    return merge_tensors([ZERO, SMALL, LARGE], method, ids=list(ids), base_index=0, name=name, parameters=parameters)


def test_a_record_says_what_the_function_returns():
    with record_coefficients() as record:
        assert not record.tensors
        merge_small(select_topk=0.5)
        merge_small("varm", name="v")
    expected = sce(ZERO, [SMALL, LARGE], select_topk=0.5, count_erased=True)
    tensor = record.as_dict()["tensors"]["w"]
    assert tensor["coefficients"] == {"a": pytest.approx(0.1), "b": pytest.approx(0.9)}
    assert tensor["coefficients"]["a"] == expected.coefficients[0]
    assert (tensor["selected"], tensor["erased"]) == (0.5, {"a": 0.0, "b": 0.0})
    assert tensor["parameters"] == {"select_topk": 0.5, "variant": "paper"}
    assert "unit" not in tensor
    assert json.loads(record.to_json()) == record.as_dict()


def test_records_nest_and_end_and_see_other_threads():
    with record_coefficients() as outer:
        with record_coefficients() as inner:
            thread = threading.Thread(target=merge_small)
            thread.start()
            thread.join()
        merge_small(name="later")
    merge_small(name="unrecorded")
    assert set(inner.tensors) == {"w"}
    assert set(outer.tensors) == {"w", "later"}


def test_a_models_name_cannot_break_the_table():
    with record_coefficients() as record:
        merge_small(ids=("base", "a|b", "<img src=x onerror=alert(1)>"))
    rows = [line for line in record.markdown().splitlines() if line.startswith("| ")]
    assert {row.count("|") for row in rows} == {6}
    assert "<img" not in record.markdown()


def test_markdown_has_a_row_per_model():
    with record_coefficients() as record:
        merge_small()
    text = record.markdown()
    assert "| a | 0.1000 | 0.1000 | 0.1000 | 0.0% |" in text
    assert "| b | 0.9000 |" in text
    assert "Selected: 100.0% of the elements" in text
