"""mergekit's options for a fusion recipe: what each means for a run, and which of them can mean nothing there."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource
from mergekit.options import MergeOptions

from fusekit.errors import RecipeError

REFUSED = {
    "lora_merge_cache": "the targets of a fusion are whole models, so no adapter is merged into one: leave it out",
    "lora_merge_dtype": "the targets of a fusion are whole models, so no adapter is merged into one: leave it out",
    "lazy_unpickle": "targets are safetensors, which are read lazily anyway: leave it out",
    "unsafe_truncate_embeddings": "all targets have the pivot's vocabulary, so there is nothing to cut: leave it out",
    "allow_crimes": "all targets have the pivot's architecture, so there is nothing to allow: leave it out",
}
"""By option why it cannot mean anything for a run."""

OF_THE_RUN = ("quiet", "verbosity", "trust_remote_code", "transformers_cache")
"""Options that are for every stage, not only the merge."""


def options_for_run(context: click.Context, options: MergeOptions) -> dict[str, Any]:
    """The options of mergekit that were given, for the stage ``merge`` of a run.

    Raises RecipeError for one that can mean nothing there, and for a device that is not there.
    """
    given = {
        name
        for name in MergeOptions.model_fields
        if context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
    }
    for name in sorted(given & REFUSED.keys()):
        raise RecipeError(f"--{name.replace('_', '-')} with a fusion recipe: {REFUSED[name]}")
    if "safe_serialization" in given and not options.safe_serialization:
        raise RecipeError("fusekit publishes safetensors only: leave out --no-safe-serialization")
    _require_device(str(options.device))
    if given & {"gpu_rich", "cuda", "device"}:
        given |= {"device"}
    return {name: getattr(options, name) for name in sorted(given.difference(OF_THE_RUN))}


def _require_device(device: str) -> None:
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(
            f"the merge is asked to compute on {device}, but there is no CUDA device: leave the option out"
        )
