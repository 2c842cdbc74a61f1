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
from typing import Any

_HOMES = {
    "AlignedRows": "alignment.rows",
    "Case": "alignment.rows",
    "MappingStatistics": "alignment.vocabulary_map",
    "Predictions": "alignment.rows",
    "Surfaces": "alignment.surfaces",
    "TokenAlignment": "alignment.alignment",
    "TokenizedText": "types",
    "TopK": "types",
    "VocabularyMap": "alignment.vocabulary_map",
    "align": "alignment.alignment",
    "align_tokens": "alignment.alignment",
    "build_vocabulary_map": "alignment.vocabulary_map",
    "count_mappings": "alignment.vocabulary_map",
    "plan_rows": "alignment.rows",
    "project_rows": "alignment.rows",
    "project_rows_by_rule": "alignment.papers",
    "source_positions": "alignment.papers",
    "tokenize": "alignment.ends",
    "vocabulary_surfaces": "alignment.surfaces",
}
"""The module below ``fusekit`` in which each public name is."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # scipy and rapidfuzz take a third of a second to import, which checking a recipe does not need.
    if name in _HOMES:
        return getattr(import_module(f"fusekit.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
