"""Statistics of the other tensors of a VaRM unit, while mergekit merges one tensor at a time.

mergekit hands a merge method one tensor and no view of the others. But the graph that it is running holds the tasks
that load every other tensor, with dtype, aliases and tied names as planned, so those tasks are executed here. The
graph is found on the call stack: there is no other way from a method to the executor that called it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.dtype import align_dtype

from fusekit.errors import MergeError
from fusekit.merge_methods.units import unit_of
from fusekit.merge_methods.varm import Aggregation, Granularity, MatrixStatistics, matrix_statistics, unit_coefficients

if TYPE_CHECKING:
    from mergekit.graph import TaskUniverse
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

_EVERYWHERE = "use granularity: matrix, which works everywhere"
_lock = threading.RLock()  # under mergekit's multi-GPU executor several threads merge at once


@dataclass
class _Run:
    """What is known of a running graph: the tasks of every unit, and the statistics of the tensors met so far."""

    units: dict[tuple[str, Any], dict[str, list[ExecuteMergeMethodTask]]] = field(default_factory=dict)
    statistics: dict[tuple[str, Any], MatrixStatistics | None] = field(default_factory=dict)


_runs: WeakKeyDictionary[TaskUniverse, _Run] = WeakKeyDictionary()


def coefficients_in_graph(group: TensorGroup, granularity: Granularity, aggregation: Aggregation) -> np.ndarray:
    """W of the unit that the tensor of `group` belongs to, one number per target of the group: float64 [K].

    Statistics of a tensor are computed once per run. Raises MergeError where the unit cannot be known: outside a
    mergekit graph, in `mergekit-pytorch`, where `slices:` renames tensors, and where a tokenizer changes a sibling.
    """
    task, universe = _running(group, granularity)
    with _lock:
        run = _runs.setdefault(universe, _Run())
        unit = unit_of(task.output_weight.name, granularity)
        siblings = _units(run, universe, task, granularity)[unit]
        matrices = [_sibling_statistics(run, sibling, task, group, granularity) for sibling in siblings]
    weights = unit_coefficients([matrix for matrix in matrices if matrix is not None], aggregation)
    return _of_group(weights, _targets(task), group)


def _merge_of(task: ExecuteMergeMethodTask) -> Any:
    """What the tasks of one merge have in common."""
    return task.method_name, task.base_model, frozenset(task.model_order)


def _units(
    run: _Run, universe: TaskUniverse, task: ExecuteMergeMethodTask, granularity: Granularity
) -> dict[str, list[ExecuteMergeMethodTask]]:
    key = granularity, _merge_of(task)
    if key not in run.units:
        units: dict[str, list[ExecuteMergeMethodTask]] = {}
        for other in universe.tasks:
            if isinstance(other, type(task)) and _merge_of(other) == _merge_of(task):
                # A tensor whose unit its name does not tell is in none; if it asks for one itself, that is an error.
                with suppress(MergeError):
                    units.setdefault(unit_of(other.output_weight.name, granularity), []).append(other)
        run.units[key] = units
    return run.units[key]


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
        if not any(index in asking for index in members):
            continue
        matrices = [_group_statistics(align_dtype(groups[index], dtypes[index])) for index in members]
        weights = unit_coefficients(matrices, aggregation)
        for index in members:
            result[index] = weights
    return result


def _group_statistics(group: TensorGroup) -> MatrixStatistics:
    return matrix_statistics(group.base.tensor, [entry.tensor for entry in group.non_base])


def _running(group: TensorGroup, granularity: str) -> tuple[ExecuteMergeMethodTask, TaskUniverse]:
    from mergekit.graph import Executor
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    task = None
    frame = sys._getframe(1)
    while frame is not None:
        owner: Any = frame.f_locals.get("self")
        if task is None and isinstance(owner, ExecuteMergeMethodTask):
            task = owner
        elif task is not None and isinstance(owner, Executor):
            return task, owner.universe
        frame = frame.f_back  # type: ignore[assignment]
    raise MergeError(
        f"granularity {granularity!r} needs the other tensors of the unit of {group.metadata.name!r}, and this call "
        f"passes one tensor alone; call merge_state_dicts with whole models, or {_EVERYWHERE}"
    )


def _targets(task: ExecuteMergeMethodTask) -> list[Any]:
    """The targets in an order that all tasks of one merge share."""
    return sorted((model for model in set(task.model_order) if model != task.base_model), key=str)


def _of_group(weights: np.ndarray, targets: list[Any], group: TensorGroup) -> np.ndarray:
    """The weights of the targets that have this tensor: an optional tensor may be missing from some."""
    kept = np.array([weights[targets.index(entry.id)] for entry in group.non_base])
    total = kept.sum()
    return kept / total if total > 0 else np.full(len(kept), 1 / len(kept))


def _sibling_statistics(
    run: _Run,
    sibling: ExecuteMergeMethodTask,
    task: ExecuteMergeMethodTask,
    group: TensorGroup,
    granularity: str,
) -> MatrixStatistics | None:
    """None for a tensor that has no say: not floating-point, or missing from the base."""
    key = sibling.output_weight.name, _merge_of(task)
    if key not in run.statistics:
        if sibling is task:
            tensors = {entry.id: entry.tensor for entry in group.entries}
        else:
            tensors = _load(sibling, granularity, group.base.tensor.device)
        run.statistics[key] = _statistics_of(tensors, _targets(task), task.base_model)
    return run.statistics[key]


def _statistics_of(tensors: dict[Any, torch.Tensor], targets: list[Any], base: Any) -> MatrixStatistics | None:
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


def _load(sibling: ExecuteMergeMethodTask, granularity: str, device: torch.device) -> dict[Any, torch.Tensor]:
    from mergekit.io.tasks import GatherTensors

    name, gather = sibling.output_weight.name, sibling.gather_tensors
    if not isinstance(gather, GatherTensors):
        reason = {
            "TensorDictWrapper": "mergekit-pytorch gives no architecture to tell units by",
            "PermutedVocabulary": f"the configured tokenizer permutes {name!r}, whose merged shape is not known yet",
            "TruncatedVocabulary": f"--unsafe-truncate-embeddings changes the shape of {name!r}",
        }.get(type(gather).__name__, f"{name!r} is loaded by {type(gather).__name__}")
        raise MergeError(f"granularity {granularity!r} is not possible here: {reason}; {_EVERYWHERE}")
    for model, weight in gather.weight_info.items():
        if weight.name != name:
            raise MergeError(
                f"granularity {granularity!r} is not possible with these `slices:`: {name!r} of the output is "
                f"{weight.name!r} of {model}, so the units of the models do not correspond; {_EVERYWHERE}"
            )
    loaded = {key: load.execute() for key, load in gather.arguments().items()}
    return {model: tensor.to(device) for model, tensor in gather.execute(**loaded).items()}
