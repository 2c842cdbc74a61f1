"""What a merge will take before its targets exist: they have the pivot's tensors, by name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusekit.capturing.estimate import itemsize, shape_of
from fusekit.capturing.models import Checkpoint
from fusekit.hub import DTYPES, Headers, TensorHeader, read_headers
from fusekit.resources import Need

_SIZES = dict(DTYPES.values())


def expected_needs(checkpoint: Checkpoint, section: Mapping[str, Any], targets: int, final: Path) -> list[Need]:
    """Disk and memory of a merge of a pivot and ``targets`` models like it, as the merge itself will estimate them.

    Args:
        checkpoint: the pivot.
        section: ``merge`` of the recipe.
        targets: how many there will be.
        final: where the merged model will be.
    """
    from mergekit.options import MergeOptions

    from fusekit.merging.estimate import estimate
    from fusekit.merging.plan import Plan, PlannedTensor

    headers = _headers(checkpoint)
    tensors = []
    for name, header in headers.items():
        dtype = str(section.get("dtype") or header.dtype)
        inputs = dict.fromkeys(range(targets + 1), header)
        loaded = len(inputs) * header.elements * itemsize(dtype)
        copied = loaded if dtype != header.dtype else 0
        out = str(section.get("out_dtype") or dtype)
        tensors.append(PlannedTensor(name, header.shape, out, False, inputs, loaded, copied))
    method = str(section.get("merge_method"))
    return estimate(Plan(method, method, tensors, []), [], MergeOptions(quiet=True), final)


def _headers(checkpoint: Checkpoint) -> Headers:
    """Of the checkpoint's files, or such as make up its size where they are not here."""
    files = [checkpoint.folder / name for name in checkpoint.weights if name.endswith(".safetensors")]
    if files and all(path.is_file() for path in files):
        found: Headers = {}
        for path in files:
            found |= read_headers(path, checkpoint.choice.model)
        return found
    shape = shape_of(checkpoint.config)
    dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    size = _SIZES.get(dtype, 4)
    left, found = checkpoint.weight_bytes // size, {}
    sizes = [(shape.vocabulary, shape.hidden)]
    while left > 0:
        rows, columns = sizes[0] if not found else (shape.wide, shape.hidden)
        rows = max(1, min(rows, left // columns))
        found[f"tensor {len(found)}"] = TensorHeader(dtype, (rows, columns), "(not here)", size)
        left -= rows * columns
    return found
