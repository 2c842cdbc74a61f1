"""The merge methods that mergekit sees: `fusechat_sce`, `varm` and `widen`. Each is one call to a function."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    PerInputValues,
    TensorGroup,
)
from mergekit.merge_methods.dtype import align_dtype
from pydantic import Field

from fusekit import mergekit_private
from fusekit.errors import MergeError
from fusekit.merge_methods.fusion_vectors import NonFiniteError, shares
from fusekit.merge_methods.provenance import TensorRecord, active_records
from fusekit.merge_methods.sce import Variant, sce
from fusekit.merge_methods.varm import (
    Aggregation,
    Granularity,
    MatrixStatistics,
    matrix_statistics,
    unit_coefficients,
    unit_of,
    varm,
    varm_elementwise,
)
from fusekit.merge_methods.widen import Ties, widen

_UNITS = ("module", "layer", "model")
SCALES = ("_scale_inv", "_scale", ".absmax", ".quant_map")
"""What scales of quantised weights are called: the name of the weight and one of these."""
UNQUANTISED = "merge the checkpoint that it was quantised from, or dequantise it first"
_HEADS = ("lm_head", "embed_out", "output", "output_layer", "score")
_EVERYWHERE = "use granularity: matrix, which works everywhere"


def _spec(name: str, pretty_name: str, paper: str, *parameters: ParameterSpec) -> MergeMethodSpec:
    return MergeMethodSpec(
        name=name,
        pretty_name=pretty_name,
        reference_url=f"https://arxiv.org/abs/{paper}",
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
        parameters=parameters,
    )


def _shared(name: str, value_type: Any, default: Any) -> ParameterSpec:
    return ParameterSpec(name, value_type, ParameterScope.SHARED, default)


_WEIGHT = ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0)


class FuseChatSCE(GroupMergeMethod):
    """SCE of FuseChat: select the elements that vary most, weigh the targets by energy, erase minority signs.

    Use it to merge several fine-tunes of one base, whose fusion vectors it weighs matrix by matrix without any tuning.
    Inputs: a base and one or more fine-tunes of it. Key parameter: `select_topk`, the share of the elements that is
    kept (FuseChat-7B: 0.1, FuseO1: 1.0; a share below 1 needs two or more fine-tunes). `variant` picks between the
    paper's form and the two that its published codes run. `weight`, of a model, is a factor of its fusion vector in the
    vote and in the sum, not in the selection and the coefficients. `int8_mask` is accepted as in mergekit's `sce`; the
    masks here take no memory. Reference: arXiv 2408.07990, section 3.4.
    """

    spec = _spec(
        "fusechat_sce",
        "FuseChat SCE",
        "2408.07990",
        _shared("select_topk", Annotated[float, Field(gt=0, le=1)], 1.0),
        _shared("variant", Variant, "paper"),
        _shared("int8_mask", bool, False),
        _WEIGHT,
    )

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        select_topk: float,
        variant: Variant,
        int8_mask: bool,  # noqa: ARG002
        weight: PerInputValues[float],
    ) -> torch.Tensor:
        weights = weight.values_for(group.non_base)
        settings: dict[str, Any] = {"select_topk": select_topk, "variant": variant}
        with _named(group) as (base, targets):
            merged = sce(base, targets, weights=weights, count_erased=bool(active_records()), **settings)
        erased = None if merged.erased is None else _by_target(group, merged.erased)
        settings |= _shown(group, weights)
        _record(group, self.spec.name, settings, merged.coefficients, selected=merged.selected, erased=erased)
        return merged.tensor


class VaRM(GroupMergeMethod):
    """VaRM of FuseChat v1: weigh the targets by how far they moved from the base, unit by unit.

    Use it for a weighted average of fine-tunes whose weights come from the models, with nothing to tune. Inputs: a base
    and one or more fine-tunes of it. Key parameter: `granularity`, the unit that shares weights; `matrix` is the
    paper's choice. `module`, `layer` and `model` need mergekit-yaml, mergekit-multi or merge_state_dicts, which know
    the other tensors. `aggregation` is that of a unit's matrices. `weight`, of a model, is a factor of its term in the
    sum, not in the coefficients. Reference: arXiv 2402.16107, section 3.3.
    """

    spec = _spec(
        "varm",
        "VaRM",
        "2402.16107",
        _shared("granularity", Granularity, "matrix"),
        _shared("aggregation", Aggregation, "elements"),
        _WEIGHT,
    )

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        # One call with all tensors of the models: the units are in it. (One tensor: the graph is asked for the others.)
        if len(groups) > 1:
            parameters = [dict(each) for each in parameters]
            settings = [(each["granularity"], each["aggregation"]) for each in parameters]
            for setting in {each for each in settings if each[0] in _UNITS}:
                weights = _coefficients_in_memory(groups, input_dtypes, *setting)
                for index, each in enumerate(settings):
                    if each == setting:
                        parameters[index]["coefficients"] = weights.get(index)
        merged: tuple[torch.Tensor, ...] = super()._execute(
            groups, parameters, options, input_dtypes=input_dtypes, out_dtype=out_dtype
        )
        return merged

    def merge_group(
        self,
        group: TensorGroup,
        /,
        *,
        granularity: Granularity,
        aggregation: Aggregation,
        weight: PerInputValues[float],
        coefficients: np.ndarray | None = None,
    ) -> torch.Tensor:
        """coefficients: W of the unit, [K], if they are known already."""
        weights, unit = weight.values_for(group.non_base), None
        with _named(group) as (base, targets):
            if granularity in _UNITS:
                unit = unit_of(str(group.metadata.name), granularity)
                if coefficients is None:
                    coefficients = _coefficients_in_graph(group, granularity, aggregation)
            if granularity == "element":
                merged = varm_elementwise(base, targets, weights=weights)
            else:
                merged = varm(base, targets, coefficients=coefficients, weights=weights)
        settings = {"granularity": granularity, "aggregation": aggregation} | _shown(group, weights)
        _record(group, self.spec.name, settings, merged.coefficients, unit=unit)
        return merged.tensor


class Widen(GroupMergeMethod):
    """WIDEN: weigh each column of a matrix by how far its magnitude and direction moved among the columns of its model.

    Use it to merge models that moved far from their base and differently far, as a chat model and a model of continued
    pre-training; between ordinary fine-tunes task arithmetic is usually better. Inputs: a base and one or more models
    of it. Key parameter: `threshold`, in units of a model's mean rank: columns above it get the weight `score`. `ties`
    says how equal changes are ranked. Rows of an input embedding, which are tokens, take the part of columns.
    Reference: arXiv 2408.03092.
    """

    spec = _spec(
        "widen",
        "WIDEN",
        "2408.03092",
        _shared("threshold", Annotated[float, Field(gt=0)], 1.0),
        _shared("score", float, 1.0),
        _shared("ties", Ties, "average"),
    )

    def merge_group(self, group: TensorGroup, /, **settings: Any) -> torch.Tensor:
        # The rows of a matrix are tokens that the model reads; an output head is a matrix like others.
        module = str(group.metadata.name).removesuffix(".weight").rpartition(".")[2]
        embedding = group.metadata.vocabulary_axis == 0 and module not in _HEADS
        with _named(group) as (base, targets):
            merged = widen(base, targets, columns_are_rows=embedding, **settings)
        _record(group, self.spec.name, settings, merged.scores)
        return merged.tensor


def _by_target(group: TensorGroup, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    return {str(entry.id): float(value) for entry, value in zip(group.non_base, values, strict=True)}


def _shown(group: TensorGroup, weights: Sequence[float]) -> dict[str, Any]:
    """The weights of models as a record has them: not at all where they are 1."""
    return {"weight": _by_target(group, weights)} if any(weight != 1 for weight in weights) else {}


def _record(group: TensorGroup, method: str, settings: dict[str, Any], coefficients: np.ndarray, **more: Any) -> None:
    """Add a tensor to the active records. more: fields of TensorRecord."""
    for record in active_records():
        record.base = str(group.base.id)
        entry = TensorRecord(method, settings, _by_target(group, coefficients), **more)
        record.tensors[str(group.metadata.name)] = entry


@contextmanager
def _named(group: TensorGroup) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Give the base and the targets, and put the tensor's name, and for NaN the model's, into a MergeError."""
    prefix = f"{group.metadata.name}: " if group.metadata.name else ""
    try:
        for entry in group.entries:
            _refuse_codes(entry.id, str(group.metadata.name))
        yield group.base.tensor, [entry.tensor for entry in group.non_base]
    except NonFiniteError:
        bad = ", ".join(str(entry.id) for entry in group.entries if not torch.isfinite(entry.tensor).all())
        dtype = group.base.tensor.dtype
        if bad:
            says = f"NaN or Inf in the weights of {bad}: they are broken, or overflow {dtype} (try dtype: float32)"
        else:
            says = f"the difference of a model to the base overflows {dtype}; use dtype: float64, or check the models"
        raise MergeError(f"{prefix}{says}") from None
    except MergeError as error:
        raise MergeError(f"{prefix}{error}") from None


