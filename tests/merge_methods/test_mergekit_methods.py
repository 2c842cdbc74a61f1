"""`fusechat_sce` and `varm` as mergekit sees them: its own entry points, its conventions, its graphs."""

import json
import threading

import numpy as np
import pytest
import torch
import yaml
from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import GatherTensors
from mergekit.merge import run_merge
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge
from safetensors.torch import load_file, save_file

from fusekit.errors import MergeError
from fusekit.merge_methods import record_coefficients, sce, unit_of, varm
from tests import reference
from tests.helpers import edit_tensors, family
from tests.merge_methods.cases import random_case

METHODS = ("fusechat_sce", "varm")
UNITS = ("module", "layer", "model")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def run(recipe, out, **options):
    config = MergeConfiguration.model_validate(recipe)
    run_merge(config, str(out), MergeOptions(quiet=True, **options))
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return family(tmp_path_factory.mktemp("models"), 2, vocab_size=32)


@pytest.fixture
def base(models):
    return models[0]


@pytest.fixture
def targets(models):
    return models[1]


def recipe_of(base, targets, method="fusechat_sce", parameters=None, **more):
    return {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(target)} for target in targets],
        "parameters": parameters or {},
        "dtype": "float32",
        **more,
    }


def tensors_of(*paths):
    return [load_file(path / "model.safetensors") for path in paths]


