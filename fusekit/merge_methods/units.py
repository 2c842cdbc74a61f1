"""The units of VaRM that are larger than a matrix: which tensors they have, and their merge coefficients.

mergekit hands a merge method one tensor and no view of the others. But the graph that it is running holds the tasks
that load every other tensor, with dtype, aliases and tied names as planned, so those tasks are executed here. In memory
(`merge_state_dicts`) all tensors are in one call. Source of the units: FuseChat v1, arXiv 2402.16107, section 3.3.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fusekit import mergekit_private
from fusekit.errors import MergeError
from fusekit.merge_methods.fusion_vectors import shares
from fusekit.merge_methods.varm import Aggregation, Granularity, MatrixStatistics, matrix_statistics, unit_coefficients

if TYPE_CHECKING:
    from mergekit.merge_methods.base import TensorGroup

_EVERYWHERE = "use granularity: matrix, which works everywhere"

# Every architecture that mergekit defines numbers its layers in the tensor names, `<prefix>.<index>.<component>...`.
_LAYER = re.compile(r"^(?P<layer>(?:.*?\.)?\d+)\.(?P<rest>.+)$")
_SUBLAYER = re.compile(r"^(?P<sublayer>[a-z]+\.\d+)\.(?P<rest>.+)$")  # T5: encoder.block.0.layer.1.DenseReluDense.wo
_NORM = re.compile(r"norm\d*$|^ln($|_)|^ln\d+$", re.IGNORECASE)
_INNER_NORM = re.compile(r"\.(?P<norm>LayerNorm)\.")  # BERT: attention.output.LayerNorm closes the block
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MIXER = re.compile(r"^(mixer|mamba|conv|ssm|temporal_block|short_conv|rwkv|time_mix\w*)$", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_forward|DenseReluDense|moe|experts?$|^(linear_)?fc\d+$|^(intermediate|output|channel_mix\w*)$",
    re.IGNORECASE,
)


def unit_of(name: str, granularity: Granularity) -> str:
    """The name of the unit that a tensor belongs to.

    "matrix": the tensor itself. "model": all tensors. "layer": everything under one layer index. "module": within a
    layer its attention, its MLP (or experts), each norm. A tensor outside any layer (embeddings, final norm, head) is a
    unit of its own at both. Raises MergeError where the name does not tell the module.
    """
    if granularity == "model":
        return "model"
    match = _LAYER.match(name)
    if granularity in ("matrix", "element") or match is None:
        return name
    layer, rest = match["layer"], match["rest"]
    if granularity == "layer":
        return layer
    if granularity == "module":
        return f"{layer}.{_module(name, rest)}"
    raise MergeError(f"granularity is {granularity!r}, it must be one of matrix, module, layer, model, element")


def _module(name: str, rest: str) -> str:
    if sublayer := _SUBLAYER.match(rest):
        return f"{sublayer['sublayer']}.{_module(name, sublayer['rest'])}"
    if inner := _INNER_NORM.search(rest):
        return rest[: inner.end() - 1]
    component = rest.split(".", 1)[0]
    if component in ("weight", "bias", "linear", "wte"):
        return "module"  # the layer is one linear map or embedding, as in a Sequential
    if _NORM.search(component) or _ATTENTION.search(component) or _MIXER.search(component):
        return component
    if _MLP.search(component):
        return "mlp"
    raise MergeError(
        f"cannot tell which module tensor {name!r} belongs to: {component!r} names no attention, MLP or norm that is "
        "known; use granularity: matrix or layer (for all tensors, or for this one by a filter)"
    )


def coefficients_in_memory(
    groups: Sequence[TensorGroup],
    dtypes: Sequence[torch.dtype | None],
    granularity: Granularity,
    aggregation: Aggregation,
    asking: Collection[int],
) -> dict[int, np.ndarray]:
    """W for the groups of one in-memory call (`merge_state_dicts`), by index, each over the groups of its unit.

    dtypes: what each group is cast to before it is merged. asking: the groups that are merged at this granularity; a
    name that does not tell its unit is an error for them only.
    """
    from mergekit.merge_methods.dtype import align_dtype

    units: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        name = group.metadata.name
        if name is None:
            raise MergeError(f"tensor {index} has no name: granularity {granularity!r} needs names; {_EVERYWHERE}")
        try:
            units.setdefault(unit_of(name, granularity), []).append(index)
        except MergeError:
            if index in asking:
                raise
    result: dict[int, np.ndarray] = {}
    for members in units.values():
        if any(index in asking for index in members):
            aligned = [align_dtype(groups[index], dtypes[index]) for index in members]
            matrices = [
                matrix_statistics(group.base.tensor, [entry.tensor for entry in group.non_base]) for group in aligned
            ]
            result |= dict.fromkeys(members, unit_coefficients(matrices, aggregation))
    return result


@dataclass
class _Run:
    """What is known of a running graph: the tasks of every unit, and the statistics of the tensors met so far."""

    units: dict[Any, dict[str, list[Any]]] = field(default_factory=dict)
    statistics: dict[Any, MatrixStatistics | None] = field(default_factory=dict)


_runs: WeakKeyDictionary[Any, _Run] = WeakKeyDictionary()  # by the graph
_lock = threading.RLock()  # under mergekit's multi-GPU executor several threads merge at once


def coefficients_in_graph(group: TensorGroup, granularity: Granularity, aggregation: Aggregation) -> np.ndarray:
    """W of the unit that the tensor of `group` belongs to, one number per target of the group: float64 [K].

    Statistics of a tensor are computed once per run. Raises MergeError where the unit cannot be known: outside a
    mergekit graph, in `mergekit-pytorch`, where `slices:` renames tensors, and where a tokenizer changes a sibling.
    """
    running = mergekit_private.running_task()
    if running is None:
        raise MergeError(
            f"granularity {granularity!r} needs the other tensors of the unit of {group.metadata.name!r}, and this "
            f"call passes one tensor alone; call merge_state_dicts with whole models, or {_EVERYWHERE}"
        )
    task, graph = running
    # In an order that all tasks of one merge share.
    targets = sorted((model for model in set(task.model_order) if model != task.base_model), key=str)
    with _lock:
        run = _runs.setdefault(graph, _Run())
        matrices = []
        for sibling in _siblings(run, graph, task, granularity):
            key = sibling.output_weight.name, _merge_of(task)
            if key not in run.statistics:
                if sibling is task:
                    tensors = {entry.id: entry.tensor for entry in group.entries}
                else:
                    tensors = _load(sibling, granularity, group.base.tensor.device)
                run.statistics[key] = _statistics(tensors, targets, task.base_model)
            matrices.append(run.statistics[key])
    weights = unit_coefficients([matrix for matrix in matrices if matrix is not None], aggregation)
    # An optional tensor may be missing from some of the targets.
    return shares(np.array([weights[targets.index(entry.id)] for entry in group.non_base]))


def _merge_of(task: Any) -> Any:
    """What the tasks of one merge have in common."""
    return task.method_name, task.base_model, frozenset(task.model_order)


def _siblings(run: _Run, graph: Any, task: Any, granularity: Granularity) -> list[Any]:
    """The tasks of the unit of ``task``, itself among them."""
    key = granularity, _merge_of(task)
    if key not in run.units:
        units: dict[str, list[Any]] = {}
        for other in graph.tasks:
            if isinstance(other, type(task)) and _merge_of(other) == _merge_of(task):
                # A tensor whose unit its name does not tell is in none; if it asks for one itself, that is an error.
                with suppress(MergeError):
                    units.setdefault(unit_of(other.output_weight.name, granularity), []).append(other)
        run.units[key] = units
    return run.units[key][unit_of(task.output_weight.name, granularity)]


def _statistics(tensors: dict[Any, torch.Tensor], targets: list[Any], base: Any) -> MatrixStatistics | None:
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
    name, gather = sibling.output_weight.name, sibling.gather_tensors
    reason = {
        "GatherTensors": None,
        "TensorDictWrapper": "mergekit-pytorch gives no architecture to tell units by",
        "PermutedVocabulary": f"the configured tokenizer permutes {name!r}, whose merged shape is not known yet",
        "TruncatedVocabulary": f"--unsafe-truncate-embeddings changes the shape of {name!r}",
    }.get(type(gather).__name__, f"{name!r} is loaded by {type(gather).__name__}")
    if reason is not None:
        raise MergeError(f"granularity {granularity!r} is not possible here: {reason}; {_EVERYWHERE}")
    for model, weight in gather.weight_info.items():
        if weight.name != name:
            raise MergeError(
                f"granularity {granularity!r} is not possible with these `slices:`: {name!r} of the output is "
                f"{weight.name!r} of {model}, so the units of the models do not correspond; {_EVERYWHERE}"
            )
    loaded = {key: load.execute() for key, load in gather.arguments().items()}
    return {model: tensor.to(device) for model, tensor in gather.execute(**loaded).items()}
