"""The merge methods that mergekit sees: `fusechat_sce`, `varm` and `widen`. Each is one call to a function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any

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
from pydantic import Field

from fusekit import mergekit_private
from fusekit.errors import MergeError
from fusekit.merge_methods.fusion_vectors import NonFiniteError
from fusekit.merge_methods.provenance import TensorRecord, active_records, by_model
from fusekit.merge_methods.sce import Variant, check_parameters, sce, sce_with_gradients
from fusekit.merge_methods.units import coefficients_in_graph, coefficients_in_memory, unit_of
from fusekit.merge_methods.varm import Aggregation, Granularity, varm, varm_elementwise, varm_with_gradients
from fusekit.merge_methods.widen import Ties, widen

_CONTRACT = InputContract(base=BasePolicy.REQUIRED, min_non_base=1)
_UNITS = ("module", "layer", "model")
SCALES = ("_scale_inv", "_scale", ".absmax", ".quant_map")
"""What scales of quantised weights are called: the name of the weight and one of these."""
_HEADS = ("lm_head", "embed_out", "output", "output_layer", "score")


def _shared(name: str, value_type: Any, default: Any, description: str) -> ParameterSpec:
    return ParameterSpec(name, value_type, ParameterScope.SHARED, default=default, description=description)


_WEIGHT = ParameterSpec(
    "weight", float, ParameterScope.NON_BASE, default=1.0, description="factor of a model's contribution"
)


class FuseChatSCE(GroupMergeMethod):
    """SCE of FuseChat: select the elements that vary most, weigh the targets by energy, erase minority signs.

    Use it to merge several fine-tunes of one base, whose fusion vectors it weighs matrix by matrix without any tuning.
    Inputs: a base and one or more fine-tunes of it. Key parameter: `select_topk`, the share of the elements that is
    kept (FuseChat-7B: 0.1, FuseO1: 1.0; a share below 1 needs two or more fine-tunes). `variant` picks between the
    paper's form and the two that its published codes run. `weight`, of a model, is a factor of its fusion vector in the
    vote and in the sum, not in the selection and the coefficients. Reference: arXiv 2408.07990, section 3.4.
    """

    spec = MergeMethodSpec(
        name="fusechat_sce",
        pretty_name="FuseChat SCE",
        reference_url="https://arxiv.org/abs/2408.07990",
        contract=_CONTRACT,
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
        parameters=(
            _shared("select_topk", Annotated[float, Field(gt=0, le=1)], 1.0, "share of varying elements to keep"),
            _shared("variant", Variant, "paper", "paper, renormalized, or fuseai"),
            _shared("int8_mask", bool, False, "accepted as in mergekit's sce; the masks here take no memory"),
            _WEIGHT,
        ),
    )

    def check_parameters(self, n_targets: int, parameters: Mapping[str, Any], tensor_name: str) -> None:
        """Raise MergeError if a tensor of `n_targets` fine-tunes cannot be merged with these parameters."""
        try:
            check_parameters(n_targets, parameters["select_topk"], parameters["variant"])
        except MergeError as error:
            raise MergeError(f"{tensor_name}: {error}") from None

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge one tensor. Parameters as in `spec`; returns the inputs' shape and dtype."""
        tensors = [entry.tensor for entry in group.non_base]
        settings = {key: parameters[key] for key in ("select_topk", "variant")}
        weights = parameters["weight"].values_for(group.non_base)
        with _named(group):
            merged = sce(group.base.tensor, tensors, weights=weights, count_erased=bool(active_records()), **settings)
            result = merged.tensor
            if _needs_gradient(group):
                result = sce_with_gradients(group.base.tensor, tensors, weights=weights, **settings)
        erased = None if merged.erased is None else _by_target(group, merged.erased)
        settings |= _shown(group, weights)
        _record(group, self.spec.name, settings, merged.coefficients, selected=merged.selected, erased=erased)
        return result