def _refuse_codes(model: Any, name: str) -> None:
    """Raise MergeError where a model's file has scales beside a tensor, which then holds codes of quantised weights.

    In a graph the tensor itself does not show it: mergekit casts the codes to the `dtype` of the recipe.
    """
    loader = mergekit_private.loaders().get(model)
    scales = [] if loader is None else [name + end for end in SCALES if name + end in loader.index.tensor_paths]
    if scales:
        raise MergeError(f"{model} has quantised weights, {scales[0]} belongs to this tensor: {UNQUANTISED}")


# The units of VaRM that are larger than a matrix. mergekit hands a merge method one tensor and no view of the others.
# But the graph that it is running holds the tasks that load every other tensor, with dtype, aliases and tied names as
# planned, so those tasks are executed here. In memory (`merge_state_dicts`) all tensors are in one call.


def _coefficients_in_memory(
    groups: Sequence[TensorGroup],
    dtypes: Sequence[torch.dtype | None],
    granularity: Granularity,
    aggregation: Aggregation,
) -> dict[int, np.ndarray]:
    """W of the groups of one call by index, each over its unit; without those whose name does not tell a unit.

    dtypes: what each group is cast to before it is merged.
    """
    units: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        with suppress(MergeError):
            units.setdefault(unit_of(str(group.metadata.name), granularity), []).append(index)
    result: dict[int, np.ndarray] = {}
    for members in units.values():
        matrices = []
        for index in members:
            group = align_dtype(groups[index], dtypes[index])
            matrices.append(matrix_statistics(group.base.tensor, [entry.tensor for entry in group.non_base]))
        result |= dict.fromkeys(members, unit_coefficients(matrices, aggregation))
    return result


