"""Fuse the knowledge of several large language models into one.

The public names are those of ``__all__`` and the subpackages ``alignment``, ``capturing``, ``data``, ``distillation``,
``evaluation``, ``merge_methods`` and ``merging``. ``import fusekit`` loads neither torch nor transformers: a name is
imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusekit.alignment.alignment import align as align
    from fusekit.alignment.vocabulary_map import build_vocabulary_map as build_vocabulary_map
    from fusekit.capturing.capture import capture as capture
    from fusekit.capturing.store import Store as Store
    from fusekit.distillation.arguments import FusionConfig as FusionConfig
    from fusekit.distillation.losses import fusion_loss as fusion_loss
    from fusekit.distillation.trainer import FusionTrainer as FusionTrainer
    from fusekit.errors import FusekitError as FusekitError
    from fusekit.evaluation import evaluate as evaluate
    from fusekit.generation import generate as generate
    from fusekit.merge_methods.sce import sce as sce
    from fusekit.merge_methods.varm import varm as varm
    from fusekit.merge_methods.widen import widen as widen
    from fusekit.merging import merge as merge
    from fusekit.pipeline.run import run as run
    from fusekit.recipe import load_recipe as load_recipe

__version__ = "0.1.0.dev0"

_HOMES = {
    "FusekitError": "errors",
    "FusionConfig": "distillation.arguments",
    "FusionTrainer": "distillation.trainer",
    "Store": "capturing.store",
    "align": "alignment",
    "build_vocabulary_map": "alignment",
    "capture": "capturing.capture",
    "evaluate": "evaluation",
    "fusion_loss": "distillation.losses",
    "generate": "generation",
    "load_recipe": "recipe",
    "merge": "merging",
    "run": "pipeline.run",
    "sce": "merge_methods",
    "varm": "merge_methods",
    "widen": "merge_methods",
}
"""The module below ``fusekit`` in which each public name is."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fusekit' has no attribute {name!r}")
    return getattr(import_module(f"fusekit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