class VaRM(GroupMergeMethod):
    """VaRM of FuseChat v1: weigh the targets by how far they moved from the base, unit by unit.

    Use it for a weighted average of fine-tunes whose weights come from the models, with nothing to tune. Inputs: a base
    and one or more fine-tunes of it. Key parameter: `granularity`, the unit that shares weights; `matrix` is the
    paper's choice. `module`, `layer` and `model` need mergekit-yaml, mergekit-multi or merge_state_dicts, which know
    the other tensors. `weight`, of a model, is a factor of its term in the sum, not in the coefficients. Reference:
    arXiv 2402.16107, section 3.3.
    """

    spec = MergeMethodSpec(
        name="varm",
        pretty_name="VaRM",
        reference_url="https://arxiv.org/abs/2402.16107",
        contract=_CONTRACT,
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
        parameters=(
            _shared("granularity", Granularity, "matrix", "matrix, module, layer, model, or element"),
            _shared("aggregation", Aggregation, "elements", "of a unit's matrices: elements, or matrices"),
            _WEIGHT,
        ),
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
        settings = [(each["granularity"], each["aggregation"]) for each in parameters]
        if len(groups) > 1:
            parameters = [dict(each) for each in parameters]
            for setting in {each for each in settings if each[0] in _UNITS}:
                asking = {index for index, each in enumerate(settings) if each == setting}
                weights = coefficients_in_memory(groups, input_dtypes, *setting, asking)
                for index in asking:
                    parameters[index]["coefficients"] = weights[index]
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
        """Merge one tensor. `coefficients`: W of its unit, [K], if they are known already."""
        base, targets = group.base.tensor, [entry.tensor for entry in group.non_base]
        weights = weight.values_for(group.non_base)
        with _named(group):
            if granularity in _UNITS and coefficients is None:
                coefficients = coefficients_in_graph(group, granularity, aggregation)
            if granularity == "element":
                merged = varm_elementwise(base, targets, weights=weights)
            else:
                merged = varm(base, targets, coefficients=coefficients, weights=weights)
            result = merged.tensor
            if _needs_gradient(group):
                elementwise = granularity == "element"
                result = varm_with_gradients(
                    base, targets, elementwise=elementwise, coefficients=coefficients, weights=weights
                )
        unit = unit_of(str(group.metadata.name), granularity) if granularity in _UNITS else None
        settings = {"granularity": granularity, "aggregation": aggregation} | _shown(group, weights)
        _record(group, self.spec.name, settings, merged.coefficients, unit=unit)
        return result


class Widen(GroupMergeMethod):
    """WIDEN: weigh each column of a matrix by how far its magnitude and direction moved among the columns of its model.

    Use it to merge models that moved far from their base and differently far, as a chat model and a model of continued
    pre-training; between ordinary fine-tunes task arithmetic is usually better. Inputs: a base and one or more models
    of it. Key parameter: `threshold`, in units of a model's mean rank: columns above it keep their whole change. Rows
    of an input embedding, which are tokens, take the part of columns. Reference: arXiv 2408.03092.
    """

    spec = MergeMethodSpec(
        name="widen",
        pretty_name="WIDEN",
        reference_url="https://arxiv.org/abs/2408.03092",
        contract=_CONTRACT,
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
        parameters=(
            _shared("threshold", Annotated[float, Field(gt=0)], 1.0, "t: ranks above t times their mean are important"),
            _shared("score", float, 1.0, "s: the weight of important columns"),
            _shared("ties", Ties, "average", "ranks of equal changes: average, or index as published"),
        ),
    )

    def merge_group(self, group: TensorGroup, /, *, threshold: float, score: float, ties: Ties) -> torch.Tensor:
        """Merge one tensor. Parameters as in `spec`; returns the inputs' shape and dtype, without gradients."""
        settings: dict[str, Any] = {"threshold": threshold, "score": score, "ties": ties}
        targets = [entry.tensor for entry in group.non_base]
        with _named(group):
            if _needs_gradient(group):
                raise MergeError("widen gives no gradients: merge under torch.no_grad()")
            merged = widen(group.base.tensor, targets, columns_are_rows=_is_input_embedding(group), **settings)
        _record(group, self.spec.name, settings, merged.scores)
        return merged.tensor


def _by_target(group: TensorGroup, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    return by_model([entry.id for entry in group.non_base], values)


def _shown(group: TensorGroup, weights: Sequence[float]) -> dict[str, Any]:
    """The weights of models as a record has them: not at all where they are 1."""
    return {"weight": _by_target(group, weights)} if any(weight != 1 for weight in weights) else {}


def _record(group: TensorGroup, method: str, settings: dict[str, Any], coefficients: np.ndarray, **more: Any) -> None:
    """Take a tensor down in the records that were asked for. more: fields of TensorRecord."""
    entry = TensorRecord(method, settings, _by_target(group, coefficients), **more)
    for record in active_records():
        record.add(str(group.metadata.name), str(group.base.id), entry)


def _is_input_embedding(group: TensorGroup) -> bool:
    """Whether the rows of a matrix are tokens that the model reads; an output head is a matrix like others."""
    module = str(group.metadata.name or "").removesuffix(".weight").rpartition(".")[2]
    return group.metadata.vocabulary_axis == 0 and module not in _HEADS


@contextmanager
def _named(group: TensorGroup) -> Iterator[None]:
    """Puts the tensor's name, and for NaN the model's, in front of a MergeError from below."""
    prefix = f"{group.metadata.name}: " if group.metadata.name else ""
    try:
        for entry in group.entries:
            _refuse_codes(entry.id, str(group.metadata.name))
        yield
    except NonFiniteError:
        raise MergeError(f"{prefix}{_why_not_finite(group)}") from None
    except MergeError as error:
        raise MergeError(f"{prefix}{error}") from None


def _why_not_finite(group: TensorGroup) -> str:
    bad = [entry for entry in group.entries if not torch.isfinite(entry.tensor).all()]
    dtype = group.entries[0].tensor.dtype
    if not bad:
        return f"the difference of a model to the base overflows {dtype}; use dtype: float64, or check the models"
    names = ", ".join(str(entry.id) for entry in bad)
    loaders = mergekit_private.loaders()
    for entry in bad:
        with suppress(Exception):  # tensors of another name, or none in a file: then only the merged values are known
            stored = loaders[entry.id].get_tensor(group.metadata.name)
            if torch.isfinite(stored).all():
                return (
                    f"weights of {names} overflow {dtype}, whose largest number is {torch.finfo(dtype).max:.4g}: "
                    f"the file has up to {float(stored.abs().max()):.4g}; use dtype: bfloat16 or float32"
                )
    return (
        f"NaN or Inf in the weights of {names}; that checkpoint is damaged or comes from a diverged run: merge another "
        f"one (or it is too large for {dtype}, if it was cast to that)"
    )


def _refuse_codes(model: Any, name: str) -> None:
    """Raise MergeError where a model's file has scales beside a tensor, which then holds codes of quantised weights.

    In a graph the tensor itself does not show it: mergekit casts the codes to the `dtype` of the recipe.
    """
    loader = mergekit_private.loaders().get(model)
    scales = [] if loader is None else [name + end for end in SCALES if name + end in loader.index.tensor_paths]
    if scales:
        raise MergeError(
            f"{model} has quantised weights, {scales[0]} belongs to this tensor: merge the checkpoint that it was "
            "quantised from, or dequantise it first"
        )


def _needs_gradient(group: TensorGroup) -> bool:
    return torch.is_grad_enabled() and any(entry.tensor.requires_grad for entry in group.entries)


FUSECHAT_SCE, VARM, WIDEN = METHODS = (FuseChatSCE(), VaRM(), Widen())