_Units = dict[str, list[Any]]
_Statistics = dict[Any, MatrixStatistics | None]
# Of every running graph: the tasks of every unit, and the statistics of the tensors met so far.
_runs: WeakKeyDictionary[Any, tuple[dict[Any, _Units], _Statistics]] = WeakKeyDictionary()
_lock = threading.RLock()  # under mergekit's multi-GPU executor several threads merge at once


def _coefficients_in_graph(group: TensorGroup, granularity: Granularity, aggregation: Aggregation) -> np.ndarray:
    """W of the unit that the tensor of `group` belongs to, one number per target of the group: float64 [K].

    Statistics of a tensor are computed once per run. Raises MergeError where the unit cannot be known: outside a
    mergekit graph, in `mergekit-pytorch`, where `slices:` renames tensors, and where a tokenizer changes a sibling.
    """
    running = mergekit_private.running_task()
    if running is None:
        raise MergeError(
            f"granularity {granularity!r} needs the other tensors of the unit, and this call passes one tensor alone; "
            f"call merge_state_dicts with whole models, or {_EVERYWHERE}"
        )
    task, graph = running
    # In an order that all tasks of one merge share.
    targets = sorted((model for model in set(task.model_order) if model != task.base_model), key=str)
    with _lock:
        units, statistics = _runs.setdefault(graph, ({}, {}))
        matrices = []
        for sibling in _siblings(units, graph, task, granularity):
            key = sibling.output_weight.name, _merge_of(task)
            if key not in statistics:
                if sibling is task:
                    tensors = {entry.id: entry.tensor for entry in group.entries}
                else:
                    tensors = _load(sibling, granularity, group.base.tensor.device)
                statistics[key] = _statistics(tensors, targets, task.base_model)
            matrices.append(statistics[key])
    weights = unit_coefficients([matrix for matrix in matrices if matrix is not None], aggregation)
    # An optional tensor may be missing from some of the targets.
    return shares(np.array([weights[targets.index(entry.id)] for entry in group.non_base]))


