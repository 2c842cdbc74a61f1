"""Which tensors share merge coefficients: the units of VaRM, told from the names of the tensors.

Source: FuseChat v1, arXiv 2402.16107, section 3.3 (matrix, module, layer, model). Every architecture that mergekit
defines numbers its layers in the tensor names, `<prefix>.<index>.<component>...`; the component names the module.
"""

from __future__ import annotations

import re

from fusekit.errors import MergeError
from fusekit.merge_methods.varm import Granularity

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
