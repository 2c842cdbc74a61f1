"""Exact alignment of any two tokenizers, and maps between their vocabularies.

>>> from fusekit.alignment import align, build_vocabulary_map
>>> alignment = align("Hello world", pivot_tokenizer, source_tokenizer)
>>> alignment.source_at             # per pivot position the source position with the same text consumed, or -1
>>> vocabulary_map = build_vocabulary_map(pivot_tokenizer, source_tokenizer, method="prefix")
>>> vocabulary_map.project(ids, logprobs, tail)         # top-k rows of the source in the pivot's vocabulary

Needs numpy, scipy, rapidfuzz and tokenizers; imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fusekit.types import TokenizedText, TopK

if TYPE_CHECKING:
    from fusekit.alignment.alignment import TokenAlignment, align, align_tokens
    from fusekit.alignment.cases import Case, plan_rows, source_positions
    from fusekit.alignment.ends import tokenize
    from fusekit.alignment.rows import AlignedRows, Predictions, project_rows, project_rows_by_rule
    from fusekit.alignment.surfaces import Surfaces, vocabulary_surfaces
    from fusekit.alignment.vocabulary_map import MappingStatistics, VocabularyMap, build_vocabulary_map, count_mappings

__all__ = [
    "AlignedRows",
    "Case",
    "MappingStatistics",
    "Predictions",
    "Surfaces",
    "TokenAlignment",
    "TokenizedText",
    "TopK",
    "VocabularyMap",
    "align",
    "align_tokens",
    "build_vocabulary_map",
    "count_mappings",
    "plan_rows",
    "project_rows",
    "project_rows_by_rule",
    "source_positions",
    "tokenize",
    "vocabulary_surfaces",
]

_MODULES = {
    "AlignedRows": "rows",
    "Case": "cases",
    "MappingStatistics": "vocabulary_map",
    "Predictions": "rows",
    "Surfaces": "surfaces",
    "TokenAlignment": "alignment",
    "VocabularyMap": "vocabulary_map",
    "align": "alignment",
    "align_tokens": "alignment",
    "build_vocabulary_map": "vocabulary_map",
    "count_mappings": "vocabulary_map",
    "plan_rows": "cases",
    "project_rows": "rows",
    "project_rows_by_rule": "rows",
    "source_positions": "cases",
    "tokenize": "ends",
    "vocabulary_surfaces": "surfaces",
}


def __getattr__(name: str) -> Any:
    # scipy and rapidfuzz take a third of a second to import, which checking a recipe does not need.
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