def _merge_of(task: Any) -> Any:
    """What the tasks of one merge have in common."""
    return task.method_name, task.base_model, frozenset(task.model_order)


def _siblings(known: dict[Any, _Units], graph: Any, task: Any, granularity: Granularity) -> list[Any]:
    """The tasks of the unit of ``task``, itself among them."""
    key = granularity, _merge_of(task)
    if key not in known:
        units = known[key] = {}
        for other in graph.tasks:
            if isinstance(other, type(task)) and _merge_of(other) == _merge_of(task):
                # A tensor whose unit its name does not tell is in none; if it asks for one itself, that is an error.
                with suppress(MergeError):
                    units.setdefault(unit_of(other.output_weight.name, granularity), []).append(other)
    return known[key][unit_of(task.output_weight.name, granularity)]


def _statistics(tensors: Mapping[Any, torch.Tensor], targets: list[Any], base: Any) -> MatrixStatistics | None:
    """None for a tensor that has no say: not floating-point, or missing from the base."""
    if base not in tensors or not all(tensor.is_floating_point() for tensor in tensors.values()):
        return None
    present = [target for target in targets if target in tensors]
    energies = np.zeros(len(targets))
    if present:
        dtype = tensors[base].dtype
        for target in present:
            dtype = torch.promote_types(dtype, tensors[target].dtype)
        matrix = matrix_statistics(tensors[base].to(dtype), [tensors[target].to(dtype) for target in present])
        energies[[targets.index(target) for target in present]] = matrix.energies
    return MatrixStatistics(energies, tensors[base].numel())


def _load(sibling: Any, granularity: str, device: torch.device) -> dict[Any, torch.Tensor]:
    """The tensors of another task, by model, as its graph will load them."""
    name, gather = sibling.output_weight.name, sibling.gather_tensors
    if type(gather).__name__ != "GatherTensors":
        raise MergeError(
            f"granularity {granularity!r} is not possible here: {name!r} is loaded by {type(gather).__name__} (a "
            f"configured tokenizer, --unsafe-truncate-embeddings or mergekit-pytorch); {_EVERYWHERE}"
        )
    for model, weight in gather.weight_info.items():
        if weight.name != name:
            raise MergeError(
                f"granularity {granularity!r} is not possible with these `slices:`: {name!r} of the output is "
                f"{weight.name!r} of {model}, so the units of the models do not correspond; {_EVERYWHERE}"
            )
    loaded = {key: load.execute() for key, load in gather.arguments().items()}
    return {model: tensor.to(device) for model, tensor in gather.execute(**loaded).items()}


FUSECHAT_SCE, VARM, WIDEN = METHODS = (FuseChatSCE(), VaRM(), Widen())
