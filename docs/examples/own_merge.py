"""A merge method of one's own for mergekit, and the `fusekit` command that knows it.

    python docs/examples/own_merge.py merge docs/examples/own_merge.yml out/median
    python docs/examples/own_merge.py run recipes/demo-pairwise.yml out/demo-median \
        --set merge.merge_method=median_delta \
        --set 'merge.parameters={scale: 1.0}'

The median of the fusion vectors, element by element, on top of the base.
"""

from __future__ import annotations

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import BasePolicy, InputContract, OptionalTensorPolicy, TensorGroup
from mergekit.merge_methods.easy_define import merge_method


@merge_method(
    name="median_delta",
    pretty_name="Median of the fusion vectors",
    contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
    optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
)
def median_delta(group: TensorGroup, scale: float = 1.0) -> torch.Tensor:
    """Base + scale · median_j δ_j. Tensors of one shape; returns the base's dtype."""
    base = group.base.tensor
    deltas = torch.stack([entry.tensor.float() - base.float() for entry in group.non_base])
    return (base.float() + scale * deltas.median(dim=0).values).to(base.dtype)


if median_delta.spec.name not in {method.spec.name for method in registry.registered_methods()}:
    registry.register(median_delta)

if __name__ == "__main__":
    from fusekit.cli import main

    main()