def assert_equal(merged, expected):
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(merged[name], tensor), name


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
    dtypes = {"low": [torch.bfloat16] * 3, "mixed": [torch.bfloat16, torch.float16, torch.bfloat16]}
    dtypes |= {"double": [torch.float64, torch.float32, torch.float64], "norm": [torch.float32] * 3}
    made = {name: random_case((6, 6), 2, seed=seed) for seed, name in enumerate(dtypes)}
    models = [
        {name: [base, *targets][i].to(dtypes[name][i]) for name, (base, targets) in made.items()}
        | {"counter": torch.tensor(7)}
        for i in range(3)
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = merge_state_dicts(models, method, base=0)
    of = {"low": torch.bfloat16, "mixed": torch.float32, "double": torch.float64, "norm": torch.float32}
    for name, dtype in of.items():
        expected = merge_tensors([model[name].to(dtype) for model in models], method, base_index=0)
        assert merged[name].dtype == dtype
        assert torch.equal(merged[name], expected)
    assert (merged["counter"], merged["counter"].dtype) == (7, torch.int64)
    for dtype, out_dtype in ((torch.bfloat16, None), (None, torch.bfloat16), (torch.float64, torch.float32)):
        found = merge_state_dicts(models, method, base=0, dtype=dtype, out_dtype=out_dtype)["norm"]
        expected = merge_tensors([m["norm"].to(dtype or torch.float32) for m in models], method, base_index=0)
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
def test_weights_of_models_in_a_recipe_and_in_memory(method, tmp_path, base, targets):
    recipe = recipe_of(base, targets, method)
    recipe["models"][0]["parameters"] = {"weight": [0.25, 0.5]}  # a gradient over the layers
    recipe["models"][1]["parameters"] = {"weight": [{"filter": "mlp", "value": 0}, {"value": 2}]}
    with record_coefficients() as record:
        merged = run(recipe, tmp_path / "out")
    models = tensors_of(base, *targets)
    function = sce if method == "fusechat_sce" else varm
    for name, tensor in merged.items():
        first = 0.25 if "layers.0" in name or "embed" in name or "layers" not in name else 0.5
        weights = [first, 0 if "mlp" in name else 2]
        expected = function(models[0][name], [model[name] for model in models[1:]], weights=weights)
        assert torch.equal(tensor, expected.tensor), name
        shown = record.tensors[name].parameters["weight"]
        assert list(shown.values()) == weights
        np.testing.assert_allclose(list(record.tensors[name].coefficients.values()), expected.coefficients)
    tensors = [model["model.norm.weight"] for model in models]
    expected = function(tensors[0], tensors[1:], weights=[0.5, 2]).tensor
    assert torch.equal(merge_tensors(tensors, method, base_index=0, parameters={"weight": [0.5, 2]}), expected)
    plain = run(recipe_of(base, targets, method), tmp_path / "plain")
    ones = run(recipe_of(base, targets, method, {"weight": 1}), tmp_path / "ones")
    assert all(torch.equal(plain[name], ones[name]) for name in plain)


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
        merged = merge_state_dicts(
            models, "varm", base=0, parameters={"granularity": granularity, "aggregation": aggregation}
        )
    for name, tensor in merged.items():
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
    tensors = [torch.zeros(3), torch.ones(3)]
    with pytest.raises(MergeError, match=r"passes one tensor alone.*granularity: matrix"):
        merge_tensors(
            tensors, "varm", base_index=0, name="model.layers.0.mlp.w", parameters={"granularity": granularity}
        )


def test_a_module_that_the_name_does_not_tell_is_named():
    models = [{"a.0.frobnicator.weight": torch.zeros(2), "a.0.mlp.weight": torch.zeros(2)} for _ in range(2)]
    with pytest.raises(MergeError, match=r"a\.0\.frobnicator\.weight.*granularity: matrix or layer"):
        merge_state_dicts(models, "varm", base=0, parameters={"granularity": "module"})


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize(
    ("dtype", "tie"), [("float32", True), ("bfloat16", False), ("float16", False), ("float64", True)]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_graph_merges_as_in_memory_in_the_dtype_of_the_recipe(tmp_path, method, dtype, tie):
    base, targets = family(tmp_path, 3, tie=tie)
    parameters = {"select_topk": 0.3} if method == "fusechat_sce" else {}
    merged = run(recipe_of(base, targets, method, parameters, dtype=dtype), tmp_path / "out")
    models = [{n: t.to(getattr(torch, dtype)) for n, t in each.items()} for each in tensors_of(base, *targets)]
    assert_equal(merged, merge_state_dicts(models, method, base=0, parameters=parameters))
    assert ("lm_head.weight" in merged) == (not tie)


@pytest.mark.parametrize("method", METHODS)
def test_base_listed_among_the_models_changes_nothing(tmp_path, method, base, targets):
    one = run(recipe_of(base, targets, method), tmp_path / "one")
    assert_equal(run(recipe_of(base, [base, *targets], method), tmp_path / "other"), one)


@pytest.mark.parametrize("granularity", UNITS)
def test_units_in_a_graph_are_those_in_memory(tmp_path, granularity):
    """With a cast on the way: the siblings' statistics are taken in the planned dtype, as the merge is."""
    base, targets = family(tmp_path, 3, tie=True)
    parameters = {"granularity": granularity}
    merged = run(recipe_of(base, targets, "varm", parameters, dtype="bfloat16"), tmp_path / "out")
    models = [{name: t.bfloat16() for name, t in model.items()} for model in tensors_of(base, *targets)]
    expected = merge_state_dicts(models, "varm", base=0, parameters=parameters)
    assert_equal(merged, expected)


def test_parameters_by_filter_and_gradient(tmp_path, base, targets):
    granularity = [{"filter": "mlp", "value": "layer"}, {"value": "matrix"}]
    topk = [{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 1.0}]
    mlp, attention = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    with record_coefficients() as units:
        run(recipe_of(base, targets, "varm", {"granularity": granularity}), tmp_path / "varm")
    assert (units.tensors[mlp].unit, units.tensors[attention].unit) == ("model.layers.1", None)
    with record_coefficients() as record:
        run(recipe_of(base, targets, parameters={"select_topk": topk}), tmp_path / "sce")
    selected = {name: each.parameters["select_topk"] for name, each in record.tensors.items()}
    assert selected[mlp.replace("1", "0")] == pytest.approx(0.2)
    assert (selected[mlp], selected[attention]) == (pytest.approx(0.6), 1)
    assert record.tensors[mlp].selected == pytest.approx(0.6, abs=0.01)


def test_units_with_a_tokenizer_configured(tmp_path, base, targets):
    parameters = {"granularity": "layer"}
    merged = run(recipe_of(base, targets, "varm", parameters, tokenizer={"source": "base"}), tmp_path / "out")
    assert_equal(merged, merge_state_dicts(tensors_of(base, *targets), "varm", base=0, parameters=parameters))


def test_model_unit_with_a_tokenizer_is_a_named_error(tmp_path, base, targets):
    with pytest.raises(MergeError, match=r"embed_tokens.* is loaded by PermutedVocabulary.*granularity: matrix"):
        run(recipe_of(base, targets, "varm", {"granularity": "model"}, tokenizer={"source": "base"}), tmp_path / "out")


def sliced(base, targets, ranges, **more):
    models = [base, *targets]
    slices = [
        {"sources": [{"model": str(m), "layer_range": list(r)} for m, r in zip(models, each, strict=True)]}
        for each in ranges
    ]
    return {"merge_method": "varm", "base_model": str(base), "slices": slices, "dtype": "float32", **more}


def test_slices_that_rename_tensors_are_refused_beyond_a_matrix(tmp_path, base, targets):
    shifted = sliced(base, targets, [[(1, 2)] * 3, [(0, 1)] * 3])
    assert len(run(shifted, tmp_path / "matrix")) == 21
    for granularity in UNITS:
        recipe = {**shifted, "parameters": {"granularity": granularity}}
        with pytest.raises(MergeError, match=r"not possible with these `slices:`.*layers\.[01]\..*is.*layers\.[01]\."):
            run(recipe, tmp_path / granularity)


def test_slices_that_keep_names_are_fine(tmp_path, base, targets):
    parameters = {"granularity": "layer"}
    merged = run(sliced(base, targets, [[(0, 1)] * 3, [(1, 2)] * 3], parameters=parameters), tmp_path / "sliced")
    expected = run(recipe_of(base, targets, "varm", parameters), tmp_path / "whole")
    assert_equal(merged, expected)


def merge_files(models, tmp_path, **recipe):
    """By mergekit-pytorch."""
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(len(models))]
    for path, model in zip(paths, models, strict=True):
        save_file(model, path)
    config = RawPyTorchMergeConfig(models=[{"model": p} for p in paths[1:]], base_model=paths[0], **recipe)
    Executor(plan_flat_merge(config, str(tmp_path / "out"), False, False, MergeOptions())).execute()
    return load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_mergekit_pytorch(tmp_path, method):
    merged = merge_files(state_dicts(), tmp_path, merge_method=method, dtype="bfloat16")
    assert_equal(merged, merge_state_dicts(state_dicts(), method, base=0, dtype=torch.bfloat16))


def test_mergekit_pytorch_knows_no_units(tmp_path):
    with pytest.raises(MergeError, match=r"TensorDictWrapper.*granularity: matrix"):
        merge_files(state_dicts()[:2], tmp_path, merge_method="varm", parameters={"granularity": "model"})


def test_mergekit_multi(tmp_path):
    from click.testing import CliRunner
    from mergekit.scripts.multimerge import main

    base, targets = family(tmp_path, 2)
    first = {"name": "first", **recipe_of(base, targets, "varm", {"granularity": "module"})}
    final = recipe_of(base, ["first", targets[0]], "fusechat_sce", {"select_topk": 0.5})
    (tmp_path / "multi.yml").write_text(yaml.safe_dump_all([first, final]))
    arguments = [str(tmp_path / "multi.yml"), "--out-path", str(tmp_path / "out"), "-I", str(tmp_path / "steps")]
    result = CliRunner().invoke(main, [*arguments, "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0
    step = merge_state_dicts(tensors_of(base, *targets), "varm", base=0, parameters={"granularity": "module"})
    models = [tensors_of(base)[0], step, tensors_of(targets[0])[0]]
    expected = merge_state_dicts(models, "fusechat_sce", base=0, parameters={"select_topk": 0.5})
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), expected)


def optional_task(method, refs, parameters):
    weight = WeightInfo(name="model.layers.0.self_attn.q_proj.bias", optional=True)
    return ExecuteMergeMethodTask(
        method_name=method,
        gather_tensors=GatherTensors(weight_info=ImmutableMap(dict.fromkeys(refs, weight))),
        model_order=refs,
        base_model=refs[0],
        output_weight=weight,
        parameters=ImmutableMap(parameters),
        input_parameters=ImmutableMap({ref: ImmutableMap({"weight": 1.0}) for ref in refs}),
    )


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("fusechat_sce", {"select_topk": 1.0, "variant": "paper", "int8_mask": False}),
        ("varm", {"granularity": "matrix", "aggregation": "elements"}),
    ],
)
def test_optional_weights(method, parameters):
    refs = tuple(ModelReference.model_validate(name) for name in ("base", "a", "b"))
    task = optional_task(method, refs, parameters)
    base, first, second = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]), torch.tensor([1.0, 3.0])
    both = task.execute({refs[0]: base, refs[1]: first, refs[2]: second})
    torch.testing.assert_close(both, merge_tensors([base, first, second], method, base_index=0))
    # One target lacks it: the others decide. None has it: the base's. The base lacks it: nothing to measure against.
    torch.testing.assert_close(task.execute({refs[0]: base, refs[2]: second}), second)
    torch.testing.assert_close(task.execute({refs[0]: base}), base)
    with pytest.raises(ValueError, match=r"Base input is not present.*q_proj\.bias"):
        task.execute({refs[1]: first, refs[2]: second})


def test_one_target_below_one_is_named_with_its_tensor(tmp_path):
    base, targets = family(tmp_path, 1)
    with pytest.raises(MergeError, match=r"^\S+: select_topk is 0.5 with one target"):
        run(recipe_of(base, targets, parameters={"select_topk": 0.5}), tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_named_with_tensor_and_model(tmp_path, method):
    base, targets = family(tmp_path, 2)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(targets[1], lambda tensors: tensors[name][0].fill_(float("nan")))
    with pytest.raises(MergeError, match=rf"{name}: NaN or Inf in the weights of \S*target2:"):
        run(recipe_of(base, targets, method), tmp_path / "out")


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


def every_architecture():
    from mergekit.architecture.json_definitions import JSON_ARCHITECTURES

    for architecture in JSON_ARCHITECTURES:
        for module in architecture.modules.values():
            definition = module.architecture.definition
            templates = [w.name for w in definition.layer_templates.weights if "${layer_index}" in w.name]
            names = [name.replace("${layer_index}", "3") for name in templates]
            for weight in (*definition.pre_weights, *definition.post_weights):
                unit_of((module.weight_prefix or "") + weight.name.replace("${num_layers+1}", "5"), "module")
            yield architecture.expected_model_type, [(module.weight_prefix or "") + name for name in names]


def test_units_of_every_architecture_that_mergekit_defines():
    """Every numbered tensor of every definition has a layer and a module."""
    seen = 0
    for model_type, names in every_architecture():
        for name in names:
            layer = unit_of(name, "layer")
            assert name.startswith(layer + "."), (model_type, name)
            assert layer.endswith(".3") or layer == "3", (model_type, name)
            assert unit_of(name, "module").startswith(layer + "."), (model_type, name)
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


def merge_small(method="fusechat_sce", name="w", **parameters):
    return merge_tensors(
        [ZERO, SMALL, LARGE], method, ids=["base", "a", "b"], base_index=0, name=name, parameters=parameters
    )


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
        ids = ["base", "a|b", "<img src=x onerror=alert(1)>"]
        merge_tensors([ZERO, SMALL, LARGE], "fusechat_sce", ids=ids, base_index=0, name="w")
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
